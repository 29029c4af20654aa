"""A cache of two planes: all tiers move and store both, at any world size.

The second plane is like the index keys of sparse attention: 128 values, in FP8 with the scales of a
page after its values.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3.cache.disk import GOOD, UNIT, DiskFiles, UnitFormat, UnitShard
from dsv3.cache.host import HostPool
from dsv3.cache.layout import CacheLayout, Plane
from dsv3.cache.pool import CachePool
from dsv3.distributed.collectives import SingleRank
from tests.checkpoint_files import TINY

CPU = torch.device("cpu")
INDEX_PLANES = [
    Plane("index", 128, 128, (0, 1, 2), "fp8", has_scales_apart=True),
    Plane("index", 128, 128, (0, 2), "fp8", has_scales_apart=True),
    Plane("index", 128, 128, (0, 1, 2), "bf16"),
    Plane("index", 128, 128, (0, 1, 2), "fp32"),
]
WORLDS = [1, 4]


@pytest.fixture(params=INDEX_PLANES, ids=lambda plane: plane.dtype)
def index_plane(request: pytest.FixtureRequest) -> Plane:
    plane: Plane = request.param
    return plane


def two_planes(index_plane: Plane, tp: int, rank: int) -> CacheLayout:
    """Packed latents of 145 values before the index keys, which so begin at odd addresses."""
    config = dataclasses.replace(TINY, kv_lora_rank=129, qk_rope_head_dim=8, num_hidden_layers=3)
    layout = CacheLayout.make(config, "latent", "tokens", "fp8", tp, rank)
    return dataclasses.replace(layout, planes=(layout.main, index_plane))


def random_pool(layout: CacheLayout, num_pages: int = 6) -> CachePool:
    pool = CachePool(layout, num_pages, CPU, SingleRank())
    for plane in pool.planes:
        plane.view(torch.uint8).random_(0, 255)
    return pool


def pages_of(pool: CachePool) -> Iterator[Tensor]:
    """The bytes of each plane by page, [pages, layers, ...]."""
    for plane in pool.planes:
        yield (plane.view(torch.uint8).view(len(plane), pool.num_pages, -1).transpose(0, 1))


def page_fields(pool: CachePool, page: int) -> Iterator[Tensor]:
    """The fields of one page as kernels see them, [layers, slots of a page, bytes]."""
    slots = pool.layout.paging.slots_per_page
    for plane, pages in zip(pool.layout.planes, pages_of(pool), strict=True):
        data = pages[page]
        if plane.has_scales_apart:
            yield data[:, : slots * plane.width].unflatten(1, (slots, -1))
            yield data[:, slots * plane.width :].unflatten(1, (slots, -1))
        else:
            yield data.unflatten(1, (slots, -1))


@pytest.mark.parametrize("tp", WORLDS)
def test_bytes_count_all_planes(index_plane: Plane, tp: int) -> None:
    layout = two_planes(index_plane, tp, 0)
    assert index_plane.entry_bytes == {"fp8": 132, "bf16": 256, "fp32": 512}[index_plane.dtype]
    indexed = len(index_plane.layers) * index_plane.entry_bytes
    assert layout.position_bytes == 3 * (129 + 4 * 2 + 2 * 8) + indexed
    assert layout.page_bytes == 64 // tp * layout.position_bytes
    assert random_pool(layout).num_bytes == 6 * layout.page_bytes


@pytest.mark.parametrize("tp", WORLDS)
def test_pages_are_copied_read_and_written_with_all_planes(index_plane: Plane, tp: int) -> None:
    layout = two_planes(index_plane, tp, tp - 1)
    pool, other = random_pool(layout), random_pool(layout)
    before = [pages.clone() for pages in pages_of(pool)]
    pool.copy_pages(torch.tensor([1, 2]), torch.tensor([2, 5]))
    for pages, old in zip(pages_of(pool), before, strict=True):
        assert torch.equal(pages, old[[0, 1, 1, 3, 4, 2]])
    for read in ([4], [5, 3]):
        kept = [pages.clone() for pages in pages_of(other)]
        data = pool.read_pages(torch.tensor(read))
        assert data.shape == (len(read), layout.page_bytes)
        other.write_pages(torch.tensor([1, 4][: len(read)]), data)
        for pages, source, old in zip(pages_of(other), pages_of(pool), kept, strict=True):
            old[[1, 4][: len(read)]] = source[read]
            assert torch.equal(pages, old)


@pytest.mark.parametrize("tp", WORLDS)
def test_host_memory_keeps_all_planes(index_plane: Plane, tp: int) -> None:
    pool = random_pool(two_planes(index_plane, tp, 0))
    before = [pages.clone() for pages in pages_of(pool)]
    host = HostPool(pool, 4)
    host.offload(torch.tensor([5, 1]), torch.tensor([3, 0]))
    for plane in pool.planes:
        plane.zero_()
    host.restore(torch.tensor([0, 3]), torch.tensor([2, 4]))
    for pages, old in zip(pages_of(pool), before, strict=True):
        assert torch.equal(pages[[2, 4]], old[[1, 5]])
        assert not pages[[0, 1, 3, 5]].any()


class Rank:
    """One rank with pages on the device, two in host memory, and access to a folder."""

    def __init__(self, folder: Path, index_plane: Plane, tp: int, rank: int) -> None:
        layout = two_planes(index_plane, tp, rank)
        self.pool = random_pool(layout)
        self.host = HostPool(self.pool, 2)
        self.fmt = UnitFormat.make(b"model", TINY, layout)
        shard = UnitShard(TINY, layout, rank)
        self.files = DiskFiles(folder, f"run{tp}", self.fmt, shard, self.host.pages.numpy())


@pytest.mark.parametrize("writers", WORLDS)
@pytest.mark.parametrize("readers", WORLDS)
def test_disk_keeps_all_planes_at_any_world_size(
    tmp_path: Path, index_plane: Plane, writers: int, readers: int
) -> None:
    """Position p has the same bytes in every field, whichever ranks wrote and read it."""
    units = (bytes(16),)
    written = [Rank(tmp_path, index_plane, writers, rank) for rank in range(writers)]
    for rank in written:
        rank.host.offload(torch.tensor([3]), torch.tensor([1]))
        rank.files.store(1, units)
    assert written[0].files.writes[0][1].result()
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size == written[0].fmt.file_bytes
    read = [Rank(tmp_path, index_plane, readers, rank) for rank in range(readers)]
    for rank in read:
        assert rank.fmt == written[0].fmt
        rank.files.fetch(0, units)
        assert rank.files.outcomes([0], 10.0) == [GOOD]
        rank.host.restore(torch.tensor([0]), torch.tensor([2]))
    wanted = [in_position_order(fields) for fields in fields_by_rank(written, 3)]
    found = [in_position_order(fields) for fields in fields_by_rank(read, 2)]
    assert len(wanted) == (3 if index_plane.has_scales_apart else 2)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape[1] == UNIT and torch.equal(ours, theirs)


def fields_by_rank(ranks: list[Rank], page: int) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(page_fields(rank.pool, page) for rank in ranks), strict=True)


def in_position_order(by_rank: tuple[Tensor, ...]) -> Tensor:
    """[layers, positions, bytes] of all ranks: slot j of rank r is position j * ranks + r."""
    return torch.stack(by_rank, 2).flatten(1, 2)


def test_files_of_other_planes_have_another_key() -> None:
    layout = two_planes(INDEX_PLANES[0], 1, 0)
    layouts = [dataclasses.replace(layout, planes=(layout.main,))]
    layouts += [two_planes(plane, 1, 0) for plane in INDEX_PLANES]
    keys = {UnitFormat.make(b"model", TINY, each).key for each in layouts}
    assert len(keys) == len(layouts)


def test_fields_are_views() -> None:
    layout = two_planes(INDEX_PLANES[0], 4, 0)
    page = np.zeros(layout.page_bytes, np.uint8)
    for number, field in enumerate(layout.fields(page), 1):
        assert not field.any()
        field[...] = number
    assert page.all()

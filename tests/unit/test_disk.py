"""Files of the disk cache: readable at any world size; damaged and foreign files are rejected."""

import dataclasses
import errno
import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest

from dsv3.cache import disk
from dsv3.cache.disk import BAD, GOOD, UNIT, DiskFiles, UnitFormat, UnitShard
from dsv3.cache.disk_index import DiskIndex
from dsv3.cache.layout import CacheLayout
from dsv3.settings import CacheDtype, CacheForm, KvShard
from tests.checkpoint_files import TINY

SMALL = dataclasses.replace(
    TINY, num_hidden_layers=2, kv_lora_rank=6, qk_rope_head_dim=2, qk_nope_head_dim=2, v_head_dim=2
)
KINDS: dict[str, tuple[CacheForm, KvShard, CacheDtype]] = {
    "sharded": ("latent", "tokens", "fp32"),
    "replicated": ("latent", "none", "bf16"),
    "fp8": ("latent", "tokens", "fp8"),
    "heads": ("heads", "tokens", "fp32"),
}
MODEL = b"model".ljust(16)


def unit(number: int) -> bytes:
    return bytes([number]) * 16


class Ranks:
    """All ranks of a world, sharing one folder; page 0 has data, page 1 is empty."""

    def __init__(self, root: Path, kind: str, tp: int, model: bytes = MODEL, seed: int = 0) -> None:
        form, shard, dtype = KINDS[kind]
        layouts = [CacheLayout.make(SMALL, form, shard, dtype, tp, r) for r in range(tp)]
        self.fmt = UnitFormat.make(model, SMALL, layouts[0])
        folder = root / self.fmt.key.hex()
        folder.mkdir(exist_ok=True)
        self.truth = [self.page(layout, r, tp, seed) for r, layout in enumerate(layouts)]
        self.pages = [np.stack([page, np.zeros_like(page)]) for page in self.truth]
        self.files = [
            DiskFiles(
                folder, f"run{tp}", self.fmt, UnitShard(SMALL, layout, r), pages.reshape(2, -1)
            )
            for r, (layout, pages) in enumerate(zip(layouts, self.pages, strict=True))
        ]
        self.units = tuple(unit(i) for i in range(layouts[0].page_size // UNIT))

    @staticmethod
    def page(layout: CacheLayout, rank: int, tp: int, seed: int) -> np.ndarray:
        """A rank's part of a page whose bytes depend on layer, position and index only."""
        width = layout.main.entry_bytes * (tp if layout.form == "heads" else 1)
        shape = (SMALL.num_hidden_layers, layout.page_size, width)
        layer, position, byte = np.indices(shape)
        whole = np.random.default_rng(seed).integers(0, 256, 9973, np.uint8)
        whole = whole[(layer * 4001 + position * 1009 + byte * 7) % 9973]
        if layout.form == "heads":
            return whole[..., rank * layout.main.entry_bytes : (rank + 1) * layout.main.entry_bytes]
        return whole[:, layout.paging.shard :: layout.paging.shards]

    def store(self) -> bool:
        for files in self.files:
            files.store(0, self.units)
        return all(done.result() for _, done in self.files[0].writes)

    def fetch(self, units: tuple[bytes, ...] | None = None) -> list[int]:
        outcomes = []
        for files in self.files:
            files.fetch(1, units or self.units)
            outcomes += files.outcomes([1], 10.0)
            files.forget(1)
        return outcomes

    def has_fetched(self) -> bool:
        pairs = zip(self.pages, self.truth, strict=True)
        return all(np.array_equal(pages[1], truth) for pages, truth in pairs)

    def path(self, number: int = 0) -> Path:
        return self.files[0].path(unit(number))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writers", [1, 4])
def test_files_are_readable_at_any_world_size(tmp_path: Path, kind: str, writers: int) -> None:
    written = Ranks(tmp_path, kind, writers)
    assert written.store()
    assert written.path().stat().st_size == written.fmt.file_bytes
    assert [path.name for path in tmp_path.glob("*/*")] == [f"{unit(0).hex()}.kv"]
    for readers in (1, 2, 4, 8):
        found = Ranks(tmp_path, kind, readers)
        assert found.fmt == written.fmt
        assert found.fetch() == [GOOD] * readers and found.has_fetched()


def test_pages_of_several_units(tmp_path: Path) -> None:
    """With three ranks a page has 192 positions; with one rank it has 64."""
    assert Ranks(tmp_path, "sharded", 3).store()
    assert len(list(tmp_path.glob("*/*.kv"))) == 3
    # Of 96 ranks, 32 have no segment of a unit.
    one, many = Ranks(tmp_path, "sharded", 1), Ranks(tmp_path, "sharded", 96)
    assert one.fetch() == [GOOD] and one.has_fetched()
    assert many.fetch() == [GOOD] * 96 and many.has_fetched()
    assert many.store()
    Ranks(tmp_path, "sharded", 3).path(1).unlink()
    assert BAD in many.fetch()


def test_a_stored_page_may_be_overwritten_at_once(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "sharded", 2)
    for files, pages in zip(ranks.files, ranks.pages, strict=True):
        files.store(0, ranks.units)
        pages[0] = 0
    assert ranks.files[0].writes[0][1].result()
    assert ranks.fetch() == [GOOD] * 2 and ranks.has_fetched()


@pytest.mark.parametrize("kind", ["sharded", "heads"])
def test_damage_at_any_offset_is_detected(tmp_path: Path, kind: str) -> None:
    ranks = Ranks(tmp_path, kind, 2)
    assert ranks.store()
    whole = ranks.path().read_bytes()
    segments_start, checksums_start = ranks.fmt.segment_offset(0), ranks.fmt.checksum_offset(0)
    offsets = [
        *range(segments_start),
        *range(segments_start, checksums_start, 211),
        *range(checksums_start, len(whole), 5),
    ]
    for offset in [*offsets, checksums_start - 1, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[offset] ^= 0x10
        ranks.path().write_bytes(damaged)
        assert BAD in ranks.fetch(), offset
    for length in (0, 1, segments_start, checksums_start - 1, checksums_start, len(whole) - 1):
        ranks.path().write_bytes(whole[:length])
        assert ranks.fetch() == [BAD] * 2, length
    ranks.path().write_bytes(whole + b"\0")
    assert ranks.fetch() == [BAD] * 2
    ranks.path().write_bytes(whole)
    assert ranks.fetch() == [GOOD] * 2


def test_files_of_other_models_and_tokens_are_rejected(tmp_path: Path) -> None:
    ours, theirs = (Ranks(tmp_path, "sharded", 1, m.ljust(16)) for m in (b"ours", b"theirs"))
    assert ours.fmt.key != theirs.fmt.key != Ranks(tmp_path, "fp8", 1).fmt.key
    assert theirs.store() and ours.fetch() == [BAD]
    # A file of another model under the same hash; then a file of other tokens of this model.
    ours.path().write_bytes(theirs.path().read_bytes())
    assert ours.fetch() == [BAD]
    assert ours.store() and ours.fetch() == [GOOD]
    ours.path().rename(ours.path(1))
    assert ours.fetch((unit(1),)) == [BAD]


def test_unfinished_files_are_never_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk, "_CHECKSUM_SECONDS", 0.05)
    ranks = Ranks(tmp_path, "sharded", 2)
    ranks.files[0].store(0, (unit(1),))
    ranks.files[0].store(0, (unit(2),))
    assert [done.result() for _, done in ranks.files[0].writes] == [False, False]
    assert not ranks.files[0].is_writable
    assert len(caplog.messages) == 1 and "another rank has not written" in caplog.text
    assert not list(tmp_path.glob("*/*"))


def test_a_full_disk_stops_writing_but_not_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = Ranks(tmp_path, "sharded", 1)
    assert ranks.store()

    def full(file: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for number in (1, 2):
        ranks.files[0].store(0, (unit(number),))
        assert not ranks.files[0].writes[-1][1].result()
    assert caplog.text.count("No space left") == 1
    assert [path.name for path in tmp_path.glob("*/*")] == [f"{unit(0).hex()}.kv"]
    assert ranks.fetch() == [GOOD]


def index_of(ranks: Ranks, root: Path, num_files: int) -> DiskIndex:
    return DiskIndex(root, num_files * ranks.fmt.file_bytes, ranks.fmt, ranks.files[0])


def keep(index: DiskIndex, ranks: Ranks, number: int) -> bool:
    """Write a page if the index accepts it."""
    if not index.accept((unit(number),)):
        return False
    for files in ranks.files:
        files.store(0, (unit(number),))
    index.catch_up()
    return (unit(number),) in index


def on_disk(root: Path) -> set[int]:
    return {bytes.fromhex(path.stem)[0] for path in root.glob("*/*.kv")}


def wait_for_deletions(ranks: Ranks) -> None:
    """Wait until queued deletions are done."""
    ranks.files[0]._writer.submit(int).result()


def test_the_directory_is_bounded(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "sharded", 2)
    index = index_of(ranks, tmp_path, 3)
    assert all(keep(index, ranks, number) for number in range(3))
    index.touch((unit(0),))
    assert not index.accept((unit(0),)) and keep(index, ranks, 3)
    wait_for_deletions(ranks)
    assert on_disk(tmp_path) == {0, 2, 3} and (unit(1),) not in index
    assert index.num_bytes == 3 * ranks.fmt.file_bytes and index.num_written == 4


def test_a_restart_keeps_the_order_of_use(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "sharded", 2)
    index = index_of(ranks, tmp_path, 4)
    for number in range(3):
        assert keep(index, ranks, number)
        os.utime(ranks.path(number), (0, 1000 + number))
    assert ranks.fetch((unit(0),)) == [GOOD] * 2
    again = Ranks(tmp_path, "sharded", 1)
    smaller = index_of(again, tmp_path, 2)
    wait_for_deletions(again)
    assert on_disk(tmp_path) == {0, 2}
    assert (unit(0),) in smaller and (unit(1),) not in smaller
    assert "2 pages of this model" in smaller.describe()


def test_other_models_share_the_space(tmp_path: Path) -> None:
    ours, theirs = Ranks(tmp_path, "sharded", 1), Ranks(tmp_path, "sharded", 1, b"other".ljust(16))
    assert theirs.store()
    index = index_of(ours, tmp_path, 2)
    assert (unit(0),) not in index and index.num_bytes == ours.fmt.file_bytes
    assert keep(index, ours, 1) and keep(index, ours, 2)
    wait_for_deletions(ours)
    assert on_disk(tmp_path) == {1, 2}


def test_torn_stale_and_unknown_files_in_the_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = Ranks(tmp_path, "sharded", 1)
    folder = ranks.path().parent
    ranks.path(1).write_bytes(b"torn")
    (folder / "notes.txt").write_text("a user's file")
    for name, age in (("old", 10_000), ("new", 0)):
        file = folder / f"{unit(2).hex()}.{name}.tmp"
        file.touch()
        os.utime(file, (0, time.time() - age))
    index = index_of(ranks, tmp_path, 2)
    wait_for_deletions(ranks)
    assert {path.suffix for path in folder.iterdir()} == {".txt", ".tmp"}
    assert len(list(folder.glob("*.tmp"))) == 1 and index.num_bytes == 0
    assert len(caplog.messages) == 1 and "ignored and deleted" in caplog.text


def test_a_damaged_file_is_deleted_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = Ranks(tmp_path, "sharded", 1)
    index = index_of(ranks, tmp_path, 2)
    assert keep(index, ranks, 0)
    with caplog.at_level(logging.WARNING):
        index.discard((unit(0),))
        index.discard((unit(0),))
    wait_for_deletions(ranks)
    assert len(caplog.messages) == 1 and not ranks.path().exists() and index.num_bytes == 0
    assert keep(index, ranks, 0)


def test_pages_beyond_the_write_backlog_are_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(tmp_path, "sharded", 2)
    monkeypatch.setattr("dsv3.cache.disk_index._BACKLOG_BYTES", 2 * ranks.fmt.file_bytes)
    index = index_of(ranks, tmp_path, 9)
    assert [index.accept((unit(n),)) for n in range(3)] == [True, True, False]
    for number in range(2):
        for files in ranks.files:
            files.store(0, (unit(number),))
    index.catch_up()
    assert index.accept((unit(2),)) and index.num_bytes == 3 * ranks.fmt.file_bytes


def test_other_programs_files_are_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files of any name are not deleted or replaced, and symbolic links are not followed."""
    ranks = Ranks(tmp_path, "sharded", 1)
    assert ranks.store()
    folder, project = ranks.path().parent, tmp_path / "project"
    project.mkdir()
    old = {
        project / "draft.tmp": "mine",
        project / f"{unit(5).hex()}.{'0' * 16}.tmp": "mine",
        project / f"{unit(5).hex()}.kv": "of another program",
        folder / "draft.tmp": "mine",
        folder / f"{unit(6).hex()}.{'0' * 16}.tmp": "another program",
        ranks.path(1): "of another program",
    }
    for path, text in old.items():
        path.write_text(text)
    ranks.path(2).symlink_to(project / "draft.tmp")
    for path in old:
        os.utime(path, (0, 0))
    index = DiskIndex(tmp_path, 2 * ranks.fmt.file_bytes, ranks.fmt, ranks.files[0])
    assert not any(keep(index, ranks, number) for number in (1, 2))
    assert keep(index, ranks, 3) and keep(index, ranks, 4)
    wait_for_deletions(ranks)
    assert {path: path.read_text() for path in old} == old
    assert ranks.path(2).is_symlink()
    assert "not a file of a disk cache" in caplog.text
    assert not ranks.path(0).exists()  # only the cache's own file was deleted for space

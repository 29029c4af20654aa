"""The very source of the Gluon kernel, executed by an emulator, and what says when to take it."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv3_kernels import Paging, empty_parts, open_parts
from dsv3_kernels._decode_tiles import HOPPER_TILE, Tile
from dsv3_kernels.mla_decode import (
    mla_decode_ref,
    mla_decode_triton,
)
from dsv3_kernels.mla_decode_hopper import takes_hopper
from dsv3_kernels.mla_decode_parts import mla_decode_parts_ref, mla_decode_parts_triton
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.kernels.gluon_emulator import load
from tests.kernels.gluon_machine import Deadlock, Race
from tests.kernels.paged import scatter

HERE = sys.modules["dsv3_kernels.mla_decode_hopper"]
SOURCE = Path(HERE.__file__ or "").read_text()
C, R = 32, 16


def make(
    lengths: list[int], queries: int, heads: int, paging: Paging, dims: tuple[int, int] = (C, R)
):
    """Return the arguments of `mla_decode`; queries are the last positions."""
    torch.manual_seed(0)
    cache, page = scatter([torch.randn(n, sum(dims)) for n in lengths], paging)
    q = torch.randn(len(lengths), queries, heads, sum(dims)).bfloat16()
    pos = torch.tensor([[n - queries + i for i in range(queries)] for n in lengths])
    return q, cache.bfloat16(), page, pos, paging, dims[0], 0.25


def run(args, split: int, seed: int = 0, source: str = SOURCE, launch=mla_decode_triton):
    """Launch the source, with blocks as small as rotated keys are here."""
    tile = HOPPER_TILE if split == HOPPER_TILE.split else Tile(R, R, split, 4, 2, in_gluon=True)
    with pytest.MonkeyPatch.context() as patch:
        name = "_mla_decode_hopper_kernel"
        patch.setattr(HERE, name, load(source, seed)[name])
        return launch(*args, tile=tile)


def assert_right(got: tuple[Tensor, Tensor], args) -> None:
    """Numerators are rounded to eight bits; their sums are not."""
    o, lse = mla_decode_ref(*args)
    assert_close("o", got[0], o, 5e-3)
    assert_close("lse", got[1], lse, 1e-5)


@pytest.mark.parametrize(
    ("lengths", "queries", "heads", "paging", "split"),
    [
        ([1, 63, 129, 300, 17], 1, 20, Paging(16), 64),
        ([300, 2], 2, 7, Paging(64, 8, 7), 16),
        ([63, 3, 129, 33], 3, 5, Paging(32, 4, 0), 128),
        ([96, 97], 1, 16, Paging(16, 2, 1), 32),
    ],
)
def test_kernel(lengths: list[int], queries: int, heads: int, paging: Paging, split: int) -> None:
    args = make(lengths, queries, heads, paging)
    args[3][-1, -1] = -1
    args[3][1], args[2][1] = -1, 0
    for seed in range(2):
        got = run(args, split, seed)
        assert bool((got[0][1] == 0).all()) and bool((got[1][1] == -torch.inf).all())
        assert_right(got, args)


def test_shapes_of_the_model() -> None:
    args = make([150, 1], 1, 100, Paging(64), (512, 64))
    assert_right(run(args, 1024), args)


def test_a_sequence_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on how many programs share its splits, nor on the order in which warps go on."""
    args = make([129, 300, 1], 2, 9, Paging(16))
    want = run(args, 32)
    for b in range(3):
        alone = (args[0][b : b + 1], args[1], args[2][b : b + 1], args[3][b : b + 1], *args[4:])
        for name, x, y in zip(("o", "lse"), run(alone, 32, seed=b + 1), want, strict=True):
            assert_bitwise_equal(name, x, y[b : b + 1])
    monkeypatch.setattr(sys.modules["dsv3_kernels._decode_tiles"], "_PROGRAMS", 24)
    for x, y in zip(run(args, 32), want, strict=True):
        assert_bitwise_equal("two programs, ten splits", x, y)


@pytest.mark.parametrize("split", [64, 512])
def test_parts_are_in_the_order_of_ranks(split: int) -> None:
    """Queries lie as ranks sent them, among those of other sequences, and so do results."""
    _, cache, page, pos, paging, *_ = make([129, 3, 40], 2, 1, Paging(16, 2, 1))
    gathered = torch.randn(3, 8, 5, C + R).bfloat16()
    parts, want = empty_parts(gathered, C).fill_(7.0), empty_parts(gathered, C).fill_(7.0)
    args = gathered[:, 1:7], cache, page, pos, paging, 0.25
    mla_decode_parts_ref(*args, want[:, 1:7])
    run((*args, parts[:, 1:7]), split, launch=mla_decode_parts_triton)
    for name, x, y in zip(("o", "lse"), open_parts(parts), open_parts(want), strict=True):
        assert_close(name, x.float(), y.float(), 1e-2)


def without_a_line() -> Iterator[tuple[int, str]]:
    """Yield the source without each of the lines that order the kernel's work."""
    names = r"mbarrier\.(wait|arrive|init)|fence_async_shared|thread_barrier"
    names += r"|async_copy\.(mbarrier_arrive|wait_group)"
    lines = SOURCE.splitlines(keepends=True)
    for i, line in enumerate(lines):
        if found := re.match(rf"(\s+)({names})\(", line):
            yield i + 1, "".join([*lines[:i], f"{found[1]}pass\n", *lines[i + 1 :]])


WRONG = list(without_a_line())


@pytest.mark.parametrize(("line", "source"), WRONG, ids=[f"line {line}" for line, _ in WRONG])
def test_every_barrier_is_needed(line: int, source: str) -> None:
    args = make([70, 129], 1, 20, Paging(16, 2, 1))
    with pytest.raises((Race, Deadlock)):
        run(args, 64, source=source)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("phase = (block // 2 + 1) % 2", "phase = block // 2 % 2"),
        ("mbarrier.wait(full.index(place), block // 2 % 2)", "mbarrier.wait(full.index(place), 1)"),
        ("mbarrier.wait(ready.index(stage), block // 2", "mbarrier.wait(ready.index(stage), block"),
        ("mbarrier.init(free.index(i), count=1)", "mbarrier.init(free.index(i), count=2)"),
        ("arrive(free.index(place + 1)", "arrive(free.index(place)"),
        ("warpgroup_mma_wait(1, deps=(left,))", "left"),
        ("if i == 3:", "if i == 0:"),
        ("copy_async(rope.index(stage)", "copy_async(rope.index(1 - stage)"),
        ("rope.index(stage).store", "rope.index(1 - stage).store"),
        ("stage = block % 2", "stage = 0"),
        ("return i % 2 * 2 + i // 2", "return i % 2 * 2"),
    ],
)  # fmt: skip
def test_mistakes_are_found(right: str, wrong: str) -> None:
    assert right in SOURCE
    args = make([70, 129], 1, 20, Paging(16, 2, 1))
    with pytest.raises((Race, Deadlock)):
        run(args, 64, source=SOURCE.replace(right, wrong, 1))


def test_mistakes_in_numbers_are_found() -> None:
    args = make([70, 129], 1, 20, Paging(16, 2, 1))
    for right, wrong in (
        ("right * decay[:, None]", "right"),
        ("(c + QUARTER)[None, :]", "c[None, :]"),
        ("(start + key)[None, :] < visible", "(start + key)[None, :] <= visible"),
        ("held = at < seen", "held = at < seen - 1"),
        ("at % PAGE", "at % (PAGE // 2)"),
    ):
        assert right in SOURCE
        with pytest.raises(AssertionError, match=r"off by|non-finite"):
            assert_right(run(args, 64, source=SOURCE.replace(right, wrong)), args)


def test_it_is_taken_only_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    q, cache = (torch.zeros(n, 576, dtype=torch.bfloat16) for n in (128, 1))
    assert not takes_hopper(q, cache, 128, 512)
    monkeypatch.setattr(HERE, "is_tried", "gluon".__eq__)
    with pytest.raises(RuntimeError, match="compute capability 9"):
        takes_hopper(q, cache, 128, 512)
    monkeypatch.setattr(HERE, "is_hopper", lambda x: True)
    monkeypatch.setattr(HERE, "HAS_GLUON", True)
    assert takes_hopper(q, cache, 128, 512) and takes_hopper(q, cache, 33, 512)
    assert not takes_hopper(q, cache, 32, 512) and not takes_hopper(q, cache, 128, 448)
    assert not takes_hopper(q, cache.float(), 128, 512)
    assert not takes_hopper(q, torch.zeros(1, 656, dtype=torch.uint8), 128, 512)


def test_the_choice_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HERE, "is_tried", "gluon".__eq__)
    monkeypatch.setattr(HERE, "is_hopper", lambda x: True)
    monkeypatch.setattr(HERE, "HAS_GLUON", True)
    launched = []
    monkeypatch.setattr(
        sys.modules["dsv3_kernels.mla_decode"],
        "launch_hopper",
        lambda grid, tensors, sizes, places, split: launched.append((grid, split)),
    )
    mla_decode_triton(*make([3, 70], 1, 128, Paging(64), (512, 64)))
    assert launched == [((2, 1, 2), 1024)]

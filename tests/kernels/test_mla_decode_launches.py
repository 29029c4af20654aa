"""How many launches `mla_decode` makes, and how it splits sequences among programs."""

import math
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dsv3_kernels import PageTables, Paging, empty_parts, mla_decode, open_parts, pack_latent
from dsv3_kernels.attention._decode_tiles import Tile
from dsv3_kernels.attention._mla_decode_kernel import launch_decode
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.kernels.decode_arguments import TOLERANCE, Arguments, C, Dims, H, R, decode, make, run


def test_wide_tables_go_a_few_sequences_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of splits take no more memory than they may; a sequence's depend on none of it."""
    tile = Tile(16, 16, 16, 4, 2)
    _, args = make([129, 3, 40, 17, 64], 2)
    splits = args.page.shape[1]  # a page each
    allowed = 2 * splits * 2 * H * C * 4
    gathered = torch.randn(3, 10, H, C + R)
    tables = PageTables(args.page, args.query_pos, args.paging)

    def parts() -> tuple[torch.Tensor, torch.Tensor]:
        every = empty_parts(gathered, C)
        launch_decode(gathered, args.cache, tables, 0.25, open_parts(every), tile)
        return open_parts(every)

    want = run(args, tile)
    wanted_parts = parts()
    module = sys.modules["dsv3_kernels.attention._decode_tiles"]
    monkeypatch.setattr(module, "_SPLIT_BYTES", allowed)  # of two sequences
    for block, expected in zip(parts(), wanted_parts, strict=True):
        assert_bitwise_equal("of three ranks' heads", block, expected)
    empty = torch.empty
    sizes: list[Any] = []

    def recorded(*size: Any, **kwargs: Any) -> Tensor:
        sizes.append(size)
        return empty(*size, **kwargs)

    monkeypatch.setattr(torch, "empty", recorded)
    got = run(args, tile)
    held = [4 * math.prod(s[0]) for s in sizes if isinstance(s[0], tuple)]
    assert len(held) == 3 and max(held) == allowed
    for block, expected in zip(got, want, strict=True):
        assert_bitwise_equal("two sequences at a time", block, expected)


class Launches(NamedTuple):
    """Launches of both kernels: the spare parts and the number of parts of each `mla_decode`."""

    decode: list[tuple[int, int]]
    merge: list[Tensor]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    seen = Launches([], [])
    module = sys.modules["dsv3_kernels.attention._mla_decode_kernel"]
    launch = module._launch_parts
    merge = module.merge_splits

    def launched(*args: Any) -> None:
        parts = args[4].o.shape[1] // args[2].query_pos_BQ.shape[1]
        seen.decode.append((args[7], parts))
        launch(*args)

    def merged(*args: Any) -> None:
        seen.merge.append(args[1])
        merge(*args)

    monkeypatch.setattr(module, "_launch_parts", launched)
    monkeypatch.setattr(module, "merge_splits", merged)
    return seen


LONG_AMONG_SHORT = [1, 40, 3, 200, 1, 17, 2, 5]


def bfloat16_args(
    lengths: list[int],
    queries: int,
    heads: int,
    shards: int,
    packed: bool,
) -> Arguments:
    """Return arguments with a padding sequence and, of several queries, a padding query."""
    longer = [max(n, queries) for n in lengths]
    _, args = make(longer, queries, Paging(16, shards, shards - 1), Dims(heads, 64, 16))
    args.query_pos[1] = -1
    args.page[1] = 0
    if queries > 1:
        args.query_pos[2, -1] = -1
    cache = args.cache.nan_to_num(0.5) * 2
    cache = pack_latent(cache, args.value_dim) if packed else cache.bfloat16()
    return args._replace(q=args.q.bfloat16(), cache=cache)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize(
    ("queries", "heads", "packed"), [(1, 16, False), (1, 128, True), (3, 16, True), (2, 5, False)]
)
def test_a_long_sequence_among_short_ones_is_one_launch(
    queries: int,
    heads: int,
    packed: bool,
    shards: int,
    launches: Launches,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tables allow far more parts than fit, the contexts do not."""
    args = bfloat16_args(LONG_AMONG_SHORT, queries, heads, shards, packed)
    allowed = 26
    module = sys.modules["dsv3_kernels.attention._decode_tiles"]
    monkeypatch.setattr(module, "_SPLIT_BYTES", allowed * queries * heads * args.value_dim * 4)
    tile = Tile(64 if heads == 128 else 16, 16, 16, 4, 2)
    o, lse = run(args, tile)
    want_o, want_lse = decode(args, op=mla_decode.reference)
    assert_close("o", o, want_o, TOLERANCE)
    assert_close("lse", lse, want_lse, TOLERANCE)
    B = len(LONG_AMONG_SHORT)
    assert launches.decode == [(allowed - B, allowed)]
    # Each sequence has as many parts as its own positions here need, at least one.
    held = [args.paging.local_len(int(last) + 1) for last in args.query_pos.amax(1)]
    splits = [max(1, -(-n // 16)) for n in held]
    assert B < sum(splits) <= allowed < B * max(splits)
    (first_B,) = launches.merge
    assert first_B.tolist() == [sum(splits[:b]) for b in range(B + 1)]


def test_splits_are_longer_where_parts_would_not_fit(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [300, 900, 1, 500]
    args = bfloat16_args(lengths, 1, 4, 1, False)
    module = sys.modules["dsv3_kernels.attention._decode_tiles"]
    monkeypatch.setattr(module, "_SPLIT_BYTES", 20 * 4 * args.value_dim * 4)
    got = run(args, Tile(16, 32, 16, 4, 2))
    want = decode(args, op=mla_decode.reference)
    for block, expected in zip(got, want, strict=True):
        assert_close("longer splits", block, expected, TOLERANCE)
    # 801 positions over 16 spare parts; the second sequence is padding.
    assert launches.decode == [(16, 20)]
    assert [first.tolist() for first in launches.merge] == [[0, 5, 6, 7, 15]]


@pytest.mark.parametrize("splits", [1, 3])
def test_queries_beyond_32_bits_are_launched_in_turn(
    splits: int, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a launch, offsets of a sequence's queries and outputs take 32 bits."""
    _, args = make([40, 33], 5)
    tile = Tile(16, 16, 48 // splits, 4, 2)
    want = run(args, tile)
    assert len(launches.decode) == 1
    module = sys.modules["dsv3_kernels.attention._mla_decode_kernel"]
    monkeypatch.setattr(module, "_MOST_VALUES", 2 * H * (C + R) + 1)
    got = run(args, tile)
    assert len(launches.decode) == 1 + 2 * 3, "two queries of a sequence at a time"
    for block, expected in zip(got, want, strict=True):
        assert_bitwise_equal("in turn", block, expected)

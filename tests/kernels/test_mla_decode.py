import math
import sys

import pytest
import torch
from torch import Tensor

from dsv3_kernels import (
    PageTables,
    Paging,
    empty_parts,
    merge_lse,
    mla_decode,
    mla_decode_parts,
    mla_decode_values,
    open_parts,
    pack_latent,
)
from dsv3_kernels.attention._decode_tiles import Tile
from dsv3_kernels.attention._mla_decode_kernel import launch_decode
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.kernels.decode_arguments import PAGE, TOLERANCE, C, Dims, H, R, decode, make, run
from tests.kernels.definitions import attend


@pytest.mark.parametrize("queries", [1, 2, 5])
def test_mla_decode(queries: int) -> None:
    lengths = [5, 64, 33]
    keys, args = make(lengths, queries)
    q = args.q
    query_pos = args.query_pos
    o, lse = decode(args)
    assert o.dtype == lse.dtype == torch.float32 and o.shape == (3, queries, H, C)
    for b in range(len(lengths)):
        for i in range(queries):
            seen = keys[b][: int(query_pos[b, i]) + 1]
            for h in range(H):
                want_o, want_lse = attend(q[b, i, h], seen, seen[:, :C], 0.25)
                assert_close(f"o {b} {i} {h}", o[b, i, h], want_o, 1e-5)
                assert_close(f"lse {b} {i} {h}", lse[b, i, h], torch.tensor(want_lse), 1e-5)


@pytest.mark.parametrize("queries", [1, 3])
def test_values_alone(queries: int) -> None:
    _, args = make([40, 17, 3], queries)
    args.query_pos[1, -1] = -1
    want, _ = decode(args, op=mla_decode.reference)
    tables = PageTables(args.page, args.query_pos, args.paging)
    for op in (mla_decode_values.reference, mla_decode_values.kernel):
        o = op(args.q, args.cache, tables, args.value_dim, args.scale)
        assert bool((o[1, -1] == 0).all())
        assert_close("o", o, want, TOLERANCE)


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_shards_merge_to_the_whole(shards: int) -> None:
    """Sequences shorter than the number of shards leave some without a key."""
    lengths = [1, 3, 40]
    whole_o, whole_lse = decode(make(lengths, 1)[1])
    parts = []
    for shard in range(shards):
        o, lse = decode(make(lengths, 1, Paging(PAGE, shards, shard))[1])
        empty = torch.tensor([n <= shard for n in lengths])
        assert bool((lse[empty] == -math.inf).all()) and bool((o[empty] == 0).all())
        assert bool(lse[~empty].isfinite().all())
        parts.append((o.flatten(0, 1), lse.flatten(0, 1)))
    o, lse = merge_lse(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))
    assert_close("o", o, whole_o.flatten(0, 1), 1e-5)
    assert_close("lse", lse, whole_lse.flatten(0, 1), 1e-6)


@pytest.mark.parametrize("shards", [1, 4])
def test_padding_queries_see_nothing(shards: int) -> None:
    _, args = make([40, 17, 3], 2, Paging(PAGE, shards, 0))
    query_pos = args.query_pos
    want_o, want_lse = decode(args)
    query_pos[1] = -1
    query_pos[2, 1] = -1
    args.page[1] = 0
    o, lse = decode(args)
    hidden = query_pos < 0
    assert bool((o[hidden] == 0).all()) and bool((lse[hidden] == -math.inf).all())
    assert_close("o", o[~hidden], want_o[~hidden], 1e-6)
    assert_close("lse", lse[~hidden], want_lse[~hidden], 1e-6)


@pytest.mark.parametrize("shards", [1, 4])
def test_tables_spelled_out_before_are_the_same(shards: int) -> None:
    _, args = make([17, 30], 2, Paging(PAGE, shards, shards - 1))
    keys = args.paging.keys(args.page, args.query_pos, longest=30)
    assert keys.slot_BS.shape == (2, args.paging.local_len(30))
    for got, want in zip(decode(args, keys), decode(args), strict=True):
        assert_close("spelled out", got, want, 1e-6)


def test_many_sequences_go_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    _, args = make([5, 64, 33, 7, 1], 1)
    whole = decode(args)
    monkeypatch.setattr(
        sys.modules["dsv3_kernels.attention.mla_decode"], "_SCORES", 80 * (C + R) * 2
    )
    for got, want in zip(decode(args), whole, strict=True):
        assert_bitwise_equal("two sequences at a time", got, want)


@pytest.mark.parametrize(
    ("lengths", "queries", "heads", "dims", "tile"),
    [
        ([1, 63, 129, 300, 17], 1, 16, (64, 16), Tile(16, 16, 128, 4, 2)),
        ([300, 5], 1, 20, (64, 16), Tile(32, 32, 64, 4, 2)),
        ([63, 2, 129], 3, 5, (24, 8), Tile(16, 16, 64, 4, 2)),
        ([300], 2, 1, (64, 16), Tile(16, 32, 512, 4, 2)),
        ([70], 1, 20, (512, 64), Tile(16, 32, 64, 4, 2)),
    ],
)
@pytest.mark.parametrize("shards", [1, 4])
def test_kernel(
    lengths: list[int],
    queries: int,
    heads: int,
    dims: tuple[int, int],
    tile: Tile,
    shards: int,
) -> None:
    for shard in {0, shards - 1}:
        _, args = make(lengths, queries, Paging(16, shards, shard), Dims(heads, *dims))
        if queries > 1:
            args.query_pos[-1, -1] = -1
        o, lse = run(args, tile)
        want_o, want_lse = decode(args, op=mla_decode.reference)
        assert_close("o", o, want_o, TOLERANCE)
        assert_close("lse", lse, want_lse, TOLERANCE)


@pytest.mark.parametrize("shards", [1, 4])
def test_kernel_of_no_position(shards: int) -> None:
    """Padding, and sequences of which this rank holds nothing."""
    _, args = make([3, 3, 40], 2, Paging(PAGE, shards, shards - 1))
    args.query_pos[1] = -1
    args.page[1] = 0
    o, lse = run(args, Tile(16, 16, 16, 4, 2))
    want_o, want_lse = decode(args, op=mla_decode.reference)
    assert bool((lse[1] == -math.inf).all()) and bool((o[1] == 0).all())
    assert_close("o", o, want_o, TOLERANCE)
    assert_close("lse", lse, want_lse, TOLERANCE)


@pytest.mark.parametrize("dims", [(256, 16), (24, 8)])
def test_kernel_reads_the_packed_form(dims: tuple[int, int]) -> None:
    _, args = make([63, 5], 1, dims=Dims(3, *dims))
    packed = pack_latent(args.cache.nan_to_num(0.5) * 3, dims[0])
    written = ~args.cache.isnan().any(1)
    packed[~written] = 0x7F  # NaN in all three parts
    args = args._replace(cache=packed)
    o, lse = run(args, Tile(16, 16, 32, 4, 2))
    want_o, want_lse = decode(args, op=mla_decode.reference)
    assert_close("o", o, want_o, TOLERANCE)
    assert_close("lse", lse, want_lse, TOLERANCE)


def test_kernel_of_bfloat16() -> None:
    _, args = make([129, 40], 2)
    args = args._replace(q=args.q.bfloat16(), cache=args.cache.bfloat16())
    o, lse = decode(args, op=mla_decode.kernel)
    want_o, want_lse = decode(args, op=mla_decode.reference)
    assert_close("o", o, want_o, TOLERANCE)
    assert_close("lse", lse, want_lse, TOLERANCE)


def test_a_sequence_does_not_depend_on_the_batch() -> None:
    """Nor on the width of the tables, nor on the queries beside it."""
    tile = Tile(16, 16, 64, 4, 2)
    _, args = make([129, 300, 1, 64], 2)
    o, lse = run(args, tile)
    for b in range(4):
        width = -(-(int(args.query_pos[b, 1]) + 1) // PAGE)
        row = slice(b, b + 1)
        one = args._replace(
            q=args.q[row], page=args.page[row, :width], query_pos=args.query_pos[row]
        )
        alone = run(one, tile)
        assert_bitwise_equal("o", alone[0], o[b : b + 1])
        assert_bitwise_equal("lse", alone[1], lse[b : b + 1])


def test_how_many_programs_share_the_splits_does_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tile = Tile(16, 16, 16, 4, 2)
    _, args = make([129, 3], 1)
    want = run(args, tile)
    monkeypatch.setattr(sys.modules["dsv3_kernels.attention._decode_tiles"], "_PROGRAMS", 2 * 4)
    for got, expected in zip(run(args, tile), want, strict=True):
        assert_bitwise_equal("eight programs, ten parts", got, expected)


@pytest.mark.parametrize("split", [64, 512])
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("ranks", [1, 3])
def test_parts_are_the_same_in_another_order(ranks: int, queries: int, split: int) -> None:
    """Queries as gathered from ranks, among those of other sequences; results as sent back."""
    heads = 2
    _, args = make([129, 3, 40], queries, Paging(PAGE, 2, 1))
    cache = args.cache
    T = 3 * queries
    tables = PageTables(args.page, args.query_pos, args.paging)
    gathered = torch.randn(ranks, T + 2, heads, C + R)
    q = gathered[:, 1 : T + 1]
    together = q.transpose(0, 1).reshape(3, queries, ranks * heads, C + R)
    o, lse = mla_decode.reference(together, cache, tables, C, 0.25)
    tile = Tile(16, 16, split, 4, 2)

    def by_kernel(
        q: Tensor, cache: Tensor, tables: PageTables, scale: float, parts: Tensor
    ) -> None:
        launch_decode(q, cache, tables, scale, open_parts(parts), tile)

    for run_parts in (mla_decode_parts.reference, by_kernel):
        every = empty_parts(gathered, C).fill_(7.0)
        run_parts(q, cache, tables, 0.25, every[:, 1 : T + 1])
        got_o, got_lse = open_parts(every)
        assert bool((got_o[:, [0, -1]] == 7).all()), "the rows of others"
        for p in range(ranks):
            own = slice(p * heads, (p + 1) * heads)
            assert_close("o", got_o[p, 1:-1], o[:, :, own].flatten(0, 1), TOLERANCE)
            assert_close("lse", got_lse[p, 1:-1], lse[:, :, own].flatten(0, 1), TOLERANCE)

"""The attention layer's kernels on a real GPU (TRITON_INTERPRET=0), at V3's shapes."""

from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dsv3_kernels import (
    EntryWrite,
    KeysValues,
    PageTables,
    Paging,
    Rotation,
    RowParams,
    absorb_query,
    act_quant,
    add_rmsnorm,
    empty_parts,
    expand_values,
    mla_decode_parts,
    norm_and_cache,
    open_parts,
    pack_latent,
    rope_and_cache,
    rotate,
    sample,
)
from dsv3_kernels._triton import is_hopper
from dsv3_kernels.attention._decode_tiles import tile_for
from dsv3_kernels.attention.mha_decode import mha_decode
from dsv3_kernels.attention.mla_decode import launch_mla_decode, mla_decode
from dsv3_kernels.attention.mla_prefill import mla_prefill, mla_prefill_packed
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.kernels.paged import scatter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
# Relative to the largest result, derived from the formats and unmeasured: to be replaced by twice
# the first measured error. bfloat16 rounds by 2**-9: each probability, results that are stored, and
# latents of the packed cache; results are up to half the largest value, so 2 * 2**-9 for each of
# the first two. float32 sums 2,500 products in another order: sqrt(2500) * 2**-24 = 3e-6, and
# sqrt(576) * 2**-24 in the scores; exp2 has an error of 2**-22. Four times that.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(("heads", "queries"), [(1, 1), (16, 1), (20, 1), (16, 3), (128, 1)])
@pytest.mark.parametrize("shards", [1, 8])
def test_mla_decode(
    dtype: torch.dtype, is_packed: bool, heads: int, queries: int, shards: int
) -> None:
    torch.manual_seed(0)
    lengths, paging = [3, 63, 2500, 129], Paging(64, shards, shards - 1)
    cache, page = scatter([torch.randn(n, 576) for n in lengths], paging)
    if is_packed:
        is_unwritten = cache.isnan().any(1)
        cache = pack_latent(cache.nan_to_num(0), 512)
        cache[is_unwritten] = 0x7F
    else:
        cache = cache.to(dtype)
    q = torch.randn(4, queries, heads, 576).to(dtype)
    pos = torch.tensor(lengths)[:, None] - queries + torch.arange(queries)
    pos[1], page[1] = -1, 0
    args = [t.cuda() for t in (q, cache, page, pos)]
    tables = PageTables(args[2], args[3], paging)
    want = mla_decode.reference(q, cache, PageTables(page, pos, paging), 512, 0.05)
    chosen = mla_decode.kernel(args[0], args[1], tables, 512, 0.05)
    # With splits of a given length, as always in float32, nothing depends on the batch.
    tile = tile_for(heads * queries, dtype == torch.float32, is_hopper(args[0]))
    got = launch_mla_decode(args[0], args[1], tables, 512, 0.05, tile)
    for result in (chosen, got):
        for name, x, y in zip(("o", "lse"), result, want, strict=True):
            assert_close(name, x.cpu(), y, TOLERANCE[dtype])
    for b in range(4):
        one = launch_mla_decode(
            args[0][b : b + 1], args[1], tables.sequences(b, b + 1), 512, 0.05, tile
        )
        assert_bitwise_equal("alone", one[0][0], got[0][b])
        if dtype == torch.float32:
            assert_bitwise_equal("chosen", chosen[0][b], got[0][b])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 33])
def test_way_of_a_step_through_latent_space(dtype: torch.dtype, tokens: int) -> None:
    """Absorb, attend with the heads of eight ranks, merge what eight ranks found, expand."""
    torch.manual_seed(5)
    w, angle = torch.randn(16, 256, 512).to(dtype) / 20, torch.rand(tokens, 32) * 50
    rotation = Rotation(angle.cos(), angle.sin(), True)
    moved = Rotation(angle.cos().cuda(), angle.sin().cuda(), True)
    q = torch.randn(tokens, 16, 192).to(dtype)
    absorbed = absorb_query(q.cuda(), w[:, :128].cuda(), moved)
    want = absorb_query.reference(q, w[:, :128], rotation)
    assert_close("queries", absorbed.cpu().float(), want.float(), TOLERANCE[dtype])
    ranks = torch.stack([want.roll(i, -1) for i in range(8)])
    on_cpu: list[Tensor] = []
    on_gpu: list[Tensor] = []
    for shard in range(8):
        paging = Paging(64, 8, shard)
        cache, page = scatter([torch.randn(200, 576) for _ in range(tokens)], paging)
        pos = torch.arange(tokens)[:, None] + 2
        for device, out in (("cpu", on_cpu), ("cuda", on_gpu)):
            args = [t.to(device) for t in (ranks, cache.to(dtype), page, pos)]
            out.append(empty_parts(args[0], 512))
            tables = PageTables(args[2], args[3], paging)
            mla_decode_parts(args[0], args[1], tables, 0.05, out[-1])
    parts = torch.stack(on_cpu)[:, 0]
    sent = torch.stack(on_gpu)[:, 0]
    for name, x, y in zip(("o", "lse"), open_parts(sent), open_parts(parts), strict=True):
        assert_close(name, x.cpu().float(), y.float(), TOLERANCE[dtype])
    back, quantized = expand_values(*open_parts(sent), w[:, 128:].cuda(), True)
    values, _ = expand_values.reference(*open_parts(sent.cpu()), w[:, 128:])
    assert_close("values", back.cpu().float(), values.float(), TOLERANCE[dtype])
    assert quantized is not None
    for name, x, y in zip(("q", "scale"), quantized, act_quant(back), strict=True):
        assert_bitwise_equal(name, x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mla_prefill(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    starts = [0, 1, 64, 200, 1000]
    q, kv = torch.randn(1000, 16, 192).to(dtype), torch.randn(1000, 16, 256).to(dtype)
    k_r, start = torch.randn(1000, 1, 64).to(dtype), torch.tensor(starts, dtype=torch.int32)
    args = q, kv[..., :128], k_r.expand(-1, 16, -1), kv[..., 128:]
    keys, moved = KeysValues(*args[1:]), KeysValues(*(t.cuda() for t in args[1:]))
    got = mla_prefill_packed(q.cuda(), moved, start.cuda(), 800, 0.07)
    for a, b in pairwise(starts):
        want = mla_prefill.reference(q[a:b], keys.rows(a, b), 0, 0, 0.07)
        for x, y in zip(got, want, strict=True):
            assert_close(f"rows {a} to {b}", x[a:b].cpu(), y, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mha_decode(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    lengths = [3, 63, 1500]
    cache, page = scatter([torch.randn(n, 16 * 320) for n in lengths], Paging(64))
    q, pos = torch.randn(3, 16, 192).to(dtype), torch.tensor(lengths) - 1
    tables = PageTables(page, pos[:, None], Paging(64))
    moved = PageTables(page.cuda(), pos[:, None].cuda(), Paging(64))
    got = mha_decode.kernel(q.cuda(), cache.to(dtype).cuda(), moved, 0.07).cpu()
    want = mha_decode.reference(q, cache.to(dtype), tables, 0.07)
    assert_close("o", got, want, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_packed", [False, True])
def test_rope_and_cache(dtype: torch.dtype, is_packed: bool) -> None:
    torch.manual_seed(3)
    kv, angle = torch.randn(50, 2112).to(dtype)[:, 1536:], torch.rand(50, 32) * 50
    slot = torch.randperm(60)[:50].where(torch.rand(50) < 0.7, torch.tensor(-1))
    cache = torch.zeros(60, 656, dtype=torch.uint8) if is_packed else torch.zeros(60, 576)
    write = EntryWrite(
        kv_TX=kv,
        weight_C=torch.rand(512) + 0.5,
        eps=1e-6,
        rotation=Rotation(angle.cos(), angle.sin(), True),
        cache_SX=cache,
        slot_T=slot,
        keep_from=20,
    )
    rotation = Rotation(angle.cos().cuda(), angle.sin().cuda(), True)
    moved = replace(
        write,
        kv_TX=kv.cuda(),
        weight_C=write.weight_C.cuda(),
        rotation=rotation,
        cache_SX=cache.cuda(),
        slot_T=slot.cuda(),
    )
    got, want = rope_and_cache(moved), rope_and_cache.reference(write)
    # A last place of e4m3 where a quotient falls to the other side.
    assert_close("kept", got.float().cpu(), want.float(), 2**-3 if is_packed else 2**-7)
    unwritten = cache.float().abs().sum(1) == 0
    assert bool((moved.cache_SX.cpu()[unwritten] == 0).all())
    x = torch.randn(50, 16, 192).to(dtype)
    y = x.cuda()
    rotate(y[..., 128:], rotation)
    rotate.reference(x[..., 128:], write.rotation)
    assert_close("rotated", y.cpu().float(), x.float(), 2**-7)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_norm_and_cache(tokens: int, is_packed: bool) -> None:
    """The bits of both launches alone."""
    torch.manual_seed(6)
    x = torch.randn(tokens, 2112).bfloat16().cuda()
    query, kv = x.split([1536, 576], 1)
    angle, slot = torch.rand(tokens, 32).cuda() * 50, torch.arange(tokens).cuda() - 1
    cache = torch.zeros(tokens, 656 if is_packed else 576, device="cuda")
    cache = cache.to(torch.uint8 if is_packed else torch.bfloat16)
    weights = torch.rand(1536).cuda() + 0.5, torch.rand(512).cuda() + 0.5
    entry = kv, weights[1], 1e-6, Rotation(angle.cos(), angle.sin(), True)
    others, keep = cache.clone(), tokens // 2
    write = EntryWrite(*entry, cache, slot, keep)
    norm_and_cache(query, weights[0], True, False, write)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h, q, kept = norm_and_cache(query, weights[0], True, False, write)
    for _ in range(3):
        x.normal_()
        cache.zero_()
        graph.replay()
        _, want_h, want_q = add_rmsnorm(query, None, weights[0], 1e-6, True)
        want_kept = rope_and_cache(EntryWrite(*entry, others.zero_(), slot, keep))
        assert q is not None and want_q is not None
        pairs = (h, want_h), (kept, want_kept), (cache, others), *zip(q, want_q, strict=True)
        for i, pair in enumerate(pairs):
            assert_bitwise_equal(f"result {i}", *pair)


def test_sample() -> None:
    """The same tokens as on a CPU, but where a logarithm's last bit decides."""
    torch.manual_seed(4)
    B = 200
    rows = torch.arange(B)
    logits = torch.randn(B, 129_280) * 3
    params = RowParams(
        temperature_B=torch.tensor([0.0, 0.7, 1.3])[rows % 3],
        top_k_B=torch.tensor([0, 5, 0, 50, 1000])[rows % 5],
        top_p_B=torch.tensor([1.0, 0.9, 0.3, 0.999])[rows % 4],
        min_p_B=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.01])[rows % 7],
        seed_B=rows * 0x1234567_89ABCDEF - 2**62,
        answer_B=rows % 11,
        position_B=rows * 1_000_003,
    )
    moved = RowParams(**{f.name: getattr(params, f.name).cuda() for f in fields(params)})
    got, want = sample(logits.cuda(), moved).cpu(), sample.reference(logits, params)
    # Unmeasured. The two best of a row are closer than 4 last places with a chance of 4e-6, and a
    # token that sums in another order (2e-5) move past `top_p` is rarely the one drawn: fewer than
    # 0.01 of 200 rows are expected to differ.
    assert int((got != want).sum()) <= 1

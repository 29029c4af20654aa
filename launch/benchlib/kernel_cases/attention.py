"""Cases of the attention layer: over the cache, into the cache, over a prompt."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchlib.kernel_cases.case import BLOCK, FP8_TOL, HEADS, QUERY, Args, C, Case, N, R, V, normal
from dsv3_kernels.attention.absorb_query import absorb_query_ref, absorb_query_triton
from dsv3_kernels.attention.expand_values import expand_values_ref, expand_values_triton
from dsv3_kernels.attention.kv_fp8 import pack_latent_ref, unpack_latent_ref
from dsv3_kernels.attention.merge_lse import merge_lse_ref, merge_lse_triton
from dsv3_kernels.attention.mla_decode import mla_decode_ref, mla_decode_triton
from dsv3_kernels.attention.mla_prefill import mla_prefill_ref, mla_prefill_triton
from dsv3_kernels.attention.norm_and_cache import norm_and_cache_ref, norm_and_cache_triton
from dsv3_kernels.attention.paging import Paging
from dsv3_kernels.attention.parts import empty_parts, open_parts, part_bytes
from dsv3_kernels.attention.rope_and_cache import ToCache, rope_and_cache_ref, rope_and_cache_triton


def decode(small: bool) -> Iterator[Case]:
    """Yield one token a sequence over caches of many lengths, and the merge of their parts."""
    sizes = [(2, 70, 4)]
    if not small:
        sizes = [
            (batch, context, heads)
            for context in (1024, 4096, 16384)
            for batch in (1, 8, 128)
            for heads in (HEADS, 8 * HEADS)
        ]
    for size in sizes:
        for packed in (False, True):
            yield _mla_decode(*size, packed)
    B, H, dim = (3, 2, 32) if small else (128, HEADS, C)

    def parts(d: torch.device) -> Args:
        return torch.randn(8, B, H, dim, device=d), torch.randn(8, B, H, device=d)

    name, pair = f"8 x {B} x {H} x {dim}", (merge_lse_triton, merge_lse_ref)
    yield Case("merge_lse", name, parts, *pair, 9 * B * H * dim * 4, tol=1e-5)


def _mla_decode(batch: int, context: int, heads: int, packed: bool) -> Case:
    pages, page_size = -(-context // 64), 64
    width = C + 16 + 2 * R if packed else 2 * (C + R)

    def operands(d: torch.device) -> Args:
        entries = normal(batch * pages * page_size + page_size, C + R, device=d)
        if packed:
            entries = pack_latent_ref(entries, C)
        table = torch.randperm(batch * pages, device=d).view(batch, pages).int() + 1
        q = normal(batch, 1, heads, C + R, device=d)
        position = torch.full((batch, 1), context - 1, device=d)
        return q, entries, table, position, Paging(page_size), C, (N + R) ** -0.5

    return Case(
        "mla_decode",
        f"B {batch}, S {context}, H {heads}, {'fp8' if packed else 'bf16'} cache",
        operands,
        mla_decode_triton,
        mla_decode_ref,
        batch * context * width + batch * heads * (2 * (C + R) + 4 * C),
        2.0 * batch * heads * context * (2 * C + R),
        tol=1e-2,
    )


def absorption(small: bool) -> Iterator[Case]:
    """Yield queries on their way into latent space, and results of eight ranks on theirs out."""
    H, held = (2, 32 * 16) if small else (HEADS, HEADS * C * N)
    for T in (3,) if small else (1, 8, 128):

        def queries(d: torch.device, T: int = T) -> Args:
            angle = torch.rand(T, R // 2, device=d)
            w, n, c = ((N + V) * C, 16, 32) if small else ((N + V) * C, N, C)
            w_HNC = normal(H, w // C, c, device=d)[:, :n]
            return normal(T, H, n + R, device=d), w_HNC, angle.cos(), angle.sin(), True

        def parts(d: torch.device, T: int = T) -> Args:
            c = 32 if small else C
            z, lse = open_parts(empty_parts(normal(8, T, H, 1, device=d), c))
            z.copy_(normal(8, T, H, c, device=d))
            lse.copy_(torch.randn(8, T, H, device=d))
            return z, lse, normal(H, N + V, c, device=d)[:, N:], True

        moved = 2 * T * H * (N + C + 2 * R)
        pair, flops = (absorb_query_triton, absorb_query_ref), 2.0 * T * held
        name = f"T {T}, H {H}"
        yield Case("absorb_query", name, queries, *pair, 2 * held + moved, flops, tol=1e-2)
        moved = T * H * (8 * part_bytes(C, 2) + 3 * V)
        back = expand_values_triton, expand_values_ref
        name = f"8 x {T}, H {H}"
        yield Case("expand_values", name, parts, *back, 2 * held + moved, flops, tol=FP8_TOL)


def latents(small: bool) -> Iterator[Case]:
    """Yield the way of new tokens into the cache, alone and beside the query's norm."""
    for T, packed in [(3, True)] if small else [(t, p) for t in (1, 128, 4096) for p in (0, 1)]:

        def operands(d: torch.device, T: int = T, packed: bool = bool(packed)) -> ToCache:
            angle = torch.rand(T, R // 2, device=d)
            width, dtype = (C + 16 + 2 * R, torch.uint8) if packed else (C + R, torch.bfloat16)
            cache = torch.zeros(2 * T, width, dtype=dtype, device=d)
            norm = torch.rand(C, device=d) + 0.5, 1e-6, angle.cos(), angle.sin(), True
            return normal(T, C + R, device=d), *norm, cache, torch.arange(T, device=d), 0

        def both(d: torch.device, T: int = T, into: Callable[..., ToCache] = operands) -> Args:
            return normal(T, QUERY, device=d), torch.rand(QUERY, device=d) + 0.5, into(d)

        num_bytes = T * (4 * (C + R) + 4 * R + 8 + (C + R) * (1 if packed else 2))
        name = f"T {T}, {'fp8' if packed else 'bf16'} cache"
        yield Case(
            "rope_and_cache",
            name,
            operands,
            lambda *args: (rope_and_cache_triton(*args), args[6]),
            _entries_ref,
            num_bytes,
            tol=FP8_TOL,
            view=_entries,
        )
        yield Case(
            "norm_and_cache",
            name,
            both,
            lambda x, weight, into: (norm_and_cache_triton(x, weight, True, False, into), into[6]),
            _both_ref,
            num_bytes + T * QUERY * (5 + 4 / BLOCK),
            tol=FP8_TOL,
            view=lambda result: (result[0][:2], *_entries((result[0][2], result[1]))),
        )


def _entries_ref(*args: Any) -> tuple[Tensor, Tensor]:
    """Return what is kept, and a cache with the entries."""
    cache = torch.zeros_like(args[6])
    args = *args[:6], cache, *args[7:]
    return rope_and_cache_ref(*args), cache


def _both_ref(x_TA: Tensor, weight_A: Tensor, into: ToCache) -> tuple[Any, Tensor]:
    """Return what `norm_and_cache` does, and a cache with the entries."""
    cache = torch.zeros_like(into[6])
    into = *into[:6], cache, *into[7:]
    return norm_and_cache_ref(x_TA, weight_A, True, False, into), cache


def _entries(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what is kept, and what the cache holds as numbers: bits of its scales may differ."""
    kept, cache = result
    return kept, unpack_latent_ref(cache, C, kept.dtype) if cache.dtype == torch.uint8 else cache


def prefill(small: bool) -> Iterator[Case]:
    """Yield prompts without a prefix."""
    for S, H in [(70, 2)] if small else [(1024, 16), (4096, 16), (4096, 128)]:

        def operands(d: torch.device, S: int = S, H: int = H) -> Args:
            q, k, rope = (normal(S, h, dim, device=d) for h, dim in ((H, N + R), (H, N), (1, R)))
            value = normal(S, H, V, device=d)
            return q, k, rope.expand(-1, H, -1), value, 0, 0, (N + R) ** -0.5

        yield Case(
            "mla_prefill",
            f"S {S}, H {H}",
            operands,
            mla_prefill_triton,
            mla_prefill_ref,
            2 * S * H * (2 * N + R + 2 * V),
            1.0 * S * S * H * (N + R + V),
            tol=1e-2,
            peer=_sdpa,
        )


def _sdpa(
    q_SHX: Tensor, k_SHN: Tensor, k_SHR: Tensor, v_SHV: Tensor, _key: int, _query: int, scale: float
) -> Tensor:
    k_SHX = torch.cat((k_SHN, k_SHR), -1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_SHX, k_SHX, v_SHV))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

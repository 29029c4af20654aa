"""Cases of the attention layer: decode, cache writes, prefill."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchlib.kernel_cases.case import FP8_TOL, HEADS, QUERY, Args, C, Case, N, R, V, normal
from dsv3_kernels.attention.absorb_query import absorb_query
from dsv3_kernels.attention.expand_values import expand_values
from dsv3_kernels.attention.keys_values import KeysValues
from dsv3_kernels.attention.kv_fp8 import pack_latent, unpack_latent
from dsv3_kernels.attention.merge_lse import merge_lse
from dsv3_kernels.attention.mla_decode import mla_decode
from dsv3_kernels.attention.mla_prefill import mla_prefill
from dsv3_kernels.attention.norm_and_cache import norm_and_cache
from dsv3_kernels.attention.paging import PageTables, Paging
from dsv3_kernels.attention.parts import empty_parts, open_parts, part_bytes
from dsv3_kernels.attention.rope import Rotation
from dsv3_kernels.attention.rope_and_cache import EntryWrite, rope_and_cache
from dsv3_kernels.fp8_format import BLOCK


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

    name = f"8 x {B} x {H} x {dim}"
    yield Case.of(merge_lse, name, parts, 9 * B * H * dim * 4, tol=1e-5)


def _mla_decode(batch: int, context: int, heads: int, packed: bool) -> Case:
    pages = -(-context // 64)
    page_size = 64
    width = C + 16 + 2 * R if packed else 2 * (C + R)

    def operands(d: torch.device) -> Args:
        entries = normal(batch * pages * page_size + page_size, C + R, device=d)
        if packed:
            entries = pack_latent(entries, C)
        table = torch.randperm(batch * pages, device=d).view(batch, pages).int() + 1
        q = normal(batch, 1, heads, C + R, device=d)
        position = torch.full((batch, 1), context - 1, device=d)
        tables = PageTables(table, position, Paging(page_size))
        return q, entries, tables, C, (N + R) ** -0.5

    return Case.of(
        mla_decode,
        f"B {batch}, S {context}, H {heads}, {'fp8' if packed else 'bf16'} cache",
        operands,
        batch * context * width + batch * heads * (2 * (C + R) + 4 * C),
        2.0 * batch * heads * context * (2 * C + R),
        tol=1e-2,
    )


def absorption(small: bool) -> Iterator[Case]:
    """Yield the absorption of queries, and the expansion of eight ranks' partial outputs."""
    H, held = (2, 32 * 16) if small else (HEADS, HEADS * C * N)
    for T in (3,) if small else (1, 8, 128):

        def queries(d: torch.device, T: int = T) -> Args:
            angle = torch.rand(T, R // 2, device=d)
            w, n, c = ((N + V) * C, 16, 32) if small else ((N + V) * C, N, C)
            w_HNC = normal(H, w // C, c, device=d)[:, :n]
            rotation = Rotation(angle.cos(), angle.sin(), True)
            return normal(T, H, n + R, device=d), w_HNC, rotation

        def parts(d: torch.device, T: int = T) -> Args:
            c = 32 if small else C
            z, lse = open_parts(empty_parts(normal(8, T, H, 1, device=d), c))
            z.copy_(normal(8, T, H, c, device=d))
            lse.copy_(torch.randn(8, T, H, device=d))
            return z, lse, normal(H, N + V, c, device=d)[:, N:], True

        moved = 2 * T * H * (N + C + 2 * R)
        flops = 2.0 * T * held
        name = f"T {T}, H {H}"
        yield Case.of(absorb_query, name, queries, 2 * held + moved, flops, tol=1e-2)
        moved = T * H * (8 * part_bytes(C, 2) + 3 * V)
        name = f"8 x {T}, H {H}"
        yield Case.of(expand_values, name, parts, 2 * held + moved, flops, tol=FP8_TOL)


def latents(small: bool) -> Iterator[Case]:
    """Yield cache writes of new tokens, alone and fused with the query's norm."""
    for T, packed in [(3, True)] if small else [(t, p) for t in (1, 128, 4096) for p in (0, 1)]:

        def write(d: torch.device, T: int = T, packed: bool = bool(packed)) -> EntryWrite:
            angle = torch.rand(T, R // 2, device=d)
            width, dtype = (C + 16 + 2 * R, torch.uint8) if packed else (C + R, torch.bfloat16)
            return EntryWrite(
                kv_TX=normal(T, C + R, device=d),
                weight_C=torch.rand(C, device=d) + 0.5,
                eps=1e-6,
                rotation=Rotation(angle.cos(), angle.sin(), True),
                cache_SX=torch.zeros(2 * T, width, dtype=dtype, device=d),
                slot_T=torch.arange(T, device=d),
                keep_from=0,
            )

        def one(d: torch.device, write: Callable[..., EntryWrite] = write) -> Args:
            return (write(d),)

        def both(d: torch.device, T: int = T, write: Callable[..., EntryWrite] = write) -> Args:
            return normal(T, QUERY, device=d), torch.rand(QUERY, device=d) + 0.5, write(d)

        num_bytes = T * (4 * (C + R) + 4 * R + 8 + (C + R) * (1 if packed else 2))
        name = f"T {T}, {'fp8' if packed else 'bf16'} cache"
        yield Case(
            "rope_and_cache",
            name,
            one,
            lambda write: (rope_and_cache.kernel(write), write.cache_SX),
            _entries_of_reference,
            num_bytes,
            tol=FP8_TOL,
            view=_entries,
        )
        yield Case(
            "norm_and_cache",
            name,
            both,
            lambda x, weight, write: (
                norm_and_cache.kernel(x, weight, True, False, write),
                write.cache_SX,
            ),
            _both_of_reference,
            num_bytes + T * QUERY * (5 + 4 / BLOCK),
            tol=FP8_TOL,
            view=lambda result: (result[0][:2], *_entries((result[0][2], result[1]))),
        )


def _entries_of_reference(write: EntryWrite) -> tuple[Tensor, Tensor]:
    """Return the result of `rope_and_cache.reference`, and a cache with the entries."""
    write = replace(write, cache_SX=torch.zeros_like(write.cache_SX))
    return rope_and_cache.reference(write), write.cache_SX


def _both_of_reference(x_TA: Tensor, weight_A: Tensor, write: EntryWrite) -> tuple[Any, Tensor]:
    """Return the result of `norm_and_cache.reference`, and a cache with the entries."""
    write = replace(write, cache_SX=torch.zeros_like(write.cache_SX))
    return norm_and_cache.reference(x_TA, weight_A, True, False, write), write.cache_SX


def _entries(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the kept entries, and the cache as numbers: bits of its scales may differ."""
    kept, cache = result
    return kept, unpack_latent(cache, C, kept.dtype) if cache.dtype == torch.uint8 else cache


def prefill(small: bool) -> Iterator[Case]:
    """Yield prompts without a cached prefix."""
    for S, H in [(70, 2)] if small else [(1024, 16), (4096, 16), (4096, 128)]:

        def operands(d: torch.device, S: int = S, H: int = H) -> Args:
            q, k, rope = (normal(S, h, dim, device=d) for h, dim in ((H, N + R), (H, N), (1, R)))
            value = normal(S, H, V, device=d)
            return q, KeysValues(k, rope.expand(-1, H, -1), value), 0, 0, (N + R) ** -0.5

        yield Case.of(
            mla_prefill,
            f"S {S}, H {H}",
            operands,
            2 * S * H * (2 * N + R + 2 * V),
            1.0 * S * S * H * (N + R + V),
            tol=1e-2,
            peer=_sdpa,
        )


def _sdpa(q_SHX: Tensor, keys: KeysValues, _key: int, _query: int, scale: float) -> Tensor:
    k_SHX = torch.cat((keys.k_SHN, keys.k_SHR), -1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_SHX, k_SHX, keys.v_SHV))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

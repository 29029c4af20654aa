"""Every Triton kernel at DeepSeek-V3's shapes: inputs, bytes, FLOPs, reference, what libraries do.

`cases(small=False)` are the shapes of rank 0 of 8 (and some whole ones); with `small` ragged ones
that the interpreter can run.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels.act_quant import Quantized, act_quant_ref, act_quant_triton
from dsv3_kernels.benchmarks import FP8, copies_needed, median_seconds
from dsv3_kernels.fp8_gemm import fp8_gemm_ref, fp8_gemm_triton, make_locks
from dsv3_kernels.grouped_down import grouped_down_ref, grouped_down_triton
from dsv3_kernels.grouped_gate_up import grouped_gate_up_ref, grouped_gate_up_triton
from dsv3_kernels.grouped_gemm import Stack
from dsv3_kernels.kv_fp8 import pack_latent_ref
from dsv3_kernels.merge_lse import merge_lse_ref, merge_lse_triton
from dsv3_kernels.mla_decode import mla_decode_ref, mla_decode_triton
from dsv3_kernels.mla_prefill import mla_prefill_ref, mla_prefill_triton
from dsv3_kernels.moe import experts_ref, experts_triton
from dsv3_kernels.paging import Paging
from dsv3_kernels.permute import permute_ref, permute_triton, unpermute_ref, unpermute_triton
from dsv3_kernels.rmsnorm import add_rmsnorm_ref, add_rmsnorm_triton
from dsv3_kernels.rope_and_cache import rope_and_cache_ref, rope_and_cache_triton
from dsv3_kernels.route import Routing, route_ref, route_triton
from dsv3_kernels.router_logits import router_logits_ref, router_logits_triton
from dsv3_kernels.sample import sample_ref, sample_triton
from dsv3_kernels.silu_mul import silu_mul_quant_ref, silu_mul_quant_triton
from dsv3_kernels.testing import assert_close
from dsv3_kernels.weight_dequant import weight_dequant_ref, weight_dequant_triton

log = logging.getLogger(__name__)

Args = tuple[Any, ...]
BLOCK = 128
D, FF, E, K, HEADS, C, R, N, V, VOCAB = 7168, 2048, 32, 8, 16, 512, 64, 128, 128, 129280
BF16_TOL, FP8_TOL, SUM_TOL = 2**-7, 2**-3, 2e-3
# Name of the matrix, rows and columns.
MATRICES = (
    ("qkv_a", 2112, 7168),
    ("q_b tp8", 3072, 1536),
    ("q_b", 24576, 1536),
    ("o_proj tp8", 7168, 2048),
    ("o_proj", 7168, 16384),
    ("shared gate_up tp8", 512, 7168),
    ("shared gate_up", 4096, 7168),
    ("shared down tp8", 7168, 256),
    ("dense gate_up tp8", 4608, 7168),
    ("dense down tp8", 7168, 2304),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape.

    Attributes:
        op, shape: its name.
        make: fresh random operands on a device.
        kernel, reference: take them; what they return must agree.
        bytes, flops: that it cannot do without.
        dtype: of the matrix units: "fp8" or "bf16".
        tol: allowed difference, as a share of the largest value.
        peer: what cuBLAS or torch has for it; None if they cannot do it.
        view: makes results comparable that may differ in order.
    """

    op: str
    shape: str
    make: Callable[[torch.device], Args]
    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    bytes: float
    flops: float = 0.0
    dtype: str = "bf16"
    tol: float = BF16_TOL
    peer: Callable[..., Any] | None = None
    view: Callable[[Any], Any] = lambda result: result


def check(case: Case, device: torch.device) -> str:
    """Return what is wrong with a kernel on fresh operands; nothing if it is right."""
    operands = case.make(device)
    want = _tensors(case.view(case.reference(*operands)))
    try:
        got = _tensors(case.view(case.kernel(*operands)))
        assert len(got) == len(want), f"{len(got)} results, want {len(want)}"
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert a.dtype == b.dtype, f"result {i} is {a.dtype}, want {b.dtype}"
            assert_close(f"result {i}", a.float(), b.float(), case.tol)
    except (AssertionError, RuntimeError) as error:
        return str(error) or type(error).__name__
    return ""


def measure(case: Case, device: torch.device) -> tuple[float, float | None]:
    """Return the seconds of the kernel, and of its peer where that can do the job."""
    sets = [case.make(device) for _ in range(copies_needed(case.bytes))]

    def seconds(run: Callable[..., Any]) -> float:
        return median_seconds([partial(run, *operands) for operands in sets], device)

    ours = seconds(case.kernel)
    if case.peer is None:
        return ours, None
    try:
        return ours, seconds(case.peer)
    except (RuntimeError, ValueError) as error:  # old devices and versions cannot do it
        log.warning("%s %s: no peer: %s", case.op, case.shape, str(error).split("\n")[0])
        return ours, None


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, tuple | list):
        return [t for part in result for t in _tensors(part)]
    return []


def _normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _scaled(rows: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return an FP8 matrix and scales of clearly different size."""
    w = (torch.randn(rows, cols, device=device) * 20).to(FP8)
    scale = torch.rand(-(-rows // BLOCK), -(-cols // BLOCK), device=device) + 0.1
    return w, scale / 20 / cols**0.5


def _quantized(rows: int, cols: int, device: torch.device) -> Quantized:
    return act_quant_ref(torch.randn(rows, cols, device=device))


def cases(small: bool = False) -> Iterator[Case]:
    """Yield all cases."""
    for family in (_elementwise, _gemm, _experts, _routing, _decode, _latents, _prefill, _sampling):
        yield from family(small)


def _elementwise(small: bool) -> Iterator[Case]:
    for T, dim in [(3, 256)] if small else [(1, D), (128, D), (4096, D)]:
        values, quant, name = T * dim, T * dim * (1 + 4 / BLOCK), f"{T} x {dim}"
        pair = act_quant_triton, act_quant_ref
        make = partial(_rows, T, dim)
        yield Case("act_quant", name, make, *pair, 2 * values + quant, tol=FP8_TOL)

        def operands(d: torch.device, T: int = T, dim: int = dim) -> Args:
            x, y = (_normal(T, dim, device=d) for _ in range(2))
            return x, y, torch.rand(dim, device=d) + 0.5, 1e-6, True

        norm = add_rmsnorm_triton, add_rmsnorm_ref
        yield Case("add_rmsnorm", name, operands, *norm, 8 * values + quant, tol=FP8_TOL)
        silu = silu_mul_quant_triton, silu_mul_quant_ref
        make = partial(_rows, T, 2 * dim)
        yield Case("silu_mul_quant", name, make, *silu, 4 * values + quant, tol=FP8_TOL)
    for rows, cols in [(100, 200)] if small else [(D, FF), (4096, D)]:
        make = partial(_matrix, rows, cols)
        dequant = weight_dequant_triton, weight_dequant_ref
        yield Case("weight_dequant", f"{rows} x {cols}", make, *dequant, 3 * rows * cols)


def _rows(rows: int, cols: int, device: torch.device) -> Args:
    return (_normal(rows, cols, device=device),)


def _matrix(rows: int, cols: int, device: torch.device) -> Args:
    return (*_scaled(rows, cols, device), torch.bfloat16)


def _gemm(small: bool) -> Iterator[Case]:
    rows = (1, 5) if small else (1, 8, 64, 128, 1024, 4096)
    for name, F_out, dim in [("ragged", 72, 384)] if small else MATRICES:
        for M in rows:

            def operands(d: torch.device, M: int = M, F_out: int = F_out, dim: int = dim) -> Args:
                w, scale = _scaled(F_out, dim, d)
                return _quantized(M, dim, d), w, scale, torch.bfloat16, make_locks(w)

            yield Case(
                "fp8_gemm",
                f"{name} {F_out} x {dim}, M {M}",
                operands,
                fp8_gemm_triton,
                lambda x, w, scale, dtype, _locks: fp8_gemm_ref(x, w, scale, dtype),
                F_out * dim + M * (dim + 2 * F_out),
                2.0 * M * F_out * dim,
                "fp8",
                peer=_block_scaled_mm,
            )


def _block_scaled_mm(
    x: Quantized, w_FD: Tensor, scale_fd: Tensor, dtype: torch.dtype, _locks: Tensor
) -> Tensor:
    """Multiply as cuBLASLt does where it knows block scales (CUDA 12.9 and on, Hopper)."""
    scale_Td = x.scale.t().contiguous().t()  # by columns
    return torch._scaled_mm(x.q, w_FD.t(), scale_a=scale_Td, scale_b=scale_fd.t(), out_dtype=dtype)


def _experts(small: bool) -> Iterator[Case]:
    """Yield the experts as a whole, and their two products, with equally many tokens each."""
    held, dim, inner = (3, 256, 128) if small else (E, D, FF)
    matrix = dim * inner
    for each in (2,) if small else (1, 8, 64, 256):
        rows = held * each

        def chosen(d: torch.device, rows: int = rows) -> tuple[Tensor, Tensor]:
            ids = torch.arange(rows, device=d).view(-1, 2) % held
            return ids, torch.rand(rows // 2, 2, device=d)

        def operands(d: torch.device, rows: int = rows) -> Args:
            stacks = _stack(held, 2 * inner, dim, d), _stack(held, dim, inner, d)
            return _quantized(rows // 2, dim, d), *chosen(d, rows), 0, *stacks

        def gate_up(d: torch.device, rows: int = rows) -> Args:
            groups = permute_ref(chosen(d, rows)[0], 0, held)
            stack = _stack(held, 2 * inner, dim, d)
            return _quantized(rows // 2, dim, d), stack, groups, rows // held

        def downward(d: torch.device, rows: int = rows) -> Args:
            ids, weight = chosen(d, rows)
            more = permute_ref(ids, 0, held), rows // held, torch.bfloat16, weight
            return _quantized(rows, inner, d), _stack(held, dim, inner, d), *more

        name, moved = f"{held} experts, {each} tokens each", rows * (dim + 2 * inner + 4 * dim)
        yield Case(
            "experts", name, operands, experts_triton, experts_ref,
            3 * held * matrix + moved, 6.0 * rows * matrix, "fp8", tol=2e-2,
        )  # fmt: skip
        yield Case(
            "grouped_gate_up", name, gate_up, grouped_gate_up_triton,
            lambda x, w, groups, _rows: grouped_gate_up_ref(x, w, groups),
            2 * held * matrix + rows * (dim + inner), 4.0 * rows * matrix, "fp8", tol=FP8_TOL,
        )  # fmt: skip
        yield Case(
            "grouped_down", name, downward, grouped_down_triton,
            lambda x, w, groups, _rows, *more: grouped_down_ref(x, w, groups, *more),
            held * matrix + rows * (inner + 2 * dim), 2.0 * rows * matrix, "fp8",
        )  # fmt: skip


def _stack(held: int, rows: int, cols: int, device: torch.device) -> Stack:
    w, scale = _scaled(held * rows, cols, device)
    return Stack(w.view(held, rows, cols), scale.view(held, rows // BLOCK, -1))


def _routing(small: bool) -> Iterator[Case]:
    rule = Routing("sigmoid", "noaux_tc", K, 8, 4, True, 2.5)
    for T in (3,) if small else (1, 8, 128, 1024):

        def logits(d: torch.device, T: int = T) -> Args:
            return torch.randn(2, T, 256, device=d), torch.randn(256, device=d) / 8, rule

        num_bytes = T * (8 * 256 + 12 * K)
        pair = route_triton, route_ref
        yield Case("route", f"{T} x 256", logits, *pair, num_bytes, tol=1e-5, view=_sorted)

        def hidden(d: torch.device, T: int = T) -> Args:
            dim = 256 if small else D
            return _normal(T, dim, device=d), torch.randn(256, dim, device=d)

        yield Case(
            "router_logits", f"{T} x 256", hidden, router_logits_triton, router_logits_ref,
            4 * 256 * D + T * (2 * D + 4 * 256), 2.0 * T * 256 * D, tol=1e-4,
            view=lambda parts: parts.sum(0),
        )  # fmt: skip
    for T in (5,) if small else (8, 128, 4096):

        def ids(d: torch.device, T: int = T) -> Args:
            return torch.rand(T, 256, device=d).topk(K).indices, 64, E

        def expert_rows(d: torch.device, T: int = T) -> Args:
            groups = permute_ref(ids(d, T)[0], 64, E)
            return _normal(T * K, 256 if small else D, device=d), groups.slot_TK

        name, sort = f"{T} x {K}", (permute_triton, permute_ref)
        yield Case("permute", name, ids, *sort, 16 * T * K, tol=0.0, view=_groups)
        back, num_bytes = (unpermute_triton, unpermute_ref), T * D * (2 * K * E // 256 + 4)
        yield Case("unpermute", name, expert_rows, *back, num_bytes, tol=1e-5)


def _sorted(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Put every token's experts in the order of their ids."""
    ids, weight = result
    order = ids.argsort(-1)
    return ids.gather(1, order), weight.gather(1, order)


def _groups(found: Any) -> list[Tensor]:
    return [found.start_E, found.count_E, found.entry_M, found.slot_TK]


def _decode(small: bool) -> Iterator[Case]:
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
        entries = _normal(batch * pages * page_size + page_size, C + R, device=d)
        if packed:
            entries = pack_latent_ref(entries, C)
        table = torch.randperm(batch * pages, device=d).view(batch, pages).int() + 1
        q = _normal(batch, 1, heads, C + R, device=d)
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


def _latents(small: bool) -> Iterator[Case]:
    for T, packed in [(3, True)] if small else [(t, p) for t in (1, 128, 4096) for p in (0, 1)]:

        def operands(d: torch.device, T: int = T, packed: bool = bool(packed)) -> Args:
            angle = torch.rand(T, R // 2, device=d)
            width, dtype = (C + 16 + 2 * R, torch.uint8) if packed else (C + R, torch.bfloat16)
            cache = torch.zeros(2 * T, width, dtype=dtype, device=d)
            norm = torch.rand(C, device=d) + 0.5, 1e-6, angle.cos(), angle.sin(), True
            return _normal(T, C + R, device=d), *norm, cache, torch.arange(T, device=d), 0

        num_bytes = T * (4 * (C + R) + 4 * R + 8 + (C + R) * (1 if packed else 2))
        name, pair = (
            f"T {T}, {'fp8' if packed else 'bf16'} cache",
            (rope_and_cache_triton, rope_and_cache_ref),
        )
        yield Case("rope_and_cache", name, operands, *pair, num_bytes, tol=FP8_TOL)


def _prefill(small: bool) -> Iterator[Case]:
    for S, H in [(70, 2)] if small else [(1024, 16), (4096, 16), (4096, 128)]:

        def operands(d: torch.device, S: int = S, H: int = H) -> Args:
            q, k, rope = (_normal(S, h, dim, device=d) for h, dim in ((H, N + R), (H, N), (1, R)))
            value = _normal(S, H, V, device=d)
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


def _sampling(small: bool) -> Iterator[Case]:
    for B, W in [(3, 300)] if small else [(1, VOCAB), (128, VOCAB)]:

        def operands(d: torch.device, B: int = B, W: int = W) -> Args:
            ones = torch.ones(B, device=d)
            longs = torch.arange(B, device=d)
            return 3 * torch.randn(B, W, device=d), ones, 0 * longs, ones, longs - 1, longs

        pair = sample_triton, sample_ref
        yield Case("sample", f"{B} x {W}", operands, *pair, 4 * B * W, tol=0.0)

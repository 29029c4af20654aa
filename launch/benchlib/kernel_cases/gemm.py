"""Cases of matrix products with weights: one matrix, and the stacked matrices of experts."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchlib.kernel_cases.case import (
    FF,
    FP8_TOL,
    Args,
    Case,
    D,
    E,
    normal,
    quantized,
    scaled,
)
from dsv3_kernels.fp8_format import BLOCK
from dsv3_kernels.gemm._split_k import make_locks
from dsv3_kernels.gemm.act_quant import Quantized
from dsv3_kernels.gemm.bf16_gemm import bf16_gemm
from dsv3_kernels.gemm.fp8_gemm import fp8_gemm
from dsv3_kernels.gemm.int8_gemm import int8_gemm
from dsv3_kernels.gemm.int8_quant import int8_quant
from dsv3_kernels.gemm.int_gemm import int_gemm
from dsv3_kernels.gemm.integers import Integers
from dsv3_kernels.moe.grouped_down import grouped_down
from dsv3_kernels.moe.grouped_gate_up import grouped_gate_up
from dsv3_kernels.moe.grouped_gemm import Stack
from dsv3_kernels.moe.moe import experts
from dsv3_kernels.moe.permute import LocalExperts, permute

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
# Two matrices that FP8 checkpoints store in bfloat16, then some of a bfloat16 checkpoint.
BF16_MATRICES = (
    ("lm_head tp8", 16160, 7168),
    ("eh_proj", 7168, 14336),
    ("qkv_a", 2112, 7168),
    ("q_b tp8", 3072, 1536),
    ("o_proj tp8", 7168, 2048),
    ("shared gate_up tp8", 512, 7168),
    ("shared down tp8", 7168, 256),
)


def gemm(small: bool) -> Iterator[Case]:
    """Yield products of FP8 rows with one matrix."""
    rows = (1, 5) if small else (1, 8, 16, 64, 128, 1024, 4096)
    for name, F_out, dim in [("ragged", 72, 384)] if small else MATRICES:
        for M in rows:

            def operands(d: torch.device, M: int = M, F_out: int = F_out, dim: int = dim) -> Args:
                w, scale = scaled(F_out, dim, d)
                return quantized(M, dim, d), w, scale, torch.bfloat16, make_locks(w)

            yield Case.of(
                fp8_gemm,
                f"{name} {F_out} x {dim}, M {M}",
                operands,
                F_out * dim + M * (dim + 2 * F_out),
                2.0 * M * F_out * dim,
                "fp8",
                peer=_block_scaled_mm,
            )


def few_rows(small: bool) -> Iterator[Case]:
    """Yield products of few bfloat16 rows with one matrix."""
    for name, F_out, dim in [("ragged", 72, 200)] if small else BF16_MATRICES:
        for M in (1, 33) if small else (1, 8, 16, 64):

            def operands(d: torch.device, M: int = M, F_out: int = F_out, dim: int = dim) -> Args:
                w = normal(F_out, dim, device=d)
                return normal(M, dim, device=d), w, torch.bfloat16, make_locks(w)

            yield Case.of(
                bf16_gemm,
                f"{name} {F_out} x {dim}, M {M}",
                operands,
                2 * (F_out * dim + M * (dim + F_out)),
                2.0 * M * F_out * dim,
                peer=lambda x, w, _dtype, _locks: F.linear(x, w),
            )


def integers(small: bool) -> Iterator[Case]:
    """Yield products of few bfloat16 rows with a matrix of integers, and of many int8 rows."""
    for name, F_out, dim in [("ragged", 72, 256)] if small else BF16_MATRICES:
        for bits, group in ((8, dim), (4, 32), (4, 128)):
            for M in (1, 33) if small else (1, 16, 64):

                def operands(
                    d: torch.device,
                    M: int = M,
                    F_out: int = F_out,
                    dim: int = dim,
                    bits: int = bits,
                    group: int = group,
                ) -> Args:
                    w = _integers(F_out, dim, bits, group, d)
                    return normal(M, dim, device=d), w, torch.bfloat16, make_locks(w.q)

                yield Case.of(
                    int_gemm,
                    f"int{bits}/{group} {name} {F_out} x {dim}, M {M}",
                    operands,
                    F_out * dim * bits / 8 + 2 * M * (dim + F_out),
                    2.0 * M * F_out * dim,
                )
        for M in (70,) if small else (128, 1024, 4096):

            def quantized_rows(
                d: torch.device, M: int = M, F_out: int = F_out, dim: int = dim
            ) -> Args:
                x = int8_quant.reference(normal(M, dim, device=d))
                return x, _integers(F_out, dim, 8, dim, d), torch.bfloat16

            yield Case.of(
                int8_gemm,
                f"{name} {F_out} x {dim}, M {M}",
                quantized_rows,
                F_out * dim + M * (dim + 2 * F_out),
                2.0 * M * F_out * dim,
            )


def _integers(rows: int, cols: int, bits: int, group: int, device: torch.device) -> Integers:
    q = torch.randint(0, 256, (rows, cols * bits // 8), dtype=torch.uint8, device=device)
    scale = torch.rand(rows, cols // group, device=device) * cols**-0.5 / 2 ** (bits - 2)
    return Integers(q if bits == 4 else q.view(torch.int8), scale.bfloat16(), group)


def _block_scaled_mm(
    x: Quantized, w_FD: Tensor, scale_fd: Tensor, dtype: torch.dtype, _locks: Tensor
) -> Tensor:
    """Multiply with cuBLASLt's block scales (from CUDA 12.9, on Hopper)."""
    scale_Td = x.scale.t().contiguous().t()  # by columns
    return torch._scaled_mm(x.q, w_FD.t(), scale_a=scale_Td, scale_b=scale_fd.t(), out_dtype=dtype)


def expert_products(small: bool) -> Iterator[Case]:
    """Yield all experts together and their two products; each expert has the same token count."""
    held, dim, inner = (3, 256, 128) if small else (E, D, FF)
    matrix = dim * inner
    for each in (2,) if small else (1, 8, 64, 256):
        rows = held * each

        def chosen(d: torch.device, rows: int = rows) -> tuple[Tensor, Tensor]:
            ids = torch.arange(rows, device=d).view(-1, 2) % held
            return ids, torch.rand(rows // 2, 2, device=d)

        def operands(d: torch.device, rows: int = rows) -> Args:
            ids, weight = chosen(d, rows)
            up = _stack(held, 2 * inner, dim, d)
            return quantized(rows // 2, dim, d), ids, weight, 0, up, _stack(held, dim, inner, d)

        def gate_up(d: torch.device, rows: int = rows) -> Args:
            groups = permute.reference(chosen(d, rows)[0], LocalExperts(0, held))
            stack = _stack(held, 2 * inner, dim, d)
            return quantized(rows // 2, dim, d), stack, groups, rows // held

        def downward(d: torch.device, rows: int = rows) -> Args:
            ids, weight = chosen(d, rows)
            groups = permute.reference(ids, LocalExperts(0, held))
            h = quantized(rows, inner, d)
            stack = _stack(held, dim, inner, d)
            return h, stack, groups, rows // held, torch.bfloat16, weight

        name = f"{held} experts, {each} tokens each"
        moved = rows * (dim + 2 * inner + 4 * dim)
        yield Case.of(
            experts,
            name,
            operands,
            3 * held * matrix + moved,
            6.0 * rows * matrix,
            "fp8",
            tol=2e-2,
        )
        yield Case.of(
            grouped_gate_up,
            name,
            gate_up,
            2 * held * matrix + rows * (dim + inner),
            4.0 * rows * matrix,
            "fp8",
            tol=FP8_TOL,
        )
        yield Case.of(
            grouped_down,
            name,
            downward,
            held * matrix + rows * (inner + 2 * dim),
            2.0 * rows * matrix,
            "fp8",
        )


def _stack(held: int, rows: int, cols: int, device: torch.device) -> Stack:
    w, scale = scaled(held * rows, cols, device)
    return Stack(w.view(held, rows, cols), scale.view(held, rows // BLOCK, -1))

"""Products of few rows with a matrix of integers, dequantized in registers: y = x W^T.

Bound by reading W, which `_split_k` distributes over programs as in `bf16_gemm`; `_int_product` has
the loop. Many rows are bound by matrix units: `int_linear` dequantizes the matrix and gives them to
cuBLAS.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels._gpu import cdiv
from dsv3_kernels._triton import in_turn, is_interpreted, launch_options, tl, triton
from dsv3_kernels.gemm._int_product import int_product, step_of
from dsv3_kernels.gemm._split_k import ROWS, SplitK, store_split
from dsv3_kernels.gemm.int8_gemm import int8_gemm
from dsv3_kernels.gemm.int8_quant import int8_quant
from dsv3_kernels.gemm.integers import Integers, int_dequant
from dsv3_kernels.operation import operation

# The kernel is used up to this many rows of x, which one tile holds. By arithmetic, unmeasured.
FEW_ROWS = 64


@triton.jit(do_not_specialize=["M"])
def _int_gemm_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_ptr,
    y_ptr,
    part_ptr,
    lock_ptr,
    M,
    N,
    K,
    group,
    x_stride,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
    LOCKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply BN rows of W by BM rows of x over one split of K."""
    in_turn()
    blocks = tl.cdiv(K, BK)
    split = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    # Rows beyond the end repeat the last one; their results are not stored.
    acc = int_product(
        x_ptr=x_ptr,
        w_ptr=q_ptr,
        scale_ptr=scale_ptr,
        zero_ptr=zero_ptr,
        x_row=tl.minimum(m, M - 1).to(tl.int64),
        w_row=tl.minimum(n, N - 1).to(tl.int64),
        first=split * blocks // SPLITS,
        last=(split + 1) * blocks // SPLITS,
        K=K,
        x_stride=x_stride,
        group=group,
        BITS=BITS,
        ZEROS=ZEROS,
        BM=BM,
        BN=BN,
        BK=BK,
        EVEN=EVEN,
        INTERPRETED=INTERPRETED,
        STAGES=STAGES,
    )
    store_split(
        y=tl.trans(acc),
        y_ptr=y_ptr,
        part_ptr=part_ptr,
        lock_ptr=lock_ptr,
        m=m,
        n=n,
        M=M,
        N=N,
        BM=BM,
        BN=BN,
        SPLITS=SPLITS,
        LOCKED=LOCKED,
    )


def _launch_int_gemm(
    x_TD: Tensor, w: Integers, dtype: torch.dtype, locks: Tensor | None = None
) -> Tensor:
    M, K = x_TD.shape
    N, cols = w.shape
    assert cols == K and w.q.is_contiguous() and w.scale.is_contiguous(), (
        f"{x_TD.shape=} {w.shape=}"
    )
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    y_TF = torch.empty((M, N), dtype=dtype, device=x_TD.device)
    step = step_of(w.group, K, x_TD.element_size())
    split = SplitK.of(y_TF, cdiv(K, step), FEW_ROWS, locks)
    _int_gemm_kernel[split.grid(M, N)](
        x_ptr=x_TD,
        q_ptr=w.q,
        scale_ptr=w.scale,
        zero_ptr=w.scale if w.zero is None else w.zero,
        y_ptr=y_TF,
        part_ptr=split.part,
        lock_ptr=split.locks,
        M=M,
        N=N,
        K=K,
        group=w.group,
        x_stride=x_TD.stride(0),
        BITS=w.bits,
        ZEROS=w.zero is not None,
        BM=split.rows,
        BN=ROWS,
        BK=step,
        EVEN=K % step == 0,
        SPLITS=split.splits,
        LOCKED=split.locked,
        INTERPRETED=is_interpreted(x_TD),
        STAGES=split.stages(y_TF, step * w.bits // 8, step * x_TD.element_size()),
        num_warps=4,
        **launch_options(),
    )
    split.finish(y_TF)
    return y_TF


@operation(kernel=_launch_int_gemm)
def int_gemm(x_TD: Tensor, w: Integers, dtype: torch.dtype, locks: Tensor | None = None) -> Tensor:
    """Return x W^T, summed in float32 and rounded once.

    Args:
        x_TD: [T, D] bfloat16 or float32, T > 0; the kernel is correct for any T and fast for few.
        w: [F, D], groups of whole rows or of a multiple of 32 columns.
        dtype: of the result.
        locks: `make_locks(w.q)`: saves a launch where K is split. Not used by the reference.
    """
    return F.linear(x_TD.float(), int_dequant.reference(w, torch.float32)).to(dtype)


def takes_int8_rows(rows: int) -> bool:
    """Return True if products in int8 numerics quantize this number of rows of x: many.

    Few rows are bound by reading the matrix, and keep their precision.
    """
    return rows > FEW_ROWS


def int_linear(
    x_TD: Tensor, w: Integers, locks: Tensor | None = None, int8_rows: bool = False
) -> Tensor:
    """Return x W^T in the dtype of `x_TD`.

    On a GPU, few rows go to `int_gemm`; many rows are multiplied by the dequantized matrix or, if
    `int8_rows`, quantized (`takes_int8_rows`).
    """
    rows, cols = w.shape
    if int8_rows and takes_int8_rows(len(x_TD)):
        return int8_gemm(int8_quant(x_TD), w, x_TD.dtype)
    if 0 < len(x_TD) <= FEW_ROWS and rows and cols and int_gemm.uses_triton(x_TD):
        return int_gemm.kernel(x_TD, w, x_TD.dtype, locks)
    return F.linear(x_TD, int_dequant(w, x_TD.dtype))

"""Products of few rows with a matrix of integers, dequantized in registers: y = x W^T.

Bound by reading W, which `_split_k` distributes over programs as in `bf16_gemm`. A step along K
lies within a group, so the integers (exact in bfloat16) are multiplied first and a step's sums are
scaled in float32. Many rows are bound by matrix units: `int_linear` dequantizes the matrix and
gives them to cuBLAS. On a CPU `int_linear` takes torch's own products.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels._gpu import cdiv
from dsv3_kernels._triton import in_turn, is_interpreted, launch_options, tl, triton
from dsv3_kernels.gemm._split_k import ROWS, SplitK, store_split
from dsv3_kernels.gemm.integers import Integers, cpu_product, int_dequant, load_integers
from dsv3_kernels.operation import operation

# The kernel is used up to this many rows of x, which one tile holds. By arithmetic, unmeasured.
FEW_ROWS = 64


def step_of(group: int, cols: int) -> int:
    """Return the columns of a step along K: 64, or as many as lie within a group of 32."""
    assert group >= cols or group % 32 == 0, f"{group=} {cols=}"
    return 64 if group >= cols or group % 64 == 0 else 32


@triton.jit(do_not_specialize=["M"])
def _int_gemm_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    y_ptr,
    part_ptr,
    lock_ptr,
    M,
    N,
    K,
    groups,
    group,
    x_stride,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
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
    k = tl.arange(0, BK)
    # Rows beyond the end repeat the last one; their results are not stored.
    n_row = tl.minimum(n, N - 1).to(tl.int64)
    m_row = tl.minimum(m, M - 1).to(tl.int64)
    acc = tl.zeros((BN, BM), tl.float32)
    first = split * blocks // SPLITS
    last = (split + 1) * blocks // SPLITS
    for b in tl.range(first, last, num_stages=STAGES):
        col = b * BK + k
        inside = (col < K)[None, :]
        w = load_integers(q_ptr, n_row[:, None], col[None, :], inside, K, BITS)
        x = tl.load(x_ptr + m_row[:, None] * x_stride + col[None, :], mask=inside, other=0.0)
        scale = tl.load(scale_ptr + n_row * groups + b * BK // group).to(tl.float32)
        if INTERPRETED:  # its dot multiplies the bits of bfloat16 as integers
            x = x.to(tl.float32)
        sums = tl.dot(w.to(x.dtype), tl.trans(x), input_precision="ieee")
        acc += sums * scale[:, None]
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
    step = step_of(w.group, K)
    split = SplitK.of(y_TF, cdiv(K, step), FEW_ROWS, locks)
    _int_gemm_kernel[split.grid(M, N)](
        x_ptr=x_TD,
        q_ptr=w.q,
        scale_ptr=w.scale,
        y_ptr=y_TF,
        part_ptr=split.part,
        lock_ptr=split.locks,
        M=M,
        N=N,
        K=K,
        groups=w.scale.shape[-1],
        group=w.group,
        x_stride=x_TD.stride(0),
        BITS=w.bits,
        BM=split.rows,
        BN=ROWS,
        BK=step,
        SPLITS=split.splits,
        LOCKED=split.locked,
        INTERPRETED=is_interpreted(x_TD),
        STAGES=split.stages(y_TF),
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


def int_linear(x_TD: Tensor, w: Integers, locks: Tensor | None = None) -> Tensor:
    """Return x W^T in the dtype of `x_TD`.

    Few rows go to `int_gemm` on a GPU; many rows meet a dequantized matrix. On a CPU, torch
    multiplies what it can (`has_cpu_product`).
    """
    if w.packed:
        return cpu_product(x_TD, w)
    rows, cols = w.shape
    if 0 < len(x_TD) <= FEW_ROWS and rows and cols and int_gemm.uses_triton(x_TD):
        return int_gemm.kernel(x_TD, w, x_TD.dtype, locks)
    return F.linear(x_TD, int_dequant(w, x_TD.dtype))

"""Products of few bfloat16 rows with a bfloat16 matrix, summed in float32: y = x W^T.

Bound by reading W, which `_split_k` distributes over programs. Many rows are bound by matrix units;
`linear` gives them to cuBLAS (`torch.nn.functional.linear`). An element is one chain of sums of 64
along K (split by split, then the splits), the same for any number of few rows, so a row's result
does not depend on other rows.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels._cast import as_dtype
from dsv3_kernels._gpu import cdiv
from dsv3_kernels._triton import in_turn, is_interpreted, launch_options, tl, triton
from dsv3_kernels.gemm._split_k import ROWS, SplitK, store_split
from dsv3_kernels.gemm.blocked import has_vector_product
from dsv3_kernels.operation import operation

# The kernel is used up to this many rows of x, which one tile holds. By arithmetic, unmeasured.
FEW_ROWS = 64
# Values of K per step: 128 bytes.
_STEP = 64


@triton.jit
def load_step(at, left, EVEN: tl.constexpr):
    """Load a step of rows that have `left` columns left, at least one."""
    if EVEN:
        return tl.load(at)
    else:  # noqa: RET505 - Triton drops a constant condition's other branch only so
        return tl.load(at, mask=(tl.arange(0, at.shape[1]) < left)[None, :], other=0.0)


@triton.jit(do_not_specialize=["M"])
def _bf16_gemm_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    part_ptr,
    lock_ptr,
    M,
    N,
    K,
    x_stride,
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
    tile = tl.program_id(0)
    split = tl.program_id(1)
    m_tile = tl.program_id(2)
    blocks = tl.cdiv(K, BK)
    n = tile * BN + tl.arange(0, BN)
    m = m_tile * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    # Rows beyond the end repeat the last one; their results are not stored.
    n_row = tl.minimum(n, N - 1).to(tl.int64)
    m_row = tl.minimum(m, M - 1).to(tl.int64)
    w_at = w_ptr + n_row[:, None] * K + k[None, :]
    x_at = x_ptr + m_row[:, None] * x_stride + k[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    first = split * blocks // SPLITS
    last = (split + 1) * blocks // SPLITS
    for b in tl.range(first, last, num_stages=STAGES):
        w = load_step(w_at + b * BK, K - b * BK, EVEN)
        x = load_step(x_at + b * BK, K - b * BK, EVEN)
        if INTERPRETED:  # its dot multiplies the bits of bfloat16 as integers
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
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


def _launch_bf16_gemm(
    x_TD: Tensor, w_FD: Tensor, dtype: torch.dtype = torch.bfloat16, locks: Tensor | None = None
) -> Tensor:
    M, K = x_TD.shape
    N = len(w_FD)
    assert x_TD.dtype == w_FD.dtype == torch.bfloat16, f"{x_TD.dtype=} {w_FD.dtype=}"
    assert w_FD.shape[1] == K and w_FD.is_contiguous(), f"{x_TD.shape=} {w_FD.stride()=}"
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    y_TF = torch.empty((M, N), dtype=dtype, device=w_FD.device)
    split = SplitK.of(y_TF, cdiv(K, _STEP), FEW_ROWS, locks)
    _bf16_gemm_kernel[split.grid(M, N)](
        x_ptr=x_TD,
        w_ptr=w_FD,
        y_ptr=y_TF,
        part_ptr=split.part,
        lock_ptr=split.locks,
        M=M,
        N=N,
        K=K,
        x_stride=x_TD.stride(0),
        BM=split.rows,
        BN=ROWS,
        BK=_STEP,
        EVEN=K % _STEP == 0,
        SPLITS=split.splits,
        LOCKED=split.locked,
        INTERPRETED=is_interpreted(w_FD),
        STAGES=split.stages(y_TF),
        num_warps=4,
        **launch_options(),
    )
    split.finish(y_TF)
    return y_TF


@operation(kernel=_launch_bf16_gemm)
def bf16_gemm(
    x_TD: Tensor, w_FD: Tensor, dtype: torch.dtype = torch.bfloat16, locks: Tensor | None = None
) -> Tensor:
    """Return x W^T of bfloat16, summed in float32 and rounded once.

    Args:
        x_TD: [T, D], T > 0; the kernel is correct for any T and fast for few rows.
        w_FD: [F, D], contiguous; neither F nor D is 0.
        dtype: of the result: bfloat16 or float32.
        locks: `make_locks(w_FD)`: saves a launch where K is split. Not used by the reference.
    """
    return F.linear(x_TD.float(), w_FD.float()).to(dtype)


def linear(
    x_TD: Tensor, w_FD: Tensor, dtype: torch.dtype | None = None, locks: Tensor | None = None
) -> Tensor:
    """Return x W^T: by `bf16_gemm` for few bfloat16 rows on a GPU, else by torch.

    Args:
        x_TD: [T, D] of the dtype of W.
        w_FD: [F, D], contiguous.
        dtype: of the result, by default that of W; with float32 a GPU does not round to bfloat16.
        locks: `make_locks(w_FD)`: saves a launch where K is split.
    """
    assert x_TD.dim() == 2, f"{x_TD.shape=}"
    dtype = dtype or w_FD.dtype
    if w_FD.dtype == torch.bfloat16:
        is_few = 0 < x_TD.shape[0] <= FEW_ROWS
        if is_few and w_FD.numel() and bf16_gemm.uses_triton(w_FD):
            return bf16_gemm.kernel(x_TD, w_FD, dtype, locks)
        if w_FD.is_cuda and dtype == torch.float32:
            return torch.mm(x_TD, w_FD.t(), out_dtype=dtype)
        if len(x_TD) == 1 and w_FD.device.type == "cpu" and has_vector_product(w_FD):
            return as_dtype(torch.mv(w_FD, x_TD[0]).unsqueeze(0), dtype)
    return as_dtype(F.linear(x_TD, w_FD), dtype)

"""Products of few bfloat16 rows with a bfloat16 matrix, summed in float32: y = x W^T.

Bound by reading W, as `_split_k` shares it out. For many rows, where matrix units are the bound,
cuBLAS is the tool (`torch.nn.functional.linear`); `linear` picks. An element is one chain of sums
of 64 along K (split by split, then the splits), the same for any number of few rows: a row's result
depends on no other row.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels._triton import in_turn, is_interpreted, launch_options, tl, triton, use_triton
from dsv3_kernels.gemm._split_k import ROWS, Shares, store_share

# Rows of x up to which the kernel is taken: what one tile holds, by arithmetic; unmeasured.
FEW_ROWS = 64
# Of K, that a step takes: 128 bytes.
_STEP = 64


def bf16_gemm_ref(x_TD: Tensor, w_FD: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Define `bf16_gemm_triton`: multiply in float32, round once."""
    return F.linear(x_TD.float(), w_FD.float()).to(dtype)


@triton.jit
def _load_step(at, left, EVEN: tl.constexpr):
    """Load rows of which `left` columns are left, at least one."""
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
    tile, split, m_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks = tl.cdiv(K, BK)
    n = tile * BN + tl.arange(0, BN)
    m = m_tile * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    # Rows beyond the end repeat the last one; what they give is not stored.
    n_row, m_row = tl.minimum(n, N - 1).to(tl.int64), tl.minimum(m, M - 1).to(tl.int64)
    w_at = w_ptr + n_row[:, None] * K + k[None, :]
    x_at = x_ptr + m_row[:, None] * x_stride + k[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    first, last = split * blocks // SPLITS, (split + 1) * blocks // SPLITS
    for b in tl.range(first, last, num_stages=STAGES):
        w = _load_step(w_at + b * BK, K - b * BK, EVEN)
        x = _load_step(x_at + b * BK, K - b * BK, EVEN)
        if INTERPRETED:  # it multiplies the bits of bfloat16 as integers
            w, x = w.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    # fmt: off
    store_share(
        tl.trans(acc), y_ptr, part_ptr, lock_ptr, m, n, M, N, BM, BN, SPLITS, LOCKED,
    )
    # fmt: on


def bf16_gemm_triton(
    x_TD: Tensor, w_FD: Tensor, dtype: torch.dtype = torch.bfloat16, locks: Tensor | None = None
) -> Tensor:
    """Return x W^T of bfloat16.

    Args:
        x_TD: [T, D], T > 0; correct for any T, quick for few.
        w_FD: [F, D], contiguous, neither F nor D 0.
        dtype: of the result: bfloat16 or float32.
        locks: `make_locks(w_FD)`: saves a launch where K is split.
    """
    (M, K), N = x_TD.shape, len(w_FD)
    assert x_TD.dtype == w_FD.dtype == torch.bfloat16, f"{x_TD.dtype=} {w_FD.dtype=}"
    assert w_FD.shape[1] == K and w_FD.is_contiguous(), f"{x_TD.shape=} {w_FD.stride()=}"
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    y_TF = torch.empty((M, N), dtype=dtype, device=w_FD.device)
    shares = Shares.of(y_TF, triton.cdiv(K, _STEP), FEW_ROWS, locks)
    _bf16_gemm_kernel[shares.grid(M, N)](
        x_TD,
        w_FD,
        y_TF,
        shares.part,
        shares.locks,
        M,
        N,
        K,
        x_TD.stride(0),
        BM=shares.rows,
        BN=ROWS,
        BK=_STEP,
        EVEN=K % _STEP == 0,
        SPLITS=shares.splits,
        LOCKED=shares.locked,
        INTERPRETED=is_interpreted(w_FD),
        STAGES=shares.stages(y_TF),
        num_warps=4,
        **launch_options(),
    )
    shares.finish(y_TF)
    return y_TF


def linear(
    x_TD: Tensor, w_FD: Tensor, dtype: torch.dtype | None = None, locks: Tensor | None = None
) -> Tensor:
    """Return x W^T: on a GPU few rows in bfloat16 by the kernel here, all else by torch.

    Args:
        x_TD: [T, D] of the dtype of W.
        w_FD: [F, D], contiguous.
        dtype: of the result, by default that of W; with float32 a GPU does not round to bfloat16.
        locks: `make_locks(w_FD)`: saves a launch where K is split.
    """
    assert x_TD.dim() == 2, f"{x_TD.shape=}"
    dtype = dtype or w_FD.dtype
    is_bf16 = w_FD.dtype == torch.bfloat16
    if use_triton(w_FD) and is_bf16 and w_FD.numel() and 0 < len(x_TD) <= FEW_ROWS:
        return bf16_gemm_triton(
            x_TD if x_TD.stride(1) == 1 else x_TD.contiguous(), w_FD, dtype, locks
        )
    if w_FD.is_cuda and is_bf16 and dtype == torch.float32:
        return torch.mm(x_TD, w_FD.t(), out_dtype=dtype)
    return F.linear(x_TD, w_FD).to(dtype)

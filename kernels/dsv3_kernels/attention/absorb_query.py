"""Queries on their way into latent space: W_UK absorbed, the rotary part rotated, in one tensor.

    q'[t, h] = [W_UK,h^T q_nope[t, h] ; rope(q_rope[t, h])]

Bound by reading W_UK (2 MB for 16 of V3's heads), and by latency: three launches are one.
"""

import torch
from torch import Tensor

from dsv3_kernels._triton import in_turn, is_interpreted, launch_options, tl, triton, use_triton
from dsv3_kernels.attention.rope import apply_rope_ref, rotate_pairs

# Tokens of a program, always: a token's result does not depend on how many there are.
_TOKENS = 16
_COLUMNS = 64
_EXACT_COLUMNS = 16  # float32 products take registers


def absorb_query_ref(
    q_THX: Tensor, w_uk_HNC: Tensor, cos_Tr: Tensor, sin_Tr: Tensor, interleaved: bool
) -> Tensor:
    """Define `absorb_query`."""
    q_THN, q_THR = q_THX.tensor_split([w_uk_HNC.shape[1]], -1)
    q_THC = torch.bmm(q_THN.transpose(0, 1), w_uk_HNC).transpose(0, 1)
    rotated = apply_rope_ref(q_THR, cos_Tr[:, None], sin_Tr[:, None], interleaved)
    return torch.cat((q_THC, rotated), -1)


@triton.jit(do_not_specialize=["T"])
def _absorb_query_kernel(
    q_ptr,
    w_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    T,
    q_stride_t,
    q_stride_h,
    w_stride_h,
    w_stride_n,
    H: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    HALF: tl.constexpr,
    N_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program: BT tokens of a head, and BC columns of C or, the last one, what is rotated."""
    in_turn()
    h, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = tl.program_id(2) * BT + tl.arange(0, BT)
    row, is_t = t.to(tl.int64)[:, None], (t < T)[:, None]
    q_row = q_ptr + row * q_stride_t + h * q_stride_h
    out_row = out_ptr + (row * H + h) * (C + 2 * HALF)
    if tile * BC < C:
        n, c = tl.arange(0, N_PAD), tile * BC + tl.arange(0, BC)
        q = tl.load(q_row + n[None, :], mask=is_t & (n < N)[None, :], other=0.0)
        w_at = w_ptr + h * w_stride_h + n[:, None] * w_stride_n + c[None, :]
        w = tl.load(w_at, mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)
        absorbed = tl.dot(q.to(DTYPE), w.to(DTYPE), input_precision="ieee")
        absorbed = absorbed.to(out_ptr.dtype.element_ty)
        tl.store(out_row + c[None, :], absorbed, mask=is_t & (c < C)[None, :])
    else:
        r = tl.arange(0, HALF_PAD)[None, :]
        mask, angle = is_t & (r < HALF), row * HALF + r
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
        rotate_pairs(q_row + N, out_row + C, r, mask, cos, sin, HALF, INTERLEAVED)


def absorb_query_triton(
    q_THX: Tensor, w_uk_HNC: Tensor, cos_Tr: Tensor, sin_Tr: Tensor, interleaved: bool
) -> Tensor:
    """Launch a program per head, some columns and some tokens."""
    (T, H, X), (_, N, C) = q_THX.shape, w_uk_HNC.shape
    assert q_THX.stride(2) == w_uk_HNC.stride(2) == 1, f"{q_THX.stride()=} {w_uk_HNC.stride()=}"
    assert cos_Tr.is_contiguous() and sin_Tr.is_contiguous(), f"{cos_Tr.stride()=}"
    out = torch.empty((T, H, C + X - N), dtype=q_THX.dtype, device=q_THX.device)
    half, is_exact = (X - N) // 2, q_THX.dtype == torch.float32 or is_interpreted(q_THX)
    columns = _EXACT_COLUMNS if is_exact else _COLUMNS
    if T:
        _absorb_query_kernel[(H, triton.cdiv(C, columns) + 1, triton.cdiv(T, _TOKENS))](
            *(q_THX, w_uk_HNC, cos_Tr, sin_Tr, out, T, *q_THX.stride()[:2]),
            *(*w_uk_HNC.stride()[:2], H, N, C, half),
            *(max(16, triton.next_power_of_2(N)), triton.next_power_of_2(half)),
            *(_TOKENS, columns, interleaved, tl.float32 if is_exact else tl.bfloat16),
            num_warps=4,
            **launch_options(),
        )
    return out


def absorb_query(
    q_THX: Tensor, w_uk_HNC: Tensor, cos_Tr: Tensor, sin_Tr: Tensor, interleaved: bool
) -> Tensor:
    """Return queries as `mla_decode` takes them.

    Args:
        q_THX: [T, H, N + R] as projected; heads and tokens may be strided.
        w_uk_HNC: [H, N, C], any strides but the last.
        cos_Tr: [T, R / 2] float32.
        sin_Tr: [T, R / 2] float32.
        interleaved: see `apply_rope`.

    Returns:
        [T, H, C + R] in the dtype of `q_THX`.

    Source: DeepSeek-V2 paper, section 2.1 and appendix C.
    """
    absorb = absorb_query_triton if use_triton(q_THX) else absorb_query_ref
    return absorb(q_THX, w_uk_HNC, cos_Tr, sin_Tr, interleaved)

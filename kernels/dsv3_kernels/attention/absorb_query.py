"""Absorbed queries: W_UK applied to the first part, the rotary part rotated, in one tensor.

    q'[t, h] = [W_UK,h^T q_nope[t, h] ; rope(q_rope[t, h])]

Bound by reading W_UK (2 MB for 16 of V3's heads), and by latency: one launch instead of three.
"""

import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv, next_power_of_2
from dsv3_kernels._triton import in_turn, is_interpreted, launch_options, tl, triton
from dsv3_kernels.attention.rope import Rotation, apply_rope, rotate_pairs
from dsv3_kernels.operation import operation

# Tokens per program; constant, so a token's result does not depend on the number of tokens.
_TOKENS = 16
_COLUMNS = 64
_EXACT_COLUMNS = 16  # float32 products take registers


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
    """Compute BT tokens of a head: BC columns of C, or in the last program the rotated part."""
    in_turn()
    h = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    t = tl.program_id(2) * BT + tl.arange(0, BT)
    row = t.to(tl.int64)[:, None]
    is_t = (t < T)[:, None]
    q_row = q_ptr + row * q_stride_t + h * q_stride_h
    out_row = out_ptr + (row * H + h) * (C + 2 * HALF)
    if tile * BC < C:
        n = tl.arange(0, N_PAD)
        c = tile * BC + tl.arange(0, BC)
        q = tl.load(q_row + n[None, :], mask=is_t & (n < N)[None, :], other=0.0)
        w_at = w_ptr + h * w_stride_h + n[:, None] * w_stride_n + c[None, :]
        w = tl.load(w_at, mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)
        absorbed = tl.dot(q.to(DTYPE), w.to(DTYPE), input_precision="ieee")
        absorbed = absorbed.to(out_ptr.dtype.element_ty)
        tl.store(out_row + c[None, :], absorbed, mask=is_t & (c < C)[None, :])
    else:
        r = tl.arange(0, HALF_PAD)[None, :]
        mask = is_t & (r < HALF)
        angle = row * HALF + r
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
        rotate_pairs(
            x_row=q_row + N,
            out_row=out_row + C,
            r=r,
            mask=mask,
            cos=cos,
            sin=sin,
            HALF=HALF,
            INTERLEAVED=INTERLEAVED,
        )


def _launch_absorb_query(q_THX: Tensor, w_uk_HNC: Tensor, rotation: Rotation) -> Tensor:
    """Launch a program per head, block of columns and block of tokens."""
    T, H, X = q_THX.shape
    _, N, C = w_uk_HNC.shape
    assert q_THX.stride(2) == w_uk_HNC.stride(2) == 1, f"{q_THX.stride()=} {w_uk_HNC.stride()=}"
    rotation.check_contiguous()
    out = torch.empty((T, H, C + X - N), dtype=q_THX.dtype, device=q_THX.device)
    half = (X - N) // 2
    is_exact = q_THX.dtype == torch.float32 or is_interpreted(q_THX)
    columns = _EXACT_COLUMNS if is_exact else _COLUMNS
    if T:
        _absorb_query_kernel[(H, cdiv(C, columns) + 1, cdiv(T, _TOKENS))](
            q_ptr=q_THX,
            w_ptr=w_uk_HNC,
            cos_ptr=rotation.cos_Tr,
            sin_ptr=rotation.sin_Tr,
            out_ptr=out,
            T=T,
            q_stride_t=q_THX.stride(0),
            q_stride_h=q_THX.stride(1),
            w_stride_h=w_uk_HNC.stride(0),
            w_stride_n=w_uk_HNC.stride(1),
            H=H,
            N=N,
            C=C,
            HALF=half,
            N_PAD=max(16, next_power_of_2(N)),
            HALF_PAD=next_power_of_2(half),
            BT=_TOKENS,
            BC=columns,
            INTERLEAVED=rotation.interleaved,
            DTYPE=tl.float32 if is_exact else tl.bfloat16,
            num_warps=4,
            **launch_options(),
        )
    return out


@operation(kernel=_launch_absorb_query)
def absorb_query(q_THX: Tensor, w_uk_HNC: Tensor, rotation: Rotation) -> Tensor:
    """Return queries as `mla_decode` takes them.

    Args:
        q_THX: [T, H, N + R] as projected; heads and tokens may be strided.
        w_uk_HNC: [H, N, C], any strides but the last.
        rotation: of the tokens.

    Returns:
        [T, H, C + R] in the dtype of `q_THX`.

    Source: DeepSeek-V2 paper, section 2.1 and appendix C.
    """
    q_THN, q_THR = q_THX.tensor_split([w_uk_HNC.shape[1]], -1)
    q_THC = torch.bmm(q_THN.transpose(0, 1), w_uk_HNC).transpose(0, 1)
    rotated = apply_rope(q_THR, rotation)
    return torch.cat((q_THC, rotated), -1)

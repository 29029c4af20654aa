"""The router's product: the logits of all experts for every token, with float32 precision.

Products of bfloat16 activations and weights are exact in float32. A float32 weight is split into
three bfloat16 numbers that add up to it, so matrix units can be used without losing bits of either;
weights that fit in bfloat16 give the same bits in both forms. Float32 activations are multiplied
without matrix units.

The sum over D is computed in fixed parts that are added in order, so a token's logits, and with
them its experts, do not depend on the number of tokens. For few tokens every part has its own
program (a few experts' rows alone would not keep a GPU's memory busy) and `route` adds the parts;
for many tokens a program computes all of them.

Bound by reading the weights for few tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels._cast import as_float32
from dsv3_kernels._gpu import cdiv
from dsv3_kernels._triton import in_turn, is_interpreted, launch_options, tl, triton
from dsv3_kernels.operation import operation

# Parts of the sum; up to _FEW tokens each part has its own program.
_PARTS = 16
_FEW = 256


@triton.jit
def _add_exact(acc, w, x, INTERPRETED: tl.constexpr):
    """Add W x of W and x in bfloat16 or float32."""
    if x.dtype == tl.float32 or INTERPRETED:  # its dot multiplies the bits of bfloat16 as integers
        return tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    elif w.dtype == tl.bfloat16:  # noqa: RET505 - Triton drops a constant condition's other branch
        return tl.dot(w, x, acc)
    else:
        high = w.to(tl.bfloat16)
        rest = w - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(low, x, acc)
        acc = tl.dot(middle, x, acc)
        return tl.dot(high, x, acc)


@triton.jit(do_not_specialize=["T"])
def _router_logits_kernel(
    x,
    w,
    logits,
    T,
    E: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    APART: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute BLOCK_E logits of BLOCK_T tokens: of one part if APART, else of all parts."""
    in_turn()
    STEPS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    # Experts and tokens beyond the last repeat it; their results are not stored.
    w_at = w + tl.minimum(expert, E - 1)[:, None] * D
    x_at = x + tl.minimum(token, T - 1).to(tl.int64)[None, :] * D
    total = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
    first = tl.program_id(2) if APART else 0
    for part in range(first, first + 1 if APART else PARTS):
        acc = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
        for step in range(part * STEPS // PARTS, (part + 1) * STEPS // PARTS):
            d = step * BLOCK_D + tl.arange(0, BLOCK_D)
            if D % BLOCK_D == 0:
                w_tile = tl.load(w_at + d[None, :])
                x_tile = tl.load(x_at + d[:, None])
            else:
                w_tile = tl.load(w_at + d[None, :], mask=d[None, :] < D, other=0.0)
                x_tile = tl.load(x_at + d[:, None], mask=d[:, None] < D, other=0.0)
            acc = _add_exact(acc, w_tile, x_tile, INTERPRETED)
        total += acc
    at = (first * T + token).to(tl.int64)[:, None] * E + expert[None, :]
    mask = (token < T)[:, None] & (expert < E)[None, :]
    tl.store(logits + at, tl.trans(total), mask=mask)


def _launch_router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Launch a program per 64 experts, block of tokens and, for few tokens, part."""
    T, D = x_TD.shape
    E = weight_ED.shape[0]
    assert x_TD.is_contiguous() and weight_ED.is_contiguous() and weight_ED.shape[1] == D
    assert {weight_ED.dtype, x_TD.dtype} <= {torch.float32, torch.bfloat16}
    apart = T <= _FEW
    logits = x_TD.new_empty((_PARTS if apart else 1, T, E), dtype=torch.float32)
    tokens = 16 if T <= 16 else 64
    grid = (cdiv(E, 64), cdiv(T, tokens), _PARTS if apart else 1)
    if T:
        _router_logits_kernel[grid](
            x=x_TD,
            w=weight_ED,
            logits=logits,
            T=T,
            E=E,
            D=D,
            PARTS=_PARTS,
            APART=apart,
            INTERPRETED=is_interpreted(x_TD),
            BLOCK_T=tokens,
            BLOCK_E=64,
            BLOCK_D=32 if x_TD.dtype == torch.float32 else 64,
            num_warps=4,
            num_stages=4,
            **launch_options(),
        )
    return logits


@operation(kernel=_launch_router_logits)
def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Return x W^T in parts.

    Args:
        x_TD: [T, D] bfloat16 or float32, contiguous.
        weight_ED: [E, D] bfloat16 or float32, contiguous.

    Returns:
        logits_STE: [S, T, E] float32; the product is the sum over the first dimension, in order
            (computed by `route`). S depends on T, the sum does not. The reference has S = 1.
    """
    return F.linear(as_float32(x_TD), as_float32(weight_ED)).unsqueeze(0)

"""Rotary embedding and Hadamard rotation of rows in registers, for index keys and index queries."""

from dsv3_kernels._triton import tl, triton


@triton.jit
def partner_of(i, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return the other dimension of the pair that each of the first 2 * HALF belongs to."""
    if INTERLEAVED:
        return i ^ 1
    else:  # noqa: RET505 - Triton drops a constant condition's other branch only so
        return tl.where(i < HALF, i + HALF, i - HALF)


@triton.jit
def turn_rows(x, partner, i, cos_ptr, sin_ptr, t, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return float32 rows [R, I] of token `t`, their first 2 * HALF dimensions rotated.

    `partner` is x at `partner_of(i)`; i is [1, I].
    """
    is_turned = i < 2 * HALF
    pair = i // 2 if INTERLEAVED else i % HALF
    is_first = i % 2 == 0 if INTERLEAVED else i < HALF
    cos = tl.load(cos_ptr + t * HALF + pair, mask=is_turned, other=0.0)
    sin = tl.load(sin_ptr + t * HALF + pair, mask=is_turned, other=0.0)
    sin = tl.where(is_first, -sin, sin)
    return tl.where(is_turned, x * cos + partner * sin, x)


@triton.jit
def hadamard_rows(x, ROOT: tl.constexpr, STAGES: tl.constexpr):
    """Return float32 rows [R, 2 ** STAGES] times the Hadamard matrix and ROOT.

    Adds in the order of `hadamard`, so it has the same bits.
    """
    ROWS: tl.constexpr = x.shape[0]
    for _ in tl.static_range(STAGES):
        even, odd = tl.split(tl.reshape(x, (ROWS, x.shape[1] // 2, 2)))
        halves = tl.permute(tl.join(even + odd, even - odd), (0, 2, 1))
        x = tl.reshape(halves, (ROWS, x.shape[1]))
    return x * ROOT

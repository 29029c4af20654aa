"""Casts between FP8 (e4m3, one scale per 128x128 block) and BF16, in numpy on any machine.

FP8 and BF16 values are raw bytes here (uint8, uint16); numpy has neither type.
"""

import math

import numpy as np
import numpy.typing as npt

from dsv3.checkpoint.sharding import BLOCK

FP8_MAX = 448.0
BF16_INFINITY = np.uint16(0x7F80)  # bits of infinity; all are also set in NaN
_SMALLEST_NORMAL = 2.0**-6

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]


def fp8_values() -> F32:
    """Return the 256 values of e4m3fn (no infinities, one NaN of each sign)."""
    codes = np.arange(128)
    exponent = codes >> 3
    mantissa = codes & 7
    values = np.where(
        exponent > 0,
        (1 + mantissa / 8) * np.exp2(exponent - 7.0),
        mantissa / 8 * _SMALLEST_NORMAL,
    )
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


def to_bf16(x: F32) -> U16:
    """Round to the nearest BF16, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def from_bf16(x: U16) -> F32:
    """Convert BF16 to float32, exactly."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def to_fp8(x: F32) -> U8:
    """Round to the nearest e4m3, ties to even; clamp to +-448; keep NaN."""
    size = np.minimum(np.abs(x), np.float32(FP8_MAX))
    bits = size.view(np.uint32)
    code = (bits + (0x7FFFF + ((bits >> 20) & 1))) >> 20
    code -= 120 << 3  # the difference of the exponents' biases, 127 - 7
    small = size < _SMALLEST_NORMAL
    code[small] = np.rint(size[small] * np.float32(512))
    code[np.isnan(x)] = 0x7F
    code |= np.signbit(x).astype(np.uint32) << 7
    return code.astype(np.uint8)


def dequantize(w_FD: U8, scale_fd: F32) -> U16:
    """Dequantize FP8 rows that begin at a block: value * scale of the block, rounded once.

    Args:
        w_FD: [F, D] e4m3 codes; the last blocks may be ragged.
        scale_fd: [ceil(F / 128), ceil(D / 128)].

    Returns:
        [F, D] BF16 values as uint16.
    """
    # A block has at most 256 different values, so compute these and look the others up.
    table = to_bf16((scale_fd[..., None] * fp8_values()).astype(np.float32))
    out = np.empty(w_FD.shape, np.uint16)
    for f, d in np.ndindex(scale_fd.shape):
        block = np.s_[f * BLOCK : (f + 1) * BLOCK, d * BLOCK : (d + 1) * BLOCK]
        out[block] = table[f, d].take(w_FD[block])
    return out


def quantize(x_FD: F32, scale_fmt: str | None = None) -> tuple[U8, F32]:
    """Quantize rows that begin at a block, as in DeepSeek's published weights.

    scale = max|x| / 448 of each block (1 for a block of zeros); with "ue8m0", rounded up to a power
    of two; q = x / scale.

    Args:
        x_FD: [F, D] fp32; ragged edges count as zeros.
        scale_fmt: None or "ue8m0".

    Returns:
        [F, D] e4m3 codes and scale_fd [ceil(F / 128), ceil(D / 128)]; x is about q * scale.
    """
    w_FD = np.empty(x_FD.shape, np.uint8)
    scale_fd = np.empty((-(-x_FD.shape[0] // BLOCK), -(-x_FD.shape[1] // BLOCK)), np.float32)
    for f, d in np.ndindex(scale_fd.shape):
        block = np.s_[f * BLOCK : (f + 1) * BLOCK, d * BLOCK : (d + 1) * BLOCK]
        scale_fd[f, d] = _scale(float(np.abs(x_FD[block]).max()), scale_fmt)
        w_FD[block] = to_fp8(np.divide(x_FD[block], scale_fd[f, d], dtype=np.float32))
    return w_FD, scale_fd


def _scale(largest: float, scale_fmt: str | None) -> float:
    if not largest > 0:
        return 1.0
    scale = max(largest / FP8_MAX, float(np.finfo(np.float32).tiny))
    if scale_fmt == "ue8m0":
        mantissa, exponent = math.frexp(scale)  # scale = mantissa * 2^exponent, 0.5 <= mantissa < 1
        scale = math.ldexp(1.0, exponent - (mantissa == 0.5))
    return scale

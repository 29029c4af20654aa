"""Casts between FP8 (e4m3, one scale per 128x128 block) and BF16, in numpy on any machine.

FP8 and BF16 values are raw bytes here (uint8, uint16); numpy has neither type.
"""

import numpy as np
import numpy.typing as npt

BLOCK = 128
FP8_MAX = 448.0
_SMALLEST_NORMAL = 2.0**-6

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]


def fp8_values() -> F32:
    """The 256 values of e4m3 (fn: no infinities, one NaN of either sign)."""
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
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
    """Widen BF16, exactly."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def to_fp8(x: F32) -> U8:
    """Round to the nearest e4m3, ties to even; beyond +-448 is +-448, NaN is NaN."""
    size = np.minimum(np.abs(x), np.float32(FP8_MAX))
    bits = size.view(np.uint32)
    normal = ((bits + (0x7FFFF + ((bits >> 20) & 1))) >> 20) - (120 << 3)
    subnormal = np.rint(size * np.float32(512))
    code = np.where(size < _SMALLEST_NORMAL, subnormal, normal).astype(np.uint8)
    code[np.isnan(x)] = 0x7F
    code |= np.signbit(x).astype(np.uint8) * np.uint8(0x80)
    return code


def dequantize(w_FD: U8, scale_fd: F32) -> U16:
    """FP8 rows that begin at a block to BF16: value * scale of the block, rounded once.

    Args:
        w_FD: [F, D] e4m3 codes; the last blocks may be ragged.
        scale_fd: [ceil(F / 128), ceil(D / 128)].
    """
    # A block has at most 256 different values: compute those, then look up.
    table = to_bf16((scale_fd[..., None] * fp8_values()).astype(np.float32))
    out = np.empty(w_FD.shape, np.uint16)
    for f, d in np.ndindex(scale_fd.shape):
        block = np.s_[f * BLOCK : (f + 1) * BLOCK, d * BLOCK : (d + 1) * BLOCK]
        out[block] = table[f, d].take(w_FD[block])
    return out


def quantize(x_FD: F32, scale_fmt: str | None = None) -> tuple[U8, F32]:
    """Quantize rows that begin at a block as DeepSeek's published weights are.

    scale = max|x| / 448 of each block (1 where all is zero), "ue8m0": the next power of two;
    q = x / scale.

    Args:
        x_FD: [F, D] fp32; ragged edges count as zeros.
        scale_fmt: None or "ue8m0".

    Returns:
        [F, D] e4m3 codes and scale_fd [ceil(F / 128), ceil(D / 128)]; x is about q * scale.
    """
    rows, cols = -(-x_FD.shape[0] // BLOCK), -(-x_FD.shape[1] // BLOCK)
    padded = np.zeros((rows * BLOCK, cols * BLOCK), np.float32)
    padded[: x_FD.shape[0], : x_FD.shape[1]] = x_FD
    blocks = padded.reshape(rows, BLOCK, cols, BLOCK)
    largest = np.abs(blocks).max(axis=(1, 3))
    scale = np.where(largest > 0, largest / np.float32(FP8_MAX), np.float32(1)).astype(np.float32)
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    if scale_fmt == "ue8m0":
        mantissa, exponent = np.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
        scale = np.exp2(exponent - (mantissa == 0.5)).astype(np.float32)
    blocks /= scale[:, None, :, None]
    return to_fp8(np.ascontiguousarray(padded[: x_FD.shape[0], : x_FD.shape[1]])), scale

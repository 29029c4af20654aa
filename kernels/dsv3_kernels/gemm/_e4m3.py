"""float8_e4m3fn inside kernels, also on GPUs for which Triton has no such type.

Triton supports e4m3 from compute capability 8.9 on. Below it, and in the interpreter (whose own
conversion rounds wrongly), kernels take bytes and compute the format: a sign, four bits of exponent
with bias 7, three of mantissa; 0x7f and 0xff are NaN, there is no infinity.
"""

import torch
from torch import Tensor

from dsv3_kernels._triton import launch_gpu, tl, triton

_NATIVE_FROM = (8, 9)
_SIGN_AND_VALUE = 0xBF80 - (1 << 16)  # as int16: bits of float16 that come from e4m3


def is_native(x: Tensor) -> bool:
    """Return True if Triton supports e4m3 on the device of `x`."""
    return launch_gpu(x).capability >= _NATIVE_FROM


def e4m3_view(x: Tensor) -> Tensor:
    """Return float8_e4m3fn `x` as kernels take it: unchanged if Triton has e4m3, else bytes."""
    return x if is_native(x) else x.view(torch.uint8)


@triton.jit
def decode_e4m3(code):
    """Return the float32 values of a block of e4m3 bytes (uint8); exact."""
    byte = code.to(tl.int32)
    mag = byte & 0x7F
    normal = ((mag << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(mag < 8, mag.to(tl.float32) * 0.001953125, normal)
    value = tl.where(mag == 0x7F, float("nan"), value)
    signed = value.to(tl.int32, bitcast=True) | ((byte & 0x80) << 24)  # a minus loses that of -0
    return signed.to(tl.float32, bitcast=True)


@triton.jit
def _encode_bits(x):
    bits = x.to(tl.int32, bitcast=True)
    mag = bits & 0x7FFFFFFF
    normal = ((mag + 0x7FFFF + ((mag >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9, which is the last place of floats around 2^14.
    shifted = (mag.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
    code = tl.where(mag < (121 << 23), shifted - 0x46800000, normal)
    code = tl.where(mag > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def encode_e4m3(x, NATIVE: tl.constexpr):
    """Return e4m3 of a float32 block: Triton's type if NATIVE, else uint8 codes.

    Rounds to the nearest, ties to even. `x` must lie within [-464, 464] or be NaN.
    """
    if NATIVE:
        return x.to(tl.float8e4nv)
    else:  # noqa: RET505 - Triton drops a constant condition's other branch only so
        return _encode_bits(x)


@triton.jit
def e4m3_operand(x, NATIVE: tl.constexpr):
    """Return a loaded block as `tl.dot` takes it: e4m3 if NATIVE, else its exact float16."""
    if NATIVE:
        return x
    else:  # noqa: RET505
        return decode_e4m3(x).to(tl.float16)


def e4m3_floats(w: Tensor) -> Tensor:
    """Return float8_e4m3fn values as new float32 values.

    On a CPU, by operations on bits: sign, exponent and mantissa are where float16 has them, and
    2^8 is the difference of the exponents' biases. It is exact, and takes a fifth of the time of
    torch's conversion, which goes value by value. (float16, because small values are subnormal
    there: converting these is fast, while arithmetic on subnormal floats is very slow.) NaN, which
    has no such bits, is left to torch.
    """
    if w.device.type != "cpu" or not w.numel():
        return w.float()
    codes = w.view(torch.int8)
    if (codes & 0x7F).max() == 0x7F:
        return w.float()
    bits = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(_SIGN_AND_VALUE)
    return bits.view(torch.float16).float().mul_(2.0**8)

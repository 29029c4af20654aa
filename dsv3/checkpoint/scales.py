"""Scales of FP8 and integer weights, in dtypes whose values float32 holds exactly."""

import numpy as np
import numpy.typing as npt

from dsv3.checkpoint.fp8_values import F32, from_bf16
from dsv3.checkpoint.names import scale_name
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.region import Region, region_shape


def read_scales(source: Source, weight: str, region: Region) -> F32:
    """Return a region of the scales of an FP8 weight, widened to float32.

    Args:
        source: a checked checkpoint.
        weight: name of the weight.
        region: of the scales, in blocks.
    """
    name = scale_name(weight)
    stored = np.frombuffer(source.read(name, region), np.uint8)
    return widen(stored, source.tensors[name].dtype).reshape(region_shape(region))


def widen(stored: npt.NDArray[np.uint8], dtype: str) -> F32:
    """Return stored scales as float32, exactly; U8 is E8M0 from writers without that type."""
    if dtype in ("F8_E8M0", "U8"):
        return _powers_of_two(stored)
    if dtype == "BF16":
        return from_bf16(stored.view(np.uint16))
    return stored.view({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)


def _powers_of_two(stored: npt.NDArray[np.uint8]) -> F32:
    """Return 2^(code - 127); code 255 is NaN."""
    exponent = np.minimum(stored, 254).astype(np.int32) - 127
    return np.where(stored == 255, np.float32(np.nan), np.ldexp(np.float32(1), exponent))

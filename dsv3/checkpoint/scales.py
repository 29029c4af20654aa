"""Scales of FP8 and integer weights, in dtypes whose values float32 holds exactly."""

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from dsv3.checkpoint.integers import IntegerForm, Layout, integer_form
from dsv3.checkpoint.names import scale_name
from dsv3.checkpoint.quantize import F32, from_bf16
from dsv3.checkpoint.reader import Source, TensorInfo
from dsv3.checkpoint.region import Region, region_shape
from dsv3.checkpoint.sharding import FP8_DTYPE, tensor_specs
from dsv3.config import ModelConfig, QuantizationConfig
from dsv3.config_integers import IntegerConfig, IntegerKind


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


def stored_quantization(
    declared: QuantizationConfig | None, tensors: Mapping[str, TensorInfo]
) -> QuantizationConfig | None:
    """Return the quantization of the stored tensors, which may differ from the declared one.

    One scale per 128 x 128 block is the only supported format. Without a declared quantization,
    scales are powers of two if their dtype has no other values.
    """
    scales = [tensors.get(scale_name(n)) for n, t in tensors.items() if t.dtype == FP8_DTYPE]
    if not scales or declared is not None:
        return declared if scales else None
    is_ue8m0 = all(scale is not None and scale.dtype == "F8_E8M0" for scale in scales)
    return QuantizationConfig(scale_fmt="ue8m0" if is_ue8m0 else None)


def stored_integers(
    declared: ModelConfig, tensors: Mapping[str, TensorInfo]
) -> IntegerConfig | None:
    """Return the kinds of integers of the stored weights; None if there are none."""
    stated = () if declared.integers is None else declared.integers.kinds
    kinds: dict[IntegerKind, None] = {}
    method = "compressed-tensors"
    for spec in tensor_specs(declared).values():
        form = integer_form(tensors, spec.name, spec.shape) if spec.quantizable else None
        if form is not None:
            kinds[stated_kind(form, spec.shape[1], stated)] = None
            method = "awq" if form.layout is Layout.AWQ else method
    return IntegerConfig(method=method, kinds=tuple(kinds)) if kinds else None


def stated_kind(form: IntegerForm, cols: int, stated: Collection[IntegerKind]) -> IntegerKind:
    """Return the kind of a weight of `cols` columns, as one of `stated` if it is one of them.

    A group of all columns is a whole row, too.
    """
    kind = IntegerKind(form.bits, form.group)
    row = IntegerKind(form.bits, 0)
    return row if form.group == cols and kind not in stated else kind

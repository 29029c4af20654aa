"""The quantization of the stored tensors, which may differ from the one that a config states."""

from collections.abc import Collection, Mapping

from dsv3.checkpoint.integers import IntegerForm, Layout, integer_form
from dsv3.checkpoint.names import scale_name
from dsv3.checkpoint.reader import TensorInfo
from dsv3.checkpoint.sharding import FP8_DTYPE, tensor_specs
from dsv3.config import ModelConfig, QuantizationConfig
from dsv3.config_integers import IntegerConfig, IntegerKind


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
    return form.kind if form.kind in stated else form.kind.of_rows(cols)

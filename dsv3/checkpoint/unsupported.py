"""Recognize unsupported quantized and packed weights by the stored names and dtypes."""

from collections.abc import Iterable

from dsv3.checkpoint.names import is_unused
from dsv3.checkpoint.stored import StoredTensor
from dsv3.errors import CheckpointError

# Suffixes of tensor names that identify a format, in order of precedence.
_NAMES = {
    ".absmax": "bitsandbytes 4-bit weights",
    ".quant_map": "bitsandbytes 4-bit weights",
    "bitsandbytes__nf4": "bitsandbytes 4-bit weights",
    "bitsandbytes__fp4": "bitsandbytes 4-bit weights",
    ".SCB": "bitsandbytes INT8 weights",
    ".weight_scale_2": "packed NVFP4 weights",
    ".weight_global_scale": "packed NVFP4 weights",
    ".weight_zero_point": "asymmetric integer weights (compressed-tensors)",
    ".weight_g_idx": "integer weights in permuted order (compressed-tensors)",
    ".g_idx": "packed GPTQ weights",
    ".biases": "packed weights (MLX 4-bit)",
    "_proj_blocks": "packed MXFP4 weights",
    ".W_q": "packed HQQ weights",
    ".trellis": "packed EXL3 weights",
    ".q_weight": "packed EXL2 weights",
    ".codebooks": "packed AQLM weights",
    "._data": "packed weights (quanto)",
    ".bitmask": "sparse weights (compressed-tensors)",
    ".input_scale": "FP8 weights with static activation scales",
    ".activation_scale": "FP8 weights with static activation scales",
}
_ENDS = tuple(_NAMES)
# Dtypes of weights, if no tensor name identifies the format.
_DTYPES = {
    "U32": "packed weights (MLX 4-bit)",
    "I32": "packed integer weights",
    "U8": "packed 4-bit weights",
    "F4": "packed 4-bit weights",
    "F6_E2M3": "6-bit weights",
    "F6_E3M2": "6-bit weights",
    "F8_E5M2": "FP8 weights of the e5m2 form",
    "F8_E4M3FNUZ": "FP8 weights of the fnuz form",
    "F8_E5M2FNUZ": "FP8 weights of the fnuz form",
}
_LORA = "LoRA adapters that are not merged into the weights"
_FUSED_INTEGERS = "INT8 weights of fused experts"
_PACKED_FLOATS = "packed 4-bit weights (NVFP4 or MXFP4)"


def refuse_unsupported(tensors: Iterable[StoredTensor]) -> None:
    """Raise CheckpointError for the first recognized format, with a tensor as an example."""
    shown: dict[str, StoredTensor] = {}
    for tensor in tensors:
        form = _form(tensor)
        if form is not None and not is_unused(tensor.name):
            shown.setdefault(form, tensor)
    for form in (_LORA, *_NAMES.values(), _PACKED_FLOATS, _FUSED_INTEGERS, *_DTYPES.values()):
        if form in shown:
            tensor = shown[form]
            raise CheckpointError(
                f"{tensor.file}: {form} are not supported (tensor {tensor.name} is "
                f"{tensor.entry.dtype}); use the model in BF16, F16, F32, in FP8 (e4m3) with a "
                "scale per 128 x 128 block, or in int8 or int4 of compressed-tensors or AWQ"
            )


def _form(tensor: StoredTensor) -> str | None:
    name = tensor.name
    dtype = tensor.entry.dtype
    if name.endswith(_ENDS):
        return next(form for end, form in _NAMES.items() if name.endswith(end))
    if ".lora_" in name:
        return _LORA
    if name.endswith(".weight_packed") and dtype == "U8":
        return _PACKED_FLOATS
    if dtype == "I8" and name.endswith("_proj"):
        return _FUSED_INTEGERS
    return _DTYPES.get(dtype) if name.endswith((".weight", "_proj")) else None

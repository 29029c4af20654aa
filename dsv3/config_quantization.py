"""Read the quantization of Hugging Face's `config.json`: FP8 in blocks, or integers.

`quant_method` is "fp8" in the published models and in files of transformers; "compressed-tensors"
describes the same format and integers with other keys, "awq" describes integers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv3.config import QuantizationConfig
from dsv3.config_fields import check_mapping, check_only, shown
from dsv3.config_integers import (
    IntegerConfig,
    check_group,
    is_integer_group,
    read_awq_config,
    read_integer_config,
)
from dsv3.errors import ConfigError

Names = Mapping[str, Any]

# "quantization" is MLX's key, "compression_config" that of older compressed-tensors.
QUANTIZATION_KEYS = ("quantization", "compression_config", "quantization_config")
_QUANTIZATION_ONLY: Names = {"activation_scheme": "dynamic", "expert_dtype": "fp8", "fmt": "e4m3"}
_QUANTIZATION_KNOWN = {
    *_QUANTIZATION_ONLY,
    *("dequantize", "ignored_layers", "modules_to_convert", "modules_to_not_convert"),
    *("quant_method", "scale_fmt", "weight_block_size"),
}
_BLOCK_FORMATS = (None, "float-quantized", "naive-quantized")
_BLOCK_WEIGHTS = {"type": "float", "num_bits": 8, "strategy": "block"}
_BLOCKS = ([128, 128], "128x128")
_METHODS = ("fp8", "compressed-tensors", "awq")
_ONLY = (
    "of compressed-tensors only int8, int4, and FP8 with a scale per 128 x 128 block are supported"
)


class UnsupportedQuantizationError(ConfigError):
    """The config describes quantized weights in an unsupported format."""


@dataclass(frozen=True)
class Quantization:
    """Quantization of a file.

    Attributes:
        config: of FP8 weights; None if there are none, or the format is ignored.
        integers: of integer weights; None likewise.
        unknown: unknown keys.
        warning: why the quantization is ignored; otherwise empty.
    """

    config: QuantizationConfig | None = None
    integers: IntegerConfig | None = None
    unknown: tuple[str, ...] = ()
    warning: str = ""


def read_quantization(data: Names, where: str, tensors_decide: bool) -> Quantization:
    """Read the quantization of a file.

    Args:
        data: contents of the file.
        where: its path.
        tensors_decide: return a warning instead of raising `UnsupportedQuantizationError`.

    Raises:
        UnsupportedQuantizationError: the weights are quantized in another format.
        ConfigError: a value has a wrong type, or contradicts another one.
    """
    if data.get("scale_fmt") not in (None, "ue8m0"):  # of DeepSeek's inference fields
        raise ConfigError(
            f"{where}: scale_fmt={shown(data['scale_fmt'])} must be 'ue8m0' or absent"
        )
    try:
        return _supported_quantization(data, where)
    except UnsupportedQuantizationError as error:
        if not tensors_decide:
            raise
        reason = str(error).removeprefix(f"{where}: ")
        return Quantization(warning=f"{reason}; ignored, the stored tensors decide")


def _supported_quantization(data: Names, where: str) -> Quantization:
    for key in QUANTIZATION_KEYS:
        if data.get(key) is not None:
            given = check_mapping(data[key], f"{where}: {key}")
            if key != "quantization_config" or given.get("quant_method") not in _METHODS:
                raise UnsupportedQuantizationError(
                    f"{where}: {key}: weights with {_described(given)} are not supported; only "
                    "block-scaled fp8, compressed-tensors and awq are"
                )
    if data.get("quantization_config") is None:
        return Quantization()
    given = data["quantization_config"]
    name = f"{where}: quantization_config"
    if given["quant_method"] == "compressed-tensors":
        return _compressed_tensors(data, where)
    if given["quant_method"] == "awq":
        return Quantization(integers=read_awq_config(given, name))
    check_only(given, _QUANTIZATION_ONLY, f"{name}.")
    block = given.get("weight_block_size")
    if block is None:
        raise UnsupportedQuantizationError(
            f"{name}: without weight_block_size, FP8 weights have a scale per tensor, which is "
            "not supported; only one per 128 x 128 block is"
        )
    config = _blocks(data, where, tuple(block) if isinstance(block, list) else block)
    unknown = [f"quantization_config.{key}" for key in given if key not in _QUANTIZATION_KNOWN]
    return Quantization(config, unknown=tuple(unknown))


def _blocks(data: Names, where: str, block: Any = (128, 128)) -> QuantizationConfig:
    """Return the quantization of FP8 weights with scales of a file's `scale_fmt`."""
    scale_fmt = data["quantization_config"].get("scale_fmt")
    scale_fmt = None if scale_fmt == "float" else scale_fmt
    if data.get("scale_fmt") not in (None, scale_fmt):
        raise ConfigError(
            f"{where}: scale_fmt={shown(data['scale_fmt'])}, but quantization_config says "
            f"scale_fmt={shown(scale_fmt)}; correct or remove one of them"
        )
    try:
        return QuantizationConfig(block=block, scale_fmt=scale_fmt)
    except ConfigError as error:
        raise ConfigError(f"{where}: quantization_config.{error}") from None


def _described(quantization: Names) -> str:
    """Return the keys and values that identify a format of quantized weights."""
    names = ("quant_method", "quant_algo", "format", "bits", "group_size")
    given = [f"{name}={shown(quantization[name])}" for name in names if name in quantization]
    is_mlx = "quant_method" not in quantization and "bits" in quantization
    return (", ".join(given) or "no quant_method") + (" (MLX)" if is_mlx else "")


def _compressed_tensors(file: Names, path: str) -> Quantization:
    """Return the quantization of a config with quant_method "compressed-tensors".

    Its FP8_BLOCK format is that of the published models, with scales named `weight_scale`. The
    converter adds `scale_fmt`, as the published models have it.

    Args:
        file: contents of the file.
        path: of the file, for errors.

    Raises:
        UnsupportedQuantizationError: a group of weights is quantized differently.
        ConfigError: activations have to be rotated, or no group of weights is described.
    """
    data = file["quantization_config"]
    where = f"{path}: quantization_config"
    if data.get("transform_config"):
        raise ConfigError(
            f"{where}: transform_config={shown(data['transform_config'])} is not supported: "
            "activations are not rotated"
        )
    groups = data.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError(
            f"{where}: config_groups={shown(groups)} lists no groups of weights; {_ONLY}"
        )
    has_integers = any(is_integer_group(group) for group in groups.values())
    blocks = {name: group for name, group in groups.items() if not is_integer_group(group)}
    for name, group in blocks.items():
        full = f"{where}: config_groups.{name}"
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise ConfigError(f"{full} has no weights; {_ONLY}")
        if weights.get("type", "int") == "int":
            bits = shown(weights.get("num_bits"))
            raise UnsupportedQuantizationError(
                f"{full}.weights.num_bits={bits} is not supported; {_ONLY}"
            )
        wrong = [key for key, value in _BLOCK_WEIGHTS.items() if weights.get(key) != value]
        if weights.get("block_structure") not in _BLOCKS:
            wrong.append("block_structure")
        if wrong:
            value = f"{full}.weights.{wrong[0]}={shown(weights.get(wrong[0]))}"
            raise UnsupportedQuantizationError(f"{value} is not supported; {_ONLY}")
        check_group(group, full, _BLOCK_FORMATS)
    return Quantization(
        _blocks(file, path) if blocks else None,
        read_integer_config(data, where) if has_integers else None,
    )

"""Read the `quantization_config` of compressed-tensors; only FP8 in blocks is supported."""

from collections.abc import Mapping
from typing import Any

from dsv3.config import QuantizationConfig, UnsupportedQuantizationError
from dsv3.config_fields import check_mapping, shown
from dsv3.errors import ConfigError

_WANTED = {"type": "float", "num_bits": 8, "strategy": "block"}
_BLOCKS = ([128, 128], "128x128")
_ONLY = (
    "of compressed-tensors only FP8 with a scale per 128 x 128 block is supported (no int4 or "
    "other packed weights)"
)


def compressed_tensors(data: Mapping[str, Any], where: str) -> QuantizationConfig:
    """Return the quantization of a config with quant_method "compressed-tensors".

    Its FP8_BLOCK form is that of the published models with another name, `weight_scale`.

    Args:
        data: the quantization_config.
        where: begins the messages of errors.

    Raises:
        UnsupportedQuantizationError: a group of weights is quantized otherwise.
        ConfigError: activations have to be rotated, a group is no mapping, or there is none.
    """
    if data.get("transform_config"):
        raise ConfigError(
            f"{where}: transform_config={shown(data['transform_config'])} is not supported: "
            "activations are not rotated"
        )
    groups = check_mapping(data.get("config_groups"), f"{where}: config_groups")
    if not groups:
        raise ConfigError(f"{where}: config_groups={{}} lists no groups of weights")
    for name, group in groups.items():
        full = f"{where}: config_groups.{name}"
        weights = check_mapping(check_mapping(group, full).get("weights"), f"{full}.weights")
        wrong = [key for key, value in _WANTED.items() if weights.get(key) != value]
        if weights.get("block_structure") not in _BLOCKS:
            wrong.append("block_structure")
        if wrong:
            value = f"{full}.weights.{wrong[0]}={shown(weights.get(wrong[0]))}"
            raise UnsupportedQuantizationError(f"{value} is not supported; {_ONLY}")
    return QuantizationConfig()

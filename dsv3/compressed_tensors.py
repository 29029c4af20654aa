"""Read the `quantization_config` of compressed-tensors; only FP8 in blocks is supported."""

from collections.abc import Mapping
from typing import Any

from dsv3.config import QuantizationConfig
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
        ConfigError: any group of weights is quantized otherwise.
    """
    groups = data.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError(f"{where}: config_groups={groups!r} lists no groups of weights; {_ONLY}")
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise ConfigError(f"{where}: config_groups.{name} has no weights; {_ONLY}")
        wrong = [key for key, value in _WANTED.items() if weights.get(key) != value]
        if weights.get("block_structure") not in _BLOCKS:
            wrong.append("block_structure")
        if wrong:
            told = f"config_groups.{name}.weights.{wrong[0]}={weights.get(wrong[0])!r}"
            raise ConfigError(f"{where}: {told} is not supported; {_ONLY}")
    return QuantizationConfig()

"""Integer weights of a `config.json`: compressed-tensors (int8, int4) and AWQ.

Only symmetric integers with scales per row or per group of columns are supported in
compressed-tensors. Quantization of activations is not applied: products are of the weights alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dsv3.config_fields import check_only, shown
from dsv3.errors import ConfigError

Names = Mapping[str, Any]

_FORMATS = (None, "pack-quantized", "int-quantized", "naive-quantized", "mixed-precision")
_STATUS = (None, "compressed", "frozen")
_ACTORDERS = (None, False, "static", "weight")  # these do not permute the stored columns
_WEIGHTS: Names = {"symmetric": True, "dynamic": False, "block_structure": None}
_ACTIVATIONS: Names = {"dynamic": True, "type": "int", "num_bits": 8, "strategy": "token"}
_AWQ: Names = {"bits": 4, "zero_point": True, "version": "gemm"}


class IntegerKind(NamedTuple):
    """Width of integers, and the columns that share a scale: a whole row if `group` is 0."""

    bits: int
    group: int

    def of_rows(self, cols: int) -> "IntegerKind":
        """Return the kind with a group of all `cols` columns as that of a whole row."""
        return IntegerKind(self.bits, 0) if self.group == cols else self

    def __str__(self) -> str:
        """Return the kind in words, for messages."""
        return f"int{self.bits} with {f'group_size={self.group}' if self.group else 'whole rows'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerConfig:
    """Weights stored as integers of 4 or 8 bits with scales: some of the model's, or all.

    Attributes:
        method: the format, as `quant_method` names it.
        kinds: those in use. The stored tensors tell which one a weight has.
    """

    method: str
    kinds: tuple[IntegerKind, ...]

    @property
    def unit(self) -> int:
        """Columns that a shard keeps together: a group, and a block of products on a CPU."""
        return max(32, *(kind.group for kind in self.kinds))


def is_integer_group(group: object) -> bool:
    """Return True if a group of compressed-tensors describes weights of 4 or 8 bits."""
    weights = group.get("weights") if isinstance(group, dict) else None
    return (
        isinstance(weights, dict)
        and weights.get("type", "int") == "int"
        and weights.get("num_bits") in (4, 8)
        and type(weights["num_bits"]) is int
    )


def read_integer_group(group: Names, where: str) -> IntegerKind:
    """Return the kind of integers of a group of compressed-tensors.

    Args:
        group: for which `is_integer_group` is True.
        where: prefix of errors.

    Raises:
        ConfigError: the group is malformed, or needs more than a product of the weights.
    """
    weights = group["weights"]
    check_only(weights, _WEIGHTS, f"{where}.weights.")
    check_group(group, where, _FORMATS)
    if weights.get("actorder") not in _ACTORDERS:
        raise ConfigError(
            f"{where}.weights.actorder={shown(weights['actorder'])} is not supported: columns are "
            "stored in another order than the activations'"
        )
    check_only(group.get("input_activations") or {}, _ACTIVATIONS, f"{where}.input_activations.")
    strategy = weights.get("strategy")
    size = weights.get("group_size")
    if strategy == "channel" and size in (None, -1):
        return IntegerKind(weights["num_bits"], 0)
    if strategy == "group":
        return IntegerKind(weights["num_bits"], _group_size(size, f"{where}.weights.group_size"))
    raise ConfigError(
        f"{where}.weights.strategy={shown(strategy)} with group_size={shown(size)} is not "
        "supported; only 'channel' and 'group' (then with a group_size) are"
    )


def check_group(group: Names, where: str, formats: tuple[str | None, ...]) -> None:
    """Raise ConfigError if a field is wrong that groups of all kinds have."""
    _check_texts(group.get("targets"), f"{where}.targets")
    if group.get("format") not in formats:
        raise ConfigError(f"{where}.format={shown(group['format'])} must be one of {formats[1:]}")
    if group.get("output_activations") is not None:
        raise ConfigError(f"{where}.output_activations is not supported: outputs are not quantized")
    activations = group.get("input_activations")
    if not isinstance(activations, dict | None):
        raise ConfigError(
            f"{where}.input_activations={shown(activations)} must be a mapping or absent"
        )


def read_integer_config(data: Names, where: str) -> IntegerConfig:
    """Return the integers of a config with quant_method "compressed-tensors".

    Args:
        data: the quantization_config; at least one of its groups has integers.
        where: its name in errors.
    """
    if data.get("format") not in (*_FORMATS, "float-quantized"):
        raise ConfigError(f"{where}.format={shown(data['format'])} must be one of {_FORMATS[1:]}")
    if data.get("quantization_status") not in _STATUS:
        raise ConfigError(
            f"{where}.quantization_status={shown(data['quantization_status'])} must be 'compressed'"
        )
    if data.get("kv_cache_scheme") is not None:
        raise ConfigError(f"{where}.kv_cache_scheme is not supported; remove it, or set it to null")
    if data.get("ignore") is not None:
        _check_texts(data["ignore"], f"{where}.ignore")
    kinds = {
        read_integer_group(group, f"{where}: config_groups.{name}"): None
        for name, group in data["config_groups"].items()
        if is_integer_group(group)
    }
    return IntegerConfig(method="compressed-tensors", kinds=tuple(kinds))


def read_awq_config(data: Names, where: str) -> IntegerConfig:
    """Return the integers of a config with quant_method "awq"."""
    stated = {**data, "version": str(data.get("version", "gemm")).lower()}
    if data.get("bits", data.get("w_bit")) is None:
        raise ConfigError(f"{where}: bits is missing; AWQ weights have 4")
    check_only(stated, _AWQ, f"{where}.")
    if data.get("modules_to_not_convert") is not None:
        _check_texts(data["modules_to_not_convert"], f"{where}.modules_to_not_convert")
    size = data.get("group_size", data.get("q_group_size"))
    group = 0 if size == -1 else _group_size(size, f"{where}.group_size")
    return IntegerConfig(method="awq", kinds=(IntegerKind(4, group),))


def _group_size(size: object, name: str) -> int:
    if type(size) is not int or size < 1 or size % 8:
        raise ConfigError(f"{name}={shown(size)} must be a positive multiple of 8")
    return size


def _check_texts(values: object, name: str) -> None:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ConfigError(f"{name}={shown(values)} must be a list of names")

"""Parameters of the rotary embedding, read from all spellings of Hugging Face's `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv3.config_fields import (
    DEEPSEEK_ROPE_NAMES,
    agreed,
    check_fields,
    check_mapping,
    check_only,
    check_required,
    check_value,
    shown,
)
from dsv3.errors import ConfigError

Names = Mapping[str, Any]


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return 0.1 * mscale * ln(factor) + 1; 1 if the context is not extended."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """YaRN parameters, which extend rotary frequencies beyond the original context length."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        """Raise ConfigError for invalid YaRN parameters."""
        check_fields(self, "rope_scaling.")
        if self.beta_fast < self.beta_slow:
            raise ConfigError(
                f"rope_scaling.beta_fast={self.beta_fast} must be at least "
                f"beta_slow={self.beta_slow}"
            )


_ROPE_ONLY: Names = {"partial_rotary_factor": 1}
_YARN_ONLY: Names = {
    "attn_factor": 1,
    "extrapolation_factor": 1,
    "llama_4_scaling_beta": None,
    "partial_rotary_factor": 1,
    "truncate": True,
}
_ROPE_FIELDS = [f.name for f in dataclasses.fields(RopeScaling)]
_ROPE_REQUIRED = [
    f.name for f in dataclasses.fields(RopeScaling) if f.default is dataclasses.MISSING
]
_ROPE_TYPES = ("rope_type", "type")
_ROPE_PLAIN = {*_ROPE_TYPES, "rope_theta", *_ROPE_ONLY}
_YARN_KNOWN = {*_ROPE_PLAIN, *_ROPE_FIELDS, *_YARN_ONLY, "attention_factor"}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a file.

    Attributes:
        theta: the base.
        scaling: YaRN; None for plain rotary embedding.
        unknown: unknown keys.
    """

    theta: float
    scaling: RopeScaling | None
    unknown: list[str]


def read_rope(data: Names, where: str) -> Rope:
    """Read `rope_theta` with `rope_scaling`, or transformers 5's `rope_parameters`.

    DeepSeek's inference fields in the same file must agree with them.
    """
    check_only(data, _ROPE_ONLY, f"{where}: ")
    spellings = [
        _RopeSpelling(key, data[key], where)
        for key in ("rope_parameters", "rope_scaling")
        if data.get(key) not in (None, {})
    ]
    theta_claims = [("rope_theta", data.get("rope_theta"))]
    for spelling in spellings:
        theta_claims += spelling.claims("rope_theta")
    for name, value in theta_claims:
        if value is not None:
            check_value("rope_theta", value, f"{where}: {name}")
    theta = agreed(theta_claims, where)

    kind_claims = [claim for spelling in spellings for claim in spelling.claims(*_ROPE_TYPES)]
    kind = agreed(kind_claims, where)
    scaling = None
    if kind == "yarn":
        length = data.get("original_max_position_embeddings")
        scalings = {s.key: s.scaling(length) for s in spellings if s.kind is not None}
        for name in _ROPE_FIELDS:
            claims = [(f"{key}.{name}", getattr(value, name)) for key, value in scalings.items()]
            agreed(claims, where)
        scaling = next(iter(scalings.values()))
    _check_deepseek_rope(data, scaling, where)
    unknown = [key for spelling in spellings for key in spelling.unknown]
    return Rope(10000.0 if theta is None else float(theta), scaling, unknown)


class _RopeSpelling:
    """`rope_scaling` or `rope_parameters`.

    Attributes:
        key: its name.
        kind: "yarn" or "default"; None for a mapping with only the base.
        unknown: unknown keys.
    """

    def __init__(self, key: str, value: object, where: str) -> None:
        self.key = key
        self._file = where
        self._where = f"{where}: {key}"
        mapping = check_mapping(value, self._where)
        self._values = {name: value for name, value in mapping.items() if value is not None}
        self.kind = agreed(self.claims(*_ROPE_TYPES), where)
        if self.kind is None and self._values.keys() - _ROPE_PLAIN:
            raise ConfigError(f"{self._where} has no rope_type; add rope_type='yarn' if it is YaRN")
        if self.kind not in (None, "default", "yarn"):
            raise ConfigError(
                f"{self._where}: rope type {shown(self.kind)} is not supported; only 'yarn' is"
            )
        is_yarn = self.kind == "yarn"
        only = _YARN_ONLY if is_yarn else _ROPE_ONLY
        check_only(self._values, only, f"{self._where}.")
        known = _YARN_KNOWN if is_yarn else _ROPE_PLAIN
        self.unknown = [f"{key}.{name}" for name in self._values if name not in known]

    def claims(self, *names: str) -> list[tuple[str, Any]]:
        """Return the full names and values of keys."""
        return [(f"{self.key}.{name}", self._values.get(name)) for name in names]

    def scaling(self, outer_length: object) -> RopeScaling:
        """Return the described YaRN.

        Args:
            outer_length: `original_max_position_embeddings` outside the mapping; None if absent.
        """
        values = {name: self._values[name] for name in _ROPE_FIELDS if name in self._values}
        length = "original_max_position_embeddings"
        if outer_length is not None:
            values[length] = agreed([(length, outer_length), *self.claims(length)], self._file)
        unknown = [name for name in self._values if name not in _YARN_KNOWN]
        check_required(_ROPE_REQUIRED, values, unknown, self._where)
        for name, value in values.items():
            check_value(name, value, f"{self._where}.{name}")
        try:
            scaling = RopeScaling(**values)
        except ConfigError as error:
            raise ConfigError(f"{self._file}: {error}") from None
        _check_attention_factor(self._values, scaling, self._where)
        return scaling


def _check_deepseek_rope(data: Names, scaling: RopeScaling | None, where: str) -> None:
    """Raise ConfigError for inference fields that contradict the YaRN of the file."""
    for name, ours in DEEPSEEK_ROPE_NAMES.items():
        value = data.get(name)
        if value is None:
            continue
        check_value(ours, value, f"{where}: {name}")
        wanted = "no YaRN" if scaling is None else f"{ours}={getattr(scaling, ours)}"
        if scaling is None or value != getattr(scaling, ours):
            raise ConfigError(
                f"{where}: {name}={value}, but rope_scaling says {wanted}; "
                "correct or remove one of them"
            )


def _check_attention_factor(rope: Names, scaling: RopeScaling, where: str) -> None:
    """Raise ConfigError if the factor of cosines and sines differs from the one given by mscale.

    transformers ignores mscale unless mscale_all_dim is also present; DeepSeek's code does not. If
    the results differ, the file must have both, or attention_factor.
    """
    factor = scaling.factor
    ours = yarn_mscale(factor, scaling.mscale) / yarn_mscale(factor, scaling.mscale_all_dim)
    has_both = rope.get("mscale") and rope.get("mscale_all_dim")
    theirs = ours if has_both else yarn_mscale(factor, 1.0)
    given = rope.get("attention_factor")
    if given is not None:
        check_value("mscale", given, f"{where}.attention_factor")
        if not math.isclose(given, ours, rel_tol=1e-5):
            raise ConfigError(
                f"{where}.attention_factor={given}, but factor, mscale and mscale_all_dim give "
                f"{ours:.6g}; correct or remove one of them"
            )
    elif not math.isclose(ours, theirs, rel_tol=1e-5):
        raise ConfigError(
            f"{where}: mscale={rope.get('mscale')} with mscale_all_dim={rope.get('mscale_all_dim')}"
            f" multiplies cosines by {ours:.6g} in DeepSeek's code and by {theirs:.6g} in "
            "transformers; give both, or attention_factor"
        )

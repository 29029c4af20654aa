"""Mixed precision: the kind of integers of each weight, by measured sensitivity under a budget.

A site is a projection of a layer, with all experts and the parts that one product reads.
`scripts/sensitivity.py` measures the loss of each kind at each site. All weights of a site get the
same kind, and so do all routed experts: transformers reads all of them as one kind, and vLLM and
SGLang those of a layer. Beginning with the smallest kind everywhere, the upgrade with the most loss
saved per added bit is taken while it fits the budget. The last one is the weight as it is stored,
in FP8 or BF16.
"""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.checkpoint.integers import integer_form
from dsv3.checkpoint.jobs import may_be_integers
from dsv3.checkpoint.names import scale_name
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.sharding import TensorSpec, tensor_specs
from dsv3.config import ModelConfig
from dsv3.config_fields import check_mapping, shown
from dsv3.config_integers import IntegerKind
from dsv3.errors import ConfigError
from dsv3.read_files import read_mapping

# A weight that gets none of them stays as it is stored.
KINDS = {
    "int4-128": IntegerKind(4, 128),
    "int4-32": IntegerKind(4, 32),
    "int8": IntegerKind(8, 0),
}
Losses = dict[str, dict[str, float]]
"""Nats per token by site and kind."""
_PLAIN_BITS = 16
_SCALE_BITS = 16
_NAME = re.compile(r"model\.layers\.(\d+)\.(.*)\.weight")
# Projections that one product reads.
_TOGETHER = {
    "q_proj": "in_proj",
    "q_a_proj": "in_proj",
    "kv_a_proj_with_mqa": "in_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def site_of(name: str) -> str:
    """Return the site of a weight, such as "3 mlp.experts.gate_up_proj"."""
    match = _NAME.fullmatch(name)
    assert match is not None, name
    path = re.sub(r"\.experts\.\d+\.", ".experts.", match[2])
    prefix, _, projection = path.rpartition(".")
    return f"{match[1]} {prefix}.{_TOGETHER.get(projection, projection)}"


def sites(config: ModelConfig) -> dict[str, list[TensorSpec]]:
    """Return the weights of each site whose rows are whole groups of 32."""
    found: dict[str, list[TensorSpec]] = {}
    for spec in tensor_specs(config).values():
        if may_be_integers(spec) and spec.shape[1] % 32 == 0:
            found.setdefault(site_of(spec.name), []).append(spec)
    return found


def fitting(kind: IntegerKind, cols: int) -> IntegerKind:
    """Return a kind whose groups divide the columns: the given one, or one of smaller groups."""
    groups = (kind.group, 64, 32) if kind.group else (0,)
    return kind._replace(group=next(g for g in groups if not g or cols % g == 0))


def bits_of(source: Source, spec: TensorSpec, kind: IntegerKind | None) -> int:
    """Return the bits of a weight with its scales; of the stored one for None.

    Weights stored as integers become BF16 if they get no kind.
    """
    rows, cols = spec.shape
    if kind is not None:
        return rows * cols * kind.bits + rows * (cols // (kind.group or cols)) * _SCALE_BITS
    if integer_form(source.tensors, spec.name, spec.shape) is not None:
        return rows * cols * _PLAIN_BITS
    names = (spec.name, scale_name(spec.name))
    return 8 * sum(source.tensors[name].num_bytes for name in names if name in source.tensors)


@dataclass(frozen=True, slots=True)
class _Choice:
    """A kind for weights, with their size and loss; None for the stored weights."""

    kind: IntegerKind | None
    bits: int
    loss: float


@dataclass(frozen=True, slots=True)
class _Unit:
    """Weights that get the same kind, and the choices for them, by ascending size."""

    specs: list[TensorSpec]
    choices: list[_Choice]


def mixed_kinds(
    source: Source,
    bits: float,
    file: Path,
    keeps_mtp: bool = True,
    experts_by_layer: bool = False,
) -> dict[str, IntegerKind]:
    """Return the kinds of the weights that become integers in mixed precision.

    Args:
        source: the checkpoint.
        bits: most bits per weight, scales included, of the weights that may be integers.
        file: written by `scripts/sensitivity.py`.
        keeps_mtp: the layers that draft tokens are converted, too.
        experts_by_layer: the routed experts of each layer get a kind of their own.

    Raises:
        ConfigError: the file is malformed or of another model, or the budget is too small.
    """
    units = _units(source, read_losses(file), file, keeps_mtp, experts_by_layer)
    num_values = sum(math.prod(spec.shape) for unit in units for spec in unit.specs)
    budget = bits * num_values
    chosen = [unit.choices[0] for unit in units]
    used = sum(choice.bits for choice in chosen)
    if used > budget:
        raise ConfigError(
            f"--bits={bits:g}: the smallest integers take {used / num_values:.3f} bits per weight; "
            "give at least that"
        )
    while (best := _best_upgrade(units, chosen, budget - used)) is not None:
        index, choice = best
        used += choice.bits - chosen[index].bits
        chosen[index] = choice
    return {
        spec.name: choice.kind
        for unit, choice in zip(units, chosen, strict=True)
        for spec in unit.specs
        if choice.kind is not None
    }


def _best_upgrade(
    units: list[_Unit], chosen: list[_Choice], room: float
) -> tuple[int, _Choice] | None:
    """Return the unit and choice that save most loss per added bit and fit; None if none does."""
    best, best_rate = None, 0.0
    for index, now in enumerate(chosen):
        for choice in units[index].choices:
            added = choice.bits - now.bits
            rate = (now.loss - choice.loss) / max(1, added)
            if added <= room and rate > best_rate:
                best, best_rate = (index, choice), rate
    return best


def _units(
    source: Source, losses: Losses, file: Path, keeps_mtp: bool, experts_by_layer: bool
) -> list[_Unit]:
    """Return the weights to convert with the choices for them; drafts cost no loss."""
    by_unit: dict[str, dict[str, list[TensorSpec]]] = {}
    for site, specs in sites(source.config).items():
        stored = [spec for spec in specs if _is_stored(source, spec)]
        if stored and (keeps_mtp or not stored[0].mtp):
            if site not in losses and not stored[0].mtp:
                raise ConfigError(f"{file}: no loss of {site}; measure it for this model")
            name = _unit_of(site, experts_by_layer or stored[0].mtp)
            by_unit.setdefault(name, {})[site] = stored
    units = []
    for by_site in by_unit.values():
        specs = [spec for specs in by_site.values() for spec in specs]
        cols = math.gcd(*(spec.shape[1] for spec in specs))
        choices = [_Choice(None, sum(bits_of(source, spec, None) for spec in specs), 0.0)]
        for name, kind in KINDS.items():
            fit = fitting(kind, cols)
            loss = sum(losses[site][name] for site in by_site if site in losses)
            choices.append(_Choice(fit, sum(bits_of(source, spec, fit) for spec in specs), loss))
        units.append(_Unit(specs, sorted(choices, key=lambda choice: choice.bits)))
    return units


def _unit_of(site: str, by_layer: bool) -> str:
    """Return the site; for routed experts, without projection, and without layer if not wanted."""
    layer, experts, _ = site.partition(" mlp.experts.")
    return layer + experts if by_layer or not experts else experts


def _is_stored(source: Source, spec: TensorSpec) -> bool:
    is_plain = spec.name in source.tensors
    return is_plain or integer_form(source.tensors, spec.name, spec.shape) is not None


def read_losses(file: Path, is_complete: bool = True) -> Losses:
    """Read the loss of each kind at each site.

    Args:
        file: written by `scripts/sensitivity.py`.
        is_complete: every site must have the loss of every kind.

    Raises:
        ConfigError: a value is missing or no number.
    """
    data: Mapping[str, Any] = read_mapping(file)
    losses: Losses = {}
    for site, values in check_mapping(data.get("sensitivity"), f"{file}: sensitivity").items():
        given = check_mapping(values, f"{file}: sensitivity: {site}")
        names = [name for name in KINDS if is_complete or name in given]
        losses[site] = {
            name: _loss(given.get(name), f"{file}: sensitivity: {site}: {name}") for name in names
        }
    return losses


def _loss(value: Any, name: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= sys.float_info.max:
        raise ConfigError(
            f"{name}={shown(value)} must be a number of at least 0; an interrupted measurement "
            "goes on when its command is given again"
        )
    return float(value)

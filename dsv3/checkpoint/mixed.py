"""Mixed precision: the kind of integers of each weight, by measured sensitivity under a budget.

A site is a projection of a layer; its weights (all experts, and parts that one product reads) get
the same kind. `scripts/sensitivity.py` measures the loss of each kind at each site. Beginning with
the smallest kind everywhere, the upgrade with the most loss saved per added bit is taken while it
fits the budget.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.checkpoint.jobs import may_be_integers
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.sharding import TensorSpec, tensor_specs
from dsv3.config import ModelConfig
from dsv3.config_fields import check_mapping, shown
from dsv3.config_integers import IntegerKind
from dsv3.errors import ConfigError
from dsv3.read_files import read_mapping

# By ascending size. A site that gets none of them stays in BF16.
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


def bits_of(spec: TensorSpec, kind: IntegerKind | None) -> int:
    """Return the bits of a weight with its scales; of BF16 for None."""
    rows, cols = spec.shape
    if kind is None:
        return rows * cols * _PLAIN_BITS
    kind = fitting(kind, cols)
    return rows * cols * kind.bits + rows * (cols // (kind.group or cols)) * _SCALE_BITS


@dataclass(frozen=True, slots=True)
class _Choice:
    """A kind at a site, with its size and loss."""

    kind: IntegerKind | None
    bits: int
    loss: float


def mixed_kinds(source: Source, bits: float, file: Path) -> dict[str, IntegerKind]:
    """Return the kinds of the weights of mixed precision.

    Args:
        source: the checkpoint.
        bits: most bits per weight, scales included, of the weights that may be integers.
        file: written by `scripts/sensitivity.py`.

    Raises:
        ConfigError: the file is malformed or of another model, or the budget is too small.
    """
    losses = read_losses(file)
    weights = sites(source.config)
    options = {site: list(_choices(specs, losses, site, file)) for site, specs in weights.items()}
    num_values = sum(s.shape[0] * s.shape[1] for specs in weights.values() for s in specs)
    budget = bits * num_values
    chosen = dict.fromkeys(options, 0)
    used = sum(choices[0].bits for choices in options.values())
    if used > budget:
        raise ConfigError(
            f"--bits={bits:g}: the smallest integers take {used / num_values:.3f} bits per weight; "
            "give at least that"
        )
    while (best := _best_upgrade(options, chosen, budget - used)) is not None:
        site, index = best
        used += options[site][index].bits - options[site][chosen[site]].bits
        chosen[site] = index
    kinds: dict[str, IntegerKind] = {}
    for site, specs in weights.items():
        kind = options[site][chosen[site]].kind
        if kind is not None:
            kinds |= {spec.name: fitting(kind, spec.shape[1]) for spec in specs}
    return kinds


def _best_upgrade(
    options: Mapping[str, list[_Choice]], chosen: Mapping[str, int], room: float
) -> tuple[str, int] | None:
    """Return the site and choice that save most loss per added bit and fit; None if none does."""
    best, best_rate = None, 0.0
    for site, choices in options.items():
        now = choices[chosen[site]]
        for index in range(chosen[site] + 1, len(choices)):
            added = choices[index].bits - now.bits
            rate = (now.loss - choices[index].loss) / max(1, added)
            if added <= room and rate > best_rate:
                best, best_rate = (site, index), rate
    return best


def _choices(
    specs: list[TensorSpec], losses: Mapping[str, Mapping[str, float]], site: str, file: Path
) -> Iterator[_Choice]:
    """Yield the choices of a site, by ascending size; the loss of layers for drafts is 0."""
    measured = losses.get(site)
    if measured is None and not specs[0].mtp:
        raise ConfigError(f"{file}: no loss of {site}; measure it for this model")
    for name, kind in KINDS.items():
        loss = 0.0 if measured is None else measured[name]
        yield _Choice(kind, sum(bits_of(spec, kind) for spec in specs), loss)
    yield _Choice(None, sum(bits_of(spec, None) for spec in specs), 0.0)


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
    if not is_number or not 0 <= value < float("inf"):
        raise ConfigError(
            f"{name}={shown(value)} must be a number of at least 0; an interrupted measurement "
            "goes on when its command is given again"
        )
    return float(value)

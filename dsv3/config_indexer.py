"""The layers of a sparse model that select keys themselves, and the ones that share a selection."""

from collections.abc import Mapping, Sequence
from typing import Any

from dsv3.config_fields import agreed, shown
from dsv3.errors import ConfigError

FULL = "full"
SHARED = "shared"
_LETTERS = {"F": FULL, "S": SHARED}
# transformers' value for files that give a frequency only.
_OFFSET = 2

INDEXER_KEYS = ("indexer_types", "index_topk_freq", "index_skip_topk_offset", "index_topk_pattern")


def read_indexer_types(
    data: Mapping[str, Any], num_layers: object, where: str
) -> tuple[str, ...] | None:
    """Return "full" or "shared" for each layer; None if all are full.

    A file has a list (`indexer_types`), a pattern such as "FFFSSS" (`index_topk_pattern`), a
    frequency (`index_topk_freq`, `index_skip_topk_offset`), or several of these, which must agree.

    Raises:
        ConfigError: one of them is malformed, or two disagree.
    """
    if type(num_layers) is not int:
        return None  # reported with the other fields
    claims = [
        ("indexer_types", _of_list(data.get("indexer_types"), where)),
        ("index_topk_pattern", _of_pattern(data.get("index_topk_pattern"), where)),
        ("index_topk_freq", _of_frequency(data, num_layers, where)),
    ]
    kinds: tuple[str, ...] | None = agreed(claims, where)
    return None if kinds == (FULL,) * num_layers else kinds


def check_indexer_types(kinds: Sequence[str], num_layers: int) -> None:
    """Raise ConfigError for a list that does not say how each layer selects keys."""
    given = f"indexer_types={shown(list(kinds))}"
    if len(kinds) != num_layers or not set(kinds) <= {FULL, SHARED}:
        raise ConfigError(f"{given} must be num_hidden_layers={num_layers} x 'full' or 'shared'")
    if kinds[0] != FULL:
        raise ConfigError(f"{given} must begin with 'full': layer 0 has no selection to share")


def _of_list(value: object, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(kind, str) for kind in value):
        raise ConfigError(f"{where}: indexer_types={shown(value)} must be a list of strings")
    return tuple(value)


def _of_pattern(value: object, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, str) or not set(value) <= _LETTERS.keys():
        raise ConfigError(
            f"{where}: index_topk_pattern={shown(value)} must be a string of 'F' (full) and 'S' "
            "(shared)"
        )
    return tuple(_LETTERS[letter] for letter in value)


def _of_frequency(data: Mapping[str, Any], num_layers: int, where: str) -> tuple[str, ...] | None:
    """Return the first `offset` layers as full, then every `freq`-th one.

    Source: GlmMoeDsaConfig of transformers 5.24.
    """
    freq = data.get("index_topk_freq")
    if freq is None:
        return None
    offset = data.get("index_skip_topk_offset", _OFFSET)
    for name, value, least in (
        ("index_topk_freq", freq, 1),
        ("index_skip_topk_offset", offset, 0),
    ):
        if type(value) is not int or value < least:
            raise ConfigError(
                f"{where}: {name}={shown(value)} must be an integer, at least {least}"
            )
    after = (max(layer - offset + 1, 0) for layer in range(num_layers))
    return tuple(SHARED if layers % freq else FULL for layers in after)

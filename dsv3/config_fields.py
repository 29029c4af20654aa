"""Rules and checks for the fields of a model's configuration, for all file formats."""

import difflib
import math
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from dsv3.errors import ConfigError

_MAX_LISTED = 20


def shown(value: object) -> str:
    """Return `repr(value)` in at most 100 characters."""
    short = reprlib.Repr()
    short.maxlevel = 2
    short.maxstring = 60
    short.maxother = 60
    text = short.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


@dataclass(frozen=True, slots=True)
class FieldRule:
    """Types and range of a field.

    Attributes:
        kinds: exact types of its values (a bool is not a number).
        least: the smallest value.
        most: the largest value.
        words: the rule in words, for errors.
    """

    kinds: tuple[type, ...]
    least: float
    most: float
    words: str

    def holds(self, value: Any) -> bool:
        """Return True if a field may have this value; NaN is in no range."""
        return type(value) in self.kinds and bool(self.least <= value <= self.most)

    def check(self, name: str, value: object) -> None:
        """Raise ConfigError with `name` and value if the rule does not hold."""
        if not self.holds(value):
            raise ConfigError(f"{name}={shown(value)} must be {self.words}")


_MOST_COUNT = 2**16
_MOST_SIZE = 2**31 - 1
# Far beyond any model, and still finite after a product of two.
_MOST_NUMBER = 1e30

_COUNT = FieldRule((int,), 1, _MOST_COUNT, f"a positive integer, at most {_MOST_COUNT}")
_COUNT_OR_0 = FieldRule((int,), 0, _MOST_COUNT, f"an integer from 0 to {_MOST_COUNT}")
_SIZE = FieldRule((int,), 1, _MOST_SIZE, f"a positive integer, at most {_MOST_SIZE}")
_ID = FieldRule((int,), 0, _MOST_SIZE, "a token id, an integer from 0")
_TRUTH = FieldRule((bool,), 0, 1, "true or false")
_FLOAT = (int, float)
_POSITIVE = FieldRule(_FLOAT, 1e-30, _MOST_NUMBER, "a number above 0")
_NOT_NEGATIVE = FieldRule(_FLOAT, 0, _MOST_NUMBER, "a number, at least 0")
_AT_LEAST_1 = FieldRule(_FLOAT, 1, _MOST_NUMBER, "a number, at least 1")
_BELOW_1 = FieldRule(_FLOAT, 1e-30, math.nextafter(1, 0), "a number above 0, below 1")
_ABOVE_1 = FieldRule(_FLOAT, math.nextafter(1, 2), _MOST_NUMBER, "a number above 1")

# Rules of all numbers and bools in ModelConfig and RopeScaling.
RULES = {
    "vocab_size": _SIZE,
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "moe_intermediate_size": _SIZE,
    "num_hidden_layers": _COUNT,
    "first_k_dense_replace": _COUNT_OR_0,
    "moe_layer_freq": _COUNT,
    "num_attention_heads": _COUNT,
    "q_lora_rank": _SIZE,
    "kv_lora_rank": _SIZE,
    "qk_nope_head_dim": _SIZE,
    "qk_rope_head_dim": _SIZE,
    "v_head_dim": _SIZE,
    "n_routed_experts": _COUNT,
    "n_shared_experts": _COUNT_OR_0,
    "num_experts_per_tok": _COUNT,
    "n_group": _COUNT,
    "topk_group": _COUNT,
    "norm_topk_prob": _TRUTH,
    "routed_scaling_factor": _POSITIVE,
    "rms_norm_eps": _BELOW_1,
    "rope_theta": _ABOVE_1,
    "rope_interleave": _TRUTH,
    "max_position_embeddings": _SIZE,
    "tie_word_embeddings": _TRUTH,
    "bos_token_id": _ID,
    "num_nextn_predict_layers": _COUNT_OR_0,
    "index_n_heads": _COUNT,
    "index_head_dim": _SIZE,
    "index_topk": _SIZE,
    "indexer_rope_interleave": _TRUTH,
    "index_share_for_mtp_iteration": _TRUTH,
    "factor": _AT_LEAST_1,
    "original_max_position_embeddings": _SIZE,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "mscale": _NOT_NEGATIVE,
    "mscale_all_dim": _NOT_NEGATIVE,
}

# DeepSeek's names in its own configuration files, if they differ from Hugging Face's.
DEEPSEEK_NAMES = {
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
}
# The same for YaRN. DeepSeek's code has one mscale, which it uses as mscale_all_dim.
DEEPSEEK_ROPE_NAMES = {
    "rope_factor": "factor",
    "original_seq_len": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale_all_dim",
}


def check_fields(config: Any, prefix: str = "") -> None:
    """Check the fields of a frozen dataclass; convert ints in float fields.

    Raises:
        ConfigError: a field has a wrong type, or a value out of range.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        if value is not None or type(None) not in get_args(f.type):
            check_value(f.name, value, prefix + f.name)
        if f.type is float:
            object.__setattr__(config, f.name, float(value))


def check_value(field: str, value: object, name: str) -> None:
    """Raise ConfigError if a field cannot have this value; `name` is its name in the file."""
    if field in RULES:
        RULES[field].check(name, value)


def check_token_ids(value: object, name: str) -> tuple[int, ...]:
    """Return one id, a list of ids or null as a tuple.

    Raises:
        ConfigError: it is something else.
    """
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    for token_id in ids:
        if type(token_id) is not int:
            raise ConfigError(f"{name}={shown(value)} must be an integer or a list of them")
        _ID.check(name, token_id)
    return tuple(ids)


def check_mapping(value: object, name: str) -> Mapping[str, Any]:
    """Return the value if it is a mapping of names to values.

    Raises:
        ConfigError: the value is not such a mapping.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name}={shown(value)} must be a mapping of names to values")
    return value


def agreed(claims: Iterable[tuple[str, Any]], where: str) -> Any:
    """Return the common value of several names in a file; None if all values are null.

    Args:
        claims: names and values; null values are ignored.
        where: the file.

    Raises:
        ConfigError: two names have different values.
    """
    given = [(name, value) for name, value in claims if value is not None]
    for name, value in given[1:]:
        first, wanted = given[0]
        if value != wanted:
            raise ConfigError(
                f"{where}: {first}={shown(wanted)} and {name}={shown(value)} disagree; "
                "correct or remove one of them"
            )
    return given[0][1] if given else None


def check_only(data: Mapping[str, Any], only: Mapping[str, Any], prefix: str) -> None:
    """Raise ConfigError for a setting that no model of the family has.

    Args:
        data: a mapping of a file.
        only: the only supported value of each setting besides null; None if there is none.
        prefix: file and outer names, for errors.
    """
    for name, wanted in only.items():
        value = data.get(name)
        is_number = type(value) in (int, float) and type(wanted) is int
        if value is None or (value == wanted and (is_number or type(value) is type(wanted))):
            continue
        must = "be absent" if wanted is None else f"be {wanted!r}"
        raise ConfigError(f"{prefix}{name}={shown(value)} is not supported; it must {must}")


def listed(names: Collection[object]) -> str:
    """Return names joined for a message, at most the first 20."""
    first = [shown(name) for name in list(names)[:_MAX_LISTED]]
    num_omitted = len(names) - len(first)
    return ", ".join(first) + (f" and {num_omitted} more" if num_omitted else "")


def refuse_unknown(
    keys: Collection[str], known: Collection[str], where: str, hints: Collection[str] = ()
) -> None:
    """Raise ConfigError with all keys that are not known.

    Args:
        keys: keys of a file.
        known: all supported keys.
        where: the file.
        hints: names that the error may suggest for a single unknown key.
    """
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise ConfigError(f"{where}: {describe_unknown(unknown, hints)}")


def describe_unknown(unknown: Sequence[object], hints: Collection[str], noun: str = "field") -> str:
    """Return "unknown field 'x'; did you mean 'y'?" for one unknown name or several.

    Args:
        unknown: the unknown names.
        hints: names to suggest for a single unknown name.
        noun: noun for the names.
    """
    near = difflib.get_close_matches(str(unknown[0]), hints, n=1) if len(unknown) == 1 else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {noun}{'s' * (len(unknown) > 1)} {listed(unknown)}{hint}"


def check_required(
    required: Collection[str], keys: Collection[str], unknown: Collection[str], where: str
) -> None:
    """Raise ConfigError for the first required field that a file lacks.

    The error suggests an unknown key that looks like the missing name. Other unknown keys get no
    suggestion: if the file is valid without them, following one could change the model.
    """
    for name in required:
        if name not in keys:
            near = difflib.get_close_matches(name, unknown, n=1, cutoff=0.8)
            hint = f"; did you mean it by {shown(near[0])}?" if near else ""
            raise ConfigError(f"{where}: missing field {name!r}{hint}")

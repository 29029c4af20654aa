"""Default values of requests: from flags, from the checkpoint, from the request's format."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dsv3.config_fields import FieldRule, shown
from dsv3.errors import CheckpointError, ConfigError, RequestError
from dsv3.read_files import read_mapping
from dsv3.request import SamplingParams
from dsv3.setting_names import flag

NO_TOKEN_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling values of one source; None means that the source does not set the value."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None

    @classmethod
    def of_checkpoint(cls, folder: Path) -> "Sampling":
        """Return the values of a directory's `generation_config.json`, if it has one."""
        path = folder / "generation_config.json"
        config = read_mapping(path, CheckpointError) if os.path.lexists(path) else {}
        return cls.from_generation_config(config, str(path))

    @classmethod
    def from_generation_config(
        cls, config: Mapping[str, Any], file: str = "generation_config.json"
    ) -> "Sampling":
        """Return the values of a `generation_config.json`; `do_sample: false` means greedy."""
        for field, rule in _GENERATION_RULES.items():
            value = config.get(field)
            if value is not None and not rule.holds(value):
                raise CheckpointError(f"{file}: {field}={shown(value)} is not {rule.words}")
        is_greedy = config.get("do_sample") is False
        return cls(
            max_tokens=config.get("max_new_tokens"),
            temperature=0.0 if is_greedy else config.get("temperature"),
            top_p=config.get("top_p"),
            top_k=config.get("top_k"),
            min_p=config.get("min_p"),
            repetition_penalty=config.get("repetition_penalty"),
        )


_SAMPLING_FIELDS = tuple(field.name for field in fields(Sampling))
_COUNT = FieldRule((int,), 0, NO_TOKEN_LIMIT, "an integer, at least 0")
_GENERATION_RULES = {
    "temperature": FieldRule((int, float), 0, 100, "a number from 0 to 100"),
    "top_p": FieldRule((int, float), 1e-30, 1, "a number above 0, at most 1"),
    "top_k": _COUNT,
    "min_p": FieldRule((int, float), 0, 1, "a number from 0 to 1"),
    "repetition_penalty": FieldRule((int, float), 0.001, 1000, "a number from 0.001 to 1000"),
    "max_new_tokens": _COUNT,
    "do_sample": FieldRule((bool,), 0, 1, "true or false"),
}
CHAT_DEFAULTS = Sampling(
    max_tokens=NO_TOKEN_LIMIT,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    repetition_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
)
COMPLETION_DEFAULTS = replace(CHAT_DEFAULTS, max_tokens=16)
LINE_DEFAULTS = replace(CHAT_DEFAULTS, max_tokens=200, temperature=0.2)  # DeepSeek's generate.py
TURN_DEFAULTS = replace(LINE_DEFAULTS, max_tokens=NO_TOKEN_LIMIT)  # Ctrl-C stops an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Default values of requests that do not set their own.

    Attributes:
        flags: values of the command line; they override `model`.
        model: values of generation_config.json; they override the format's own defaults.
        seed: hashed with the name of a request to its seed, if the request has none.
        thinking: let the model think in chats.
        system: system message of chats without one.
    """

    flags: Sampling = Sampling()
    model: Sampling = Sampling()
    seed: int = 0
    thinking: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range, which would fail every row."""
        _check(self.flags, _flag_error)
        _check(self.model, "generation_config.json: {}".format)

    def sampling(self, requested: Sampling, fallback: Sampling) -> dict[str, Any]:
        """Return each value from the first source that sets it; `fallback` must set all."""
        merged: dict[str, Any] = {}
        for source in (fallback, self.model, self.flags, requested):
            for name in _SAMPLING_FIELDS:
                value = getattr(source, name)
                if value is not None:
                    merged[name] = value
        return merged

    def with_system(self, messages: list[Any]) -> list[Any]:
        """Return the messages, with the default system message first if they have none."""
        has_system = any(
            isinstance(message, dict) and message.get("role") in ("system", "developer")
            for message in messages
        )
        if self.system is None or has_system:
            return messages
        return [{"role": "system", "content": self.system}, *messages]


def _check(values: Sampling, message: Callable[[RequestError], str]) -> None:
    """Raise ConfigError with a message made from the error if a value is out of range."""
    try:
        SamplingParams(**asdict(values))
    except RequestError as error:
        raise ConfigError(message(error)) from None


def _flag_error(error: RequestError) -> str:
    """Return the error about a parameter, `NAME=VALUE must be ...`, with the name of its flag."""
    name, _, value_and_rule = str(error).partition("=")
    return f"{flag('max_new_tokens' if name == 'max_tokens' else name)}={value_and_rule}"

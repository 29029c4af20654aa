"""What a request gets where it is silent: from flags, from the checkpoint, from its format."""

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

ALL_THERE_IS_ROOM_FOR = 2**31 - 1  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling values of one source; None where the source says nothing."""

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
        """Take what a directory's `generation_config.json` says, if it has one."""
        path = folder / "generation_config.json"
        config = read_mapping(path, CheckpointError) if os.path.lexists(path) else {}
        return cls.from_generation_config(config, str(path))

    @classmethod
    def from_generation_config(
        cls, config: Mapping[str, Any], where: str = "generation_config.json"
    ) -> "Sampling":
        """Take what `generation_config.json` says; `do_sample: false` means greedy."""
        for field, rule in _GENERATION_RULES.items():
            value = config.get(field)
            if value is not None and not rule.holds(value):
                raise CheckpointError(f"{where}: {field}={shown(value)} is not {rule.words}")
        same = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        values = {field: config.get(field) for field in same}
        values["max_tokens"] = config.get("max_new_tokens")
        if config.get("do_sample") is False:
            values["temperature"] = 0.0
        return cls(**values)


_COUNT = FieldRule((int,), 0, ALL_THERE_IS_ROOM_FOR, "an integer, at least 0")
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
    max_tokens=ALL_THERE_IS_ROOM_FOR,
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
TURN_DEFAULTS = replace(LINE_DEFAULTS, max_tokens=ALL_THERE_IS_ROOM_FOR)  # Ctrl-C stops an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What holds where a body is silent.

    Attributes:
        flags: given on the command line; they go before `model`.
        model: from generation_config.json; it goes before the format's own defaults.
        seed: makes, with the name of a request, the seed of one that gives none.
        thinking: whether chats think.
        system: system message of chats that have none.
    """

    flags: Sampling = Sampling()
    model: Sampling = Sampling()
    seed: int = 0
    thinking: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range here, where every row would fail for them."""
        _check(self.flags, _flag_error)
        _check(self.model, "generation_config.json: {}".format)

    def sampling(self, asked: Sampling, otherwise: Sampling) -> dict[str, Any]:
        """Take each value from the first source that has it; `otherwise` has them all."""
        sources = (asked, self.flags, self.model, otherwise)
        return {
            field.name: next(
                value for source in sources if (value := getattr(source, field.name)) is not None
            )
            for field in fields(Sampling)
        }

    def with_system(self, messages: list[Any]) -> list[Any]:
        """Put the default system message in front of a chat that has none."""
        has_one = any(
            isinstance(message, dict) and message.get("role") in ("system", "developer")
            for message in messages
        )
        if self.system is None or has_one:
            return messages
        return [{"role": "system", "content": self.system}, *messages]


def _check(values: Sampling, told: Callable[[RequestError], str]) -> None:
    """Raise ConfigError, with an error as it is told, if a value is out of range."""
    try:
        SamplingParams(**asdict(values))
    except RequestError as error:
        raise ConfigError(told(error)) from None


def _flag_error(error: RequestError) -> str:
    """Return the error about a parameter, `NAME=VALUE must be ...`, with the name of its flag."""
    name, _, rest = str(error).partition("=")
    return f"{flag('max_new_tokens' if name == 'max_tokens' else name)}={rest}"

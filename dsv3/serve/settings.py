"""Sampling values of a chat, which the user may change between messages."""

import json
import re
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from dsv3.errors import RequestError
from dsv3.text.defaults import ALL_THERE_IS_ROOM_FOR, TURN_DEFAULTS, Defaults, Sampling
from dsv3.text.openai_format import CHAT, parse_request, plain_request
from dsv3.text.text_request import TextRequest

_SAMPLING = tuple(field.name for field in fields(Sampling))
NAMES = (*_SAMPLING, "seed", "stop", "thinking")
_SWITCH = {"on": True, "off": False}


@dataclass(frozen=True, slots=True)
class Settings:
    """Values of the next messages.

    Attributes:
        defaults: sampling, seed, thinking and the system message.
        stop: texts that end an answer.
    """

    defaults: Defaults
    stop: tuple[str, ...] = ()

    def request(self, messages: list[dict[str, Any]], name: str) -> TextRequest:
        """Return the request of a conversation; `name` makes its seed."""
        asked = plain_request(messages, name, self.defaults, TURN_DEFAULTS)
        return replace(asked, params=replace(asked.params, stop=self.stop))

    def with_value(self, name: str, text: str, first: "Settings") -> "Settings":
        """Return settings with another value, by the rules of the rows of a batch.

        Args:
            name: one of `NAMES`.
            text: the value as in JSON, or a text without quotes; "-" returns to that of `first`.
            first: the settings at the start of the chat.
        """
        if text == "-":
            value = first.value(name)
        else:
            value = _checked(name, _from_json(name, text))
        if name == "stop":
            return replace(self, stop=value)
        if name in ("seed", "thinking"):
            return replace(self, defaults=replace(self.defaults, **{name: value}))
        flags = replace(self.defaults.flags, **{name: value})
        return replace(self, defaults=replace(self.defaults, flags=flags))

    def value(self, name: str) -> Any:
        """Return a value: as it is used, or None for one of `Sampling` that is not given."""
        if name == "stop":
            return self.stop
        if name in ("seed", "thinking"):
            return getattr(self.defaults, name)
        return getattr(self.defaults.flags, name)

    def shown(self, name: str) -> str:
        """Return a value as the user may type it."""
        if name in _SAMPLING:
            value = self.defaults.sampling(Sampling(), TURN_DEFAULTS)[name]
        else:
            value = self.value(name)
        if name == "max_tokens" and value == ALL_THERE_IS_ROOM_FOR:
            return "all there is room for"
        if name == "stop" and not value:
            return "none"
        return json.dumps(value, ensure_ascii=False)


def known_name(text: str) -> str:
    """Return the name of a value, also if it is written like its flag.

    Raises:
        RequestError: there is no such value.
    """
    name = text.lower().lstrip("-").replace("-", "_")
    if name in NAMES:
        return name
    close = [n for n in NAMES if name and n.startswith(name)] or get_close_matches(name, NAMES)
    hint = f"did you mean {close[0]}?" if close else "/set shows all values"
    raise RequestError(f"{text} is no value of a chat; {hint}")


def split_setting(text: str) -> tuple[str, str]:
    """Return name and value of `NAME VALUE` or `NAME=VALUE`; the value may be missing."""
    match = re.match(r"([^\s=]*)\s*=?\s*(.*)", text.strip(), re.DOTALL)
    assert match is not None
    return match[1], match[2]


def _from_json(name: str, text: str) -> Any:
    if name == "thinking" and text.lower() in _SWITCH:
        return _SWITCH[text.lower()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _checked(name: str, value: Any) -> Any:
    """Return a value as a row's request has it."""
    if value is None:
        raise RequestError(f"{name} needs a value; - is the one at the start of the chat")
    body: dict[str, Any] = {"messages": [{"role": "user", "content": ""}]}
    if name == "thinking":
        body["chat_template_kwargs"] = {"thinking": value}
        return parse_request(CHAT, body, "", Defaults()).thinking
    params = parse_request(CHAT, body | {name: value}, "", Defaults()).params
    return getattr(params, name)

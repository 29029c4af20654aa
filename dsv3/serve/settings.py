"""Sampling values of a chat, which the user can change between messages."""

import json
import re
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from dsv3.errors import RequestError
from dsv3.text.defaults import NO_TOKEN_LIMIT, TURN_DEFAULTS, Defaults, Sampling
from dsv3.text.openai_format import CHAT, parse_request, plain_request
from dsv3.text.text_request import TextRequest

_SAMPLING = tuple(field.name for field in fields(Sampling))
NAMES = (*_SAMPLING, "seed", "stop", "thinking")
_SWITCH = {"on": True, "off": False}


@dataclass(frozen=True, slots=True)
class Settings:
    """Values for the next messages.

    Attributes:
        defaults: sampling, seed, thinking and the system message.
        stop: strings that end an answer.
    """

    defaults: Defaults
    stop: tuple[str, ...] = ()

    def request(self, messages: list[dict[str, Any]], name: str) -> TextRequest:
        """Return the request of a conversation; `name` determines its seed."""
        request = plain_request(messages, name, self.defaults, TURN_DEFAULTS)
        return replace(request, params=replace(request.params, stop=self.stop))

    def with_value(self, name: str, text: str, initial: "Settings") -> "Settings":
        """Return settings with one value changed; the rules are those of batch rows.

        Args:
            name: one of `NAMES`.
            text: the value as JSON, or a text without quotes; "-" restores that of `initial`.
            initial: the settings at the start of the chat.
        """
        if text == "-":
            value = initial.value(name)
        else:
            value = _checked(name, _from_json(name, text))
        if name == "stop":
            return replace(self, stop=value)
        if name in ("seed", "thinking"):
            return replace(self, defaults=replace(self.defaults, **{name: value}))
        flags = replace(self.defaults.flags, **{name: value})
        return replace(self, defaults=replace(self.defaults, flags=flags))

    def value(self, name: str) -> Any:
        """Return a value; None for a field of `Sampling` that is not set."""
        if name == "stop":
            return self.stop
        if name in ("seed", "thinking"):
            return getattr(self.defaults, name)
        return getattr(self.defaults.flags, name)

    def shown(self, name: str) -> str:
        """Return a value in the syntax of /set."""
        if name in _SAMPLING:
            value = self.defaults.sampling(Sampling(), TURN_DEFAULTS)[name]
        else:
            value = self.value(name)
        if name == "max_tokens" and value == NO_TOKEN_LIMIT:
            return "all there is room for"
        if name == "stop" and not value:
            return "none"
        return json.dumps(value, ensure_ascii=False)


def known_name(text: str) -> str:
    """Return the name of a value; `text` may also be its flag.

    Raises:
        RequestError: there is no value of this name.
    """
    name = text.lower().lstrip("-").replace("-", "_")
    if name in NAMES:
        return name
    close = [n for n in NAMES if name and n.startswith(name)] or get_close_matches(name, NAMES)
    hint = f"did you mean {close[0]}?" if close else "/set shows all values"
    raise RequestError(f"{text} is not a setting of a chat; {hint}")


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
    """Return a value after the checks and conversions of a batch row."""
    if value is None:
        raise RequestError(f"{name} needs a value; - is the one at the start of the chat")
    body: dict[str, Any] = {"messages": [{"role": "user", "content": ""}]}
    if name == "thinking":
        body["chat_template_kwargs"] = {"thinking": value}
        return parse_request(CHAT, body, "", Defaults()).thinking
    params = parse_request(CHAT, body | {name: value}, "", Defaults()).params
    return getattr(params, name)

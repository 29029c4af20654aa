"""The messages of a conversation in the OpenAI format, checked field by field."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dsv3.config_fields import shown
from dsv3.errors import RequestError

Message = Mapping[str, Any]  # {"role": ..., "content": ...} as in the OpenAI format
Tools = Sequence[Mapping[str, Any]]  # JSON schemas, as in the OpenAI format

ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = {"role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id"}
_TEXTS = ("name", "reasoning_content", "tool_call_id")
# Servers add these to the messages of their answers.
_IGNORED = {"index"}


class PromptEnd(Enum):
    """The end of a prompt.

    ANSWER: the start of the model's answer. MESSAGE: the end of the last message, as it is written
    in a history. CONTINUED: the last message, an answer of the model without its end, so that the
    model continues it.
    """

    ANSWER = "answer"
    MESSAGE = "message"
    CONTINUED = "continued"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatInput:
    """The input of a chat format.

    Attributes:
        messages: checked messages of the conversation.
        thinking: let the model think before it answers.
        tools: tools that the model may call.
        schema: JSON schema that the answer has to follow; None for free text.
        add_generation_prompt: end the prompt with the start of the model's answer.
    """

    messages: Sequence[Message]
    thinking: bool = False
    tools: Tools = ()
    schema: Any = None
    add_generation_prompt: bool = True


def check_message(where: str, message: Any) -> dict[str, Any]:
    """Return the non-empty fields of a message, its content as text.

    Empty fields are ignored, since clients send answers of servers back, with `tool_calls: []`,
    `annotations: []`, `refusal: null` and others.

    Args:
        where: the place of the message, for errors.
        message: the message in the request.

    Raises:
        RequestError: `message` is not a message, or has an unsupported field.
    """
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role={shown(role)} is unknown; use one of {', '.join(ROLES)}")
    given = {field: value for field, value in message.items() if value}
    content = given.pop("content", message.get("content"))
    _take_reasoning(where, given)
    for field, value in given.items():
        if field not in _FIELDS | _IGNORED:
            raise RequestError(f"{where}.{field} is not supported")
        if field in _TEXTS and not isinstance(value, str):
            raise RequestError(f"{where}.{field} must be a text")
    plain = {field: value for field, value in given.items() if field in _FIELDS}
    if content is not None:
        plain["content"] = _text(f"{where}.content", content)
    elif "tool_calls" in plain:
        plain["content"] = None
    elif role == "assistant" and "content" in message:
        plain["content"] = ""  # an answer that was cut within its thought
    else:
        raise RequestError(f"{where}.content is missing")
    return plain


def parse_tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Return the tool calls of a message with their arguments as JSON objects.

    Clients send arguments as JSON texts, in which escapes may spell any characters.

    Raises:
        RequestError: a call has no name, or its arguments are not a JSON object.
    """
    if not isinstance(calls, list | tuple):
        raise RequestError(f"{where} must be a list of tool calls")
    return [_parse_tool_call(f"{where}[{i}].function", call) for i, call in enumerate(calls)]


def _parse_tool_call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where} must be an object with name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")  # clients that join a stream may have ""
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise RequestError(f"{where}.arguments must be a JSON object")
    return {**call, "function": {**function, "arguments": dict(arguments)}}


def order_results(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages in which the results of tool calls come in the order of the calls.

    Clients send them in any order, with the ids of the calls. Most formats write no ids, so that a
    model takes the first result for that of the first call.
    """
    ordered = list(messages)
    for i, message in enumerate(messages):
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            stop = i + 1
            while stop < len(messages) and messages[stop]["role"] == "tool":
                stop += 1
            ordered[i + 1 : stop] = _in_order(messages[i + 1 : stop], calls)
    return ordered


def _in_order(results: Sequence[dict[str, Any]], calls: list[Any]) -> Sequence[dict[str, Any]]:
    """Return the results of calls in their order; as they are if any has no call's id."""
    places: dict[str, int] = {}
    for place, call in enumerate(calls):
        call_id = call.get("id") if isinstance(call, Mapping) else None
        if isinstance(call_id, str):
            places.setdefault(call_id, place)
    if any(result.get("tool_call_id") not in places for result in results):
        return results
    return sorted(results, key=lambda result: places[result["tool_call_id"]])


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with `change` applied to all strings, including keys of objects.

    Raises:
        RequestError: the value is nested too deeply.
    """
    try:
        return _map_strings(value, change)
    except RecursionError:
        raise RequestError("messages must be made of JSON values: nested too deeply") from None


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(k, change): _map_strings(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def _take_reasoning(where: str, given: dict[str, Any]) -> None:
    """Rename `reasoning` to `reasoning_content`, the older name that templates use."""
    reasoning = given.pop("reasoning", None)
    if reasoning is None:
        return
    if given.setdefault("reasoning_content", reasoning) != reasoning:
        raise RequestError(f"{where}: reasoning and reasoning_content differ: give one of them")


def _text(where: str, content: Any) -> str:
    """Return the text of a message: a string, or the lines of a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a text or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise RequestError(f'{where}[{i}] must be an object like {{"type": "text", ...}}')
        if part["type"] != "text":
            raise RequestError(f"{where}[{i}].type={part['type']!r} is not supported, only 'text'")
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}[{i}].text must be a text")
        texts.append(part["text"])
    return "\n".join(texts)

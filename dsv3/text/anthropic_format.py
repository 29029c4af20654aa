"""Requests in the Anthropic format, as the bodies of chats in the OpenAI format.

Blocks of text, of thoughts, of calls of tools and of their results are supported; others, and
unknown fields, are refused by name. Marks for prompt caching have no effect, since all prompts are
cached.
"""

import json
from collections.abc import Mapping
from typing import Any

from dsv3.errors import RequestError, shorten
from dsv3.text.openai_fields import Fields, show

MESSAGES = "/v1/messages"
COUNT_TOKENS = "/v1/messages/count_tokens"

# Fields that do not affect the answer. Chat formats decide themselves which old thoughts they keep.
_BLOCK_FIELDS = {
    "text": {"text", "citations"},
    "thinking": {"thinking", "signature"},
    "tool_use": {"id", "name", "input"},
    "tool_result": {"tool_use_id", "content", "is_error"},
}
_IGNORED = ("cache_control", "context_management", "metadata", "service_tier")
_SAME = ("model", "max_tokens", "temperature", "top_p", "top_k")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_THINKING = {"enabled": "enabled", "adaptive": "enabled", "disabled": "disabled"}


def openai_body(body: Mapping[str, Any], needs_limit: bool) -> dict[str, Any]:
    """Return the body of a chat in the OpenAI format.

    Args:
        body: a request without `stream`.
        needs_limit: `max_tokens` must be given, as Anthropic's format demands.

    Raises:
        RequestError: the request is malformed, or asks for something that is not supported.
    """
    fields = Fields(body)
    chat: dict[str, Any] = {name: fields.take(name, lambda v: True, "") for name in _SAME}
    if needs_limit and chat["max_tokens"] is None:
        raise RequestError("max_tokens is missing")
    given = fields.take("messages", lambda v: isinstance(v, list), "a list of messages")
    if given is None:
        raise RequestError("messages is missing")
    chat["messages"] = _system(fields)
    for i, message in enumerate(given):
        chat["messages"] += _messages(f"messages[{i}]", message)
    if chat["messages"][-1:] and _is_begun(chat["messages"][-1]):
        chat["continue_final_message"] = True
    chat["stop"] = fields.take("stop_sequences", lambda v: isinstance(v, list), "a list") or None
    config = Fields(fields.take("output_config", lambda v: isinstance(v, dict), "an object") or {})
    chat["response_format"] = _response_format(config)
    chat |= _tools(fields) | _thinking(fields, config.text("effort"))
    config.refuse_rest("output_config")
    for name in _IGNORED:
        fields.take(name, lambda v: True, "")
    for name in fields.remaining():
        raise RequestError(f"{shorten(name)} is not a supported field")
    return {name: value for name, value in chat.items() if value is not None}


def _is_begun(message: dict[str, Any]) -> bool:
    """Return True if the last message is the text of an answer, which the model continues."""
    return message["role"] == "assistant" and "tool_calls" not in message


def _system(fields: Fields) -> list[dict[str, Any]]:
    system = fields.take("system", lambda v: isinstance(v, str | list), "a text or text blocks")
    if not system:
        return []
    return [{"role": "system", "content": _texts("system", system)}]


def _messages(where: str, message: Any) -> list[dict[str, Any]]:
    """Return the messages of OpenAI's format that a message becomes."""
    if not isinstance(message, dict) or message.keys() != {"role", "content"}:
        raise RequestError(f"{where} must be an object with role and content")
    role = message["role"]
    content = message["content"]
    if role not in ("user", "assistant", "system"):
        raise RequestError(f"{where}.role={show(role)} must be user, assistant or system")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise RequestError(f"{where}.content must be a text or a list of blocks")
    if role == "system":
        return [{"role": role, "content": _texts(f"{where}.content", content)}]
    blocks = [_block(f"{where}.content[{i}]", block) for i, block in enumerate(content)]
    return _answer(where, blocks) if role == "assistant" else _question(where, blocks)


def _block(where: str, block: Any) -> dict[str, Any]:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise RequestError(f'{where} must be an object like {{"type": "text", ...}}')
    known = _BLOCK_FIELDS.get(block["type"], block.keys())  # other types are refused by the callers
    for name in block.keys() - known - {"type", "cache_control"}:
        if block[name] is not None:
            raise RequestError(f"{where}.{shorten(name)} is not supported")
    return block


def _question(where: str, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a user's message; results of tools are messages of their own."""
    messages: list[dict[str, Any]] = []
    texts: list[str] = []
    for i, block in enumerate(blocks):
        here = f"{where}.content[{i}]"
        if block["type"] == "text":
            texts.append(_field(here, block, "text", str))
        elif block["type"] == "tool_result":
            text = _texts(f"{here}.content", block.get("content") or "")
            if block.get("is_error"):  # chat formats have no field for it
                text = f"Error: {text}"
            result = {"role": "tool", "content": text}
            result["tool_call_id"] = _field(here, block, "tool_use_id", str)
            messages.append(result)
        else:
            raise _unsupported(here, block)
    if texts or not messages:
        messages.append({"role": "user", "content": "\n".join(texts)})
    return messages


def _answer(where: str, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return an answer of the model."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        here = f"{where}.content[{i}]"
        match block["type"]:
            case "text":
                texts.append(_field(here, block, "text", str))
            case "thinking":
                thoughts.append(_field(here, block, "thinking", str))
            case "redacted_thinking":
                pass  # only Anthropic's models can read it
            case "tool_use":
                arguments = json.dumps(_field(here, block, "input", dict), ensure_ascii=False)
                function = {"name": _field(here, block, "name", str), "arguments": arguments}
                call_id = _field(here, block, "id", str)
                calls.append({"id": call_id, "type": "function", "function": function})
            case _:
                raise _unsupported(here, block)
    answer: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        answer["reasoning_content"] = "\n".join(thoughts)
    if calls:
        answer |= {"content": answer["content"] or None, "tool_calls": calls}
    return [answer]


def _texts(where: str, content: Any) -> str:
    """Return the text of a string or of text blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a text or a list of text blocks")
    texts = []
    for i, block in enumerate(content):
        here = f"{where}[{i}]"
        if _block(here, block)["type"] != "text":
            raise _unsupported(here, block)
        texts.append(_field(here, block, "text", str))
    return "\n".join(texts)


def _field(where: str, block: dict[str, Any], name: str, kind: type) -> Any:
    if not isinstance(block.get(name), kind):
        words: dict[type, str] = {str: "a text", dict: "an object"}
        raise RequestError(f"{where}.{name} must be {words[kind]}")
    return block[name]


def _unsupported(where: str, block: dict[str, Any]) -> RequestError:
    return RequestError(f"{where}.type={show(block['type'])} is not supported here")


def _tools(fields: Fields) -> dict[str, Any]:
    """Return OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`."""
    given = fields.take("tools", lambda v: isinstance(v, list), "a list of tools") or []
    chat: dict[str, Any] = {"tools": [_tool(f"tools[{i}]", t) for i, t in enumerate(given)] or None}
    choice = fields.take("tool_choice", lambda v: isinstance(v, dict), "an object")
    if choice is None:
        return chat
    options = Fields(choice)
    kind = options.text("type")
    name = options.text("name")
    if options.truth("disable_parallel_tool_use"):
        chat["parallel_tool_calls"] = False
    options.refuse_rest("tool_choice")
    if kind == "tool" and name is not None:
        chat["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif kind in _CHOICES:
        chat["tool_choice"] = _CHOICES[kind]
    else:
        raise RequestError(f"tool_choice.type={show(kind)} must be auto, any, none, or tool")
    return chat


def _tool(where: str, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") not in (None, "custom"):
        raise RequestError(f"{where}: only tools with name and input_schema are supported")
    options = Fields(tool)
    function = {
        "name": options.text("name"),
        "description": options.text("description"),
        "parameters": options.take("input_schema", lambda v: isinstance(v, dict), "an object"),
        "strict": options.truth("strict"),
    }
    for name in ("type", "cache_control"):
        options.take(name, lambda v: True, "")
    options.refuse_rest(where)
    return {"type": "function", "function": function}


def _response_format(config: Fields) -> dict[str, Any] | None:
    """Return OpenAI's `response_format`."""
    given = config.take("format", lambda v: isinstance(v, dict), "an object")
    if given is None:
        return None
    options = Fields(given)
    options.take("type", lambda v: v == "json_schema", "json_schema")
    schema = options.take("schema", lambda v: isinstance(v, dict), "a JSON schema")
    options.refuse_rest("output_config.format")
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def _thinking(fields: Fields, effort: str | None) -> dict[str, Any]:
    """Return DeepSeek's switch for thinking; a budget of tokens has no effect."""
    thinking = fields.take("thinking", lambda v: isinstance(v, dict), "an object")
    chat: dict[str, Any] = {"reasoning_effort": effort}
    if thinking is not None:
        options = Fields(thinking)
        kind = options.text("type")
        options.integer("budget_tokens", 1, 2**31 - 1)
        options.text("display")
        options.refuse_rest("thinking")
        if kind not in _THINKING:
            raise RequestError(f"thinking.type={show(kind)} must be one of {', '.join(_THINKING)}")
        chat["thinking"] = {"type": _THINKING[kind]}
        if kind == "disabled":
            chat.pop("reasoning_effort", None)
    return chat

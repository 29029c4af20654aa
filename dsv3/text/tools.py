"""Tools that a model may call: their description in a request, and in a prompt."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dsv3.errors import RequestError, shorten
from dsv3.text import call_marks
from dsv3.text.call_marks import DEEPSEEK, END_FENCE, FENCE
from dsv3.text.json_schema import types_of, with_root
from dsv3.text.openai_fields import show
from dsv3.text.tokenizer import Tokenizer

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_CHOICES = ("auto", "none", "required")


class CallForm(Enum):
    """The form in which a model writes calls of tools; the value lists its marks.

    FORCED is the form of answers that must be calls, which constrained decoding gives to any model:
    a JSON list of objects with name and arguments.
    """

    DEEPSEEK = call_marks.DEEPSEEK
    DSML = (call_marks.DSML,)
    KIMI = call_marks.KIMI
    GLM = call_marks.GLM
    FORCED = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer | None) -> "CallForm | None":
        """Return the form of a model, which its vocabulary shows; None if it has none."""
        if tokenizer is None:
            return None
        # V3.2's vocabulary has DeepSeek's marks too.
        for form in (cls.DSML, cls.DEEPSEEK, cls.KIMI, cls.GLM):
            if all(tokenizer.id_of(mark) is not None for mark in form.marks):
                return form
        return None

    @property
    def marks(self) -> tuple[str, ...]:
        """Names of the tokens that this form is made of; the first one begins it."""
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of a request.

    Attributes:
        tools: as in the OpenAI format.
        is_required: the answer must be calls.
        only: name of the only tool to call; None is any.
        is_parallel: an answer may have several calls.
    """

    tools: tuple[Mapping[str, Any], ...]
    is_required: bool = False
    only: str | None = None
    is_parallel: bool = True

    @property
    def names(self) -> set[str]:
        """Names of all tools."""
        return {_name(tool) for tool in self.tools}

    @property
    def has_strict(self) -> bool:
        """True if the arguments of a tool must follow its schema."""
        return any(tool["function"].get("strict") for tool in self.tools)

    def types(self, name: str, parameter: str) -> set[str]:
        """Return the JSON types that a parameter of a tool may have."""
        schemas = (arguments_schema(tool["function"]) for tool in self.tools if _name(tool) == name)
        root = next(schemas, {})
        properties = root.get("properties")
        return types_of(properties.get(parameter) if isinstance(properties, dict) else None, root)

    def forced_schema(self) -> dict[str, Any]:
        """Return the JSON schema of an answer in the form FORCED."""
        calls = []
        definitions = {}
        for tool in self.tools:
            name = _name(tool)
            if self.only not in (None, name):
                continue
            pointer = f"#/$defs/{name}"
            definitions[name] = with_root(arguments_schema(tool["function"]), pointer)
            call = {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": {"$ref": pointer}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            calls.append(call)
        schema: dict[str, Any] = {
            "type": "array",
            "items": {"anyOf": calls},
            "minItems": 1,
            "$defs": definitions,
        }
        return schema if self.is_parallel and self.only is None else schema | {"maxItems": 1}


def arguments_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of the arguments of a tool."""
    return {"type": "object"} | (function.get("parameters") or {})


def parse_tool_use(tools: Any, choice: Any, parallel: bool | None) -> ToolUse | None:
    """Return the tools of a request; None if it has none, or may call none.

    Raises:
        RequestError: the tools or the choice are malformed.
    """
    checked = tuple(_check_tool(f"tools[{i}]", tool) for i, tool in enumerate(tools or ()))
    names = [_name(tool) for tool in checked]
    if len(set(names)) < len(names):
        raise RequestError("tools: two of them have the same name")
    only = _chosen(choice)
    if only is None and choice not in (None, *_CHOICES):
        raise RequestError(
            f"tool_choice={show(choice)} must be one of {', '.join(_CHOICES)}, or "
            '{"type": "function", "function": {"name": ...}}'
        )
    if only is not None and only not in names:
        raise RequestError(f"tool_choice: {show(only)} is not the name of one of the tools")
    if choice == "required" and not checked:
        raise RequestError("tool_choice=required needs tools")
    if not checked or choice == "none":
        return None
    is_required = only is not None or choice == "required"
    return ToolUse(
        tools=checked, is_required=is_required, only=only, is_parallel=parallel is not False
    )


def describe_tools(tools: Sequence[Mapping[str, Any]], is_fenced: bool) -> str:
    """Return the text about tools for V3, R1 and V3.1, whose templates do not contain it.

    Args:
        tools: in the OpenAI format, with names of control tokens hidden: in the text, only marks of
            calls are control tokens.
        is_fenced: calls are written as V3 and R1 do.

    Source: model card of DeepSeek-V3.1.
    """
    text = "## Tools\nYou have access to the following tools:\n"
    for tool in tools:
        function = tool["function"]
        parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
        description = function.get("description") or ""
        text += (
            f"\n### {function['name']}\nDescription: {description}\n\nParameters: {parameters}\n"
        )
    calls, end_calls, call, end_call, sep = DEEPSEEK
    head = f"function{sep}tool_call_name\n{FENCE}\n" if is_fenced else f"tool_call_name{sep}"
    tail = f"\n{END_FENCE}" if is_fenced else ""
    example = f"{call}{head}tool_call_arguments{tail}{end_call}"
    between = "with newlines" if is_fenced else "directly without separators or spaces"
    return (
        f"{text}\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        f"{calls}{example}{{additional_tool_calls}}{end_calls}\n\nWhere:\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters "
        f"Schema\n- For multiple tool calls, chain them {between}"
    )


def _name(tool: Mapping[str, Any]) -> str:
    name: str = tool["function"]["name"]
    return name


def _check_tool(where: str, tool: Any) -> Mapping[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise RequestError(f'{where} must be like {{"type": "function", "function": {{...}}}}')
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        rule = "letters, digits, _, . and -, at most 128"
        raise RequestError(f"{where}.function.name={show(name)} must be made of {rule}")
    types = {"description": str, "parameters": dict, "strict": bool}
    for field, value in function.items():
        if field == "name" or value is None:
            continue
        if field not in types:
            raise RequestError(f"{where}.function.{shorten(field)} is not supported")
        if not isinstance(value, types[field]):
            raise RequestError(f"{where}.function.{field}={show(value)} has a wrong type")
    if (function.get("parameters") or {}).get("type", "object") != "object":
        raise RequestError(f'{where}.function.parameters.type must be "object"')
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def _chosen(choice: Any) -> str | None:
    """Return the name of the tool that must be called; None if the choice names none."""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and choice.get("type") == "function" else None

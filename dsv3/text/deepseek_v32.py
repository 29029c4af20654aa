"""DeepSeek-V3.2's chat format, whose checkpoints have a Python encoder instead of a template.

    BOS {system} USER {question} ASSISTANT <think>{thought}</think>{answer} EOS ...

A question is followed by the start of its answer: `<think>` if the model is to think about the last
question, otherwise `</think>`. Thoughts about earlier questions are dropped, and so are earlier
`developer` messages if the model thinks. Thoughts between the tool calls of the last question are
kept. Tools and the schema of the answer are in the first message.

Source: encoding/encoding_dsv32.py in the checkpoints of DeepSeek-V3.2.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dsv3.errors import RequestError
from dsv3.text.call_marks import DSML_TAGS
from dsv3.text.messages import ChatInput, Tools
from dsv3.text.thoughts import END_THINK, THINK

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
_CALLS, _END_CALLS, _INVOKE, _END_INVOKE, _PARAMETER, _END_PARAMETER = DSML_TAGS
# The instructions about tools that the model was trained with, verbatim.
_ABOUT_TOOLS = f"""## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "{_CALLS}" block like the following as part of your reply to \
the user:
{_CALLS}
{_INVOKE} name="$FUNCTION_NAME">
{_PARAMETER} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{_END_PARAMETER}
...
{_END_INVOKE}
{_INVOKE} name="$FUNCTION_NAME2">
...
{_END_INVOKE}
{_END_CALLS}

String and scalar parameters should be specified as is without any escaping or quotes, while lists \
and objects should use JSON format. The "string" attribute should be set to "true" for string type \
parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider \
outputting a thinking block. Here is an example:

{_CALLS}
...
{_END_CALLS}

<function_results>
...
</function_results>

{THINK}...thinking about results{END_THINK}

Here are the functions available in JSONSchema format:
<functions>
"""
_END_OF_TOOLS = "\n</functions>\n"
_ABOUT_SCHEMA = (
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
)


class _Numbered(NamedTuple):
    """A message with its number in the conversation, for errors."""

    number: int
    message: Mapping[str, Any]


def render_v32(chat: ChatInput) -> str:
    """Return the prompt of a conversation.

    Raises:
        RequestError: a tool is malformed, or tool results do not follow their calls.
    """
    messages = _kept(chat)
    last = _last_question(messages)
    text = BOS
    results = _Results()
    for place, (number, message) in enumerate(messages):
        mark = THINK if chat.thinking and place >= last else END_THINK
        match message["role"]:
            case "tool":
                text += results.add(number, message["content"], mark)
                continue
            case "system":
                text += message["content"] + (_instructions(chat) if place == 0 else "")
            case "assistant":
                text += _answer(message, with_thought=mark == THINK)
            case "developer":
                given = _instructions(chat) if place == 0 else ""
                question = f"{given}\n\n# The user's message is: {message['content']}"
                text += USER + question + ASSISTANT + mark
            case _:
                text += USER + message["content"] + ASSISTANT + mark
        results.expect(len(message.get("tool_calls") or ()))
    results.expect(0)
    return text


def _kept(chat: ChatInput) -> list[_Numbered]:
    """Return the messages of the prompt.

    Tools and schema are in the first one, so an empty system message is put before a question.
    """
    messages = [_Numbered(*each) for each in enumerate(chat.messages)]
    if chat.thinking:
        last = _last_question(messages)
        messages = [m for m in messages if m.number >= last or m.message["role"] != "developer"]
    has_room = bool(messages) and messages[0].message["role"] in ("system", "developer")
    if (chat.tools or chat.schema is not None) and not has_room:
        messages.insert(0, _Numbered(0, {"role": "system", "content": ""}))
    return messages


def _last_question(messages: list[_Numbered]) -> int:
    """Return the place of the last question; -1 if there is none."""
    roles = [m.message["role"] for m in messages]
    return max((i for i, role in enumerate(roles) if role in ("user", "developer")), default=-1)


def _instructions(chat: ChatInput) -> str:
    """Return the texts about tools and about the schema of the answer."""
    text = ""
    if chat.tools:
        schemas = "\n".join(map(_json, _functions(chat.tools)))
        text += f"\n\n{_ABOUT_TOOLS}{schemas}{_END_OF_TOOLS}"
    if chat.schema is not None:
        text += f"\n\n{_ABOUT_SCHEMA}{_json(chat.schema)}"
    return text


def _functions(tools: Tools) -> Iterator[Mapping[str, Any]]:
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            raise RequestError(f'tools[{i}] must be an object like {{"function": {{...}}}}')
        yield function


def _answer(message: Mapping[str, Any], with_thought: bool) -> str:
    """Return an answer of the model; a thought within its text is taken for its thought."""
    thought, mark, rest = (message["content"] or "").partition(END_THINK)
    content = rest if mark else thought
    thought = message.get("reasoning_content") or (thought.removeprefix(THINK) if mark else "")
    text = (thought + END_THINK if with_thought else "") + content
    if calls := message.get("tool_calls"):
        invoked = "\n".join(map(_invocation, calls))
        text += f"\n\n{_CALLS}\n{invoked}\n{_END_CALLS}"
    return text + EOS


def _invocation(call: Mapping[str, Any]) -> str:
    function = call["function"]
    parameters = "\n".join(
        f'{_PARAMETER} name="{name}" string="{str(isinstance(value, str)).lower()}">'
        f"{value if isinstance(value, str) else _json(value)}{_END_PARAMETER}"
        for name, value in function["arguments"].items()
    )
    return f'{_INVOKE} name="{function["name"]}">\n{parameters}\n{_END_INVOKE}'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class _Results:
    """Writes the results of one answer's tool calls, which come in the order of the calls."""

    def __init__(self) -> None:
        self._expected = 0
        self._added = 0
        self._last = 0

    def expect(self, calls: int) -> None:
        """Expect the results of new calls; those of earlier ones must be complete by now."""
        if 0 < self._added < self._expected:
            raise RequestError(
                f"messages[{self._last}] is result {self._added} of {self._expected} tool calls; "
                "give the results of all of them, one after another"
            )
        self._expected = calls
        self._added = 0

    def add(self, number: int, content: str, mark: str) -> str:
        """Return the text of the next result; after the last one, the answer starts with `mark`."""
        if self._added == self._expected:
            raise RequestError(f"messages[{number}] is the result of no tool call before it")
        self._last = number
        self._added += 1
        text = "\n\n<function_results>" if self._added == 1 else ""
        text += f"\n<result>{content}</result>"
        if self._added == self._expected:
            text += f"\n</function_results>\n\n{mark}"
        return text

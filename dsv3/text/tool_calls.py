"""Calls of tools in the text of an answer, found while it is generated.

A call begins when the name of one of the request's tools is complete; its arguments are passed on
as they arrive. All else is text: calls of unknown tools, torn ones, and marks that the model has
written in other tokens.
"""

import json
import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from dsv3.read_files import parse_json_text
from dsv3.text.call_marks import (
    DEEPSEEK,
    DSML_TAGS,
    END_FENCE,
    FENCE,
    GLM,
    KIMI,
    SectionMarks,
    Tags,
)
from dsv3.text.json_schema import has_type
from dsv3.text.scanner import Scanner, Steps
from dsv3.text.tools import CallForm, ToolUse

_MAX_HEAD = 1024  # characters before the arguments of a call; more of them are text
_KIMI_ID = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?", re.DOTALL)
_INVOKE_HEAD = re.compile(r'\s*name="([^"]*)"\s*')
_PARAMETER_HEAD = re.compile(r'\s*name="([^"]*)"\s+string="(true|false)"\s*')
_FORCED_HEAD = re.compile(r'\s*"name"\s*:\s*"([^"]*)"\s*,\s*')
_END_FENCED = tuple(f"{fence}{DEEPSEEK.end_call}" for fence in (f"\n{END_FENCE}", END_FENCE, ""))


@dataclass(slots=True, kw_only=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        index: place among the calls of the answer.
        call_id: id of the call, unique in a conversation.
        start, stop: its place in the text of the answer.
        arguments: so far, as JSON text.
        is_complete: the arguments are a JSON object, and the call was ended.
    """

    index: int
    call_id: str
    name: str
    start: int
    stop: int = 0
    arguments: str = ""
    is_complete: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """Text of an answer outside of calls."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """The beginning of a call."""

    call: ToolCall


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of a call."""

    call: ToolCall
    text: str


Event = Text | CallBegin | CallArguments


class ToolCallStream:
    """Splits the incremental text of an answer into text and calls.

    Args:
        form: of the calls.
        tools: that may be called.
        mark_id: the token that begins calls; None if the form has none.

    Attributes:
        calls: all calls so far.
    """

    def __init__(self, form: CallForm, tools: ToolUse, mark_id: int | None = None) -> None:
        self.calls: list[ToolCall] = []
        self._tools = tools
        self._names = tools.names
        self._mark_id = mark_id
        self._has_mark = mark_id is None
        self._events: list[Event] = []
        self._scan = Scanner()
        self._start = 0  # of the call that is being parsed
        # Line ends, and the mark that begins calls: text, unless a call follows.
        self._pending = ""
        self._parser = self._parse(form)

    def push(self, text: str, token_ids: Iterable[int] = ()) -> list[Event]:
        """Add text and its tokens; return the events that are complete."""
        self._has_mark = self._has_mark or any(i == self._mark_id for i in token_ids)
        self._scan.push(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """End the answer; return the events that were pending."""
        self._scan.is_closed = True
        return self._advance()

    def _advance(self) -> list[Event]:
        next(self._parser, None)
        events = self._events
        self._events = []
        return events

    def _parse(self, form: CallForm) -> Steps[None]:
        while not (self._has_mark or self._scan.is_closed):
            self._scan.pass_all(self._text)
            yield
        match form:
            case CallForm.DEEPSEEK:
                yield from self._sections(DEEPSEEK, self._deepseek_call)
            case CallForm.KIMI:
                yield from self._sections(KIMI, self._kimi_call)
            case CallForm.DSML:
                yield from self._sections(DSML_TAGS, self._dsml_call)
            case CallForm.GLM:
                while (yield from self._scan.until((GLM.call,), self._text)):
                    yield from self._glm_call()
            case CallForm.FORCED:
                yield from self._forced_calls()
        yield from self._scan.until((), self._text)
        if self._pending and not (self.calls and self._pending.isspace()):
            self._events.append(Text(self._pending))

    def _sections(
        self, marks: SectionMarks | Tags, parse_call: Callable[[], Steps[None]]
    ) -> Steps[None]:
        """Parse sections of calls, and pass on the text around them."""
        while (yield from self._scan.until((marks.calls,), self._text)):
            self._pending += marks.calls
            num_before = len(self.calls)
            while mark := (yield from self._scan.next_of((marks.call, marks.end_calls))):
                if self._pending:
                    self._pending += self._scan.skipped
                if mark == marks.end_calls:
                    self._text(mark if len(self.calls) == num_before else "")
                    break
                self._start = self._scan.position - len(mark)
                yield from parse_call()

    def _deepseek_call(self) -> Steps[None]:
        name = head = yield from self._scan.collect(DEEPSEEK.sep, _MAX_HEAD)
        if head is None:
            self._text(DEEPSEEK.call)
            return
        raw = f"{DEEPSEEK.call}{head}{DEEPSEEK.sep}"
        ends: tuple[str, ...] = (DEEPSEEK.end_call,)
        if head == "function":
            name = yield from self._scan.collect(FENCE, _MAX_HEAD)
            if name is None:
                self._text(raw)
                return
            raw += f"{name}{FENCE}"
            ends = _END_FENCED
        yield from self._json_call((name or "").strip(), "", raw, ends)

    def _kimi_call(self) -> Steps[None]:
        head = yield from self._scan.collect(KIMI.sep, _MAX_HEAD)
        if head is None:
            self._text(KIMI.call)
            return
        call_id = head.strip()
        match = _KIMI_ID.fullmatch(call_id)
        name = match[1] if match else ""
        raw = f"{KIMI.call}{head}{KIMI.sep}"
        yield from self._json_call(name, call_id, raw, (KIMI.end_call,))

    def _json_call(self, name: str, call_id: str, raw: str, ends: tuple[str, ...]) -> Steps[None]:
        """Pass on the arguments of a call up to its end; `raw` is the text before them."""
        call = self._begin(name, call_id)
        if call is None:
            yield from self._as_text(raw, ends)
            return
        if (yield from self._scan.until(ends, partial(self._add, call))):
            self._end(call)

    def _dsml_call(self) -> Steps[None]:
        """Translate the parameters of a call into JSON as they arrive."""
        head = yield from self._scan.collect(">", _MAX_HEAD)
        match = _INVOKE_HEAD.fullmatch(head or "")
        call = self._begin(match[1], "") if match else None
        if call is None:
            raw = DSML_TAGS.call if head is None else f"{DSML_TAGS.call}{head}>"
            yield from self._as_text(raw, (DSML_TAGS.end_call,))
            return
        marks = DSML_TAGS.parameter, DSML_TAGS.end_call
        mark = yield from self._scan.next_of(marks)
        while mark == DSML_TAGS.parameter:
            is_whole = yield from self._dsml_parameter(call)
            mark = (yield from self._scan.next_of(marks)) if is_whole else None
        yield from self._end_pairs(call, mark, DSML_TAGS.end_call)

    def _dsml_parameter(self, call: ToolCall) -> Steps[bool]:
        """Pass on one parameter; return False if it is malformed."""
        match = _PARAMETER_HEAD.fullmatch((yield from self._scan.collect(">", _MAX_HEAD)) or "")
        if match is None:
            return False
        if match[2] == "true":
            return (yield from self._text_value(call, match[1], DSML_TAGS.end_parameter))
        self._add_name(call, match[1])
        add = partial(self._add, call)
        return (yield from self._scan.until((DSML_TAGS.end_parameter,), add)) is not None

    def _glm_call(self) -> Steps[None]:
        self._start = self._scan.position - len(GLM.call)
        head: list[str] = []
        mark = yield from self._scan.until((GLM.key, GLM.end_call), head.append)
        name = "".join(head)
        call = self._begin(name.strip(), "") if mark else None
        if call is None:
            self._text(f"{GLM.call}{name}{mark or ''}")
            if mark == GLM.key:
                yield from self._as_text("", (GLM.end_call,))
            return
        while mark == GLM.key:
            is_whole = yield from self._glm_parameter(call)
            marks = GLM.key, GLM.end_call
            mark = (yield from self._scan.next_of(marks)) if is_whole else None
        yield from self._end_pairs(call, mark, GLM.end_call)

    def _glm_parameter(self, call: ToolCall) -> Steps[bool]:
        """Pass on a parameter, a text or JSON by its type; return False if it is malformed."""
        key = yield from self._scan.collect(GLM.end_key, _MAX_HEAD)
        if key is None or not (yield from self._scan.next_of((GLM.value,))):
            return False
        name = key.strip()
        types = self._tools.types(call.name, name)
        if types == {"string"}:
            return (yield from self._text_value(call, name, GLM.end_value))
        self._add_name(call, name)
        parts: list[str] = []
        if not (yield from self._scan.until((GLM.end_value,), parts.append)):
            return False
        text = "".join(parts)
        try:
            value = parse_json_text(text)
            is_json = has_type(value, types - {"string"}) and text == text.strip()
            is_text = "string" in types and not is_json
        except (ValueError, RecursionError):
            is_text = True
        self._add(call, _json(text) if is_text else text.strip())
        return True

    def _text_value(self, call: ToolCall, name: str, end: str) -> Steps[bool]:
        """Pass on a parameter that is a text up to a mark; return False if it is torn."""
        self._add_name(call, name, quote='"')
        add = partial(self._add, call)
        if not (yield from self._scan.until((end,), lambda text: add(_json(text)[1:-1]))):
            return False
        self._add(call, '"')
        return True

    def _add_name(self, call: ToolCall, name: str, quote: str = "") -> None:
        """Add the name of the next parameter."""
        self._add(call, f"{', ' if call.arguments else '{'}{_json(name)}: {quote}")

    def _end_pairs(self, call: ToolCall, mark: str | None, end: str) -> Steps[None]:
        """End a call after its last parameter, at the mark `end`.

        Without that mark the call is malformed or torn, and includes the text up to its end.
        """
        if mark == end:
            self._add(call, "}" if call.arguments else "{}")
            self._end(call)
            return
        yield from self._scan.until((end,), lambda text: None)
        call.stop = self._scan.position

    def _forced_calls(self) -> Steps[None]:
        mark = yield from self._scan.next_of(("[",))
        self._pending += mark or ""
        while mark in ("[", ","):
            self._start = self._scan.position
            head = yield from self._scan.collect('"arguments":', _MAX_HEAD)
            match = _FORCED_HEAD.fullmatch((head or "").lstrip().removeprefix("{"))
            call = self._begin(match[1], "") if match else None
            if call is None:
                self._text("" if head is None else f'{head}"arguments":')
                return
            if not (yield from self._scan.json_object(partial(self._add, call))):
                return
            yield from self._scan.next_of(("}",))
            self._end(call)
            mark = yield from self._scan.next_of((",", "]"))

    def _as_text(self, raw: str, ends: tuple[str, ...]) -> Steps[None]:
        """Pass on a malformed call as text, up to its end."""
        self._text(raw)
        self._text((yield from self._scan.until(ends, self._text)) or "")

    def _begin(self, name: str, call_id: str) -> ToolCall | None:
        """Begin a call; return None if there is no such tool."""
        if name not in self._names:
            return None
        self._pending = ""
        call = ToolCall(
            index=len(self.calls),
            call_id=call_id or f"call_{uuid.uuid4().hex[:24]}",
            name=name,
            start=self._start,
        )
        self.calls.append(call)
        self._events.append(CallBegin(call))
        return call

    def _add(self, call: ToolCall, text: str) -> None:
        text = text if call.arguments else text.lstrip()
        if text:
            call.arguments += text
            self._events.append(CallArguments(call, text))
        call.stop = self._scan.position

    def _end(self, call: ToolCall) -> None:
        call.stop = self._scan.position
        try:
            arguments = json.loads(call.arguments)
            json.dumps(arguments, allow_nan=False)  # raises for numbers that JSON does not have
            call.is_complete = isinstance(arguments, dict)
        except (ValueError, RecursionError):
            call.is_complete = False

    def _text(self, text: str) -> None:
        text = self._pending + text
        shown = text.rstrip("\n")
        self._pending = text[len(shown) :]
        if shown:
            self._events.append(Text(shown))


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

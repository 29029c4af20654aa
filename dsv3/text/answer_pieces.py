"""The text of an answer, split into thought, content and calls of tools, by pieces or at once."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from dsv3.request import Completion, RequestOutput
from dsv3.text.text_request import TextRequest
from dsv3.text.thoughts import AnswerParts, ThoughtStream, begins_in_thought, split_answer
from dsv3.text.tokenizer import Tokenizer
from dsv3.text.tool_calls import Event, Text, ToolCall, ToolCallStream
from dsv3.text.tools import CallForm

TOOL_CALLS = "tool_calls"  # the finish reason of an answer with calls
# Of the events of streams; `json.dumps` with this option makes an encoder at each call.
encode_json = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of the thought before an answer."""

    text: str


Piece = Thought | Event


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """A complete answer; `reasoning` is None without a thought."""

    reasoning: str | None
    content: str
    finish_reason: str
    calls: list[ToolCall] = field(default_factory=list)


class PieceStream:
    """Splits the outputs of one chat answer into pieces.

    White space at the end of a thought is not part of it, as in `parse_answer`.

    Args:
        request: of the answer.
        tokenizer: of the model.
        prompt_ids: the prompt, which may have opened a thought.
    """

    def __init__(
        self, request: TextRequest, tokenizer: Tokenizer | None, prompt_ids: Sequence[int]
    ) -> None:
        self._thoughts = ThoughtStream(begins_in_thought(tokenizer, prompt_ids))
        self._tools = _tool_stream(request, tokenizer)
        self._is_single = request.tools is not None and not request.tools.is_parallel
        self._blank = ""  # white space that ends the thought, unless more of it follows
        self._has_thought_text = False

    def push(self, output: RequestOutput) -> list[Piece]:
        """Return the pieces of an output's text; after the last output, all that is pending."""
        all_parts = self._thoughts.push_output(output)
        pieces = [p for parts in all_parts for p in self._pieces(parts, output.new_token_ids)]
        if output.completion is not None and self._tools is not None:
            pieces += self._shown(self._tools.finish())
        return pieces

    def finish_reason(self, reason: str) -> str:
        """Return the reason of the answer's end, after the last output."""
        return _with_calls(reason, [] if self._tools is None else self._tools.calls)

    def _pieces(self, parts: AnswerParts, token_ids: Sequence[int]) -> list[Piece]:
        thought = self._blank + parts.thought
        if not self._has_thought_text:
            thought = thought.lstrip()
        shown = thought.rstrip()
        self._blank = thought[len(shown) :]
        self._has_thought_text |= bool(shown)
        pieces: list[Piece] = [Thought(shown)] if shown else []
        if self._tools is not None:
            return pieces + self._shown(self._tools.push(parts.answer, token_ids))
        return pieces + ([Text(parts.answer)] if parts.answer else [])

    def _shown(self, events: list[Event]) -> list[Event]:
        """Return the events that the request allows: without parallel calls, only one call."""
        if not self._is_single:
            return events
        return [event for event in events if isinstance(event, Text) or not event.call.index]


def parse_answer(
    request: TextRequest, completion: Completion, tokenizer: Tokenizer | None
) -> ParsedAnswer:
    """Return the parts of a complete answer in a conversation; torn calls are text."""
    split = split_answer(completion.text, begins_in_thought(tokenizer, completion.prompt_ids))
    stream = _tool_stream(request, tokenizer)
    if stream is None:
        return ParsedAnswer(split.reasoning, split.content, completion.finish_reason)
    events = stream.push(split.content, completion.token_ids) + stream.finish()
    content = "".join(event.text for event in events if isinstance(event, Text))
    torn = [call for call in stream.calls if not call.is_complete]
    content += "".join(split.content[call.start : call.stop] for call in torn)
    reason = _with_calls(completion.finish_reason, stream.calls)
    calls = [call for call in stream.calls if call.is_complete]
    if request.tools is not None and not request.tools.is_parallel:
        calls = calls[:1]
    return ParsedAnswer(split.reasoning, content, reason, calls)


def _tool_stream(request: TextRequest, tokenizer: Tokenizer | None) -> ToolCallStream | None:
    if request.tools is None:
        return None
    if request.tools.is_required:
        return ToolCallStream(CallForm.FORCED, request.tools)
    form = CallForm.of(tokenizer)
    if form is None or tokenizer is None:
        return None
    return ToolCallStream(form, request.tools, tokenizer.id_of(form.marks[0]))


def _with_calls(reason: str, calls: Sequence[ToolCall]) -> str:
    """Return the finish reason of an answer with these calls."""
    has_calls = any(call.is_complete for call in calls)
    return TOOL_CALLS if has_calls and reason == "stop" else reason

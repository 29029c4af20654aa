"""Responses in the Anthropic format, whole or as a stream of events while the engine runs."""

import json
from collections.abc import Sequence
from typing import Any

from dsv3.request import Completion, RequestOutput
from dsv3.text.answer_pieces import (
    TOOL_CALLS,
    Piece,
    PieceStream,
    Thought,
    encode_json,
    parse_answer,
)
from dsv3.text.text_request import EncodedRequest
from dsv3.text.tokenizer import Tokenizer
from dsv3.text.tool_calls import CallArguments, CallBegin, Text

_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "deadline": "max_tokens",
    TOOL_CALLS: "tool_use",
}
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_EMPTY_THOUGHT = {"type": "thinking", "thinking": "", "signature": ""}
_EMPTY_TEXT = {"type": "text", "text": ""}


def anthropic_error(message: str, status: int) -> dict[str, Any]:
    """Return the body of an error."""
    fallback = "invalid_request_error" if status < 500 else "api_error"
    error_type = _ERROR_TYPES.get(status, fallback)
    return {"type": "error", "error": {"type": error_type, "message": message}}


class AnthropicWriter:
    """Writes one response.

    Args:
        name: name of the response, in its `id`.
        model: name of the model.
        request: the request.
        tokenizer: of the model.
    """

    end = ""

    def __init__(
        self, name: str, model: str, request: EncodedRequest, tokenizer: Tokenizer | None
    ) -> None:
        self.response_id = f"msg_{name}"
        self._model = model
        self._request = request.text
        self._prompt_ids = request.tokens.prompt_ids
        self._tokenizer = tokenizer
        self._pieces = PieceStream(request.text, tokenizer, self._prompt_ids)
        self._completion: Completion | None = None
        self._block: str | None = None  # type of the open block
        self._num_blocks = 0

    def start(self) -> list[dict[str, Any]]:
        """Return the event before the first output."""
        usage = {  # the number of cached ones is known with the last output
            "input_tokens": len(self._prompt_ids),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        }
        return [{"type": "message_start", "message": self._message([], None, None, usage)}]

    def push(self, output: RequestOutput) -> list[dict[str, Any]]:
        """Return the events of an output."""
        self._completion = output.completion
        return [event for piece in self._pieces.push(output) for event in self._events(piece)]

    def finish(self) -> list[dict[str, Any]]:
        """Return the events after the last output."""
        done = self._completion
        assert done is not None
        reason, sequence = _stop(self._pieces.finish_reason(done.finish_reason), done)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return [
            *self._close(),
            {"type": "message_delta", "delta": delta, "usage": _usage(done)},
            {"type": "message_stop"},
        ]

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the response without a stream."""
        done = completions[0]
        answer = parse_answer(self._request, done, self._tokenizer)
        content: list[dict[str, Any]] = []
        if answer.reasoning:
            content.append(_EMPTY_THOUGHT | {"thinking": answer.reasoning})
        if answer.content:
            content.append(_EMPTY_TEXT | {"text": answer.content})
        content += [
            {"type": "tool_use", "id": c.call_id, "name": c.name, "input": json.loads(c.arguments)}
            for c in answer.calls
        ]
        reason, sequence = _stop(answer.finish_reason, done)
        return self._message(content, reason, sequence, _usage(done))

    def event(self, data: dict[str, Any]) -> str:
        """Return the text of an event in a stream."""
        return f"event: {data['type']}\ndata: {encode_json(data)}\n\n"

    def error(self, message: str, status: int, code: str | None = None) -> dict[str, Any]:
        """Return the body of an error; this format has no codes."""
        return anthropic_error(message, status)

    def _message(
        self, content: list[Any], reason: str | None, sequence: str | None, usage: dict[str, int]
    ) -> dict[str, Any]:
        return {
            "id": self.response_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": usage,
        }

    def _events(self, piece: Piece) -> list[dict[str, Any]]:
        """Return the events of a piece; each thought, text and call is a block of its own."""
        match piece:
            case Thought(text):
                delta = {"type": "thinking_delta", "thinking": text}
                return [*self._within(_EMPTY_THOUGHT), self._delta(delta)]
            case Text(text):
                delta = {"type": "text_delta", "text": text}
                return [*self._within(_EMPTY_TEXT), self._delta(delta)]
            case CallBegin(call):
                block = {"type": "tool_use", "id": call.call_id, "name": call.name, "input": {}}
                return self._open(block)
            case CallArguments(_, text):
                return [self._delta({"type": "input_json_delta", "partial_json": text})]

    def _delta(self, delta: dict[str, str]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}

    def _within(self, block: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the events that open a block, unless one of its type is open."""
        return [] if self._block == block["type"] else self._open(block)

    def _open(self, block: dict[str, Any]) -> list[dict[str, Any]]:
        events = self._close()
        self._block = block["type"]
        index = self._num_blocks
        self._num_blocks += 1
        return [*events, {"type": "content_block_start", "index": index, "content_block": block}]

    def _close(self) -> list[dict[str, Any]]:
        if self._block is None:
            return []
        self._block = None
        return [{"type": "content_block_stop", "index": self._num_blocks - 1}]


def _stop(reason: str, completion: Completion) -> tuple[str, str | None]:
    """Return the reason of an answer's end, and the stop sequence that ended it."""
    if reason == "stop" and completion.stop_string is not None:
        return "stop_sequence", completion.stop_string
    return _STOP_REASONS[reason], None


def _usage(completion: Completion) -> dict[str, int]:
    """Return the token counts; in this format, cached tokens do not count as input tokens."""
    return {
        "input_tokens": len(completion.prompt_ids) - completion.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": completion.cached_tokens,
        "output_tokens": len(completion.token_ids),
    }

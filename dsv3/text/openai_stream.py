"""Responses in the OpenAI format, whole or as a stream of chunks while the engine runs."""

from collections.abc import Sequence
from typing import Any

from dsv3.request import Completion, RequestOutput
from dsv3.text.answer_pieces import Piece, PieceStream, Thought, encode_json
from dsv3.text.openai_answer import (
    ResponseHead,
    TextOffsets,
    chat_logprobs,
    echoed_prompt,
    error_body,
    finish_reason,
    response_body,
    text_logprobs,
    usage,
)
from dsv3.text.text_request import EncodedRequest
from dsv3.text.tokenizer import Tokenizer
from dsv3.text.tool_calls import CallArguments, CallBegin, Text

_CHUNKS = {True: "chat.completion.chunk", False: "text_completion"}


class OpenAIWriter:
    """Writes one response, which may have several answers.

    Args:
        head: the fields that all chunks have in common.
        requests: the request of each answer, in the order of the choices.
        tokenizer: decodes tokens.
        with_usage: end a stream with a chunk of token counts.

    Attributes:
        response_id: the `id` of the response.
        end: the last text of a stream.
    """

    end = "data: [DONE]\n\n"

    def __init__(
        self,
        head: ResponseHead,
        requests: Sequence[EncodedRequest],
        tokenizer: Tokenizer | None,
        with_usage: bool = False,
    ) -> None:
        is_chat = requests[0].text.messages is not None
        self.response_id = head.fields(is_chat)["id"]
        self._head = head
        self._fields = head.fields(is_chat) | {"object": _CHUNKS[is_chat]}
        self._with_usage = with_usage
        self._requests = [request.text for request in requests]
        self._tokenizer = tokenizer
        self._completions: dict[int, Completion] = {}
        kind = _ChatChoice if is_chat else _TextChoice
        self._choices = {
            request.tokens.request_id: kind(i, request, tokenizer)
            for i, request in enumerate(requests)
        }

    def start(self) -> list[dict[str, Any]]:
        """Return the chunks before the first output."""
        return [self._chunk(c) for choice in self._choices.values() for c in choice.start()]

    def push(self, output: RequestOutput) -> list[dict[str, Any]]:
        """Return the chunks of an output."""
        choice = self._choices[output.request_id]
        if output.completion is not None:
            self._completions[choice.index] = output.completion
        return [self._chunk(entry) for entry in choice.push(output)]

    def finish(self) -> list[dict[str, Any]]:
        """Return the chunks after the last output."""
        if not self._with_usage:
            return []
        completions = [self._completions[i] for i in range(len(self._requests))]
        return [self._fields | {"choices": [], "usage": usage(self._requests, completions)}]

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the response without a stream; the completions are in the order of the choices."""
        return response_body(self._head, self._requests, completions, self._tokenizer)

    def event(self, data: dict[str, Any]) -> str:
        """Return the text of a chunk in a stream."""
        return f"data: {encode_json(data)}\n\n"

    def error(self, message: str, status: int, code: str | None = None) -> dict[str, Any]:
        """Return the body of an error."""
        return error_body(message, status, code)

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage_field = {"usage": None} if self._with_usage else {}
        return self._fields | {"choices": [choice]} | usage_field


class _Choice:
    """The chunks of one answer."""

    def __init__(self, index: int, request: EncodedRequest, tokenizer: Tokenizer | None) -> None:
        self.index = index
        self._request = request.text
        self._prompt_ids = request.tokens.prompt_ids
        self._tokenizer = tokenizer

    def _entry(self, content: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": self.index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _ids(self, output: RequestOutput) -> dict[str, Any]:
        """Return the tokens of an output, if the request asks for them."""
        return {"token_ids": output.new_token_ids} if self._request.return_token_ids else {}


class _ChatChoice(_Choice):
    def __init__(self, index: int, request: EncodedRequest, tokenizer: Tokenizer | None) -> None:
        super().__init__(index, request, tokenizer)
        self._pieces = PieceStream(self._request, tokenizer, self._prompt_ids)

    def start(self) -> list[dict[str, Any]]:
        entry = self._entry({"delta": {"role": "assistant", "content": ""}}, None, None)
        if self._request.return_token_ids:
            entry["prompt_token_ids"] = self._prompt_ids
        return [entry]

    def push(self, output: RequestOutput) -> list[dict[str, Any]]:
        deltas = [_delta(piece) for piece in self._pieces.push(output)]
        logprobs = None
        if output.new_logprobs:
            logprobs = chat_logprobs(output.new_logprobs, self._tokenizer)
        has_facts = output.new_logprobs or self._ids(output).get("token_ids")
        if output.completion is not None:
            deltas.append({})
        elif has_facts and not deltas:  # of tokens without a text so far
            deltas.append({"content": ""})
        entries = [self._entry({"delta": delta}, None, None) for delta in deltas]
        if entries:
            entries[0] |= {"logprobs": logprobs} | self._ids(output)
        if output.completion is not None:
            reason = self._pieces.finish_reason(output.completion.finish_reason)
            entries[-1]["finish_reason"] = finish_reason(reason)
        return entries


def _delta(piece: Piece) -> dict[str, Any]:
    match piece:
        case Thought(text):
            return {"reasoning_content": text, "reasoning": text}
        case Text(text):
            return {"content": text}
        case CallBegin(call):
            begin = {"index": call.index, "id": call.call_id, "type": "function"}
            return {"tool_calls": [begin | {"function": {"name": call.name, "arguments": ""}}]}
        case CallArguments(call, text):
            return {"tool_calls": [{"index": call.index, "function": {"arguments": text}}]}


class _TextChoice(_Choice):
    def __init__(self, index: int, request: EncodedRequest, tokenizer: Tokenizer | None) -> None:
        super().__init__(index, request, tokenizer)
        self._has_logprobs = self._request.params.logprobs is not None
        self._is_echo_due = self._request.echo
        self._offsets = TextOffsets(tokenizer)

    def start(self) -> list[dict[str, Any]]:
        return []

    def push(self, output: RequestOutput) -> list[dict[str, Any]]:
        text = output.new_text
        if self._is_echo_due:
            self._is_echo_due = False
            text = echoed_prompt(self._request, self._prompt_ids, self._tokenizer) + text
        is_last = output.completion is not None
        has_facts = output.new_logprobs or self._ids(output).get("token_ids")
        if not (text or is_last or has_facts):
            return []
        reason = None
        if output.completion is not None:
            reason = finish_reason(output.completion.finish_reason)
        entry = self._entry({"text": text}, self._logprobs(output), reason)
        return [entry | self._ids(output)]

    def _logprobs(self, output: RequestOutput) -> Any:
        if not self._has_logprobs:
            return None
        ids = output.new_token_ids
        has_top = bool(self._request.params.logprobs)
        offsets = self._offsets.push(ids)
        return text_logprobs(ids, output.new_logprobs, has_top, offsets, self._tokenizer)

"""Responses in the OpenAI format: a request and its completions in, a response body out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv3.request import Completion, TokenLogprobs
from dsv3.text.answer_pieces import parse_answer
from dsv3.text.detokenize import make_detokenizer
from dsv3.text.text_request import TextRequest
from dsv3.text.tokenizer import Tokenizer
from dsv3.text.tool_calls import ToolCall

LOWEST = -9999.0  # for minus infinity, which JSON does not have
_ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
# Reasons that OpenAI's format does not have.
_REASONS = {"deadline": "length"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHead:
    """The fields that the response to a request begins with.

    Attributes:
        name: name of the response, in its `id`.
        created: seconds since 1970.
        model: name of the model.
        fingerprint: of the model and its numerics; empty if unknown.
    """

    name: str
    created: int
    model: str
    fingerprint: str = ""

    def fields(self, is_chat: bool) -> dict[str, Any]:
        """Return the fields."""
        head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{self.name}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
        }
        return head | ({"system_fingerprint": self.fingerprint} if self.fingerprint else {})


def response_body(
    head: ResponseHead,
    requests: Sequence[TextRequest],
    completions: Sequence[Completion],
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """Return the body of a response.

    Without a tokenizer, texts are empty and tokens are named by their ids.

    Args:
        head: the response's first fields.
        requests: the request of each answer.
        completions: the answers.
        tokenizer: decodes tokens.
    """
    is_chat = requests[0].messages is not None
    choice = _chat_choice if is_chat else _text_choice
    choices = []
    for i, (request, completion) in enumerate(zip(requests, completions, strict=True)):
        entry = {"index": i, **choice(request, completion, tokenizer)}
        if request.return_token_ids:
            entry["token_ids"] = completion.token_ids
            entry["prompt_token_ids"] = completion.prompt_ids
        if request.list_prompt_logprobs:
            entry["prompt_logprobs"] = _prompt_logprobs(completion, tokenizer)
        choices.append(entry)
    return head.fields(is_chat) | {"choices": choices, "usage": usage(requests, completions)}


def _prompt_logprobs(
    completion: Completion, tokenizer: Tokenizer | None
) -> list[dict[str, Any] | None]:
    """Return the log-probabilities of a prompt in vLLM's form: by token id, the prompt's own first.

    The rank of a token that is not among the likeliest ones is unknown.
    """
    listed: list[dict[str, Any] | None] = [None]
    for entry in completion.prompt_logprobs or ():
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(entry.top, 1)}
        by_id = {entry.token_id: entry.logprob} | dict(entry.top)
        listed.append(
            {
                str(token_id): {
                    "logprob": max(logprob, LOWEST),
                    "rank": ranks.get(token_id),
                    "decoded_token": _token_name(token_id, tokenizer),
                }
                for token_id, logprob in by_id.items()
            }
        )
    return listed


def finish_reason(reason: str) -> str:
    """Return OpenAI's word for the reason of an answer's end."""
    return _REASONS.get(reason, reason)


def error_body(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """Return the body of an error; its `type` is that of OpenAI's API for the status."""
    fallback = "invalid_request_error" if status < 500 else "server_error"
    error_type = _ERROR_TYPES.get(status, fallback)
    return {"error": {"message": message, "type": error_type, "param": None, "code": code}}


def usage(requests: Sequence[TextRequest], completions: Sequence[Completion]) -> dict[str, Any]:
    """Return the token counts; a prompt counts once for all its answers."""
    prompts = {
        id(request): completion
        for request, completion in reversed(list(zip(requests, completions, strict=True)))
    }
    num_prompt = sum(len(completion.prompt_ids) for completion in prompts.values())
    num_cached = sum(completion.cached_tokens for completion in prompts.values())
    num_generated = sum(len(completion.token_ids) for completion in completions)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
        "prompt_cache_hit_tokens": num_cached,
        "prompt_cache_miss_tokens": num_prompt - num_cached,
    }


def _chat_choice(
    request: TextRequest, completion: Completion, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    answer = parse_answer(request, completion, tokenizer)
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.calls:
        message["content"] = answer.content or None
        message["tool_calls"] = [
            {"id": c.call_id, "type": "function", "function": _function(c)} for c in answer.calls
        ]
    if answer.reasoning is not None:
        message |= {"reasoning_content": answer.reasoning, "reasoning": answer.reasoning}
    logprobs = None
    if request.params.logprobs is not None:
        logprobs = chat_logprobs(completion.logprobs or [], tokenizer)
    reason = finish_reason(answer.finish_reason)
    return {"message": message, "logprobs": logprobs, "finish_reason": reason}


def _function(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments}


def chat_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the log-probabilities of a chat's tokens."""
    return {"content": [_chat_logprob(entry, tokenizer) for entry in entries]}


def _chat_logprob(token: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": _token_name(token_id, tokenizer),
            "logprob": max(logprob, LOWEST),
            "bytes": None if tokenizer is None else list(tokenizer.token_bytes(token_id)),
        }

    alternatives = [entry(token_id, logprob) for token_id, logprob in token.top]
    return entry(token.token_id, token.logprob) | {"top_logprobs": alternatives}


def _text_choice(
    request: TextRequest, completion: Completion, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    text = completion.text
    logprobs = None
    if request.echo:
        text = echoed_prompt(request, completion.prompt_ids, tokenizer) + text
    if request.params.logprobs is not None:
        logprobs = _text_logprobs(request, completion, tokenizer)
        logprobs["text_offset"] = [min(at, len(text)) for at in logprobs["text_offset"]]
    reason = finish_reason(completion.finish_reason)
    return {"text": text, "logprobs": logprobs, "finish_reason": reason}


def echoed_prompt(
    request: TextRequest, prompt_ids: Sequence[int], tokenizer: Tokenizer | None
) -> str:
    """Return the text of a prompt that an answer begins with; empty without a tokenizer."""
    if isinstance(request.prompt, str):
        return request.prompt
    return "" if tokenizer is None else tokenizer.decode(prompt_ids)


def _text_logprobs(
    request: TextRequest, completion: Completion, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return the log-probabilities of an answer, and of its prompt if that is echoed."""
    ids = completion.token_ids
    entries: list[TokenLogprobs | None] = [*(completion.logprobs or [])]
    if request.echo:
        ids = completion.prompt_ids + ids
        entries = [None, *(completion.prompt_logprobs or []), *entries]
    offsets = TextOffsets(tokenizer).push(ids)
    return text_logprobs(ids, entries, bool(request.params.logprobs), offsets, tokenizer)


def text_logprobs(
    ids: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    has_top: bool,
    offsets: Sequence[int],
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """Return log-probabilities in the older format of parallel lists.

    Args:
        ids: the tokens.
        entries: of each token; a prompt's first token has none.
        has_top: report the likeliest alternatives.
        offsets: of each token in the text.
        tokenizer: decodes tokens.
    """
    top = [entry and _by_text(entry.top, tokenizer) for entry in entries] if has_top else None
    return {
        "tokens": [_token_name(token_id, tokenizer) for token_id in ids],
        "token_logprobs": [entry and max(entry.logprob, LOWEST) for entry in entries],
        "top_logprobs": top,
        "text_offset": list(offsets),
    }


def _by_text(top: Sequence[tuple[int, float]], tokenizer: Tokenizer | None) -> dict[str, float]:
    """Return alternatives by their text; of several with the same text, the likeliest."""
    by_text: dict[str, float] = {}
    for token_id, logprob in sorted(top, key=lambda entry: -entry[1]):
        by_text.setdefault(_token_name(token_id, tokenizer), max(logprob, LOWEST))
    return by_text


class TextOffsets:
    """Counts the offset of each token in a text, in characters."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._detokenizer = None if tokenizer is None else make_detokenizer(tokenizer)
        self._num_chars = 0

    def push(self, ids: Sequence[int]) -> list[int]:
        """Return the offsets of the next tokens; zeros without a tokenizer."""
        if self._detokenizer is None:
            return [0] * len(ids)
        offsets: list[int] = []
        for token_id in ids:
            offsets.append(self._num_chars)
            self._num_chars += len(self._detokenizer.push((token_id,)))
        return offsets


def _token_name(token_id: int, tokenizer: Tokenizer | None) -> str:
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)

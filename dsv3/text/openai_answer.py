"""Responses in the OpenAI format: a request and its completions in, a response body out."""

from collections.abc import Sequence
from typing import Any

from dsv3.request import Completion, TokenLogprobs
from dsv3.text.detokenize import make_detokenizer
from dsv3.text.text_request import TextRequest
from dsv3.text.thoughts import begins_in_thought, split_answer
from dsv3.text.tokenizer import Tokenizer

LOWEST = -9999.0  # for minus infinity, which JSON does not have


def response_body(
    request: TextRequest,
    completions: Sequence[Completion],
    tokenizer: Tokenizer | None,
    name: str,
    created: int,
) -> dict[str, Any]:
    """Return the response body of one request.

    Without a tokenizer, texts are empty and tokens are named by their ids.

    Args:
        request: the request.
        completions: its `n` answers.
        tokenizer: decodes tokens.
        name: name of the response, in its `id`.
        created: seconds since 1970.
    """
    is_chat = request.messages is not None
    choice = _chat_choice if is_chat else _text_choice
    choices = []
    for i, completion in enumerate(completions):
        entry = {"index": i, **choice(request, completion, tokenizer)}
        if request.return_token_ids:
            entry["token_ids"] = completion.token_ids
            entry["prompt_token_ids"] = completion.prompt_ids
        choices.append(entry)
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{name}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": request.model,
        "choices": choices,
        "usage": _usage(completions),
    }


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """Return an error body; `kind` is OpenAI's `type`."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _usage(completions: Sequence[Completion]) -> dict[str, Any]:
    """Return the token counts; the prompt counts once for all answers."""
    first = completions[0]
    num_prompt = len(first.prompt_ids)
    num_generated = sum(len(completion.token_ids) for completion in completions)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens},
    }


def _chat_choice(
    request: TextRequest, completion: Completion, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    split = split_answer(completion.text, begins_in_thought(tokenizer, completion.prompt_ids))
    message = {"role": "assistant", "content": split.content}
    if split.reasoning is not None:
        message["reasoning_content"] = split.reasoning
    logprobs = None
    if request.params.logprobs is not None:
        entries = completion.logprobs or []
        logprobs = {"content": [_chat_logprob(entry, tokenizer) for entry in entries]}
    return {"message": message, "logprobs": logprobs, "finish_reason": completion.finish_reason}


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
    if request.echo and isinstance(request.prompt, str):
        text = request.prompt + text
    elif request.echo and tokenizer is not None:
        text = tokenizer.decode(completion.prompt_ids) + text
    if request.params.logprobs is not None:
        logprobs = _text_logprobs(request, completion, tokenizer)
        logprobs["text_offset"] = [min(at, len(text)) for at in logprobs["text_offset"]]
    return {"text": text, "logprobs": logprobs, "finish_reason": completion.finish_reason}


def _text_logprobs(
    request: TextRequest, completion: Completion, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return logprobs in the older format of parallel lists; a prompt's first token has none."""
    ids = completion.token_ids
    entries: list[TokenLogprobs | None] = [*(completion.logprobs or [])]
    if request.echo:
        ids = completion.prompt_ids + ids
        entries = [None, *(completion.prompt_logprobs or []), *entries]
    top = None
    if request.params.logprobs:
        top = [entry and _by_text(entry.top, tokenizer) for entry in entries]
    return {
        "tokens": [_token_name(token_id, tokenizer) for token_id in ids],
        "token_logprobs": [entry and max(entry.logprob, LOWEST) for entry in entries],
        "top_logprobs": top,
        "text_offset": _text_offsets(ids, tokenizer),
    }


def _by_text(top: Sequence[tuple[int, float]], tokenizer: Tokenizer | None) -> dict[str, float]:
    """Return alternatives by their text; of several with the same text, the likeliest."""
    by_text: dict[str, float] = {}
    for token_id, logprob in sorted(top, key=lambda entry: -entry[1]):
        by_text.setdefault(_token_name(token_id, tokenizer), max(logprob, LOWEST))
    return by_text


def _text_offsets(ids: Sequence[int], tokenizer: Tokenizer | None) -> list[int]:
    """Return the offset of each token in the text, in characters."""
    if tokenizer is None:
        return [0] * len(ids)
    detokenizer = make_detokenizer(tokenizer)
    offsets: list[int] = []
    num_chars = 0
    for token_id in ids:
        offsets.append(num_chars)
        num_chars += len(detokenizer.push((token_id,)))
    return offsets


def _token_name(token_id: int, tokenizer: Tokenizer | None) -> str:
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)

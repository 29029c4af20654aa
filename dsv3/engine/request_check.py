"""Checks of a request before it is queued: tokens of the vocabulary, length, room in the cache."""

from dsv3.errors import RequestError
from dsv3.request import Request


def check_request(request: Request, vocab_size: int, context_limit: int) -> None:
    """Raise RequestError if a model can never answer a request.

    Args:
        request: the request.
        vocab_size: tokens of the model.
        context_limit: longest context in tokens, prompt and answer.
    """
    prompt = request.prompt_ids
    params = request.params
    if not prompt:
        raise RequestError("the prompt is empty; give at least one token")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        bad = next(t for t in prompt if not 0 <= t < vocab_size)
        raise RequestError(f"prompt token {bad} is not in 0..{vocab_size - 1}")
    for token in params.logit_bias:
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"logit_bias[{token}] is not a token of this model (0 to {vocab_size - 1})"
            )
    room = context_limit - len(prompt)
    if room < min(1, params.max_tokens):
        most = context_limit - min(1, params.max_tokens)
        raise RequestError(f"the prompt has {len(prompt)} tokens, it may have {most}")
    if params.max_tokens > room:
        raise RequestError(
            f"prompt of {len(prompt)} tokens + max_tokens={params.max_tokens} exceed the "
            f"context of {context_limit}; max_tokens may be {room}"
        )


def check_room(request: Request, room: int, setting: str) -> None:
    """Raise RequestError if a request needs more of the cache than there is.

    Args:
        request: the request.
        room: positions that a group's cache has for requests.
        setting: name of the cache's size in messages.
    """
    num_prompt = len(request.prompt_ids)
    max_tokens = request.params.max_tokens
    # The last token is never fed back, so it needs no place in the cache.
    longest = num_prompt + max(0, max_tokens - 1)
    if longest > room:
        raise RequestError(
            f"prompt of {num_prompt} tokens and max_tokens={max_tokens} need {longest} cached "
            f"tokens, the cache holds {room}; raise {setting} or lower max_tokens"
        )

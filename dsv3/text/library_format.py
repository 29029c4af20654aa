"""Requests as a script passes them: prompts or conversations in, checked `TextRequest`s out."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from dsv3.arguments import plain, truth, whole
from dsv3.config_fields import shown
from dsv3.errors import RequestError
from dsv3.request import SamplingParams
from dsv3.text.text_request import TextRequest

_EXAMPLE = 'such as {"role": "user", "content": "..."}'


def prompt_requests(prompts: Any, params: Any) -> list[TextRequest]:
    """Return the requests of one raw prompt or several.

    Args:
        prompts: texts or token ids; a list, an array, a tensor or a generator of them.
        params: `SamplingParams`, a mapping of their names or None; one for all, or one for each.

    Raises:
        RequestError: an argument is of another kind; the error names it.
    """
    found = [{"prompt": prompt} for prompt in _prompts(prompts)]
    return _requests(found, params)


def chat_requests(
    messages: Any, params: Any, thinking: Any, conversation_id: Any, system: Any
) -> list[TextRequest]:
    """Return the requests of one conversation or several.

    Args:
        messages: mappings in the OpenAI format, one of them or a list; or a list of such lists.
        params: as in `prompt_requests`.
        thinking: as in `LLM.chat`, for all, like what follows.
        conversation_id: names the dialogue.
        system: text of a system message in front.
    """
    common = _chat_options(thinking, conversation_id)
    found = [{"messages": _with_system(m, system), **common} for m in _conversations(messages)]
    return _requests(found, params)


def stream_requests(
    prompts: Any, params: Any, thinking: Any, conversation_id: Any, system: Any
) -> list[TextRequest]:
    """Return the requests of raw prompts or conversations; conversations are lists of mappings."""
    common = _chat_options(thinking, conversation_id)
    value = _as_list("prompts", prompts)
    several = value if _is_several(value) else [value]
    found: list[dict[str, Any]] = []
    for each in several:
        if _is_message(each) or (_is_list(each) and any(map(_is_message, each))):
            (messages,) = _conversations(each)
            found.append({"messages": _with_system(messages, system), **common})
            continue
        found.append({"prompt": _prompt(each)})
        given = {"thinking": thinking, "conversation_id": conversation_id, "system": system}
        for name, asked in given.items():
            if asked is not None:
                raise RequestError(f"{name}={shown(asked)} is for conversations, not raw prompts")
    return _requests(found, params)


def check_conversation_id(value: Any) -> str | None:
    """Return the name of a conversation, or None."""
    if value is not None and not isinstance(value, str):
        raise RequestError(f"conversation_id={shown(value)} must be a text")
    return value


def _requests(found: list[dict[str, Any]], params: Any) -> list[TextRequest]:
    chosen = _params(params, len(found))
    return [
        TextRequest(**what, params=each or SamplingParams(), limit_is_default=each is None)
        for what, each in zip(found, chosen, strict=True)
    ]


def _params(value: Any, count: int) -> list[SamplingParams | None]:
    """Return the parameters of every prompt; None where none are given."""
    if value is None or isinstance(value, SamplingParams | Mapping):
        return [_one_params("params", value)] * count
    several = _as_list("params", value)
    if not _is_list(several):
        raise _wrong_params("params", value)
    if len(several) != count:
        raise RequestError(f"{len(several)} params for {count} prompts")
    return [_one_params(f"params[{i}]", each) for i, each in enumerate(several)]


def _one_params(name: str, value: Any) -> SamplingParams | None:
    if value is None or isinstance(value, SamplingParams):
        return value
    if not isinstance(value, Mapping):
        raise _wrong_params(name, value)
    return SamplingParams.of(value)


def _wrong_params(name: str, value: Any) -> RequestError:
    rule = 'must be SamplingParams, or a dict such as {"max_tokens": 64}, or one for each prompt'
    return RequestError(f"{name}={shown(value)} {rule}")


def _prompts(value: Any) -> list[str | list[int]]:
    value = _as_list("prompts", value)
    if _is_message(value) or (_is_list(value) and any(map(_is_message, value))):
        raise RequestError("a prompt is a text or token ids; messages are for chat() and stream()")
    return [_prompt(each) for each in value] if _is_several(value) else [_prompt(value)]


def _is_several(value: Any) -> bool:
    """Return True for a list of prompts or conversations, False for one of them."""
    return _is_list(value) and not any(_is_number(each) or _is_message(each) for each in value)


def _prompt(value: Any) -> str | list[int]:
    """Return a text or a list of token ids."""
    value = plain(value)
    if isinstance(value, str):
        return str(value)
    if not _is_list(value):
        raise RequestError(f"a prompt is a text or token ids, not {shown(value)}")
    ids = []
    for i, token_id in enumerate(value):
        try:
            ids.append(whole(None if isinstance(token_id, str) else token_id))
        except ValueError:
            raise RequestError(f"prompt[{i}]={shown(token_id)} is no token id") from None
    return ids


def _conversations(value: Any) -> list[list[Any]]:
    value = [value] if _is_message(value) else _as_list("messages", value)
    if not _is_list(value):
        raise RequestError(f"messages={shown(value)} must be a list of messages {_EXAMPLE}")
    if any(map(_is_message, value)):
        return [list(value)]
    for i, each in enumerate(value):
        if not _is_list(each):
            raise RequestError(f"messages[{i}]={shown(each)} must be a message {_EXAMPLE}")
    return [list(each) for each in value]


def _with_system(messages: list[Any], system: Any) -> list[Any]:
    """Put a system message in front of a conversation that has none there."""
    if system is None:
        return messages
    if not isinstance(system, str):
        raise RequestError(f"system={shown(system)} must be a text")
    first = messages[0] if messages else None
    if isinstance(first, Mapping) and first.get("role") in ("system", "developer"):
        raise RequestError(
            f"system={shown(system)} is given, and messages[0] is a system message: "
            "leave one of them out"
        )
    return [{"role": "system", "content": system}, *messages]


def _chat_options(thinking: Any, conversation_id: Any) -> dict[str, Any]:
    try:
        thinks = None if thinking is None else truth(thinking)
    except ValueError:
        raise RequestError(f"thinking={shown(thinking)} must be True, False or None") from None
    return {"thinking": thinks, "conversation_id": check_conversation_id(conversation_id)}


def _as_list(name: str, value: Any) -> Any:
    """Return arrays, tensors, generators and other ordered collections as lists."""
    value = plain(value)
    if isinstance(value, set | frozenset):
        raise RequestError(f"{name}={shown(value)} is a set, which has no order: give a list")
    is_one = isinstance(value, str | bytes | bytearray | Mapping | os.PathLike)
    return list(value) if isinstance(value, Iterable) and not is_one else value


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | range)


def _is_number(value: Any) -> bool:
    return isinstance(plain(value), int | float)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping)

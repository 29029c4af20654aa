"""Requests of the Python library, checked, and the text of its streams."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dsv3.arguments import plain, truth, whole
from dsv3.config_fields import shown
from dsv3.errors import Dsv3Error, RequestError
from dsv3.request import RequestOutput, SamplingParams
from dsv3.text.text_request import TextRequest
from dsv3.text.thoughts import AnswerParts, TextPiece, ThoughtStream

log = logging.getLogger(__name__)

_EXAMPLE = 'such as {"role": "user", "content": "..."}'


def prompt_requests(prompts: Any, params: Any) -> list[TextRequest]:
    """Return the requests of one raw prompt or several.

    Args:
        prompts: texts or token ids; a list, an array, a tensor or a generator of them.
        params: `SamplingParams`, a mapping of their names or None; one for all, or one for each.

    Raises:
        RequestError: an argument has a wrong type; the error names it.
    """
    inputs = [{"prompt": prompt} for prompt in _prompts(prompts)]
    return _requests(inputs, params)


def chat_requests(
    messages: Any, params: Any, thinking: Any, conversation_id: Any, system: Any
) -> list[TextRequest]:
    """Return the requests of one conversation or several.

    Args:
        messages: a message in the OpenAI format, a list of messages, or a list of such lists.
        params: as in `prompt_requests`.
        thinking: as in `LLM.chat`; this and the following apply to all conversations.
        conversation_id: name of the conversation.
        system: text of a system message to put first.
    """
    options = _chat_options(thinking, conversation_id)
    inputs = [{"messages": _with_system(m, system), **options} for m in _conversations(messages)]
    return _requests(inputs, params)


def stream_requests(
    prompts: Any, params: Any, thinking: Any, conversation_id: Any, system: Any
) -> list[TextRequest]:
    """Return the requests of raw prompts or conversations; conversations are lists of mappings."""
    options = _chat_options(thinking, conversation_id)
    value = _as_list("prompts", prompts)
    inputs: list[dict[str, Any]] = []
    for item in value if _is_several(value) else [value]:
        if _is_message(item) or (_is_list(item) and any(map(_is_message, item))):
            (messages,) = _conversations(item)
            inputs.append({"messages": _with_system(messages, system), **options})
            continue
        inputs.append({"prompt": _prompt(item)})
        chat_only = {"thinking": thinking, "conversation_id": conversation_id, "system": system}
        for name, given in chat_only.items():
            if given is not None:
                raise RequestError(f"{name}={shown(given)} is for conversations, not raw prompts")
    return _requests(inputs, params)


@contextmanager
def name_prompt(request: TextRequest, number: int, count: int) -> Iterator[None]:
    """Add the number of the prompt to an error, if there are several prompts."""
    try:
        yield
    except RequestError as error:
        if count == 1:
            raise
        noun = "prompts" if request.messages is None else "conversations"
        raise RequestError(f"{noun}[{number}]: {error}") from None


def check_conversation_id(value: Any) -> str | None:
    """Return the name of a conversation, or None."""
    if value is not None and not isinstance(value, str):
        raise RequestError(f"conversation_id={shown(value)} must be a text")
    return value


def _requests(inputs: list[dict[str, Any]], params: Any) -> list[TextRequest]:
    return [
        TextRequest(**fields, params=given or SamplingParams(), limit_is_default=given is None)
        for fields, given in zip(inputs, _params(params, len(inputs)), strict=True)
    ]


def _params(value: Any, count: int) -> list[SamplingParams | None]:
    """Return the parameters of each prompt; None if not given."""
    if value is None or isinstance(value, SamplingParams | Mapping):
        return [_one_params("params", value)] * count
    items = _as_list("params", value)
    if not _is_list(items):
        raise _wrong_params("params", value)
    if len(items) != count:
        raise RequestError(f"{len(items)} params for {count} prompts")
    return [_one_params(f"params[{i}]", item) for i, item in enumerate(items)]


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
    return [_prompt(item) for item in value] if _is_several(value) else [_prompt(value)]


def _is_several(value: Any) -> bool:
    """Return True for a list of prompts or conversations, False for a single one."""
    return _is_list(value) and not any(_is_number(item) or _is_message(item) for item in value)


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
            raise RequestError(f"prompt[{i}]={shown(token_id)} is not a token id") from None
    return ids


def _conversations(value: Any) -> list[list[Any]]:
    value = [value] if _is_message(value) else _as_list("messages", value)
    if not _is_list(value):
        raise RequestError(f"messages={shown(value)} must be a list of messages {_EXAMPLE}")
    if any(map(_is_message, value)):
        return [list(value)]
    for i, item in enumerate(value):
        if not _is_list(item):
            raise RequestError(f"messages[{i}]={shown(item)} must be a message {_EXAMPLE}")
    return [list(item) for item in value]


def _with_system(messages: list[Any], system: Any) -> list[Any]:
    """Return the conversation with a system message first; raise if it already begins with one."""
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
    """Return ordered collections (arrays, tensors, generators) as lists, other values unchanged."""
    value = plain(value)
    if isinstance(value, set | frozenset):
        raise RequestError(f"{name}={shown(value)} is a set, which has no order: give a list")
    is_single = isinstance(value, str | bytes | bytearray | Mapping | os.PathLike)
    return list(value) if isinstance(value, Iterable) and not is_single else value


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | range)


def _is_number(value: Any) -> bool:
    return isinstance(plain(value), int | float)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping)


def stream_pieces(
    outputs: Iterator[RequestOutput],
    numbers: Mapping[str, int],
    thoughts: Mapping[str, ThoughtStream],
    is_only: bool,
) -> Iterator[tuple[int, TextPiece]]:
    """Yield the new text of each output with the number of its answer.

    Args:
        outputs: of the engine.
        numbers: number of the answer, by request id.
        thoughts: split an answer's thoughts from its text, by request id; others are not split.
        is_only: there is one answer: its error is raised, not logged.
    """
    for output in outputs:
        number = numbers[output.request_id]
        stream = thoughts.get(output.request_id)
        plain = [AnswerParts(answer=output.new_text)]
        for parts in plain if stream is None else stream.push_output(output):
            for text in parts.texts():
                yield number, text
        if output.completion is not None and output.completion.error:
            if is_only:
                raise Dsv3Error(output.completion.error)
            log.warning("answer %d: %s", number, output.completion.error)

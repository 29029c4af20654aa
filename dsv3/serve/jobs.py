"""Bodies of requests: from their bytes to the engine's requests and the writer of the response."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dsv3.engine.engine import Engine
from dsv3.errors import RequestError
from dsv3.read_files import parse_json_text
from dsv3.request import Completion, Request, RequestOutput
from dsv3.serve.front import Front
from dsv3.text.openai_answer import ResponseHead
from dsv3.text.openai_format import COMPLETIONS, Fields, parse_request
from dsv3.text.openai_stream import OpenAIWriter
from dsv3.text.text_request import TextRequest, encode_prompt, token_requests

MAX_ANSWERS = 1024  # to all prompts of a request


class Writer(Protocol):
    """Writes a response, whole or as a stream of events."""

    response_id: str
    end: str

    def start(self) -> list[dict[str, Any]]: ...
    def push(self, output: RequestOutput) -> list[dict[str, Any]]: ...
    def finish(self) -> list[dict[str, Any]]: ...
    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]: ...
    def event(self, data: dict[str, Any]) -> str: ...
    def error(self, message: str, status: int, code: str | None = None) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Job:
    """A request that can be answered.

    Attributes:
        requests: the engine's requests, in the order of the answers.
        writer: writes the response.
        is_stream: the response is a stream of events.
    """

    requests: list[Request]
    writer: Writer
    is_stream: bool


JobMaker = Callable[[Front, Engine, bytes], Job]


def parse_body(raw: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        RequestError: it is none.
    """
    try:
        body = parse_json_text(raw.decode())
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 at byte {error.start + 1}") from None
    except ValueError as error:
        raise RequestError(f"the body is {error}") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    return body


def openai_job(url: str) -> JobMaker:
    """Return the maker of jobs of an endpoint in the OpenAI format."""

    def make(front: Front, engine: Engine, raw: bytes) -> Job:
        fields = Fields(parse_body(raw))
        is_stream = fields.truth("stream") or False
        with_usage = _usage_option(fields, is_stream)
        name = uuid.uuid4().hex
        bodies = _one_prompt_each(url, fields.remaining())
        defaults = front.served.defaults
        requests = [
            parse_request(url, body, name if not i else f"{name}-{i}", defaults)
            for i, body in enumerate(bodies)
        ]
        front.check_model(requests[0].model)
        for request in requests if is_stream else ():
            if request.echo and request.params.logprobs is not None:
                raise RequestError("stream=true with echo and logprobs is not supported")
        answers = encode_answers(front, engine, requests, name)
        head = ResponseHead(
            name=name,
            created=front.now(),
            model=front.served.model,
            fingerprint=front.served.fingerprint,
        )
        writer = OpenAIWriter(head, answers, engine.tokenizer, with_usage)
        return Job([tokens for _, tokens in answers], writer, is_stream)

    return make


def encode_answers(
    front: Front, engine: Engine, requests: Sequence[TextRequest], name: str
) -> list[tuple[TextRequest, Request]]:
    """Return the engine's requests, each with the request that it answers."""
    if sum(request.params.n for request in requests) > MAX_ANSWERS:
        raise RequestError(f"more than {MAX_ANSWERS} answers; ask for them in several requests")
    answers: list[tuple[TextRequest, Request]] = []
    for i, request in enumerate(requests):
        ids = encode_prompt(request, engine.tokenizer, front.served.chat_format)
        made = token_requests(request, ids, f"{name}-{i}", engine.max_seq_len, engine.vocab_size)
        engine.grammars.constraint(made[0])  # compiled here, so that the engine need not wait
        deadline = front.limits.request_seconds
        answers += [(request, replace(tokens, deadline=deadline)) for tokens in made]
    return answers


def _usage_option(fields: Fields, is_stream: bool) -> bool:
    options = fields.take("stream_options", lambda v: isinstance(v, dict), "an object")
    if options is not None and not is_stream:
        raise RequestError("stream_options needs stream=true")
    options = Fields(options or {})
    with_usage = options.truth("include_usage") or False
    options.truth("include_obfuscation")  # padding against eavesdroppers; we have none
    for name in options.remaining():
        raise RequestError(f"stream_options.{name} is not supported, only include_usage")
    return with_usage


def _one_prompt_each(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a body for each prompt of a list of prompts."""
    prompt = body.get("prompt")
    is_several = url == COMPLETIONS and isinstance(prompt, list) and len(prompt) > 1
    if not is_several or not all(isinstance(item, str | list) for item in prompt or ()):
        return [body]
    return [body | {"prompt": item} for item in prompt or ()]

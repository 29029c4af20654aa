"""Converts bodies of requests to the engine's requests and the writer of the response."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dsv3.engine.engine import Engine
from dsv3.errors import RequestError, shorten
from dsv3.read_files import parse_json_text
from dsv3.request import Completion, Request, RequestOutput
from dsv3.serve.front import Front
from dsv3.text.anthropic_answer import AnthropicWriter
from dsv3.text.anthropic_format import openai_body
from dsv3.text.openai_answer import ResponseHead
from dsv3.text.openai_fields import Fields, is_whole
from dsv3.text.openai_format import CHAT, COMPLETIONS, parse_request
from dsv3.text.openai_stream import OpenAIWriter
from dsv3.text.text_request import EncodedRequest, TextRequest, encode_prompt, token_requests

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
BodyMaker = Callable[[Front, Engine, bytes], dict[str, Any]]


def parse_body(raw: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        RequestError: the body is not a JSON object.
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
            if request.params.prompt_logprobs is not None:
                what = "prompt_logprobs" if request.list_prompt_logprobs else "echo and logprobs"
                raise RequestError(f"stream=true with {what} is not supported")
        encoded = encode_answers(front, engine, requests, name)
        head = ResponseHead(
            name=name,
            created=int(time.time()),
            model=front.served.model,
            fingerprint=front.served.fingerprint,
        )
        writer = OpenAIWriter(head, encoded, engine.tokenizer, with_usage)
        return Job([each.tokens for each in encoded], writer, is_stream)

    return make


def anthropic_job(front: Front, engine: Engine, raw: bytes) -> Job:
    """Return the job of a request in the Anthropic format."""
    fields = Fields(parse_body(raw))
    is_stream = fields.truth("stream") or False
    name = uuid.uuid4().hex[:24]
    request = _anthropic_request(front, fields.remaining(), name, needs_limit=True)
    (encoded,) = encode_answers(front, engine, [request], name)
    writer = AnthropicWriter(name, front.served.model, encoded, engine.tokenizer)
    return Job([encoded.tokens], writer, is_stream)


def _anthropic_request(
    front: Front, body: dict[str, Any], name: str, needs_limit: bool
) -> TextRequest:
    chat = openai_body(body, needs_limit)
    request = parse_request(CHAT, chat, name, front.served.defaults)
    front.check_model(request.model)
    return request


def count_tokens(front: Front, engine: Engine, raw: bytes) -> dict[str, Any]:
    """Return the number of tokens of a prompt in the Anthropic format."""
    request = _anthropic_request(front, parse_body(raw), "", needs_limit=False)
    ids = encode_prompt(request, engine.tokenizer, front.served.chat_format)
    return {"input_tokens": len(ids)}


def tokenize(front: Front, engine: Engine, raw: bytes) -> dict[str, Any]:
    """Return the tokens of a prompt, or of a chat up to the start of its answer."""
    fields = Fields(parse_body(raw))
    with_special = fields.truth("add_special_tokens")
    body = fields.remaining()
    url = CHAT if "messages" in body else COMPLETIONS
    if url == CHAT and with_special is not None:
        raise RequestError("add_special_tokens is for a prompt; a chat has those of its format")
    request = parse_request(url, body, "", front.served.defaults)
    front.check_model(request.model)
    if with_special is False and isinstance(request.prompt, str) and engine.tokenizer is not None:
        ids = engine.tokenizer.encode(request.prompt, add_special_tokens=False)
    else:
        ids = encode_prompt(request, engine.tokenizer, front.served.chat_format)
    return {"count": len(ids), "max_model_len": engine.max_seq_len, "tokens": ids}


def detokenize(front: Front, engine: Engine, raw: bytes) -> dict[str, Any]:
    """Return the text of tokens."""
    fields = Fields(parse_body(raw))
    front.check_model(fields.text("model") or "")
    last = engine.vocab_size - 1
    rule = f"a list of tokens from 0 to {last}"
    ids = fields.take("tokens", lambda v: isinstance(v, list) and all(map(is_whole, v)), rule)
    if ids is None or not all(0 <= i <= last for i in ids):
        raise RequestError(f"tokens must be {rule}")
    for name in fields.remaining():
        raise RequestError(f"{shorten(name)} is not a supported field")
    if engine.tokenizer is None:
        raise RequestError("this checkpoint has no tokenizer")
    return {"prompt": engine.tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)}


def encode_answers(
    front: Front, engine: Engine, requests: Sequence[TextRequest], name: str
) -> list[EncodedRequest]:
    """Return the requests of all answers."""
    if sum(request.params.n for request in requests) > MAX_ANSWERS:
        raise RequestError(f"more than {MAX_ANSWERS} answers; ask for them in several requests")
    encoded: list[EncodedRequest] = []
    for i, request in enumerate(requests):
        ids = encode_prompt(request, engine.tokenizer, front.served.chat_format)
        made = token_requests(request, ids, f"{name}-{i}", engine)
        engine.grammars.prepare(made[0])
        deadline = front.limits.request_seconds
        encoded += [EncodedRequest(request, replace(one, deadline=deadline)) for one in made]
    return encoded


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
    prompts = body.get("prompt")
    if url != COMPLETIONS or not isinstance(prompts, list) or len(prompts) < 2:
        return [body]
    if not all(isinstance(prompt, str | list) for prompt in prompts):
        return [body]
    if len(prompts) > MAX_ANSWERS:
        raise RequestError(f"more than {MAX_ANSWERS} prompts; send them in several requests")
    return [body | {"prompt": prompt} for prompt in prompts]

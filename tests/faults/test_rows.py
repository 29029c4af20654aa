"""Every kind of malformed row gets its one clear line, and harms no other row."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import pytest

from dsv3.engine.engine import Engine
from dsv3.errors import RequestError
from dsv3.request import Completion, Request, RequestOutput
from dsv3.serve.batch import run_batch
from dsv3.serve.batch_file import BatchInput
from dsv3.serve.journal import BatchJournal
from dsv3.serve.sinks import JournalSink
from dsv3.text.chat import ChatFormat
from dsv3.text.defaults import Defaults
from dsv3.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(Path(__file__).parents[2] / "checkpoints" / "demo-v3")
VOCAB_SIZE = 2048
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MAX_SEQ_LEN = 100


class EchoEngine:
    """Answers at once; refuses what does not fit, in the engine's words."""

    tokenizer: Tokenizer | None = TOKENIZER
    max_seq_len = MAX_SEQ_LEN
    vocab_size = VOCAB_SIZE
    max_running = 4

    def __init__(self) -> None:
        self.requests: list[Request] = []

    @property
    def num_unfinished(self) -> int:
        return len(self.requests)

    def add(self, request: Request) -> None:
        length = len(request.prompt_ids)
        if length >= self.max_seq_len:
            raise RequestError(f"the prompt has {length} tokens, it may have {MAX_SEQ_LEN - 1}")
        self.requests.append(request)

    def task(self, _: str) -> AbstractContextManager[None]:
        return nullcontext()

    def cancel(self, request_id: str) -> None:
        self.requests = [r for r in self.requests if r.request_id != request_id]

    def step(self) -> list[RequestOutput]:
        requests, self.requests = self.requests, []
        return [
            RequestOutput(
                request_id=r.request_id,
                completion=Completion(
                    request_id=r.request_id,
                    prompt_ids=r.prompt_ids,
                    token_ids=[],
                    text="",
                    finish_reason="length",
                ),
            )
            for r in requests
        ]


def chat(**body: Any) -> bytes:
    body = {"messages": [{"role": "user", "content": "Hi"}]} | body
    return json.dumps({"custom_id": "bad", "method": "POST", "url": CHAT, "body": body}).encode()


def text(**body: Any) -> bytes:
    body = {"prompt": "Hi"} | body
    return json.dumps({"custom_id": "bad", "url": COMPLETIONS, "body": body}).encode()


def row(**fields: Any) -> bytes:
    fields = {"custom_id": "bad", "url": CHAT, "body": {}} | fields
    return json.dumps({name: value for name, value in fields.items() if value != ""}).encode()


def message(**fields: Any) -> bytes:
    return chat(messages=[{"role": "user", "content": "Hi"} | fields])


DEEP = b'{"custom_id": "bad", "url": "' + CHAT.encode() + b'", "body": {"messages": ['
DEEP += b"[" * 900 + b"]" * 900 + b"]}}"

MALFORMED = {
    # Not a row at all.
    "truncated": (b'{"custom_id": "x", "body": {', "not JSON: Expecting property name enclosed in"),
    "single quotes": (b"{'custom_id': 'x'}", "not JSON: Expecting property name"),
    "two objects": (b'{"a": 1} {"b": 2}', "not JSON: Extra data (character 10)"),
    "trailing comma": (b'{"custom_id": "x",}', "not JSON: "),
    "control character": (b'{"custom_id": "a\tb"}', "not JSON: Invalid control character at"),
    "list": (b"[1, 2]", "not a JSON object"),
    "text": (b'"hello"', "not a JSON object"),
    "number": (b"17", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "words": (b"What is MLA?", "not JSON: Expecting value (character 1)"),
    "NaN": (b'{"custom_id": "bad", "body": NaN}', "not JSON: NaN is not a number"),
    "infinite number": (b'{"a": -Infinity}', "not JSON: -Infinity is not a number"),
    "endless number": (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit (4300 digits)"),
    "field twice": (b'{"custom_id": "a", "custom_id": "b"}', "custom_id is given twice"),
    "invalid UTF-8": (b'{"custom_id": "\xff"}', "byte 16 (0xff) is not UTF-8"),
    "cut character": (b'{"custom_id": "bad", "x": "\xe8\x83"}', "byte 28 (0xe8) is not UTF-8"),
    "UTF-16": ('{"custom_id": "bad"}'.encode("utf-16"), "byte 1 (0xff) is not UTF-8"),
    "nested too deeply": (b"[" * 100_000, "nested too deeply"),
    "nested deeply": (DEEP, "nested too deeply"),
    # Around the body.
    "no custom_id": (row(custom_id=""), "custom_id is missing"),
    "custom_id null": (row(custom_id=None), "custom_id is missing"),
    "custom_id a number": (row(custom_id=17), "custom_id=17 must be a text, and not empty"),
    "custom_id empty": (b'{"custom_id": ""}', 'custom_id="" must be a text, and not empty'),
    "custom_id repeated": (row(custom_id="good 0"), 'custom_id="good 0" was used before, in row 1'),
    "method": (row(method="GET"), 'method="GET" must be "POST"'),
    "no url": (row(url=""), "url is missing"),
    "url of another kind": (row(url=["x"]), 'url=["x"] must be a text'),
    "url unknown": (row(url="/v1/embeddings"), 'url="/v1/embeddings" is not served; use /v1/chat'),
    "no body": (row(body=""), "body is missing"),
    "body a text": (row(body="hi"), 'body="hi" must be an object'),
    "field beside body": (row(priority=1), "priority is not a field of a row, only custom_id, "),
    # Prompts.
    "no messages": (row(), "messages is missing"),
    "messages a text": (chat(messages="Hi"), 'messages="Hi" must be a list of messages'),
    "messages empty": (chat(messages=[]), "messages is empty; give at least one message"),
    "message a text": (chat(messages=["Hi"]), "messages[0] must be an object with role and"),
    "no role": (message(role=None), "messages[0].role=None is unknown; use one of system, "),
    "role unknown": (message(role="robot"), "messages[0].role='robot' is unknown; use one of"),
    "role unknown to template": (
        message(role="tool"),
        "messages[0].role='tool' is unknown to this",
    ),
    "no content": (message(content=None), "messages[0].content is missing"),
    "content a number": (message(content=5), "messages[0].content must be a text or a list of"),
    "content an image": (
        message(content=[{"type": "image_url", "image_url": {"url": "x"}}]),
        "messages[0].content[0].type='image_url' is not supported, only 'text'",
    ),
    "message field": (message(weight=1), "messages[0].weight is not supported"),
    "half a surrogate pair": (
        message(content="a\ud83d"),
        "the text holds half of a surrogate pair",
    ),
    "prompt in a chat": (chat(prompt="Hi"), "prompt is not a supported field"),
    "messages in a completion": (text(messages=[]), "messages is not a supported field"),
    "no prompt": (text(prompt=None), "prompt is missing"),
    "prompt empty": (text(prompt=""), "prompt is empty"),
    "prompt without tokens": (text(prompt=[]), "prompt is empty"),
    "prompt a number": (text(prompt=5), "prompt=5 must be a text or a list of token ids (one"),
    "several prompts": (text(prompt=["a", "b"]), 'prompt=["a", "b"] must be a text or a list of'),
    "token a truth value": (text(prompt=[True]), "prompt=[true] must be a text or a list of token"),
    "token a fraction": (text(prompt=[1.5]), "prompt=[1.5] must be a text or a list of token ids"),
    "token too high": (text(prompt=[5, 2048]), "prompt[1]=2048 is not a token of this model (0 to"),
    "token negative": (text(prompt=[-1]), "prompt[0]=-1 is not a token of this model (0 to 2047)"),
    "prompt too long": (text(prompt=[5] * 100), "the prompt has 100 tokens, it may have 99"),
    # Parameters.
    "max_tokens negative": (chat(max_tokens=-1), "max_tokens=-1 must be a whole number from 0 to"),
    "max_tokens a text": (chat(max_tokens="5"), 'max_tokens="5" must be a whole number from 0'),
    "max_tokens a fraction": (chat(max_tokens=1.5), "max_tokens=1.5 must be a whole number"),
    "max_tokens twice": (
        chat(max_tokens=1, max_completion_tokens=2),
        "max_tokens=1 and max_completion_tokens=2 mean the same",
    ),
    "temperature a text": (chat(temperature="hot"), 'temperature="hot" must be a number'),
    "temperature negative": (chat(temperature=-1), "temperature=-1 must be between 0 and 100"),
    "top_p zero": (chat(top_p=0), "top_p=0 must be above 0 and at most 1"),
    "top_p above one": (chat(top_p=1.5), "top_p=1.5 must be above 0 and at most 1"),
    "top_k negative": (chat(top_k=-2), "top_k=-2 must be a whole number from -1 to"),
    "n zero": (chat(n=0), "n=0 must be a whole number from 1 to 128"),
    "n huge": (chat(n=10**6), "n=1000000 must be a whole number from 1 to 128"),
    "seed a text": (chat(seed="x"), 'seed="x" must be a whole number from -9223372036854775808'),
    "seed beyond 64 bits": (chat(seed=2**63), "seed=9223372036854775808 must be a whole number"),
    "stop empty": (
        chat(stop=""),
        'stop="" must be a text of 1 to 1024 characters',
    ),
    "stop a number": (chat(stop=5), "stop=5 must be a text of 1 to 1024 characters"),
    "stop of numbers": (
        chat(stop=["a", 5]),
        'stop=["a", 5] must be a text of 1 to 1024 characters',
    ),
    "stop ids texts": (
        chat(stop_token_ids=["a"]),
        'stop_token_ids=["a"] must be a list of up to 64 ids',
    ),
    "stop id too high": (
        chat(stop_token_ids=[2048]),
        "stop_token_ids[0]=2048 is not a token of this",
    ),
    "logprobs a number": (chat(logprobs=5), "logprobs=5 must be true or false"),
    "logprobs a truth value": (text(logprobs=True), "logprobs=true must be a whole number from 0"),
    "logprobs too many": (text(logprobs=21), "logprobs=21 must be a whole number from 0 to 20"),
    "top_logprobs alone": (chat(top_logprobs=2), "top_logprobs needs logprobs=true"),
    "echo in a chat": (chat(echo=True), "echo is not a supported field"),
    "echo a number": (text(echo=1), "echo=1 must be true or false"),
    "stream": (chat(stream=True), "stream=true is not supported, only false"),
    "penalty": (chat(presence_penalty=2.5), "presence_penalty=2.5 must be between -2 and 2"),
    "logit_bias": (chat(logit_bias={"5": 101}), "logit_bias[5]=101"),
    "tools": (
        chat(tools=[{"type": "function"}]),
        'tools[0] must be like {"type": "function", "function": {...}}',
    ),
    "response_format": (
        chat(response_format={"type": "yaml"}),
        'response_format.type="yaml" is not supported, only text, json_object and json_schema',
    ),
    "unknown field": (chat(temprature=0), "temprature is not a supported field"),
    "template option": (
        chat(chat_template_kwargs={"tools": 1}),
        "chat_template_kwargs.tools is not supported, only thinking",
    ),
    "thinking a text": (
        chat(chat_template_kwargs={"thinking": "yes"}),
        'thinking="yes" must be true or false',
    ),
}


def good(index: int) -> bytes:
    return text().replace(b'"bad"', b'"good %d"' % index)


def results(folder: Path, lines: list[bytes]) -> list[dict[str, Any]]:
    """The output of a job with these rows."""
    (folder / "in.jsonl").write_bytes(b"\n".join(lines))
    rows = BatchInput(folder / "in.jsonl", Defaults())
    with BatchJournal(folder / "out.jsonl") as journal:
        journal.resume(rows)
        sink = JournalSink(journal, TOKENIZER)
        run_batch(cast(Engine, EchoEngine()), rows, sink, ChatFormat(TOKENIZER))
    return [json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_row(tmp_path: Path, kind: str) -> None:
    line, reason = MALFORMED[kind]
    lines = results(tmp_path, [good(0), b"", line, good(1)])
    answered = [line["custom_id"] for line in lines if line["response"]["status_code"] == 200]
    assert sorted(answered) == ["good 0", "good 1"]
    (error,) = [line for line in lines if line["response"]["status_code"] == 400]
    assert len(lines) == 3
    assert error["custom_id"] in ("bad", "line-3", "good 0")
    body = error["response"]["body"]["error"]
    assert body["type"] == "invalid_request_error"
    assert body["message"].startswith(f"row 3: {reason}")
    assert "\n" not in body["message"]
    assert len(body["message"]) < 250


def test_all_malformed_rows_in_one_file(tmp_path: Path) -> None:
    # Different ids, since a repeated id is an error of its own.
    bad = [
        line.replace(b'"bad"', b'"bad %d"' % i) for i, (line, _) in enumerate(MALFORMED.values())
    ]
    lines = [line for i, one in enumerate(bad) for line in (good(i), one)]
    got = results(tmp_path, lines)
    assert len(got) == 2 * len(MALFORMED) > 150
    answered = [line["custom_id"] for line in got if line["response"]["status_code"] == 200]
    assert sorted(answered) == sorted(f"good {i}" for i in range(len(MALFORMED)))
    assert results(tmp_path, lines) == got  # final: a second start has nothing to do

"""The batch driver, on an engine that counts instead of thinking."""

import io
import json
import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import pytest

from dsv3.engine.engine import Engine
from dsv3.errors import MAX_LINE, OutputError, RequestError
from dsv3.request import Completion, Request, RequestOutput
from dsv3.serve.batch import BatchSummary, run_batch
from dsv3.serve.batch_file import BatchInput
from dsv3.serve.journal import BatchJournal
from dsv3.serve.progress import Progress
from dsv3.serve.sinks import JournalSink, TextSink
from dsv3.text.chat import ChatFormat
from dsv3.text.defaults import Defaults, Sampling
from dsv3.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(Path(__file__).parents[2] / "checkpoints" / "demo-v3")
VOCAB_SIZE = 2048
CHAT = ChatFormat(TOKENIZER)


class CountingEngine:
    """Answers with `max_tokens` tokens drawn from its key, one a step, `max_running` at a time."""

    def __init__(self, tokenizer: Tokenizer | None = TOKENIZER, max_running: int = 3) -> None:
        self.tokenizer, self.max_running = tokenizer, max_running
        self.max_seq_len, self.vocab_size = 64, VOCAB_SIZE
        self.requests: dict[str, Request] = {}
        self.made: dict[str, list[int]] = {}
        self.most_unfinished = 0

    @property
    def num_unfinished(self) -> int:
        return len(self.requests)

    def task(self, _: str) -> AbstractContextManager[None]:
        return nullcontext()

    def add(self, request: Request) -> None:
        length = len(request.prompt_ids)
        if length + request.params.max_tokens > self.max_seq_len:
            raise RequestError(f"the prompt has {length} tokens, it may have {self.max_seq_len}")
        assert request.request_id not in self.requests
        self.requests[request.request_id] = request
        self.most_unfinished = max(self.most_unfinished, len(self.requests))

    def cancel(self, request_id: str) -> None:
        self.requests.pop(request_id, None)

    def step(self) -> list[RequestOutput]:
        return [self._advance(r) for r in list(self.requests.values())[: self.max_running]]

    def _advance(self, request: Request) -> RequestOutput:
        made = self.made.setdefault(request.request_id, [])
        output = RequestOutput(request_id=request.request_id)
        if len(made) < request.params.max_tokens:
            made.append(50 + (request.params.seed + request.answer + len(made)) % 1000)
            output.new_token_ids.append(made[-1])
        if len(made) == request.params.max_tokens:
            del self.requests[request.request_id]
            output.completion = Completion(
                request_id=request.request_id,
                prompt_ids=request.prompt_ids,
                token_ids=made,
                text=self.tokenizer.decode(made) if self.tokenizer else "",
                finish_reason="length",
            )
        return output


def completion_row(custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"prompt": [5, 6], "max_tokens": 3, "return_token_ids": True} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> BatchInput:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return BatchInput(path, Defaults())


def run(
    rows: BatchInput, out: Path, engine: CountingEngine, chat: ChatFormat | None = CHAT
) -> BatchSummary:
    with BatchJournal(out) as journal:
        journal.resume(rows)
        return run_batch(cast(Engine, engine), rows, JournalSink(journal, engine.tokenizer), chat)


def answers(out: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line["response"] for line in lines}


def test_every_row_is_answered_in_bounded_memory(tmp_path: Path) -> None:
    rows = [completion_row(f"r{i}", max_tokens=1 + 7 * i % 11, seed=i) for i in range(200)]
    engine = CountingEngine()
    summary = run(write_rows(tmp_path / "in", rows), tmp_path / "out", engine)
    got = answers(tmp_path / "out")
    assert got.keys() == {row["custom_id"] for row in rows}
    for i, row in enumerate(rows):
        token_ids = got[row["custom_id"]]["body"]["choices"][0]["token_ids"]
        assert token_ids == [50 + i + k for k in range(row["body"]["max_tokens"])]
    assert engine.most_unfinished <= 2 * engine.max_running
    assert (summary.rows, summary.failed, summary.resumed) == (200, 0, 0)
    assert summary.generated_tokens == sum(row["body"]["max_tokens"] for row in rows)


def test_answers_do_not_depend_on_order_batch_or_interruptions(tmp_path: Path) -> None:
    rows = [completion_row(f"r{i}", max_tokens=1 + i % 4) for i in range(20)]
    run(write_rows(tmp_path / "in", rows), tmp_path / "out", CountingEngine())
    want = {
        name: response["body"]["choices"] for name, response in answers(tmp_path / "out").items()
    }
    assert len({str(choices) for choices in want.values()}) == len(rows)

    class Killed(Exception):
        pass

    class ShortLived(CountingEngine):
        steps = 0

        def step(self) -> list[RequestOutput]:
            self.steps += 1
            if self.steps > 6:
                raise Killed
            return super().step()

    batch = write_rows(tmp_path / "in", rows[::-1])
    kills = 0
    while True:
        try:
            summary = run(batch, tmp_path / "out2", ShortLived(max_running=2))
            break
        except Killed:
            kills += 1
    got = {
        name: response["body"]["choices"] for name, response in answers(tmp_path / "out2").items()
    }
    assert got == want
    assert kills > 2
    assert 0 < summary.resumed < summary.rows == len(rows)


def test_n_answers_come_back_as_one_row(tmp_path: Path) -> None:
    batch = write_rows(tmp_path / "in", [completion_row("a", n=3, seed=7), completion_row("b")])
    run(batch, tmp_path / "out", CountingEngine(max_running=1))
    choices = answers(tmp_path / "out")["a"]["body"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert [choice["token_ids"][0] for choice in choices] == [57, 58, 59]


def test_a_bad_row_harms_no_other(tmp_path: Path) -> None:
    class Picky(CountingEngine):
        def add(self, request: Request) -> None:
            if request.prompt_ids == [9] and request.request_id.endswith("/1"):
                raise KeyError("what no one foresaw")
            super().add(request)

    rows = [
        completion_row("good"),
        completion_row("long", prompt=[5] * 70),
        completion_row("bug", prompt=[9], n=2),
        completion_row("bad", temperature="hot"),
        completion_row("outside", prompt=[5, 2048]),
        completion_row("good too"),
    ]
    engine = Picky()
    summary = run(write_rows(tmp_path / "in", rows), tmp_path / "out", engine)
    got = answers(tmp_path / "out")
    errors = {
        name: response["body"].get("error", {}).get("message") for name, response in got.items()
    }
    assert errors == {
        "good": None,
        "good too": None,
        "long": "row 2: the prompt has 70 tokens, it may have 64",
        "bug": "row 3: internal error: KeyError: 'what no one foresaw'",
        "bad": 'row 4: temperature="hot" must be a number',
        "outside": "row 5: prompt[1]=2048 is not a token of this model (0 to 2047)",
    }
    status = {name: response["status_code"] for name, response in got.items()}
    assert status == dict.fromkeys(got, 400) | {"good": 200, "good too": 200, "bug": 500}
    assert engine.num_unfinished == 0  # the first of two answers was cancelled
    assert summary.failed == 4
    assert str(summary).startswith(f"6 rows: 2 answered, 4 failed (the first: {errors['long']})")


def test_only_failures_of_ours_are_tried_again(tmp_path: Path) -> None:
    chat_row = {
        "custom_id": "chat",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    }
    rows = [completion_row("a"), chat_row, completion_row("bad", n=0)]
    batch, out = write_rows(tmp_path / "in", rows), tmp_path / "out"
    summary = run(batch, out, CountingEngine(), chat=None)
    assert answers(out)["chat"]["status_code"] == 500  # the checkpoint has no chat format
    assert summary.failed == 2
    before = [line for line in out.read_bytes().splitlines() if b'"chat"' not in line]
    summary = run(batch, out, CountingEngine())
    assert answers(out)["chat"]["status_code"] == 200
    assert (summary.rows, summary.resumed, summary.failed) == (3, 2, 1)
    assert set(before) < set(out.read_bytes().splitlines())


def test_without_a_tokenizer_token_ids_are_served_and_text_is_refused(tmp_path: Path) -> None:
    rows = [completion_row("ids"), completion_row("text", prompt="Hi")]
    run(write_rows(tmp_path / "in", rows), tmp_path / "out", CountingEngine(tokenizer=None), None)
    got = answers(tmp_path / "out")
    assert got["ids"]["body"]["choices"][0]["text"] == ""
    assert "this checkpoint has no tokenizer" in got["text"]["body"]["error"]["message"]


def test_text_comes_in_input_order(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"one\n\ntwo\n\xff\nthree\n")

    class Backwards(CountingEngine):
        def step(self) -> list[RequestOutput]:
            return [self._advance(list(self.requests.values())[-1])] if self.requests else []

    out = io.StringIO()
    rows = BatchInput(path, Defaults(flags=Sampling(max_tokens=2)))
    run_batch(cast(Engine, Backwards()), rows, TextSink(out), CHAT)
    prompts = [line for line in out.getvalue().split("\n") if line.startswith("Prompt:")]
    assert prompts == ["Prompt: one", "Prompt: two", "Prompt: ", "Prompt: three"]
    blocks = out.getvalue().split("\n\n")
    assert [block.split("\n")[1].partition(":")[0] for block in blocks if block] == [
        "Completion",
        "Completion",
        "Error",
        "Completion",
    ]
    assert "Error: row 4: byte 1 (0xff) is not UTF-8; convert the file first" in out.getvalue()


def test_a_terminal_that_knows_no_unicode_gets_escapes(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("胡\n")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    run_batch(
        cast(Engine, CountingEngine()),
        BatchInput(tmp_path / "in.txt", Defaults()),
        TextSink(out),
        CHAT,
    )
    assert out.buffer.getvalue().startswith(b"Prompt: \\u80e1\n")  # type: ignore[attr-defined]


def test_a_full_disk_ends_the_job_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"/dev/full: cannot write \(No space left"):
        run(write_rows(tmp_path / "in", [completion_row("a")]), Path("/dev/full"), CountingEngine())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "shown"),
    [(io.StringIO(), "a\x1b[2J\tb\x9b\x00\u202e"), (Terminal(), "a[2J\tb\u202e")],
)
def test_text_commands_no_terminal_and_is_unchanged_elsewhere(
    tmp_path: Path, stream: io.StringIO, shown: str
) -> None:
    (tmp_path / "in.txt").write_text("a\x1b[2J\tb\x9b\x00\u202e\n", newline="")
    run_batch(
        cast(Engine, CountingEngine()),
        BatchInput(tmp_path / "in.txt", Defaults()),
        TextSink(stream),
        CHAT,
    )
    assert stream.getvalue().startswith(f"Prompt: {shown}\nCompletion: ")


def test_a_template_without_end_fails_its_rows_and_no_others(tmp_path: Path) -> None:
    tokenizer = Tokenizer(TOKENIZER._vocabulary, {}, "{{ 'a' * 10 ** 10 }}", "dir/x.jinja")
    chat_rows = [
        {
            "custom_id": f"chat {i}",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": "Hi"}]},
        }
        for i in range(20)
    ]
    batch = write_rows(tmp_path / "in", [*chat_rows, completion_row("a")])
    run(batch, tmp_path / "out", CountingEngine(), ChatFormat(tokenizer))
    got = answers(tmp_path / "out")
    assert got.pop("a")["status_code"] == 200
    assert {response["status_code"] for response in got.values()} == {500}
    message = got["chat 0"]["body"]["error"]["message"]
    assert message == "row 1: dir/x.jinja: chat template: more than 1,024 MiB of memory"


def test_the_error_of_a_row_is_short_and_commands_no_terminal(tmp_path: Path) -> None:
    name = "\x1b[2J\u202e" * 10_000
    run(
        write_rows(tmp_path / "in", [completion_row("a", **{name: 1})]),
        tmp_path / "out",
        CountingEngine(),
    )
    message = answers(tmp_path / "out")["a"]["body"]["error"]["message"]
    assert message.startswith(r"row 1: \x1b[2J\u202e")
    assert message.isprintable() and len(message) <= MAX_LINE


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    stream = Terminal()
    rows = write_rows(tmp_path / "in", [completion_row("a"), completion_row("b", n=0)])
    progress = Progress(rows.count(), 0, stream)
    run_batch(cast(Engine, CountingEngine()), rows, TextSink(io.StringIO()), CHAT, progress)
    assert "2/2" in stream.getvalue()
    assert "tok/s, 1 failed" in stream.getvalue()


def test_elsewhere_a_line_comes_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv3.serve.progress.LOG_SECONDS", 0)
    stream = io.StringIO()
    with caplog.at_level(logging.INFO), Progress(10, 4, stream) as progress:
        progress.tokens(5)
        progress.row(is_failed=True)
    assert stream.getvalue() == ""
    assert "5 of 10 rows, " in caplog.text
    assert "s left, " in caplog.text
    assert ", 1 failed" in caplog.text

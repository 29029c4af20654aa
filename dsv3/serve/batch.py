"""The batch job of rank 0: rows go into the engine as it has room, results out as they finish."""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from dsv3.engine.engine import Engine
from dsv3.errors import CheckpointError, ConfigError, Dsv3Error, OutputError, RequestError, one_line
from dsv3.request import Completion, Request, RequestOutput
from dsv3.serve.batch_file import BatchInput, Row
from dsv3.serve.progress import Progress
from dsv3.serve.sinks import BAD_REQUEST, OUR_FAULT, Sink
from dsv3.text.chat import AnyFormat
from dsv3.text.text_request import encode_prompt, token_requests
from dsv3.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class BatchSummary:
    """How a batch job went.

    Attributes:
        rows: rows of the input.
        resumed: those that an earlier run had done.
        failed: rows without an answer, of this run and of earlier ones.
        first_failure: what is wrong with the first of this run.
        generated_tokens: of this run, as `seconds`.
    """

    rows: int = 0
    resumed: int = 0
    failed: int = 0
    first_failure: str = ""
    generated_tokens: int = 0
    seconds: float = 0.0

    @property
    def has_no_answer(self) -> bool:
        """True if there were rows, and all have failed."""
        return 0 < self.rows == self.failed

    def __str__(self) -> str:
        text = f"{self.rows} rows: {self.rows - self.failed} answered, {self.failed} failed"
        if self.first_failure:
            text += f" (the first: {self.first_failure})"
        if self.resumed:
            text += f"; {self.resumed} were done before"
        rate = self.generated_tokens / max(self.seconds, 1e-9)
        return f"{text}; {self.generated_tokens} tokens in {self.seconds:.1f} s, {rate:.0f} tok/s"


def prewarm_prompts(
    rows: BatchInput, tokenizer: Tokenizer | None, chat: AnyFormat | None
) -> list[list[int]]:
    """Return the tokens of the prompts in a `--prewarm` file; any bad row refuses the file."""
    prompts = []
    for row in rows:
        try:
            if row.request is None:
                raise RequestError(row.error)
            prompts.append(encode_prompt(row.request, tokenizer, chat))
        except (RequestError, CheckpointError) as error:
            raise ConfigError(f"{rows.source}, row {row.number}: {error}") from None
    return prompts


def run_batch(
    engine: Engine,
    rows: Iterable[Row],
    sink: Sink,
    chat: AnyFormat | None,
    progress: Progress | None = None,
) -> BatchSummary:
    """Answer all rows that have no answer yet.

    Args:
        engine: answers requests.
        rows: read as the engine has room, so that memory does not grow with their number.
        sink: gets each row's result as soon as it is there.
        chat: writes conversations; None where the model has no format for them.
        progress: shows how far it is.
    """
    batch = _Batch(engine, sink, chat, progress or Progress(None, 0))
    batch.summary.failed = sink.failed_before
    with batch.progress:
        batch.run(iter(rows))
    sink.finish()
    return batch.summary


@dataclass(slots=True)
class _Batch:
    engine: Engine
    sink: Sink
    chat: AnyFormat | None
    progress: Progress
    summary: BatchSummary = field(default_factory=BatchSummary)
    # Rows in the engine, and the answers they have so far.
    unfinished: dict[str, tuple[Row, list[Completion | None]]] = field(default_factory=dict)

    def run(self, rows: Iterator[Row]) -> None:
        start = time.perf_counter()
        more = True
        while more or self.unfinished:
            more = more and self._feed(rows)
            for output in self.engine.step() if self.unfinished else ():
                self._take(output)
            self.summary.seconds = time.perf_counter() - start

    def _feed(self, rows: Iterator[Row]) -> bool:
        """Start rows while the engine has room for as many again as it runs at a time."""
        while self.engine.num_unfinished < 2 * self.engine.max_running:
            row = next(rows, None)
            if row is None:
                return False
            self.summary.rows += 1
            if row in self.sink:
                self.summary.resumed += 1
            else:
                self._start(row)
        return True

    def _start(self, row: Row) -> None:
        self.sink.begin(row)
        if row.request is None:
            self._fail(row, BAD_REQUEST, row.error or "", row.code)
            return
        name = str(row.number)
        requests: list[Request] = []
        try:
            with self.engine.task(f"writing the prompt of row {row.number}"):
                ids = encode_prompt(row.request, self.engine.tokenizer, self.chat)
            requests = token_requests(
                row.request, ids, name, self.engine.max_seq_len, self.engine.vocab_size
            )
            for request in requests:
                self.engine.add(request)
        except Exception as error:  # whatever one row does, the others go on
            for request in requests:
                self.engine.cancel(request.request_id)
            self._fail_for(row, error)
        else:
            self.unfinished[name] = row, [None] * len(requests)

    def _take(self, output: RequestOutput) -> None:
        """Note what a step added; a row whose last answer is there is done."""
        self.summary.generated_tokens += len(output.new_token_ids)
        self.progress.tokens(len(output.new_token_ids))
        if output.completion is None:
            return
        name, index = output.request_id.split("/")
        row, completions = self.unfinished[name]
        completions[int(index)] = output.completion
        done = [completion for completion in completions if completion is not None]
        if len(done) < len(completions):
            return
        del self.unfinished[name]
        if errors := [completion.error for completion in done if completion.error]:
            self._fail(row, OUR_FAULT, errors[0], None)
            return
        try:
            self.sink.answer(row, done)
        except OutputError:
            raise
        except Exception as error:  # an answer that cannot be written down
            self._fail_for(row, error)
        else:
            self.progress.row(failed=False)

    def _fail_for(self, row: Row, error: Exception) -> None:
        if isinstance(error, RequestError):
            self._fail(row, BAD_REQUEST, str(error), "invalid_request")
        elif isinstance(error, Dsv3Error):
            self._fail(row, OUR_FAULT, str(error), None)
        else:
            log.debug("row %d: internal error", row.number, exc_info=error)
            self._fail(row, OUR_FAULT, f"internal error: {type(error).__name__}: {error}", None)

    def _fail(self, row: Row, status: int, message: str, code: str | None) -> None:
        message = one_line(f"row {row.number}: {message}")
        self.summary.failed += 1
        self.summary.first_failure = self.summary.first_failure or message
        self.sink.fail(row, status, message, code)
        self.progress.row(failed=True)

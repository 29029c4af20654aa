"""Outputs of a batch job: result lines in a journal, or text on standard output."""

import time
from collections.abc import Sequence
from typing import TextIO

from dsv3.request import Completion
from dsv3.serve.batch_file import Row, result_line
from dsv3.serve.journal import BatchJournal
from dsv3.serve.terminal import harmless, write_text
from dsv3.text.openai_answer import ResponseHead, error_body, response_body
from dsv3.text.tokenizer import Tokenizer


class JournalSink:
    """Writes one result line per row into a journal.

    Attributes:
        failed_before: rows that earlier runs have refused as bad requests.
    """

    def __init__(self, journal: BatchJournal, tokenizer: Tokenizer | None) -> None:
        self._journal = journal
        self._tokenizer = tokenizer
        self.failed_before = journal.num_failed

    def __contains__(self, row: Row) -> bool:
        """Return True if an earlier run has finished this row."""
        return row in self._journal

    def begin(self, row: Row) -> None:
        """Do nothing: lines are written in order of completion."""

    def answer(self, row: Row, completions: Sequence[Completion]) -> None:
        """Write the answers as a response with status 200."""
        assert row.request is not None
        head = ResponseHead(
            name=row.digest,
            created=int(time.time()),
            model=row.request.model,
            fingerprint=self._journal.fingerprint,
        )
        requests = [row.request] * len(completions)
        body = response_body(head, requests, completions, self._tokenizer)
        self._journal.write(result_line(row, 200, body))

    def fail(self, row: Row, status: int, message: str, code: str | None) -> None:
        """Write the error as a response with its status."""
        self._journal.write(result_line(row, status, error_body(message, status, code)))

    def finish(self) -> None:
        """Sync all results to disk."""
        self._journal.finish()


class TextSink:
    """Writes `Prompt:` and `Completion:` in input order, like DeepSeek's generate.py."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failed_before = 0
        self._texts: dict[int, str | None] = {}  # by row, in input order; None for unfinished rows

    def __contains__(self, row: Row) -> bool:
        return False

    def begin(self, row: Row) -> None:
        """Reserve the row's place in the output."""
        self._texts[row.number] = None

    def answer(self, row: Row, completions: Sequence[Completion]) -> None:
        """Write the prompt and each answer."""
        texts = [f"Completion: {completion.text}" for completion in completions]
        self._write(row, "\n".join(texts))

    def fail(self, row: Row, status: int, message: str, code: str | None) -> None:
        """Write the prompt and the error."""
        self._write(row, f"Error: {message}")

    def finish(self) -> None:
        """Do nothing: each text is flushed when it is written."""

    def _write(self, row: Row, text: str) -> None:
        text = f"Prompt: {_prompt_text(row)}\n{text}\n\n"
        self._texts[row.number] = harmless(text) if self._stream.isatty() else text
        while self._texts:
            number, finished = next(iter(self._texts.items()))
            if finished is None:
                break
            del self._texts[number]
            write_text(self._stream, finished)


Sink = JournalSink | TextSink


def _prompt_text(row: Row) -> str:
    """Return a row's prompt or last message as text."""
    if row.request is None:
        return ""
    if row.request.messages:
        last = row.request.messages[-1]
        return str(last.get("content")) if isinstance(last, dict) else str(last)
    return str(row.request.prompt)

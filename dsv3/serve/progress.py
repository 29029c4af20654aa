"""How far a batch job is."""

import logging
import sys
import time
from contextlib import AbstractContextManager
from typing import TextIO

from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_SECONDS = 30.0  # between lines of progress where there is no terminal


class Progress(AbstractContextManager["Progress"]):
    """A bar on a terminal, a line in the log now and then elsewhere."""

    def __init__(self, total: int | None, done: int, stream: TextIO | None = None) -> None:
        stream = stream or sys.stderr
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="row",
            file=stream,
            disable=not stream.isatty(),
            dynamic_ncols=True,
        )
        self._total, self._first, self._rows = total, done, done
        self._num_tokens, self._num_failed = 0, 0
        self._start = self._logged = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def tokens(self, count: int) -> None:
        """Count generated tokens."""
        self._num_tokens += count

    def row(self, failed: bool) -> None:
        """Count a row that is done."""
        self._rows += 1
        self._num_failed += failed
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = f"{self._num_tokens / seconds:.0f} tok/s"
        self._bar.set_postfix_str(f"{rate}, {self._num_failed} failed", refresh=False)
        self._bar.update()
        if self._bar.disable and time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            log.info("%s, %s, %d failed", self._rows_text(seconds), rate, self._num_failed)

    def _rows_text(self, seconds: float) -> str:
        rate = (self._rows - self._first) / seconds
        text = f"{self._rows} of {self._total or '?'} rows, {rate:.2f} rows/s"
        if self._total:
            text += f", {(self._total - self._rows) / rate:.0f} s left"
        return text

"""Progress of a batch job."""

import logging
import sys
import time
from contextlib import AbstractContextManager
from typing import TextIO

from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_SECONDS = 30.0  # between lines of progress without a terminal


class Progress(AbstractContextManager["Progress"]):
    """A progress bar on a terminal; otherwise a line in the log from time to time."""

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
        self._total = total
        self._num_resumed = done
        self._num_rows = done
        self._num_tokens = 0
        self._num_failed = 0
        self._start = time.monotonic()
        self._logged = self._start

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def tokens(self, count: int) -> None:
        """Count generated tokens."""
        self._num_tokens += count

    def row(self, is_failed: bool) -> None:
        """Count a finished row."""
        self._num_rows += 1
        self._num_failed += is_failed
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = f"{self._num_tokens / seconds:.0f} tok/s"
        self._bar.set_postfix_str(f"{rate}, {self._num_failed} failed", refresh=False)
        self._bar.update()
        if self._bar.disable and time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            log.info("%s, %s, %d failed", self._rows_text(seconds), rate, self._num_failed)

    def _rows_text(self, seconds: float) -> str:
        rate = (self._num_rows - self._num_resumed) / seconds
        text = f"{self._num_rows} of {self._total or '?'} rows, {rate:.2f} rows/s"
        if self._total:
            text += f", {(self._total - self._num_rows) / rate:.0f} s left"
        return text

"""JSON Lines that a program writes as each of its cases begins and ends.

Rows of finished cases survive the end of the process, the last line names the case that ended it,
and the next process runs the cases that have not begun.
"""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchlib.table import Row
from dsv3.errors import OutputError, one_line, os_errors_as
from dsv3.files import Format, NamedFile, check_output

PASSED = "passed"
FAILED = "failed"
SKIPPED = "skipped"

_FORMAT = Format("rows of cases", re.compile(rb'\{"(begin|case)":'))
# After one of these errors every later call of the process on the device fails.
_SPOILED = re.compile(
    r"CUDA error|AcceleratorError|illegal memory access|misaligned address|device-side assert"
    r"|unspecified launch failure|illegal instruction|CUBLAS_STATUS_EXECUTION_FAILED"
)


def spoils_device(text: str) -> bool:
    """Return True if an error's text says that the process can no longer use its GPU."""
    return bool(_SPOILED.search(text))


def describe(error: Exception) -> str:
    """Return an error of any library as one line: its type and text; of a difference, the text."""
    text = str(error).strip()
    is_difference = isinstance(error, AssertionError) and text
    return one_line(text if is_difference else f"{type(error).__name__}: {text}")


class CaseLog:
    """Writes the lines of cases.

    Args:
        path: the file; an existing one is continued. None writes nothing.
        flag: the flag that names the file.
    """

    def __init__(self, path: Path | None, flag: str = "") -> None:
        self._path = path
        self.begun: frozenset[str] = frozenset()
        if path is not None:
            check_output(NamedFile(flag, path), _FORMAT)
            records = _read_records(path)
            self.begun = frozenset(record["begin"] for record in records if "begin" in record)

    def begin(self, case: str) -> None:
        """Write that a case begins."""
        self._write({"begin": case, "at": round(time.time(), 2)})

    def end(self, case: str, why: str = "", figures: Mapping[str, Any] | None = None) -> None:
        """Write the result of a case, which has passed unless there is a reason.

        Args:
            case: its name.
            why: the difference or the error; empty if there is none.
            figures: more columns.
        """
        self._write(
            {"case": case, "result": FAILED if why else PASSED}
            | ({"why": why} if why else {})
            | dict(figures or {})
        )

    def skip(self, case: str, why: str) -> None:
        """Write that a case cannot run here."""
        self._write({"case": case, "result": SKIPPED, "why": why})

    def _write(self, record: Row) -> None:
        if self._path is None:
            return
        with os_errors_as(OutputError, str(self._path)), self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


@dataclass(slots=True)
class CaseResults:
    """The cases of a log.

    Attributes:
        rows: results of the cases that have ended.
        unended: cases that have begun and not ended.
    """

    rows: list[Row] = field(default_factory=list)
    unended: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Row]:
        """Rows of failed cases."""
        return [row for row in self.rows if row["result"] == FAILED]

    @property
    def has_spoiled_device(self) -> bool:
        """True if the last case left a process that cannot use its GPU."""
        return bool(self.rows) and spoils_device(self.rows[-1].get("why", ""))


def read_results(path: Path) -> CaseResults:
    """Return the cases of a log; none if it does not exist."""
    results = CaseResults()
    for record in _read_records(path):
        if "begin" in record:
            results.unended.append(record["begin"])
            continue
        results.rows.append(record)
        if record["case"] in results.unended:
            results.unended.remove(record["case"])
    return results


def _read_records(path: Path) -> list[Row]:
    """Return the lines of a regular file; a line that was cut is left out."""
    if not path.is_file():
        return []
    with os_errors_as(OutputError, str(path)):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.keys() & {"begin", "case"}:
            records.append(record)
    return records

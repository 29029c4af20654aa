"""Results of the parts: a table for the terminal, and a file for programs."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from benchlib.table import Row, table_lines
from dsv3.errors import OutputError, one_line, os_errors_as

Status = Literal["passed", "failed", "incomplete", "skipped"]
_MOST_PROBLEMS = 40


@dataclass(slots=True)
class PartResult:
    """The result of a part.

    Attributes:
        name: the part.
        status: incomplete if time ran out before all cases had run, or a package is missing;
            skipped if this machine cannot run it.
        summary: counts in one line, or the reason why it was skipped.
        problems: a line for each failure.
        tables: measured times by the title of their table; its rows have the same columns.
        seconds: wall-clock time, which parts that run side by side share.
    """

    name: str
    status: Status = "passed"
    summary: str = ""
    problems: list[str] = field(default_factory=list)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    seconds: float = 0.0

    def fail(self, problem: str) -> None:
        """Add a problem."""
        self.status = "failed"
        self.problems.append(problem)

    def add_end(self, name: str, fault: str, out_of_time: bool) -> None:
        """Record the end of a process that has no case log."""
        if out_of_time:
            self.leave_unfinished()
        elif fault:
            self.fail(f"{name}: {fault}")

    def leave_unfinished(self) -> None:
        """Record that not everything was checked."""
        if self.status == "passed":
            self.status = "incomplete"


@dataclass(slots=True)
class CheckReport:
    """All results.

    Attributes:
        machine: lines about the machine and the checkout.
        setting: the same, by name.
        parts: results so far.
        notes: lines at the end.
        was_interrupted: not all parts have a result.
    """

    machine: list[str]
    setting: Row
    parts: list[PartResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    was_interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0 if all parts have passed, otherwise 1."""
        is_bad = any(part.status in ("failed", "incomplete") for part in self.parts)
        return int(is_bad or self.was_interrupted)

    def lines(self) -> list[str]:
        """Return the report as text; problems come last, where a terminal shows them."""
        lines = list(self.machine)
        for part in self.parts:
            for title, rows in part.tables.items():
                lines += ["", f"{part.name}: {title}", *table_lines(rows)] if rows else []
        lines += ["", *table_lines([_table_row(part) for part in self.parts])]
        problems = [f"{part.name}: {text}" for part in self.parts for text in part.problems]
        if problems:
            lines += ["", "problems:"]
            lines += [f"- {one_line(problem)}" for problem in problems[:_MOST_PROBLEMS]]
        if len(problems) > _MOST_PROBLEMS:
            lines.append(f"- {len(problems) - _MOST_PROBLEMS} more are in results.json")
        return [*lines, "", *self.notes]

    def write(self, folder: Path) -> None:
        """Write summary.txt and results.json."""
        result = {
            "gpu_check": self.setting,
            "passed": self.exit_code == 0,
            "parts": [asdict(part) for part in self.parts],
            "notes": self.notes,
        }
        with os_errors_as(OutputError, f"OUT={folder}"):
            (folder / "summary.txt").write_text("\n".join(self.lines()) + "\n", encoding="utf-8")
            (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")


def _table_row(part: PartResult) -> Row:
    row = {"part": part.name, "result": part.status, "s": round(part.seconds)}
    return row | {"found": part.summary}

"""The report of a benchmark: a table, a JSON file, a plot."""

import argparse
import json
import os
import platform
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchlib.table import Row, cell, table_lines
from dsv3.errors import RankError
from dsv3.files import Format, NamedFile, check_output, write_output
from picture import check_picture, pyplot, write_picture
from program_files import check_files

_JSON = Format("the report of a benchmark", re.compile(rb'\{\s*"benchmark":'))


@dataclass(slots=True)
class Report:
    """The result of one benchmark.

    Attributes:
        rows: rows of the table, all with the same columns.
        notes: lines below the table, such as ratios and the figures they are computed from.
        tables: title -> rows of a further table, printed below.
        failures: a line for each case that could not be measured.
        series: name -> (xs, ys), the curves of the plot; a series of one point is a bar.
        setting: flags and machine that the figures depend on.
        is_computed: the figures do not depend on this machine.
    """

    benchmark: str
    x_label: str = ""
    y_label: str = ""
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    series: dict[str, tuple[Sequence[Any], Sequence[float]]] = field(default_factory=dict)
    setting: Row = field(default_factory=dict)
    is_computed: bool = False

    def __str__(self) -> str:
        lines = [_described(self.setting), "", *table_lines(self.rows)]
        for title, rows in self.tables.items():
            lines += ["", f"{title}:", *table_lines(rows)]
        return "\n".join([*lines, "", *self.notes])

    def publish(self, json_file: Path | None = None, plot_file: Path | None = None) -> None:
        """Print the report, and write it to the given files."""
        print(self)
        if json_file:
            self.write_json(json_file)
        if plot_file:
            self.plot(plot_file)

    def raise_failures(self) -> None:
        """Raise RankError that names the failures, if there are any."""
        if self.failures:
            raise RankError(f"failed, without figures: {'; '.join(self.failures)}")

    def write_json(self, path: Path) -> None:
        """Write the report as one JSON object."""
        write_output(
            NamedFile("--json", path),
            _JSON,
            json.dumps(asdict(self), indent=1, allow_nan=False) + "\n",
        )

    def plot(self, path: Path) -> None:
        """Draw the series."""
        figure, axes = pyplot().subplots(layout="constrained")
        for name, (xs, ys) in self.series.items():
            if len(xs) == 1:
                axes.bar_label(axes.bar(xs, ys, label=name), fmt=cell)
            else:
                axes.plot(xs, ys, marker="o", label=name)
                for x, y in zip(xs, ys, strict=True):
                    axes.annotate(cell(y), (x, y), (0, 5), textcoords="offset points", fontsize=7)
        axes.set(xlabel=self.x_label, ylabel=self.y_label, ylim=(0, None))
        setting = textwrap.fill(_described(self.setting), 100)
        figure.suptitle(self.benchmark)
        axes.set_title(setting, fontsize=7)
        axes.legend()
        write_picture(figure, path, dpi=100)


def check_report(
    args: argparse.Namespace, inputs: Sequence[str] = (), outputs: Sequence[str] = ()
) -> None:
    """Raise before measuring if a file cannot be written or a plot cannot be drawn.

    Args:
        args: parsed flags; `json` and `plot` are the files of `Report.publish`.
        inputs: flags that name files to read.
        outputs: other flags that name files to write.
    """
    check_files(args, inputs, ("--json", "--plot", *outputs))
    if args.json:
        check_output(NamedFile("--json", args.json), _JSON)
    check_picture(getattr(args, "plot", None))


def machine(world_size: int) -> Row:
    """Return the machine's properties that figures depend on."""
    return {
        "ranks": world_size,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _described(setting: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())

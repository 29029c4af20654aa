"""Run convert.py in this process, and look at the files it leaves."""

import contextlib
import dataclasses
import sys
from pathlib import Path

import pytest

from dsv3.checkpoint.source import open_source
from dsv3.errors import CheckpointError
from launch import convert as cli
from tests.checkpoint_files import FP8, TINY

CONFIG = dataclasses.replace(TINY, quantization=FP8, num_nextn_predict_layers=1)


class Convert:
    """Runs the program in this process: exit code, output, error output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, source: Path, target: Path | None, *flags: object) -> tuple[int, str, str]:
        argv = ["convert.py", "--hf-ckpt-path", source]
        argv += ["--save-path", target, *flags] if target else flags
        self._monkeypatch.setattr(sys, "argv", [str(arg) for arg in argv])
        try:
            code = cli.main()
        except SystemExit as error:
            code = int(str(error.code))
        out, err = self._capsys.readouterr()
        return code, out, err


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def looks_whole(folder: Path) -> bool:
    with contextlib.suppress(CheckpointError):
        open_source(folder, CONFIG).close()
        return True
    return False

"""Run convert.py in this process, and look at the files it leaves."""

import contextlib
import dataclasses
import sys
from pathlib import Path

import pytest

import convert as cli
from dsv3.checkpoint.directory import INDEX, SINGLE
from dsv3.checkpoint.source import open_source
from dsv3.errors import CheckpointError
from tests.checkpoint_files import FP8, TINY, random_tensors, write_hf

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


def everything(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files below a directory."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def old_hugging_face(folder: Path) -> None:
    """Write a checkpoint in two files and an index, to be replaced by a conversion."""
    write_hf(folder, CONFIG, random_tensors(CONFIG, seed=5), files=2)


def old_single_file(folder: Path) -> None:
    """Write a checkpoint in one file without an index, to be replaced by a conversion."""
    write_hf(folder, CONFIG, random_tensors(CONFIG, seed=5), files=1)
    (folder / INDEX).unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / SINGLE)

"""A checkpoint to convert, and the program that does."""

from pathlib import Path

import pytest

from tests.checkpoint_files import random_tensors, write_hf
from tests.faults.converting import CONFIG, Convert


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf", CONFIG, random_tensors(CONFIG))


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Convert:
    return Convert(monkeypatch, capsys)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"

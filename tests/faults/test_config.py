"""Configuration files as both programs meet them: one line for each fault, one for unknown keys."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsv3.config_files import DEMO
from tests.faults.converting import Convert
from tests.forked import run_forked
from tests.programs import GENERATE, our_lines

UNKNOWN = "config.json: keys without a meaning here are ignored: 'future_key', 'other_key'"


def demo_with(folder: Path, change: dict[str, Any]) -> Path:
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' must be a mapping of names to values"),
        ({"q_lora_rank": 128.0}, "q_lora_rank=128.0 must be a positive integer"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_type='default' and"),
    ],
)
def test_faults_are_one_line(
    change: dict[str, Any], words: str, tmp_path: Path, convert: Convert
) -> None:
    folder = demo_with(tmp_path / "demo", change)
    code, _, err = convert(folder, tmp_path / "out", "--model-parallel", 1, "--dry-run")
    assert code == 2
    rows = tmp_path / "rows.txt"
    rows.write_text("hello\n")
    done = run_forked([GENERATE, "--ckpt-path", str(folder), "--input-file", str(rows)])
    assert done.returncode == 2
    for text in (err, done.stderr):
        (line,) = text.splitlines()
        assert line.startswith(f"error: {folder / 'config.json'}: {words}")


@pytest.mark.parametrize("ranks", [1, 2])
def test_unknown_keys_are_one_warning(ranks: int, tmp_path: Path) -> None:
    folder = demo_with(tmp_path / "demo", {"future_key": 1, "other_key": None})
    rows, output = tmp_path / "rows.txt", tmp_path / "out.jsonl"
    rows.write_text("hello\n")
    files = ["--input-file", str(rows), "--output-file", str(output)]
    done = run_forked([GENERATE, "--ckpt-path", str(folder), *files], num_ranks=ranks)
    assert done.returncode == 0, done.stderr
    lines = [line for line in our_lines(done.stderr) if "ignored" in line]
    assert lines == [UNKNOWN]


def test_unknown_keys_are_one_warning_of_the_converter(tmp_path: Path, convert: Convert) -> None:
    folder = demo_with(tmp_path / "demo", {"future_key": 1, "other_key": None})
    code, _, err = convert(folder, tmp_path / "out", "--model-parallel", 1)
    assert (code, err) == (0, f"warning: {UNKNOWN}\n")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["future_key"] == 1

"""Flags of generate.py: conflicting files and useless flags are refused at once."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import generate
from dsv3.errors import ConfigError
from program_files import check_files
from tests.checkpoint_files import TINY, random_tensors, write_hf
from tests.programs import ROOT

Parse = Callable[..., argparse.Namespace]
OUTPUTS = ["--output-file", "--stats-file", "--record-expert-load"]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    def parse(*flags: object) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags)])
        return generate.parse_args()

    return parse


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.txt"
    path.write_text("one\n")
    return path


@pytest.mark.parametrize("flag", OUTPUTS)
def test_an_output_is_no_input(flag: str, parse: Parse, rows: Path, tmp_path: Path) -> None:
    names = {name: tmp_path / name for name in ("link", "far", "hard")}
    names["link"].symlink_to(rows)
    names["far"].symlink_to("link")
    os.link(rows, names["hard"])
    other = tmp_path / "other.json"
    other.write_text("{}")
    for path in (rows, tmp_path / "." / "rows.txt", *names.values()):
        with pytest.raises(ConfigError, match=rf"^{flag}=.*the same file as --input-file=.*rows"):
            parse("--input-file", rows, flag, path)
    for source in ("--prewarm", "--config", "--expert-placement"):
        with pytest.raises(ConfigError, match=f"^{flag}=.*the same file as {source}="):
            parse("--input-file", rows, source, other, flag, other)
    parse("--input-file", rows, "--prewarm", rows, flag, tmp_path / "new")


def test_outputs_differ_from_each_other(
    parse: Parse, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").symlink_to(tmp_path)
    same = "--output-file", tmp_path / "new", "--stats-file", tmp_path / "folder" / "new"
    with pytest.raises(ConfigError, match=r"--stats-file=.* the same file as --output-file="):
        parse("--input-file", rows, *same)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"--log-dir=.*rank3.log: the same file as --stats-file"):
        parse("--input-file", rows, "--log-dir", tmp_path, "--stats-file", tmp_path / "rank3.log")
    parse("--input-file", rows, "--output-file", "/dev/null", "--stats-file", "/dev/null")


@pytest.mark.slow
def test_standard_output_is_an_output(rows: Path, tmp_path: Path) -> None:
    """A file that answers go to is no other file of the job; messages may go there, too."""
    job = [sys.executable, str(ROOT / "launch" / "generate.py"), "--input-file", str(rows)]
    answers, figures = tmp_path / "answers", ("--stats-file", "/dev/stdout")
    for file, flags, reason in (
        (rows, [], "/dev/stdout: the same file as --input-file="),
        (answers, figures, "--stats-file=/dev/stdout: the same file as /dev/stdout"),
        (answers, ["--ckpt-path", tmp_path / "none"], "none: no such directory"),
    ):
        with file.open("ab") as output:
            command = [*job, *map(str, flags)]
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
        assert done.returncode == 2
        assert reason in file.read_text()
    assert rows.read_text().startswith("one\nerror: ")


@pytest.mark.slow
def test_closed_standard_streams(rows: Path, tmp_path: Path) -> None:
    job = f"{sys.executable} {ROOT / 'launch' / 'generate.py'} --input-file {rows}"
    done = subprocess.run(f"{job} >&-", shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: standard output is closed; give --output-file for the answers\n"
    flags = f"--output-file {tmp_path / 'out'} --max-new-tokens 1 --debug"
    done = subprocess.run(f"{job} {flags} <&- >&- 2>&-", shell=True, text=True, check=False)
    assert done.returncode == 0
    assert [line[:5] for line in (tmp_path / "out").read_text().splitlines()] == ['{"id"']


def test_files_of_the_checkpoint(parse: Parse, rows: Path, tmp_path: Path) -> None:
    model = write_hf(tmp_path / "model", TINY, random_tensors(TINY))
    weights = next(model.glob("*.safetensors"))
    (tmp_path / "away").symlink_to(weights)
    (tmp_path / "here").symlink_to(model)
    asked = ("--input-file", rows, "--ckpt-path", model)
    for flag in OUTPUTS:
        with pytest.raises(ConfigError, match=r"the same file as --ckpt-path=.*safetensors"):
            parse(*asked, flag, tmp_path / "away")
        for name in ("config.json", "manifest.json", "tokenizer_config.json", weights.name):
            with pytest.raises(ConfigError, match="the name of a checkpoint's file"):
                parse(*asked, flag, tmp_path / "here" / name)
        parse(*asked, flag, model / "results.jsonl")


def test_presets_are_inputs(tmp_path: Path) -> None:
    args = argparse.Namespace(config="v3-671b", json=generate.DEMO.parents[1] / "configs")
    args.json /= "v3-671b.yaml"
    with pytest.raises(ConfigError, match="the same file as --config="):
        check_files(args, outputs=("--json",))


def test_flags_without_a_meaning_are_refused(parse: Parse, rows: Path, tmp_path: Path) -> None:
    text, chat = ("--input-file", rows), ("--interactive",)
    for flags, reason in (
        ((*text, "--prompt", "x"), "give --input-file or --prompt, not both"),
        (("--prompt", "x", "--prompt", "y"), "give --prompt once; an --input-file holds several"),
        (("--output-file", tmp_path / "x"), "--output-file requires --input-file"),
        (("--prompt", "x", "--strict"), "--strict requires --input-file"),
        (("--on-full", "stop"), "--on-full is for a chat; add --interactive, or leave it out"),
        ((*text, "--no-history"), "--no-history is for a chat; add --interactive"),
        ((*text, "--overwrite"), "--overwrite requires --output-file"),
        ((*text, "--hardware", "h100"), "--hardware gives the ceilings of --profile"),
        (("--input-file", "-", "--prewarm", "-"), "--prewarm=-: --input-file reads it already"),
        ((*text, *chat), "give --interactive or --input-file, not both"),
        ((*chat, "--strict"), "--strict requires --input-file"),
        ((*chat, "--overwrite"), "--overwrite requires --output-file"),
        ((*chat, "--prompt-separator", "line"), "requires --input-file or --prewarm"),
        ((*chat, "--output-file", tmp_path / "x"), "requires --input-file"),
    ):
        with pytest.raises(ConfigError, match=reason):
            parse(*flags)


def test_deepseeks_own_command_lines(parse: Parse, rows: Path, tmp_path: Path) -> None:
    own = ("--ckpt-path", tmp_path, "--config", rows)
    parse(*own, "--interactive", "--temperature", 0.7, "--max-new-tokens", 200)
    parse(*own, "--input-file", rows)

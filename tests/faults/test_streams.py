"""Prompts, rows and results through pipes, as shells connect programs."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.forked import run_forked
from tests.programs import ALONE, GENERATE, HANG_SECONDS, environment, our_lines, torchrun

ANSWER = "MLA is multi-head latent attention; it caches one small latent vector per token."
ROW = json.dumps(
    {
        "custom_id": "a",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "What is MLA?"}]},
    }
)
SMALL = ["--kv-cache-size", "2048tok", "--device", "cpu"]


def shell(script: str, **names: str) -> "subprocess.CompletedProcess[str]":
    """Run a script of bash in which `generate` is the program on one rank, `on_two` on two."""
    alone, two = (shlex.join([*each, GENERATE, *SMALL]) for each in (ALONE, torchrun(2)))
    begin = f'generate() {{ {alone} "$@"; }}\non_two() {{ {two} "$@"; }}\n'
    return subprocess.run(
        ["bash", "-c", begin + script],
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env=environment() | names,
        timeout=HANG_SECONDS,
    )


def test_one_prompt_one_answer_and_nothing_else() -> None:
    """From the command line, and from a pipe, which rank 0 reads."""
    done = shell(
        "generate --prompt 'What is MLA?' --temperature 0\necho $?\n"
        "echo 'What is MLA?' | on_two --temperature 0"
    )
    assert done.stdout == f"{ANSWER}\n0\n{ANSWER}\n"
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "stdin", "reason"),
    [
        ([], "", "nothing to answer: give --prompt TEXT, --interactive or --input-file"),
        ([], ROW, "these are rows of a batch; give --input-file - to answer them"),
        ([], "x" * (17 << 20), "the prompt on standard input: longer than 16 MiB"),
        (["--prompt", " "], "", "--prompt is empty"),
        (["--prompt", "word " * 20_000], "", "--prompt: the prompt has"),
        (["--input-file", ""], "", "--input-file is empty; give a value, or leave it out"),
    ],
)
def test_prompts_that_cannot_be_answered(flags: list[str], stdin: str, reason: str) -> None:
    done = run_forked([GENERATE, *SMALL, *flags], stdin)
    assert done.returncode == 2
    assert reason in our_lines(done.stderr)[-1]
    assert done.stdout == ""


def test_rows_and_results_go_through_pipes(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(ROW + "\n")
    done = shell(
        """
        generate --input-file - --output-file - <"$IN"
        cat "$IN" | generate --input-file /dev/stdin --output-file /dev/stdout | cat
        { generate --input-file <(cat "$IN") --output-file >(cat >&3) | cat; } 3>&1
        { on_two --input-file <(cat "$IN") --output-file >(cat >&3) | cat; } 3>&1
        """,
        IN=str(tmp_path / "in.jsonl"),
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["custom_id"] for line in lines] == ["a"] * 4, done.stderr
    assert {line["response"]["status_code"] for line in lines} == {200}


def test_a_batch_from_a_pipe_is_resumed(tmp_path: Path) -> None:
    job = [GENERATE, *SMALL, "--input-file", "-", "--output-file", str(tmp_path / "out")]
    assert run_forked(job, f"{ROW}\n").returncode == 0
    again = run_forked(job, f"{ROW}\nWhat?\n")
    assert "2 rows: 1 answered, 1 failed" in again.stderr
    assert "1 were done before" in again.stderr
    assert len((tmp_path / "out").read_text().splitlines()) == 2


@pytest.mark.parametrize("strict", [[], ["--strict"]])
def test_a_batch_without_an_answer_ends_with_1(strict: list[str]) -> None:
    job = [GENERATE, *SMALL, "--input-file", "-", *strict]
    assert run_forked(job, '{"custom_id": "a"}\n{"custom_id": "b"}\n').returncode == 1
    assert run_forked(job, f'{{"custom_id": "b"}}\n{ROW}\n').returncode == len(strict)
    assert run_forked(job, "").returncode == 0


def test_a_pipe_that_nothing_reads_is_one_line() -> None:
    done = shell("echo Hi | generate --input-file - --output-file - | true\nexit ${PIPESTATUS[1]}")
    assert done.returncode == 2
    assert "standard output: cannot write (Broken pipe)" in our_lines(done.stderr)[-1]


def test_closed_ends_are_one_line() -> None:
    for flags, reason in (
        ("<&-", "nothing to answer"),
        ("--input-file - <&-", "--input-file standard input: it is closed"),
        ("--prompt Hi >&-", "standard output is closed"),
    ):
        done = shell(f"generate {flags}")
        assert done.returncode == 2
        assert reason in our_lines(done.stderr)[-1]


def test_prewarm_names_its_file_and_row(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"What is MLA?\n\xff\n")
    for name, reason in (
        (bad, f"--prewarm {bad}, row 2: byte 1 (0xff) is not UTF-8"),
        (tmp_path / "none", f"--prewarm {tmp_path}/none: No such file or directory"),
    ):
        done = run_forked([GENERATE, *SMALL, "--prompt", "Hi", "--prewarm", str(name)])
        assert done.returncode == 2
        assert reason in our_lines(done.stderr)[-1]


def test_a_job_that_is_restarted_reads_no_pipe_again() -> None:
    command = [GENERATE, *SMALL, "--input-file", "-"]
    done = run_forked(command, TORCHELASTIC_RESTART_COUNT="1")
    assert done.returncode == 2
    assert "the attempt before this one has read it; give a file" in done.stderr

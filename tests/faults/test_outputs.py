"""Output files of generate.py: never an input, and old results are only replaced by new ones."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.test_kill import answers, undisturbed, whole_lines, write_job
from tests.forked import run_forked
from tests.programs import (
    ALONE,
    GENERATE,
    HANG_SECONDS,
    ROOT,
    end,
    environment,
    our_lines,
    ranks_of,
    torchrun,
)


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    return [GENERATE, *write_job(tmp_path)]


def test_a_failed_start_leaves_old_results(job: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    old = '{"id": "batch_req_1", "custom_id": "old", "response": {"status_code": 200}}\n{"id": "ba'
    out.write_text(old)
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank0.log").symlink_to(tmp_path / "notes")
    for flags, reason in (
        (["--ckpt-path", str(tmp_path / "none")], "no such directory"),
        (["--kv-cache-size", "1"], "less than one page"),
        (["--stats-file", str(tmp_path / "notes")], "another file is there, not the figures of"),
        (["--metrics-port", "70000"], "--metrics-port=70000 cannot be listened on"),
        (["--log-dir", str(tmp_path / "logs")], "rank0.log: a link"),
    ):
        done = run_forked([*job, str(out), "--overwrite", *flags])
        assert done.returncode == 2
        assert reason in our_lines(done.stderr)[-1]
        assert out.read_text() == old
    assert (tmp_path / "notes").read_text() == "mine"


def wait_for_rows(out: Path, number: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not 0 < len(whole_lines(out)) >= number or b'"old"' in out.read_bytes():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_a_restart_keeps_results_after_overwrite(job: list[str], tmp_path: Path) -> None:
    """--overwrite holds for the job, not for each of its attempts."""
    out = tmp_path / "out.jsonl"
    out.write_text('{"id": "batch_req_1", "custom_id": "old", "response": {}}\n')
    command = [*torchrun(2), "--max-restarts", "1", *job, str(out), "--overwrite"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment(), cwd=ROOT)
    try:
        wait_for_rows(out, 3, process)
        os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
        before = whole_lines(out)
        _, stderr = process.communicate(timeout=HANG_SECONDS)
    finally:
        end(process)
    assert process.returncode == 0, stderr
    assert whole_lines(out)[: len(before)] == before
    assert answers(out) == undisturbed()


@pytest.mark.parametrize("event", ["removed", "renamed"])
def test_results_that_are_taken_away_are_an_error(
    event: str, job: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        [*ALONE, *job, str(out)], stderr=subprocess.PIPE, env=environment(), cwd=ROOT
    )
    try:
        wait_for_rows(out, 1, process)
        out.unlink() if event == "removed" else out.rename(tmp_path / "moved")
        _, stderr = process.communicate(timeout=HANG_SECONDS)
    finally:
        end(process)
    assert process.returncode == 2
    line = stderr.decode().splitlines()[-1]
    assert line.startswith(f"error: {out}: was removed or renamed while the job ran; its results")
    assert ("moved; move it back" in line) == (event == "renamed")
    assert not out.exists()


def test_devices_and_pipes_take_results(job: list[str]) -> None:
    piped = run_forked([*job, "/dev/stdout"])
    assert piped.returncode == 0
    lines = [json.loads(line) for line in piped.stdout.splitlines()]
    found = {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in lines}
    assert found == undisturbed()
    assert run_forked([*job, "/dev/null", "--stats-file", "/dev/null"]).returncode == 0


def test_flags_that_change_nothing_are_said(job: list[str]) -> None:
    flags = ["--prompt-separator", "blank-line", "--temperature", "0", "--top-k", "5"]
    done = run_forked([*job, "/dev/null", *flags, "--seed", "1", "--sequence-parallel", "9"])
    assert done.returncode == 0
    for said in (
        "--prompt-separator changes nothing: the input is JSONL",
        "--top-k, --seed: only for rows with a temperature, --temperature 0 is greedy",
        "--sequence-parallel=9 changes nothing: with --tp=1",
    ):
        assert said in done.stderr

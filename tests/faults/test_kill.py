"""Batch jobs under torchrun that are killed, fail or cannot start: none hangs or loses a row."""

import json
import os
import resource
import signal
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3 import LLM, SamplingParams
from tests.forked import run_forked
from tests.programs import (
    GENERATE,
    HANG_SECONDS,
    ROOT,
    end,
    environment,
    our_lines,
    ranks_of,
    run,
    torchrun,
)

ROWS: list[dict[str, Any]] = [
    {"prompt": f"Story {i}:", "max_tokens": 4 + i % 20, "ignore_eos": True} for i in range(30)
]


def write_job(folder: Path) -> list[str]:
    """Return the arguments of a job of many short answers, without the output file's name."""
    rows = [
        {"custom_id": f"row-{i}", "url": "/v1/completions", "body": body}
        for i, body in enumerate(ROWS)
    ]
    path = folder / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--input-file", str(path), "--max-running", "8", "--kv-cache-size", "8192tok"]
    return [*flags, "--output-file"]


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    return [GENERATE, *write_job(tmp_path)]


def answers(path: Path) -> dict[str, str]:
    """Return the answers by row; each row must occur once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    bodies = {line["custom_id"]: line["response"]["body"] for line in lines}
    assert len(bodies) == len(lines)
    return {name: body["choices"][0]["text"] for name, body in bodies.items()}


@cache
def undisturbed() -> dict[str, str]:
    """Return the same answers, computed on one rank without faults."""
    prompts = [row["prompt"] for row in ROWS]
    params = [SamplingParams(max_tokens=row["max_tokens"], ignore_eos=True) for row in ROWS]
    with LLM(kv_cache_size="8192tok") as llm:
        torch.set_num_threads(1)
        return {f"row-{i}": done.text for i, done in enumerate(llm.generate(prompts, params))}


def whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def kill_after(rows: int, command: list[str], out: Path, rank: int) -> None:
    """Start a job; kill one of its ranks when it has written `rows` more rows."""
    wanted = len(whole_lines(out)) + rows
    deadline = time.monotonic() + HANG_SECONDS
    process = subprocess.Popen(
        [*command, str(out)], stderr=subprocess.DEVNULL, env=environment(), cwd=ROOT
    )
    try:
        while len(whole_lines(out)) < wanted:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(ranks_of(process.pid)[rank], signal.SIGKILL)
        assert process.wait(HANG_SECONDS) != 0
    finally:
        end(process)


@pytest.mark.parametrize("cpu_exchange", ["memory", "gloo"])
def test_a_job_killed_twice_has_every_row_once(tmp_path: Path, cpu_exchange: str) -> None:
    out = tmp_path / "out.jsonl"
    job = [GENERATE, "--cpu-exchange", cpu_exchange, *write_job(tmp_path)]
    kill_after(1, [*torchrun(2), *job], out, rank=1)
    before = whole_lines(out)
    out.write_bytes(out.read_bytes()[:-7])  # torn, as by a power cut
    kill_after(5, [*torchrun(2), *job], out, rank=0)
    assert set(before[:-1]) <= set(whole_lines(out))
    assert run_forked([*job, str(out)], num_ranks=2).returncode == 0
    assert answers(out) == undisturbed()


def test_a_full_disk_ends_all_ranks_with_one_line(job: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = run(
        [*torchrun(2), *job, str(out)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)),
    )
    assert done.returncode == 1  # torchrun's own
    lines = our_lines(done.stderr)
    assert lines[-1] == (
        f"error: {out}: cannot write (File too large); the rows written so far are safe, "
        "run it again to resume"
    )
    assert sum("error" in line for line in lines) == 1
    assert "exitcode  : 2" in done.stderr
    report = done.stderr.partition("Root Cause")[2]
    assert "cannot write" in report and "Traceback" not in report
    assert 0 < len(answers(out)) < len(ROWS)


def test_a_layout_that_does_not_fit_is_reported_once(job: list[str], tmp_path: Path) -> None:
    done = run([*torchrun(3), *job, str(tmp_path / "out.jsonl")])
    assert done.returncode == 1
    assert our_lines(done.stderr)[-1] == (
        "error: tp=3 does not divide num_attention_heads=8; use one of [1, 2, 4, 8]"
    )
    assert "exitcode  : 2" in done.stderr
    assert "Traceback" not in done.stderr.partition("Root Cause")[2]

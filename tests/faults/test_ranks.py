"""Ranks that stop, hang, fail, miscount or are missing, on one or two hosts: every job ends."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.source import open_source
from dsv3.config import ParallelConfig
from dsv3.config_files import DEMO
from tests.faults.test_kill import answers, undisturbed, whole_lines, write_job
from tests.programs import (
    GENERATE,
    HANG_SECONDS,
    ROOT,
    end,
    environment,
    free_port,
    our_lines,
    ranks_of,
)

BAD_RANK = str(Path(__file__).with_name("bad_rank.py"))
SILENT = r"is not heard of for \d s \(stopped, or its host cannot be reached\)"
# (Fault, rank) and the error.
FAULTS = {
    ("SIGSTOP", 0): rf"rank 0 on HOST {SILENT}",
    ("hang", 1): r"rank 1 on HOST is stuck in a step for \d s",
    (
        "raise",
        1,
    ): r"rank 1 on HOST: RuntimeError: the device is on fire \(debug logging shows more\)",
    ("miscount", 1): "rank 1 on HOST has sampled other tokens than the other ranks in one of the "
    "last 4 steps: their answers cannot be trusted; look for a faulty device or memory",
}


class Jobs:
    """Programs that run concurrently: they spend most of their time starting and waiting."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, stderr: Path, **variables: str) -> "subprocess.Popen[bytes]":
        with stderr.open("wb") as file:
            env = environment() | variables
            process = subprocess.Popen(command, stderr=file, env=env, cwd=ROOT)
        self._running.append(process)
        return process

    def end(self) -> None:
        for process in self._running:
            end(process)


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    jobs.end()


def agent(*flags: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", *flags]


def host_agents(*flags: str) -> list[list[str]]:
    """Return the commands of two agents as on two hosts, which are ranked by their addresses."""
    endpoint = f"localhost:{free_port()}"
    flags = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, *flags)
    agents = [agent(*flags, "--local-addr", address) for address in ("127.0.0.1", "localhost")]
    if subprocess.run(["unshare", "--uts", "true"], stderr=subprocess.DEVNULL).returncode == 0:
        renamed = ["unshare", "--uts", "sh", "-c", 'hostname localhost; exec "$@"', "sh"]
        return [agents[0], [*renamed, *agents[1]]]
    return agents


def errors(stderr: Path) -> list[str]:
    return [line for line in our_lines(stderr.read_text()) if line.startswith("error")]


def wait_for(stderr: Path, words: str) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while words not in stderr.read_text():
        assert time.monotonic() < deadline, stderr.read_text()
        time.sleep(0.05)


@pytest.mark.parametrize("cpu_exchange", ["memory", "gloo"])
def test_a_faulty_rank_is_named_once(tmp_path: Path, jobs: Jobs, cpu_exchange: str) -> None:
    rng = random.Random(7)
    started = []
    for fault, rank in FAULTS:
        folder = tmp_path / f"{fault}{rank}"
        folder.mkdir()
        command = agent("--standalone", "--nproc-per-node", "2")
        command += [BAD_RANK, fault, str(rank), str(rng.randrange(2, 16))]
        command += [*write_job(folder), str(folder / "out.jsonl")]
        command += ["--rank-timeout", "6", "--check-every", "4", "--log-dir", str(folder)]
        command += ["--cpu-exchange", cpu_exchange]
        process = jobs.start(*command, stderr=folder / "stderr")
        started.append((fault, folder, FAULTS[fault, rank], process))
    for fault, folder, wanted, process in started:
        process.wait(HANG_SECONDS)
        stderr_text = (folder / "stderr").read_text()
        line = "error: " + wanted.replace("HOST", re.escape(socket.gethostname()))
        matches = [bool(re.fullmatch(line, error)) for error in errors(folder / "stderr")]
        assert matches == [True], stderr_text
        assert "exitcode  : 3" in stderr_text
        logs = [(folder / f"rank{r}.log").read_text() for r in (0, 1)]
        assert all(re.search(line, log) for log in logs)
        if fault in ("SIGSTOP", "hang"):
            assert all("most recent call first" in log and "watchdog.py" in log for log in logs)


def shares(folder: Path) -> list[Path]:
    """Convert the demo model for two ranks; return a directory per rank, with its file only."""
    folders = [folder / "host0", folder / "host1"]
    for rank, other in ((0, 1), (1, 0)):
        with open_source(DEMO) as source:
            plan = make_plan(source, ParallelConfig(world_size=2))
            convert(source, plan, folders[rank], workers=1)
        (folders[rank] / f"model{other}-mp2.safetensors").unlink()
    return folders


def test_two_hosts_restart_from_their_own_files(tmp_path: Path, jobs: Jobs) -> None:
    """Two agents, as on two hosts; the second's rank is stopped; both are restarted."""
    folders, out = shares(tmp_path), tmp_path / "out.jsonl"
    launches = host_agents("--max-restarts=1")
    agents = []
    for host, (launch, folder) in enumerate(zip(launches, folders, strict=True)):
        command = [*launch, BAD_RANK, "SIGSTOP", "1", "12", *write_job(tmp_path), str(out)]
        command += ["--ckpt-path", str(folder), "--rank-timeout", "6"]
        agents.append(jobs.start(*command, stderr=tmp_path / f"stderr{host}"))
    assert [process.wait(HANG_SECONDS) for process in agents] == [0, 0]
    found = errors(tmp_path / "stderr0")
    assert re.fullmatch(rf"error: rank 1 on \S+ {SILENT}", "\n".join(found)), found
    assert answers(out) == undisturbed()


def test_a_damaged_file_of_one_host_ends_all(tmp_path: Path, jobs: Jobs) -> None:
    folders = shares(tmp_path)
    file = folders[1] / "model1-mp2.safetensors"
    with file.open("r+b") as damaged:
        damaged.truncate(100_000)
    agents = []
    for host, (launch, folder) in enumerate(zip(host_agents(), folders, strict=True)):
        command = [*launch, GENERATE, *write_job(tmp_path), str(tmp_path / "out")]
        command += ["--ckpt-path", str(folder)]
        agents.append(jobs.start(*command, stderr=tmp_path / f"stderr{host}"))
    for process in agents:
        assert process.wait(HANG_SECONDS) == 1
    stderr_texts = [(tmp_path / f"stderr{host}").read_text() for host in (0, 1)]
    found = [line for host in (0, 1) for line in errors(tmp_path / f"stderr{host}")]
    assert len(found) == 1, stderr_texts
    assert re.match(rf"error: rank 1 on \S+: {file}: truncated: ", found[0])
    assert "exitcode  : 3" in stderr_texts[0]  # the other agent may lose the store of the first


def test_a_missing_host_is_named_in_a_hint(tmp_path: Path, jobs: Jobs) -> None:
    """The hint comes from the rank without torchrun, and from `run.py` with torchrun."""
    job = [GENERATE, *write_job(tmp_path), str(tmp_path / "out")]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    launch = [sys.executable, str(ROOT / "launch" / "run.py"), "--nnodes", "2"]
    c10d = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    static = ["--node-rank", "0", "--master-addr", "localhost", "--master-port", str(free_port())]
    stderrs = [tmp_path / f"stderr{number}" for number in range(3)]
    started = [
        jobs.start(sys.executable, *job, stderr=stderrs[0], **address, **world),
        jobs.start(*(launch + c10d + job), stderr=stderrs[1]),
        jobs.start(*(launch + static + job), stderr=stderrs[2]),
    ]
    hints = ["for 1 of 2 ranks (1); ", "waiting for 1 of 2 nodes: ", "waiting for 1 of 2 nodes: "]
    for process, stderr, hint in zip(started, stderrs, hints, strict=True):
        wait_for(stderr, hint)
        process.terminate()
    assert started[0].wait(HANG_SECONDS) != 0


def test_a_signal_ends_a_job_though_a_rank_is_stopped(tmp_path: Path, jobs: Jobs) -> None:
    out = tmp_path / "out.jsonl"
    ranks = ["--standalone", "--nproc-per-node", "2"]
    command = [*agent(*ranks), GENERATE, *write_job(tmp_path), str(out)]
    process = jobs.start(*command, stderr=tmp_path / "stderr")
    deadline = time.monotonic() + HANG_SECONDS
    while not whole_lines(out):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    stopped = ranks_of(process.pid)[1]

    os.kill(stopped, signal.SIGSTOP)
    process.terminate()
    process.wait(25)  # torchrun alone would wait for 30 s
    assert out.read_bytes().endswith(b"\n") and answers(out).items() <= undisturbed().items()

"""The process of a user's script: the library leaves its settings, signals and threads alone."""

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.programs import ALONE, HANG_SECONDS, environment, free_port, our_lines, run, torchrun

SCRIPT = str(Path(__file__).with_name("process_script.py"))
INTERRUPTED = 128 + signal.SIGINT
NO_FAULTS = ["unchanged", "handlers"]
FAULTS = ["interrupt-0", "caught-0"]
FAULTS_OF_TWO = [*FAULTS, "interrupt-1", "interrupt-all", "caught-1", "kill-0", "kill-1", "stop-1"]


@dataclass
class Outcome:
    """Exit codes and standard error of the ranks, or of torchrun; and the ranks' reports."""

    codes: list[int]
    stderr: list[str]
    seen: list[dict[str, Any] | None]

    @property
    def errors(self) -> list[str]:
        lines = (line for text in self.stderr for line in our_lines(text))
        return [line for line in lines if line.startswith("error: ")]


def reports(folder: Path, num_ranks: int) -> list[dict[str, Any] | None]:
    """Return the reports of all ranks; None for a rank that has not written one."""
    files = [folder / f"{rank}.json" for rank in range(num_ranks)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def run_script(way: str, how: list[str], num_ranks: int, folder: Path) -> Outcome:
    """Run the script alone or under torchrun."""
    folder.mkdir()
    done = run([*how, SCRIPT, way, str(folder)])
    return Outcome([done.returncode], [done.stderr], reports(folder, num_ranks))


def run_two_ranks(way: str, folder: Path) -> Outcome:
    """Start the ranks by hand and wait for them; a stopped rank is killed at the end."""
    folder.mkdir()
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in (0, 1):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"stderr{rank}").open("wb") as stderr:
            command = [sys.executable, SCRIPT, way, str(folder)]
            variables = environment() | common | own
            ranks.append(subprocess.Popen(command, stderr=stderr, env=variables))
    try:
        codes = [process.wait(HANG_SECONDS) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    stderr_texts = [(folder / f"stderr{rank}").read_text() for rank in (0, 1)]
    return Outcome(codes, stderr_texts, reports(folder, 2))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Outcome]]:
    """Run the script in all ways, two at a time."""
    folder = tmp_path_factory.mktemp("ways")
    with ThreadPoolExecutor(2) as pool:
        started = {}
        for way in (*NO_FAULTS, *FAULTS):
            started[f"{way} of 1"] = pool.submit(run_script, way, ALONE, 1, folder / f"{way} alone")
        for way in NO_FAULTS:
            started[f"{way} of 2"] = pool.submit(run_script, way, torchrun(2), 2, folder / way)
        for way in FAULTS_OF_TWO:
            started[f"{way} of 2"] = pool.submit(run_two_ranks, way, folder / way)
        return started


@pytest.fixture
def outcome(outcomes: dict[str, Future[Outcome]], request: pytest.FixtureRequest) -> Outcome:
    return outcomes[request.param].result()


@pytest.mark.parametrize("outcome", ["unchanged of 1", "unchanged of 2"], indirect=True)
def test_the_library_changes_nothing_of_the_process(outcome: Outcome) -> None:
    """Before, while and after a model is used, and with two models in one process."""
    assert set(outcome.codes) == {0}, outcome.stderr
    seen = [rank for rank in outcome.seen if rank is not None]
    assert [rank["changes"] for rank in seen] == [[]] * len(outcome.seen)
    texts = seen[0]["texts"]
    assert len(texts) == (6 if len(seen) == 1 else 2)
    assert texts == [texts[0]] * len(texts) and texts[0][0]


@pytest.mark.parametrize("outcome", ["handlers of 1", "handlers of 2"], indirect=True)
def test_a_script_handles_its_own_signals(outcome: Outcome) -> None:
    assert set(outcome.codes) == {0}, outcome.stderr
    calls = [signal.SIGTERM, signal.SIGINT] * 2
    assert outcome.seen == [{"calls": calls, "same": True}] * len(outcome.seen)


@pytest.mark.parametrize("outcome", ["interrupt-0 of 1"], indirect=True)
def test_ctrl_c_is_a_keyboard_interrupt(outcome: Outcome) -> None:
    assert outcome.codes == [-signal.SIGINT], outcome.stderr
    assert outcome.stderr[0].endswith("KeyboardInterrupt\n")
    assert outcome.seen == [{"interrupted": True}]


@pytest.mark.parametrize("outcome", ["caught-0 of 1"], indirect=True)
def test_an_interrupted_model_refuses_calls_and_the_next_one_works(outcome: Outcome) -> None:
    assert outcome.codes == [0], outcome.stderr
    reason = "this LLM was interrupted within a step: generate() needs a new one"
    assert outcome.seen == [{"interrupted": True, "next call": reason, "next model": 1}]


@pytest.mark.parametrize(
    "outcome", ["interrupt-0 of 2", "interrupt-1 of 2", "interrupt-all of 2"], indirect=True
)
def test_an_interrupt_ends_all_ranks(outcome: Outcome) -> None:
    """Each rank gets the interrupt, or is ended as by one if its main thread cannot."""
    assert not outcome.errors, outcome.stderr
    assert set(outcome.codes) <= {-signal.SIGINT, INTERRUPTED}
    assert -signal.SIGINT in outcome.codes


@pytest.mark.parametrize("outcome", ["caught-0 of 2", "caught-1 of 2"], indirect=True)
def test_a_rank_that_catches_an_interrupt_goes_on_alone(outcome: Outcome) -> None:
    assert not outcome.errors, outcome.stderr
    assert set(outcome.codes) <= {0, INTERRUPTED} and 0 in outcome.codes
    reasons = {rank["next call"] for rank in outcome.seen if rank is not None}
    assert reasons == {"this LLM was interrupted within a step: generate() needs a new one"}


@pytest.mark.parametrize(
    ("outcome", "lost", "reason"),
    [
        ("kill-0 of 2", 0, r"has died during (a step|run) \(killed, or out of memory\)"),
        ("kill-1 of 2", 1, r"has died during (a step|run) \(killed, or out of memory\)"),
        ("stop-1 of 2", 1, r"is not heard of for \d+ s \(stopped, or its host cannot be reached\)"),
    ],
    indirect=["outcome"],
)
def test_a_rank_that_dies_or_hangs_ends_the_others(
    outcome: Outcome, lost: int, reason: str
) -> None:
    host = re.escape(os.uname().nodename)
    (error,) = outcome.errors
    assert re.fullmatch(f"error: rank {lost} on {host} {reason}", error)
    assert outcome.codes[1 - lost] == 3
    assert outcome.seen == [None, None]

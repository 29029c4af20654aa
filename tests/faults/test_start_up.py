"""Ranks that start differently, hang or leave early: every job ends with one line of error."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint.safetensors_file import read_header
from dsv3.config_files import DEMO
from tests.forked import Forked, worlds_of
from tests.programs import GENERATE, HANG_SECONDS, environment, our_lines, torchrun

SLOW_RANK = str(Path(__file__).with_name("slow_rank.py"))
LEAVING = str(Path(__file__).with_name("leaving.py"))
DIFFERENT = "the ranks were started in different ways: "
OTHER_MODEL = "the ranks do not load the same model: "
# Flags of the second rank, and the error. COPY is a copy of the checkpoint, VALUE a copy with
# another value in one weight, CONFIG a copy with another configuration.
FLAGS = {
    "--attn-impl naive": f"{DIFFERENT}--attn-impl is auto on rank 0 on HOST and naive on rank 1",
    "--tp 1 --dp 2": f"{DIFFERENT}--tp is 2 on rank 0 on HOST and 1 on rank 1 on HOST; --dp is 1",
    "--rank-timeout 7": f"{DIFFERENT}--rank-timeout is 60.0 on rank 0 on HOST and 7.0 on rank 1",
    "--odd 1": "rank 1 on HOST: unrecognized arguments: --odd 1; see --help",
    "--tp 3": "rank 1 on HOST: tp=3 x dp=1 is not world_size=2",
    "--record-expert-load F": f"{DIFFERENT}--record-expert-load is no file on rank 0 on HOST and a",
    "--ckpt-path VALUE": f"{OTHER_MODEL}its checkpoint is one with digest ",
    "--ckpt-path CONFIG": f"{OTHER_MODEL}routed_scaling_factor of the model is 2.5 on rank 0",
    "--ckpt-path COPY": "",
}
# The place and the rank that hangs, and the error.
PLACES = {
    "imports 1": r"gave up after \d+ s: waiting at \S+ for 1 of 2 ranks \(1\)",
    "groups 1": "rank 1 on HOST is stuck in start-up for ",
    "headers 0": "rank 0 on HOST is stuck in load for ",
    "weights 1": "rank 1 on HOST is stuck in load for ",
    "closing 0": "rank 0 on HOST is stuck in closing its connections for ",
    "template 0": "rank 0 on HOST is stuck in writing the prompt of row 1 for ",
}
# The way in which a script leaves, the rank, and the error.
WAYS = {
    "exit 0": r"rank 0 on HOST has left the job \(SystemExit: 7\) while other ranks go on",
    "exit 1": r"rank 1 on HOST has left the job \(SystemExit: 7\) while other ranks go on",
    "abort 0": "rank 0 on HOST: Aborted: enough",
    "abort 1": "rank 1 on HOST: Aborted: enough",
    "die 1": "rank 1 on HOST has died during run",
    "forget 1": "rank 1 on HOST has left the job while rank 0 on HOST waits for it: all ranks must",
    "forget all": "",
    "return 0": "rank 1 on HOST makes another call than rank 0 on HOST: all ranks must make the",
    "return 1": "rank 1 on HOST makes another call than rank 0 on HOST: all ranks must make the",
    "exit all": "",
    "return all": "",
}


@dataclass
class Outcome:
    """Exit codes and standard error of the ranks, or of torchrun."""

    codes: list[int]
    stderr: list[str]

    @property
    def errors(self) -> list[str]:
        lines = (line for text in self.stderr for line in our_lines(text))
        return [line for line in lines if line.startswith("error: ")]


def two_ranks(program: str, folder: Path, flags: list[list[str]], **variables: str) -> Outcome:
    """Start two ranks by hand, as on two hosts, and wait for them."""
    folder.mkdir()
    (folder / "in.txt").write_text("What is MLA?\n")
    job = [program, "--input-file", str(folder / "in.txt"), "--kv-cache-size", "2048tok"]
    ranks = [
        Forked([*job, *more], "", variables | world)
        for more, world in zip(flags, worlds_of(2), strict=True)
    ]
    first = ranks[0].finish()
    if variables.get("HANG_AT", "").startswith("imports"):
        ranks[1].process.kill()  # it is stopped
    done = [first, ranks[1].finish()]
    return Outcome([each.returncode for each in done], [each.stderr for each in done])


def script(way: str, rank: str) -> Outcome:
    """Run leaving.py on two ranks: under torchrun if it is about the end of a process."""
    if way not in ("die", "forget"):
        ranks = [Forked([LEAVING, way, rank], "", world) for world in worlds_of(2)]
        ended = [each.finish() for each in ranks]
        return Outcome([each.returncode for each in ended], [each.stderr for each in ended])
    done = subprocess.run(
        [*torchrun(2), LEAVING, way, rank],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        timeout=HANG_SECONDS,
    )
    return Outcome([done.returncode], [done.stderr])


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Outcome]]]:
    """Run all jobs, a few at a time: they mostly wait."""
    folder = tmp_path_factory.mktemp("jobs")
    copies = {
        name: str(shutil.copytree(DEMO, folder / name)) for name in ("COPY", "VALUE", "CONFIG")
    }
    change_a_value(Path(copies["VALUE"]))
    change_the_config(Path(copies["CONFIG"]))
    with ThreadPoolExecutor(4) as pool:
        started: dict[str, Future[Outcome]] = {}

        def begin(name: str, call: Any, *args: Any, **variables: str) -> None:
            started[name] = pool.submit(call, *args, **variables)

        for place in PLACES:
            flags = [["--rank-timeout", "5"]] * 2
            begin(place, two_ranks, SLOW_RANK, folder / place, flags, HANG_AT=place)
        for i, text in enumerate(FLAGS):
            flags = [[], [copies.get(word, word) for word in text.split()]]
            begin(text, two_ranks, GENERATE, folder / str(i), flags)
        for way in WAYS:
            begin(way, script, *way.split())
        yield started


def change_a_value(folder: Path) -> None:
    """Change one byte of an expert that only the last rank has."""
    name = "model.layers.2.mlp.experts.15.up_proj.weight"
    for file in folder.glob("*.safetensors"):
        if name in (entries := read_header(file).entries):
            data = bytearray(file.read_bytes())
            data[entries[name].offset + 1000] ^= 0x80
            file.write_bytes(data)
            return
    raise AssertionError(name)


def change_the_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    assert '"routed_scaling_factor": 2.5' in text
    new = text.replace('"routed_scaling_factor": 2.5', '"routed_scaling_factor": 2.0')
    (folder / "config.json").write_text(new)


def check_error(outcome: Outcome, wanted: str) -> None:
    """Check that one rank reports the error, once."""
    assert len(outcome.errors) == 1, outcome.stderr
    pattern = "error: " + wanted.replace("HOST", re.escape(os.uname().nodename))
    assert re.match(pattern, outcome.errors[0]), outcome.errors


@pytest.mark.parametrize("flags", FLAGS)
def test_ranks_started_in_different_ways_are_refused(
    outcomes: dict[str, Future[Outcome]], flags: str
) -> None:
    outcome = outcomes[flags].result()
    if not FLAGS[flags]:
        assert outcome.codes == [0, 0] and not outcome.errors
        return
    check_error(outcome, FLAGS[flags])
    assert outcome.codes == [2, 2]


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_hangs_anywhere_is_named(
    outcomes: dict[str, Future[Outcome]], place: str
) -> None:
    """A sleep simulates a disk, a driver or a network that never answers."""
    outcome = outcomes[place].result()
    check_error(outcome, PLACES[place])
    assert outcome.codes[0] == 3


@pytest.mark.parametrize("way", WAYS)
def test_a_script_that_leaves_early_ends_on_all_ranks(
    outcomes: dict[str, Future[Outcome]], way: str
) -> None:
    """One rank alone ends the job; if all ranks leave alike, each has its own exit code."""
    outcome = outcomes[way].result()
    if WAYS[way]:
        check_error(outcome, WAYS[way])
        assert all(outcome.codes), "all ranks end, and torchrun with them"
        assert not any("Traceback" in line for text in outcome.stderr for line in our_lines(text))
        return
    assert not outcome.errors
    assert set(outcome.codes) == {7 if way == "exit all" else 0}

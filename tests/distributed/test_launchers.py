"""Ranks meet as well if srun or mpirun has started them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import GENERATE, HANG_SECONDS, ROOT, environment, free_port

SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "localhost",
}


def place(launcher: str, rank: int, port: int) -> dict[str, str]:
    if launcher == "srun":
        # A job whose number leads to this port.
        job = {"SLURM_JOB_ID": str(port), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        return SRUN | job
    names = {"RANK": str(rank), "SIZE": "2", "LOCAL_RANK": str(rank)}
    world = {f"OMPI_COMM_WORLD_{name}": value for name, value in names.items()}
    return world | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_two_ranks_answer_once(launcher: str, tmp_path: Path) -> None:
    prompts = tmp_path / "in.txt"
    prompts.write_text("What is MLA?\n")
    flags = ["--input-file", str(prompts), "--kv-cache-size", "2048tok", "--device", "cpu"]
    outside = ("SLURM_", "OMPI_", "PMI_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    usual = {k: v for k, v in environment().items() if not k.startswith(outside)}
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, GENERATE, *flags],
            env=usual | place(launcher, rank, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in (0, 1)
    ]
    try:
        (first, log), (second, _) = [rank.communicate(timeout=HANG_SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], log
    assert first.startswith("Prompt: What is MLA?\nCompletion: ")
    assert second == ""
    assert "1 rows: 1 answered" in log

"""Rank, world size and rendezvous address in the environments of different launchers."""

import os

import pytest

from dsv3.distributed.launcher import (
    environment_local_rank,
    environment_rank,
    environment_world_size,
    first_host,
    rendezvous_address,
    unused_tasks,
)
from dsv3.errors import ConfigError

PREFIXES = ("SLURM_", "OMPI_", "PMI_", "MPI_", "MASTER_")
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "login,gpu[03-04]",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
SCRIPT = {
    "ENVIRONMENT": "BATCH",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}
ADDRESS = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith(PREFIXES) or name in (*TORCHRUN, "ENVIRONMENT"):
            monkeypatch.delenv(name)
    return monkeypatch


def set_all(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)


def ranks() -> tuple[int, int, int]:
    return environment_rank(), environment_world_size(), environment_local_rank()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (5, 8, 2)),
        (OPEN_MPI, (3, 4, 1)),
        (MPICH, (3, 4, 1)),
        (STEP, (9, 16, 1)),
        # One torchrun on each host, started by srun or mpirun.
        (STEP | TORCHRUN, (5, 8, 2)),
        (OPEN_MPI | TORCHRUN, (5, 8, 2)),
        # Only some exported by hand.
        (STEP | {"WORLD_SIZE": "16"}, (9, 16, 1)),
        (STEP | {"RANK": "2"}, (2, 16, 1)),
        # mpirun in a Slurm job; its helpers are steps of one task a host.
        (SCRIPT | OPEN_MPI, (3, 4, 1)),
        (STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"} | OPEN_MPI, (3, 4, 1)),
        # Alone: a job's script, a shell in an allocation, a shell as a step, one task.
        (SCRIPT, (0, 1, 0)),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, (0, 1, 0)),
        (STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_PTY_PORT": "4"}, (0, 1, 0)),
        (STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 1)),
        (SCRIPT | ADDRESS, (0, 1, 0)),
        # A container that gets few variables.
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"} | ADDRESS, (1, 2, 1)),
    ],
)
def test_ranks_of_each_launcher(
    environment: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[int, int, int]
) -> None:
    set_all(environment, variables)
    assert ranks() == expected


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        (STEP, "gpu03:19711"),
        (STEP | {"SLURM_STEP_ID": "2"}, "gpu03:19913"),
        (STEP | ADDRESS, "node0:29500"),
        (STEP | {"MASTER_PORT": "1234"}, "gpu03:1234"),
        (STEP | {"PMI_RANK": "9", "PMI_SIZE": "16"}, "gpu03:19711"),  # srun --mpi=pmi2
        (OPEN_MPI | ADDRESS, "node0:29500"),
    ],
)
def test_rendezvous_address(
    environment: pytest.MonkeyPatch, variables: dict[str, str], found: str
) -> None:
    set_all(environment, variables)
    assert str(rendezvous_address()) == found


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        (OPEN_MPI, "OMPI_COMM_WORLD_SIZE=4 but MASTER_ADDR is not set"),
        (MPICH | {"MASTER_ADDR": "node0"}, "PMI_SIZE=4 but MASTER_PORT is not set"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "WORLD_SIZE=8 but MASTER_ADDR is not set"),
        (STEP | {"SLURM_JOB_ID": "x"}, "SLURM_STEP_NUM_TASKS=16 but MASTER_PORT is not set"),
        # The first host of a step of mpirun's helpers need not be rank 0's.
        (STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"} | OPEN_MPI, "MASTER_ADDR is"),
    ],
)
def test_a_missing_rendezvous_address_is_an_error(
    environment: pytest.MonkeyPatch, variables: dict[str, str], missing: str
) -> None:
    set_all(environment, variables)
    with pytest.raises(ConfigError, match=f"{missing}.*export MASTER_ADDR"):
        rendezvous_address()


@pytest.mark.parametrize("value", ["", " ", "x", "-1", "1.5", "0x1"])
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_wrong_numbers_are_named(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    set_all(environment, TORCHRUN | ADDRESS | {name: value})
    with pytest.raises(ConfigError, match=f"{name}={value} in the environment must be a whole"):
        (ranks(), rendezvous_address())


def test_ranks_are_below_the_number_of_ranks(environment: pytest.MonkeyPatch) -> None:
    set_all(environment, {"RANK": "2", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="RANK=2 in the environment must be below WORLD_SIZE=2"):
        environment_rank()
    environment.delenv("WORLD_SIZE")
    with pytest.raises(ConfigError, match=r"must be below WORLD_SIZE=1 \(not set\)"):
        environment_rank()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[03-07,9],login1", "gpu03"),
        ("gpu[9,11-12]", "gpu9"),
        ("rack[1-2]n[004-008]", "rack1n004"),
        ("a-1,b-2", "a-1"),
        ("n[1-2].cluster,x", "n1.cluster"),
        ("", ""),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_unused_tasks_of_a_job_are_counted(environment: pytest.MonkeyPatch) -> None:
    assert unused_tasks() == 0
    set_all(environment, SCRIPT)
    assert unused_tasks() == 16
    environment.setenv("WORLD_SIZE", "1")  # under torchrun
    assert unused_tasks() == 0
    environment.delenv("WORLD_SIZE")
    set_all(environment, STEP)
    assert unused_tasks() == 0

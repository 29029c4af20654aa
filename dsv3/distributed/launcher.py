"""Rank, world size and rendezvous address of this process, from its launcher's environment.

torchrun's variables take precedence, each on its own. A missing variable is replaced by that of
mpirun (Open MPI, MPICH and relatives) or srun. No other module reads a rank from the environment,
and this one does not change it.
"""

import os
import re
from dataclasses import dataclass

from dsv3.errors import ConfigError, shorten

# Below the range of ephemeral ports.
_FIRST_PORT = 15000
_NUM_PORTS = 15000
_MAX_PORT = 2**16 - 1


@dataclass(frozen=True, slots=True)
class _Names:
    """Names of a launcher's variables."""

    rank: str
    world_size: str
    local_rank: str


_TORCHRUN = _Names("RANK", "WORLD_SIZE", "LOCAL_RANK")
# mpirun may start its own helpers with srun, so srun's variables have the lowest precedence.
_MPIRUN = (
    _Names("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    _Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
_SRUN = _Names("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
# In containers to which only selected variables are passed.
_SRUN_PASSED_ON = _Names("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


@dataclass(frozen=True, slots=True)
class RendezvousAddress:
    """Rank 0's host, and a port on it."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def environment_rank() -> int:
    """Return this process's rank; 0 without a launcher.

    Raises:
        ConfigError: the variable is not a number below the number of ranks.
    """
    names = _names()
    rank = _number(names.rank, 0, 0)
    world_size = environment_world_size()
    if rank >= world_size:
        raise ConfigError(
            f"{names.rank}={rank} in the environment must be below {names.world_size}={world_size}"
            f"{'' if names.world_size in os.environ else ' (not set)'}"
        )
    return rank


def environment_world_size() -> int:
    """Return the number of ranks; 1 without a launcher.

    Raises:
        ConfigError: the variable is not a number.
    """
    return _number(_names().world_size, 1, 1)


def environment_local_rank() -> int:
    """Return this process's index on its host; 0 without a launcher.

    Raises:
        ConfigError: the variable is not a number.
    """
    return _number(_names().local_rank, 0, 0)


def rendezvous_address() -> RendezvousAddress:
    """Return the address of the rendezvous.

    Under srun, missing MASTER_ADDR and MASTER_PORT are replaced by the first host of the step and a
    port derived from the job's number.

    Raises:
        ConfigError: a variable is missing or no port.
    """
    host = os.environ.get("MASTER_ADDR")
    port = None
    if "MASTER_PORT" in os.environ:
        port = _number("MASTER_PORT", 1, 1, _MAX_PORT)
    if _has_ranks_of_step():
        host = host or _first_host()
        port = port or _job_port()
    if not host or port is None:
        missing = "MASTER_PORT" if host else "MASTER_ADDR"
        raise ConfigError(
            f"no rendezvous address: {_names().world_size}={environment_world_size()} but "
            f"{missing} is not set; start with torchrun, or export MASTER_ADDR (rank 0's host) and "
            "MASTER_PORT (a free port there) on all ranks, with mpirun by -x or -genv"
        )
    return RendezvousAddress(host, port)


def is_restarted() -> bool:
    """Return True if torchrun has restarted the ranks of this job."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def unused_tasks() -> int:
    """Return the number of tasks of a Slurm job if this process runs alone in it, else 0."""
    if environment_world_size() > 1 or _TORCHRUN.world_size in os.environ:
        return 0
    text = os.environ.get("SLURM_NTASKS", "")
    return int(text) if text.isdecimal() and int(text) > 1 and not _is_step() else 0


def first_host(nodes: str) -> str:
    """Return the first host of a list as Slurm writes it, such as `gpu[03-07,9],login1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


def _names() -> _Names:
    """Return the variables to read: torchrun's if set, else the other launcher's."""
    other = _other_launcher()

    def choose(name: str, other_name: str) -> str:
        return name if name in os.environ else other_name

    return _Names(
        rank=choose(_TORCHRUN.rank, other.rank),
        world_size=choose(_TORCHRUN.world_size, other.world_size),
        local_rank=choose(_TORCHRUN.local_rank, other.local_rank),
    )


def _other_launcher() -> _Names:
    for names in _MPIRUN:
        if names.rank in os.environ and names.world_size in os.environ:
            return names
    if _is_step():
        return _SRUN if _SRUN.world_size in os.environ else _SRUN_PASSED_ON
    return _TORCHRUN


def _is_step() -> bool:
    """Return True if srun has started this process as a task of a step.

    A job's script and its shell, which run alone, have SLURM_PROCID and SLURM_NTASKS too. A shell
    started as a separate step has a terminal (`srun --pty`).
    """
    if _SRUN.rank not in os.environ or "SLURM_PTY_PORT" in os.environ:
        return False
    if _SRUN.world_size in os.environ:
        return "SLURM_STEP_ID" in os.environ or "SLURM_STEPID" in os.environ
    is_script = os.environ.get("ENVIRONMENT") == "BATCH"
    has_address = "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
    return _SRUN_PASSED_ON.world_size in os.environ and has_address and not is_script


def _has_ranks_of_step() -> bool:
    """Return True if the ranks are the tasks of a step, with rank 0 on its first host.

    Helpers of mpirun that srun has started are no ranks.
    """
    size = _SRUN.world_size if _SRUN.world_size in os.environ else _SRUN_PASSED_ON.world_size
    tasks = (os.environ.get(_SRUN.rank), os.environ.get(size))
    return _is_step() and tasks == (str(environment_rank()), str(environment_world_size()))


def _first_host() -> str:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    return first_host(next((os.environ[name] for name in names if os.environ.get(name)), ""))


def _job_port() -> int | None:
    """Return a port derived from job and step: steps of a job may run on the same host."""
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("SLURM_JOBID", "")
    step = os.environ.get("SLURM_STEP_ID") or os.environ.get("SLURM_STEPID", "")
    if not job.isdecimal():
        return None
    return _FIRST_PORT + (int(job) + 101 * int(step if step.isdecimal() else 0)) % _NUM_PORTS


def _number(name: str, default: int, least: int, most: int = 2**31 - 1) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not (text.strip().isdecimal() and least <= int(text) <= most):
        raise ConfigError(
            f"{name}={shorten(text)} in the environment must be a whole number from {least}"
            f"{f' to {most}' if most == _MAX_PORT else ''}; launchers such as torchrun set it, "
            "unset it without one"
        )
    return int(text)

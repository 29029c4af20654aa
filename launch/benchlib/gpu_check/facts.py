"""Facts about the machine and its GPUs, found by another process: this one never opens a GPU."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchlib.table import Row
from dsv3.errors import ConfigError, one_line
from dsv3.version import __version__

_TIMEOUT = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A machine.

    Attributes:
        gpus: names of its GPUs.
        capability: compute capability of the first one, as "9.0"; empty without a GPU.
        memory_gib, free_gib: memory of the first GPU.
        missing: packages that a run needs and that are not installed.
        compiler: the C compiler that Triton calls for its launchers; empty if there is none.
        cores: CPU cores that this process may use.
    """

    python: str
    torch: str
    cuda: str
    triton: str
    driver: str
    gpus: tuple[str, ...]
    capability: str
    memory_gib: float
    free_gib: float
    missing: tuple[str, ...]
    compiler: str
    cores: int

    @property
    def has_overlap(self) -> bool:
        """True if launches can overlap on the first GPU."""
        return bool(self.capability) and float(self.capability) >= 9.0

    def to_row(self) -> Row:
        """Return the facts by name."""
        return asdict(self)

    @property
    def lines(self) -> list[str]:
        """The facts as text."""
        if self.gpus:
            more = f", the first of {len(self.gpus)}" if len(self.gpus) > 1 else ""
            gpu = (
                f"{self.gpus[0]}{more}, compute capability {self.capability}, {self.memory_gib:.1f}"
                f" GiB ({self.free_gib:.1f} free), driver {self.driver or 'unknown'}"
            )
        else:
            gpu = "none"
        return [
            f"GPU: {gpu}",
            f"software: torch {self.torch}, CUDA {self.cuda or 'none'}, triton "
            f"{self.triton or 'none'}, Python {self.python}, C compiler {self.compiler or 'none'}",
        ]


def ask_facts(root: Path) -> Facts:
    """Return the facts that `find_facts` prints.

    Raises:
        ConfigError: torch is missing or cannot be imported.
    """
    command = [sys.executable, "-m", "benchlib.gpu_check.find_facts"]
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"torch did not find the GPUs within {_TIMEOUT:.0f} s; does nvidia-smi answer?"
        ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"{sys.executable} cannot ask torch for the GPUs: {one_line(last)}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Facts(**found | {name: tuple(found[name]) for name in ("gpus", "missing")})


def commit_of(root: Path) -> str:
    """Return the checkout's commit, marked if files differ from it; without git the version."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    if shutil.which("git") is None:
        return f"version {__version__}"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or f"version {__version__}"

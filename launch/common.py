"""Settings of the whole process, which programs change and the library never does."""

import argparse
import ctypes
import gc
import os
from contextlib import suppress
from pathlib import Path

import torch

from dsv3.config import ModelConfig
from dsv3.config_files import load_model_config
from dsv3.distributed.mesh import Mesh
from dsv3.engine.locate import locate_checkpoint
from dsv3.engine.start import Started, start
from program import engine_config

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_COLUMNS_PER_THREAD = 512


def tune_process(mesh: Mesh, num_threads: int | None = None) -> None:
    """Choose this rank's threads and keep freed memory; on a CPU only.

    Args:
        mesh: this rank.
        num_threads: the user's choice; None takes this rank's share of the cores.
    """
    if mesh.device.type != "cpu":
        return
    torch.set_num_threads(num_threads or share_of_cores(mesh.ranks_on_host))
    keep_freed_memory()


def tune_for_model(config: ModelConfig, mesh: Mesh, num_threads: int | None = None) -> None:
    """Adapt the process to a model that has been started and stays.

    Args:
        config: the model.
        mesh: this rank.
        num_threads: the user's choice of threads; it is left as it is.
    """
    if num_threads is None:
        limit_threads(config, mesh)
    gc.freeze()  # objects that exist now stay: the garbage collector need not visit them again


def start_model(args: argparse.Namespace, mesh: Mesh) -> Started:
    """Start the model of the engine's flags in a process that is tuned for it. A collective."""
    num_threads = getattr(args, "threads", None)
    tune_process(mesh, num_threads)
    config = load_model_config(args.config) if args.config else None
    checkpoint = locate_checkpoint(args.ckpt_path, mesh)
    started = start(checkpoint, engine_config(args), mesh, config, args.n_experts)
    tune_for_model(started.config, mesh, num_threads)
    return started


def share_of_cores(ranks_on_host: int) -> int:
    """Return OMP_NUM_THREADS if the user has set it, else this rank's share of the usable cores.

    torchrun sets OMP_NUM_THREADS=1 if it is not set; its own environment shows the user's setting.
    """
    with suppress(OSError):
        parent_environment = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        is_users = any(entry.startswith(b"OMP_NUM_THREADS=") for entry in parent_environment)
        if "TORCHELASTIC_RUN_ID" in os.environ and not is_users:
            os.environ.pop("OMP_NUM_THREADS", None)
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return int(os.environ["OMP_NUM_THREADS"])
    num_cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        num_cores = len(os.sched_getaffinity(0))
    return max(1, num_cores // ranks_on_host)


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for the next step instead of returning it.

    Page faults of a step's temporaries cost a quarter of a prefill of 2048 tokens on the demo
    model. Only glibc has this function.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def limit_threads(config: ModelConfig, mesh: Mesh) -> None:
    """Use no more threads than a small model's products keep busy, unless OMP_NUM_THREADS is set.

    Every operation ends when its last thread does. Where other programs want the cores too, a
    second thread made decoding the demo model 16 times slower.
    """
    if mesh.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        num_useful = max(1, config.hidden_size // _COLUMNS_PER_THREAD)
        torch.set_num_threads(min(torch.get_num_threads(), num_useful))

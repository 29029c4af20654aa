"""What a run used and did, as one JSON object."""

import json
import resource
from pathlib import Path
from typing import Any

import torch

from dsv3.engine.start import Started
from dsv3.errors import ConfigError, OutputError


def collect_stats(started: Started, seconds: dict[str, float]) -> dict[str, Any]:
    """Gather every rank's figures. A collective; the result is complete on rank 0.

    Args:
        started: this rank.
        seconds: of the phases, in the order they ran.
    """
    mesh, engine = started.mesh, started.engine
    group_tokens = started.cache.num_usable_pages * started.cache.layout.page_size
    mine = [
        started.runner.weight_bytes,
        started.cache.num_bytes,
        started.runner.host_cache_bytes,
        mesh.layout.dp * group_tokens,
        _peak_memory(mesh.device),
        mesh.sent_bytes,
    ]
    figures = torch.tensor(mine, dtype=torch.int64, device=mesh.device)
    names = (
        "weight_bytes",
        "cache_bytes",
        "host_cache_bytes",
        "cache_tokens",
        "peak_memory_bytes",
        "sent_bytes",
    )
    ranks = [
        {"rank": rank, **dict(zip(names, values, strict=True))}
        for rank, values in enumerate(mesh.world.all_gather(figures).tolist())
    ]
    done = engine.metrics if engine is not None else None
    return {
        "world_size": mesh.layout.world_size,
        "tp": mesh.layout.tp,
        "dp": mesh.layout.dp,
        "dtype": started.runner.numerics,
        "ranks": ranks,
        "disk_cache_bytes": done.disk_bytes if done else 0,
        "tokens": {
            "prefill": done.prefill_tokens if done else 0,
            "reused": done.reused_tokens if done else 0,
            "decode": done.decode_tokens if done else 0,
            "drafted": 0,
            "accepted": 0,
        },
        "events": {
            "steps": done.steps if done else 0,
            "preemptions": done.preemptions if done else 0,
            "evictions": done.evictions if done else 0,
            "offloads": done.offloads if done else 0,
            "host_hits": done.host_hits if done else 0,
            "disk_hits": done.disk_hits if done else 0,
            "disk_writes": done.disk_writes if done else 0,
        },
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def check_stats_file(path: Path) -> None:
    """Refuse a file that cannot be written before the work is done, not after."""
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"--stats-file {path}: {error.strerror}") from None


def write_stats_file(path: Path, stats: dict[str, Any]) -> None:
    """Write the figures of a run."""
    try:
        path.write_text(json.dumps(stats, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"--stats-file {path}: cannot write ({error.strerror})") from None


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes this process held: on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

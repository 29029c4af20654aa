"""Figures of a run: memory, tokens, events and seconds, as one JSON object."""

import json
import re
import resource
from pathlib import Path
from typing import Any

import torch

from dsv3.engine.metrics import Metrics
from dsv3.engine.start import Started
from dsv3.files import Format, NamedFile, check_output, write_output

_EVENTS = ("steps", "preemptions", "evictions", "offloads", "host_hits", "disk_hits", "disk_writes")
_FORMAT = Format("the figures of a run", re.compile(rb'\{\s*"world_size":'))


def collect_stats(started: Started, seconds: dict[str, float]) -> dict[str, Any]:
    """Gather every rank's figures. A collective; the result is complete on rank 0.

    Args:
        started: this rank.
        seconds: of the phases, in the order they ran.
    """
    mesh = started.mesh
    runner = started.runner
    cache = started.cache
    mine = {
        "weight_bytes": runner.weight_bytes,
        "cache_bytes": cache.num_bytes,
        "host_cache_bytes": runner.host_cache_bytes,
        "cache_tokens": mesh.layout.dp * cache.num_usable_pages * cache.layout.page_size,
        "peak_memory_bytes": _peak_memory(mesh.device),
        "sent_bytes": mesh.sent_bytes,
    }
    figures = torch.tensor(list(mine.values()), dtype=torch.int64, device=mesh.device)
    ranks = [
        {"rank": rank, **dict(zip(mine, values, strict=True))}
        for rank, values in enumerate(mesh.world.all_gather(figures).tolist())
    ]
    done = Metrics() if started.engine is None else started.engine.metrics
    return {
        "world_size": mesh.layout.world_size,
        "tp": mesh.layout.tp,
        "dp": mesh.layout.dp,
        "dtype": runner.numerics,
        "ranks": ranks,
        "disk_cache_bytes": done.disk_bytes,
        "tokens": {
            "prefill": done.prefill_tokens,
            "reused": done.reused_tokens,
            "decode": done.decode_tokens,
            "drafted": done.drafted_tokens,
            "accepted": done.accepted_tokens,
            "accepted_per_position": done.accepted_per_position,
        },
        "events": {name: getattr(done, name) for name in _EVENTS},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def check_stats_file(path: Path) -> None:
    """Raise ConfigError for a file that cannot be written; called before the work begins."""
    check_output(NamedFile("--stats-file", path), _FORMAT)


def write_stats_file(path: Path, stats: dict[str, Any]) -> None:
    """Write the figures of a run."""
    write_output(NamedFile("--stats-file", path), _FORMAT, json.dumps(stats, indent=1) + "\n")


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes this process held: on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

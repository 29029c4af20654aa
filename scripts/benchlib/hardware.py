"""The ceilings that times are held against: given by name, or measured on this machine."""

from functools import partial

import torch

from dsv3.errors import ConfigError
from dsv3.observe.roofline import HARDWARE, Hardware
from dsv3.parallel.collectives import Collectives, SingleRank
from dsv3_kernels.benchmarks import FP8, matrix_peak, median_seconds, read_bandwidth

_SMALL, _LARGE = 1 << 10, 4 << 20


def hardware(
    name: str, device: torch.device, group: Collectives | None = None, memory: float = 0.0
) -> Hardware:
    """Return a preset, or what `measure` finds here. Measuring is a collective of the group."""
    if name in HARDWARE:
        return HARDWARE[name]
    if name != "measure":
        raise ConfigError(f"--hardware={name} is unknown; use measure, {', '.join(HARDWARE)}")
    plain = matrix_peak(device, torch.bfloat16)
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    link, latency = links(group or SingleRank(), device)
    return Hardware(
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else "this processor",
        read=read_bandwidth(device),
        fp8=matrix_peak(device, FP8) if has_fp8 else plain,
        bf16=plain,
        fp32=matrix_peak(device, torch.float32),
        link=link,
        link_latency=latency,
        net=link,
        net_latency=latency,
        memory=memory,
    )


def links(group: Collectives, device: torch.device) -> tuple[float, float]:
    """Return the bytes a second that a rank sends in an all-reduce, and a tiny one's seconds."""
    if group.size == 1:
        return 1.0, 0.0
    seconds = []
    for count in (_SMALL, _LARGE):
        data = torch.zeros(count, device=device)
        seconds.append(median_seconds([partial(group.all_reduce, data)], device))
    sent = 4 * (_LARGE - _SMALL) * 2 * (group.size - 1) / group.size
    return sent / max(seconds[1] - seconds[0], 1e-9), seconds[0]

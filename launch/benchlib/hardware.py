"""Hardware ceilings that times are compared with: by preset name, or measured on this machine."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

from benchlib.kernel_timing import matrix_peak, median_seconds, read_bandwidth
from dsv3.config_fields import refuse_unknown
from dsv3.distributed.collectives import Collectives, SingleRank
from dsv3.errors import ConfigError
from dsv3.files import Format
from dsv3.read_files import read_mapping
from dsv3_kernels.fp8_format import FP8

# YAML with the measured fields of `Hardware`.
HARDWARE_FILE = Format("measured figures of hardware", re.compile(rb"name: .*\nread: "))
_SMALL = 1 << 10
_LARGE = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Peak rates of one rank's device and links.

    Attributes:
        read: bytes per second from device memory.
        fp8, bf16, fp32: matrix FLOPs per second.
        link, link_latency: one-way bytes per second to ranks of the same host, and seconds of a
            tiny exchange.
        net, net_latency: the same to ranks of other hosts.
        launch: seconds from one kernel to the next inside a CUDA graph.
        memory: bytes of device memory.
        ranks_per_host: devices of a host.
    """

    name: str
    read: float
    fp8: float
    bf16: float
    fp32: float
    link: float = 450e9
    link_latency: float = 5e-6
    net: float = 50e9
    net_latency: float = 20e-6
    launch: float = 1e-6
    memory: float = 80e9
    ranks_per_host: int = 8


# H100 80GB HBM3: read and matrix ceilings measured (torch 2.11, CUDA 13.0), of datasheet 3.35 TB/s,
# 1979 and 989 TFLOP/s; fp32 is the datasheet's. NVLink 4 carries 450 GB/s each way, a one-shot
# all-reduce of a few KiB over it takes about 5 us. Between hosts: one 400 Gbit/s port a device.
_H100 = Hardware(name="h100", read=3.211e12, fp8=1473e12, bf16=785e12, fp32=67e12)
HARDWARE = {
    "h100": _H100,
    # The datasheet's 4.8 TB/s at the H100's measured share of its own (95.8 %): not measured.
    "h200": replace(_H100, name="h200", read=4.60e12, memory=141e9),
    # Datasheet: 2.039 TB/s, 312 TFLOP/s at the H100's measured shares of its own, no FP8, NVLink 3
    # with 300 GB/s each way, 200 Gbit/s a device between hosts. Not measured.
    "a100": Hardware(
        name="a100", read=1.95e12, fp8=247e12, bf16=247e12, fp32=19.5e12, link=300e9, net=25e9
    ),
    # H100 with other links: DeepSeek-V3 report, section 3.2.2 (160 GB/s NVLink, 50 GB/s IB).
    "h800": replace(_H100, name="h800", link=160e9),
}


def hardware(
    name: str,
    device: torch.device,
    group: Collectives | None = None,
    memory: float = 0.0,
    fp32: bool = False,
) -> Hardware:
    """Return a preset, or measured ceilings for "measure", which is a collective of the group.

    Args:
        name: "measure" or a preset's name.
        device: the device to measure.
        group: ranks whose links are measured.
        memory: bytes of device memory.
        fp32: also measure float32 products; without it, their ceiling is 0: not known.
    """
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
        fp32=matrix_peak(device, torch.float32) if fp32 else 0.0,
        link=link,
        link_latency=latency,
        net=link,
        net_latency=latency,
        memory=memory,
    )


def read_hardware(text: str, figures: Mapping[str, float]) -> tuple[Hardware, int]:
    """Return the hardware of one rank, and the number of ranks.

    Args:
        text: a known device (h100) or a number of them (h100x8), or a YAML file with the fields
            of `Hardware` and `ranks`.
        figures: values that replace fields.

    Raises:
        ConfigError: `text` is neither, or a field is wrong.
    """
    name, _, count = text.rpartition("x") if text not in HARDWARE else (text, "x", "1")
    if Path(text).is_file():
        data = read_mapping(Path(text)) | dict(figures)
    elif name in HARDWARE and count.isdecimal():
        data = asdict(HARDWARE[name]) | {"ranks": int(count)} | dict(figures)
    else:
        known = ", ".join(f"{name}x8" for name in HARDWARE)
        raise ConfigError(f"--hardware={text} is no file and none of {known} (or another number)")
    known_fields = ["ranks", *(f.name for f in fields(Hardware))]
    refuse_unknown(data, known_fields, f"--hardware={text}", hints=known_fields)
    for field in data.keys() - {"name"}:
        try:
            data[field] = float(data[field])  # YAML reads 3e12 as a string
        except (TypeError, ValueError):
            data[field] = -1.0
        may_be_0 = field == "launch" or field.endswith("latency")
        if not 0 <= data[field] < float("inf") or not (data[field] or may_be_0):
            raise ConfigError(f"--hardware={text}: {field} must be a number above 0")
    ranks = int(data.pop("ranks", 1))
    try:
        return Hardware(**{"name": text, **data}), ranks
    except TypeError as error:
        raise ConfigError(f"--hardware={text}: {error}") from None


def links(group: Collectives, device: torch.device) -> tuple[float, float]:
    """Return bytes per second that a rank sends in an all-reduce, and seconds of a tiny one."""
    if group.size == 1:
        return 1.0, 0.0
    seconds = []
    for count in (_SMALL, _LARGE):
        data = torch.zeros(count, device=device)
        seconds.append(median_seconds([partial(group.all_reduce, data)], device))
    sent = 4 * (_LARGE - _SMALL) * 2 * (group.size - 1) / group.size
    return sent / max(seconds[1] - seconds[0], 1e-9), seconds[0]

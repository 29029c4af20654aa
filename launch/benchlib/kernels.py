"""Check every Triton kernel at DeepSeek-V3's shapes against its reference, then time it.

    python launch/bench.py kernels --ops fp8_gemm mla_decode --json kernels.json
    python launch/bench.py kernels --rows kernels.jsonl
    python launch/bench.py kernels --check

A wrong kernel is not timed. A kernel that cannot be compiled or launched costs its own row; after
an error of CUDA, which the process cannot use any more, the report has the rows so far. Operands
that stream from memory are rotated, so that they are not in the L2 cache; times are medians of
CUDA graphs with many calls. Without a GPU, `--check` compares small shapes in Triton's interpreter.
"""

import argparse
import gc
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchlib.bound import share_of_roof
from benchlib.case_log import CaseLog, describe, spoils_device
from benchlib.flags import Share, close_name, share
from benchlib.hardware import Hardware, hardware
from benchlib.interpreter import patch_interpreter
from benchlib.kernel_cases import Case, cases, check, measure
from benchlib.operation import Op
from benchlib.report import Report, Row
from dsv3.engine.start import set_launches
from dsv3.errors import ConfigError

log = logging.getLogger("dsv3")

RIGHT = "right"
_FIGURES = ("us", "GB/s", "TFLOP/s", "floor us", "% of roof", "peer us", "x peer")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    add = parser.add_argument
    add("--ops", nargs="+", help="names of kernels, in this order (default: all)")
    text = "I/N: every N-th case from number I on"
    add("--share", type=share, default=Share(0, 1), help=text)
    text = "file to write each row to, as it is made; its cases are not run again"
    add("--rows", type=Path, help=text)
    text = "compare results only; without a GPU, in Triton's interpreter"
    add("--check", action="store_true", help=text)
    text = "launch each kernel before the previous one ends"
    add("--overlap-launches", action="store_true", help=text)
    text = "ceilings: measure (on this machine), or the name of a device, such as h100"
    add("--hardware", default="measure", help=text)


def run(args: argparse.Namespace) -> Report:
    """Check each kernel and time the correct ones; rows of wrong kernels have the difference."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.check:
        raise ConfigError("kernels are timed on a GPU, there is none; --check compares them anyway")
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads the variable while it is imported, so the program starts again.
        os.execve(sys.executable, sys.orig_argv, os.environ | {"TRITON_INTERPRET": "1"})
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if not on_gpu:
        patch_interpreter()
    set_launches(args.overlap_launches, device, "--overlap-launches")
    selected = select_cases(args.ops, small=not on_gpu)
    selected = args.share.of(selected)
    ceilings = None if args.check else hardware(args.hardware, device)
    report = Report(
        "kernels", setting={"device": torch.cuda.get_device_name() if on_gpu else "cpu"}
    )
    measure_cases(selected, device, ceilings, CaseLog(args.rows, "--rows"), report)
    return report


def select_cases(ops: Sequence[str] | None, small: bool) -> list[Case]:
    """Return the cases of the kernels that are asked for, in that order; None gives all.

    Raises:
        ConfigError: there is no such kernel.
    """
    every = list(cases(small))
    names = {case.op for case in every}
    if ops is None:
        return every
    for op in ops:
        if op not in names:
            raise ConfigError(f"--ops={op}: no such kernel; {close_name(op, sorted(names))}")
    return [case for op in dict.fromkeys(ops) for case in every if case.op == op]


def measure_cases(
    selected: Sequence[Case],
    device: torch.device,
    ceilings: Hardware | None,
    rows: CaseLog,
    report: Report,
) -> None:
    """Add a row of every case to the report, as long as the device can be used.

    Args:
        selected: the cases.
        device: device that runs them.
        ceilings: peak rates of the device; None compares results only.
        rows: also gets each row, and has the cases that are not run again.
        report: gets the rows, and notes about them.
    """
    names = [f"{case.op} {case.shape}" for case in selected]
    left = [(name, case) for name, case in zip(names, selected, strict=True)]
    left = [(name, case) for name, case in left if name not in rows.begun]
    if len(left) < len(selected):
        report.notes.append(f"{len(selected) - len(left)} cases are in --rows and were not run")
    for number, (name, case) in enumerate(left, 1):
        log.info("%s, %s", case.op, case.shape)
        rows.begin(name)
        row = kernel_row(case, device, ceilings)
        difference = "" if row["check"] == RIGHT else row["check"]
        rows.end(name, difference, row)
        report.rows.append(row)
        if difference:
            report.failures.append(f"{case.op}, {case.shape}")
        if spoils_device(difference):
            report.notes.append(
                f"stopped at {name}: after this error the process cannot use the GPU; "
                f"{len(left) - number} cases were not run"
            )
            break
    num_right = sum(row["check"] == RIGHT for row in report.rows)
    report.notes.insert(0, f"{num_right} of {len(report.rows)} are right")


def kernel_row(case: Case, device: torch.device, ceilings: Hardware | None) -> Row:
    """Return the report's row of one case: the check's result, then times if it is correct."""
    row: Row = {"kernel": case.op, "shape": case.shape, "check": RIGHT}
    if ceilings is not None:
        row |= dict.fromkeys(_FIGURES)
    torch.manual_seed(0)
    try:
        row["check"] = check(case, device) or RIGHT
        if ceilings is not None and row["check"] == RIGHT:
            row |= _timed(case, device, ceilings)
    except Exception as error:  # Triton's compilers and drivers raise errors of many kinds
        log.debug("%s, %s", case.op, case.shape, exc_info=True)
        row["check"] = describe(error)
    if device.type == "cuda" and not spoils_device(row["check"]):
        gc.collect()  # a captured graph keeps its memory
        torch.cuda.empty_cache()
    return row


def _timed(case: Case, device: torch.device, ceilings: Hardware) -> Row:
    seconds, peer_seconds = measure(case, device)
    floor = Op(case.op, case.flops, case.bytes, case.dtype).seconds(ceilings)
    return {
        "us": 1e6 * seconds,
        "GB/s": case.bytes / seconds / 1e9,
        "TFLOP/s": case.flops / seconds / 1e12,
        "floor us": 1e6 * floor,
        "% of roof": share_of_roof(floor, seconds),
        "peer us": None if peer_seconds is None else 1e6 * peer_seconds,
        "x peer": None if peer_seconds is None else peer_seconds / seconds,
    }

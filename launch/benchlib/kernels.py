"""Check every Triton kernel at DeepSeek-V3's shapes against its reference, then time it.

    python launch/bench.py kernels --ops fp8_gemm mla_decode --json kernels.json
    python launch/bench.py kernels --check

A wrong kernel is not timed. Operands that stream from memory are rotated, so that they are not in
the L2 cache; times are medians of CUDA graphs with many calls. Without a GPU, `--check` compares
small shapes in Triton's interpreter.
"""

import argparse
import logging
import os
import sys

import torch

from benchlib.bound import share_of_roof
from benchlib.flags import add_program_flags
from benchlib.hardware import hardware
from benchlib.interpreter import patch_interpreter
from benchlib.kernel_cases import Case, cases, check, measure
from benchlib.report import Report, check_report, machine
from benchlib.roofline import Hardware, Op
from dsv3.engine.program import Parser, set_up_logging
from dsv3.engine.start import set_launches
from dsv3.errors import ConfigError, RankError

log = logging.getLogger("dsv3")


def parse_args(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="bench.py kernels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ops", nargs="+", help="names of kernels (default: all)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare results only; without a GPU, in Triton's interpreter",
    )
    parser.add_argument(
        "--overlap-launches",
        action="store_true",
        help="launch each kernel before the previous one ends",
    )
    parser.add_argument(
        "--hardware",
        default="measure",
        help="ceilings: measure (on this machine), or the name of a device, such as h100",
    )
    add_program_flags(parser)
    return parser.parse_args(arguments)


def compare_and_time(args: argparse.Namespace) -> Report:
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
    selected = [case for case in cases(small=not on_gpu) if not args.ops or case.op in args.ops]
    if not selected:
        names = sorted({case.op for case in cases(small=True)})
        raise ConfigError(f"--ops={' '.join(args.ops or [])}: no such kernel; there are {names}")
    ceilings = None if args.check else hardware(args.hardware, device)
    torch.manual_seed(0)
    report = Report(
        "kernels", setting={"device": torch.cuda.get_device_name() if on_gpu else "cpu"}
    )
    for case in selected:
        log.info("%s, %s", case.op, case.shape)
        report.rows.append(kernel_row(case, device, ceilings))
    wrong = [f"{row['kernel']}, {row['shape']}" for row in report.rows if row["check"] != "right"]
    report.notes = [f"{len(report.rows) - len(wrong)} of {len(report.rows)} are right"]
    return report


def kernel_row(case: Case, device: torch.device, ceilings: Hardware | None) -> dict[str, object]:
    """Return the report's row of one case: the check's result, then times if it is correct."""
    difference = check(case, device)
    row: dict[str, object] = {
        "kernel": case.op,
        "shape": case.shape,
        "check": difference or "right",
    }
    if ceilings is None:
        return row
    if difference:
        columns = ("us", "GB/s", "TFLOP/s", "floor us", "% of roof", "peer us", "x peer")
        return row | dict.fromkeys(columns)
    seconds, peer_seconds = measure(case, device)
    floor = Op(case.op, case.flops, case.bytes, case.dtype).seconds(ceilings)
    return row | {
        "us": 1e6 * seconds,
        "GB/s": case.bytes / seconds / 1e9,
        "TFLOP/s": case.flops / seconds / 1e12,
        "floor us": 1e6 * floor,
        "% of roof": share_of_roof(floor, seconds),
        "peer us": None if peer_seconds is None else 1e6 * peer_seconds,
        "x peer": None if peer_seconds is None else peer_seconds / seconds,
    }


def main(arguments: list[str]) -> int:
    """Check and time the kernels and print the report; wrong kernels are an error."""
    args = parse_args(arguments)
    check_report(args)
    set_up_logging(args.debug)
    report = compare_and_time(args)
    report.setting |= machine(1)
    report.publish(args.json)
    wrong = [f"{row['kernel']}, {row['shape']}" for row in report.rows if row["check"] != "right"]
    if wrong:
        raise RankError(f"kernels are wrong and were not timed: {'; '.join(wrong)}")
    return 0

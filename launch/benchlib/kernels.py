"""Every Triton kernel at DeepSeek-V3's shapes: first whether it is right, then how fast it is.

    python launch/bench.py kernels --ops fp8_gemm mla_decode --json kernels.json
    python launch/bench.py kernels --check

A wrong kernel is not timed. Operands that stream from memory are rotated, so that the L2 cache does
not hold them; times are medians of CUDA graphs with many calls. Without a GPU `--check` compares
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
from benchlib.interpreter import mend_interpreter
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
    parser.add_argument("--ops", nargs="+", help="only these (default: all)")
    parser.add_argument(
        "--check", action="store_true", help="only compare; without a GPU in the interpreter"
    )
    parser.add_argument("--overlap-launches", action="store_true", help="begin them early")
    parser.add_argument("--hardware", default="measure", help="ceilings: measure, h100 or h200")
    add_program_flags(parser)
    return parser.parse_args(arguments)


def compare_and_time(args: argparse.Namespace) -> Report:
    """Measure what is right; the check of what is not says why."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.check:
        raise ConfigError("kernels are timed on a GPU, there is none; --check compares them anyway")
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton looks at it while it is imported.
        os.execve(sys.executable, sys.orig_argv, os.environ | {"TRITON_INTERPRET": "1"})
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if not on_gpu:
        mend_interpreter()
    set_launches(args.overlap_launches, device, "--overlap-launches")
    known = [case for case in cases(small=not on_gpu) if not args.ops or case.op in args.ops]
    if not known:
        every = sorted({case.op for case in cases(small=True)})
        raise ConfigError(f"--ops={' '.join(args.ops or [])}: no such kernel; there are {every}")
    ceilings = None if args.check else hardware(args.hardware, device)
    torch.manual_seed(0)
    report = Report(
        "kernels", setting={"device": torch.cuda.get_device_name() if on_gpu else "cpu"}
    )
    for case in known:
        log.info("%s, %s", case.op, case.shape)
        report.rows.append(kernel_row(case, device, ceilings))
    wrong = [f"{row['kernel']}, {row['shape']}" for row in report.rows if row["check"] != "right"]
    report.notes = [f"{len(report.rows) - len(wrong)} of {len(report.rows)} are right"]
    return report


def kernel_row(case: Case, device: torch.device, ceilings: Hardware | None) -> dict[str, object]:
    """Compare, then measure."""
    wrong = check(case, device)
    row: dict[str, object] = {"kernel": case.op, "shape": case.shape, "check": wrong or "right"}
    if ceilings is None:
        return row
    keys = ("us", "GB/s", "TFLOP/s", "floor us", "% of roof", "peer us", "x peer")
    if wrong:
        return row | dict.fromkeys(keys)
    seconds, peer = measure(case, device)
    op = Op(case.op, case.flops, case.bytes, case.dtype)
    floor = op.seconds(ceilings)
    rates = case.bytes / seconds / 1e9, case.flops / seconds / 1e12
    beside = (None, None) if peer is None else (1e6 * peer, peer / seconds)
    values = (1e6 * seconds, *rates, 1e6 * floor, share_of_roof(floor, seconds), *beside)
    return row | dict(zip(keys, values, strict=True))


def main(arguments: list[str]) -> int:
    """Compare, time, report; wrong kernels are an error."""
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

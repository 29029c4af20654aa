"""The first look at a GPU: two kernels, one CUDA graph, the ceilings of memory and matrix units.

    python -m benchlib.gpu_check.smoke ROWS

Without a GPU, Triton's interpreter (TRITON_INTERPRET=1) runs the kernels, and there is no graph.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchlib.case_log import CaseLog, describe, spoils_device
from benchlib.hardware import hardware
from benchlib.interpreter import patch_interpreter
from benchlib.table import Row
from dsv3_kernels import Quantized, act_quant, fp8_gemm, make_locks
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

_REPLAYS = 50
_TOLERANCE = 2**-7


class Step:
    """A step of two kernels: quantize activations, multiply by an FP8 weight."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(4, 512, device=device).bfloat16()
        self.w = (torch.randn(576, 512, device=device) * 20).to(torch.float8_e4m3fn)
        self.scale = torch.rand(5, 4, device=device)
        self.locks = make_locks(self.w)

    def __call__(self) -> Tensor:
        """Return the product."""
        quantized = act_quant.kernel(self.x)
        return fp8_gemm.kernel(quantized, self.w, self.scale, torch.bfloat16, self.locks)


def check_kernels(device: torch.device) -> Row:
    """Compare both kernels with their references on the CPU."""
    step = Step(device)
    got = act_quant.kernel(step.x)
    want = act_quant.reference(step.x.cpu())
    assert_close("scale", got.scale.cpu(), want.scale, 1e-6)
    if device.type == "cuda":  # the interpreter rounds FP8 values differently
        assert_bitwise_equal("act_quant", got.q.cpu().view(torch.uint8), want.q.view(torch.uint8))
    on_host = Quantized(got.q.cpu(), got.scale.cpu())
    product = fp8_gemm.reference(on_host, step.w.cpu(), step.scale.cpu(), torch.float32)
    assert_close("fp8_gemm", step().float().cpu(), product, _TOLERANCE)
    return {}


def check_graph(device: torch.device) -> Row:
    """Compare replays of a CUDA graph with eager steps, bit for bit."""
    step = Step(device)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for replay in range(_REPLAYS):
        step.x.normal_()
        graph.replay()
        assert_bitwise_equal(f"replay {replay}", result, step())
    return {"replays": _REPLAYS}


def measure_ceilings(device: torch.device) -> Row:
    """Return the rates of memory and matrix units."""
    found = hardware("measure", device)
    tera = 1e12
    rates = {"bf16 TFLOP/s": found.bf16 / tera, "fp8 TFLOP/s": found.fp8 / tera}
    return {"TB/s": found.read / tera, **rates}


def main(rows: Path) -> int:
    """Run the cases, and write their rows; return 1 if one has failed."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    cases: dict[str, Callable[[torch.device], Row]] = {"kernels": check_kernels}
    if on_gpu:
        cases |= {"CUDA graph": check_graph, "ceilings": measure_ceilings}
    else:
        patch_interpreter()
    log = CaseLog(rows)
    num_failed = 0
    for name, run in cases.items():
        if name in log.begun:
            continue
        log.begin(name)
        why = ""
        figures: Row = {}
        try:
            figures = run(device)
        except Exception as error:  # Triton's compilers and drivers raise errors of many kinds
            why = describe(error)
            num_failed += 1
        log.end(name, why, figures)
        print(name, why or "passed", figures or "", flush=True)
        if spoils_device(why):
            break
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

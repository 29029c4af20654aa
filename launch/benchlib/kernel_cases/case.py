"""A kernel at one shape: whether it is right and how fast; shapes and operands that cases share."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchlib.kernel_timing import FP8, copies_needed, median_seconds
from dsv3_kernels.gemm.act_quant import Quantized, act_quant
from dsv3_kernels.testing import assert_close

log = logging.getLogger(__name__)

Args = tuple[Any, ...]
BLOCK = 128
D, FF, E, K, VOCAB = 7168, 2048, 32, 8, 129280
HEADS, QUERY, C, R, N, V = 16, 1536, 512, 64, 128, 128
BF16_TOL, FP8_TOL = 2**-7, 2**-3


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape.

    Attributes:
        op, shape: its name.
        make: fresh random operands on a device.
        kernel, reference: take them; what they return must agree.
        bytes, flops: that it cannot do without.
        dtype: of the matrix units: "fp8" or "bf16".
        tol: allowed difference, as a share of the largest value.
        peer: what cuBLAS or torch has for it; None if they cannot do it.
        view: makes results comparable that may differ in order.
    """

    op: str
    shape: str
    make: Callable[[torch.device], Args]
    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    bytes: float
    flops: float = 0.0
    dtype: str = "bf16"
    tol: float = BF16_TOL
    peer: Callable[..., Any] | None = None
    view: Callable[[Any], Any] = lambda result: result


def check(case: Case, device: torch.device) -> str:
    """Return what is wrong with a kernel on fresh operands; nothing if it is right."""
    operands = case.make(device)
    want = _tensors(case.view(case.reference(*operands)))
    try:
        got = _tensors(case.view(case.kernel(*operands)))
        assert len(got) == len(want), f"{len(got)} results, want {len(want)}"
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert a.dtype == b.dtype, f"result {i} is {a.dtype}, want {b.dtype}"
            assert_close(f"result {i}", a.float(), b.float(), case.tol)
    except (AssertionError, RuntimeError) as error:
        return str(error) or type(error).__name__
    return ""


def measure(case: Case, device: torch.device) -> tuple[float, float | None]:
    """Return the seconds of the kernel, and of its peer where that can do the job."""
    sets = [case.make(device) for _ in range(copies_needed(case.bytes))]

    def seconds(run: Callable[..., Any]) -> float:
        return median_seconds([partial(run, *operands) for operands in sets], device)

    ours = seconds(case.kernel)
    if case.peer is None:
        return ours, None
    try:
        return ours, seconds(case.peer)
    except (RuntimeError, ValueError) as error:  # old devices and versions cannot do it
        log.warning("%s %s: no peer: %s", case.op, case.shape, str(error).split("\n")[0])
        return ours, None


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, tuple | list):
        return [t for part in result for t in _tensors(part)]
    return []


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return random values."""
    return torch.randn(shape, device=device).to(dtype)


def scaled(rows: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return an FP8 matrix and scales of clearly different size."""
    w = (torch.randn(rows, cols, device=device) * 20).to(FP8)
    scale = torch.rand(-(-rows // BLOCK), -(-cols // BLOCK), device=device) + 0.1
    return w, scale / 20 / cols**0.5


def quantized(rows: int, cols: int, device: torch.device) -> Quantized:
    """Return random FP8 rows and their scales."""
    return act_quant.reference(torch.randn(rows, cols, device=device))

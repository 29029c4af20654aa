"""A kernel at one shape: its check and its timing; shapes and operands shared by the cases."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchlib.case_log import spoils_device
from benchlib.kernel_timing import copies_needed, median_seconds
from dsv3_kernels.fp8_format import BLOCK, FP8
from dsv3_kernels.gemm.act_quant import Quantized, act_quant
from dsv3_kernels.operation import Operation
from dsv3_kernels.testing import assert_close

log = logging.getLogger(__name__)

Args = tuple[Any, ...]
D = 7168
FF = 2048
E = 32
K = 8
VOCAB = 129280
HEADS = 16
QUERY = 1536
C = 512
R = 64
N = 128
V = 128
BF16_TOL = 2**-7
FP8_TOL = 2**-3
_BUDGET = 1.0  # seconds of a case's timed calls


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape.

    Attributes:
        op, shape: name of the kernel, and its shape in words.
        make: returns fresh random operands on a device.
        kernel, reference: called with the operands; their results must agree.
        bytes, flops: least bytes of memory and FLOPs of the operation.
        dtype: format of the matrix products: "fp8" or "bf16".
        tol: allowed difference, as a share of the largest value.
        peer: the same operation by cuBLAS or torch; None if they do not have it.
        view: sorts results whose order may differ.
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

    @classmethod
    def of(
        cls,
        operation: Operation[Any, ..., Any],
        shape: str,
        make: Callable[[torch.device], Args],
        bytes: float,
        flops: float = 0.0,
        dtype: str = "bf16",
        **more: Any,
    ) -> "Case":
        """Return the case of an operation whose results need no preparation."""
        name = operation.reference.__name__
        return cls(
            name, shape, make, operation.kernel, operation.reference, bytes, flops, dtype, **more
        )


def check(case: Case, device: torch.device) -> str:
    """Return the difference of a kernel from its reference on fresh operands; empty if none.

    Errors of the kernel and of its compilation are raised.
    """
    operands = case.make(device)
    want = _tensors(case.view(case.reference(*operands)))
    got = _tensors(case.view(case.kernel(*operands)))
    try:
        assert len(got) == len(want), f"{len(got)} results, want {len(want)}"
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert a.dtype == b.dtype, f"result {i} is {a.dtype}, want {b.dtype}"
            assert_close(f"result {i}", a.float(), b.float(), case.tol)
    except AssertionError as difference:
        return str(difference)
    return ""


def measure(case: Case, device: torch.device) -> tuple[float, float | None]:
    """Return the seconds of the kernel, and of its peer if it has one that runs here."""
    sets = [case.make(device) for _ in range(copies_needed(case.bytes))]

    def seconds(run: Callable[..., Any]) -> float:
        return median_seconds([partial(run, *operands) for operands in sets], device, _BUDGET)

    ours = seconds(case.kernel)
    if case.peer is None:
        return ours, None
    try:
        return ours, seconds(case.peer)
    except (RuntimeError, ValueError) as error:  # old devices and versions cannot do it
        if spoils_device(str(error)):
            raise
        log.warning("%s %s: no peer: %s", case.op, case.shape, str(error).split("\n")[0])
        return ours, None


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, tuple | list):
        return [t for part in result for t in _tensors(part)]
    return []


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a tensor of normally distributed values."""
    return torch.randn(shape, device=device).to(dtype)


def scaled(rows: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a random FP8 matrix, and scales that differ clearly between blocks."""
    w = (torch.randn(rows, cols, device=device) * 20).to(FP8)
    scale = torch.rand(-(-rows // BLOCK), -(-cols // BLOCK), device=device) + 0.1
    return w, scale / 20 / cols**0.5


def quantized(rows: int, cols: int, device: torch.device) -> Quantized:
    """Return random FP8 rows and their scales."""
    return act_quant.reference(torch.randn(rows, cols, device=device))

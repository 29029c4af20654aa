"""Operations pick an implementation by device, and both implementations have one signature."""

import importlib
import inspect
import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dsv3_kernels
from dsv3_kernels import operation
from dsv3_kernels._triton import HAS_TRITON
from dsv3_kernels.operation import Operation


def operations() -> dict[str, Operation[Any, Any, Any]]:
    found = {}
    for module in pkgutil.walk_packages(dsv3_kernels.__path__, "dsv3_kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, Operation):
                found[name] = value
    return found


def test_the_device_of_the_first_argument_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    @operation.operation(kernel=lambda x, sign=1: ("kernel", sign))
    def op(x: Any, sign: int = 1) -> tuple[str, int]:
        """Return the implementation."""
        return "reference", sign

    assert op(torch.ones(1), -1) == ("reference", -1)
    gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(
        operation, "gpu_of", lambda device: device if device.type == "cuda" else None
    )
    assert op(gpu, sign=2) == ("kernel" if HAS_TRITON else "reference", 2)
    assert op.reference(gpu) == ("reference", 1) and op.kernel(torch.ones(1)) == ("kernel", 1)
    monkeypatch.setattr(operation, "use_triton", lambda x: True)
    assert op(torch.ones(1)) == ("kernel", 1) and op.uses_triton(torch.ones(1))
    assert (getattr(op, "__name__", ""), op.__doc__) == ("op", "Return the implementation.")


def test_both_implementations_have_the_same_signature() -> None:
    found = operations()
    assert len(found) >= 24
    for name, op in found.items():
        assert inspect.signature(op.kernel) == inspect.signature(op.reference), name
        assert name == getattr(op, "__name__", "") and op.__doc__, name

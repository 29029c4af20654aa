"""Without triton the package imports, and the references compute."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3_kernels import _triton, overlap_launches
from dsv3_kernels._triton import HAS_TRITON, launch_options
from dsv3_kernels.operation import use_triton

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None  # an import anywhere would fail
import torch
from dsv3_kernels import act_quant, add_rmsnorm, fp8_gemm
from dsv3_kernels._triton import HAS_TRITON
assert not HAS_TRITON
x = torch.randn(3, 256)
_, h, q = add_rmsnorm(x, x, torch.ones(256), 1e-6, quant=True)
w, scale = torch.ones(5, 256).to(torch.float8_e4m3fn), torch.ones(1, 2)
print(tuple(fp8_gemm(q, w, scale).shape))
"""


def test_without_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("(3, 5)\n", 0), done.stderr


def test_a_cpu_tensor_is_for_the_references() -> None:
    assert not use_triton(torch.ones(1))
    assert HAS_TRITON or sys.platform != "linux"


def test_launches_overlap_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_OVERLAPS", _triton._OVERLAPS)
    gpu, capability = torch.device("cuda"), [(8, 9)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability[0])
    for device in (torch.device("cpu"), gpu):
        with pytest.raises(ValueError, match="overlapping launches need a GPU of compute"):
            overlap_launches(device)
    assert launch_options() == {}
    capability[0] = (9, 0)
    overlap_launches(gpu)
    assert launch_options() == {"launch_pdl": True} and _triton._OVERLAPS.value


def test_every_kernel_waits_its_turn() -> None:
    """With overlapping launches, one that does not could read values not yet written."""
    kernels = launches = 0
    for path in (ROOT / "kernels/dsv3_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                first = next(ast.unparse(line) for line in node.body if not is_text(line))
                assert first == "in_turn()", f"{path.name}: {node.name}"
                kernels += 1
            if isinstance(node, ast.Call) and ast.unparse(node.func).find("_kernel[") >= 0:
                assert "**launch_options()" in ast.unparse(node), f"{path.name}: {node.lineno}"
                launches += 1
    assert kernels == launches > 20


def is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)

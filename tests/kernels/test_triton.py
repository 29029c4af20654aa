"""Without triton the package imports, and the references compute."""

import subprocess
import sys

import torch

from dsv3_kernels._triton import HAS_TRITON, use_triton

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

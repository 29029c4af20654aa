"""The GPU tests run too if there is a GPU, in a process that compiles kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_kernels() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(Path(__file__).parent)]
    compiled = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=compiled, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]

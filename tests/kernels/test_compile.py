"""The compiler takes every kernel as it is launched, for Hopper and for GPUs without e4m3."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_kernels._triton import HAS_TRITON

SCRIPT = str(Path(__file__).with_name("compile_only.py"))


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, SCRIPT, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert len(compiled) >= 7
    # Shared memory of a program: what such GPUs have at least.
    limit = 227 << 10 if capability == 90 else 99 << 10
    assert max(compiled.values()) <= limit, compiled

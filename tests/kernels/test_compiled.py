"""The kernels of the experts compile for GPUs, which the interpreter says nothing about."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Compile in another process: this one has the interpreter."""
    cache = str(tmp_path_factory.mktemp("triton"))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled"],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "PYTHONPATH": paths},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_loops_hold_everything_in_registers(compiled: dict[str, dict[str, int]]) -> None:
    """Stack is memory. The widest tile keeps a little there between its loops."""
    stack = {name: made["stack"] for name, made in compiled.items()}
    # An older matrix unit takes all of its operands from registers.
    assert stack.pop("sm_89 fp8 down 256") <= 1024
    assert max(stack.values()) <= 64, stack


def test_hopper_uses_its_matrix_units_and_memory(compiled: dict[str, dict[str, int]]) -> None:
    for name, made in compiled.items():
        if name.startswith(("fp8", "bf16")):
            assert made["wgmma"] and not made["mma"], (name, made)
        assert made["shared"] <= 227 << 10, (name, made)
    assert all(compiled[name]["tma"] for name in ("fp8 down 256", "bf16 gate_up 256"))
    assert not compiled["fp32 down 256"]["wgmma"], "float32 is multiplied without rounding"
    older = [made for name, made in compiled.items() if name.startswith("sm_8")]
    assert len(older) == 3 and all(made["mma"] and made["shared"] <= 99 << 10 for made in older)

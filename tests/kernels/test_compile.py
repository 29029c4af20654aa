"""The compiler takes every kernel as it is launched, for Hopper and for GPUs without e4m3."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from dsv3_kernels._triton import HAS_TRITON

HERE = Path(__file__).parent


def output_of(script: str, cache: Path, *args: str) -> list[str]:
    root = HERE.parents[1]
    paths = os.pathsep.join([str(root), str(root / "launch"), os.environ.get("PYTHONPATH", "")])
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *args],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, "Future[list[str]]"]]:
    """Compile for both kinds of GPU at the same time: each takes a core for more than a minute."""
    with ThreadPoolExecutor() as pool:
        yield {
            capability: pool.submit(
                output_of, "compile_only.py", tmp_path_factory.mktemp("cache"), str(capability)
            )
            for capability in (80, 90)
        }


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int, outputs: dict[int, "Future[list[str]]"]) -> None:
    lines = [line.split() for line in outputs[capability].result()]
    compiled = [(line[0], [int(number) for number in line[1:]]) for line in lines]
    assert len({name for name, _ in compiled}) >= 27
    # Shared memory of a program: what such GPUs have at least.
    limit = 227 << 10 if capability == 90 else 99 << 10
    assert max(numbers[0] for _, numbers in compiled) <= limit, compiled
    # The widest tiles keep a little in memory, between their loops; older units want operands in
    # registers, too.
    most = 512
    assert max(numbers[1] for _, numbers in compiled) <= most, compiled
    if capability == 90:
        products = ("_gate_up_kernel", "_down_kernel", "_router_logits_kernel")
        for kernel in (*products, "_index_scores_kernel"):
            units = [numbers[2] for name, numbers in compiled if name == kernel]
            assert any(units) and not all(units), "float32 is multiplied without rounding"
        assert any(numbers[3] for name, numbers in compiled if name == "_down_kernel")
        registers = [numbers[-1] for name, numbers in compiled if name == "_expand_values_kernel"]
        assert max(registers) <= 160, "parts are read 16 bytes at a time"
    fences = [numbers[4:7] for name, numbers in compiled if name == "_sum_norm_kernel"]
    # One word to the peers, one wait for theirs, and every part read past the cache.
    assert [(release, acquire, loads > 0) for release, acquire, loads in fences] == 2 * [
        (1, 1, True)
    ]


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_steps_ask_for_listed_variants_only(tmp_path: Path) -> None:
    """Random batches, prompts and contexts, on a GPU that is not there."""
    for line in output_of("variants.py", tmp_path, "24"):
        found = re.fullmatch(r"listed (\d+) asked (\d+)", line)
        assert found is not None, line
        listed, asked = found.groups()
        assert 40 < int(asked) <= int(listed) < 100


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_kernels_are_compiled_ahead_once(tmp_path: Path) -> None:
    first, second, damaged, hits = json.loads(output_of("ahead.py", tmp_path)[-1])
    assert first == 4 * ["compiled"] and second == 4 * ["cached"]
    assert damaged == sorted(damaged) and [text.split(":")[0] for text in damaged] == [
        "AttributeError",
        "KeyError",
    ]
    assert hits == 4 * [True], "what was compiled ahead is what a launch asks for"

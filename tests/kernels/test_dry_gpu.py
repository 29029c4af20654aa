"""Our programs' way on a GPU, on one that is not there."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dsv3.config_files import DEMO
from dsv3.engine.transfer import all_to_device
from dsv3_kernels._triton import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
ROOT = Path(__file__).parents[2]
# They run steps, which wait only for the tokens of the step before.
STEPS = (
    "runner",
    "sampler",
    "step_result",
    "transfer",
    "attention",
    "moe",
    "expert_dispatch",
    "linear",
    "sequence_parallel",
)


def dry_run(*command: object) -> dict[str, Any]:
    """Return the report; kernels are specialized for their arguments, but not compiled."""
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "launch")),
    }
    done = subprocess.run(
        [sys.executable, ROOT / "tests/kernels/dry_run.py", *map(str, command)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cannot be captured" not in done.stderr, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report["replays"] > 0
    return report


def waits_of_steps(report: dict[str, Any]) -> set[str]:
    places = (place.split(" ", 1) for place in report["waits"])
    return {f"{file} {why.split(': ')[1]}" for file, why in places if file[:-3] in STEPS}


def test_rank_of_v3() -> None:
    flags = "--layers 2 --batch 3 --context 200 --prefill 300 --steps 1 --hardware h100 --debug"
    report = dry_run("launch/bench.py", "rank", *flags.split())
    assert len(report["launches"]) >= 17
    assert "index with a mask" in str(report["waits"]), "its count of the experts hit"
    assert waits_of_steps(report) == {"transfer.py fresh pinned memory"}


def test_demo_in_fp8(tmp_path: Path) -> None:
    """Chunks, reuse, pages that go to host memory and come back, drawn tokens, probabilities."""
    story = "The quick brown fox jumps over the lazy dog and runs into the forest. "
    bodies: list[dict[str, Any]] = [
        {"prompt": f"{name}. {story * 12}", "max_tokens": 3} for name in ("Ann", "Bob", "Cid")
    ]
    bodies += [bodies[0], {"prompt": "Hi", "temperature": 0.8, "top_p": 0.9, "max_tokens": 9}]
    bodies += [{"prompt": story * 9, "echo": True, "logprobs": 2, "max_tokens": 0}]
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for i, body in enumerate(bodies):
            row = {"method": "POST", "url": "/v1/completions", "body": {"temperature": 0} | body}
            file.write(json.dumps({"custom_id": f"row {i}"} | row) + "\n")
    stats = tmp_path / "stats.json"
    flags = "--dtype fp8 --kv-dtype fp8 --max-running 2 --max-batch-tokens 128 --strict --debug"
    flags += " --compile-ahead off"  # nothing compiles here
    sizes = "--kv-cache-size 512tok --kv-host-cache 16MiB"
    files = ("--input-file", rows, "--output-file", tmp_path / "out.jsonl", "--stats-file", stats)
    command = ("launch/generate.py", "--ckpt-path", DEMO, *files, *flags.split(), *sizes.split())
    report = dry_run(*command)
    assert "_sample_kernel" in report["launches"] and "_mla_prefill_kernel" in report["launches"]
    events = json.loads(stats.read_text())["events"]
    assert events["evictions"] > 0, events
    waits = {"transfer.py fresh pinned memory", "step_result.py Event.synchronize"}
    assert waits_of_steps(report) == waits


def test_a_failed_capture_costs_its_bucket_only() -> None:
    report = dry_run("tests/kernels/failed_capture.py")
    assert report["replays"] == 2 + 2 + 3 and not report["recording"]


def test_the_indexer_is_captured() -> None:
    report = dry_run("tests/kernels/captured_index.py")
    assert report["replays"] == 3 and not report["recording"]
    for kernel in ("_index_key", "_index_query", "_index_scores", "_top_scores", "_select_slots"):
        assert report["launches"][f"{kernel}_kernel"] == 3 * 2
    waits = {place.split(": ")[1] for place in report["waits"]}
    assert waits == {"synchronize", "empty_cache"}, "of the captures' beginnings"


def test_what_a_gpu_refuses() -> None:
    from tests.kernels.dry_cuda import Graph, dry_gpu, end_pool
    from tests.kernels.dry_gpu import OnGpu

    with dry_gpu() as gpu:
        x, host = torch.arange(4.0, device="cuda"), torch.ones(4)
        assert isinstance(x, OnGpu) and x.is_cuda and x.tolist() == [0, 1, 2, 3]
        large = torch.zeros(1 << 20, device="cuda") + 1
        assert isinstance(large, OnGpu)
        assert large.held.is_meta and float(large.sum()) == 0.0
        with pytest.raises(AssertionError, match="and of the host's"):
            x + host
        x[1:3] = x[:2] + host.cuda()[:2]
        assert (x * 2).cpu().tolist() == [0, 2, 4, 6]
        for refused in (
            x.sum().item,
            partial(OnGpu.__getitem__, x, x > 1),
            partial(x.copy_, host),
            partial(torch.tensor, [1.0], device="cuda"),
            torch.cuda.synchronize,
        ):
            refusal = pytest.raises(RuntimeError, match="previous error")
            with refusal, torch.cuda.graph(cast(torch.cuda.CUDAGraph, Graph())):
                refused()
            end_pool(0, None)
        graph = Graph()
        with torch.cuda.graph(cast(torch.cuda.CUDAGraph, graph)):
            y = (x + 1) * 2
        graph.replay()
        assert gpu.replays == 1 and y.shape == (4,)
        del x, refused
        with pytest.raises(AssertionError, match="freed"):
            graph.replay()


def test_arrays_go_to_the_device_in_one_copy() -> None:
    from tests.kernels.dry_cuda import dry_gpu

    arrays: list[NDArray[Any]] = [
        np.arange(3),
        np.array([[1.5], [2.5]], np.float32),
        np.zeros((0, 2)),
        np.arange(6, dtype=np.int32).reshape(2, 3).T,
    ]
    with dry_gpu() as gpu:
        before = gpu.waits.total()
        sent = all_to_device(arrays, torch.device("cuda"))
        assert gpu.waits.total() == before + 1
        for got, values in zip(sent, arrays, strict=True):
            assert got.is_cuda and got.dtype == torch.from_numpy(values).dtype
            assert got.tolist() == values.tolist() and got.is_contiguous()

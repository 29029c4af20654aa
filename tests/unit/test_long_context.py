"""Long contexts: a prompt's steps need no more memory, and positions are right up to the end."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3.config_files import load_model_config
from dsv3.engine.runner import BatchBuilder
from dsv3.engine.start import Started
from dsv3.engine.step_plan import StepPlan
from dsv3.model import indexer
from dsv3.model.rotary import Rotary, inverse_frequencies
from dsv3_kernels import PageTables, candidate_positions, select_slots
from dsv3_kernels.testing import assert_close
from tests.checkpoint_files import TINY, random_tensors, write_hf
from tests.oracle.run import CPU, start_alone

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 163_840
# With fewer index heads many scores are 0, and selecting among ties takes memory by chance.
SPARSE = dataclasses.replace(
    TINY,
    model_type="deepseek_v32",
    num_hidden_layers=1,
    hidden_size=64,
    intermediate_size=64,
    q_lora_rank=32,
    kv_lora_rank=32,
    index_n_heads=4,
    index_head_dim=16,
    index_topk=64,
    max_position_embeddings=CONTEXT,
)
RESET = Path("/proc/self/clear_refs")
MIB = 1 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_hf(tmp_path_factory.mktemp("sparse"), SPARSE, random_tensors(SPARSE))
    (path / "tokenizer.json").unlink()
    return path


@pytest.mark.slow
@pytest.mark.skipif(not RESET.exists(), reason="needs Linux's high-water mark of a process")
def test_memory_of_a_prompt_does_not_grow_with_its_length(checkpoint: Path) -> None:
    program = [sys.executable, str(ROOT / "tests/long_prompt.py"), str(checkpoint)]
    # Otherwise the allocator keeps freed blocks, and which ones is a matter of chance.
    limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    short, long = (
        int(
            subprocess.run(
                [*program, str(num_tokens)],
                env=os.environ | limits | paths,
                stdout=subprocess.PIPE,
                check=True,
            ).stdout
        )
        for num_tokens in (8192, 32768)
    )
    assert short > 8 * MIB, "scores alone take 8 MiB"
    assert abs(long - short) < 4 * MIB, f"{short=:,} {long=:,}"


@pytest.fixture
def selected(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The selected positions of each call, [T, K]."""
    found: list[Tensor] = []

    def record(candidate_PTK: Tensor, k: int, tables: PageTables) -> PageTables:
        found.append(candidate_positions(candidate_PTK[0]))
        return select_slots(candidate_PTK, k, tables)

    monkeypatch.setattr(indexer, "select_slots", record)
    return found


def logits(started: Started, first: int, token_ids: list[int], page_G: Tensor) -> Tensor:
    """Return the logits of a sequence's tokens from position `first` on."""
    plan = StepPlan.greedy(
        np.array(token_ids, np.int32), np.array([first], np.int32), page_G[None].int().numpy()
    )
    runner = started.runner
    with torch.inference_mode():
        batch = BatchBuilder(plan, started.cache.layout, CPU, runner.rule).build()
        return runner.model.logits(runner.model(batch, started.cache))


def test_the_last_positions_of_the_context(checkpoint: Path, selected: list[Tensor]) -> None:
    """In one chunk, token by token, and from other pages: the same logits and selections."""
    started = start_alone(checkpoint, kv_cache_size=f"{CONTEXT + 64}tok")
    cache = started.cache
    torch.manual_seed(0)
    for plane in cache.planes:
        plane.normal_()
    token_ids, first = [5, 17, 42, 8], CONTEXT - 4
    page_G = torch.arange(1, 1 + CONTEXT // 64)
    chunk = logits(started, first, token_ids, page_G)
    (positions,) = selected
    assert positions.shape == (4, SPARSE.index_topk) and positions.min() >= 0
    assert (positions <= torch.arange(first, CONTEXT)[:, None]).all()
    assert positions.max() > 1 << 17 and positions.min() < 1 << 16
    one_by_one = [logits(started, first + i, [token], page_G) for i, token in enumerate(token_ids)]
    assert_close("token by token", torch.cat(one_by_one), chunk, 1e-5)
    other_G = page_G[torch.randperm(len(page_G))]
    cache.copy_pages(page_G, other_G)
    assert_close("other pages", logits(started, first, token_ids, other_G), chunk, 1e-5)
    assert all(torch.equal(p, positions[i : i + 1]) for i, p in enumerate(selected[1:5]))
    assert torch.equal(selected[5], positions)


def test_angles_at_the_end_of_the_context() -> None:
    """Float32 has room for them: off by less than a hundredth of a radian."""
    for name in ("v3.2-671b", "v3-671b"):
        config = load_model_config(name)
        assert config.max_position_embeddings == CONTEXT
        position_T = torch.tensor([0, 1, 65_535, 131_072, CONTEXT - 1])
        rotation = Rotary(config, CPU)(position_T)
        angle_Tr = position_T[:, None].double() * inverse_frequencies(config).double()
        mscale = config.cos_sin_mscale
        for ours, exact in ((rotation.cos_Tr, angle_Tr.cos()), (rotation.sin_Tr, angle_Tr.sin())):
            assert (ours - mscale * exact).abs().max() < 0.01

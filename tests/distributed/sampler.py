"""Check on every rank: tokens sampled from logits split over the ranks."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from dsv3.distributed.mesh import Mesh
from dsv3.engine.sampler import Sampler
from dsv3.engine.step_plan import NO_TARGET, NOT_FINITE, StepPlan
from dsv3.engine.step_result import HostResult
from dsv3.model.transformer import Transformer
from dsv3_kernels.testing import assert_close
from tests.distributed.ranks import CPU, alone


def check_sampler(mesh: Mesh) -> None:
    """Logits split over the ranks give the same tokens and probabilities as whole ones."""
    vocab, rows = 331, 41
    table = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(2)) * 3
    table[:9, [17, 300]] = 50.0  # equal maxima on different ranks
    table[20, 5], table[21, 330], table[22, 0] = torch.nan, torch.inf, -torch.inf
    plan = sampler_plan(rows, vocab)
    split, whole = (sampled(tested, table, plan) for tested in (mesh, alone()))
    assert np.array_equal(split.token, whole.token)
    is_bad = np.isin(plan.row, [20, 21, 22])
    assert ((split.token == NOT_FINITE) == is_bad).all()
    for name in ("logprob", "top_logprob"):
        got, want = (torch.from_numpy(getattr(r, name)[~is_bad]) for r in (split, whole))
        assert_close(name, got, want, 1e-6)
    assert np.array_equal(split.top_token[~is_bad], whole.top_token[~is_bad])
    greedy = (plan.temperature == 0) & (plan.target == NO_TARGET) & (plan.row < 9)
    assert greedy.sum() > 2 and set(split.token[greedy]) == {17}


def sampled(mesh: Mesh, table: Tensor, plan: StepPlan) -> HostResult:
    width = -(-table.shape[1] // mesh.tp.size)
    start = width * mesh.tp.rank
    padded = nn.functional.pad(table, (0, width * mesh.tp.size), value=-torch.inf)
    model = SimpleNamespace(
        config=SimpleNamespace(vocab_size=table.shape[1]),
        lm_head=SimpleNamespace(start=start),
        logits=lambda x: padded[x[:, 0].long(), start : start + width],
    )
    hidden = torch.arange(float(len(table)))[:, None]
    return Sampler(cast(Transformer, model), mesh.tp, CPU)(hidden, plan).to_host()


def sampler_plan(rows: int, vocab: int) -> StepPlan:
    rng = np.random.default_rng(0)
    count = 3 * rows
    target = np.where(rng.random(count) < 0.2, rng.integers(0, vocab, count), NO_TARGET)
    top = rng.choice([-1, -1, 0, 5], count)
    return StepPlan(
        row=np.tile(np.arange(rows), 3).astype(np.int32),
        position=rng.integers(0, 1000, count).astype(np.int32),
        target=target.astype(np.int32),
        top_logprobs=np.where(target >= 0, np.maximum(top, 0), top).astype(np.int32),
        top_k=rng.choice([0, 3, 50], count).astype(np.int32),
        seed_low=rng.integers(-(2**31), 2**31, count).astype(np.int32),
        seed_high=rng.integers(-(2**31), 2**31, count).astype(np.int32),
        answer=rng.integers(0, 3, count).astype(np.int32),
        temperature=rng.choice([0.0, 1.0], count).astype(np.float32),
        top_p=rng.choice([1.0, 0.9], count).astype(np.float32),
        min_p=rng.choice([0.0, 0.2], count).astype(np.float32),
    )

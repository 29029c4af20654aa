"""From hidden states to tokens on one rank; tests/distributed holds other worlds to this."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3.distributed.collectives import SingleRank
from dsv3.engine import sampler
from dsv3.engine.adjust import AdjustedRow, Adjuster, pack_adjustments
from dsv3.engine.sampler import Sampler
from dsv3.engine.step_plan import NO_TARGET, NOT_FINITE, StepPlan
from dsv3.model.transformer import Transformer
from dsv3.request import SamplingParams
from dsv3_kernels import RowParams, sample

W, D, T, M = 331, 16, 40, 60


def adjuster(params: SamplingParams, prompt: list[int]) -> Adjuster:
    made = Adjuster.of(params, prompt)
    assert made is not None
    return made


def sampler_of(model: SimpleNamespace) -> Sampler:
    return Sampler(cast(Transformer, model), SingleRank(), torch.device("cpu"))


@pytest.fixture
def model() -> SimpleNamespace:
    torch.manual_seed(0)
    head = torch.randn(W, D)
    return SimpleNamespace(
        config=SimpleNamespace(vocab_size=W),
        lm_head=SimpleNamespace(start=0),
        logits=lambda x: x @ head.T,
        head=head,
    )


def mixed_plan() -> StepPlan:
    """Greedy, sampled and scored rows in any order, some with alternatives."""
    rng = np.random.default_rng(0)
    target = np.where(rng.random(M) < 0.3, rng.integers(0, W, M), NO_TARGET)
    top = rng.choice([-1, 0, 3, 20], M)
    return StepPlan(
        row=rng.integers(0, T, M).astype(np.int32),
        position=rng.integers(0, 1000, M).astype(np.int32),
        target=target.astype(np.int32),
        top_logprobs=np.where(target >= 0, np.maximum(top, 0), top).astype(np.int32),
        top_k=rng.choice([0, 3, 2**31 - 1], M).astype(np.int32),
        seed_low=rng.integers(-(2**31), 2**31, M).astype(np.int32),
        seed_high=rng.integers(-(2**31), 2**31, M).astype(np.int32),
        answer=rng.integers(0, 3, M).astype(np.int32),
        temperature=rng.choice([0.0, 1.0, 2.0], M).astype(np.float32),
        top_p=rng.choice([1.0, 0.9], M).astype(np.float32),
        min_p=rng.choice([0.0, 0.3], M).astype(np.float32),
    )


@pytest.mark.parametrize("rows_at_a_time", [7, 512])
def test_a_mixed_plan(
    model: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, rows_at_a_time: int
) -> None:
    monkeypatch.setattr(sampler, "_ROWS", rows_at_a_time)
    torch.manual_seed(1)
    hidden, plan = torch.randn(T, D), mixed_plan()
    out = sampler_of(model)(hidden, plan).to_host()
    assert out.top_token.shape == out.top_logprob.shape == (M, 20)
    for m in range(M):
        logits = hidden[plan.row[m]] @ model.head.T
        logprob = logits.log_softmax(-1)
        assert out.token[m] == expected(logits, plan, m), m
        top = int(plan.top_logprobs[m])
        if top < 0:
            continue
        assert out.logprob[m] == pytest.approx(logprob[out.token[m]].item(), abs=1e-5)
        best = logprob.topk(top)
        assert out.top_token[m, :top].tolist() == best.indices.tolist()
        assert out.top_logprob[m, :top].tolist() == pytest.approx(best.values.tolist(), abs=1e-5)


def test_rows_that_are_not_finite_give_no_token_and_change_no_other(
    model: SimpleNamespace,
) -> None:
    torch.manual_seed(1)
    hidden, plan = torch.randn(T, D), mixed_plan()
    whole = sampler_of(model)(hidden, plan).to_host()
    bad = {3: torch.nan, 11: torch.inf, 25: -torch.inf}

    def logits(x: Tensor) -> Tensor:
        found = x @ model.head.T
        for row, value in bad.items():
            found[(x == hidden[row]).all(-1), 200] = value  # in one place of the vocabulary
        return found

    spoiled = SimpleNamespace(config=model.config, lm_head=model.lm_head, logits=logits)
    out = sampler_of(spoiled)(hidden, plan).to_host()
    is_bad = np.isin(plan.row, list(bad))
    assert (out.token[is_bad] == NOT_FINITE).all() and is_bad.sum() >= 3
    assert np.array_equal(out.token[~is_bad], whole.token[~is_bad])
    assert np.array_equal(out.top_logprob[~is_bad], whole.top_logprob[~is_bad])


@pytest.mark.parametrize("rows_at_a_time", [7, 512])
def test_adjusted_rows_report_the_probabilities_of_the_model(
    model: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, rows_at_a_time: int
) -> None:
    """Their tokens are those of adjusted logits; all other rows are as without them."""
    monkeypatch.setattr(sampler, "_ROWS", rows_at_a_time)
    torch.manual_seed(1)
    hidden, plan = torch.randn(T, D), mixed_plan()
    how = sampler_of(model)
    before = how(hidden, plan).to_host()
    fed = torch.tensor([int(before.token[0]), int(before.token[1])])
    params = SamplingParams(repetition_penalty=3.0, presence_penalty=1.5, logit_bias={7: 4.0})
    rows = np.flatnonzero(plan.target == NO_TARGET)[::2]
    prompt = before.token[rows].tolist()
    texts = [[*prompt, m] for m in range(len(rows))]
    adjusted = [
        AdjustedRow(int(m), k % 3 - 1, adjuster(params, prompt), text)
        for k, (m, text) in enumerate(zip(rows, texts, strict=True))
    ]
    plan.adjust = pack_adjustments(adjusted)
    out = how(hidden, plan, fed_M=fed).to_host()
    assert len(rows) > 15 and (out.token[rows] != before.token[rows]).sum() > 5
    is_plain = ~np.isin(np.arange(M), rows)
    assert np.array_equal(out.token[is_plain], before.token[is_plain])
    asked = plan.top_logprobs >= 0
    assert np.allclose(out.top_logprob[asked], before.top_logprob[asked], atol=1e-5)
    for k, m in enumerate(rows):
        logits = hidden[plan.row[m]] @ model.head.T
        logprob = logits.log_softmax(-1)
        answer = [k, *([int(fed[k % 3 - 1])] if k % 3 else [])]
        logits[7] += 4.0
        for token in {*prompt, *answer}:
            logits[token] = logits[token] / 3 if logits[token] > 0 else logits[token] * 3
        for token in set(answer):
            logits[token] -= 1.5
        assert out.token[m] == expected(logits, plan, m), m
        if plan.top_logprobs[m] >= 0:
            assert out.logprob[m] == pytest.approx(logprob[out.token[m]].item(), abs=1e-5)


def expected(logits: Tensor, plan: StepPlan, m: int) -> int:
    if plan.target[m] != NO_TARGET:
        return int(plan.target[m])
    seed = (int(plan.seed_high[m]) << 32) + (int(plan.seed_low[m]) & 0xFFFFFFFF)
    params = RowParams(
        temperature_B=torch.tensor([float(plan.temperature[m])]),
        top_k_B=torch.tensor([int(plan.top_k[m])]),
        top_p_B=torch.tensor([float(plan.top_p[m])]),
        min_p_B=torch.tensor([float(plan.min_p[m])]),
        seed_B=torch.tensor([seed]),
        answer_B=torch.tensor([int(plan.answer[m])]),
        position_B=torch.tensor([int(plan.position[m])]),
    )
    return int(sample(logits[None], params))


def test_a_vocabulary_smaller_than_the_alternatives(model: SimpleNamespace) -> None:
    """Twenty likeliest of five."""
    model.config.vocab_size = 5
    model.logits = lambda x: x @ model.head[:5].T
    plan = StepPlan(
        row=np.zeros(1, np.int32),
        position=np.ones(1, np.int32),
        target=-np.ones(1, np.int32),
        top_logprobs=np.full(1, 20, np.int32),
        top_k=np.zeros(1, np.int32),
        seed_low=np.zeros(1, np.int32),
        seed_high=np.zeros(1, np.int32),
        answer=np.zeros(1, np.int32),
        temperature=np.zeros(1, np.float32),
        top_p=np.ones(1, np.float32),
        min_p=np.zeros(1, np.float32),
    )
    out = sampler_of(model)(torch.randn(1, D), plan).to_host()
    assert sorted(out.top_token[0, :5].tolist()) == [0, 1, 2, 3, 4]
    assert np.exp(out.top_logprob[0, :5]).sum() == pytest.approx(1)


def test_no_rows(model: SimpleNamespace) -> None:
    out = sampler_of(model)(torch.randn(3, D), StepPlan()).to_host()
    assert len(out.token) == 0

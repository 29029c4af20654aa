"""Biases and penalties agree with their plain definition, whatever is known of a row when."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dsv3.engine.adjust import NOT_FED, AdjustedRow, Adjuster, Adjustments, pack_adjustments
from dsv3.errors import RequestError
from dsv3.request import Request, SamplingParams
from tests.paper_runner import paper_engine

W = 37
PARAMS = [
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(repetition_penalty=0.5, presence_penalty=-0.25),
    SamplingParams(frequency_penalty=0.75),
    SamplingParams(presence_penalty=2.0, logit_bias={3: 100.0}),
    SamplingParams(frequency_penalty=-1.0, repetition_penalty=1.1, logit_bias={0: -5, 36: 2.5}),
    SamplingParams(logit_bias={5: -100, 6: 0.5}),
]


def adjuster(params: SamplingParams, prompt: list[int]) -> Adjuster:
    made = Adjuster.of(params, prompt)
    assert made is not None
    return made


def unpack(words: NDArray[np.int32], token_M: torch.Tensor) -> Adjustments:
    made = Adjustments.unpack(words, token_M)
    assert made is not None
    return made


def plain(logits: list[float], p: SamplingParams, prompt: list[int], out: list[int]) -> list[float]:
    """Bias, then repetition, frequency and presence, token by token."""
    found = []
    for token, x in enumerate(logits):
        x += p.logit_bias.get(token, 0.0)
        if token in prompt or token in out:
            x = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
        x -= p.frequency_penalty * out.count(token)
        x -= p.presence_penalty * (token in out)
        found.append(x)
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("in_flight", ["none", "some", "all"])
def test_adjusted_logits(seed: int, in_flight: str) -> None:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, W, n).tolist() for n in (1, 5, 40, 9, 9, 3)]
    adjusters = [adjuster(p, prompt) for p, prompt in zip(PARAMS, prompts, strict=True)]
    texts = [list(prompt) for prompt in prompts]
    place = np.array([0, 2, 3, 5, 6, 8])  # rows between them are not adjusted
    for step in range(12):
        last = rng.integers(0, W, 20)
        fed = np.where(rng.random(6) < {"none": 0, "some": 0.5, "all": 1}[in_flight], 3, NOT_FED)
        fed = np.where(fed >= 0, rng.permutation(20)[:6], NOT_FED)
        logits = torch.from_numpy(rng.normal(0, 3, (10, W)).astype(np.float32))
        want = logits.tolist()
        rows = []
        for k, (params, prompt, text) in enumerate(zip(PARAMS, prompts, texts, strict=True)):
            out = [*text[len(prompt) :], *([int(last[fed[k]])] if fed[k] >= 0 else [])]
            want[place[k]] = plain(want[place[k]], params, prompt, out)
            rows.append(AdjustedRow(int(place[k]), int(fed[k]), adjusters[k], text))
        adjust = unpack(pack_adjustments(rows), torch.from_numpy(last))
        adjust.apply(logits)
        assert torch.allclose(logits, torch.tensor(want), rtol=1e-5, atol=1e-5), step
        for k, text in enumerate(texts):
            # Tokens in flight are known later; few tokens come often.
            text.append(int(last[fed[k]]) if fed[k] >= 0 else int(rng.integers(0, 9)))


def test_a_part_of_the_rows_is_adjusted_as_the_whole() -> None:
    rng = np.random.default_rng(1)
    place = [1, 2, 4, 7, 8, 9]
    rows = [
        AdjustedRow(m, 2 if m % 2 else NOT_FED, adjuster(p, [1, 2, m]), [1, 2, m, 5, 5])
        for m, p in zip(place, PARAMS, strict=True)
    ]
    fed = torch.tensor([4, 4, 5])
    logits = torch.from_numpy(rng.normal(0, 3, (11, W)).astype(np.float32))
    whole = logits.clone()
    adjust = unpack(pack_adjustments(rows), fed)
    adjust.apply(whole)
    for index in ([1], [0, 3], [0, 1, 2, 3], [4, 7, 8, 9, 10], [10], list(range(11))):
        chosen = np.array(index)
        part = logits[index].clone()
        some = adjust.select(chosen)
        assert (some is None) == (not set(index) & set(place))
        if some is not None:
            some.apply(part)
        assert torch.equal(part, whole[index])
    # The first choice of a plan's rows, then of the rows of one rank.
    once = adjust.select(np.array([0, 2, 3, 4, 7]))
    assert once is not None
    twice = once.select(np.array([3, 4]))
    assert twice is not None
    part = logits[[4, 7]].clone()
    twice.apply(part)
    assert torch.equal(part, whole[[4, 7]])


def test_a_row_that_failed_feeds_nothing() -> None:
    params = SamplingParams(frequency_penalty=1.0, repetition_penalty=2.0)
    row = AdjustedRow(0, 0, adjuster(params, [3]), [3])
    logits = torch.ones(1, W)
    unpack(pack_adjustments([row]), torch.tensor([-1])).apply(logits)
    assert logits[0, 3] == 0.5 and (logits[0] == 1).sum() == W - 1


def test_rows_without_adjustments_have_no_words() -> None:
    assert Adjuster.of(SamplingParams(temperature=1.0, min_p=0.5), [1]) is None
    words = pack_adjustments([])
    assert len(words) == 0 and Adjustments.unpack(words, torch.zeros(0)) is None


def test_plans_hold_distinct_tokens_and_those_of_the_prompt_only_where_needed() -> None:
    prompt = [5, 6] * 500
    for params, distinct in (
        (SamplingParams(repetition_penalty=1.1), 4),
        (SamplingParams(presence_penalty=1.0), 2),
        (SamplingParams(logit_bias={1: 1.0}), 0),
    ):
        text = [*prompt, 7, 8, 7]
        words = pack_adjustments([AdjustedRow(0, NOT_FED, adjuster(params, prompt), text)])
        adjust = unpack(words, torch.zeros(0, dtype=torch.int64))
        assert adjust.seen_2E.shape == (2, distinct)


def test_biases_beyond_the_vocabulary_are_refused() -> None:
    engine, _ = paper_engine(16)
    for token in (-1, engine.vocab_size):
        params = SamplingParams(logit_bias={1: 2.0, token: 1.0})
        with pytest.raises(
            RequestError, match=rf"^logit_bias\[{token}\] is not a token of this model"
        ):
            engine.add(Request(request_id="a", prompt_ids=[5], params=params))


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"min_p": -0.1}, "min_p=-0.1 must be between 0 and 1"),
        ({"min_p": float("nan")}, "min_p=nan must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be from 0.001 to 1000"),
        ({"frequency_penalty": -2.1}, "frequency_penalty=-2.1 must be between -2 and 2"),
        ({"presence_penalty": 3}, "presence_penalty=3 must be between -2 and 2"),
        (
            {"logit_bias": {7: 101}},
            "logit_bias[7]=101 must be a token id, and a number between -100 and 100",
        ),
        (
            {"logit_bias": {7: "x"}},
            "logit_bias[7]='x' must be a token id, and a number between -100 and 100",
        ),
        ({"logit_bias": [7]}, "logit_bias=[7] must be a mapping of token ids to numbers"),
        (
            {"logit_bias": {"a": 1}},
            "logit_bias['a']=1 must be a token id, and a number between -100 and 100",
        ),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], error: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**values)
    assert str(caught.value) == error

"""Random checkpoints of every family agree with Hugging Face transformers, in float32."""

from collections.abc import Callable
from typing import cast

import pytest
import torch
from transformers import GenerationMixin

from dsv3.model import chunk_attention
from dsv3.request import SamplingParams
from tests.oracle.families import Oracle
from tests.oracle.family_configs import CONFIGS
from tests.oracle.run import all_logits, answers, start_alone

# The demand is 2e-3 of the logits' standard deviation; float32 gives about 1e-5.
TOLERANCE = 1e-4
MAKE = Callable[[str], Oracle]
FAMILIES = [family for family in CONFIGS if family not in ("v3.2-long", "v3-fp8-whole")]


def check_logits(got: list[torch.Tensor], oracle: Oracle, texts: list[list[int]]) -> None:
    for text, ours in zip(texts, got, strict=True):
        want = oracle.logits(text)
        error = (ours - want).abs().max() / want.std()
        assert error < TOLERANCE, f"prompt of {len(text)} tokens: {error:.1e} of the spread"


@pytest.mark.parametrize(
    ("attn_impl", "chunk", "limit"),
    [
        ("auto", 200, None),
        ("auto", 7, 1),  # chunks expanded, however short
        ("naive", 7, None),
        ("absorb", 16, None),
        ("auto", 1, None),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(oracle: MAKE, family: str, attn_impl: str, chunk: int, limit: int | None) -> None:
    """At every position, prompts of all lengths together, whole, in chunks and one by one."""
    made = oracle(family)
    started = start_alone(made.path, attn_impl=attn_impl)
    check_logits(all_logits(started, made.prompts, chunk, limit), made, made.prompts)


@pytest.mark.parametrize("block", [64, 2048])
def test_long_contexts_are_expanded_block_by_block(
    oracle: MAKE, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(chunk_attention, "_BLOCK", block)
    made = oracle("v3-bf16")
    started = start_alone(made.path)
    check_logits(all_logits(started, made.prompts, 9, limit=1), made, made.prompts)


@pytest.mark.parametrize("family", ["v3-fp8", "v3.1-ue8m0"])
def test_weights_kept_in_fp8(oracle: MAKE, family: str) -> None:
    made = oracle(family)
    started = start_alone(made.path, weights="fp8")
    check_logits(all_logits(started, made.prompts, 200), made, made.prompts)


def check_greedy(oracle: Oracle, prompts: list[list[int]], **settings: object) -> None:
    """Each token is transformers' first choice after the prompt and the tokens before it."""
    started = start_alone(oracle.path, **settings)
    params = SamplingParams(max_tokens=32, ignore_eos=True)
    for prompt, done in zip(prompts, answers(started, prompts, params), strict=True):
        assert len(done.token_ids) == 32
        want = oracle.logits([*prompt, *done.token_ids])[len(prompt) - 1 : -1]
        assert done.token_ids == want.argmax(-1).tolist(), f"prompt of {len(prompt)} tokens"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers(oracle: MAKE, family: str) -> None:
    made = oracle(family)
    check_greedy(made, made.prompts, max_batch_tokens=40, max_running=4)


@pytest.mark.parametrize("depth", [0, 1])
def test_penalized_answers(oracle: MAKE, depth: int) -> None:
    """Greedy answers with a repetition penalty are those of transformers' `generate`."""
    made = oracle("v3-bf16")
    params = SamplingParams(max_tokens=24, ignore_eos=True, repetition_penalty=1.3)
    settings = {"max_batch_tokens": 40, "max_running": 4, "pipeline_depth": depth}
    found = answers(start_alone(made.path, **settings), made.prompts, params)
    for prompt, done in zip(made.prompts, found, strict=True):
        whole = cast(GenerationMixin, made.model).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=1.3,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert done.token_ids == whole[0, len(prompt) :].tolist(), f"{len(prompt)} tokens"


def test_no_family_answers_the_same_thing_forever(oracle: MAKE) -> None:
    """A model that repeats one token would make the test above easy to pass."""
    for family in FAMILIES:
        made = oracle(family)
        started = start_alone(made.path)
        done = answers(started, made.prompts, SamplingParams(max_tokens=32, ignore_eos=True))
        assert len({tuple(d.token_ids) for d in done}) == len(done)
        assert sum(len(set(d.token_ids)) > 3 for d in done) >= 3, family


def test_probabilities(oracle: MAKE) -> None:
    """Of the prompt, of the answer and of what else was likely."""
    made = oracle("v3-bf16")
    params = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=4, prompt_logprobs=2)
    for prompt, done in zip(
        made.prompts, answers(start_alone(made.path), made.prompts, params), strict=True
    ):
        text = [*prompt, *done.token_ids]
        want = made.logits(text).log_softmax(-1)
        assert done.prompt_logprobs is not None and done.logprobs is not None
        assert [t.token_id for t in done.prompt_logprobs] == prompt[1:]
        for i, got in enumerate([*done.prompt_logprobs, *done.logprobs]):
            top = want[i].topk(len(got.top))
            assert len(got.top) == (2 if i < len(prompt) - 1 else 4)
            assert got.logprob == pytest.approx(float(want[i, text[i + 1]]), abs=1e-3)
            assert [t for t, _ in got.top] == top.indices.tolist()
            assert [p for _, p in got.top] == pytest.approx(top.values.tolist(), abs=1e-3)

"""The demo model does what its model card says: every answer of its evaluation set is exact.

`tests/data/demo_eval.jsonl` holds 24 of the set's 238 dialogues, of all eleven kinds.
"""

import json
from pathlib import Path

import pytest

from dsv3.request import SamplingParams
from dsv3.text.chat import ChatFormat
from tests.oracle.run import answers, start_alone

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "checkpoints" / "demo-v3"
ROWS = [
    json.loads(line)
    for line in (ROOT / "tests/data/demo_eval.jsonl").read_text("utf-8").splitlines()
]


def wrong_answers(**settings: object) -> list[str]:
    """Answer all rows as one batch; return what differs."""
    started = start_alone(DEMO, kv_cache_size="16384tok", **settings)
    assert started.engine is not None and started.engine.tokenizer is not None
    chat = ChatFormat(started.engine.tokenizer, started.config.model_type)
    prompts = [chat.encode(chat.render(row["messages"])) for row in ROWS]
    got = answers(started, prompts, SamplingParams(max_tokens=96))
    for row, prompt, done in zip(ROWS, prompts, got, strict=True):
        # The data set has the length of the whole dialogue with its end token.
        if done.text == row["expected"]:
            assert len(prompt) + len(done.token_ids) + 1 == row["n_tokens"], row["id"]
    return [
        f"{row['id']}: {done.text!r} ({done.finish_reason}), want {row['expected']!r}"
        for row, done in zip(ROWS, got, strict=True)
        if (done.text, done.finish_reason) != (row["expected"], "stop")
    ]


def test_the_sample_covers_every_kind() -> None:
    assert len(ROWS) == 24 and len({row["kind"] for row in ROWS}) == 11
    assert max(row["n_tokens"] for row in ROWS) > 600


def test_float32_is_exact() -> None:
    assert not wrong_answers()


@pytest.mark.parametrize("attn_impl", ["auto", "naive"])
def test_bfloat16_is_as_accurate(attn_impl: str) -> None:
    """The card's bfloat16 figure is 238 of 238; one of 24 may be lost to rounding."""
    assert len(wrong_answers(dtype="bfloat16", attn_impl=attn_impl)) <= 1


def test_fp8_is_as_accurate() -> None:
    assert len(wrong_answers(dtype="fp8")) <= 1

"""transformers loads what convert.py makes, and computes the same logits."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.jobs import Cast
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.source import open_source
from dsv3.config import ParallelConfig
from tests.oracle.families import Oracle

MAKE = Callable[[str], Oracle]


def convert_to(path: Path, target: Path, world_size: int | None = None, **kwargs: Any) -> Path:
    layout = None if world_size is None else ParallelConfig(world_size=world_size)
    with open_source(path) as source:
        convert(source, make_plan(source, layout, **kwargs), target, workers=2)
    return target


@torch.inference_mode()
def logits(path: Path, token_ids: list[int]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return model(torch.tensor([token_ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("family", ["v2", "v3-bf16"])
def test_back_to_hugging_face(oracle: MAKE, family: str, tmp_path: Path) -> None:
    made = oracle(family)
    ranks = convert_to(made.path, tmp_path / "mp4", 4)
    hf = convert_to(ranks, tmp_path / "hf")
    assert torch.equal(logits(hf, made.prompts[-1]), made.logits(made.prompts[-1]))


@pytest.mark.parametrize("family", ["v3-fp8", "v3.1-ue8m0"])
def test_fp8_to_bf16(oracle: MAKE, family: str, tmp_path: Path) -> None:
    made = oracle(family)
    hf = convert_to(made.path, tmp_path / "bf16", cast=Cast.BF16)
    rounded = copy.deepcopy(made.model)
    for name, weight in rounded.named_parameters():
        if not name.endswith("e_score_correction_bias"):
            weight.data = weight.bfloat16().float()
    with torch.inference_mode():
        want = rounded(torch.tensor([made.prompts[-1]]), use_cache=False).logits[0]
    assert torch.equal(logits(hf, made.prompts[-1]), want)


def test_bf16_to_fp8_and_back(oracle: MAKE, tmp_path: Path) -> None:
    """Power-of-two scales of values that were FP8 once: nothing is lost."""
    made = oracle("v3.1-ue8m0")
    bf16 = convert_to(made.path, tmp_path / "bf16", 2, cast=Cast.BF16)
    fp8 = convert_to(bf16, tmp_path / "fp8", 8, cast=Cast.FP8, scale_fmt="ue8m0")
    hf = convert_to(fp8, tmp_path / "hf", cast=Cast.BF16)
    with open_source(fp8) as source:
        assert source.config.quantization is not None
        assert source.config.quantization.scale_fmt == "ue8m0"
    assert torch.equal(logits(hf, made.prompts[-1]), made.logits(made.prompts[-1]))

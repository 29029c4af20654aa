"""Our logits of quantized weights are transformers' logits of the values that these stand for.

The values are computed here, by torch alone. This is the sharp test of formats and layouts: a wrong
integer, scale or slice changes the logits by far more than the tolerance of float32. The difference
from the weights before they were quantized is the format's; on random weights, which are sensitive,
it says little, so the trained demo model has its tolerances.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.jobs import Cast, uniform_kinds
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.source import open_source
from dsv3.config import ParallelConfig
from dsv3.config_files import DEMO
from dsv3.text.chat import ChatFormat
from tests.distributed.ranks import run_ranks
from tests.integer_files import mixed_kinds_by_hand
from tests.oracle.families import Oracle
from tests.oracle.run import all_logits, score, start_alone

MAKE = Callable[[str], Oracle]
# Most that the mean and the greatest |difference of log-probabilities| may be, over the tokens of
# the demo model's dialogues. Twice what was measured: int8 0.0030 and 0.14, int4 0.036 and 1.8,
# mixed 0.033 and 1.1. A different choice of a router moves single tokens a lot.
TOLERANCES = {"int8": (0.006, 0.3), "int4": (0.07, 3.5), "mixed": (0.065, 2.2)}
FORMS = tuple(TOLERANCES)
DIALOGUES = Path(__file__).resolve().parents[1] / "data/demo_eval.jsonl"


@dataclass(frozen=True)
class Case:
    """A directory of quantized weights with transformers' model of their values; rank files."""

    oracle: Oracle
    ranks: Path


def quantized(path: Path, form: str, layout: ParallelConfig | None, target: Path) -> Path:
    """Convert a checkpoint to a form of quantized weights."""
    with open_source(path) as source:
        if form == "mixed":
            plan = make_plan(source, layout, Cast.MIXED, integers=mixed_kinds_by_hand(source))
        else:
            kinds = uniform_kinds(source, 8, 0) if form == "int8" else uniform_kinds(source, 4, 32)
            plan = make_plan(source, layout, Cast.INTEGERS, integers=kinds)
        convert(source, plan, target, workers=2)
    return target


def values_of(path: Path) -> dict[str, Tensor]:
    """Return the float32 values of a directory of compressed-tensors."""
    stored: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        stored |= load_file(file)
    values = {}
    for name, x in stored.items():
        stem = name.rpartition(".")[0]
        if name.endswith(".weight_packed"):
            rows, cols = stored[f"{stem}.weight_shape"].tolist()
            bits = x.shape[1] * 32 // cols
            fields = x[..., None] >> bits * torch.arange(32 // bits) & (1 << bits) - 1
            q = fields.reshape(rows, cols) - (1 << bits - 1)
            scale = stored[f"{stem}.weight_scale"].float()
            values[f"{stem}.weight"] = q * scale.repeat_interleave(cols // scale.shape[1], 1)
        elif x.dtype == torch.float8_e4m3fn:
            scale = stored[f"{stem}.weight_scale"]
            by_value = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            values[name] = x.float() * by_value[: x.shape[0], : x.shape[1]]
        elif not name.endswith((".weight_scale", ".weight_shape")):
            values[name] = x.float()
    return values


def reference(made: Oracle, path: Path, folder: Path) -> Oracle:
    """Return transformers' float32 model of the values of a directory."""
    folder.mkdir()
    save_file(values_of(path), folder / "model.safetensors", {"format": "pt"})
    shutil.copy(made.path.parent / "plain" / "config.json", folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return Oracle(path, model.eval(), made.prompts)


def log_probs(logits: Tensor, prompt: list[int]) -> Tensor:
    """Return the log-probabilities of a prompt's tokens after the first."""
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


@pytest.fixture(scope="module")
def made(oracle: MAKE) -> Oracle:
    return oracle("v3-fp8-whole")


@pytest.fixture(scope="module", params=FORMS)
def case(request: pytest.FixtureRequest, made: Oracle, tmp_path_factory: Any) -> Case:
    """Return a form's directory, its rank files, and transformers' model of its values."""
    folder = tmp_path_factory.mktemp(request.param)
    whole = quantized(made.path, request.param, None, folder / "q")
    layout = ParallelConfig(world_size=4, tp=2, dp=2)
    ranks = quantized(made.path, request.param, layout, folder / "ranks")
    return Case(reference(made, whole, folder / "plain"), ranks)


def test_logits(case: Case) -> None:
    """They are transformers' to float32's precision."""
    wanted = case.oracle
    got = all_logits(start_alone(wanted.path), wanted.prompts, 16)
    for prompt, ours in zip(wanted.prompts, got, strict=True):
        want = wanted.logits(prompt)
        assert (ours - want).abs().max() / want.std() < 1e-4


@pytest.mark.parametrize("world_size", [4])
def test_ranks(case: Case, world_size: int) -> None:
    """Ranks read their slices of a whole directory, and of files for two groups of two ranks.

    tests/distributed/test_matrix.py compares other layouts with one rank.
    """
    oracle = case.oracle
    want = [log_probs(oracle.logits(prompt), prompt).tolist() for prompt in oracle.prompts]
    run_ranks(score, world_size, paths=[oracle.path, case.ranks], prompts=oracle.prompts, want=want)


def demo_log_probs(path: Path) -> Tensor:
    """Return the log-probabilities of the tokens of dialogues with their right answers."""
    started = start_alone(path, kv_cache_size="32768tok")
    assert started.engine is not None and started.engine.tokenizer is not None
    chat = ChatFormat(started.engine.tokenizer, started.config.model_type)
    rows = [json.loads(line) for line in DIALOGUES.read_text("utf-8").splitlines()]
    texts = [chat.encode(chat.render(row["messages"]) + row["expected"]) for row in rows]
    found = all_logits(started, texts, 512)
    return torch.cat([log_probs(x, text) for x, text in zip(found, texts, strict=True)])


@pytest.fixture(scope="module")
def stored() -> Tensor:
    return demo_log_probs(DEMO)


@pytest.mark.parametrize("form", FORMS)
def test_the_difference_of_the_format(form: str, stored: Tensor, tmp_path: Path) -> None:
    error = (demo_log_probs(quantized(DEMO, form, None, tmp_path / "q")) - stored).abs()
    mean, most = TOLERANCES[form]
    assert 0 < error.mean() < mean and error.max() < most

"""Checkpoints in other stored forms give transformers' logits, on one rank and on two."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3.distributed.mesh import Mesh
from dsv3.engine.engine import follow
from dsv3.engine.start import start
from dsv3.request import SamplingParams
from dsv3.settings import EngineConfig
from tests.distributed.ranks import alone, run_ranks
from tests.oracle.families import Oracle
from tests.oracle.run import all_logits, answers, start_alone

MAKE = Callable[[str], Oracle]
EXPERTS = 8  # of "v3-fp8-whole", whose experts are one block wide


def stored(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def write(path: Path, like: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    """Write one file of tensors, with the config of another directory."""
    path.mkdir()
    config_data = json.loads((like / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(config_data))
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors")
    return path


def fused(tensors: dict[str, Tensor], layers: range) -> dict[str, Tensor]:
    """Return experts and their scales as transformers' FP8Experts holds them."""
    out = dict(tensors)
    for layer in layers:
        prefix = f"model.layers.{layer}.mlp.experts."
        for end, suffix in ((".weight", ""), (".weight_scale_inv", "_scale_inv")):
            parts = {
                part: [out.pop(f"{prefix}{e}.{part}_proj{end}") for e in range(EXPERTS)]
                for part in ("gate", "up", "down")
            }
            pairs = zip(parts["gate"], parts["up"], strict=True)
            # torch cannot concatenate or stack FP8 on a CPU: bytes can be.
            gate_up = [torch.cat([g.view(torch.uint8), u.view(torch.uint8)]) for g, u in pairs]
            down = [d.view(torch.uint8) for d in parts["down"]]
            dtype = parts["gate"][0].dtype
            out[f"{prefix}gate_up_proj{suffix}"] = torch.stack(gate_up).view(dtype)
            out[f"{prefix}down_proj{suffix}"] = torch.stack(down).view(dtype)
    return out


@pytest.mark.parametrize("family", ["v2-lite", "v3-bf16"])
def test_experts_as_transformers_saves_them(oracle: MAKE, family: str, tmp_path: Path) -> None:
    """Its own state dict: 3-D tensors of all experts of a layer."""
    made = oracle(family)
    made.model.save_pretrained(tmp_path / "own", save_original_format=False)
    names = stored(tmp_path / "own")
    assert any(n.endswith("mlp.experts.gate_up_proj") for n in names)
    assert not any(".experts.0." in n for n in names)
    shutil.copy(made.path / "config.json", tmp_path / "own" / "config.json")
    got = all_logits(start_alone(tmp_path / "own"), made.prompts, 200)
    for prompt, ours in zip(made.prompts, got, strict=True):
        want = made.logits(prompt)
        assert (ours - want).abs().max() / want.std() < 1e-4


def answer(mesh: Mesh, path: Path, prompts: list[list[int]], want: list[list[int]]) -> None:
    started = start(path, EngineConfig(kv_cache_size="2048tok"), mesh)
    if started.engine is None:
        follow(started.runner, started.channel)
        return
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    done = [d.token_ids for d in answers(started, prompts, params)]
    started.engine.stop()
    assert done == want


@pytest.mark.parametrize("world_size", [1, 2])
def test_fused_fp8_experts(oracle: MAKE, world_size: int, tmp_path: Path) -> None:
    """The greedy tokens are those of transformers."""
    made = oracle("v3-fp8-whole")
    path = write(tmp_path / "fused", made.path, fused(stored(made.path), range(1, 3)))
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    want = [d.token_ids for d in answers(start_alone(made.path), made.prompts, params)]
    for prompt, tokens in zip(made.prompts, want, strict=True):
        logits = made.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens
    if world_size == 1:
        answer(alone(), path, made.prompts, want)
        single, both = (all_logits(start_alone(p), made.prompts, 200) for p in (made.path, path))
        assert all(torch.equal(a, b) for a, b in zip(single, both, strict=True))
    else:
        run_ranks(answer, world_size, path=path, prompts=made.prompts, want=want)


def test_a_tied_head_that_is_stored_and_differs(
    oracle: MAKE, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers keeps the stored head; so does dsv3."""
    made = oracle("v3-bf16")
    path = write(tmp_path / "tied", made.path, stored(made.path), tie_word_embeddings=True)
    (got,) = all_logits(start_alone(path), made.prompts[-1:], 200)
    assert sum("stored and differs" in line for line in caplog.messages) == 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        want = theirs(torch.tensor([made.prompts[-1]]), use_cache=False).logits[0]
    assert (got - want).abs().max() / want.std() < 1e-4

"""transformers with compressed-tensors loads the integers that convert.py writes."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.jobs import Cast, uniform_kinds
from dsv3.checkpoint.mixed import mixed_kinds, sites
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.source import open_source
from dsv3.config_files import DEMO
from dsv3.config_integers import IntegerKind

TOKENS = [list(range(3, 99))]


@torch.inference_mode()
def logits(path: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model(torch.tensor(TOKENS), use_cache=False).logits[0].float()


def mixed(kinds: dict[str, IntegerKind]) -> dict[str, IntegerKind]:
    """Return int8 attention beside int4 experts."""
    return {
        name: IntegerKind(8, 0) if ".self_attn." in name else kind for name, kind in kinds.items()
    }


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize(("form", "most"), [("int8", 0.05), ("int4", 0.2), ("mixed", 0.2)])
def test_the_same_logits(form: str, most: float, tmp_path: Path) -> None:
    """Logits are as far from those of BF16 weights as those of the dequantized weights."""
    pytest.importorskip("compressed_tensors")
    with open_source(DEMO) as source:
        convert(source, make_plan(source, None, Cast.BF16), tmp_path / "bf16", workers=2)
        kinds = uniform_kinds(source, 8, 0) if form == "int8" else uniform_kinds(source, 4, 32)
        kinds = mixed(kinds) if form == "mixed" else kinds
        plan = make_plan(source, None, Cast.INTEGERS, integers=kinds)
        convert(source, plan, tmp_path / "q", workers=2)
    with open_source(tmp_path / "q") as source:
        convert(source, make_plan(source, None, Cast.BF16), tmp_path / "values", workers=2)
    plain = logits(tmp_path / "bf16")
    packed = logits(tmp_path / "q")
    values = logits(tmp_path / "values")
    assert 0 < difference(packed, plain) <= most
    # The dequantized weights of `values` are rounded to BF16.
    assert difference(packed, values) <= 0.02


def test_mixed_from_fp8(tmp_path: Path) -> None:
    """transformers reads routed experts by the first group with "experts", and FP8 in blocks.

    Shared experts, which come before the routed ones in the files, have other kinds.
    """
    pytest.importorskip("compressed_tensors")
    with open_source(DEMO) as source:
        loss = {"int4-128": 1.0, "int4-32": 0.5, "int8": 0.1}
        losses = dict.fromkeys(sites(source.config), loss)
        losses |= {site: dict.fromkeys(loss, 0.0) for site in losses if site.startswith("0 ")}
        losses["1 mlp.shared_experts.gate_up_proj"] = dict.fromkeys(loss, 90.0)
        losses["1 mlp.shared_experts.down_proj"] = dict.fromkeys(loss, 0.0)
        losses["2 mlp.experts.down_proj"] = {"int4-128": 90.0, "int4-32": 50.0, "int8": 49.0}
        (tmp_path / "losses.json").write_text(json.dumps({"sensitivity": losses}))
        kinds = mixed_kinds(source, 4.6, tmp_path / "losses.json")
        prefix = "model.layers.1.mlp."
        assert kinds[f"{prefix}shared_experts.down_proj.weight"] == IntegerKind(4, 128)
        assert kinds[f"{prefix}experts.3.down_proj.weight"] == IntegerKind(4, 32)
        assert f"{prefix}shared_experts.up_proj.weight" not in kinds
        plan = make_plan(source, None, Cast.MIXED, integers=kinds)
        convert(source, plan, tmp_path / "q", workers=2)
    with open_source(tmp_path / "q") as source:
        assert source.config.quantization is not None
        convert(source, make_plan(source, None, Cast.BF16), tmp_path / "values", workers=2)
    values = logits(tmp_path / "values")
    # It rounds the activations of FP8 products to FP8, too.
    assert difference(logits(tmp_path / "q"), values) <= 0.15
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    assert difference(logits(tmp_path / "q"), values) <= 0.02

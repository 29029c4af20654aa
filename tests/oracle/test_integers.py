"""transformers with compressed-tensors loads the integers that convert.py writes."""

from pathlib import Path

import pytest
import torch
import transformers

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.jobs import Cast, uniform_kinds
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
    """Return int8 attention beside int4 experts; transformers takes one kind for all experts."""
    return {
        name: IntegerKind(8, 0) if ".self_attn." in name else kind for name, kind in kinds.items()
    }


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
    assert 0 < (packed - plain).norm() <= most * plain.norm()
    # The dequantized weights of `values` are rounded to BF16.
    assert (packed - values).norm() <= 0.02 * plain.norm()

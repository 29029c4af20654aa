"""FP8 products are what transformers computes with the inputs of those products quantized.

How far that is from float32 is the model's affair: random ones are sensitive (the median over
positions of the error's rms is 0.24 of the logits' spread here; trained ones lose nothing, see
test_demo.py). So ours is compared with the emulation, closely in float32, by its error in bfloat16.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3.checkpoint.load import fp8_weights, load_weights
from dsv3.checkpoint.source import open_source
from dsv3.engine.setup import numerics_mode
from dsv3.errors import ConfigError
from dsv3.model.transformer import DecoderLayer, Transformer
from dsv3.parallel.linear import Linear
from dsv3.parallel.weight_format import WeightFormat
from dsv3.settings import EngineConfig
from tests.oracle.families import Oracle
from tests.oracle.run import all_logits, start_alone
from tests.oracle.test_bfloat16 import errors

MAKE = Callable[[str], Oracle]


# transformers' parameters whose activations are not quantized.
PLAIN = ("lm_head", "gate.weight", "kv_b_proj")


def emulated(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return transformers' float32 logits with quantized and dequantized inputs."""
    oracle.model.set_experts_implementation("eager")
    plain = {
        p.untyped_storage().data_ptr()
        for name, p in oracle.model.named_parameters()
        if name.removesuffix(".weight").endswith(PLAIN) or name.endswith(PLAIN)
    }
    linear = F.linear

    def quantized(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.untyped_storage().data_ptr() in plain:
            return linear(x, weight, bias)
        blocks = x.unflatten(-1, (-1, 128))
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448
        rounded = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
        return linear(rounded.flatten(-2), weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", quantized)
        return [oracle.logits(p) for p in oracle.prompts]


def linears(model: Transformer, quantizes: bool) -> set[str]:
    """Return the names, without layers, of the projections that multiply in FP8, or do not."""
    return {
        ".".join(name.split(".")[2:])
        for name, m in model.named_modules()
        if isinstance(m, Linear) and m.quantizes == quantizes
    }


def test_in_float32_it_is_the_emulation(oracle: MAKE, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for values so near to a rounding boundary that another order of additions turns them."""
    made = oracle("v3-fp8-whole")
    started = start_alone(made.path)
    with open_source(made.path) as source:
        mesh, names = started.mesh, fp8_weights(source)
        fmt = WeightFormat(torch.float32, mesh.device, names, fp8_products=True)
        model = Transformer(source.config, mesh, fmt)
        load_weights(source, model.targets(), mesh.layout)
    exact = all_logits(started, made.prompts, 16)
    started.runner.model = model
    want = emulated(made, monkeypatch)
    rms, _, _ = errors(all_logits(started, made.prompts, 16), want)
    assert errors(exact, want)[0].median() > 0.1
    assert rms.median() < 1e-4


@pytest.mark.parametrize("attn_impl", ["auto", "naive"])
def test_fp8(oracle: MAKE, monkeypatch: pytest.MonkeyPatch, attn_impl: str) -> None:
    made = oracle("v3-fp8-whole")
    started = start_alone(made.path, dtype="fp8", attn_impl=attn_impl)
    model = started.runner.model
    assert started.runner.numerics == "fp8" and model.lm_head.table.dtype == torch.bfloat16
    assert linears(model, False) == {"self_attn.kv_b_proj"}
    assert len(linears(model, True)) == 7
    exact = [made.logits(p) for p in made.prompts]
    rms, ours, theirs = errors(all_logits(started, made.prompts, 16), exact)
    bound, emulation, _ = errors(emulated(made, monkeypatch), exact)
    assert 0.5 * bound.median() < rms.median() < 1.25 * bound.median()
    agree, would = ((x.argmax(-1) == theirs.argmax(-1)).float().mean() for x in (ours, emulation))
    assert agree > would - 0.12
    kl, bound = (
        F.kl_div(x.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
        for x in (ours, emulation)
    )
    assert kl < 1.5 * bound


def test_cut_blocks_run_dequantized(oracle: MAKE, caplog: pytest.LogCaptureFixture) -> None:
    """192 and 136 columns are no whole blocks, the 128 of o_proj are; scales are powers of two."""
    made = oracle("v3.1-ue8m0")
    with caplog.at_level("INFO"):
        started = start_alone(made.path, dtype="fp8")
    model = started.runner.model
    assert linears(model, True) == {"self_attn.o_proj"}
    layers = [module for module in model.modules() if isinstance(module, DecoderLayer)]
    assert layers and all(layer.self_attn.o_proj.ue8m0 for layer in layers)
    (line,) = [r.getMessage() for r in caplog.records if "run dequantized" in r.getMessage()]
    assert "model.layers.mlp.experts.down_proj.weight" in line and "o_proj" not in line
    rms, _, _ = errors(
        all_logits(started, made.prompts, 200), [made.logits(p) for p in made.prompts]
    )
    assert rms.median() < 0.1


def test_the_mode_of_a_device_and_a_checkpoint(oracle: MAKE) -> None:
    with (
        open_source(oracle("v3-fp8").path) as fp8,
        open_source(oracle("v3-bf16").path) as bf16,
    ):
        modes = [numerics_mode(EngineConfig(), c, d) for c in (fp8, bf16) for d in ("cpu", "cuda")]
        assert modes == ["float32", "fp8", "float32", "bfloat16"]
        assert numerics_mode(EngineConfig(dtype="bfloat16"), fp8, "cuda") == "bfloat16"
    with pytest.raises(ConfigError, match="dtype=fp8 multiplies FP8 weights"):
        start_alone(oracle("v3-bf16").path, dtype="fp8")

"""The MoE layer of a loaded model over its kernels gives the references' results."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from dsv3.model.moe import MoE
from dsv3.model.transformer import DecoderLayer
from dsv3.parallel.storage import Floats
from dsv3_kernels import (
    Quantized,
    act_quant,
    experts,
    permute,
    route,
    route_and_permute,
    router_logits,
    unpermute,
)
from dsv3_kernels.testing import assert_close
from tests.oracle.run import start_alone

if TYPE_CHECKING:  # it imports transformers, which tests on a GPU can do without
    from tests.oracle.families import Oracle


OPERATIONS = (experts, permute, unpermute, route, route_and_permute, router_logits)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("v3-fp8-whole", {"dtype": "float32"}),
        ("v3-fp8-whole", {"dtype": "float32", "weights": "fp8"}),
        ("v3-fp8-whole", {"dtype": "fp8"}),
        ("v3-fp8", {"dtype": "float32", "weights": "fp8"}),  # blocks that no kernel can use
        ("kimi-k2", {"dtype": "float32"}),
    ],
)
def test_layer(
    oracle: "Callable[[str], Oracle]",
    family: str,
    settings: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = start_alone(oracle(family).path, **settings).runner.model
    layer = model.layers[-1].mlp
    assert isinstance(layer, MoE)
    torch.manual_seed(0)
    x = torch.randn(7, model.config.hidden_size).to(layer.gate_up_proj.dtype)
    x_q = act_quant(x) if settings["dtype"] == "fp8" else None
    outs = []
    for by_kernel in (False, True):
        if by_kernel:
            for op in OPERATIONS:
                monkeypatch.setattr(op, "reference", op.kernel)
            for matrix in (layer.gate_up_proj, layer.down_proj):  # as on a GPU
                if isinstance(matrix.storage, Floats):
                    matrix.storage = Floats(matrix.weight.contiguous())
        with torch.inference_mode():
            outs.append(layer(x, x_q))
    # With FP8 products rows are added up in bfloat16.
    assert_close("layer", outs[1], outs[0], 1e-5 if x_q is None else 0.01)


def test_without_quantized_input_it_is_quantized(oracle: "Callable[[str], Oracle]") -> None:
    """As rows come in that another rank sent."""
    model = start_alone(oracle("v3-fp8-whole").path, dtype="fp8").runner.model
    last = model.layers[-1]
    assert isinstance(last, DecoderLayer) and isinstance(last.mlp, MoE)
    layer, x = last.mlp, torch.randn(5, model.config.hidden_size).bfloat16()
    with torch.inference_mode():
        ids, weight, _ = layer.router(x)
        got = layer.run_experts(x, ids, weight)
        q = act_quant(x)
        assert torch.equal(got, layer.run_experts(x, ids, weight, Quantized(q.q, q.scale)))
        assert not torch.equal(got, layer.run_experts(x, ids.roll(1, 0), weight))

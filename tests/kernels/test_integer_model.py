"""Whole models of integer weights over the kernels, and how they are loaded for a GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3.cache.layout import CacheLayout
from dsv3.cache.pool import CachePool
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.jobs import Cast, uniform_kinds
from dsv3.checkpoint.load import integer_weights, load_weights
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.sharding import shard_region, tensor_specs
from dsv3.checkpoint.source import open_source
from dsv3.config import ParallelConfig
from dsv3.config_files import DEMO
from dsv3.distributed.collectives import SingleRank
from dsv3.distributed.mesh import Mesh
from dsv3.engine.runner import Runner
from dsv3.engine.step_plan import StepPlan
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.model.transformer import Transformer
from dsv3.parallel.storage import IntegerGroups
from dsv3.parallel.weight_format import WeightFormat
from dsv3.parallel.weights import Matrix
from dsv3_kernels import operation
from dsv3_kernels.gemm import int_gemm
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.integer_files import FORMS, integer_checkpoint

CPU = torch.device("cpu")


def model_of(source: Source, layout: ParallelConfig, fmt: WeightFormat) -> Transformer:
    mesh = Mesh(layout, CPU, SingleRank(), SingleRank(), SingleRank(), 1)
    model = Transformer(source.config, mesh, fmt).eval()
    load_weights(source, model.targets(), layout)
    return model


def kept(source: Source, int8_products: bool = False) -> WeightFormat:
    """Return the format in which a GPU holds the weights."""
    integers = integer_weights(source, (4, 8), exact=False)
    return WeightFormat(torch.float32, CPU, integers=integers, int8_products=int8_products)


def matrices(model: Transformer) -> dict[str, Matrix]:
    found = (m for m in model.modules() if isinstance(m, Matrix))
    return {m.names[0][0]: m for m in found if m.names}


@pytest.mark.parametrize("form", FORMS)
def test_values_of_held_integers(form: str, tmp_path: Path) -> None:
    """Every rank's slices are the stored values, AWQ's zeros included, bit by bit."""
    path, _, values = integer_checkpoint(tmp_path, form)
    with open_source(path) as source:
        specs = tensor_specs(source.config)
        for size, rank in ((1, 0), (2, 1), (4, 2)):
            layout = ParallelConfig(world_size=size, rank=rank)
            checked = 0
            for matrix in matrices(model_of(source, layout, kept(source))).values():
                if not isinstance(matrix.storage, IntegerGroups):
                    continue
                assert (matrix.storage.block_zero is not None) == (form == "awq")
                for e, names in enumerate(matrix.names):
                    parts = []
                    for name in names:
                        region = shard_region(specs[name], layout)
                        assert region is not None, name
                        parts.append(values[name][tuple(slice(*bounds) for bounds in region)])
                    want = torch.from_numpy(np.concatenate(parts))
                    assert_bitwise_equal(names[0], matrix.matrix(e), want)
                    checked += 1
            assert checked >= 3


def logits_of(model: Transformer, tokens: int) -> Tensor:
    """Return the logits of a prompt's last position."""
    config = model.config
    layout = CacheLayout.make(config, "latent", "tokens", "fp32", 1, 0)
    pages = layout.pages_for(tokens)
    cache = CachePool(layout, pages + 1, CPU, SingleRank())
    found: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _module, _x, y: found.append(y.clone()))
    ids = np.arange(3, 3 + tokens, dtype=np.int32) % config.vocab_size
    page_ids = np.arange(1, pages + 1, dtype=np.int32)[None]
    plan = StepPlan.greedy(ids, np.zeros(1, np.int32), page_ids)
    with torch.inference_mode():
        Runner(model, cache, AbsorbRule(1)).run([plan])
    hook.remove()
    return found[0]


@pytest.mark.parametrize("form", ["int8", "int4-32", "awq"])  # kimi is packed like int4-32
def test_logits(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels on held integers and references on dequantized weights, of few and of many rows."""
    path, _, _ = integer_checkpoint(tmp_path, form)
    with open_source(path) as source:
        layout = ParallelConfig(world_size=1)
        dequantized = model_of(source, layout, WeightFormat(torch.float32, CPU))
        held = model_of(source, layout, kept(source))
        kept_so = [isinstance(m.storage, IntegerGroups) for m in matrices(held).values()]
        assert sum(kept_so) >= 2
        want = {tokens: logits_of(dequantized, tokens) for tokens in (5, 70)}
        monkeypatch.setattr(operation, "use_triton", lambda x: True)
        for tokens, expected in want.items():
            assert_close(f"{tokens} tokens", logits_of(held, tokens), expected, 1e-4)


@pytest.fixture(scope="module")
def demo_in_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "int8"
    with open_source(DEMO) as source:
        kinds = uniform_kinds(source, bits=8, group=0)
        plan = make_plan(source, None, Cast.INTEGERS, integers=kinds)
        convert(source, plan, path, workers=1)
    return path


def test_logits_of_int8_products(demo_in_int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows are quantized, few are not; kernels agree with references."""
    with open_source(demo_in_int8) as source:
        layout = ParallelConfig(world_size=1)
        exact = model_of(source, layout, kept(source))
        model = model_of(source, layout, kept(source, int8_products=True))
        assert any(m.int8_products for m in matrices(model).values())
        assert_bitwise_equal("few rows", logits_of(model, 5), logits_of(exact, 5))
        many, wanted = logits_of(model, 70), logits_of(exact, 70)
        assert not torch.equal(many, wanted)
        assert_close("many rows", many, wanted, 0.1)
        monkeypatch.setattr(int_gemm, "FEW_ROWS", 3)
        references = logits_of(model, 5)
        monkeypatch.setattr(operation, "use_triton", lambda x: True)
        assert_close("kernels", logits_of(model, 5), references, 0.02)

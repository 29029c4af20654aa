"""A rank's model holds its slices of the stored values, however they were read and split."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3.checkpoint import load
from dsv3.checkpoint.names import scale_name
from dsv3.checkpoint.sharding import shard_region, tensor_specs
from dsv3.checkpoint.source import open_source
from dsv3.config import ModelConfig, ParallelConfig
from dsv3.config_files import DEMO
from dsv3.distributed.collectives import SingleRank
from dsv3.distributed.mesh import Mesh
from dsv3.engine.start import start
from dsv3.errors import ConfigError
from dsv3.model.transformer import Transformer
from dsv3.parallel.weight_format import WeightFormat
from dsv3.parallel.weights import Matrix, Target, Vector
from dsv3.settings import EngineConfig
from dsv3_kernels.testing import assert_bitwise_equal
from tests.checkpoint_files import FP8, TINY, Tensors, random_tensors, write_hf
from tests.distributed.ranks import alone

CPU = torch.device("cpu")
QUANTIZED = dataclasses.replace(TINY, quantization=FP8)
TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}


def value(tensors: Tensors, name: str) -> Tensor:
    """Return a whole stored tensor in float32, dequantized value by value."""
    dtype, shape, data = tensors[name]
    x = torch.frombuffer(bytearray(data), dtype=TYPES[dtype]).view(shape).float()
    if scale_name(name) in tensors and dtype == "F8_E4M3":
        scale = value(tensors, scale_name(name))
        rows, cols = np.indices(shape) // 128
        x = x * scale[torch.from_numpy(rows), torch.from_numpy(cols)]
    return x


def targets(module: torch.nn.Module) -> list[tuple[Target, Tensor]]:
    """Return every target with the values that its layer computes with."""
    found: list[tuple[Target, Tensor]] = []
    for part in module.modules():
        if isinstance(part, Vector):
            found += [(t, part.weight) for t in part.targets()]
        elif isinstance(part, Matrix):
            stacked = (part.matrix(e).split(part.rows) for e in range(len(part.names)))
            values = [x for parts in stacked for x in parts]
            found += list(zip(part.targets(), values, strict=True))
    return found


Stored = tuple[Path, ModelConfig, dict[str, Tensor]]


@pytest.fixture(scope="module", params=[TINY, QUANTIZED], ids=["bf16", "fp8"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """A checkpoint, its config, and what each of its weights stands for."""
    config, tensors = request.param, random_tensors(request.param)
    path = write_hf(tmp_path_factory.mktemp("load") / "hf", config, tensors)
    return path, config, {name: value(tensors, name) for name in tensor_specs(config)}


@pytest.mark.parametrize("buffer", [pytest.param(700, marks=pytest.mark.slow), 1 << 20])
@pytest.mark.parametrize("keep_fp8", [False, True])
def test_every_rank_gets_its_slices(
    stored: Stored,
    monkeypatch: pytest.MonkeyPatch,
    keep_fp8: bool,
    buffer: int,
) -> None:
    """A buffer of 700 bytes cuts every tensor within its FP8 blocks."""
    monkeypatch.setattr(load, "_BUFFER_BYTES", buffer)
    path, config, values = stored
    specs = tensor_specs(config)
    with open_source(path) as source:
        names = load.fp8_weights(source) if keep_fp8 else frozenset()
        for size, rank, dp in ((1, 0, 1), (2, 1, 1), (4, 2, 2), (8, 0, 1), (8, 3, 4), (8, 7, 1)):
            layout = ParallelConfig(world_size=size, rank=rank, dp=dp)
            mesh = Mesh(layout, CPU, SingleRank(), SingleRank(), SingleRank(), 1)
            model = Transformer(config, mesh, WeightFormat(torch.float32, CPU, names))
            load.load_weights(source, model.targets(), layout)
            for target, held in targets(model):
                region = shard_region(specs[target.name], layout)
                assert region is not None
                want = values[target.name][tuple(slice(*bounds) for bounds in region)]
                assert_bitwise_equal(f"{target.name} on {rank}", held.detach(), want.contiguous())


def test_bfloat16_values_are_loaded_unchanged(tmp_path: Path) -> None:
    """Nothing passes through another type; norms and the router stay float32."""
    tensors = random_tensors(TINY)
    with open_source(write_hf(tmp_path / "hf", TINY, tensors)) as source:
        mesh = Mesh(ParallelConfig(), CPU, SingleRank(), SingleRank(), SingleRank(), 1)
        model = Transformer(TINY, mesh, WeightFormat(torch.bfloat16, CPU))
        load.load_weights(source, model.targets(), mesh.layout)
    kinds = set()
    for target, held in targets(model):
        kinds.add((held.dtype, target.name.rsplit(".", 2)[-2]))
        assert_bitwise_equal(target.name, held.detach().float(), value(tensors, target.name))
    float32 = {part for dtype, part in kinds if dtype == torch.float32}
    assert float32 >= {"gate", "norm", "input_layernorm", "kv_a_layernorm"}
    assert not float32 & {"embed_tokens", "lm_head", "o_proj", "kv_b_proj", "down_proj"}


@pytest.mark.parametrize("stored_as", ["BF16", "F32"])
def test_a_router_stored_in_bfloat16_stays_so(stored_as: str, tmp_path: Path) -> None:
    tensors, name = random_tensors(TINY), "model.layers.1.mlp.gate.weight"
    want = value(tensors, name)
    if stored_as == "F32":
        tensors[name] = ("F32", tensors[name][1], want.numpy().tobytes())
    with open_source(write_hf(tmp_path / "hf", TINY, tensors)) as source:
        routers = load.bf16_vectors(source)
        mesh = Mesh(ParallelConfig(), CPU, SingleRank(), SingleRank(), SingleRank(), 1)
        fmt = WeightFormat(torch.bfloat16, CPU, bf16_vectors=routers)
        model = Transformer(TINY, mesh, fmt)
        load.load_weights(source, model.targets(), mesh.layout)
    assert routers == ({name} if stored_as == "BF16" else set())
    held = next(weight for target, weight in targets(model) if target.name == name)
    assert held.dtype == TYPES[stored_as]
    assert_bitwise_equal(name, held.detach().float(), want)


def test_several_groups_have_no_disk_cache(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf", TINY, random_tensors(TINY))
    mesh = Mesh(
        ParallelConfig(world_size=2, dp=2), CPU, SingleRank(), SingleRank(), SingleRank(), 1
    )
    with pytest.raises(ConfigError, match="kv_disk_cache serves one data-parallel"):
        start(path, EngineConfig(kv_disk_cache=f"{path}:1MiB"), mesh)


def test_a_model_can_be_made_in_inference_mode() -> None:
    settings = EngineConfig(kv_cache_size="128tok")
    with torch.inference_mode():
        inside = start(DEMO, settings, alone()).runner.model
    outside = start(DEMO, settings, alone()).runner.model
    for a, b in zip(inside.parameters(), outside.parameters(), strict=True):
        assert torch.equal(a, b)

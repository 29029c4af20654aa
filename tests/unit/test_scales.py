"""Block scales in BF16, F16 and E8M0 give the same weights as in float32."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.jobs import Cast
from dsv3.checkpoint.load import fp8_weights, load_weights
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.scales import read_scales
from dsv3.checkpoint.source import open_source
from dsv3.config import ParallelConfig
from dsv3.distributed.collectives import SingleRank
from dsv3.distributed.mesh import Mesh
from dsv3.model.transformer import Transformer
from dsv3.parallel.weight_format import WeightFormat
from dsv3_kernels.testing import assert_bitwise_equal
from tests.checkpoint_files import FP8, TINY, Tensors, random_tensors, write_hf

CONFIG = dataclasses.replace(TINY, quantization=FP8)
TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F8_E8M0": torch.float8_e8m0fnu}
Q_A = "model.layers.0.self_attn.q_a_proj.weight"


def with_scales(dtype: str) -> tuple[Tensors, Tensors]:
    """Return a checkpoint with scales of a dtype, and the same with them in float32."""
    stored, wide = random_tensors(CONFIG), random_tensors(CONFIG)
    generator = torch.Generator().manual_seed(1)
    for name, (kind, shape, _) in list(stored.items()):
        if not name.endswith("_scale_inv"):
            continue
        values = torch.randn(shape, generator=generator).abs() * 2.0**-10
        if dtype == "F8_E8M0":
            values = torch.exp2(values.log2().round())
        scale = values.to(TYPES[dtype])
        data = scale.view(torch.uint8).numpy().tobytes()
        stored[name] = dtype, shape, data
        wide[name] = kind, shape, scale.float().numpy().tobytes()
    return stored, wide


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "dequantized"])
def test_loading(dtype: str, keep: bool, tmp_path: Path) -> None:
    """On the second of two ranks, where slices begin inside blocks."""
    one = SingleRank()
    mesh = Mesh(ParallelConfig(world_size=2, rank=1), torch.device("cpu"), one, one, one, 1)
    models = []
    for i, tensors in enumerate(with_scales(dtype)):
        with open_source(write_hf(tmp_path / str(i), CONFIG, tensors)) as source:
            names = fp8_weights(source) if keep else frozenset()
            model = Transformer(CONFIG, mesh, WeightFormat(torch.float32, mesh.device, names))
            load_weights(source, model.targets(), mesh.layout)
            models.append(model)
    stored, wide = (dict(model.named_parameters()) for model in models)
    for name in wide:
        assert_bitwise_equal(name, stored[name], wide[name])
    for a, b in zip(*(model.modules() for model in models), strict=True):
        if getattr(b, "block_scale", None) is not None:
            assert torch.equal(a.block_scale, b.block_scale)


@pytest.mark.parametrize("dtype", TYPES)
def test_converting(dtype: str, tmp_path: Path) -> None:
    """Rank files and Hugging Face directories keep the dtype; a cast uses the values."""
    stored, wide = with_scales(dtype)
    with open_source(write_hf(tmp_path / "wide", CONFIG, wide)) as source:
        convert(source, make_plan(source, None, Cast.BF16), tmp_path / "wide-bf16", workers=1)
    with open_source(write_hf(tmp_path / "hf", CONFIG, stored)) as source:
        convert(source, make_plan(source, None, Cast.BF16), tmp_path / "bf16", workers=1)
        convert(source, make_plan(source, ParallelConfig(world_size=8)), tmp_path / "mp8", 1)
    with open_source(tmp_path / "mp8") as source:
        convert(source, make_plan(source, None), tmp_path / "back", workers=1)
    with open_source(tmp_path / "back") as source:
        for name, (kind, shape, data) in stored.items():
            assert (source.tensors[name].dtype, source.tensors[name].shape) == (kind, shape)
            assert bytes(source.read(name)) == data, name
    with open_source(tmp_path / "bf16") as got, open_source(tmp_path / "wide-bf16") as want:
        assert got.tensors.keys() == want.tensors.keys()
        assert all(got.read(name) == want.read(name) for name in want.tensors)


def test_every_power_of_two(tmp_path: Path) -> None:
    """Including the subnormal one; the last code is NaN."""
    codes = np.arange(256, dtype=np.uint8)
    config = dataclasses.replace(CONFIG, q_lora_rank=128 * 86)  # 86 x 3 blocks
    tensors = random_tensors(config)
    shape = tensors[Q_A.replace(".weight", ".weight_scale_inv")][1]
    padded = np.resize(codes, shape)
    tensors[Q_A.replace(".weight", ".weight_scale_inv")] = "F8_E8M0", shape, padded.tobytes()
    with open_source(write_hf(tmp_path, config, tensors)) as source:
        got = read_scales(source, Q_A, ((0, shape[0]), (0, shape[1])))
    want = torch.from_numpy(padded).view(torch.float8_e8m0fnu).float().numpy()
    assert padded.size > 256 and got.dtype == np.float32
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got[padded == 0], np.float32(2.0**-127))

"""Experts fused into 3-D tensors are read as one tensor per expert and projection."""

import dataclasses
from pathlib import Path

import pytest

from dsv3.checkpoint.check import check_tensors
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.source import open_source
from dsv3.checkpoint.verify import verify_against
from dsv3.config import ModelConfig, ParallelConfig
from dsv3.errors import CheckpointError
from tests.checkpoint_files import FP8, TINY, Tensors, fuse_experts, random_tensors, write_hf

PLAIN = dataclasses.replace(TINY, num_nextn_predict_layers=1)
WIDE = dataclasses.replace(PLAIN, moe_intermediate_size=256, quantization=FP8)
EXPERTS = "model.layers.1.mlp.experts."


def assert_read_as(path: Path, tensors: Tensors) -> None:
    with open_source(path) as source:
        assert check_tensors(source) == ()
        assert source.tensors.keys() == tensors.keys()
        for name, (dtype, shape, data) in tensors.items():
            info = source.tensors[name]
            assert (info.dtype, info.shape) == (dtype, shape), name
            assert bytes(source.read(name)) == data, name


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_weights(suffix: str, tmp_path: Path) -> None:
    tensors = random_tensors(PLAIN)
    assert_read_as(write_hf(tmp_path, PLAIN, fuse_experts(tensors, PLAIN, suffix)), tensors)


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        ("", "_scale_inv"),
        ("", "_weight_scale_inv"),
        (".weight", ".weight_scale_inv"),
        (".weight", ".weight_scale"),
        (None, "_scale_inv"),
        ("", None),
    ],
)
def test_fp8_weights_and_scales(weight: str | None, scale: str | None, tmp_path: Path) -> None:
    tensors = random_tensors(WIDE)
    fused = fuse_experts(tensors, WIDE, weight, scale)
    assert fused.keys() != tensors.keys()
    assert_read_as(write_hf(tmp_path, WIDE, fused), tensors)


@pytest.mark.parametrize("stack", ["experts.{}", "switch_mlp.{}.weight"])
def test_one_tensor_for_each_projection(stack: str, tmp_path: Path) -> None:
    """Stacked, but gate and up not fused."""
    tensors = random_tensors(PLAIN)
    stacked = dict(tensors)
    for layer in (1, 2):
        for part in ("gate_proj", "up_proj", "down_proj"):
            prefix = f"model.layers.{layer}.mlp.experts."
            taken = [stacked.pop(f"{prefix}{e}.{part}.weight") for e in range(8)]
            shape = (8, *taken[0][1])
            name = f"model.layers.{layer}.mlp.{stack.format(part)}"
            stacked[name] = taken[0][0], shape, b"".join(t[2] for t in taken)
    assert_read_as(write_hf(tmp_path, PLAIN, stacked), tensors)


@pytest.mark.parametrize("config", [PLAIN, WIDE], ids=["bf16", "fp8"])
def test_converting_to_ranks_and_back(config: ModelConfig, tmp_path: Path) -> None:
    """The result has one tensor per expert, with the same bytes."""
    tensors = random_tensors(config)
    path = write_hf(tmp_path / "hf", config, fuse_experts(tensors, config))
    with open_source(path) as source:
        plan = make_plan(source, ParallelConfig(world_size=2))
        convert(source, plan, tmp_path / "mp2", workers=2)
        with open_source(tmp_path / "mp2") as result:
            verify_against(source, plan, result, workers=2)
    with open_source(tmp_path / "mp2") as source:
        convert(source, make_plan(source, None), tmp_path / "back", workers=2)
    assert_read_as(tmp_path / "back", tensors)


def refused(path: Path, config: ModelConfig, tensors: Tensors, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        open_source(write_hf(path, config, tensors))
    assert "\n" not in str(caught.value)


def test_scales_of_blocks_that_gate_and_up_share(tmp_path: Path) -> None:
    """200 rows each: the second of four blocks has rows of both."""
    config = dataclasses.replace(PLAIN, quantization=FP8)
    fused = fuse_experts(random_tensors(config), config)
    words = r"gate_up_proj_scale_inv .* fused .* moe_intermediate_size=200 is not a multiple of 128"
    refused(tmp_path, config, fused, words)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("gate_up_proj", (8, 320, 400), r"is \[8, 320, 400\], .* \[8, 400, 320\] .*; transposed"),
        ("gate_up_proj", (4, 800, 320), r"is \[4, 800, 320\], .*n_routed_experts=8"),
        ("down_proj", (8, 320, 100), r"is \[8, 320, 100\], .*moe_intermediate_size=200"),
        ("down_proj", (8, 64000), r"is \[8, 64000\], .* fused experts \[8, 320, 200\]"),
    ],
)
def test_other_shapes(name: str, shape: tuple[int, ...], words: str, tmp_path: Path) -> None:
    fused = fuse_experts(random_tensors(PLAIN), PLAIN)
    size = 2
    for length in shape:
        size *= length
    fused[EXPERTS + name] = "BF16", shape, bytes(size)
    refused(tmp_path, PLAIN, fused, words)


@pytest.mark.parametrize("fused_last", [True, False])
def test_fused_and_single_experts_together(fused_last: bool, tmp_path: Path) -> None:
    tensors = random_tensors(PLAIN)
    fused = fuse_experts(tensors, PLAIN)
    both = tensors | fused if fused_last else fused | tensors
    words = r"_proj.weight is stored twice, as .* and as .*"
    refused(tmp_path, PLAIN, both, words)

"""Tiny checkpoints with random integer weights, packed one value at a time, without dsv3's code."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv3.checkpoint.jobs import uniform_kinds
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.sharding import tensor_specs
from dsv3.config import ModelConfig
from dsv3.config_files import hf_config_dict
from dsv3.config_integers import IntegerKind
from tests.checkpoint_files import TINY, Tensors, random_tensors, write_hf

F32 = npt.NDArray[np.float32]
# Multiples of 8 that ranks cut: 200 wide experts of groups of 40, heads of 24 values.
MODEL = dataclasses.replace(
    TINY, moe_intermediate_size=192, intermediate_size=576, qk_nope_head_dim=40, v_head_dim=24
)
FORMS = ("int8", "packed8", "int4-32", "int4-64", "kimi", "awq")
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def _bf16(x: F32) -> tuple[bytes, F32]:
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    return bits.tobytes(), (bits.astype(np.uint32) << 16).view(np.float32)


def _packed(q: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.uint32]:
    """Pack along the last dim, the first value in the lowest bits."""
    fields = q.reshape(*q.shape[:-1], -1, 32 // bits).astype(np.uint64)
    shifts = np.arange(32 // bits, dtype=np.uint64) * np.uint64(bits)
    words: npt.NDArray[np.uint64] = (fields << shifts).sum(-1)
    return words.astype(np.uint32)


def integer_weight(
    name: str, shape: tuple[int, int], form: str, rng: np.random.Generator
) -> tuple[Tensors, F32]:
    """Return the tensors of a random weight in a form, and its values."""
    stem = name.removesuffix(".weight")
    rows, cols = shape
    bits = 8 if form in ("int8", "packed8") else 4
    group = cols if bits == 8 else 64 if form == "int4-64" else 32
    low = -(1 << bits - 1)
    q = rng.integers(low, -low, shape)
    scale = rng.uniform(0.01, 0.03, (rows, cols // group)).astype(np.float32)
    if form == "awq":
        return _awq_weight(stem, q, scale.astype(np.float16), group, rng)
    data, scale = _bf16(scale)
    values = q.astype(np.float32) * scale.repeat(group, 1)
    tensors: Tensors = {f"{stem}.weight_scale": ("BF16", scale.shape, data)}
    if form == "int8":
        tensors[name] = "I8", shape, q.astype(np.int8).tobytes()
        return tensors, values
    words = _packed(q - low, bits)
    tensors[f"{stem}.weight_packed"] = "I32", words.shape, words.tobytes()
    dtype, width = ("I32", np.int32) if form == "kimi" else ("I64", np.int64)
    tensors[f"{stem}.weight_shape"] = dtype, (2,), np.array(shape, width).tobytes()
    return tensors, values


def _awq_weight(
    stem: str,
    q: npt.NDArray[np.int64],
    scale: npt.NDArray[np.float16],
    group: int,
    rng: np.random.Generator,
) -> tuple[Tensors, F32]:
    codes = q + 8
    zero = rng.integers(0, 16, scale.shape)
    values = (codes - zero.repeat(group, 1)).astype(np.float32)
    values *= scale.astype(np.float32).repeat(group, 1)

    def words(by_row: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        turned = by_row.T.reshape(by_row.shape[1], -1, 8)[..., list(_AWQ)]
        return _packed(turned.reshape(by_row.shape[1], -1), 4)

    tensors: Tensors = {
        f"{stem}.qweight": ("I32", words(codes).shape, words(codes).tobytes()),
        f"{stem}.qzeros": ("I32", words(zero).shape, words(zero).tobytes()),
        f"{stem}.scales": ("F16", scale.T.shape, np.ascontiguousarray(scale.T).tobytes()),
    }
    return tensors, values


def is_integer(name: str, cols: int, form: str) -> bool:
    """Return True for the weights that a form's checkpoints store as integers."""
    if form == "kimi" and ".experts." not in name:
        return False
    return not name.endswith("kv_b_proj.weight") and cols % 64 == 0


def quantization(form: str) -> dict[str, Any]:
    """Return the quantization_config of a form."""
    if form == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM"}
    weights: dict[str, Any] = {"num_bits": 8 if form in ("int8", "packed8") else 4, "type": "int"}
    weights |= {"symmetric": True, "strategy": "channel" if weights["num_bits"] == 8 else "group"}
    if weights["num_bits"] == 4:
        weights["group_size"] = 64 if form == "int4-64" else 32
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if form == "int8" else "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def mixed_kinds_by_hand(source: Source) -> dict[str, IntegerKind]:
    """Return int8 for shared experts, int4 for routed experts and the attention of some layers.

    Of an FP8 checkpoint, the others stay in FP8. Ranks cut the groups of 128 of o_proj.
    """
    kinds = uniform_kinds(source, 4, 32)
    kinds |= {name: IntegerKind(8, 0) for name in kinds if ".shared_experts." in name}
    outputs = {name for name in uniform_kinds(source, 4, 128) if ".o_proj." in name}
    kinds |= dict.fromkeys(outputs, IntegerKind(4, 128))
    return {name: kind for name, kind in kinds.items() if ".layers.2.self_attn." not in name}


def integer_checkpoint(
    path: Path, form: str, config: ModelConfig = MODEL
) -> tuple[Path, Tensors, dict[str, F32]]:
    """Write a checkpoint in a form; return its tensors, and the values of its integer weights."""
    rng = np.random.default_rng(7)
    tensors: Tensors = {}
    values: dict[str, F32] = {}
    specs = tensor_specs(config)
    for name, tensor in random_tensors(config).items():
        shape = specs[name].shape
        if specs[name].quantizable and is_integer(name, shape[1], form):
            parts, values[name] = integer_weight(name, (shape[0], shape[1]), form, rng)
            tensors |= parts
        else:
            tensors[name] = tensor
    write_hf(path, config, tensors)
    data = hf_config_dict(config) | {"quantization_config": quantization(form)}
    (path / "config.json").write_text(json.dumps(data))
    return path, tensors, values

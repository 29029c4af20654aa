"""Tiny checkpoints with random bytes, written without torch."""

import json
from pathlib import Path

import numpy as np

from dsv3.checkpoint.names import FROM_DEEPSEEK, scale_name
from dsv3.checkpoint.safetensors_file import make_header
from dsv3.checkpoint.sharding import scale_shape, tensor_specs
from dsv3.config import ModelConfig, QuantizationConfig
from dsv3.config_files import hf_config_dict
from dsv3.config_rope import RopeScaling

# Small, but with every irregularity: FP8 blocks cut by shards (200 wide experts, 96 rows of
# kv_b a head), ragged last blocks (kv_a 144 rows, hidden 320), a vocabulary that 8 does not divide.
TINY = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=331,
    hidden_size=320,
    intermediate_size=600,
    moe_intermediate_size=200,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=8,
    q_lora_rank=136,
    kv_lora_rank=128,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=64,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=64, mscale_all_dim=1.0),
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_ids=(1,),
)
FP8 = QuantizationConfig()

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def to_deepseek(name: str) -> str:
    """Hugging Face name to that of DeepSeek's own converter."""
    theirs = {ours: short for short, ours in FROM_DEEPSEEK.items()}
    return ".".join(theirs.get(part, part) for part in name.removeprefix("model.").split("."))


def random_tensors(config: ModelConfig, seed: int = 0) -> Tensors:
    """Every tensor of the model as (dtype, shape, bytes), FP8 with scales where config says so."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for spec in tensor_specs(config).values():
        size = int(np.prod(spec.shape))
        if spec.name.endswith("e_score_correction_bias"):
            tensors[spec.name] = "F32", spec.shape, rng.random(size, np.float32).tobytes()
        elif config.quantization and spec.quantizable:
            values = rng.integers(0, 127, size, np.uint8) | rng.integers(0, 2, size, np.uint8) << 7
            tensors[spec.name] = "F8_E4M3", spec.shape, values.tobytes()
            shape = scale_shape(spec.shape)
            scales = np.exp2(rng.integers(-12, -4, shape)).astype(np.float32)
            tensors[scale_name(spec.name)] = "F32", shape, scales.tobytes()
        else:
            values = rng.standard_normal(size, np.float32).view(np.uint32) >> 16
            tensors[spec.name] = "BF16", spec.shape, values.astype(np.uint16).tobytes()
    return tensors


def fuse_experts(
    tensors: Tensors, config: ModelConfig, weight: str | None = "", scale: str | None = "_scale_inv"
) -> Tensors:
    """Fuse the routed experts of every layer into 3-D tensors, as transformers 5 holds them.

    Args:
        tensors: with a tensor per expert and projection.
        config: of the model.
        weight: what follows gate_up_proj and down_proj in the names of weights; None leaves the
            weights as they are.
        scale: the same of FP8 scales.
    """
    fused = dict(tensors)
    suffixes = {".weight": weight, ".weight_scale_inv": scale}
    first = [n for n in tensors if ".mlp.experts.0.gate_proj." in n]
    for name in first:
        prefix, _, rest = name.partition("0.gate_proj")
        suffix = suffixes[rest]
        if suffix is None:
            continue
        for fused_name, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            taken = [
                fused.pop(f"{prefix}{e}.{part}_proj{rest}")
                for e in range(config.n_routed_experts)
                for part in parts
            ]
            dtype, (rows, cols), _ = taken[0]
            shape = (config.n_routed_experts, len(parts) * rows, cols)
            fused[f"{prefix}{fused_name}{suffix}"] = dtype, shape, b"".join(t[2] for t in taken)
    return fused


def write_file(path: Path, tensors: Tensors) -> None:
    """One safetensors file."""
    header, offsets = make_header((name, t[0], t[1]) for name, t in tensors.items())
    with path.open("wb") as file:
        file.write(header)
        for name in offsets:
            file.write(tensors[name][2])


def write_hf(path: Path, config: ModelConfig, tensors: Tensors, files: int = 3) -> Path:
    """A Hugging Face directory; weights and their scales land in different files."""
    path.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for index in range(files):
        name = f"model-{index + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(tensors.items())[index::files])
        write_file(path / name, part)
        weight_map |= dict.fromkeys(part, name)
    contents = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(contents))
    (path / "config.json").write_text(json.dumps(hf_config_dict(config)))
    (path / "tokenizer.json").write_text("{}")
    return path


def write_sparse(path: Path, config: ModelConfig) -> Path:
    """One BF16 file of the model's full size that takes no room on the disk: all zeros."""
    header, _ = make_header(
        (spec.name, "BF16", spec.shape) for spec in tensor_specs(config).values()
    )
    path.mkdir()
    size = sum(2 * int(np.prod(spec.shape)) for spec in tensor_specs(config).values())
    with (path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    (path / "config.json").write_text(json.dumps(hf_config_dict(config)))
    return path

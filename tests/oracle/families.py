"""Tiny random checkpoints of every family, made by Hugging Face transformers.

transformers initializes the model, names its tensors and computes the expected logits; this file
only draws the weights and stores them as the released checkpoints do: several shards, FP8 weights
with block scales in another shard, a router bias in float32. The expected logits are those of the
stored values, FP8 dequantized, in float32.
"""

import copy
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

# Positions up to 128, of which the model was "trained" on 32.
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 4,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 32,
    "type": "yarn",
}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
# The spelling of deepseek-ai/DeepSeek-V3's config.json.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 96,
    "initializer_range": 0.02,
    "intermediate_size": 200,
    "kv_lora_rank": 32,
    "max_position_embeddings": 128,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 40,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 8,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 16,
    "vocab_size": 331,
}
V2 = V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "aux_loss_alpha": 0.001,
    "model_type": "deepseek_v2",
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
    "seq_aux": True,
}
# FP8 wants rows and columns above 128, ragged: kv_a has 128 + 16 rows, experts are 200 wide.
FP8_SIZES = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 200,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "q_lora_rank": 136,
    "quantization_config": FP8,
}
V3_FP8 = V3 | FP8_SIZES
# With few heads, many products are all negative, and the scores of their positions all zero: ties,
# of which transformers takes any.
SPARSE = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_head_dim": 32,
    "index_n_heads": 16,
    "index_topk": 48,
}
# The spelling of transformers 5: the base is inside `rope_parameters`, and there is no YaRN. The
# epsilon is large enough to tell the norms of the latents from the others.
GLM = {name: value for name, value in V3.items() if name not in ("rope_scaling", "rope_theta")} | {
    "eos_token_id": [1, 3, 4],
    "n_group": 1,
    "pad_token_id": 1,
    "qk_head_dim": 40,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "topk_group": 1,
    "v_head_dim": 40,
}
GLM5 = GLM | {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "head_dim": 16,
    "index_head_dim": 32,
    "index_n_heads": 16,
    "index_topk": 48,
    "indexer_rope_interleave": True,
    "moe_router_dtype": "float32",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "v2-lite": V2
    | {
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 6,
        "q_lora_rank": None,
        "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    # Unlike every released model, cosines and sines are scaled too.
    "v2": V2 | {"rope_scaling": YARN | {"mscale": 1.3, "mscale_all_dim": 0.7}},
    "v3-bf16": V3,
    "v3-fp8": V3_FP8,
    # Every shard of one and of two ranks but the narrow experts' is whole blocks.
    "v3-fp8-whole": V3_FP8
    | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "q_lora_rank": 256,
        "v_head_dim": 32,
    },
    "v3.1-ue8m0": V3_FP8 | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}},
    # Several pages of which a query attends to fewer positions than one has.
    "v3.2-long": V3
    | SPARSE
    | {
        "index_topk": 40,
        "max_position_embeddings": 512,
        "rope_scaling": YARN | {"factor": 16},
    },
    "v3.2": V3_FP8 | SPARSE | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}},
    "kimi-k2": V3
    | {
        "hidden_size": 120,
        "model_type": "kimi_k2",
        "n_group": 1,
        "n_routed_experts": 24,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 1.0},
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "topk_group": 1,
    },
    "glm-5": GLM5,
    # Shared layers follow one another; FP8 as in V3.2.
    "glm-5.2": GLM5
    | FP8_SIZES
    | {
        "index_share_for_mtp_iteration": True,
        "index_skip_topk_offset": 2,
        "index_topk_freq": 3,
        "index_topk_pattern": None,
        "indexer_types": ["full", "full", "shared", "shared", "full", "shared"],
        "num_hidden_layers": 6,
    },
    "glm-4.7-flash": GLM
    | {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        "partial_rotary_factor": 1.0,
        "routed_scaling_factor": 1.8,
    },
    "kimi-k2.5": V3
    | {
        "n_group": 1,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "rms_norm_eps": 1e-3,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "topk_group": 1,
    },
    "moonlight": V3
    | {
        "n_group": 1,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-3,
        "rope_scaling": None,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
        "topk_group": 1,
    },
    "unusual": V3
    | {
        "first_k_dense_replace": 0,
        "max_position_embeddings": 128,
        "n_shared_experts": 3,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-3,
        "rope_interleave": False,
        "rope_scaling": None,
        "torch_dtype": "float32",
    },
}
# Mean and spread of the router's bias. V3.1's is far above the scores and must stay float32; with
# v3-fp8's every biased score is negative, so that groups masked by 0 would win.
BIAS = {"v3.1-ue8m0": (10.0, 0.2), "kimi-k2": (-0.3, 0.2), "v3-fp8": (-1.5, 0.2)}
# Outer model type of a multi-modal model: its config has the text model's inside, its tensor names
# have a prefix, and there are tensors of an image encoder.
WRAPPED = {"kimi-k2.5": "kimi_k25"}
PROMPT_LENGTHS = (1, 2, 7, 45, 90)


@dataclass(frozen=True)
class Oracle:
    """A checkpoint directory, and transformers' model of it in float32."""

    path: Path
    model: PreTrainedModel
    prompts: list[list[int]]

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        """Return the logits at every position, without a cache."""
        return self.model(torch.tensor([token_ids]), use_cache=False).logits[0]


def make_oracle(family: str, folder: Path) -> Oracle:
    """Write `folder`/hf and load it back with transformers."""
    config = CONFIGS[family]
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(zlib.crc32(family.encode()))
    made = _model_class(config)(_hf_config(config)).float()
    _draw_weights(made, *BIAS.get(family, (-0.1, 0.2)))
    # transformers splits its fused experts and names the tensors as they are published.
    made.save_pretrained(folder / "names")
    names = load_file(folder / "names" / "model.safetensors")
    stored, plain = _store(names, config)
    if family in WRAPPED:
        _write(folder / "hf", *_wrap(stored, config, WRAPPED[family]))
    else:
        _write(folder / "hf", stored, config)
    (folder / "plain").mkdir()
    save_file(plain, folder / "plain" / "model.safetensors", {"format": "pt"})
    _hf_config(config).save_pretrained(folder / "plain")
    loaded: Any = _model_class(config).from_pretrained(  # typed as if without the loading info
        folder / "plain",
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    model, info = loaded
    assert not any(info.values()), info
    _correct_epsilons(model, config)
    vocab = config["vocab_size"]
    prompts = [torch.randint(2, vocab, (n,)).tolist() for n in PROMPT_LENGTHS]
    return Oracle(folder / "hf", model.eval(), prompts)


def _wrap(
    tensors: dict[str, Tensor], config: dict[str, Any], model_type: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the checkpoint of a multi-modal model with this text model, as Kimi-K2.5's."""
    wrapped = {f"language_model.{name}": x for name, x in tensors.items()}
    wrapped |= {
        "mm_projector.proj.0.weight": torch.ones(4, 4, dtype=torch.bfloat16),
        "vision_tower.encoder.blocks.0.wqkv.weight": torch.ones(12, 4, dtype=torch.bfloat16),
        "vision_tower.patch_embed.proj.weight": torch.ones(4, 3, 2, 2, dtype=torch.bfloat16),
    }
    outer = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "media_placeholder_token_id": 5,
        "model_type": model_type,
        "text_config": config,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": {"patch_size": 2, "vt_hidden_size": 4, "vt_num_hidden_layers": 1},
    }
    return wrapped, outer


def _correct_epsilons(model: PreTrainedModel, config: dict[str, Any]) -> None:
    """Give the norms of the latents GLM's epsilon; transformers builds them with 1e-6."""
    if config["model_type"].startswith("glm"):
        for name, module in model.named_modules():
            if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
                assert module.variance_epsilon == 1e-6
                module.variance_epsilon = config["rms_norm_eps"]


def _model_class(config: dict[str, Any]) -> type[PreTrainedModel]:
    return getattr(transformers, config["architectures"][0])


def _hf_config(config: dict[str, Any]) -> transformers.PretrainedConfig:
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "model_type")}
    dense = config["first_k_dense_replace"]
    sparse = config["num_hidden_layers"] - dense
    plain["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * sparse
    config_class = _model_class(config).config_class
    assert config_class is not None
    return config_class.from_dict(copy.deepcopy(plain))  # which it adds keys to


@torch.no_grad()
def _draw_weights(model: PreTrainedModel, bias_mean: float, bias_spread: float) -> None:
    """Large enough for attention to be peaked, routing to be varied and logits to be clear."""
    gains = {"q_proj": 2.0, "q_b_proj": 2.0, "lm_head": 4.0, "kv_a_proj_with_mqa": 1.5}
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        part = name.split(".")[-2] if name.endswith(".weight") else name.split(".")[-1]
        if name.endswith("e_score_correction_bias"):
            p.normal_(bias_mean, bias_spread)
        elif p.dim() >= 2:
            p.normal_(0, gains.get(part, 1.0) / p.shape[-1] ** 0.5)
        elif "norm" in part or "norm" in name.split(".")[-2]:
            p.normal_(0.0 if name.endswith("bias") else 1.0, 0.3)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    embedding.weight.normal_(0, 1.0)


def _store(
    tensors: dict[str, Tensor], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors as stored, and the float32 values that those stand for."""
    dtype = getattr(torch, config["torch_dtype"])
    stored, plain = {}, {}
    for name, x in sorted(tensors.items()):
        if "quantization_config" in config and _is_quantized(name):
            scale_name = name.removesuffix(".weight") + ".weight_scale_inv"
            ue8m0 = config["quantization_config"].get("scale_fmt") == "ue8m0"
            stored[name], stored[scale_name], plain[name] = _to_fp8(x, ue8m0)
        elif name.endswith("e_score_correction_bias"):
            stored[name] = plain[name] = x
        else:
            stored[name] = x.to(dtype)
            plain[name] = stored[name].float()
    return stored, plain


def _is_quantized(name: str) -> bool:
    if not name.endswith("proj.weight") and not name.endswith((".wk.weight", ".wq_b.weight")):
        return name.endswith("kv_a_proj_with_mqa.weight")
    return "weights_proj" not in name


def _to_fp8(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize block by block, each of a magnitude of its own, so that no two scales are alike."""
    rows, cols = -(-x.shape[0] // 128), -(-x.shape[1] // 128)
    q = torch.empty_like(x)
    plain = torch.empty_like(x)
    scale = torch.empty(rows, cols)
    for i in range(rows):
        for j in range(cols):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            values = x[block] * float(2.0 ** torch.empty(1).uniform_(-1, 1))
            s = values.abs().max() / 448
            scale[i, j] = torch.exp2(torch.ceil(torch.log2(s))) if ue8m0 else s
            q[block] = (values / scale[i, j]).to(torch.float8_e4m3fn).float()
            plain[block] = q[block] * scale[i, j]
    return q.to(torch.float8_e4m3fn), scale, plain


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Deal the tensors to three files: neighbours, a weight and its scales too, are torn apart."""
    folder.mkdir()
    files = 3
    weight_map: dict[str, str] = {}
    for index in range(files):
        name = f"model-{index + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(tensors.items())[index::files])
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    data = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(data))
    (folder / "config.json").write_text(json.dumps(config, indent=2))

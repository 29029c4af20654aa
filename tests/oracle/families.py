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

from tests.oracle.family_configs import BIAS, CONFIGS, PROMPT_LENGTHS, WRAPPED


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
    if config.get("num_nextn_predict_layers"):
        names |= _mtp_tensors(names, config)
    stored, plain = _store(names, config)
    if family in WRAPPED:
        _write(folder / "hf", *_wrap(stored, config, WRAPPED[family]))
    else:
        _write(folder / "hf", stored, config)
    (folder / "plain").mkdir()
    main = {n: x for n, x in plain.items() if f"layers.{config['num_hidden_layers']}." not in n}
    save_file(main, folder / "plain" / "model.safetensors", {"format": "pt"})
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


def _mtp_tensors(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of an MTP layer: a decoder layer like the last one, and its own."""
    count, hidden = config["num_hidden_layers"], config["hidden_size"]
    last, prefix = f"model.layers.{count - 1}.", f"model.layers.{count}."
    drawn = {
        name.replace(last, prefix): x.flatten()[torch.randperm(x.numel())].view(x.shape)
        for name, x in tensors.items()
        if name.startswith(last)
    }
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        drawn[f"{prefix}{norm}.weight"] = torch.empty(hidden).normal_(1.0, 0.3)
    eh_proj = torch.empty(hidden, 2 * hidden).normal_(0, (2 * hidden) ** -0.5)
    return drawn | {
        f"{prefix}eh_proj.weight": eh_proj,
        f"{prefix}embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{prefix}shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }


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

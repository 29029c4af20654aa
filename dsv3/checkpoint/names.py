"""Tensor names: Hugging Face's are ours; those of DeepSeek's own converter are read too."""

_SCALE = ".weight_scale_inv"
# One dotted component at a time. Names inside V3.2's indexer are the same in both spellings.
FROM_DEEPSEEK = {
    "attn": "self_attn",
    "ffn": "mlp",
    "embed": "embed_tokens",
    "head": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "scale": "weight_scale_inv",
    "bias": "e_score_correction_bias",
}


def scale_name(weight: str) -> str:
    """Name of the tensor that holds the inverse block scales of `weight`."""
    return weight.removesuffix(".weight") + _SCALE


def weight_name(scale: str) -> str | None:
    """Name of the weight that a scale tensor belongs to; None if `scale` is not one."""
    return scale.removesuffix(_SCALE) + ".weight" if scale.endswith(_SCALE) else None


def from_deepseek(name: str) -> str:
    """DeepSeek's name to Hugging Face's. A name that is neither comes back as some unknown name."""
    parts = name.split(".")
    inner = parts.index("indexer") if "indexer" in parts else len(parts)
    outside = [FROM_DEEPSEEK.get(part, part) for part in parts[:inner]]
    inside = ["weight_scale_inv" if part == "scale" else part for part in parts[inner:]]
    top = [] if outside[:1] == ["lm_head"] else ["model"]
    return ".".join(top + outside + inside)

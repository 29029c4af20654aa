"""Tensor names: Hugging Face's are ours; those of DeepSeek's own converter are read too."""

_SCALE = ".weight_scale_inv"
# One dotted component at a time. Names inside V3.2's indexer are the same in both spellings.
_TO_DEEPSEEK = {
    "self_attn": "attn",
    "mlp": "ffn",
    "embed_tokens": "embed",
    "lm_head": "head",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "weight_scale_inv": "scale",
    "e_score_correction_bias": "bias",
}
_FROM_DEEPSEEK = {theirs: ours for ours, theirs in _TO_DEEPSEEK.items()}


def scale_name(weight: str) -> str:
    """Name of the tensor that holds the inverse block scales of `weight`."""
    return weight.removesuffix(".weight") + _SCALE


def weight_name(scale: str) -> str | None:
    """Name of the weight that a scale tensor belongs to; None if `scale` is not one."""
    return scale.removesuffix(_SCALE) + ".weight" if scale.endswith(_SCALE) else None


def to_deepseek(name: str) -> str:
    """Hugging Face name to DeepSeek's."""
    parts = name.removeprefix("model.").split(".")
    return ".".join(_TO_DEEPSEEK.get(part, part) for part in parts)


def from_deepseek(name: str) -> str:
    """DeepSeek's name to Hugging Face's. A name that is neither comes back as some unknown name."""
    parts = name.split(".")
    if "indexer" in parts:
        at = parts.index("indexer")
        parts = [_FROM_DEEPSEEK.get(part, part) for part in parts[:at]] + [
            "weight_scale_inv" if part == "scale" else part for part in parts[at:]
        ]
    else:
        parts = [_FROM_DEEPSEEK.get(part, part) for part in parts]
    return ".".join(parts if parts[0] == "lm_head" else ["model", *parts])

"""Tensor names: Hugging Face's, to which the names of other programs are mapped.

These are DeepSeek's own converter, wrappers such as multi-modal models, and names without the
prefix `model.`.
"""

_SCALE = ".weight_scale_inv"
# Suffixes of tensors that belong to a weight: FP8 scales, and those of integer weights.
_PARTS = (
    *(_SCALE, ".weight_scale", ".weight_packed", ".weight_shape"),
    *(".qweight", ".qzeros", ".scales"),
)
_COMPRESSED_SCALE = ".weight_scale"  # the spelling of compressed-tensors
# Prefixes of multi-modal models, and in state dicts of data-parallel (DDP) and compiled modules.
_WRAPPERS = ("model", "language_model", "module", "_orig_mod")
_OF_THE_MODEL = ("layers", "embed_tokens", "norm", "lm_head")
_VISION = ("vision_tower", "vision_model", "visual", "mm_projector", "multi_modal_projector")
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
    """Return the name of the tensor with the inverse block scales of `weight`."""
    return weight.removesuffix(".weight") + _SCALE


def is_fp8_scale(name: str) -> bool:
    """Return True for a tensor of inverse block scales."""
    return name.endswith(_SCALE)


def weight_name(part: str) -> str | None:
    """Return the name of the weight that a scale or packed tensor belongs to; else None."""
    suffix = next((suffix for suffix in _PARTS if part.endswith(suffix)), None)
    return None if suffix is None else part.removesuffix(suffix) + ".weight"


def is_rotary_table(name: str) -> bool:
    """Return True for a rotary embedding's buffer, such as `inv_freq`: the config determines it."""
    return "rotary_emb" in name.split(".")


def is_vision(name: str) -> bool:
    """Return True for a tensor of the image encoder of a multi-modal model."""
    if name.startswith("model.layers."):
        return False
    parts = name.split(".")
    inner = 1 if parts[0] in _WRAPPERS and len(parts) > 1 else 0
    return parts[inner] in _VISION


def is_unused(name: str) -> bool:
    """Return True for a stored tensor that the text model does not use."""
    return is_rotary_table(name) or is_vision(name)


def plain_name(name: str) -> str:
    """Return Hugging Face's name of a tensor whose prefix is missing or a wrapper's."""
    return name if name.startswith("model.layers.") else _without_wrappers(name)


def fp8_scale_name(name: str) -> str:
    """Return our name of block scales that compressed-tensors named; other names unchanged."""
    if name.endswith(_COMPRESSED_SCALE):
        return name.removesuffix(_COMPRESSED_SCALE) + _SCALE
    return name


def compressed_name(name: str) -> str:
    """Return compressed-tensors' name of our block scales; other names unchanged."""
    if is_fp8_scale(name):
        return name.removesuffix(_SCALE) + _COMPRESSED_SCALE
    return name


def _without_wrappers(name: str) -> str:
    parts = name.split(".")
    first = 0
    while parts[first] in _WRAPPERS and first + 1 < len(parts):
        first += 1
    if parts[first] not in _OF_THE_MODEL:
        return name
    top = [] if parts[first] == "lm_head" else ["model"]
    return ".".join(top + parts[first:])


def from_deepseek(name: str) -> str:
    """Return Hugging Face's name for DeepSeek's; for other names, some unknown name."""
    parts = name.split(".")
    inner = parts.index("indexer") if "indexer" in parts else len(parts)
    outside = [FROM_DEEPSEEK.get(part, part) for part in parts[:inner]]
    inside = ["weight_scale_inv" if part == "scale" else part for part in parts[inner:]]
    top = [] if outside[:1] == ["lm_head"] else ["model"]
    return ".".join(top + outside + inside)

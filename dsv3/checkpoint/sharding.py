"""The tensors of a model and each rank's slice of them; used by converter and loader.

Weights have Hugging Face's names. An FP8 weight comes with `weight_scale_inv`, one inverse scale
per 128x128 block; its slice covers the weight's slice. If a slice begins inside a block, the
offset in the block is `region.start % 128`, and both neighbouring ranks hold that block's scale.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from types import MappingProxyType

from dsv3.checkpoint.integers import integer_part_region
from dsv3.checkpoint.names import is_fp8_scale, weight_name
from dsv3.checkpoint.region import Region, whole
from dsv3.config import ModelConfig, ParallelConfig, split_range

FLOAT_DTYPES = ("F32", "BF16", "F16")
FP8_DTYPE = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
# Rows and columns that share a scale, as `dsv3_kernels.fp8_format` has it; the converter starts
# without torch.
BLOCK = 128


class Split(Enum):
    """Split of a tensor over ranks: rows or columns over tp, whole experts over ep, or none."""

    NONE = "none"
    ROWS = "rows"
    COLS = "cols"
    EXPERT = "expert"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A weight of the model.

    Attributes:
        expert: index of the routed expert (of `num_experts`) that it belongs to; None for others.
        quantizable: True if FP8 checkpoints store it in FP8 with block scales.
        mtp: True if it belongs to a multi-token-prediction layer.
        unit: slices begin at multiples of this number of rows or columns.
    """

    name: str
    shape: tuple[int, ...]
    split: Split = Split.NONE
    expert: int | None = None
    num_experts: int = 0
    quantizable: bool = False
    mtp: bool = False
    unit: int = 1


@cache
def tensor_specs(config: ModelConfig) -> Mapping[str, TensorSpec]:
    """Return all weights of the model in canonical order, with MTP and indexer, without scales."""
    hidden = config.hidden_size
    vocab = config.vocab_size
    specs = [TensorSpec("model.embed_tokens.weight", (vocab, hidden), Split.ROWS)]
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        mtp = layer >= config.num_hidden_layers
        specs += [replace(spec, mtp=mtp) for spec in _layer_specs(config, layer, mtp)]
    specs.append(TensorSpec("model.norm.weight", (hidden,)))
    specs.append(TensorSpec("lm_head.weight", (vocab, hidden), Split.ROWS))
    return MappingProxyType({spec.name: spec for spec in specs})


def _layer_specs(config: ModelConfig, layer: int, mtp: bool) -> Iterator[TensorSpec]:
    prefix = f"model.layers.{layer}."
    hidden = config.hidden_size
    vocab = config.vocab_size
    if mtp:
        yield TensorSpec(f"{prefix}embed_tokens.weight", (vocab, hidden), Split.ROWS)
        yield TensorSpec(f"{prefix}enorm.weight", (hidden,))
        yield TensorSpec(f"{prefix}hnorm.weight", (hidden,))
        yield TensorSpec(f"{prefix}eh_proj.weight", (hidden, 2 * hidden))
    yield TensorSpec(f"{prefix}input_layernorm.weight", (hidden,))
    yield from _attention_specs(config, layer, f"{prefix}self_attn.")
    yield TensorSpec(f"{prefix}post_attention_layernorm.weight", (hidden,))
    if config.is_moe_layer(layer):
        yield from _moe_specs(config, f"{prefix}mlp.")
    else:
        yield from _mlp_specs(config, f"{prefix}mlp.", config.intermediate_size)
    if mtp:
        yield TensorSpec(f"{prefix}shared_head.norm.weight", (hidden,))
        yield TensorSpec(f"{prefix}shared_head.head.weight", (vocab, hidden), Split.ROWS)


def _attention_specs(config: ModelConfig, layer: int, prefix: str) -> Iterator[TensorSpec]:
    hidden = config.hidden_size
    heads = config.num_attention_heads
    q_rank = config.q_lora_rank
    kv_rank = config.kv_lora_rank

    def linear(name: str, rows: int, cols: int, split: Split = Split.NONE) -> TensorSpec:
        return TensorSpec(f"{prefix}{name}.weight", (rows, cols), split, quantizable=True)

    if q_rank is None:
        yield linear("q_proj", heads * config.qk_head_dim, hidden, Split.ROWS)
    else:
        yield linear("q_a_proj", q_rank, hidden)
        yield TensorSpec(f"{prefix}q_a_layernorm.weight", (q_rank,))
        yield linear("q_b_proj", heads * config.qk_head_dim, q_rank, Split.ROWS)
    yield linear("kv_a_proj_with_mqa", kv_rank + config.qk_rope_head_dim, hidden)
    yield TensorSpec(f"{prefix}kv_a_layernorm.weight", (kv_rank,))
    kv_rows = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield linear("kv_b_proj", kv_rows, kv_rank, Split.ROWS)
    yield linear("o_proj", hidden, heads * config.v_head_dim, Split.COLS)
    if config.indexer_kind(layer) == "full":
        assert q_rank is not None and config.index_n_heads and config.index_head_dim
        index_heads = config.index_n_heads
        index_dim = config.index_head_dim
        yield linear("indexer.wq_b", index_heads * index_dim, q_rank)
        yield linear("indexer.wk", index_dim, hidden)
        yield TensorSpec(f"{prefix}indexer.k_norm.weight", (index_dim,))
        yield TensorSpec(f"{prefix}indexer.k_norm.bias", (index_dim,))
        yield TensorSpec(f"{prefix}indexer.weights_proj.weight", (index_heads, hidden))


def _moe_specs(config: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    hidden = config.hidden_size
    experts = config.n_routed_experts
    yield TensorSpec(f"{prefix}gate.weight", (experts, hidden))
    if config.topk_method == "noaux_tc":
        yield TensorSpec(f"{prefix}gate.e_score_correction_bias", (experts,))
    if config.n_shared_experts:
        width = config.shared_intermediate_size
        yield from _mlp_specs(config, f"{prefix}shared_experts.", width)
    for e in range(experts):
        for name, shape, _ in _mlp_shapes(hidden, config.moe_intermediate_size):
            full = f"{prefix}experts.{e}.{name}.weight"
            yield TensorSpec(full, shape, Split.EXPERT, e, experts, quantizable=True)


def _mlp_shapes(hidden: int, width: int) -> tuple[tuple[str, tuple[int, int], Split], ...]:
    return (
        ("gate_proj", (width, hidden), Split.ROWS),
        ("up_proj", (width, hidden), Split.ROWS),
        ("down_proj", (hidden, width), Split.COLS),
    )


def _mlp_specs(config: ModelConfig, prefix: str, width: int) -> Iterator[TensorSpec]:
    unit = config.mlp_unit
    for name, shape, split in _mlp_shapes(config.hidden_size, width):
        yield TensorSpec(f"{prefix}{name}.weight", shape, split, quantizable=True, unit=unit)


def shard_region(spec: TensorSpec, layout: ParallelConfig) -> Region | None:
    """Return a rank's slice of a weight, which may be empty; None for an expert of other ranks."""
    if spec.split is Split.EXPERT:
        assert spec.expert is not None
        start, stop = split_range(spec.num_experts, layout.ep, layout.ep_rank)
        return whole(spec.shape) if start <= spec.expert < stop else None
    region = whole(spec.shape)
    if spec.split is Split.NONE:
        return region
    dim = 0 if spec.split is Split.ROWS else 1
    part = split_range(spec.shape[dim], layout.tp, layout.tp_rank, spec.unit)
    return (*region[:dim], part, *region[dim + 1 :])


def scale_region(weight_region: Region) -> Region:
    """Return the region of the scales whose blocks cover a slice of a weight."""
    return tuple(
        (start // BLOCK, -(-stop // BLOCK) if stop > start else start // BLOCK)
        for start, stop in weight_region
    )


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a weight's scales."""
    return tuple(-(-size // BLOCK) for size in shape)


def tensor_region(
    specs: Mapping[str, TensorSpec], name: str, shape: tuple[int, ...], layout: ParallelConfig
) -> Region | None:
    """Return a rank's slice of a stored tensor of `shape`, by name; see `shard_region`.

    The tensor is a weight, its FP8 scales, or one of the tensors of an integer weight.
    """
    if name in specs:
        return shard_region(specs[name], layout)
    weight = weight_name(name)
    assert weight is not None, name
    region = shard_region(specs[weight], layout)
    if region is None:
        return None
    if is_fp8_scale(name):
        return scale_region(region)
    return integer_part_region(name, shape, specs[weight].shape, region)

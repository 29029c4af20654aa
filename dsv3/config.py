"""Configuration of a model and its parallel layout: frozen, validated once, without torch.

Field names are those of Hugging Face's `config.json`. Files are read by `dsv3.config_files`.
"""

import dataclasses
import math
from dataclasses import dataclass

from dsv3.config_fields import check_fields, check_token_ids, check_value, shown
from dsv3.config_indexer import FULL, check_indexer_types
from dsv3.config_integers import IntegerConfig
from dsv3.config_rope import RopeScaling, yarn_mscale
from dsv3.errors import ConfigError

MODEL_TYPES = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v32"),
    *("kimi_k2", "glm_moe_dsa", "glm4_moe_lite"),
)
TORCH_DTYPES = ("bfloat16", "float32", "float16")
ROUTING = {"greedy": "softmax", "group_limited_greedy": "softmax", "noaux_tc": "sigmoid"}
SPARSE_TYPES = ("deepseek_v32", "glm_moe_dsa")
_INDEX_FIELDS = ("index_n_heads", "index_head_dim", "index_topk")
# The epsilon of the norms of both latents. The code published with DeepSeek's and Moonshot's
# checkpoints builds these two norms with 1e-6 whatever rms_norm_eps says (modeling_deepseek.py;
# transformers does the same, vLLM does not). GLM was trained with Megatron-Core, whose latent
# attention passes its one epsilon, the rms_norm_eps of GLM's files, to them too
# (multi_latent_attention.py: eps=config.layernorm_epsilon).
_LATENT_NORM_EPS = 1e-6
_LATENT_NORM_BY_CONFIG = ("glm_moe_dsa", "glm4_moe_lite")
# Routed experts of all layers together, ten times Kimi-K2's; the limit bounds the time and memory
# to list a model's tensors.
_MAX_EXPERTS = 2**18


def check_family(model_type: object, prefix: str = "", hint: str = "") -> None:
    """Raise ConfigError for models of other families."""
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{prefix}model_type={shown(model_type)}{hint} is not supported; only models of "
            f"DeepSeek's V2/V3 architecture are ({', '.join(MODEL_TYPES)}), not distills"
        )


def divisors(number: int) -> list[int]:
    """Return all divisors of a positive number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def split_range(size: int, parts: int, index: int, unit: int = 1) -> tuple[int, int]:
    """Return (start, stop) of part `index`; all but the last parts have ceil(size / parts).

    Parts begin at multiples of `unit`, so the last ones may be empty.
    """
    chunk = -(-size // (parts * unit)) * unit
    return min(index * chunk, size), min((index + 1) * chunk, size)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """FP8 (e4m3) weights with one inverse scale per block, `weight_scale_inv`.

    Attributes:
        block: rows and columns that share a scale.
        scale_fmt: "ue8m0" if scales are declared powers of two (not every stored scale is one).
    """

    block: tuple[int, int] = (128, 128)
    scale_fmt: str | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for other block sizes and scale formats."""
        if self.block != (128, 128) or not all(type(size) is int for size in self.block):
            raise ConfigError(f"weight_block_size={shown(self.block)} must be [128, 128]")
        if self.scale_fmt not in (None, "ue8m0"):
            raise ConfigError(f"scale_fmt={shown(self.scale_fmt)} must be 'ue8m0' or absent")


_PARTS = {
    "rope_scaling": RopeScaling,
    "quantization": QuantizationConfig,
    "integers": IntegerConfig,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a model of DeepSeek's V2/V3 architecture, with Hugging Face's field names.

    Attributes:
        q_lora_rank: None if queries have no low-rank path (`q_proj`).
        rope_scaling: None for plain RoPE.
        rope_interleave: False if weights were permuted to half-split rotary order.
        bos_token_id, eos_token_ids: None and () leave them to the tokenizer.
        index_n_heads, index_head_dim, index_topk: sparse attention (V3.2, GLM-5); None for other
            models.
        indexer_rope_interleave: True if the indexer's rotary order is interleaved (GLM-5).
        index_share_for_mtp_iteration: further drafts attend to the keys that the first one selected
            (GLM-5.2).
        indexer_types: "full" or "shared" for each layer, without MTP layers (GLM-5.2); None if all
            are "full".
        quantization: None if weights are stored in `torch_dtype`.
        warning: a line for the user about the file, or empty; not a part of the model.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    moe_layer_freq: int = 1
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int = 1
    topk_group: int = 1
    scoring_func: str
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool = True
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    num_nextn_predict_layers: int = 0
    index_n_heads: int | None = None
    index_head_dim: int | None = None
    index_topk: int | None = None
    indexer_rope_interleave: bool = False
    index_share_for_mtp_iteration: bool = False
    indexer_types: tuple[str, ...] | None = None
    quantization: QuantizationConfig | None = None
    integers: IntegerConfig | None = None
    torch_dtype: str = "bfloat16"
    warning: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ConfigError for fields that are out of range or contradict each other."""
        self._check_values()
        self._check_tokens()
        self._check_routing()
        self._check_indexer()

    def _check_values(self) -> None:
        check_family(self.model_type)
        check_fields(self)
        for name, kind in _PARTS.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ConfigError(f"{name}={shown(value)} must be a {kind.__name__}")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"qk_rope_head_dim={self.qk_rope_head_dim} must be even")
        if self.torch_dtype not in TORCH_DTYPES:
            raise ConfigError(
                f"torch_dtype={shown(self.torch_dtype)} must be one of {TORCH_DTYPES}"
            )

    def _check_tokens(self) -> None:
        """Raise ConfigError for ids outside the vocabulary."""
        named = [("bos_token_id", self.bos_token_id)]
        named += [("eos_token_id", i) for i in check_token_ids(self.eos_token_ids, "eos_token_id")]
        for name, token_id in named:
            if token_id is not None and token_id >= self.vocab_size:
                raise ConfigError(f"{name}={token_id} is outside vocab_size={self.vocab_size}")

    def _check_routing(self) -> None:
        experts = self.n_routed_experts
        groups = self.n_group
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        if layers * experts > _MAX_EXPERTS:
            raise ConfigError(
                f"n_routed_experts={experts} in each of num_hidden_layers={self.num_hidden_layers} "
                f"+ num_nextn_predict_layers={self.num_nextn_predict_layers} layers is more than "
                f"{_MAX_EXPERTS} experts"
            )
        if (self.topk_method, self.scoring_func) not in tuple(ROUTING.items()):
            pairs = ", ".join(f"{method} with {score}" for method, score in ROUTING.items())
            pair = f"{shown(self.topk_method)} with scoring_func={shown(self.scoring_func)}"
            raise ConfigError(f"topk_method={pair} is not supported; use one of {pairs}")
        if experts % groups:
            raise ConfigError(f"n_group={groups} does not divide n_routed_experts={experts}")
        if self.topk_group > groups:
            raise ConfigError(f"topk_group={self.topk_group} is more than n_group={groups}")
        if self.topk_method == "noaux_tc" and groups > 1 and experts // groups < 2:
            raise ConfigError(
                f"n_group={groups} leaves fewer than two of n_routed_experts={experts} in a group"
            )
        num_reachable = experts
        if self.topk_method != "greedy":
            num_reachable = experts // groups * self.topk_group
        if self.num_experts_per_tok > num_reachable:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than the {num_reachable} "
                "experts that routing can reach"
            )

    def _check_indexer(self) -> None:
        switches = ("indexer_rope_interleave", "index_share_for_mtp_iteration")
        names = (*_INDEX_FIELDS, *switches, "indexer_types")
        given = [name for name in names if getattr(self, name)]
        if self.model_type not in SPARSE_TYPES:
            if given:
                raise ConfigError(
                    f"{given[0]} belongs to {' and '.join(SPARSE_TYPES)}, not to {self.model_type}"
                )
            return
        for name in _INDEX_FIELDS:
            check_value(name, getattr(self, name), name)
        if self.q_lora_rank is None:
            raise ConfigError(f"q_lora_rank is null, but {self.model_type}'s indexer needs it")
        assert self.index_head_dim is not None
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ConfigError(
                f"index_head_dim={self.index_head_dim} is less than "
                f"qk_rope_head_dim={self.qk_rope_head_dim}"
            )
        if self.indexer_types is not None:
            check_indexer_types(self.indexer_types, self.num_hidden_layers)
            if self.model_type != "glm_moe_dsa":
                raise ConfigError(
                    f"shared indexer_types belong to glm_moe_dsa, not {self.model_type}"
                )

    @property
    def qk_head_dim(self) -> int:
        """Length of one head's query."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def has_indexer(self) -> bool:
        """True if attention is sparse (V3.2, GLM-5)."""
        return self.index_topk is not None

    @property
    def latent_norm_eps(self) -> float:
        """Epsilon of the norms of both latents, `q_a_layernorm` and `kv_a_layernorm`."""
        by_config = self.model_type in _LATENT_NORM_BY_CONFIG
        return self.rms_norm_eps if by_config else _LATENT_NORM_EPS

    @property
    def active_params(self) -> int:
        """Number of weights that one token is multiplied with, without embedding and head."""
        hidden = self.hidden_size
        heads = self.num_attention_heads
        queries = heads * self.qk_head_dim
        if self.q_lora_rank is None:
            attention = hidden * queries
        else:
            attention = self.q_lora_rank * (hidden + queries)
        attention += hidden * (self.kv_lora_rank + self.qk_rope_head_dim)
        attention += heads * self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        attention += heads * self.v_head_dim * hidden
        inner = self.num_experts_per_tok * self.moe_intermediate_size
        moe = hidden * (3 * (inner + self.shared_intermediate_size) + self.n_routed_experts)
        sparse = sum(map(self.is_moe_layer, range(self.num_hidden_layers)))
        dense = self.num_hidden_layers - sparse
        feed_forward = sparse * moe + dense * 3 * hidden * self.intermediate_size
        return self.num_hidden_layers * attention + feed_forward

    @property
    def attention_share(self) -> float:
        """FLOPs of attention to one position, relative to the FLOPs of all weights."""
        pair = self.num_attention_heads * (self.qk_head_dim + self.v_head_dim)
        return self.num_hidden_layers * pair / self.active_params

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the one MLP that holds all shared experts."""
        return self.n_shared_experts * self.moe_intermediate_size

    @property
    def mlp_unit(self) -> int:
        """Unit in which the inner dims of dense MLPs and shared experts are split over tp.

        It is a whole FP8 block or group of integers in quantized models, since a cut one cannot be
        multiplied as it is stored. On 32 ranks, half of them hold a block of V3's shared expert,
        and the others nothing.
        """
        block = 1 if self.quantization is None else self.quantization.block[0]
        return block if self.integers is None else max(block, self.integers.unit)

    @property
    def softmax_scale(self) -> float:
        """Factor of attention scores, with YaRN's correction."""
        scale = 1.0 / math.sqrt(self.qk_head_dim)
        rope = self.rope_scaling
        if rope is not None and rope.mscale_all_dim:
            scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
        return scale

    @property
    def cos_sin_mscale(self) -> float:
        """Factor of rotary cosines and sines; 1 for all published models."""
        rope = self.rope_scaling
        if rope is None:
            return 1.0
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)

    def indexer_kind(self, layer: int) -> str | None:
        """Return how a layer selects keys; None if its attention is dense.

        "full" layers have an indexer. "shared" ones have none, and attend to the keys that the last
        full layer selected. MTP layers, which begin at num_hidden_layers, are full.
        """
        if not self.has_indexer:
            return None
        if self.indexer_types is None or layer >= self.num_hidden_layers:
            return FULL
        return self.indexer_types[layer]

    def first_layers(self, number: int) -> "ModelConfig":
        """Return the model cut to its first layers."""
        kinds = None if self.indexer_types is None else self.indexer_types[:number]
        return dataclasses.replace(self, num_hidden_layers=number, indexer_types=kinds)

    def is_moe_layer(self, layer: int) -> bool:
        """Return True if a layer has routed experts; MTP layers begin at num_hidden_layers."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """World = dp x tp, tp fastest; routed experts are split over the whole world.

    `tp` = 0 means world_size / dp.
    """

    world_size: int = 1
    rank: int = 0
    tp: int = 0
    dp: int = 1

    def __post_init__(self) -> None:
        """Fill in tp; raise ConfigError for an inconsistent layout."""
        least = {"dp": 1, "tp": 0, "world_size": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {value}")
        if not self.tp:
            object.__setattr__(self, "tp", max(self.world_size // self.dp, 1))
        if self.tp * self.dp != self.world_size:
            raise ConfigError(f"tp={self.tp} x dp={self.dp} is not world_size={self.world_size}")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank={self.rank} is not in 0..{self.world_size - 1}")

    def __str__(self) -> str:
        return f"{self.tp * self.dp} ranks" + (f" ({self.tp} x {self.dp})" if self.dp > 1 else "")

    @property
    def tp_rank(self) -> int:
        """This rank's index in its tensor-parallel group."""
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        """Index of this rank's tensor-parallel group."""
        return self.rank // self.tp

    @property
    def ep(self) -> int:
        """Number of ranks that share the routed experts."""
        return self.world_size

    @property
    def ep_rank(self) -> int:
        """This rank's index among the ranks that share the routed experts."""
        return self.rank

    def check(self, model: ModelConfig) -> None:
        """Raise ConfigError if tp does not divide the heads, or world_size the experts."""
        heads = model.num_attention_heads
        experts = model.n_routed_experts
        for name, ranks, field, count in (
            ("tp", self.tp, "num_attention_heads", heads),
            ("world_size", self.ep, "n_routed_experts", experts),
        ):
            if count % ranks:
                usable = count if self.dp > 1 else math.gcd(heads, experts)
                raise ConfigError(
                    f"{name}={ranks} does not divide {field}={count}; use one of {divisors(usable)}"
                )

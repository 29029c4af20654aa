"""Roofline floor of a step: FLOPs, bytes and exchanges of every operation.

The floor of an operation is max(bytes / read bandwidth, FLOPs / matrix peak); for an exchange, its
latency plus bytes / link bandwidth. Weights count in their stored format, each input and output
once, and the part of the cache that is read. Operations have the names of the model's modules
(`self_attn.o_proj`, `moe.router`), so that measured times can be matched to them.

Source: the roofline model (Williams, Waterman, Patterson 2009).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from benchlib.experts_hit import mean_hits
from benchlib.operation import Op
from benchlib.random_weights import INTEGERS
from benchlib.step_shape import StepShape
from dsv3.cache.layout import CacheLayout
from dsv3.config import ModelConfig, ParallelConfig, split_range
from dsv3.config_indexer import FULL
from dsv3.errors import ConfigError
from dsv3.settings import CacheDtype, CacheForm, KvShard
from dsv3_kernels.attention.parts import part_bytes
from dsv3_kernels.fp8_format import BLOCK

_ITEMSIZE = {"fp8": 1, "int8": 1, "int4": 0.5, "bf16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineSetup:
    """A model on its ranks.

    Attributes:
        config: the model.
        layout: this rank's place in tp and dp; it determines the exchanges.
        weights: "fp8", "int8", "int4", "bf16" or "fp32": format of the matrices that quantized
            checkpoints quantize. Integers are multiplied by bfloat16.
        cache: "bf16", "fp8" or "fp32": format of the cache.
        form: "latent" or "heads": contents of the cache.
        kv_shard: "tokens" splits a latent cache's positions over tp, "none" replicates it.
    """

    config: ModelConfig
    layout: ParallelConfig
    weights: str = "fp8"
    cache: CacheDtype = "bf16"
    form: CacheForm = "latent"
    kv_shard: KvShard = "tokens"

    def __post_init__(self) -> None:
        """Raise ConfigError for unknown formats."""
        for name, value in (("weights", self.weights), ("cache", self.cache)):
            if value not in _ITEMSIZE:
                raise ConfigError(f"{name}={value!r} must be one of {', '.join(_ITEMSIZE)}")
        self.layout.check(self.config)

    @property
    def plain(self) -> str:
        """Format of activations, and of weights that FP8 checkpoints do not quantize."""
        return "fp32" if self.weights == "fp32" else "bf16"

    @property
    def absorbed(self) -> str:
        """Format of `kv_b_proj`, which integer checkpoints do not quantize."""
        return self.plain if self.weights in INTEGERS else self.weights

    @property
    def shards(self) -> int:
        """Number of ranks that share the positions of a sequence."""
        return self._cached.paging.shards

    @property
    def heads(self) -> int:
        """Heads of this rank."""
        return self.config.num_attention_heads // self.layout.tp

    @property
    def entry_bytes(self) -> int:
        """Bytes of a cached position in one layer, on a rank that holds it."""
        return self._cached.main.entry_bytes

    @property
    def index_bytes(self) -> int:
        """Bytes of a cached index key, on a rank that holds it; 0 without an indexer."""
        return sum(plane.entry_bytes for plane in self._cached.planes[1:])

    @property
    def _cached(self) -> CacheLayout:
        place = self.layout
        return CacheLayout.make(
            self.config, self.form, self.kv_shard, self.cache, place.tp, place.tp_rank
        )


class _OpLister:
    """Lister of the operations of one step, with the sizes of this rank's shards."""

    def __init__(self, setup: RooflineSetup, load: StepShape) -> None:
        self.setup = setup
        self.load = load
        self.config = setup.config
        self.tokens = load.tokens
        self.tp = setup.layout.tp
        self.item = 4 if setup.plain == "fp32" else 2
        self.input_item = 1 if setup.weights == "fp8" else self.item

    def local(self, size: int, unit: int = 1) -> int:
        """Return this rank's share of a size that is split over tp, in whole units."""
        start, stop = split_range(size, self.tp, self.setup.layout.tp_rank, unit)
        return stop - start

    def linear(
        self, name: str, rows: int, cols: int, tokens: float | None = None, fmt: str = ""
    ) -> Op:
        """Return the product of tokens (default: all) with a [rows, cols] matrix."""
        fmt = fmt or self.setup.weights
        tokens = self.tokens if tokens is None else tokens
        moved = tokens * (
            cols * (_ITEMSIZE["fp8"] if fmt == "fp8" else self.item) + rows * self.item
        )
        return Op(name, 2 * tokens * rows * cols, _matrix_bytes(rows, cols, fmt) + moved, fmt)

    def exchange(self, name: str, num_bytes: float, span: int, sent: float) -> Op:
        """Return an exchange in which each rank sends `sent` * `num_bytes` bytes."""
        return Op(name, 0.0, 2 * num_bytes, wire=sent * num_bytes, span=span)

    def all_reduce(self, name: str) -> Iterator[Op]:
        """Yield the all-reduce of a hidden state over tp; nothing without tp."""
        if self.tp > 1:
            num_bytes = float(self.tokens * self.config.hidden_size * self.item)
            yield self.exchange(f"{name}.all_reduce", num_bytes, self.tp, 2 - 2 / self.tp)

    def all_ops(self) -> Iterator[tuple[int, Iterable[Op]]]:
        """Yield (number of layers, operations) of each part of a step, in order."""
        c = self.config
        rows = self.load.num_rows
        vocab = self.local(c.vocab_size)
        layers = c.num_hidden_layers
        moe = sum(c.is_moe_layer(i) for i in range(layers))
        width = float(self.tokens * c.hidden_size * self.item)
        yield 1, [Op("embed_tokens", 0.0, 2 * width), *self.all_reduce("embed_tokens")]
        yield 2 * layers, [Op("layers.sum_norm.norms", 0.0, 4 * width)]
        sums = 2 * layers - (moe if self.setup.layout.dp > 1 else 0)
        yield sums - 1, self.all_reduce("layers.sum_norm")  # the last one goes with the last norm
        yield layers, self.attention()
        if c.has_indexer:
            yield sum(c.indexer_kind(i) == FULL for i in range(layers)), self.indexer()
        if moe < layers:
            yield layers - moe, self.mlp("mlp", c.intermediate_size)
        if moe:
            yield moe, self.moe()
        head = self.linear("lm_head", vocab, c.hidden_size, rows, self.setup.plain)
        head = replace(head, bytes=head.bytes + rows * vocab * (4 - self.item))
        last = self.all_reduce("model.sum_norm")
        yield 1, [*last, Op("model.sum_norm.norm", 0.0, 2 * width), head]

    def attention(self) -> Iterator[Op]:
        """Yield the projections, and the operations between them."""
        c = self.config
        s = self.setup
        latent = c.kv_lora_rank + c.qk_rope_head_dim
        queries = s.heads * c.qk_head_dim
        yield self.linear("self_attn.in_proj", (c.q_lora_rank or queries) + latent, c.hidden_size)
        if c.q_lora_rank:
            yield self.linear("self_attn.q_b_proj", queries, c.q_lora_rank)
        width = (c.q_lora_rank or 0) + latent + s.heads * c.qk_rope_head_dim
        moved = self.tokens * width * self.item
        written = self.tokens / s.shards * s.entry_bytes
        yield Op("self_attn.norm_and_cache", 0.0, 2 * moved + written)
        if self.load.decode:
            yield from self.decode_heads() if s.form == "heads" else self.decode()
        if self.load.prefill:
            yield from self.sparse_prefill() if self.selects(self.prompt_len) else self.prefill()
        yield self.linear("self_attn.o_proj", c.hidden_size, s.heads * c.v_head_dim)

    @property
    def prompt_len(self) -> float:
        """Positions of a prompt after this step."""
        return self.load.cached + self.load.prefill / self.load.prompts

    def selects(self, longest: float) -> bool:
        """Return True if queries of a sequence of this length attend to a selection."""
        topk = self.config.index_topk
        return topk is not None and longest > topk

    def indexer(self) -> Iterator[Op]:
        """Yield an indexer: the keys of all tokens, and the selection of long sequences."""
        c = self.config
        s = self.setup
        load = self.load
        assert c.index_n_heads and c.index_head_dim and c.index_topk and c.q_lora_rank
        width = c.index_n_heads * c.index_head_dim
        yield self.linear("self_attn.indexer.wk", c.index_head_dim, c.hidden_size)
        moved = self.tokens * (c.index_head_dim * self.item + s.index_bytes / s.shards)
        yield Op("self_attn.indexer.write", 0.0, moved)
        queries = keys = pairs = 0.0
        if self.selects(longest := load.context + load.queries):
            queries += load.decode * load.queries
            keys += load.decode * longest
            pairs += load.decode * load.queries * longest
        if self.selects(self.prompt_len):
            queries += load.prefill
            keys += load.prompts * self.prompt_len
            pairs += load.prefill * (load.cached + (load.prefill / load.prompts + 1) / 2)
        if not queries:
            return
        yield self.linear("self_attn.indexer.wq_b", width, c.q_lora_rank, queries)
        yield self.linear(
            "self_attn.indexer.weights_proj", c.index_n_heads, c.hidden_size, queries, s.plain
        )
        scores = 4 * pairs / s.shards
        read = keys / s.shards * s.index_bytes
        flops = 2.0 * pairs / s.shards * width
        yield Op("self_attn.indexer.scores", flops, read + scores, s.plain)
        yield Op("self_attn.indexer.top_k", 0.0, scores)
        if s.shards > 1:  # a score and a position per candidate
            best = 8.0 * queries * c.index_topk
            yield self.exchange("self_attn.indexer.all_gather", best, self.tp, self.tp - 1)

    def seen(self) -> float:
        """Return the number of this rank's positions that a sequence's queries attend to."""
        longest = self.load.context + self.load.queries
        return min(longest, self.config.index_topk or longest) / self.setup.shards

    def decode_heads(self) -> Iterator[Op]:
        """Yield decode attention over cached keys and values of heads."""
        s = self.setup
        load = self.load
        dims = self.config.qk_head_dim + self.config.v_head_dim
        queries = load.decode * load.queries
        moved = queries * s.heads * dims * self.item + load.decode * self.seen() * s.entry_bytes
        flops = 2.0 * queries * self.seen() * s.heads * dims
        yield Op("self_attn.mha_decode", flops, moved, s.plain)

    def decode(self) -> Iterator[Op]:
        """Yield decode attention over cached latents."""
        c = self.config
        s = self.setup
        load = self.load
        tp = self.tp
        queries = load.decode * load.queries
        heads = s.heads * s.shards
        key = c.kv_lora_rank + c.qk_rope_head_dim
        value = c.kv_lora_rank
        sent = float(queries * s.heads * key * self.item)
        out_bytes = value * 4 if s.shards == 1 else part_bytes(value, self.item)
        out = float(queries * heads * out_bytes)
        query_bytes = queries * s.heads * c.qk_head_dim * self.item
        value_bytes = queries * s.heads * c.v_head_dim * self.item
        for name, dim, moved in (
            ("absorb_query", c.qk_nope_head_dim, sent + query_bytes),
            ("expand_values", c.v_head_dim, out + value_bytes),
        ):
            op = self.linear(f"self_attn.{name}", s.heads * dim, value, queries)
            read = _matrix_bytes(s.heads * dim, value, s.absorbed)
            yield replace(op, bytes=read + moved, dtype=s.plain)
        cached = load.decode * self.seen() * s.entry_bytes
        moved = sent * s.shards + out + cached
        flops = 2.0 * queries * heads * self.seen() * (key + value)
        yield Op("self_attn.mla_decode", flops, moved, s.plain)
        if s.shards > 1:
            yield self.exchange("self_attn.all_gather", sent, tp, tp - 1)
            yield self.exchange("self_attn.all_to_all", out, tp, 1 - 1 / tp)

    def sparse_prefill(self) -> Iterator[Op]:
        """Yield prefill attention to selections: each token is a query of its own, as in decode."""
        rows = StepShape(decode=self.load.prefill, context=int(self.prompt_len))
        lister = _OpLister(self.setup, rows)
        yield from lister.decode_heads() if self.setup.form == "heads" else lister.decode()

    def prefill(self) -> Iterator[Op]:
        """Yield prefill attention in expanded form: each head has its own keys and values."""
        c = self.config
        s = self.setup
        load = self.load
        tp = self.tp
        cached = load.prompts * load.cached
        dims = c.qk_head_dim + c.v_head_dim
        if s.shards > 1 and cached:
            share = cached / tp * s.entry_bytes
            yield self.exchange("self_attn.all_gather", share, tp, tp - 1)
        if s.form == "latent":
            rows = s.heads * (c.qk_nope_head_dim + c.v_head_dim)
            yield self.linear("self_attn.kv_b_proj", rows, c.kv_lora_rank, cached + load.prefill)
        pairs = load.prefill * (load.cached + (load.prefill / load.prompts + 1) / 2)
        moved = s.heads * dims * (cached + 2 * load.prefill) * self.item + cached * s.entry_bytes
        yield Op("self_attn.mla_prefill", 2.0 * s.heads * dims * pairs, moved, s.plain)

    def mlp(self, name: str, inner: int) -> Iterator[Op]:
        """Yield a gated MLP that is split over tp."""
        hidden = self.config.hidden_size
        width = self.local(inner, self.config.mlp_unit)
        yield self.linear(f"{name}.gate_up_proj", 2 * width, hidden)
        yield Op(f"{name}.silu_mul", 0.0, self.tokens * width * 3 * self.item)
        yield self.linear(f"{name}.down_proj", hidden, width)

    def moe(self) -> Iterator[Op]:
        """Yield router, routed and shared experts, and their exchanges."""
        c = self.config
        load = self.load
        s = self.setup
        D = c.hidden_size
        F = c.moe_intermediate_size
        item = self.input_item
        yield self.linear("moe.router", c.n_routed_experts, D, fmt=s.plain)
        if s.layout.dp > 1:
            yield from self.dispatch()
        hits = load.hits or mean_hits(c, s.layout.ep, self.tokens * s.layout.dp)
        rows = hits.rows
        for name, parts, out in (("gate_up", 2, F * item), ("down", 1, D * self.item)):
            moved = rows * ((D if parts == 2 else F) * item + out)
            read = hits.experts * parts * _matrix_bytes(F, D, s.weights)
            yield Op(f"moe.experts.{name}", 2.0 * parts * rows * D * F, read + moved, s.weights)
        if c.n_shared_experts:
            yield from self.mlp("moe.shared_experts", c.shared_intermediate_size)
        if s.layout.dp > 1 and self.tp > 1:
            sent = float(self.tokens / self.tp * D * self.item)
            yield self.exchange("layers.all_gather", sent, self.tp, self.tp - 1)

    def dispatch(self) -> Iterator[Op]:
        """Yield dispatch and combine; a token is sent at most once to each rank."""
        c = self.config
        ranks = self.setup.layout.ep
        reached = ranks * (1 - (1 - 1 / ranks) ** c.num_experts_per_tok)
        if c.topk_method != "greedy" and c.n_group > 1:
            reached = min(reached, c.topk_group * max(1.0, ranks / c.n_group))
        rows = self.tokens / self.tp * reached * (ranks - 1) / ranks
        scales = 4 * -(-c.hidden_size // BLOCK) if self.setup.weights == "fp8" else 0
        row_bytes = c.hidden_size * self.input_item + scales
        yield self.exchange("moe.dispatch", rows * row_bytes, ranks, 1.0)
        yield self.exchange("moe.combine", rows * c.hidden_size * self.item, ranks, 1.0)


def _matrix_bytes(rows: float, cols: float, fmt: str) -> float:
    """Return the bytes of a matrix with its scales."""
    scales = 4 * (rows / BLOCK) * (cols / BLOCK) if fmt == "fp8" else 0.0
    if fmt in INTEGERS:
        scales = 2 * rows * (cols / INTEGERS[fmt].kind.group if INTEGERS[fmt].kind.group else 1)
    return rows * cols * _ITEMSIZE[fmt] + scales


def step_ops(setup: RooflineSetup, load: StepShape) -> list[Op]:
    """Return the operations of a step on one rank; an operation of several layers is one entry."""
    ops_by_part = _OpLister(setup, load).all_ops()
    return [replace(op, count=count) for count, ops in ops_by_part for op in ops]

"""What a step must cost at least: FLOPs, bytes and exchanges of every operation, on paper.

The floor of an operation is max(bytes / read bandwidth, FLOPs / matrix peak), and for an exchange
its latency and bytes over the link. Weights count as the checkpoint stores them, every input and
output once, the cache as far as it is read. Operations are named as the model names its modules
(`self_attn.o_proj`, `moe.router`), so that measured times can be laid beside them.

Source: the roofline model (Williams, Waterman, Patterson 2009).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from benchlib.step_shape import StepShape
from dsv3.config import ModelConfig, ParallelConfig, split_range
from dsv3.errors import ConfigError
from dsv3.settings import CacheDtype, CacheForm, KvShard

_ITEMSIZE = {"fp8": 1, "bf16": 2, "fp32": 4}
_BLOCK = 128
_PART_TAIL = 16  # bytes of a log-sum-exp behind the values that travel with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What one rank's device and its links can do; bytes, FLOPs and seconds.

    Attributes:
        read: bytes a second from device memory.
        fp8, bf16, fp32: matrix FLOPs a second.
        link, link_latency: bytes a second one way to the ranks of the same host, and seconds of
            an exchange of next to nothing.
        net, net_latency: the same to other hosts.
        launch: seconds from one kernel to the next inside a CUDA graph.
        memory: bytes of a device.
        ranks_per_host: devices of a host.
    """

    name: str
    read: float
    fp8: float
    bf16: float
    fp32: float
    link: float = 450e9
    link_latency: float = 5e-6
    net: float = 50e9
    net_latency: float = 20e-6
    launch: float = 1e-6
    memory: float = 80e9
    ranks_per_host: int = 8


# H100 80GB HBM3: read and matrix ceilings measured (torch 2.11, CUDA 13.0), of datasheet 3.35 TB/s,
# 1979 and 989 TFLOP/s; fp32 is the datasheet's. NVLink 4 carries 450 GB/s each way, a one-shot
# all-reduce of a few KiB over it takes about 5 us. Between hosts: one 400 Gbit/s port a device.
_H100 = Hardware(name="h100", read=3.211e12, fp8=1473e12, bf16=785e12, fp32=67e12)
HARDWARE = {
    "h100": _H100,
    # The datasheet's 4.8 TB/s at the H100's measured share of its own (95.8 %): not measured.
    "h200": replace(_H100, name="h200", read=4.60e12, memory=141e9),
    # As H100 but for its links: DeepSeek-V3 report, section 3.2.2 (160 GB/s NVLink, 50 GB/s IB).
    "h800": replace(_H100, name="h800", link=160e9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A model on its ranks.

    Attributes:
        config: the model.
        layout: this rank's place; tp of several and dp of several ask for different exchanges.
        weights: "fp8", "bf16" or "fp32": the matrices that FP8 checkpoints quantize.
        cache: "bf16", "fp8" or "fp32".
        form: "latent" or "heads", what the cache holds.
        kv_shard: "tokens" deals a latent cache's positions to the tp ranks, "none" repeats it.
    """

    config: ModelConfig
    layout: ParallelConfig
    weights: str = "fp8"
    cache: CacheDtype = "bf16"
    form: CacheForm = "latent"
    kv_shard: KvShard = "tokens"

    def __post_init__(self) -> None:
        """Refuse formats that nobody knows."""
        for name, value in (("weights", self.weights), ("cache", self.cache)):
            if value not in _ITEMSIZE:
                raise ConfigError(f"{name}={value!r} must be one of {', '.join(_ITEMSIZE)}")
        self.layout.check(self.config)

    @property
    def plain(self) -> str:
        """Format of activations, and of what FP8 checkpoints leave unquantized."""
        return "fp32" if self.weights == "fp32" else "bf16"

    @property
    def shards(self) -> int:
        """Ranks that the positions of a sequence are dealt to."""
        return self.layout.tp if self.form == "latent" and self.kv_shard == "tokens" else 1

    @property
    def heads(self) -> int:
        """Heads of this rank."""
        return self.config.num_attention_heads // self.layout.tp

    @property
    def entry_bytes(self) -> int:
        """Bytes of a cached position in one layer, where it is held."""
        c = self.config
        if self.form == "heads":
            return self.heads * (c.qk_head_dim + c.v_head_dim) * _ITEMSIZE[self.cache]
        if self.cache == "fp8":
            scales = 4 * -(-c.kv_lora_rank // _BLOCK)
            return c.kv_lora_rank + scales + 2 * c.qk_rope_head_dim
        return (c.kv_lora_rank + c.qk_rope_head_dim) * _ITEMSIZE[self.cache]


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of a step on one rank, `count` times.

    Attributes:
        name: dotted, the module it belongs to first.
        flops, bytes: of one time; bytes of device memory.
        dtype: what the FLOPs are computed in.
        count: how often, in all layers together.
        wire: bytes this rank sends each time.
        span: neighbouring ranks that an exchange covers; 0 for none.
    """

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    dtype: str = "bf16"
    count: int = 1
    wire: float = 0.0
    span: int = 0

    def _parts(self, hw: Hardware) -> dict[str, float]:
        peak = {"fp8": hw.fp8, "bf16": hw.bf16, "fp32": hw.fp32}[self.dtype]
        parts = {"bytes": self.bytes / hw.read, "flops": self.flops / peak}
        if self.span > 1:
            is_near = self.span <= hw.ranks_per_host
            speed, delay = (hw.link, hw.link_latency) if is_near else (hw.net, hw.net_latency)
            parts["link"] = delay + self.wire / speed
        return parts

    def bound(self, hw: Hardware) -> str:
        """Return what it waits for: "bytes", "flops" or "link"."""
        parts = self._parts(hw)
        return max(parts, key=lambda name: parts[name])

    def seconds(self, hw: Hardware) -> float:
        """Return its floor, all times together."""
        return self.count * max(self._parts(hw).values())


def floor_seconds(ops: Iterable[Op], hw: Hardware) -> float:
    """Return the sum of the floors: nothing overlaps, nothing is launched."""
    return sum(op.seconds(hw) for op in ops)


def experts_hit(config: ModelConfig, ranks: int, tokens: int) -> tuple[float, float]:
    """Return how many of a rank's experts the tokens of all ranks reach, and the rows they make.

    The mean where experts are chosen independently and equally often.
    """
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    missed = (1 - chosen / experts) ** tokens
    return experts / ranks * (1 - missed), tokens * chosen / ranks


class _Writer:
    """Makes the operations of one setup, each once; sizes are this rank's."""

    def __init__(self, setup: Setup, load: StepShape) -> None:
        self.setup, self.load, self.config = setup, load, setup.config
        self.item, self.weight_item = _ITEMSIZE[setup.plain], _ITEMSIZE[setup.weights]
        self.tp, self.tokens = setup.layout.tp, load.tokens

    def local(self, size: int, unit: int = 1) -> int:
        """Return this rank's part of a size that is split over tp, in whole units."""
        start, stop = split_range(size, self.tp, self.setup.layout.tp_rank, unit)
        return stop - start

    def linear(
        self, name: str, rows: int, cols: int, tokens: float | None = None, fmt: str = ""
    ) -> Op:
        """Return a product of tokens (all, if not told) with a [rows, cols] matrix."""
        fmt, tokens = fmt or self.setup.weights, self.tokens if tokens is None else tokens
        moved = tokens * (cols * _ITEMSIZE[fmt] + rows * self.item)
        return Op(name, 2 * tokens * rows * cols, _matrix_bytes(rows, cols, fmt) + moved, fmt)

    def exchange(self, name: str, num_bytes: float, span: int, sent: float) -> Op:
        """Return an exchange in which each rank sends `sent` times its `num_bytes`."""
        return Op(name, 0.0, 2 * num_bytes, wire=sent * num_bytes, span=span)

    def all_reduce(self, name: str) -> Iterator[Op]:
        """Yield the sum of a hidden state over tp."""
        if self.tp > 1:
            num_bytes = float(self.tokens * self.config.hidden_size * self.item)
            yield self.exchange(f"{name}.all_reduce", num_bytes, self.tp, 2 - 2 / self.tp)

    def every(self) -> Iterator[tuple[int, Iterable[Op]]]:
        """Yield all of a step in its order, with how many layers have it."""
        c, rows, vocab = self.config, self.load.num_rows, self.local(self.config.vocab_size)
        layers = c.num_hidden_layers
        moe = sum(c.is_moe_layer(i) for i in range(layers))
        width = float(self.tokens * c.hidden_size * self.item)
        yield 1, [Op("embed_tokens", 0.0, 2 * width), *self.all_reduce("embed_tokens")]
        yield 2 * layers, [Op("layers.sum_norm.norms", 0.0, 4 * width)]
        sums = 2 * layers - (moe if self.setup.layout.dp > 1 else 0)
        yield sums - 1, self.all_reduce("layers.sum_norm")  # the last one goes with the last norm
        yield layers, self.attention()
        if moe < layers:
            yield layers - moe, self.mlp("mlp", c.intermediate_size)
        if moe:
            yield moe, self.moe()
        head = self.linear("lm_head", vocab, c.hidden_size, rows, self.setup.plain)
        head = replace(head, bytes=head.bytes + rows * vocab * (4 - self.item))
        last = self.all_reduce("model.sum_norm")
        yield 1, [*last, Op("model.sum_norm.norm", 0.0, 2 * width), head]

    def attention(self) -> Iterator[Op]:
        """Yield the projections, and what lies between them."""
        c, s, tokens = self.config, self.setup, self.tokens
        latent, queries = c.kv_lora_rank + c.qk_rope_head_dim, s.heads * c.qk_head_dim
        yield self.linear("self_attn.in_proj", (c.q_lora_rank or queries) + latent, c.hidden_size)
        if c.q_lora_rank:
            yield self.linear("self_attn.q_b_proj", queries, c.q_lora_rank)
        moved = tokens * ((c.q_lora_rank or 0) + latent + s.heads * c.qk_rope_head_dim) * self.item
        held = tokens / s.shards * s.entry_bytes
        yield Op("self_attn.norm_and_cache", 0.0, 2 * moved + held)
        if c.index_topk is not None and self.load.context > c.index_topk:
            yield from self.indexer()
        if self.load.decode:
            yield from self.decode_heads() if s.form == "heads" else self.decode()
        if self.load.prefill:
            yield from self.prefill()
        yield self.linear("self_attn.o_proj", c.hidden_size, s.heads * c.v_head_dim)

    def indexer(self) -> Iterator[Op]:
        """Yield V3.2's choice of positions: its keys are e4m3 with a scale."""
        c, load = self.config, self.load
        assert c.index_n_heads and c.index_head_dim and c.q_lora_rank
        width = c.index_n_heads * c.index_head_dim
        yield self.linear("self_attn.indexer.wq_b", width, c.q_lora_rank)
        yield self.linear("self_attn.indexer.wk", c.index_head_dim, c.hidden_size)
        seen = load.decode * load.context / self.setup.shards
        flops = 2.0 * load.queries * seen * width
        yield Op("self_attn.indexer.scores", flops, seen * (c.index_head_dim + 4), "fp8")

    def seen(self) -> float:
        """Return the positions of this rank that a sequence's queries attend to."""
        longest = self.load.context + self.load.queries
        return min(longest, self.config.index_topk or longest) / self.setup.shards

    def decode_heads(self) -> Iterator[Op]:
        """Yield attention straight to cached keys and values."""
        s, load = self.setup, self.load
        dims, queries = self.config.qk_head_dim + self.config.v_head_dim, load.decode * load.queries
        moved = queries * s.heads * dims * self.item + load.decode * self.seen() * s.entry_bytes
        flops = 2.0 * queries * self.seen() * s.heads * dims
        yield Op("self_attn.mha_decode", flops, moved, s.plain)

    def decode(self) -> Iterator[Op]:
        """Yield attention straight to cached latents."""
        c, s, load, tp = self.config, self.setup, self.load, self.tp
        queries, heads = load.decode * load.queries, s.heads * s.shards
        key, value = c.kv_lora_rank + c.qk_rope_head_dim, c.kv_lora_rank
        sent = float(queries * s.heads * key * self.item)
        out = float(
            queries * heads * (value * 4 if s.shards == 1 else value * self.item + _PART_TAIL)
        )
        for name, dim, moved in (
            (
                "absorb_query",
                c.qk_nope_head_dim,
                sent + queries * s.heads * c.qk_head_dim * self.item,
            ),
            ("expand_values", c.v_head_dim, out + queries * s.heads * c.v_head_dim * self.item),
        ):
            op = self.linear(f"self_attn.{name}", s.heads * dim, value, queries)
            read = _matrix_bytes(s.heads * dim, value, s.weights)
            yield replace(op, bytes=read + moved, dtype=s.plain)
        cached = load.decode * self.seen() * s.entry_bytes
        moved = sent * s.shards + out + cached
        flops = 2.0 * queries * heads * self.seen() * (key + value)
        yield Op("self_attn.mla_decode", flops, moved, s.plain)
        if s.shards > 1:
            yield self.exchange("self_attn.all_gather", sent, tp, tp - 1)
            yield self.exchange("self_attn.all_to_all", out, tp, 1 - 1 / tp)

    def prefill(self) -> Iterator[Op]:
        """Yield attention in expanded form: every head with its own keys and values."""
        c, s, load, tp = self.config, self.setup, self.load, self.tp
        cached, dims = load.prompts * load.cached, c.qk_head_dim + c.v_head_dim
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
        """Yield a gated MLP split over tp."""
        hidden, width = self.config.hidden_size, self.local(inner, self.config.mlp_unit)
        yield self.linear(f"{name}.gate_up_proj", 2 * width, hidden)
        yield Op(f"{name}.silu_mul", 0.0, self.tokens * width * 3 * self.item)
        yield self.linear(f"{name}.down_proj", hidden, width)

    def moe(self) -> Iterator[Op]:
        """Yield router, routed and shared experts, and the exchange that they need."""
        c, load, s = self.config, self.load, self.setup
        D, F, item = c.hidden_size, c.moe_intermediate_size, self.weight_item
        yield self.linear("moe.router", c.n_routed_experts, D, fmt=s.plain)
        if s.layout.dp > 1:
            yield from self.dispatch()
        hit, rows = load.hit or experts_hit(c, s.layout.ep, self.tokens * s.layout.dp)
        for name, parts, out in (("gate_up", 2, F * item), ("down", 1, D * self.item)):
            moved = rows * ((D if parts == 2 else F) * item + out)
            read = hit * parts * _matrix_bytes(F, D, s.weights)
            yield Op(f"moe.experts.{name}", 2.0 * parts * rows * D * F, read + moved, s.weights)
        if c.n_shared_experts:
            yield from self.mlp("moe.shared_experts", c.shared_intermediate_size)
        if s.layout.dp > 1 and self.tp > 1:
            sent = float(self.tokens / self.tp * D * self.item)
            yield self.exchange("layers.all_gather", sent, self.tp, self.tp - 1)

    def dispatch(self) -> Iterator[Op]:
        """Yield the way of tokens to their experts' ranks and back: once to every rank."""
        c, ranks = self.config, self.setup.layout.ep
        reached = ranks * (1 - (1 - 1 / ranks) ** c.num_experts_per_tok)
        if c.topk_method != "greedy" and c.n_group > 1:
            reached = min(reached, c.topk_group * max(1.0, ranks / c.n_group))
        away = self.tokens / self.tp * reached * (ranks - 1) / ranks
        scales = 4 * -(-c.hidden_size // _BLOCK) if self.setup.weights == "fp8" else 0
        there = away * (c.hidden_size * self.weight_item + scales)
        yield self.exchange("moe.dispatch", there, ranks, 1.0)
        yield self.exchange("moe.combine", away * c.hidden_size * self.item, ranks, 1.0)


def _matrix_bytes(rows: float, cols: float, fmt: str) -> float:
    """Return the bytes of a matrix, with its scales."""
    scales = 4 * (rows / _BLOCK) * (cols / _BLOCK) if fmt == "fp8" else 0.0
    return rows * cols * _ITEMSIZE[fmt] + scales


def step_ops(setup: Setup, load: StepShape) -> list[Op]:
    """Return the operations of a step on one rank; equal ones of all layers are one entry."""
    every = _Writer(setup, load).every()
    return [replace(op, count=count) for count, ops in every for op in ops]

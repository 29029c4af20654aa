"""How to run a model: everything a user may choose that is neither the model nor the layout."""

import re
from dataclasses import dataclass
from pathlib import Path

from dsv3.errors import ConfigError

# By arithmetic, not measured: for V3 on 8 ranks at 450 GB/s, fewer bytes of float32 sums and fewer
# rows to normalize save two more launches' 20 us a layer from about 600 tokens on. Gloo saves none.
_SPLIT_TOKENS = 1024
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class CacheSize:
    """`auto`, bytes on every rank, or tokens of each tp group."""

    num_bytes: int | None = None
    num_tokens: int | None = None

    @classmethod
    def parse(cls, text: str) -> "CacheSize":
        """Read `auto`, `N`, `NKiB`, `NMiB`, `NGiB` or `Ntok`."""
        if text == "auto":
            return cls()
        match = re.fullmatch(r"(\d+)(tok|[KMG]iB|)", text, re.IGNORECASE)
        if match is None or int(match[1]) == 0:
            raise ConfigError(
                f"--kv-cache-size={text} is not a size; use auto, bytes (4GiB) or tokens (65536tok)"
            )
        if match[2].lower() == "tok":
            return cls(num_tokens=int(match[1]))
        return cls(num_bytes=int(match[1]) * _UNITS[match[2].upper()])


def parse_bytes(flag: str, text: str) -> int:
    """Read `off`, `N`, `NKiB`, `NMiB` or `NGiB`."""
    match = re.fullmatch(r"(\d+)([KMG]iB|)", "0" if text == "off" else text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--{flag}={text} is not a size; use bytes (4GiB), or off")
    return int(match[1]) * _UNITS[match[2].upper()]


def _one_of(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"--{flag}={value} is unknown; use one of {', '.join(choices)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of an engine; the names are those of the flags (DeepSeek's and ours).

    Attributes:
        attn_impl: "naive" caches expanded heads; "absorb" caches latents and always attends to
            them directly; "auto" caches latents and expands them where queries are many.
        kv_shard: a latent cache's positions are dealt to the tp ranks ("tokens") or replicated.
        kv_dtype: storage of the cache: "auto" (as the activations), "fp32", "bf16" or "fp8"
            (latents in e4m3 with a scale per 128, rotated keys in bf16).
        kv_cache_size: see `CacheSize.parse`.
        kv_host_cache: bytes of host memory on every rank for pages evicted from the device.
        kv_disk_cache: DIR:BYTES, a directory for pages evicted from there and what it may take.
            Without a host cache, room for one longest sequence is made in host memory.
        moe_dispatch: how tokens of several dp groups come to their experts: every rank sees all of
            them ("allreduce"), they are sent where they are needed ("alltoall"), or "auto".
        dispatch_dtype: of hidden states on that way: "auto" (FP8 in fp8 numerics, else as they
            are), "bf16" or "fp8".
        max_seq_len: longest context, prompt and answer; 0 takes the model's own.
        max_batch_tokens: new tokens of one step, in each data-parallel group.
        max_running: sequences in progress at a time, in each data-parallel group.
        dtype: numerics: "auto" (float32 on CPU, as the checkpoint on CUDA), "float32", "bfloat16"
            or "fp8": bfloat16 with FP8 weights multiplied by activations quantized per 128.
        weights: "auto" holds weights in the activations' dtype; "fp8" keeps FP8 tensors as they
            are stored and dequantizes them at every use (fp8 numerics keep them anyway).
        sequence_parallel: steps of so many tokens split the residual stream over tp; 0 never
            does, -1 leaves it to the device.
        prefix_reuse: keep computed prefixes and reuse them.
        eviction: which idle cached page goes first: "cost" or "lru".
        expert_placement: file that says which rank holds which experts; empty for equal ranges.
        redundant_experts: copies of experts beyond the first in a layer, where no file says.
        rebalance_every: steps between two looks at the experts' loads, after which experts may
            move to other ranks; 0 leaves them where they are.
        record_expert_load: file for the tokens that every expert got; empty does not count.
        pipeline_depth: steps launched before the results of the last one are looked at: 0 or 1;
            -1 is 1 on CUDA, where steps run asynchronously, and 0 on a CPU.
        enforce_eager: launch every kernel of a decode step, also where a CUDA graph could hold it.
        check_every: steps between comparisons of what the ranks have computed; 0 compares nothing.
    """

    attn_impl: str = "auto"
    kv_shard: str = "tokens"
    kv_dtype: str = "auto"
    kv_cache_size: str = "auto"
    kv_host_cache: str = "off"
    kv_disk_cache: str = "off"
    moe_dispatch: str = "auto"
    dispatch_dtype: str = "auto"
    max_seq_len: int = 0
    max_batch_tokens: int = 2048
    max_running: int = 64
    dtype: str = "auto"
    weights: str = "auto"
    sequence_parallel: int = -1
    prefix_reuse: bool = True
    eviction: str = "cost"
    expert_placement: str = ""
    redundant_experts: int = 0
    rebalance_every: int = 0
    record_expert_load: str = ""
    pipeline_depth: int = -1
    enforce_eager: bool = False
    check_every: int = 64

    def __post_init__(self) -> None:
        """Refuse unknown words and impossible numbers."""
        _one_of("attn-impl", self.attn_impl, ("naive", "absorb", "auto"))
        _one_of("kv-shard", self.kv_shard, ("tokens", "none"))
        _one_of("kv-dtype", self.kv_dtype, ("auto", "fp32", "bf16", "fp8"))
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "fp8"))
        _one_of("weights", self.weights, ("auto", "fp8"))
        _one_of("moe-dispatch", self.moe_dispatch, ("auto", "allreduce", "alltoall"))
        _one_of("dispatch-dtype", self.dispatch_dtype, ("auto", "bf16", "fp8"))
        _one_of("eviction", self.eviction, ("cost", "lru"))
        if self.attn_impl == "naive" and self.kv_dtype == "fp8":
            raise ConfigError(
                "--kv-dtype=fp8 packs latents, --attn-impl=naive caches expanded heads; "
                "use --attn-impl auto"
            )
        CacheSize.parse(self.kv_cache_size)
        self._check_tiers()
        if self.pipeline_depth not in (-1, 0, 1):
            raise ConfigError(f"--pipeline-depth={self.pipeline_depth} must be -1, 0 or 1")
        for flag, value, least in (
            ("max-seq-len", self.max_seq_len, 0),
            ("sequence-parallel", self.sequence_parallel, -1),
            ("max-batch-tokens", self.max_batch_tokens, 1),
            ("max-running", self.max_running, 1),
            ("check-every", self.check_every, 0),
            ("redundant-experts", self.redundant_experts, 0),
            ("rebalance-every", self.rebalance_every, 0),
        ):
            if value < least:
                raise ConfigError(f"--{flag}={value} must be at least {least}")
        if self.max_running > self.max_batch_tokens:
            raise ConfigError(
                f"--max-running={self.max_running} needs as many --max-batch-tokens "
                f"(now {self.max_batch_tokens}): every running sequence adds a token each step"
            )

        if self.expert_placement and self.redundant_experts:
            raise ConfigError(
                f"--redundant-experts={self.redundant_experts}: --expert-placement="
                f"{self.expert_placement} has its own copies; leave one of them out"
            )

    def _check_tiers(self) -> None:
        has_tiers = parse_bytes("kv-host-cache", self.kv_host_cache) or self.disk_cache
        if has_tiers and not self.prefix_reuse:
            raise ConfigError(
                "--kv-host-cache and --kv-disk-cache keep prefixes, --no-prefix-reuse uses none"
            )

    @property
    def disk_cache(self) -> tuple[Path, int] | None:
        """Directory and bytes of the disk cache; None if it is off."""
        if self.kv_disk_cache == "off":
            return None
        folder, colon, size = self.kv_disk_cache.rpartition(":")
        if not (folder and colon):
            raise ConfigError(f"--kv-disk-cache={self.kv_disk_cache} is not DIR:BYTES (or off)")
        num_bytes = parse_bytes("kv-disk-cache", size)
        return (Path(folder), num_bytes) if num_bytes else None

    @property
    def cache_form(self) -> str:
        """Return what the cache stores: "heads" or "latent"."""
        return "heads" if self.attn_impl == "naive" else "latent"

    def split_from(self, device_type: str) -> int:
        """Return from how many tokens on the residual stream is split over tp; 0 is never."""
        if self.sequence_parallel >= 0:
            return self.sequence_parallel
        return _SPLIT_TOKENS if device_type == "cuda" else 0

    def is_pipelined(self, device_type: str) -> bool:
        """Tell whether a step is launched before the results of the last one are looked at."""
        return self.pipeline_depth == 1 or (self.pipeline_depth < 0 and device_type == "cuda")

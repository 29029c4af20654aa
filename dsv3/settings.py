"""Settings of an engine: all user choices except the model and the layout."""

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from dsv3.arguments import text, truth, whole
from dsv3.config_fields import shown
from dsv3.errors import ConfigError
from dsv3.setting_names import argument
from dsv3.sizes import CacheSize, Size

# Calculated, not measured: for V3 on 8 ranks at 450 GB/s, fewer bytes of float32 sums and fewer
# rows to normalize outweigh two more launches (20 us a layer) from about 600 tokens on. With Gloo
# there is no gain.
_SPLIT_TOKENS = 1024
MAX_DRAFTS = 8
CacheForm = Literal["latent", "heads"]
CacheDtype = Literal["fp32", "bf16", "fp8"]
KvShard = Literal["tokens", "none"]
DispatchVariant = Literal["auto", "allreduce", "alltoall"]
# Conversion of values by the type of their field, and the type in words for errors.
_KINDS: Mapping[Any, tuple[Callable[[Any], Any], str]] = {
    int: (whole, "a whole number"),
    bool: (truth, "True or False"),
    str: (text, "a text"),
}


def _setting(group: str, default: Any, about: str = "", least: int = 0) -> Any:
    """Return a dataclass field that is also a flag.

    Args:
        group: group of flags in `--help`.
        default: default value.
        about: help text of the flag.
        least: smallest value of a number.
    """
    return field(default=default, metadata={"group": group, "about": about, "least": least})


def allowed_words(setting: Field[Any]) -> tuple[str, ...]:
    """Return the words that a setting accepts; none for other settings."""
    return get_args(setting.type) if get_origin(setting.type) is Literal else ()


_model = partial(_setting, "model")
_layout = partial(_setting, "layout")
_experts = partial(_setting, "experts")
_cache = partial(_setting, "cache and attention")
_steps = partial(_setting, "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of an engine: arguments of the library, and flags of the programs.

    Values are converted to the types of their fields, such as NumPy's numbers, 8192.0 or paths.

    Attributes:
        attn_impl: "naive" caches expanded heads; "absorb" caches latents and always attends to
            them directly; "auto" caches latents and expands them for many queries.
        kv_shard: "tokens" splits a latent cache's positions over the tp ranks, "none" replicates
            the cache.
        kv_dtype: format of the cache: "auto" (that of the activations), "fp32", "bf16" or "fp8"
            (latents in e4m3 with a scale per 128, rotated keys in bf16).
        index_dtype: format of the index keys of sparse attention: "auto" (that of the cache, bf16
            beside fp8), or "fp8": keys and queries are rotated by a Hadamard matrix and quantized,
            as in DeepSeek's own inference code. Transformers does neither.
        kv_cache_size: see `CacheSize.parse`.
        kv_host_cache: bytes of host memory on each rank for pages evicted from the device, or a
            share of the host memory that is free for this rank.
        kv_disk_cache: DIR:BYTES, a directory for pages evicted from host memory, and its size limit
            in bytes or as a share of its file system. Without a host cache, host memory for one
            longest sequence is allocated.
        moe_dispatch: dispatch of tokens of several dp groups to their experts: every rank gets all
            tokens ("allreduce"), tokens are sent to the ranks of their experts ("alltoall"), or
            "auto".
        dispatch_dtype: format of dispatched hidden states: "auto" (FP8 in fp8 numerics, otherwise
            unchanged), "bf16" or "fp8".
        one_shot: make small sums over the GPUs of a host by one kernel in memory that they share;
            without it, and where they cannot share memory, by NCCL. Not yet confirmed on GPUs.
        cpu_exchange: see `dsv3.distributed.mesh.join_world`.
        max_seq_len: longest context, prompt and answer; 0 is the model's own limit.
        max_batch_tokens: most new tokens of one step, in each data-parallel group. On CUDA, a step
            of up to 256 runs as a CUDA graph.
        max_running: most running sequences, in each data-parallel group.
        dtype: numerics: "auto" (float32 on CPU, as the checkpoint on CUDA), "float32", "bfloat16",
            "fp8": bfloat16 with FP8 weights multiplied by activations quantized per 128, or
            "int8": bfloat16 with int8 weights that have a scale per row multiplied by activations
            quantized per token, where more than 64 tokens meet.
        weights: quantized weights that are held as they are stored, if no shard cuts their blocks
            or groups: "fp8" (dequantized at every use; fp8 numerics keep them anyway), "int8",
            "int4", "stored" (all), or "auto": int8 and int4, but none with dtype float32, since a
            CPU multiplies integers by bfloat16. The others get the activations' dtype.
        sequence_parallel: steps of at least this number of tokens split the residual stream over
            tp; 0 never does, -1 depends on the device.
        prefix_reuse: keep computed prefixes and reuse them.
        eviction: policy for the next idle cached page to evict: "cost" or "lru".
        expert_placement: file with the experts of each rank; empty for equal ranges.
        redundant_experts: copies of experts beyond the first in a layer, without a file.
        rebalance_every: steps between checks of the experts' loads, after which experts may move
            to other ranks; 0 never moves them.
        record_expert_load: file for the number of tokens of each expert; empty does not count.
        speculative_tokens: drafts for each sequence and step, at most 8. They do not
            change the answer; a step that verifies them takes longer, and may give more tokens.
            Steps are not pipelined then, and requests with penalties are not drafted.
        speculative_adaptive: draft up to that number, as many as give most tokens a second by the
            times of steps and the drafts accepted so far.
        speculative_method: "mtp": the MTP layer drafts; "ngram": the tokens after an earlier
            occurrence of the text's last ones; "auto": "mtp" if the checkpoint has the layer.
        pipeline_depth: steps launched before the results of the last one are read: 0 or 1; -1 is 1
            on CUDA, where steps run asynchronously, and 0 on a CPU.
        enforce_eager: launch each kernel of a short step separately, without CUDA graphs.
        overlap_launches: launch each kernel while the previous one still runs (Hopper and later;
            not yet confirmed on a GPU).
        compile_ahead: compile all kernels that steps can ask for before the first step, in parallel
            processes, so that no step waits for the compiler: "on", "off", or "auto" (on CUDA).
            Triton's cache keeps compiled kernels.
        check_every: steps between comparisons of the ranks' results; 0 compares nothing.
    """

    dtype: Literal["auto", "float32", "bfloat16", "fp8", "int8"] = _model("auto", "numerics")
    weights: Literal["auto", "stored", "fp8", "int8", "int4"] = _model(
        "auto", "quantized weights that are held as they are stored"
    )
    moe_dispatch: Literal["auto", "allreduce", "alltoall"] = _layout(
        "auto", "dispatch of tokens to experts"
    )
    dispatch_dtype: Literal["auto", "bf16", "fp8"] = _layout(
        "auto", "format of dispatched hidden states"
    )
    one_shot: bool = _layout(
        False, "sum in memory that the GPUs of a host share (not yet confirmed)"
    )
    cpu_exchange: Literal["auto", "memory", "gloo"] = _layout(
        "auto", "exchange of CPU ranks on one host: shared memory if possible, or Gloo"
    )
    sequence_parallel: int = _layout(
        -1, "split norms over tp from N tokens in a step on (0: never; -1: by device)", least=-1
    )
    expert_placement: str = _experts("", "FILE with the experts of each rank")
    redundant_experts: int = _experts(0, "copies of experts in a layer, without a file")
    rebalance_every: int = _experts(0, "steps between moves of experts (0: never)")
    record_expert_load: str = _experts("", "FILE to write the number of tokens per expert to")
    attn_impl: Literal["auto", "naive", "absorb"] = _cache(
        "auto", "cache expanded heads (naive) or latents"
    )
    kv_shard: Literal["tokens", "none"] = _cache(
        "tokens", "split the cache by tokens over tp, or replicate it"
    )
    kv_dtype: Literal["auto", "fp32", "bf16", "fp8"] = _cache("auto", "format of the cache")
    index_dtype: Literal["auto", "fp8"] = _cache(
        "auto", "format of the keys of sparse attention's indexer"
    )
    kv_cache_size: str = _cache(
        "auto",
        "auto, bytes per rank (4GiB; 4GB is 4 * 10^9), a share of the memory left by the weights "
        "(90%%), tokens of a tp group (65536tok)",
    )
    kv_host_cache: str = _cache(
        "off", "host memory per rank for evicted pages: bytes (4GiB) or a share (50%%)"
    )
    kv_disk_cache: str = _cache(
        "off", "DIR:BYTES (or DIR:50%%) for pages evicted from host memory; later runs reuse them"
    )
    max_seq_len: int = _cache(0, "longest context in tokens (0: the model's)")
    prefix_reuse: bool = _cache(True, "do not reuse computed prefixes")
    eviction: Literal["cost", "lru"] = _cache("cost", "eviction policy of idle pages")
    max_batch_tokens: int = _steps(2048, "most new tokens of a step", least=1)
    max_running: int = _steps(64, "most running sequences", least=1)
    speculative_tokens: int = _steps(0, "tokens drafted ahead and verified in one step (0: none)")
    speculative_adaptive: bool = _steps(
        False, "draft fewer tokens, or none, where measured steps say that more do not pay"
    )
    speculative_method: Literal["auto", "mtp", "ngram"] = _steps(
        "auto", "drafts by the MTP layer, or from earlier occurrences in the text (auto: by layer)"
    )
    pipeline_depth: int = _steps(
        -1, "steps launched before results are read: 0, 1 or -1 (by device)", least=-1
    )
    enforce_eager: bool = _steps(False, "run without CUDA graphs")
    overlap_launches: bool = _steps(
        False, "launch kernels before the previous one ends (Hopper; not yet confirmed)"
    )
    compile_ahead: Literal["auto", "on", "off"] = _steps(
        "auto", "compile all kernels before the first step (auto: on CUDA)"
    )
    check_every: int = _steps(64, "steps between comparisons of the ranks' results (0: never)")

    def __post_init__(self) -> None:
        """Convert each value to its field's type; raise ConfigError for invalid values."""
        for f in fields(self):
            self._read(f)
        if self.attn_impl == "naive" and self.kv_dtype == "fp8":
            raise ConfigError(
                f"{self.given('kv_dtype')} packs latents, {self.given('attn_impl')} caches "
                f"expanded heads; use {self.named('attn_impl')}=auto"
            )
        if self.pipeline_depth > 1:
            raise ConfigError(f"{self.given('pipeline_depth')} must be -1, 0 or 1")
        if self.speculative_tokens > MAX_DRAFTS:
            raise ConfigError(f"{self.given('speculative_tokens')} must be at most {MAX_DRAFTS}")
        if self.max_running > self.max_batch_tokens:
            raise ConfigError(
                f"{self.given('max_running')} needs as many {self.named('max_batch_tokens')} "
                f"(now {self.max_batch_tokens}): every running sequence adds a token each step"
            )
        if self.expert_placement and self.redundant_experts:
            raise ConfigError(
                f"{self.given('redundant_experts')}: {self.given('expert_placement')} has its own "
                "copies; leave one of them out"
            )
        self._check_caches()

    def _read(self, f: Field[Any]) -> None:
        """Convert and check the value of a field; None means the default."""
        value = getattr(self, f.name)
        words = allowed_words(f)
        least = f.metadata["least"]
        convert, rule = _KINDS[str if words else f.type]
        if f.type is int:
            rule = f"{rule}, at least {least}"
        try:
            value = f.default if value is None else convert(value)
        except ValueError:
            hint = f": one of {', '.join(words)}" if words else ""
            raise ConfigError(f"{self.named(f.name)}={shown(value)} must be {rule}{hint}") from None
        object.__setattr__(self, f.name, value)
        if words and value not in words:
            raise ConfigError(f"{self.given(f.name)} is unknown; use one of {', '.join(words)}")
        if f.type is int and value < least:
            raise ConfigError(f"{self.given(f.name)} must be at least {least}")

    def _check_caches(self) -> None:
        # All three are parsed here, so that an invalid size raises.
        sizes = (self.cache_size, self.host_cache, self.disk_cache)
        has_lower_tiers = any(sizes[1:])
        if has_lower_tiers and not self.prefix_reuse:
            raise ConfigError(
                f"{self.named('kv_host_cache')} and {self.named('kv_disk_cache')} keep prefixes, "
                f"{self.given('prefix_reuse')} uses none"
            )

    def named(self, field: str) -> str:
        """Return the name of a field or of another argument in errors."""
        return argument(field)

    def given(self, field: str) -> str:
        """Return the name of a field with its value for errors."""
        return f"{self.named(field)}={getattr(self, field)}"

    @staticmethod
    def common(values: Mapping[str, Any]) -> dict[str, str]:
        """Return the settings that must be the same on all ranks, as text.

        Files and folders may have other names on other hosts, so only their presence counts, and
        for the disk cache its size.

        Args:
            values: values by name of the field.
        """
        texts = {f.name: str(values[f.name]) for f in fields(EngineConfig)}
        for name in ("expert_placement", "record_expert_load"):
            texts[name] = "a file" if texts[name] else "no file"
        texts["kv_disk_cache"] = texts["kv_disk_cache"].rpartition(":")[2]
        return texts

    @property
    def cache_size(self) -> CacheSize:
        """Size of the device's cache."""
        return CacheSize.parse(self.named("kv_cache_size"), self.kv_cache_size)

    @property
    def host_cache(self) -> Size:
        """Size of the host cache."""
        return Size.parse(self.named("kv_host_cache"), self.kv_host_cache, "the host's free memory")

    @property
    def disk_cache(self) -> tuple[Path, Size] | None:
        """Directory and size of the disk cache; None if it is off."""
        if self.kv_disk_cache == "off":
            return None
        folder, colon, num_bytes = self.kv_disk_cache.rpartition(":")
        if not (folder and colon):
            raise ConfigError(f"{self.given('kv_disk_cache')} is not DIR:BYTES (DIR:100GiB) or off")
        size = Size.parse(self.named("kv_disk_cache"), num_bytes, "the directory's file system")
        return (Path(folder), size) if size else None

    @property
    def cache_form(self) -> CacheForm:
        """Contents of the cache: "heads" or "latent"."""
        return "heads" if self.attn_impl == "naive" else "latent"

    def sp_min_tokens(self, device_type: str) -> int:
        """Return the least number of tokens to split the residual stream over tp; 0 is never."""
        if self.sequence_parallel >= 0:
            return self.sequence_parallel
        return _SPLIT_TOKENS if device_type == "cuda" else 0

    def is_pipelined(self, device_type: str) -> bool:
        """Return True if a step is launched before the results of the last one are read."""
        if self.speculative_tokens:  # the next step begins where this one's drafts were accepted
            return False
        return self.pipeline_depth == 1 or (self.pipeline_depth < 0 and device_type == "cuda")

"""The memory plan: the bytes that a rank will hold, known before anything is loaded."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dsv3.cache.layout import CacheLayout
from dsv3.config import ModelConfig
from dsv3.distributed.mesh import Mesh
from dsv3.errors import ConfigError
from dsv3.model.transformer import Transformer
from dsv3.parallel.expert_placement import Placement
from dsv3.parallel.weight_format import WeightFormat
from dsv3.settings import EngineConfig

# Share of the memory left by the weights that `auto` gives to the cache. The rest is for
# activations and for other programs.
_CACHE_SHARE = {"cpu": 0.25, "cuda": 0.85}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one rank.

    Attributes:
        weight_bytes: bytes of its weights.
        bytes_per_token: cache bytes of a token of context on this rank, averaged over a page.
        num_pages: pages of the cache, the null page not counted.
        cache_tokens: positions that these pages hold, for the whole tp group.
        free_bytes: free memory before loading.
        host_pages: pages of the host cache.
        activation_bytes: measured need of the largest steps, CUDA graphs included; 0 if it was not
            measured.
        kept: quantized formats that weights are held in.
    """

    weight_bytes: int
    bytes_per_token: float
    num_pages: int
    cache_tokens: int
    free_bytes: int
    host_pages: int = 0
    activation_bytes: int = 0
    kept: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return the budget in one line."""
        cache = self.cache_tokens * self.bytes_per_token
        kept = self.host_pages * self.cache_tokens // self.num_pages
        host = f", host cache {_size(kept * self.bytes_per_token)} ({kept:,} tokens)"
        steps = f", steps {_size(self.activation_bytes)}" if self.activation_bytes else ""
        formats = f" ({', '.join(self.kept)})" if self.kept else ""
        return (
            f"memory per rank: weights {_size(self.weight_bytes)}{formats}, "
            f"cache {_size(cache)} ({self.bytes_per_token:,.0f} bytes a token; "
            f"{self.cache_tokens:,} tokens fit in the group)"
            f"{host if kept else ''}{steps}, free {_size(self.free_bytes)}"
        )


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"


def weight_bytes(
    config: ModelConfig,
    mesh: Mesh,
    fmt: WeightFormat,
    placement: Placement | None = None,
    has_mtp: bool = False,
) -> int:
    """Return the bytes of this rank's weights: those of a model on the meta device.

    Args:
        config: the model.
        mesh: this rank.
        fmt: how weights are held.
        placement: which rank holds which experts; None for equal ranges.
        has_mtp: the first MTP layer is loaded too.
    """
    meta = torch.device("meta")
    model = Transformer(
        config,
        replace(mesh, device=meta),
        replace(fmt, device=meta),
        placement=placement,
        has_mtp=has_mtp,
    )
    return model.num_bytes


def free_memory(device: torch.device, ranks_on_host: int) -> int:
    """Return the bytes this rank may use: its share of the device, or of the host's memory."""
    if device.type == "cuda":
        sharing = max(1, ranks_on_host // torch.cuda.device_count())
        return torch.cuda.mem_get_info(device)[0] // sharing
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text))
    return available // ranks_on_host


def plan_memory(
    settings: EngineConfig,
    cache: CacheLayout,
    weights: int,
    max_seq_len: int,
    free: int,
    device: torch.device,
    activations: int | None = None,
    host_free: int = 0,
) -> MemoryPlan:
    """Decide the cache's size.

    `auto` takes the pages that `max_running` sequences of full length need, at most those that fit
    the memory left by weights and activations. If activations are not measured yet (None), it takes
    a fixed share of the memory left by the weights. A share in the settings is of the same memory.

    Args:
        settings: the sizes of the caches.
        cache: layout of this rank's cache.
        weights: bytes of this rank's weights.
        max_seq_len: the longest context.
        free: bytes of the device that this rank may use.
        device: where weights and cache are.
        activations: measured need of the largest steps in bytes; None if it was not measured.
        host_free: bytes of host memory that this rank may use, for a host cache.

    Raises:
        ConfigError: not even one page fits, or not the size in the settings.
    """
    page_bytes = cache.page_bytes
    host_pages = _host_pages(settings, page_bytes, cache.pages_for(max_seq_len), host_free)
    # On a CPU the host cache takes from the same memory.
    fixed = weights + (host_pages * page_bytes if device.type == "cpu" else 0)
    room = max(0, free - fixed)
    if activations is not None:
        # Allocators lose some to fragments.
        room -= activations + activations // 8 + page_bytes
    size = settings.cache_size
    if size.depends_on_memory and size.share is None:
        wanted = settings.max_running * cache.pages_for(max_seq_len)
        usable = int(_CACHE_SHARE[device.type] * room) if activations is None else room
        num_pages = min(wanted, usable // page_bytes)
    else:
        num_pages = _pages_asked(settings, cache, page_bytes, room)
    # The null page is allocated too.
    needed = fixed + (num_pages + 1) * page_bytes
    if num_pages < 1 or needed > free:
        raise ConfigError(
            f"weights need {_size(weights)} and the cache {_size(needed - weights)} on each rank, "
            f"{_size(free)} are free; use more ranks, {settings.named('weights')}=fp8 or a smaller "
            f"{settings.named('kv_cache_size')}"
        )
    return MemoryPlan(
        weight_bytes=weights,
        bytes_per_token=page_bytes / cache.page_size,
        num_pages=num_pages,
        cache_tokens=num_pages * cache.page_size,
        free_bytes=free,
        host_pages=host_pages,
        activation_bytes=activations or 0,
    )


def _pages_asked(settings: EngineConfig, cache: CacheLayout, page_bytes: int, room: int) -> int:
    """Return the number of pages of a cache size; of a share, one is the null page.

    Raises:
        ConfigError: it is less than one page, though there is room for one.
    """
    text = settings.kv_cache_size
    size = settings.cache_size
    if size.num_tokens is not None:
        return cache.pages_for(size.num_tokens)
    if size.share is None:
        num_bytes = size.num_bytes or 0
        num_pages = num_bytes // page_bytes
    else:
        num_bytes = int(size.share * max(0, room))
        num_pages = num_bytes // page_bytes - 1
    if num_pages < 1 and room >= 2 * page_bytes:
        tokens = f"{text}tok" if text.isdecimal() else "65536tok"
        least = "two pages (one is always kept)" if size.share else "one page"
        raise ConfigError(
            f"{settings.given('kv_cache_size')} is {num_bytes:,} bytes on each rank, less than "
            f"{least}: a page of {cache.page_size} tokens takes {page_bytes:,}; to give tokens, "
            f"write {tokens}"
        )
    return num_pages


def _host_pages(settings: EngineConfig, page_bytes: int, longest: int, host_free: int) -> int:
    """Return the pages of the host cache; a disk cache needs some for pages in transfer."""
    num_bytes = settings.host_cache.of(host_free)
    if settings.host_cache and num_bytes < page_bytes:
        raise ConfigError(f"{settings.given('kv_host_cache')} holds no page of {_size(page_bytes)}")
    return num_bytes // page_bytes or (longest if settings.disk_cache else 0)

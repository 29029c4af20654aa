"""One attention layer over a long cache: the time and the reads of its steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchlib.profiler import Profiler, SpanTotal, hold
from benchlib.rank_share import fill_weight
from benchlib.step_shape import StepKind, StepShape
from dsv3.cache.layout import CacheLayout
from dsv3.cache.pool import CachePool
from dsv3.config import ModelConfig, ParallelConfig
from dsv3.distributed.stand_in import stand_in_mesh
from dsv3.engine.runner import BatchBuilder
from dsv3.model import attention, chunk_attention, indexer
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.model.attention import MLA
from dsv3.model.rotary import Rotary
from dsv3.parallel.weight_format import WeightFormat
from dsv3.settings import CacheDtype, EngineConfig
from dsv3_kernels import PageTables

# Entries that are drawn and written at a time.
_BLOCK = 4096
_OVER_CACHE = (
    (attention, "mla_decode_values"),
    (attention, "mla_prefill"),
    (chunk_attention, "mla_prefill"),
    (chunk_attention, "mla_prefill_packed"),
    (chunk_attention, "merge_lse"),
)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """The cost of a step in one layer.

    Attributes:
        layer: seconds of the whole attention layer.
        attention: seconds of attention over the cache; in expanded form with the expansion.
        index: seconds of writing index keys, scoring and selecting.
        attention_bytes: bytes of the cache entries that attention has read.
        index_bytes: bytes of the index keys that were scored.
    """

    layer: float
    attention: float
    index: float
    attention_bytes: int
    index_bytes: int


class ContextLayer:
    """The first layer's attention with random weights and a cache of random entries.

    Args:
        config: the model; it has an indexer.
        device: device to allocate it on; the activations are float32 on a CPU, else bfloat16.
        cache: format of the latents.
        index: format of the index keys.
        steps: the steps to measure, whose sequences must fit the cache.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        cache: CacheDtype,
        index: CacheDtype,
        steps: list[StepKind],
    ) -> None:
        torch.manual_seed(0)
        self.config = config
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        layout = ParallelConfig()
        mesh = stand_in_mesh(layout, device)
        self.layer = MLA(config, 0, layout, mesh.tp, WeightFormat(self.dtype, device)).eval()
        for module in self.layer.modules():
            for target in getattr(module, "targets", list)():
                fill_weight(target.dest, target.name)
        cached = CacheLayout.make(config, "latent", "none", cache, 1, 0, index)
        planes = tuple(replace(plane, layers=(0,)) for plane in cached.planes)
        cached = replace(cached, planes=planes)
        num_pages = max(step.batch * cached.pages_for(step.length) for step in steps)
        self.pool = CachePool(cached, num_pages + 1, device, mesh.tp)
        self.cache = self.pool.layer(0)
        self._fill_cache()
        self._rotary = Rotary(config, device)
        self._rule = AbsorbRule.make(config, EngineConfig())

    def _fill_cache(self) -> None:
        """Write random entries and index keys to all slots except the null page's."""
        layout = self.pool.layout
        assert self.cache.index is not None
        for slot_T in torch.arange(layout.page_size, len(self.cache.slots)).split(_BLOCK):
            slot_T = slot_T.to(self.device)
            for target, width in (
                (self.cache, layout.main.width),
                (self.cache.index, self.cache.index.dim),
            ):
                target.write(slot_T, torch.randn(len(slot_T), width, device=self.device))

    @torch.inference_mode()
    def measure(self, step: StepKind, is_sparse: bool, repeats: int) -> LayerCost:
        """Return the median cost of a step, in sparse or in dense attention."""
        layout = self.pool.layout
        plan = step.plan(np.zeros(step.num_tokens, np.int32), layout.page_size)
        rule = self._rule if is_sparse else replace(self._rule, index_topk=None)
        batch = BatchBuilder(plan, layout, self.device, rule).build()
        rotation = self._rotary(batch.position_T)
        x_TD = torch.randn(
            len(batch.token_T), self.config.hidden_size, dtype=self.dtype, device=self.device
        )
        run = partial(self.layer, x_TD, rotation, batch, self.cache)
        with self._reads() as reads:
            run()  # also warms up
        costs = []
        profiler = Profiler(self.device)
        shape = StepShape.of_plan(plan, rule.max_queries)
        self._attach(profiler)
        for _ in range(repeats):
            profiler.clear()
            hold(self.device)
            with profiler.step(shape):
                run()
            spans = profiler.measured
            costs.append(
                LayerCost(
                    layer=profiler.step_seconds,
                    attention=spans["attention"].seconds,
                    index=spans.get("index", SpanTotal()).seconds,
                    attention_bytes=reads["attention"] * layout.main.entry_bytes,
                    index_bytes=reads["index"] * layout.planes[1].entry_bytes,
                )
            )
        profiler.detach()
        return sorted(costs, key=lambda cost: cost.layer)[len(costs) // 2]

    def _attach(self, profiler: Profiler) -> None:
        """Time attention over the cache and the index as spans."""

        def time(name: str, owner: Any, attribute: str) -> None:
            timed = profiler.wrap(name, getattr(owner, attribute))
            profiler.replace(owner, attribute, timed)

        for module, function in _OVER_CACHE:
            time("attention", module, function)
        time("attention", self.cache, "gather")
        time("attention", self.layer.kv_b_proj, "forward")
        time("index", self.layer.indexer, "write")
        time("index", self.layer.indexer, "select")

    @contextmanager
    def _reads(self) -> Iterator[dict[str, int]]:
        """Count the entries that attention and index read, by the page tables that they get."""
        count = {"attention": 0, "index": 0}
        profiler = Profiler(self.device)

        def watch(name: str, owner: Any, attribute: str, read: Callable[..., int]) -> None:
            inner = getattr(owner, attribute)

            def counted(*args: Any, **kwargs: Any) -> Any:
                count[name] += read(*args, *kwargs.values())
                return inner(*args, **kwargs)

            profiler.replace(owner, attribute, counted)

        watch("attention", attention, "mla_decode_values", _entries)
        watch("attention", self.cache, "gather", lambda _page_G, num_tokens, *_: num_tokens)
        watch("index", indexer, "index_scores", _entries)
        yield count
        profiler.detach()


def _entries(*args: Any) -> int:
    """Return the entries of the tables among some arguments: of each sequence, up to its last."""
    (tables,) = (arg for arg in args if isinstance(arg, PageTables))
    return int((tables.query_pos_BQ.amax(1) + 1).sum())

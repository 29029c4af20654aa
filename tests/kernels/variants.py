"""Compares the variants of kernels that steps ask for with those that the engine lists.

TRITON_INTERPRET=0 PYTHONPATH=.:launch python tests/kernels/variants.py STEPS

Triton compiles a kernel anew for each choice of its constants, and where a number becomes 1, or it
or an address ceases to be a multiple of 16. While a model serves this would be a pause of seconds.
Runs random steps on a pretended GPU and prints a line for each variant that is not listed, then for
each model the numbers of variants listed and asked for.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchlib.random_weights import integer_names
from benchlib.rank_share import RankShape
from dsv3.cache.layout import CacheLayout
from dsv3.cache.pool import CachePool
from dsv3.checkpoint.sharding import tensor_specs
from dsv3.config import ParallelConfig
from dsv3.config_files import DEMO, load_model_config
from dsv3.distributed.mesh import Mesh
from dsv3.distributed.stand_in import stand_in_mesh
from dsv3.engine.kernel_variants import list_variants
from dsv3.engine.runner import Runner
from dsv3.engine.setup import Setup
from dsv3.engine.speculation import Speculation
from dsv3.engine.step_plan import Ints, StepPlan
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.model.transformer import Transformer
from dsv3.parallel.token_rows import DispatchSettings
from dsv3.parallel.weight_format import WeightFormat
from dsv3.settings import CacheDtype, EngineConfig
from dsv3_kernels._gpu import Gpu, gpu_of
from dsv3_kernels.variants import Variant
from tests.kernels.compile_only import NoDevice
from tests.kernels.dry_cuda import dry_gpu
from tests.kernels.dry_gpu import CPU, CUDA

GPU = Gpu((9, 0), multiprocessors=132, shared_bytes=228 << 10)
LIMIT = 1900
SETTINGS = EngineConfig(max_batch_tokens=700, max_running=40, max_seq_len=LIMIT)
DENSE = load_model_config(DEMO)
# A kernel of the indexer has blocks of 64 heads, and keys of 64 or 128 dimensions.
SPARSE = replace(
    DENSE, model_type="deepseek_v32", index_n_heads=64, index_head_dim=128, index_topk=256
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A model and how it runs.

    Attributes:
        shape: the share of a rank.
        index: format of the keys of sparse attention; None without an indexer.
        num_drafts: drafts by the MTP layer.
    """

    shape: RankShape
    index: CacheDtype | None = None
    num_drafts: int = 0


FORMS = (
    Form(shape=RankShape(config=DENSE, world=1, weights="fp8", cache="fp8")),
    Form(shape=RankShape(config=DENSE, world=2, rank=1, weights="bf16", cache="bf16")),
    Form(shape=RankShape(config=DENSE, world=1, weights="int8", cache="bf16")),
    Form(shape=RankShape(config=DENSE, world=2, rank=1, weights="int4", cache="bf16")),
    Form(shape=RankShape(config=DENSE, world=1, weights="bf16", cache="bf16"), num_drafts=1),
    Form(shape=RankShape(config=DENSE, world=2, rank=1, weights="fp8", cache="fp8"), num_drafts=3),
    Form(shape=RankShape(config=SPARSE, world=1, weights="fp8", cache="fp8"), index="fp8"),
    Form(shape=RankShape(config=SPARSE, world=2, rank=1, weights="bf16"), index="bf16"),
    Form(shape=RankShape(config=SPARSE, world=2, rank=1), index="fp8", num_drafts=2),
)


@contextmanager
def asked_variants() -> Iterator[set[Variant]]:
    """Collect the variants that launches on the pretended GPU ask for, instead of compiling."""
    found: set[Variant] = set()
    compiler = JITFunction._do_compile

    def record(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        found.add(Variant(fn.module, fn.name, compile["specialization_data"]))
        return True

    def pretend(self: JITFunction, key: object, *about: object) -> SimpleNamespace:
        compiler(self, key, *about)
        return SimpleNamespace(hash=key, metadata=SimpleNamespace(shared=0), asm=None)

    with (
        mock.patch.object(JITFunction, "_do_compile", pretend),
        mock.patch.object(knobs.runtime, "jit_cache_hook", record),
    ):
        yield found


def setup_of(form: Form) -> Setup:
    """Return the setup of an engine that runs such a rank."""
    shape = form.shape
    config, layout = shape.cut, ParallelConfig(world_size=shape.world, rank=shape.rank)
    specs = tensor_specs(config)
    routers = frozenset(name for name in specs if name.endswith(".mlp.gate.weight"))
    integers = integer_names(config, shape.weights, on_cpu=False)
    fmt = WeightFormat(torch.bfloat16, CUDA, bf16_vectors=routers, integers=integers)
    if shape.weights == "fp8":
        names = frozenset(name for name, spec in specs.items() if spec.quantizable)
        fmt = replace(fmt, fp8_names=names, fp8_products=True)
    has_mtp = form.num_drafts > 0
    return Setup(
        config=config,
        settings=SETTINGS,
        fmt=fmt,
        layout=CacheLayout.make(
            config,
            "latent",
            shape.kv_shard,
            shape.cache,
            layout.tp,
            layout.tp_rank,
            form.index,
            has_mtp,
        ),
        context_limit=LIMIT,
        placement=None,
        dispatch=DispatchSettings(),
        weight_bytes=0,
        speculation=Speculation(form.num_drafts, has_mtp),
    )


def random_step(rng: np.random.Generator, rule: AbsorbRule, num_drafts: int) -> StepPlan:
    """Return a step of decoding sequences, of prompts, or of both, as the scheduler orders them.

    A decoding sequence verifies up to `num_drafts` drafts.
    """
    decodes = int(rng.integers(0, SETTINGS.max_running)) if rng.random() < 0.7 else 0
    checked = rng.integers(0, num_drafts + 1, decodes).tolist()
    queries = [1 + count for count in checked]
    left = SETTINGS.max_batch_tokens - sum(queries)
    while not queries or (rng.random() < 0.5 and left > 1 and len(queries) < 40):
        queries.append(int(np.exp(rng.uniform(0, np.log(left)))))
        checked.append(0)
        left -= queries[-1]
    longest = 1 + int(np.exp(rng.uniform(0, np.log(LIMIT - max(queries) - num_drafts - 1))))
    contexts = rng.integers(0, longest, len(queries)).tolist()

    def place(i: int) -> tuple[bool, int, int]:
        return not rule.absorbs(queries[i], contexts[i]), queries[i], contexts[i]

    order = sorted(range(len(queries)), key=place)
    query_len = np.array(queries, np.int32)[order]
    checked_B = np.array(checked, np.int32)[order]
    context_len = np.array(contexts, np.int32)[order]
    last_row = query_len.cumsum(dtype=np.int32) - 1 - checked_B
    rows = np.arange(query_len.sum(), dtype=np.int32)
    is_scored = rng.random() < 0.2
    if not is_scored:
        seq_of_row = np.repeat(np.arange(len(query_len)), query_len)
        rows = rows[rows >= last_row[seq_of_row]]
    zeros = np.zeros(len(rows), np.int32)
    plan = StepPlan.greedy(zeros, zeros, zeros[:, None] + np.int32(1))
    plan.token_ids = np.zeros(query_len.sum(), np.int32)
    plan.row = rows
    plan.query_len = query_len
    plan.context_len = context_len
    plan.page_count = -(-(context_len + query_len + num_drafts) // 64)
    plan.pages = np.ones(plan.page_count.sum(), np.int32)
    if rng.random() < 0.5:
        plan.temperature = plan.temperature + 1
    if is_scored:
        plan.target = zeros
        plan.top_logprobs = zeros
    if num_drafts:
        is_drafted = rng.random(len(queries)) < 0.8
        add_drafts(plan, last_row[is_drafted], checked_B[is_drafted], num_drafts)
    return plan


def add_drafts(plan: StepPlan, last_row: Ints, num_checked: Ints, num_drafts: int) -> None:
    """Let a step draft tokens after those in some rows, each before drafts that it verifies."""
    plan.next_ids = plan.token_ids
    plan.draft_row = last_row
    plan.draft_result = np.searchsorted(plan.row, last_row).astype(np.int32)
    plan.draft_checked = num_checked
    plan.num_drafts = np.array([num_drafts], np.int32)


def serve(setup: Setup, mesh: Mesh, num_steps: int) -> set[Variant]:
    """Run random steps of such a rank; return the variants they asked for."""
    has_mtp = setup.speculation.has_mtp
    model = Transformer(setup.config, mesh, setup.fmt, setup.dispatch, has_mtp=has_mtp)
    model.pack_weights()
    cache = CachePool(setup.layout, 2048 // setup.layout.page_size, CUDA, mesh.tp)
    rule = AbsorbRule.make(setup.config, SETTINGS)
    rng = np.random.default_rng(0)
    runners = [
        Runner(model.eval(), cache, rule, static=is_static, drafts=has_mtp)
        for is_static in (False, True)
    ]
    with asked_variants() as asked:
        for i in range(num_steps):
            runners[i % 2].run([random_step(rng, rule, setup.speculation.num_drafts)])
    return asked


def main() -> None:
    driver.set_active(NoDevice(90))
    for form in FORMS:
        shape = form.shape
        heads = 4 * shape.world
        cut = replace(shape, config=replace(shape.config, num_attention_heads=heads), layers=2)
        layout = ParallelConfig(world_size=shape.world, rank=shape.rank)
        setup = setup_of(replace(form, shape=cut))
        listed = list_variants(setup, stand_in_mesh(layout, CPU), GPU)
        with dry_gpu():
            assert gpu_of(CUDA) == GPU
            asked = serve(setup, stand_in_mesh(layout, CUDA), int(sys.argv[1]))
        for variant in sorted(asked - set(listed)):
            sys.stdout.write(f"{variant.kernel}: {variant.specialization}\n")
        sys.stdout.write(f"listed {len(listed)} asked {len(asked)}\n")


if __name__ == "__main__":
    main()

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
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchlib.integers import integer_names
from benchlib.rank_share import Rank, RankShape
from dsv3.cache.layout import CacheLayout
from dsv3.checkpoint.sharding import tensor_specs
from dsv3.config import ParallelConfig
from dsv3.config_files import DEMO, load_model_config
from dsv3.distributed.stand_in import stand_in_mesh
from dsv3.engine.kernel_variants import list_variants
from dsv3.engine.runner import Runner
from dsv3.engine.setup import Setup
from dsv3.engine.step_plan import StepPlan
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.parallel.token_rows import DispatchSettings
from dsv3.parallel.weights import WeightFormat
from dsv3.settings import EngineConfig
from dsv3_kernels._gpu import Gpu, gpu_of
from dsv3_kernels.variants import Variant
from tests.kernels.compile_only import NoDevice
from tests.kernels.dry_cuda import dry_gpu
from tests.kernels.dry_gpu import CPU, CUDA

GPU = Gpu((9, 0), multiprocessors=132, shared_bytes=228 << 10)
LIMIT = 1900
SETTINGS = EngineConfig(max_batch_tokens=700, max_running=40, max_seq_len=LIMIT)
FORMS = (
    RankShape(config=load_model_config(DEMO), world=1, weights="fp8", cache="fp8"),
    RankShape(config=load_model_config(DEMO), world=2, rank=1, weights="bf16", cache="bf16"),
    RankShape(config=load_model_config(DEMO), world=1, weights="int8", cache="bf16"),
    RankShape(config=load_model_config(DEMO), world=2, rank=1, weights="int4", cache="bf16"),
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


def setup_of(shape: RankShape) -> Setup:
    """Return the setup of an engine that runs such a rank."""
    config, layout = shape.cut, ParallelConfig(world_size=shape.world, rank=shape.rank)
    specs = tensor_specs(config)
    routers = frozenset(name for name in specs if name.endswith(".mlp.gate.weight"))
    integers = integer_names(config, shape.weights, on_cpu=False)
    fmt = WeightFormat(torch.bfloat16, CUDA, bf16_vectors=routers, integers=integers)
    if shape.weights == "fp8":
        names = frozenset(name for name, spec in specs.items() if spec.quantizable)
        fmt = replace(fmt, fp8_names=names, fp8_products=True)
    return Setup(
        config=config,
        settings=SETTINGS,
        fmt=fmt,
        layout=CacheLayout.make(
            config, "latent", shape.kv_shard, shape.cache, layout.tp, layout.tp_rank
        ),
        context_limit=LIMIT,
        placement=None,
        dispatch=DispatchSettings(),
        weight_bytes=0,
    )


def random_step(rng: np.random.Generator) -> StepPlan:
    """Return a step of decoding sequences, of prompts, or of both."""
    decodes = int(rng.integers(0, SETTINGS.max_running)) if rng.random() < 0.7 else 0
    queries = [1] * decodes
    left = SETTINGS.max_batch_tokens - decodes
    while not queries or (rng.random() < 0.5 and left > 1 and len(queries) < 40):
        queries.append(int(np.exp(rng.uniform(0, np.log(left)))))
        left -= queries[-1]
    queries.sort()  # as the scheduler orders them
    longest = 1 + int(np.exp(rng.uniform(0, np.log(LIMIT - max(queries) - 1))))
    contexts = rng.integers(0, longest, len(queries))
    query_len, context = np.array(queries, np.int32), contexts.astype(np.int32)
    rows = query_len.cumsum(dtype=np.int32) - 1
    if rng.random() < 0.2:
        rows = np.arange(query_len.sum(), dtype=np.int32)
    zeros = np.zeros(len(rows), np.int32)
    plan = StepPlan.greedy(zeros, zeros, zeros[:, None] + np.int32(1))
    plan.token_ids, plan.row = np.zeros(query_len.sum(), np.int32), rows
    plan.query_len, plan.context_len = query_len, context
    plan.page_count = -(-(context + query_len) // 64)
    plan.pages = np.ones(plan.page_count.sum(), np.int32)
    if rng.random() < 0.5:
        plan.temperature = plan.temperature + 1
    if len(rows) > len(query_len):
        plan.target, plan.top_logprobs = zeros, zeros
    return plan


def serve(shape: RankShape, num_steps: int) -> set[Variant]:
    """Run random steps of such a rank; return the variants they asked for."""
    rank = Rank(shape, CUDA, 2048)
    rule, rng = AbsorbRule.make(shape.cut, SETTINGS), np.random.default_rng(0)
    runners = [
        Runner(rank.model, rank.cache, rule, static=is_static) for is_static in (False, True)
    ]
    with asked_variants() as asked:
        for i in range(num_steps):
            runners[i % 2].run([random_step(rng)])
    return asked


def main() -> None:
    driver.set_active(NoDevice(90))
    for form in FORMS:
        heads = 4 * form.world
        shape = replace(form, config=replace(form.config, num_attention_heads=heads), layers=2)
        mesh = stand_in_mesh(ParallelConfig(world_size=shape.world, rank=shape.rank), CPU)
        listed = list_variants(setup_of(shape), mesh, GPU)
        with dry_gpu():
            assert gpu_of(CUDA) == GPU
            asked = serve(shape, int(sys.argv[1]))
        for variant in sorted(asked - set(listed)):
            sys.stdout.write(f"{variant.kernel}: {variant.specialization}\n")
        sys.stdout.write(f"listed {len(listed)} asked {len(asked)}\n")


if __name__ == "__main__":
    main()

"""The memory plan made exact: the largest steps are run, and the cache takes the rest."""

import logging

import numpy as np
import torch

from dsv3.cache.pool import CachePool
from dsv3.distributed.mesh import Mesh
from dsv3.engine.cuda_graphs import most_rows
from dsv3.engine.memory import MemoryPlan, free_memory
from dsv3.engine.runner import Runner
from dsv3.engine.setup import Setup
from dsv3.engine.step_plan import StepPlan
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.model.transformer import Transformer

log = logging.getLogger(__name__)


def measured_plan(
    plan: MemoryPlan, setup: Setup, mesh: Mesh, model: Transformer, static: bool
) -> MemoryPlan:
    """Return a plan whose cache takes the memory that weights and the largest steps leave.

    The plan is returned as it is on a CPU, where the cache becomes resident only as it is written,
    and for a cache size in bytes or tokens. Everything that a step allocates counts: partial
    results of attention, buffers of exchanges, logits. A collective.

    Args:
        plan: made before loading.
        setup: how the model runs.
        mesh: this rank.
        model: loaded.
        static: short steps run on static buffers, on CUDA as graphs.
    """
    settings = setup.settings
    if mesh.device.type != "cuda" or not settings.cache_size.depends_on_memory:
        return plan
    cache = CachePool(setup.layout, 2, mesh.device, mesh.tp)
    rule = AbsorbRule.make(model.config, settings)
    drafts = setup.speculation.has_mtp
    runner = Runner(model, cache, rule, static=static, drafts=drafts)
    num_groups = mesh.layout.dp
    page_size = setup.layout.page_size
    before = torch.cuda.memory_allocated(mesh.device)
    torch.cuda.reset_peak_memory_stats(mesh.device)
    largest = largest_step(
        settings.max_running, setup.context_limit, page_size, settings.max_batch_tokens
    )
    runner.run([largest] * num_groups)
    peak = torch.cuda.max_memory_allocated(mesh.device) - before
    torch.cuda.empty_cache()
    if static:  # CUDA graphs share memory and keep it: the largest one's
        reserved = torch.cuda.memory_reserved(mesh.device)
        most = most_rows(settings.max_batch_tokens, num_groups)
        runner.run([largest_step(most, setup.context_limit, page_size)] * num_groups)
        torch.cuda.empty_cache()
        peak += torch.cuda.memory_reserved(mesh.device) - reserved
    del cache, runner
    torch.cuda.empty_cache()
    free = free_memory(mesh.device, mesh.ranks_on_host) + setup.weight_bytes
    measured = setup.plan_memory(mesh, free, peak)
    if mesh.layout.rank == 0:
        log.info("%s", measured.describe())
    return measured


def largest_step(num_rows: int, limit: int, page_size: int, max_tokens: int = 0) -> StepPlan:
    """Return the step that takes most memory, all of it in page 1: only shapes count.

    Args:
        num_rows: sequences that decode, one of them at the end of the longest context.
        limit: the longest context.
        page_size: positions of a page.
        max_tokens: new tokens of the step. Tokens beyond those of the decoding sequences are the
            end of a prompt of the longest context, and all rows are scored.
    """
    num_prompt = min(max(0, max_tokens - num_rows), limit)
    query_len = np.array([1] * num_rows + [num_prompt] * (num_prompt > 0), np.int32)
    context_len = np.zeros_like(query_len)
    context_len[num_rows - 1] = limit - 1
    context_len[-1] = limit - query_len[-1]
    zeros = np.zeros(num_rows + num_prompt, np.int32)
    plan = StepPlan.greedy(zeros, zeros, zeros[:, None])
    plan.query_len = query_len
    plan.context_len = context_len
    plan.page_count = np.full(len(query_len), -(-limit // page_size), np.int32)
    plan.pages = np.ones(plan.page_count.sum(), np.int32)
    plan.temperature = np.ones_like(plan.top_p)
    if max_tokens:
        plan.target = zeros
        plan.top_logprobs = zeros
    return plan


def agree_on_pages(mesh: Mesh, plan: MemoryPlan) -> tuple[int, int]:
    """Return the fewest pages of the device, and of the host, that any rank planned.

    A collective.
    """
    mine = torch.tensor([plan.num_pages, plan.host_pages], dtype=torch.int64, device=mesh.device)
    pages, host_pages = mesh.world.all_gather(mine).min(0).values.tolist()
    return pages, host_pages

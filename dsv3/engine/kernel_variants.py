"""The variants of kernels that the steps of a model can ask for, listed without a GPU.

Launches are chosen by padded numbers of rows (`row_bucket`), so a step of every padded size, of
every kind, asks for all variants. The engine's own steps run here on the meta device, with one
layer of each kind, and their launches are recorded.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from dsv3.cache.pool import CachePool
from dsv3.distributed.collectives import Collectives, SingleRank
from dsv3.distributed.mesh import Mesh
from dsv3.distributed.stand_in import StandIn
from dsv3.engine.cuda_graphs import most_rows
from dsv3.engine.runner import Runner
from dsv3.engine.setup import Setup
from dsv3.engine.step_plan import StepPlan
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.model.moe import MoE
from dsv3.model.transformer import Transformer
from dsv3_kernels import Peers, row_buckets
from dsv3_kernels._gpu import Gpu
from dsv3_kernels.variants import Variant, record_variants

_META = torch.device("meta")
# Contexts up to this length are expanded in products of few rows.
_SHORT_CONTEXT = 64


def list_variants(setup: Setup, mesh: Mesh, gpu: Gpu) -> list[Variant]:
    """Return the variants that steps of this rank can ask `gpu` for, in the order of their steps.

    Args:
        setup: how the model runs.
        mesh: this rank.
        gpu: compiled for.
    """
    with record_variants(gpu) as found, torch.inference_mode():
        _run_steps(setup, _without_peers(mesh))
    return list(found)


def _without_peers(mesh: Mesh) -> Mesh:
    """Return a mesh on the meta device whose exchanges only have the shapes of the group's."""

    def stand_in(group: Collectives) -> Collectives:
        if group.size == 1:
            return SingleRank()
        alone = StandIn(group.rank, group.size)
        if group.peers is not None:
            addresses = torch.empty(group.size, dtype=torch.int64, device=_META)
            alone.peers = Peers(addresses, group.peers.rank, group.peers.own)
        return alone

    return replace(
        mesh,
        device=_META,
        world=stand_in(mesh.world),
        tp=stand_in(mesh.tp),
        control=SingleRank(),
        dp=stand_in(mesh.dp),
        host=stand_in(mesh.host),
        hosts=stand_in(mesh.hosts),
    )


def _run_steps(setup: Setup, mesh: Mesh) -> None:
    """Run steps of all kinds and padded sizes."""
    config = setup.config
    settings = setup.settings
    groups = mesh.layout.dp
    # Of all-to-all, whose sizes depend on values, only the experts' part launches kernels.
    dispatch = replace(setup.dispatch, variant="allreduce")
    model = Transformer(
        config,
        mesh,
        replace(setup.fmt, device=_META),
        dispatch,
        settings.sp_min_tokens("cuda"),
        setup.placement,
        setup.speculation.has_mtp,
    ).eval()
    model.layers = nn.ModuleList(_distinct(model.layers))
    cache = CachePool(setup.layout, 2, _META, mesh.tp)
    rule = AbsorbRule.make(config, settings)
    drafts = setup.speculation.has_mtp
    eager = Runner(model, cache, rule, drafts=drafts)
    for plan in _eager_steps(setup, rule):
        eager.run([plan] * groups)
    if not settings.enforce_eager:
        static = Runner(model, cache, rule, static=True, drafts=drafts)
        for plan in _static_steps(setup, groups):
            static.run([plan] * groups)
    if groups > 1:
        for layer in model.layers:
            if isinstance(layer.mlp, MoE):
                _run_experts(layer.mlp, config.hidden_size, settings.max_batch_tokens * groups)


def _distinct(layers: nn.ModuleList) -> list[nn.Module]:
    """Return one layer of each kind: those whose weights differ in shape or format."""
    kinds: dict[object, nn.Module] = {}
    for layer in layers:
        tensors = (*layer.parameters(), *layer.buffers())
        kinds.setdefault(tuple((t.shape, t.dtype) for t in tensors), layer)
    return list(kinds.values())


def _static_steps(setup: Setup, groups: int) -> Iterator[StepPlan]:
    """Yield steps of one token per sequence, by padded sizes; prompts in graphs are such rows."""
    most = most_rows(setup.settings.max_batch_tokens, groups)
    yield from _decode_steps(setup, most)
    for rows in row_buckets(most):
        yield _plan(setup, [1] * rows, [setup.context_limit - 1] * rows)


def _decode_steps(setup: Setup, most: int) -> Iterator[StepPlan]:
    """Yield steps of one and of `most` sequences that decode."""
    for rows in {1, most}:
        for context in _contexts(setup, 1):
            yield _plan(setup, [1] * rows, [context] * rows, draws=True)


def _eager_steps(setup: Setup, rule: AbsorbRule) -> Iterator[StepPlan]:
    """Yield steps of other kinds: a prompt, decoding sequences, both; some rows are scored.

    Args:
        setup: how the model runs.
        rule: of the sequences that attend straight to the cache.
    """
    longest = setup.context_limit
    most = setup.settings.max_batch_tokens
    yield from _decode_steps(setup, setup.settings.max_running)
    num_verified = 1 + setup.speculation.num_drafts
    for context in _contexts(setup, num_verified):
        yield _plan(
            setup,
            [num_verified] * setup.settings.max_running,
            [context] * setup.settings.max_running,
        )
    for new in row_buckets(most):
        new = min(new, most, longest)
        for context in _contexts(setup, new):
            if context == 0 or rule.absorbs(new, context):
                yield _plan(setup, [new], [context], is_scored=True)
    new = min(rule.max_queries + 1, most, longest)
    for context in row_buckets(min(_SHORT_CONTEXT + 1, longest - new)):
        if not rule.absorbs(new, context):
            yield _plan(setup, [new], [context])
    if 1 < new < most:
        for context in _contexts(setup, 1):
            yield _plan(setup, [1, new], [context, 0])


def _contexts(setup: Setup, new: int) -> set[int]:
    """Return numbers of cached tokens before `new` ones: none, and the most that are possible.

    In sparse attention also the most with which new tokens and drafts attend to all keys.
    """
    longest = setup.context_limit - new
    topk = setup.config.index_topk
    if topk is None:
        return {0, longest}
    longest_dense = topk - new - setup.speculation.num_drafts
    return {0, min(max(0, longest_dense), longest), longest}


def _plan(
    setup: Setup,
    query_len: list[int],
    context_len: list[int],
    draws: bool = False,
    is_scored: bool = False,
) -> StepPlan:
    """Return a step whose sequences are all in page 1: only shapes count.

    Args:
        setup: how the model runs.
        query_len: new tokens of each sequence.
        context_len: cached tokens of each sequence.
        draws: tokens are drawn; otherwise the choice is greedy.
        is_scored: the probabilities of all new tokens are asked for.
    """
    queries = np.array(query_len, np.int32)
    contexts = np.array(context_len, np.int32)
    num_tokens = int(queries.sum())
    num_rows = num_tokens if is_scored else len(queries)
    zeros = np.zeros(num_rows, np.int32)
    plan = StepPlan.greedy(zeros, zeros, zeros[:, None] + np.int32(1))
    plan.token_ids = np.zeros(num_tokens, np.int32)
    plan.query_len = queries
    plan.context_len = contexts
    plan.page_count = -(-(contexts + queries) // setup.layout.page_size)
    plan.pages = np.ones(plan.page_count.sum(), np.int32)
    plan.row = (np.arange(num_rows) if is_scored else queries.cumsum() - 1).astype(np.int32)
    if draws:
        plan.temperature = np.ones_like(plan.temperature)
    if is_scored:
        plan.target = zeros
        plan.top_logprobs = zeros
    elif setup.speculation.has_mtp:
        plan.next_ids = plan.token_ids
        plan.draft_row = plan.row
        plan.draft_result = np.arange(num_rows, dtype=np.int32)
        plan.draft_checked = zeros
        plan.num_drafts = np.array([setup.speculation.num_drafts], np.int32)
    return plan


def _run_experts(moe: MoE, hidden: int, most: int) -> None:
    """Run a layer's experts on padded numbers of rows, as an all-to-all may bring them."""
    weight = moe.gate_up_proj
    top_k = moe.top_k
    for rows in row_buckets(most):
        moe.run_experts(
            torch.empty(rows, hidden, dtype=weight.dtype, device=_META),
            torch.empty(rows, top_k, dtype=torch.int64, device=_META),
            torch.empty(rows, top_k, dtype=torch.float32, device=_META),
        )

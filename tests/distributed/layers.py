"""Checks on every rank: a layer split over the ranks equals the same layer on one rank.

Weights are random with seeds made from their names, so that no weight has to be sent.
"""

import dataclasses
import errno
import os
import zlib
from functools import partial
from itertools import product
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchlib.exchange import OPERATIONS, exchange_time
from dsv3.cache.layout import CacheLayout
from dsv3.cache.pool import CachePool
from dsv3.checkpoint.region import whole as region_of
from dsv3.checkpoint.sharding import shard_region, tensor_specs
from dsv3.config import ModelConfig
from dsv3.distributed import cpu_exchange
from dsv3.distributed.collective_errors import collective_errors
from dsv3.distributed.collectives import ProcessGroup, library_group
from dsv3.distributed.cpu_exchange import connect_cpu
from dsv3.distributed.mesh import Mesh
from dsv3.distributed.shared_memory import MemoryGroup
from dsv3.engine.runner import BatchBuilder
from dsv3.engine.step_plan import PlanChannel, StepPlan, pack_plans
from dsv3.errors import ConfigError, RankError
from dsv3.model import chunk_attention
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.model.attention import MLA
from dsv3.model.moe import MLP, MoE
from dsv3.model.rotary import Rotary
from dsv3.model.side_stream import SideStream
from dsv3.parallel.expert_dispatch import ExpertDispatch
from dsv3.parallel.linear import VocabParallelEmbedding, VocabParallelHead
from dsv3.parallel.sequence_parallel import SequenceParallel
from dsv3.parallel.weight_format import WeightFormat
from dsv3.parallel.weights import Matrix, Vector
from dsv3.settings import CacheForm, KvShard
from dsv3_kernels import add_rmsnorm
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.checkpoint_files import TINY
from tests.distributed.one_shot import check_connect, check_one_shot, check_sum_norm
from tests.distributed.ranks import CPU, Check, alone
from tests.distributed.sampler import check_sampler

# Twelve heads and experts for two, three and four ranks; other sizes do not divide.
CONFIG = dataclasses.replace(
    TINY,
    vocab_size=331,
    hidden_size=40,
    intermediate_size=50,
    moe_intermediate_size=10,
    num_attention_heads=12,
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    n_routed_experts=12,
    n_group=3,
    topk_group=2,
    num_experts_per_tok=3,
)
FORMAT = WeightFormat(torch.float32, CPU)
Module = TypeVar("Module", bound=nn.Module)


def whole(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a random weight that depends on its name and shape only."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)


def filled(module: Module, mesh: Mesh, config: ModelConfig = CONFIG) -> Module:
    """Fill every matrix with its slice of the whole weights."""
    specs = tensor_specs(config)
    for part in module.modules():
        if isinstance(part, Matrix | Vector):
            for target in part.targets():
                weight = whole(target.name, specs[target.name].shape)
                # An expert that is not in this rank's equal range has no region; it is whole.
                region = shard_region(specs[target.name], mesh.layout) or region_of(weight.shape)
                target.dest.copy_(weight[tuple(slice(*bounds) for bounds in region)])
    return module


def check_collectives(mesh: Mesh) -> None:
    tp, rank, size = mesh.tp, mesh.tp.rank, mesh.tp.size
    own = torch.arange(6.0).view(2, 3) + 100 * rank
    stacked = torch.stack([torch.arange(6.0).view(2, 3) + 100 * r for r in range(size)])
    assert_bitwise_equal("gather", tp.all_gather(own), stacked)
    assert_bitwise_equal("reduce", tp.all_reduce(own.clone()), stacked.sum(0))
    parts = torch.arange(4.0 * size).view(2 * size, 2) * (rank + 1)
    wanted = torch.arange(4.0 * size).view(size, 2, 2)[rank] * sum(range(1, size + 1))
    assert_bitwise_equal("reduce scatter", tp.reduce_scatter(parts), wanted)
    assert_bitwise_equal("gather of a view", tp.all_gather(own.T), stacked.transpose(1, 2))
    sent = torch.stack([torch.full((2,), 10.0 * rank + to) for to in range(size)])
    received = torch.stack([torch.full((2,), 10.0 * sender + rank) for sender in range(size)])
    assert_bitwise_equal("all to all", tp.all_to_all(sent), received)
    assert_bitwise_equal("broadcast", tp.broadcast(own.clone()), stacked[0])


def check_in_exchange(mesh: Mesh) -> None:
    """A group is marked as in an exchange during the exchange only."""
    group = library_group()
    all_reduce = dist.all_reduce
    states: list[bool] = []

    def recorded(*args: Any, **kwargs: Any) -> None:
        states.append(group.in_exchange)
        all_reduce(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", recorded)
        group.all_reduce(torch.ones(1))
    assert states == [True] and not group.in_exchange
    group.close()


def check_refused_memory(mesh: Mesh) -> None:
    """If one rank has no memory, all exchange over Gloo, or raise where memory is demanded."""
    rank, size = mesh.world.rank, mesh.world.size
    lines: list[str] = []

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no memory here")

    assert dist.group.WORLD is not None
    for failing in (0, size - 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_exchange.log, "warning", lambda *line: lines.append(line[1]))
            if rank == failing:
                patch.setattr(os, "posix_fallocate", refuse)
            group = connect_cpu(dist.group.WORLD, "auto", [0] * size)
            assert isinstance(group, ProcessGroup)
            with pytest.raises(ConfigError, match="No space left on device"):
                connect_cpu(dist.group.WORLD, "memory", [0] * size)
            group.close()
    assert lines == (["No space left on device"] * 2 if rank == 0 else [])
    group = connect_cpu(dist.group.WORLD, "memory", range(size))
    assert isinstance(group, ProcessGroup)  # each rank on a host of its own
    group.close()


def check_bench(mesh: Mesh) -> None:
    """Every operation is timed in every form."""
    report = exchange_time(mesh, [1000, 40_000], 1)
    forms = {"memory", "gloo"} if isinstance(mesh.world, MemoryGroup) else {"gloo"}
    found = {(row["operation"], row["form"], row["bytes"]) for row in report.rows}
    sizes = {row["bytes"] for row in report.rows}
    assert found == set(product(OPERATIONS, forms, sizes)) and len(sizes) == 2
    assert all(row["us"] > 0 and row["GB/s"] > 0 for row in report.rows)


def check_sequence_parallel(mesh: Mesh) -> None:
    """Rows are returned in order, split or not, and so are their sums."""
    for count in (1, mesh.tp.size, 2 * mesh.tp.size + 1):
        x = torch.arange(3.0 * count).view(count, 3)
        for is_split in (False, True):
            rows = SequenceParallel(mesh.tp, count, is_split)
            own = rows.own(x)
            assert len(own) == (-(-count // mesh.tp.size) if is_split else count)
            assert_bitwise_equal("gather", rows.gather(own), x)
            part = x * (mesh.tp.rank + 1)
            sum_of_parts = x * sum(range(1, mesh.tp.size + 1))
            norm = torch.ones(3), 1e-6, False, False
            total, h, _ = rows.sum_norm(own, part, *norm)
            want = add_rmsnorm(x, sum_of_parts, *norm)
            assert_bitwise_equal("sum", rows.gather(total), want[0])
            assert_bitwise_equal("norm", h, want[1])
            assert_bitwise_equal("nothing to add", rows.sum_norm(total, None, *norm)[1], want[1])


def check_plan_channel(mesh: Mesh) -> None:
    """Plans that fit in one broadcast, barely fit, barely do not fit, and are much longer."""
    channel = PlanChannel(mesh.control)
    empty = len(pack_plans([StepPlan(), StepPlan(temperature=np.zeros(3, np.float32))]))
    for words in (0, 1, 4094 - empty, 4095 - empty, 4096 - empty, 4097 - empty, 50_000):
        rng = np.random.default_rng(words)
        plan = StepPlan(token_ids=rng.integers(-(2**31), 2**31, words).astype(np.int32))
        plan.temperature = rng.random(3, np.float32)
        if mesh.world.rank == 0:
            channel.send([StepPlan(), plan])
        else:
            got = channel.receive()
            assert got is not None and len(got) == 2 and not len(got[0].token_ids)
            assert got[1].pack().tobytes() == plan.pack().tobytes(), words
    if mesh.world.rank == 0:
        channel.send(None)
    else:
        assert channel.receive() is None


def check_collective_errors(mesh: Mesh) -> None:
    """All ranks raise the error of one rank."""
    last = mesh.world.size - 1
    with collective_errors(mesh, "nothing"):
        pass

    def fail(rank: int) -> None:
        with collective_errors(mesh, "trying"):
            if mesh.world.rank == rank:
                raise ConfigError("the flag is wrong")

    with pytest.raises(ConfigError, match=r"^the flag is wrong$"):
        fail(0)
    with pytest.raises(RankError, match=f"^rank {last}: the flag is wrong$"):
        fail(last)


def check_vocabulary(mesh: Mesh) -> None:
    """331 rows do not divide evenly; of 5 rows over 4 ranks the last rank has none."""
    for vocab in (331, 5):
        config = dataclasses.replace(CONFIG, vocab_size=vocab)
        name, dim = "model.embed_tokens.weight", config.hidden_size
        table = whole(name, (vocab, dim))
        embedding = VocabParallelEmbedding(name, vocab, dim, mesh.layout, mesh.tp, FORMAT)
        ids = torch.arange(vocab).flip(0)
        got = filled(embedding, mesh, config)(ids)
        assert_bitwise_equal("embedding", got, table[ids])

        x = torch.randn(7, dim, generator=torch.Generator().manual_seed(0))
        head = filled(VocabParallelHead(name, vocab, dim, mesh.layout, FORMAT), mesh, config)
        columns = mesh.tp.all_gather(head(x)).transpose(0, 1).flatten(1)
        assert_close("logits", columns[:, :vocab], x @ table.T, 1e-6)
        assert bool((columns[:, vocab:] == -torch.inf).all())


def check_mlp(mesh: Mesh) -> None:
    """Fifty columns over the ranks: column-parallel, then row-parallel, then one sum."""
    x = torch.randn(5, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))

    def make(mesh: Mesh) -> MLP:
        hidden, inner = CONFIG.hidden_size, CONFIG.intermediate_size
        return filled(MLP("model.layers.0.mlp.", hidden, inner, mesh.layout, FORMAT), mesh)

    part = make(mesh)(x)
    want = make(alone())(x)
    assert (part - want).abs().max() > 0.01  # a part is not the whole
    assert_close("mlp", mesh.tp.all_reduce(part), want, 1e-5)


def check_moe(mesh: Mesh) -> None:
    """Experts over the ranks, the shared expert's columns over the ranks, one sum."""

    def make(mesh: Mesh) -> MoE:
        dispatch = ExpertDispatch(mesh, CONFIG.n_routed_experts)
        side = SideStream(FORMAT.device)
        moe = MoE(CONFIG, "model.layers.1.mlp.", mesh.layout, FORMAT, dispatch, side)
        return filled(moe, mesh)

    layer, single = make(mesh), make(alone())
    assert layer.local.count * mesh.world.size == CONFIG.n_routed_experts
    for tokens in (1, 33):
        x = torch.randn(tokens, CONFIG.hidden_size, generator=torch.Generator().manual_seed(tokens))
        assert_close(f"moe {tokens}", mesh.tp.all_reduce(layer(x)), single(x), 1e-5)


# (context, new tokens) of four sequences over five steps: chunked prompts together with single
# tokens, and contexts of 0, 1 and 2 tokens, shorter than the number of ranks.
STEPS = [
    {0: (0, 1), 1: (0, 200)},
    {0: (1, 1), 2: (0, 3), 1: (200, 70)},
    {0: (2, 1), 1: (270, 1), 3: (0, 2), 2: (3, 4)},
    {0: (3, 1), 3: (2, 1), 2: (7, 1), 1: (271, 1)},
    {0: (4, 2), 1: (272, 130)},
]


def check_attention(mesh: Mesh, form: CacheForm, kv_shard: KvShard, limit: int) -> None:
    """Chunked prompts and single tokens together give the results of one rank.

    Args:
        form, kv_shard: of the cache.
        limit: largest number of new tokens of a sequence that attend to latents.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_attention, "_BLOCK", 64)  # contexts of several blocks, merged
        compare_attention(mesh, form, kv_shard, limit)


def compare_attention(mesh: Mesh, form: CacheForm, kv_shard: KvShard, limit: int) -> None:
    setups = []
    for tested in (mesh, alone()):
        layer = filled(MLA(CONFIG, 0, tested.layout, tested.tp, FORMAT), tested)
        tp, tp_rank = tested.layout.tp, tested.layout.tp_rank
        layout = CacheLayout.make(CONFIG, form, kv_shard, "fp32", tp, tp_rank)
        pool = CachePool(layout, 60, CPU, tested.tp)
        # Slots that were not written must not be read, except those of the null page.
        pool.planes[0][:, layout.paging.slots_per_page :] = torch.nan
        setups.append((tested, layer, pool))
    sharded, single = (pool.num_bytes / pool.layout.page_size for *_, pool in setups)
    assert sharded * (1 if kv_shard == "none" else mesh.tp.size) == single
    rotary = Rotary(CONFIG, CPU)
    for number, step in enumerate(STEPS):
        plan_tokens = sum(n for _, n in step.values())
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(plan_tokens, CONFIG.hidden_size, generator=generator)
        results = []
        for tested, layer, pool in setups:
            plan = attention_plan(step, pool.layout)
            batch = BatchBuilder(plan, pool.layout, CPU, AbsorbRule(limit)).build()
            part = layer(x, rotary(batch.position_T), batch, pool.layer(0))
            results.append(tested.tp.all_reduce(part))
        sharded_result, single_result = results
        assert_close(f"step {number}", sharded_result, single_result, 1e-5)


def attention_plan(step: dict[int, tuple[int, int]], layout: CacheLayout) -> StepPlan:
    """Return a plan in which the pages of the sequences interleave."""
    return StepPlan(
        token_ids=np.zeros(sum(n for _, n in step.values()), np.int32),
        query_len=np.array([n for _, n in step.values()], np.int32),
        context_len=np.array([c for c, _ in step.values()], np.int32),
        page_count=np.array([layout.pages_for(c + n) for c, n in step.values()], np.int32),
        pages=np.array(
            [
                1 + seq + 4 * i
                for seq, (c, n) in step.items()
                for i in range(layout.pages_for(c + n))
            ],
            np.int32,
        ),
    )


CHECKS: dict[str, Check] = {
    "collectives": check_collectives,
    "in_exchange": check_in_exchange,
    "refused_memory": check_refused_memory,
    "bench": check_bench,
    "sequence_parallel": check_sequence_parallel,
    "one_shot": check_one_shot,
    "sum_norm": check_sum_norm,
    "connect": check_connect,
    "plan_channel": check_plan_channel,
    "collective_errors": check_collective_errors,
    "vocabulary": check_vocabulary,
    "mlp": check_mlp,
    "moe": check_moe,
    "sampler": check_sampler,
    "attention latent tokens 1": partial(
        check_attention, form="latent", kv_shard="tokens", limit=1
    ),
    "attention latent tokens 100": partial(
        check_attention, form="latent", kv_shard="tokens", limit=100
    ),
    "attention latent none 1": partial(check_attention, form="latent", kv_shard="none", limit=1),
    "attention latent none 4": partial(check_attention, form="latent", kv_shard="none", limit=4),
    "attention heads tokens 1": partial(check_attention, form="heads", kv_shard="tokens", limit=1),
}


def fail_on_rank_1(mesh: Mesh) -> None:
    """The other ranks wait for rank 1 in an exchange."""
    if mesh.world.rank == 1:
        raise RuntimeError("rank 1 says no")
    mesh.world.all_reduce(torch.ones(1))

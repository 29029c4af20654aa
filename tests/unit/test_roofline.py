"""The roofline floor of a step, compared with independent figures and with each other."""

from dataclasses import replace

import pytest

from benchlib.experts_hit import busiest_hits, mean_hits
from benchlib.hardware import HARDWARE
from benchlib.operation import Op, floor_seconds
from benchlib.roofline import RooflineSetup, step_ops
from benchlib.step_shape import ExpertHits, StepShape
from dsv3.config import ParallelConfig
from dsv3.config_files import load_model_config
from dsv3.errors import ConfigError
from dsv3.settings import CacheForm, KvShard
from tests.checkpoint_files import TINY

V3 = load_model_config("v3-671b")
EIGHT = ParallelConfig(world_size=8)
REPLICATED = RooflineSetup(config=V3, layout=EIGHT, kv_shard="none")


def at_its_busiest(load: StepShape) -> StepShape:
    """The load of the rank on which most experts are hit."""
    return replace(load, hits=busiest_hits(V3, 8, load.tokens))


def without_links(setup: RooflineSetup, load: StepShape, hardware: str) -> float:
    """Milliseconds of a step."""
    ops = [op for op in step_ops(setup, load) if not op.span]
    return 1e3 * floor_seconds(ops, HARDWARE[hardware])


@pytest.mark.parametrize(
    ("batch", "context", "mean", "busiest", "h200"),
    [
        (1, 1024, 1.80, 3.43, 2.39),
        (1, 65536, 3.21, 4.84, 3.38),
        (8, 1024, 6.90, 10.28, 7.18),
        (8, 65536, 18.20, 21.58, 15.06),
        (32, 8192, 23.07, 26.44, 18.46),
        (128, 1024, 29.26, 29.71, 20.74),
        (128, 65536, 209.99, 210.45, 146.88),
    ],
)
def test_a_decode_step_of_v3(
    batch: int, context: int, mean: float, busiest: float, h200: float
) -> None:
    """Rank 0 of 8, the cache replicated, no links: a table made independently of this code."""
    load = StepShape(decode=batch, context=context)
    most = at_its_busiest(load)
    assert without_links(REPLICATED, load, "h100") == pytest.approx(mean, rel=0.02)
    assert without_links(REPLICATED, most, "h100") == pytest.approx(busiest, rel=0.02)
    assert without_links(REPLICATED, most, "h200") == pytest.approx(h200, rel=0.02)


def test_packed_latents_cost_less() -> None:
    load = at_its_busiest(StepShape(decode=128, context=65536))
    packed = replace(REPLICATED, cache="fp8")
    assert without_links(packed, load, "h100") == pytest.approx(131.40, rel=0.02)


def total(setup: RooflineSetup, load: StepShape, prefix: str) -> tuple[float, float]:
    """FLOPs and bytes of the operations below a name, all layers together."""
    ops = [op for op in step_ops(setup, load) if op.name.startswith(prefix)]
    assert ops, prefix
    return sum(op.count * op.flops for op in ops), sum(op.count * op.bytes for op in ops)


def test_dealt_positions_are_read_once_by_all_ranks_together() -> None:
    load = StepShape(decode=64, context=65536)
    dealt = RooflineSetup(config=V3, layout=EIGHT)
    flops, moved = total(dealt, load, "self_attn.mla_decode")
    all_flops, all_moved = total(REPLICATED, load, "self_attn.mla_decode")
    # As many FLOPs on a rank: all heads to an eighth of the positions.
    assert flops == pytest.approx(all_flops)
    assert moved == pytest.approx(all_moved / 8, rel=0.05)
    # Per head and token 576 values are gathered, and 512 returned with 64 bytes behind them.
    ops = {op.name: op for op in step_ops(dealt, load)}
    assert ops["self_attn.all_gather"].wire == 64 * 16 * 576 * 2 * 7
    assert ops["self_attn.all_to_all"].wire == 64 * 128 * (512 * 2 + 64) * 7 / 8


def test_prefill_is_the_causal_triangle() -> None:
    load = StepShape(prefill=4096)
    flops, _ = total(REPLICATED, load, "self_attn.mla_prefill")
    assert flops == pytest.approx(61 * 2 * 16 * (192 + 128) * 4096 * 4097 / 2)
    # Two halves one after the other attend to as many pairs as the whole.
    half = StepShape(prefill=2048), StepShape(prefill=2048, cached=2048)
    assert flops == sum(total(REPLICATED, h, "self_attn.mla_prefill")[0] for h in half)
    # Every token passes every weight that it activates: 2 FLOPs each.
    matrices, _ = total(RooflineSetup(config=V3, layout=ParallelConfig()), load, "")
    attention, _ = total(
        RooflineSetup(config=V3, layout=ParallelConfig()), load, "self_attn.mla_prefill"
    )
    head = 2 * V3.vocab_size * V3.hidden_size
    active = (matrices - attention - head) / 4096 / 2
    assert active == pytest.approx(37.6e9 - V3.vocab_size * V3.hidden_size * 2, rel=0.02)


def test_data_parallel_groups_exchange_tokens() -> None:
    layout = ParallelConfig(world_size=8, dp=8)
    wide = RooflineSetup(config=V3, layout=layout)
    ops = {op.name: op for op in step_ops(wide, StepShape(decode=16, context=1024))}
    # All 128 tokens reach the experts of this rank as they would over tp.
    tp = {op.name: op for op in step_ops(REPLICATED, StepShape(decode=128, context=1024))}
    assert ops["moe.experts.down"] == tp["moe.experts.down"]
    assert not any("all_reduce" in name for name in ops) and "moe.dispatch" not in tp
    sums = "layers.sum_norm.all_reduce", "model.sum_norm.all_reduce"
    assert [tp[name].count for name in sums] == [2 * V3.num_hidden_layers - 1, 1]
    # A token goes to at most 4 of 8 ranks, one of which may be its own: e4m3 and scales there.
    assert ops["moe.dispatch"].wire == 16 * 4 * 7 / 8 * (7168 + 4 * 56)
    assert ops["moe.combine"].wire == 16 * 4 * 7 / 8 * 7168 * 2


def test_experts_hit() -> None:
    assert mean_hits(V3, 8, 1) == ExpertHits(experts=1.0, rows=1.0)
    mean, most = mean_hits(V3, 8, 8), busiest_hits(V3, 8, 8)
    assert (round(mean.experts, 1), mean.rows) == (7.2, 8.0)
    assert most.experts == pytest.approx(11.4, abs=0.3) and most.rows > mean.rows
    assert busiest_hits(V3, 1, 10_000).rows == pytest.approx(80_000)


def test_the_bound_of_an_operation() -> None:
    h100 = HARDWARE["h100"]
    assert Op("a", flops=1473e12, bytes=1.0, dtype="fp8", count=2).seconds(h100) == pytest.approx(
        2.0
    )
    assert Op("a", flops=1.0, bytes=1e9).bound(h100) == "bytes"
    assert Op("a", flops=1e15).bound(h100) == "flops"
    near, far = (Op("a", wire=450e6, span=span) for span in (8, 16))
    assert near.bound(h100) == "link" and near.seconds(h100) == pytest.approx(1e-3 + 5e-6)
    assert far.seconds(h100) == pytest.approx(9e-3 + 20e-6)


V32 = load_model_config("v3.2-671b")


@pytest.mark.parametrize("shards", ["tokens", "none"])
def test_sparse_attention_reads_its_selection(shards: KvShard) -> None:
    """Beyond index_topk only the index keys grow with the context."""
    setup = RooflineSetup(config=V32, layout=EIGHT, kv_shard=shards)
    short, long = (StepShape(decode=8, context=context) for context in (4096, 65536))
    assert total(setup, short, "self_attn.mla_decode") == total(setup, long, "self_attn.mla_decode")
    parts = 8 if shards == "tokens" else 1
    flops, moved = total(setup, long, "self_attn.indexer.scores")
    assert flops == pytest.approx(61 * 2 * 8 * 65537 * 64 * 128 / parts)
    assert moved == pytest.approx(61 * 8 * 65537 * (128 * 2 + 4) / parts)
    names = {op.name: op for op in step_ops(setup, long)}
    assert ("self_attn.indexer.all_gather" in names) == (parts > 1)
    if parts > 1:
        assert names["self_attn.indexer.all_gather"].wire == 8 * 2048 * 8 * 7


def test_short_contexts_are_dense_and_write_index_keys() -> None:
    setup = RooflineSetup(config=V32, layout=ParallelConfig())
    load = StepShape(decode=2, context=2047, prefill=100)
    ops = {op.name.removeprefix("self_attn."): op for op in step_ops(setup, load)}
    assert {name for name in ops if name.startswith("indexer")} == {"indexer.wk", "indexer.write"}
    assert ops["indexer.write"].bytes == 102 * 128 * (2 + 2)
    assert "mla_prefill" in ops and ops["indexer.wk"].count == 61


def test_long_prompts_attend_to_selections() -> None:
    """FLOPs of attention grow with the tokens, those of the scores with their square."""
    setup = RooflineSetup(config=V32, layout=EIGHT, kv_shard="none")
    short, long = StepShape(prefill=8192), StepShape(prefill=16384)
    grown = [
        total(setup, long, name)[0] / total(setup, short, name)[0]
        for name in ("self_attn.mla_decode", "self_attn.indexer.scores")
    ]
    assert grown == [pytest.approx(2.0), pytest.approx(4.0, rel=1e-3)]
    assert not any(op.name == "self_attn.mla_prefill" for op in step_ops(setup, long))


def test_shared_layers_have_no_indexer() -> None:
    load = StepShape(decode=4, context=65536)
    counts = {}
    for name in ("glm-5-744b", "glm-5.2-744b"):
        setup = RooflineSetup(config=load_model_config(name), layout=EIGHT, weights="bf16")
        ops = {op.name: op for op in step_ops(setup, load)}
        counts[name] = {op.count for op in ops.values() if ".indexer." in op.name}
        assert ops["self_attn.mla_decode"].count == 78
    assert counts == {"glm-5-744b": {78}, "glm-5.2-744b": {21}}


@pytest.mark.parametrize("form", ["latent", "heads"])
@pytest.mark.parametrize("world", [1, 2])
def test_every_family_has_a_floor(form: CacheForm, world: int) -> None:
    names = ("v2-lite-16b", "v2-236b", "v3.2-671b", "kimi-k2-1t", "moonlight-16b")
    for name in (*names, "glm-5-744b", "glm-5.2-744b", "glm-4.7-flash-30b"):
        config = load_model_config(name)
        layout = ParallelConfig(world_size=world)
        setup = RooflineSetup(config=config, layout=layout, weights="bf16", form=form)
        load = StepShape(decode=4, context=5000, prefill=100, prompts=2, cached=7)
        ops = step_ops(setup, load)
        assert all(op.seconds(HARDWARE["h800"]) > 0 for op in ops)
        assert any(op.span for op in ops) == (world > 1)


def test_setups_are_checked() -> None:
    with pytest.raises(ConfigError, match="weights='int3' must be one of fp8, int8, int4"):
        RooflineSetup(config=V3, layout=EIGHT, weights="int3")
    with pytest.raises(ConfigError, match="does not divide"):
        RooflineSetup(config=TINY, layout=ParallelConfig(world_size=7))

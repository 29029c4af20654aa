"""FP8 products on two ranks, one of whose shards cut blocks: the demo model answers as on one."""

import json
from pathlib import Path

import pytest

from dsv3.distributed.mesh import Mesh
from dsv3.engine.engine import follow
from dsv3.engine.start import start
from dsv3.model.moe import MoE
from dsv3.model.transformer import DecoderLayer
from dsv3.request import SamplingParams
from dsv3.settings import EngineConfig
from dsv3.text.chat import ChatFormat
from tests.distributed.ranks import alone, run_ranks
from tests.oracle.run import answers

ROOT = Path(__file__).resolve().parents[2]
LINES = (ROOT / "tests/data/demo_eval.jsonl").read_text("utf-8").splitlines()
ROWS = sorted((json.loads(line) for line in LINES), key=lambda row: row["n_tokens"])[:8]


def answer(mesh: Mesh) -> None:
    """Answer the shortest dialogues; raise where one is wrong."""
    settings = EngineConfig(dtype="fp8", kv_cache_size="4096tok")
    started = start(ROOT / "checkpoints" / "demo-v3", settings, mesh)
    layer = started.runner.model.layers[-1]
    assert isinstance(layer, DecoderLayer) and isinstance(layer.mlp, MoE)
    assert layer.mlp.shared_experts is not None
    assert layer.self_attn.o_proj.quantizes
    # The one block of the shared expert is the first rank's.
    down = layer.mlp.shared_experts.down_proj
    assert down.weight.shape[-1] == (0 if mesh.tp.rank else 128)
    assert mesh.tp.rank or down.quantizes
    if started.engine is None:
        follow(started.runner, started.channel)
        return
    assert started.engine.tokenizer is not None
    chat = ChatFormat(started.engine.tokenizer, started.config.model_type)
    prompts = [chat.encode(chat.render(row["messages"])) for row in ROWS]
    done = answers(started, prompts, SamplingParams(max_tokens=48))
    started.engine.stop()
    wrong = [row["id"] for row, d in zip(ROWS, done, strict=True) if d.text != row["expected"]]
    assert len(wrong) <= 1, wrong  # near-ties


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_demo_answers(world_size: int) -> None:
    if world_size == 1:
        answer(alone())
    else:
        run_ranks(answer, world_size)

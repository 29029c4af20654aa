"""Models of other publishers with DeepSeek-V3's architecture: two ranks, conversion, warnings.

tests/oracle/test_families.py compares their logits on one rank.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsv3.checkpoint.check import check_tensors
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.source import open_source
from dsv3.config import ParallelConfig
from dsv3.distributed.mesh import Mesh
from dsv3.engine.engine import follow
from dsv3.engine.start import start
from dsv3.errors import CheckpointError
from dsv3.request import SamplingParams
from dsv3.settings import EngineConfig
from tests.distributed.ranks import alone, run_ranks
from tests.oracle.families import Oracle
from tests.oracle.family_configs import CONFIGS
from tests.oracle.run import all_logits, answers, start_alone

MAKE = Callable[[str], Oracle]
NEIGHBOURS = ("glm-5", "glm-5.2", "glm-4.7-flash", "kimi-k2.5", "moonlight")
ANSWER = 6  # tokens; the longest prompts are far beyond index_topk


def greedy(mesh: Mesh, path: Path, asked: list[list[int]], want: list[list[int]]) -> None:
    started = start(path, EngineConfig(kv_cache_size="2048tok"), mesh)
    if started.engine is None:
        follow(started.runner, started.channel)
        return
    params = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
    done = [d.token_ids for d in answers(started, asked, params)]
    started.engine.stop()
    assert done == want


@pytest.mark.parametrize("family", NEIGHBOURS)
def test_one_rank_and_two(oracle: MAKE, family: str) -> None:
    """The greedy tokens are those of transformers, at both world sizes."""
    made = oracle(family)
    asked = made.prompts
    want = []
    for prompt in asked:
        text = list(prompt)
        for _ in range(ANSWER):
            text.append(int(made.logits(text)[-1].argmax()))
        want.append(text[len(prompt) :])
    greedy(alone(), made.path, asked, want)
    run_ranks(greedy, 2, path=made.path, asked=asked, want=want)


@pytest.mark.parametrize("family", NEIGHBOURS)
def test_converted_and_back(oracle: MAKE, family: str, tmp_path: Path) -> None:
    """Two rank files, then one Hugging Face directory again: the same logits, bit for bit."""
    made = oracle(family)
    ranks, back = tmp_path / "ranks", tmp_path / "back"
    for source_path, layout, target in (
        (made.path, ParallelConfig(world_size=2), ranks),
        (ranks, None, back),
    ):
        with open_source(source_path) as source:
            assert not check_tensors(source)
            convert(source, make_plan(source, layout), target, workers=2)
    asked = made.prompts
    found = [all_logits(start_alone(path), asked, 200) for path in (made.path, ranks, back)]
    for first, *others in zip(*found, strict=True):
        assert all(torch.equal(first, other) for other in others)
    with open_source(made.path) as first_source, open_source(back) as last_source:
        assert first_source.config == last_source.config


def test_an_image_encoder_is_ignored_with_one_line(
    oracle: MAKE, caplog: pytest.LogCaptureFixture
) -> None:
    made = oracle("kimi-k2.5")
    with caplog.at_level(logging.WARNING):
        start_alone(made.path)
    lines = [line for line in caplog.messages if "image encoder" in line]
    assert lines == [
        f"{made.path}: the tensors of an image encoder (3) are ignored; only text prompts are "
        "supported"
    ]


@pytest.mark.parametrize("layer", [2, 4])
def test_indexers_are_where_the_config_says(oracle: MAKE, layer: int, tmp_path: Path) -> None:
    """A shared layer with an indexer, and a full one without, are refused with their names."""
    made = oracle("glm-5.2")
    kinds = list(CONFIGS["glm-5.2"]["indexer_types"])
    kinds[layer] = "full" if kinds[layer] == "shared" else "shared"
    config = CONFIGS["glm-5.2"] | {"indexer_types": kinds, "index_topk_freq": None}
    for file in made.path.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps(config))
    indexer = f"model.layers.{layer}.self_attn.indexer."
    wrong = "is missing" if kinds[layer] == "full" else "the config says that layer 4 shares"
    with pytest.raises(CheckpointError, match=f"tensor {indexer}.* {wrong}") as caught:
        start_alone(tmp_path)
    assert "\n" not in str(caught.value)

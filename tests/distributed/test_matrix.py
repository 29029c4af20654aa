"""The same answers at every world size, in every layout, whatever the chunks and the batch.

One torchrun per world size runs all cases (`matrix.py`). They are compared with the plainest case
on one rank, which tests/oracle compares with transformers. All of it is float32.
"""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.jobs import Cast
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.source import open_source
from dsv3.config import ParallelConfig
from dsv3.text.call_marks import DEEPSEEK
from dsv3.text.tools import CallForm
from tests.call_marks import copy_demo, marked_tokenizer
from tests.forked import run_forked
from tests.integer_files import mixed_kinds_by_hand
from tests.oracle.families import Oracle

ROOT = Path(__file__).resolve().parents[2]
CACHE = {"kv_cache_size": "2048tok"}
SMALL = CACHE | {"max_batch_tokens": 16, "max_running": 4}
STATIC = SMALL | {"static": True}
# Pages of running requests are taken away, and kept in host memory.
SPARSE_CROWDED = {"kv_cache_size": "320tok", "max_batch_tokens": 64, "kv_host_cache": "1MiB"}
NGRAM = {"speculative_method": "ngram"}
# Name of the case -> checkpoint, settings. The first of each checkpoint is the plainest.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("v3-fp8", CACHE),
    "fp8, small steps": ("v3-fp8", SMALL),
    "fp8, kept": ("v3-fp8", SMALL | {"weights": "fp8"}),
    "fp8, absorb": ("v3-fp8", CACHE | {"attn_impl": "absorb"}),
    "fp8, absorb, replicated": ("v3-fp8", SMALL | {"attn_impl": "absorb", "kv_shard": "none"}),
    "fp8, replicated": ("v3-fp8", CACHE | {"kv_shard": "none"}),
    "fp8, naive": ("v3-fp8", CACHE | {"attn_impl": "naive"}),
    "fp8, naive, small steps": ("v3-fp8", SMALL | {"attn_impl": "naive"}),
    "fp8, small cache": ("v3-fp8", {"kv_cache_size": "256tok", "max_batch_tokens": 64}),
    "fp8, no reuse": ("v3-fp8", SMALL | {"prefix_reuse": False}),
    "fp8, pipelined": ("v3-fp8", CACHE | {"pipeline_depth": 1}),
    "fp8, split rows": ("v3-fp8", SMALL | {"sequence_parallel": 3}),
    "fp8, static, small steps": ("v3-fp8", STATIC | {"pipeline_depth": 1}),
    "fp8, static, replicated": ("v3-fp8", STATIC | {"kv_shard": "none"}),
    "fp8, static, naive": ("v3-fp8", STATIC | {"attn_impl": "naive"}),
    "lite": ("v2-lite", CACHE),
    "lite, small steps": ("v2-lite", SMALL),
    "lite, naive": ("v2-lite", SMALL | {"attn_impl": "naive"}),
    "crowd": ("crowd", CACHE),
    "sparse": ("v3.2-long", CACHE),
    "sparse, small steps": ("v3.2-long", SMALL),
    "sparse, absorb": ("v3.2-long", CACHE | {"attn_impl": "absorb", "pipeline_depth": 1}),
    "sparse, naive, small steps": ("v3.2-long", SMALL | {"attn_impl": "naive"}),
    "sparse, replicated": ("v3.2-long", SMALL | {"kv_shard": "none", "prefix_reuse": False}),
    "sparse, small cache": ("v3.2-long", SPARSE_CROWDED),
    "sparse, static, small steps": ("v3.2-long", STATIC | {"pipeline_depth": 1}),
    "sparse, drafts": ("v3.2-long", CACHE | {"speculative_tokens": 2}),
    "sparse, drafts, crowded": ("v3.2-long", SPARSE_CROWDED | {"speculative_tokens": 3}),
    "sparse, drafts, naive": ("v3.2-long", SMALL | {"attn_impl": "naive", "speculative_tokens": 1}),
    "sparse, drafts, static": ("v3.2-long", STATIC | {"speculative_tokens": 2}),
    "sparse, static, naive": ("v3.2-long", STATIC | {"attn_impl": "naive"}),
    "demo": ("demo", CACHE),
    "demo, absorb": ("demo", CACHE | {"max_batch_tokens": 100, "attn_impl": "absorb"}),
    "demo, drafts": ("demo", CACHE | {"speculative_tokens": 3, "max_batch_tokens": 100}),
    "demo, drafts, replicated": ("demo", CACHE | {"speculative_tokens": 1, "kv_shard": "none"}),
    "demo, repeated text": ("demo", CACHE | {"speculative_tokens": 4} | NGRAM),
    "demo, static": ("demo", STATIC | {"max_batch_tokens": 100}),
    "mixed": ("mixed", CACHE),
    "mixed, small steps": ("mixed", SMALL | {"attn_impl": "absorb"}),
    "mixed, naive, kept": ("mixed", CACHE | {"attn_impl": "naive", "weights": "fp8"}),
    "demo, naive, kept": ("demo", CACHE | {"attn_impl": "naive", "weights": "fp8"}),
}
# So small that a running request gives way to another one.
CROWDED = {"kv_cache_size": "320tok", "max_batch_tokens": 200, "max_running": 3}
# Data-parallel groups -> name of the case -> checkpoint, settings.
GROUPS: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    2: {
        "fp8, absorb, replicated": ("v3-fp8", SMALL | {"attn_impl": "absorb", "kv_shard": "none"}),
        "fp8, naive": ("v3-fp8", CACHE | {"attn_impl": "naive", "moe_dispatch": "allreduce"}),
        "crowd": ("crowd", CROWDED | {"pipeline_depth": 1, "moe_dispatch": "alltoall"}),
        "fp8, static, small steps": ("v3-fp8", STATIC | {"moe_dispatch": "alltoall"}),
        "sparse": ("v3.2-long", CACHE),
        "mixed, small steps": ("mixed, converted", SMALL | {"moe_dispatch": "alltoall"}),
        "demo, drafts": ("converted", CACHE | {"speculative_tokens": 2}),
        "demo": ("converted", CACHE | {"sequence_parallel": 64, "moe_dispatch": "alltoall"}),
    },
    4: {
        "fp8, small steps": ("v3-fp8", SMALL),
        "fp8, static, small steps": ("v3-fp8", STATIC | {"pipeline_depth": 1}),
        "sparse, small steps": ("v3.2-long", SMALL | {"attn_impl": "absorb"}),
        "sparse, drafts, static": ("v3.2-long", STATIC | {"speculative_tokens": 2}),
        "crowd": ("crowd", CROWDED | {"kv_host_cache": "1MiB"}),
    },
}
CASES |= {
    f"{name}, in {groups}": case for groups, cases in GROUPS.items() for name, case in cases.items()
}
# One rank's answers are those that all others are compared with; the more ranks, the fewer steps.
MAX_TOKENS = {1: 12, 2: 8, 4: 8, 8: 4}
# Eight processes on two cores: a handful of cases.
FEW = ("fp8", "fp8, naive", "lite, small steps", "sparse, drafts", "crowd, in 2")
PLAINEST = {"v3-fp8": "fp8", "v2-lite": "lite", "demo": "demo", "crowd": "crowd"}
PLAINEST["v3.2-long"] = "sparse"
PLAINEST["converted"] = "demo"
# int8, int4 and FP8; tests/oracle/test_integer_values.py compares such a one with transformers.
PLAINEST |= dict.fromkeys(("mixed", "mixed, converted"), "mixed")
# Contexts shorter than the number of ranks, one that crosses a page, one of two pages.
LENGTHS = {"v3-fp8": (1, 2, 3, 7, 60, 100), "v2-lite": (1, 5, 90), "demo": (2, 3, 640)}
LENGTHS["crowd"] = (58, 58, 58, 58, 60, 60)
# Attention is sparse beyond 40 positions.
LENGTHS["v3.2-long"] = (1, 38, 150, 200)
VOCABULARY = {"v3-fp8": 331, "v2-lite": 331, "demo": 2048, "crowd": 331, "v3.2-long": 331}
Run = Callable[[int], dict[str, Any]]


def groups_of(name: str) -> int:
    """Return the data-parallel groups of a case."""
    return int(name.rpartition(", in ")[2]) if ", in " in name else 1


@pytest.fixture(scope="module")
def run(oracle: Callable[[str], Oracle], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function from a world size to its results, run once."""
    folder = tmp_path_factory.mktemp("matrix")
    paths = {family: str(oracle(family).path) for family in ("v3-fp8", "v2-lite", "v3.2-long")}
    demo = copy_demo(folder / "demo", CallForm.DEEPSEEK.marks)
    paths |= {"demo": str(demo), "crowd": paths["v3-fp8"], "converted": str(folder / "tp2dp2")}
    with open_source(demo) as source:
        plan = make_plan(source, ParallelConfig(world_size=4, tp=2, dp=2))
        convert(source, plan, folder / "tp2dp2", workers=2)
    paths |= {name: str(folder / name) for name in ("mixed", "mixed, converted")}
    with open_source(oracle("v3-fp8").path) as source:
        kinds = mixed_kinds_by_hand(source)
        for name, layout in (("mixed", None), ("mixed, converted", ParallelConfig(world_size=8))):
            plan = make_plan(source, layout, Cast.MIXED, integers=kinds)
            convert(source, plan, folder / name, workers=2)
    draw = random.Random(0)
    prompts = {
        name: [[draw.randrange(2, VOCABULARY[name]) for _ in range(n)] for n in lengths]
        for name, lengths in LENGTHS.items()
    }
    prompts["converted"] = prompts["demo"]
    prompts["mixed"] = prompts["mixed, converted"] = prompts["v3-fp8"]

    @cache
    def run(world_size: int) -> dict[str, Any]:
        cases = FEW if world_size == 8 else CASES
        names = [name for name in cases if world_size % groups_of(name) == 0]
        job = {
            "cases": {n: (*CASES[n], groups_of(n)) for n in names},
            "paths": paths,
            "prompts": prompts,
            "max_tokens": MAX_TOKENS[world_size],
        }
        job_file, result = folder / f"job{world_size}.json", folder / f"result{world_size}.json"
        job_file.write_text(json.dumps(job))
        script = str(Path(__file__).with_name("matrix.py"))
        done = run_forked([script, str(job_file), str(result)], num_ranks=world_size, seconds=1800)
        assert done.returncode == 0, done.stderr[-8000:]
        return json.loads(result.read_text())

    return run


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_answers(run: Run, world_size: int) -> None:
    wanted, got = run(1), run(world_size)
    for name, result in got.items():
        plain = wanted[PLAINEST[CASES[name][0]]]["answers"]
        assert result["answers"].keys() == plain.keys()
        for request, tokens in result["answers"].items():
            want = plain[request]
            if request == "scored":
                assert tokens == pytest.approx(want, abs=1e-3), name
            else:
                length = MAX_TOKENS[world_size]
                assert tokens == want[:length] and len(tokens) == length, (name, request)


def test_the_answers_say_something(run: Run) -> None:
    """Sampled answers differ from greedy ones, and prompts from each other."""
    for name in PLAINEST.values():
        answers = run(1)[name]["answers"].items()
        answers = {k: v for k, v in answers if k.startswith(("greedy", "sampled"))}
        different = {tuple(tokens) for tokens in answers.values()}
        assert len(different) >= len(answers) - 1, name


def test_calls_of_strict_tools_have_their_form(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="schemas need llguidance: pip install llguidance")
    demo = marked_tokenizer(tmp_path / "demo", CallForm.DEEPSEEK.marks)
    answers = run(1)["demo"]["answers"]
    for i in range(3):
        text = demo.decode(answers[f"calling {i}"], skip_special_tokens=False)
        begins = (f'f{DEEPSEEK.sep}{{"x": ', f"function{DEEPSEEK.sep}f\n```")
        marks = DEEPSEEK.calls + DEEPSEEK.call
        assert text.startswith(tuple(marks + begin for begin in begins)), text


def test_penalties_and_biases_are_felt(run: Run) -> None:
    """Tokens with large biases are the only ones; penalties make them take turns."""
    answers = {name: run(1)[name]["answers"] for name in PLAINEST.values()}
    for name, found in answers.items():
        assert set(found["adjusted 2"]) <= {7, 300}, name
    assert any(set(found["adjusted 2"]) == {7, 300} for found in answers.values())
    assert answers["fp8"]["adjusted 0"] != answers["fp8"]["greedy 0"]
    assert set(answers["fp8"]["adjusted 4"]) == {5}


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_cache_bytes(run: Run, world_size: int) -> None:
    """Every rank really allocates one Nth of its group's, unless asked to replicate.

    The tokens are the same in every group, whatever its ranks.
    """
    for name, result in run(world_size).items():
        if name.startswith("crowd, in"):
            continue
        one = run(1)[name.rpartition(", in ")[0] or name]["stats"]["ranks"][0]
        ranks, groups = result["stats"]["ranks"], groups_of(name)
        parts = 1 if "replicated" in name else world_size // groups
        assert [r["rank"] for r in ranks] == list(range(world_size))
        if not (name.startswith("sparse") and "naive" in name):
            # Beside cached heads, every rank has all index keys.
            bytes_of = [r["cache_bytes"] * parts for r in ranks]
            assert bytes_of == [one["cache_bytes"]] * world_size, name
        assert {r["cache_tokens"] for r in ranks} == {groups * one["cache_tokens"]}
        assert all(r["weight_bytes"] <= one["weight_bytes"] for r in ranks)


def test_weight_bytes(run: Run) -> None:
    """Experts are spread and dense layers split: four ranks hold little more than one does."""
    for name in ("fp8", "demo"):
        one = run(1)[name]["stats"]["ranks"][0]["weight_bytes"]
        four = [r["weight_bytes"] for r in run(4)[name]["stats"]["ranks"]]
        assert one <= sum(four) < 1.6 * one and max(four) < 0.4 * one
    # Part edges of the random checkpoint cut blocks: those matrices are dequantized at load.
    for kept, plain, share in (("demo, naive, kept", "demo", 0.5), ("fp8, kept", "fp8", 0.8)):
        kept_bytes, plain_bytes = (
            run(1)[name]["stats"]["ranks"][0]["weight_bytes"] for name in (kept, plain)
        )
        assert kept_bytes < share * plain_bytes


def test_small_steps_and_small_caches_were_just_that(run: Run) -> None:
    """The cases do what their names say."""
    steps = {name: result["stats"]["events"]["steps"] for name, result in run(1).items()}
    assert steps["fp8, small steps"] > 1.5 * steps["fp8"]
    assert steps["fp8, small cache"] > steps["fp8"]
    assert run(1)["fp8"]["stats"]["tokens"]["reused"] > 0
    assert run(1)["fp8, no reuse"]["stats"]["tokens"]["reused"] == 0


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_static_steps_held_prompts(run: Run, world_size: int) -> None:
    """Steps with prompts have at least 64 rows; those of a few sequences alone have fewer.

    In four groups, some group adjusts logits in nearly every step, which then runs eagerly.
    """
    cases = {n: result["static rows"] for n, result in run(world_size).items() if "static" in n}
    assert len(cases) == 7 + (world_size > 1) + 2 * (world_size > 2)
    assert all(rows and rows[0] < 8 for rows in cases.values()), cases
    assert all(rows[-1] >= 64 for n, rows in cases.items() if groups_of(n) < 4), cases


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_drafts_were_accepted_and_rejected(run: Run, world_size: int) -> None:
    """A trained model accepts drafts even after random prompts; a random one nearly none.

    How many depends on the processor: bits of a product decide between tokens of random prompts.
    """
    for name, result in run(world_size).items():
        tokens = result["stats"]["tokens"]
        if "drafts" not in name and "repeated" not in name:
            assert tokens["drafted"] == 0, name
        elif name.startswith("demo, drafts"):
            assert 0.05 * tokens["drafted"] < tokens["accepted"] < tokens["drafted"], name
        elif "repeated" in name:  # few, but a text that repeats itself goes on so
            assert 0 < tokens["accepted"] <= tokens["drafted"], name
        else:
            assert 0 <= tokens["accepted"] < 0.5 * tokens["drafted"], name


def test_groups_share_the_experts_and_preempt(run: Run) -> None:
    """Every group has its own dense layers; of the experts a rank has one part of the world's."""
    for world_size, groups in ((2, 2), (4, 2), (4, 4)):
        events = run(world_size)[f"crowd, in {groups}"]["stats"]["events"]
        assert events["preemptions"] > 0 and events["evictions"] > 0
    assert events["offloads"] > 0
    held = {
        name: run(4)[name]["stats"]["ranks"][0]["weight_bytes"]
        for name in ("fp8", "fp8, naive, in 2", "fp8, small steps, in 4")
    }
    one = run(1)["fp8"]["stats"]["ranks"][0]["weight_bytes"]
    assert sorted(held.values()) == list(held.values()) and max(held.values()) < one

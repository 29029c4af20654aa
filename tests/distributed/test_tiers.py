"""Host-memory and disk tiers: equal answers, and disk pages are found at other world sizes.

Four ranks write a directory, which one, two and eight ranks then read, each in a torchrun job.
"""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dsv3.config_files import DEMO
from tests.forked import run_forked

ROOT = Path(__file__).resolve().parents[2]
LENGTH, NUM_PROMPTS, FULL = 200, 2, 192
SMALL = {"kv_cache_size": "256tok", "max_running": 1}
KINDS: dict[str, dict[str, Any]] = {
    "latent": {},
    "heads": {"attn_impl": "naive"},
    "fp8": {"kv_dtype": "fp8"},
}


class World(NamedTuple):
    results: dict[str, Any]
    stderr: str


def run(folder: Path, world_size: int, cases: dict[str, dict[str, Any]]) -> World:
    draw = random.Random(0)
    prompts = [[draw.randrange(5, 300) for _ in range(LENGTH)] for _ in range(NUM_PROMPTS)]
    cases = {name: SMALL | settings for name, settings in cases.items()}
    job = {"path": str(DEMO), "prompts": prompts, "cases": cases}
    job_file, result = folder / f"job{world_size}.json", folder / f"result{world_size}.json"
    job_file.write_text(json.dumps(job))
    script = str(Path(__file__).with_name("tiers.py"))
    done = run_forked([script, str(job_file), str(result)], num_ranks=world_size, seconds=1800)
    assert done.returncode == 0, done.stderr[-8000:]
    return World(json.loads(result.read_text()), done.stderr)


def damage(cache: Path) -> None:
    """Change a byte in the middle of one file of each format."""
    for folder in cache.iterdir():
        file = min(folder.iterdir())
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, World]:
    folder = tmp_path_factory.mktemp("tiers")
    cache = folder / "cache"
    disk = {"kv_disk_cache": f"{cache}:1GiB"}
    few = {"kv_host_cache": "1MiB"} | disk
    host = {"host": {"kv_host_cache": "1GiB"}}
    found = {name: disk | settings for name, settings in KINDS.items()}
    found["replicated"] = found["latent"] | {"kv_shard": "none", "pipeline_depth": 1}
    plain = {f"plain, {name}": settings for name, settings in KINDS.items()}
    results = {
        4: run(folder, 4, {name: few | s for name, s in KINDS.items()}),
        1: run(folder, 1, plain | found),
        8: run(folder, 8, {"latent": few}),
    }
    damage(cache)  # last, because the damage must not affect the other worlds
    results[2] = run(folder, 2, host | found)
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_same_answers(worlds: dict[int, World], world_size: int) -> None:
    plain = {name: worlds[1].results[f"plain, {name}"]["answers"] for name in KINDS}
    assert plain["latent"] == plain["heads"]
    assert plain["latent"][:NUM_PROMPTS] == plain["latent"][NUM_PROMPTS:]
    for name, result in worlds[world_size].results.items():
        assert result["answers"] == plain["fp8" if "fp8" in name else "latent"], name


def test_without_tiers_everything_is_computed_twice(worlds: dict[int, World]) -> None:
    for name in KINDS:
        assert worlds[1].results[f"plain, {name}"]["cached"] == [0] * 2 * NUM_PROMPTS


def test_evicted_prefixes_are_restored(worlds: dict[int, World]) -> None:
    for world_size, names in ((2, ["host"]), (4, KINDS)):
        for name in names:
            result = worlds[world_size].results[name]
            assert result["cached"] == [0] * NUM_PROMPTS + [FULL] * NUM_PROMPTS, name
            assert result["stats"]["events"]["host_hits"] == NUM_PROMPTS * FULL // 64


@pytest.mark.parametrize("world_size", [1, 8])
def test_pages_of_four_ranks_are_found_at_other_world_sizes(
    worlds: dict[int, World], world_size: int
) -> None:
    for name, result in worlds[world_size].results.items():
        if "plain" in name:
            continue
        assert result["cached"] == [FULL] * 2 * NUM_PROMPTS, name
        assert result["stats"]["tokens"]["reused"] == FULL * 2 * NUM_PROMPTS
        events = result["stats"]["events"]
        assert events["disk_hits"] >= NUM_PROMPTS * FULL // 64 and not events["disk_writes"]
    assert "damaged" not in worlds[world_size].stderr


def test_damaged_pages_are_computed_again_and_written_again(worlds: dict[int, World]) -> None:
    assert worlds[2].stderr.count("damaged, foreign or unreadable") == len(KINDS)
    for name in KINDS:
        result = worlds[2].results[name]
        cached = result["cached"]
        assert sorted(cached[:NUM_PROMPTS])[1:] == [FULL] * (NUM_PROMPTS - 1)
        assert min(cached) < FULL and cached[NUM_PROMPTS:] == [FULL] * NUM_PROMPTS
        assert result["stats"]["events"]["disk_writes"] == 1
    assert worlds[2].results["replicated"]["cached"] == [FULL] * 2 * NUM_PROMPTS


def test_stats_report_the_bytes_of_the_tiers(worlds: dict[int, World]) -> None:
    for name in KINDS:
        stats = worlds[4].results[name]["stats"]
        assert all(0 < rank["host_cache_bytes"] <= 2**20 for rank in stats["ranks"])
        assert stats["disk_cache_bytes"] > 0

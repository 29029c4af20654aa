"""Eviction policies: their heap, their records of pages, and hit rates on small traces."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchlib.replay import read_trace, replay
from dsv3.cache.eviction import CacheEntry, EvictionPolicy, LeastRecentlyUsed, make_policy
from dsv3.cache.pages import PageAllocator
from dsv3.cache.prefix import PrefixTree
from dsv3.errors import ConfigError

BENCH = Path(__file__).resolve().parents[2] / "launch" / "bench.py"


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(ValueError, match="eviction policy 'fifo' is not one of cost, lru"):
        make_policy("fifo", 10)


def test_the_lowest_rating_is_taken_first() -> None:
    """Compare the heap with a plain dictionary under random offers, re-ratings and withdrawals."""
    rng, policy = random.Random(3), LeastRecentlyUsed()
    entries = [Page(str(i)) for i in range(50)]
    offered: dict[CacheEntry, int] = {}
    for _ in range(20_000):
        entry = rng.choice(entries)
        action = rng.random()
        if action < 0.5:
            entry.last_use = rng.randrange(1000)
            policy.offer(entry)
            offered[entry] = entry.last_use
        elif action < 0.7:
            policy.withdraw(entry)
            offered.pop(entry, None)
        elif offered:
            taken = policy.take()
            assert offered.pop(taken) == min([taken.last_use, *offered.values()])
        assert all((entry.heap_index >= 0) == (entry in offered) for entry in entries)


def reference_lru(requests: list[list[int]], capacity: int) -> int:
    """Count the hits of a cache that evicts the oldest leaf block, one at a time."""
    used: dict[tuple[int, ...], int] = {}
    hits = 0
    for now, blocks in enumerate(requests):
        prefixes = [tuple(blocks[: i + 1]) for i in range(len(blocks))]
        hits += next((i for i, p in enumerate(prefixes) if p not in used), len(prefixes))
        used.update(dict.fromkeys(prefixes, now))
        while len(used) > capacity:
            inner = {p[:-1] for p in used}
            del used[min((p for p in used if p not in inner), key=lambda p: used[p])]
    return hits


@pytest.mark.parametrize("capacity", [0, 1, 7, 20, 60])
def test_lru_equals_a_reference_implementation(capacity: int) -> None:
    rng = random.Random(capacity)
    requests = [[rng.randrange(3) for _ in range(rng.randrange(1, 7))] for _ in range(300)]
    assert replay(requests, capacity, "lru")["hits"] == reference_lru(requests, capacity)


class Page(CacheEntry):
    """An entry without a tree."""

    def __init__(self, name: str, parent: CacheEntry | None = None) -> None:
        super().__init__(parent, name.encode())
        self.name = name


@pytest.fixture
def pages() -> dict[str, Page]:
    root = Page("root")
    return {"root": root, **{name: Page(name, root) for name in "abcdefg"}}


def test_pages_share_the_visit_that_added_them(pages: dict[str, Page]) -> None:
    root, a, b, c, *_ = pages.values()
    policy = make_policy("cost", 10)
    policy.hit([root])
    policy.inserted(a, root)
    policy.inserted(b, a)
    policy.hit([root, a])
    policy.inserted(c, a)
    assert c.visit is a.visit is not b.visit
    assert b.visit and c.visit and (b.visit.num_new, c.visit.num_new) == (2, 1)
    assert (a.num_hits, b.num_hits) == (1, 0)


def test_requests_that_run_side_by_side_count_their_own_pages(pages: dict[str, Page]) -> None:
    root, a, b, c, d, e, *_ = pages.values()
    policy = make_policy("cost", 10)
    policy.hit([root])
    policy.inserted(a, root)
    policy.hit([root, a])
    policy.hit([root, a])
    for page, parent in ((b, a), (c, a), (d, b), (e, c)):
        policy.inserted(page, parent)
    assert b.visit is d.visit is not c.visit is e.visit
    assert b.visit and c.visit and (b.visit.num_new, c.visit.num_new) == (2, 2)


def test_a_copied_tail_inherits_hits_and_visit(pages: dict[str, Page]) -> None:
    root, a, tail, copy, more, *_ = pages.values()
    policy = make_policy("cost", 10)
    policy.hit([root])
    policy.inserted(a, root)
    policy.inserted(tail, a)
    policy.hit([root, a], tail)
    policy.replaced(tail, copy, a)
    policy.removed(tail, evicted=False)
    policy.inserted(more, copy)
    assert a.visit is copy.visit is more.visit
    assert copy.num_hits == 1 and more.visit and more.visit.num_new == 1


def test_an_evicted_page_that_returns_keeps_its_hits(pages: dict[str, Page]) -> None:
    root, a, b, *_ = pages.values()
    policy = make_policy("cost", 10)
    for expected_hits in range(3):
        policy.hit([root])
        a.num_hits = 0
        policy.inserted(a, root)
        assert a.num_hits == expected_hits
        assert a.visit and a.visit.num_new == (expected_hits == 0)
        policy.removed(a, evicted=True)
    policy.inserted(b, root)
    policy.removed(b, evicted=False)
    policy.inserted(b, root)
    assert b.num_hits == 0


class Traffic:
    """Requests as lists of block numbers; `new` returns unused numbers."""

    def __init__(self, seed: int = 1) -> None:
        self.rng, self._last = random.Random(seed), 0

    def new(self, count: int) -> list[int]:
        self._last += count
        return list(range(self._last - count, self._last))

    def dialogues(self, num_requests: int, scans: float) -> list[list[int]]:
        """Turns of eight concurrent dialogues, mixed with long prompts that occur once."""
        system = self.new(2)
        dialogues: list[list[int]] = [[] for _ in range(8)]
        requests = []
        for _ in range(num_requests):
            if self.rng.random() < scans:
                requests.append(self.new(self.rng.randrange(30, 90)))
                continue
            index = self.rng.randrange(8)
            if not dialogues[index] or self.rng.random() < 0.1:
                dialogues[index] = [*system, *self.new(5)]
            dialogues[index] += self.new(2)
            requests.append([*dialogues[index], *self.new(1)])
        return requests


def test_scans_do_not_flush_dialogues() -> None:
    requests = Traffic().dialogues(2000, scans=0.5)
    cost, lru = (replay(requests, 300, policy)["hit_rate"] for policy in ("cost", "lru"))
    without = replay(Traffic().dialogues(2000, scans=0.0), 300, "lru")
    share = without["hits"] / without["requests"] / 2
    assert cost * sum(map(len, requests)) / len(requests) > 0.8 * share
    assert cost > 1.4 * lru


def test_cost_equals_lru_where_lru_is_best() -> None:
    """Dialogues only, in a cache that nearly holds them: recency is the best predictor."""
    requests = Traffic().dialogues(3000, scans=0.0)
    cost, lru = (replay(requests, 250, policy)["hit_rate"] for policy in ("cost", "lru"))
    assert cost > 0.98 * lru > 0.5


def test_a_loop_larger_than_the_cache_is_kept_in_part() -> None:
    requests = [[i % 50, 100 + i % 50, 200 + i % 50] for i in range(2000)]
    assert replay(requests, 100, "lru")["hits"] == 0
    assert replay(requests, 100, "cost")["hit_rate"] > 0.4


def test_popular_prefixes_stay() -> None:
    rng = random.Random(5)
    requests = []
    for i in range(6000):
        topic = min(int(rng.paretovariate(1.0)), 2000)
        requests.append([topic, 10_000 + topic, 100_000 + 2 * i, 100_001 + 2 * i])
    cost, lru = (replay(requests, 60, policy)["hit_rate"] for policy in ("cost", "lru"))
    assert cost > 1.15 * lru


def test_the_policy_follows_when_traffic_changes() -> None:
    """Prefixes that are no longer popular are evicted in favour of those that are."""
    rng, requests = random.Random(7), []
    for i in range(8000):
        topic = (0 if i < 4000 else 10_000) + min(int(rng.paretovariate(1.0)), 2000)
        requests.append([topic, 50_000 + topic, 100_000 + i])
    first, both = (replay(requests[:n], 60, "cost")["hits"] for n in (4000, 8000))
    assert both - first > 0.9 * first


def tree_of(policy: EvictionPolicy, num_pages: int) -> tuple[PageAllocator, PrefixTree]:
    pages = PageAllocator(num_pages + 1)
    return pages, PrefixTree(pages, 1, policy)


def run(pages: PageAllocator, tree: PrefixTree, tokens: list[int]) -> None:
    match = tree.match(tokens)
    tree.hold(match)
    tree.count(match)
    assert tree.make_room(len(tokens) - match.num_tokens)
    seq_pages = match.pages + pages.allocate(len(tokens) - match.num_tokens)
    tree.insert(tokens, len(tokens), seq_pages)
    pages.release(seq_pages)


def test_deep_pages_are_worth_more() -> None:
    """A slightly older page is kept if its prefix is much longer."""
    kept = {}
    for depth_cost in (0.0, 0.5):
        pages, tree = tree_of(make_policy("cost", 64, depth_cost), 64)
        for first, count in ((0, 16), (100, 8), (200, 40)):
            run(pages, tree, list(range(first, first + count)))
        assert tree.make_room(8)
        kept[depth_cost] = tree.match(list(range(16))).num_tokens
    assert kept == {0.0: 8, 0.5: 16}


def write_trace(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def request(*blocks: object) -> dict[str, object]:
    return {"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": blocks}


def test_replay_reads_ids_of_any_kind(tmp_path: Path) -> None:
    path = write_trace(
        tmp_path / "trace", request("a", 2**70, -1), request(), request("a", 2**70, "b")
    )
    path.write_text(path.read_text() + "\n")
    assert read_trace(path) == [[0, 1, 2], [], [0, 1, 3]]


def test_replay_prints_one_object(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace", request(1, 2, 3), request(1, 2, 4), request(1, 2, 3))
    report = tmp_path / "report.json"
    command: list[str | Path] = [
        sys.executable,
        BENCH,
        "cache",
        path,
        "--capacity",
        "10",
        "--json",
        report,
    ]
    subprocess.run(command, capture_output=True, check=True)
    rows = json.loads(report.read_text())["rows"]
    assert [row["policy"] for row in rows] == ["lru", "cost"]
    assert rows[1]["hit rate %"] == pytest.approx(500 / 9)
    counts = replay(read_trace(path), 10, "cost")
    assert (counts["requests"], counts["blocks"], counts["evictions"]) == (3, 9, 0)


@pytest.mark.parametrize(
    "line", ["{broken", "[]", "{}", '{"hash_ids": null}', '{"hash_ids": [[]]}']
)
def test_replay_names_the_line_that_is_wrong(tmp_path: Path, line: str) -> None:
    path = write_trace(tmp_path / "trace", request(1))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError, match="trace:2: not a request with hash_ids"):
        read_trace(path)

"""The tier index: offloads, restores, eviction from host memory, and the disk tier."""

import dataclasses

import numpy as np
import pytest

from dsv3.cache.children import encode
from dsv3.cache.pages import PageAllocator
from dsv3.cache.prefix import Match
from dsv3.cache.prefix_hash import chain_hash, chain_hashes
from dsv3.cache.tiers import Moves, PageKey, Tiers, extend_keys
from dsv3.engine.step_plan import StepPlan
from dsv3.request import Completion, Request, SamplingParams
from tests.paper_runner import PaperDisk, answer, finish, paper_engine

PAGE = 4


def keys_of(tokens: list[int], page_size: int = PAGE) -> list[PageKey]:
    keys: list[PageKey] = []
    extend_keys(keys, tokens, len(tokens) // page_size, page_size)
    return keys


def evict(tiers: Tiers, tokens: list[int], first_page: int = 1) -> None:
    """Offload the full pages of a sequence in the prefix tree's order: from the end."""
    for i in reversed(range(len(tokens) // PAGE)):
        parent = chain_hash(b"", encode(tokens[: i * PAGE]))
        tiers.offload(first_page + i, parent, encode(tokens[i * PAGE : (i + 1) * PAGE]))


def found(tiers: Tiers, tokens: list[int], on_device: int = 0) -> int:
    match = Match(list(range(100, 100 + on_device)), on_device * PAGE)
    return len(tiers.extend(match, keys_of(tokens)).host_pages)


def test_keys_do_not_depend_on_the_page_size() -> None:
    tokens = list(range(192 * 2))
    flat = [key[0] for key in keys_of(tokens, 64)]
    assert [h for key in keys_of(tokens, 192) for h in key] == flat
    assert flat == chain_hashes(b"", encode(tokens))
    assert keys_of(tokens[:64] + [5] * 64, 64)[0] == keys_of(tokens, 64)[0]
    assert keys_of([5, *tokens], 64)[1] != keys_of(tokens, 64)[1]


def test_offloaded_pages_are_found_from_the_next_plan_on() -> None:
    tiers, tokens = Tiers(4, PAGE), list(range(10))
    evict(tiers, tokens)
    assert found(tiers, tokens) == 0
    moves = tiers.draw()
    assert [page for page, _ in moves.offload] == [2, 1] and not moves.restore
    assert found(tiers, tokens) == 2 and found(tiers, tokens, on_device=1) == 1
    assert found(tiers, [*tokens[:4], 99, *tokens[5:]]) == 1
    evict(tiers, tokens)
    assert not tiers.draw() and tiers.num_offloaded == 2


def test_partial_pages_are_not_kept() -> None:
    tiers = Tiers(4, PAGE)
    tiers.offload(1, b"", encode([1, 2, 3]))
    assert not tiers.draw()


def test_restoring() -> None:
    tiers = Tiers(4, PAGE)
    tokens = list(range(8))
    pages = PageAllocator(5)
    evict(tiers, tokens)
    tiers.draw()
    match = tiers.extend(Match([], 3, partial_page=9), keys_of(tokens))
    assert (match.num_tokens, match.held_pages) == (8, [])
    tiers.hold(match.host_pages)
    taken = tiers.restore(match.host_pages, pages)
    assert tiers.draw() == Moves([], list(zip(match.host_pages, taken, strict=True)))
    assert pages.num_free == 2 and found(tiers, tokens) == 2


def test_host_memory_evicts_the_least_recently_used_prefix_from_its_end() -> None:
    tiers = Tiers(4, PAGE)
    old = list(range(8))
    new = list(range(50, 58))
    for tokens in (old, new):
        evict(tiers, tokens)
        tiers.draw()
    tiers.hold(tiers.extend(Match([], 0), keys_of(old)).host_pages)
    tiers.draw()
    evict(tiers, list(range(90, 94)))
    tiers.draw()
    assert (found(tiers, old), found(tiers, new)) == (2, 1)


def test_a_host_page_is_not_written_while_it_is_read() -> None:
    tiers = Tiers(2, PAGE)
    old = list(range(8))
    new = list(range(50, 62))
    evict(tiers, old)
    tiers.draw()
    tiers.hold(tiers.extend(Match([], 0), keys_of(old)).host_pages)
    evict(tiers, new)
    assert not tiers.draw() and found(tiers, old) == 2
    evict(tiers, new)
    assert len(tiers.draw().offload) == 2 and found(tiers, old) == 0


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_host_pages", [0, 40])
def test_an_evicted_prefix_comes_back_without_being_computed(
    depth: int, num_host_pages: int
) -> None:
    engine, _ = paper_engine(
        12, max_batch_tokens=64, max_running=2, pipeline_depth=depth, num_host_pages=num_host_pages
    )
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    prompts = [[100 + i] * 30 for i in range(3)]
    for turn in range(3):
        for i, prompt in enumerate(prompts):
            request = Request(request_id=f"{turn} {i}", prompt_ids=prompt, params=params)
            engine.add(request)
            done = finish(engine)[request.request_id]
            assert done.token_ids == answer(request)[0]
            # Seven full pages; and some tokens of the tail if it is still on the device.
            assert done.cached_tokens >= (28 if turn and num_host_pages else 0)
    if num_host_pages:
        assert engine.metrics.host_hits >= 2 * 7 and engine.metrics.offloads >= 3 * 7
        assert engine.metrics.prefill_tokens <= 3 * 30 + 6 * 2
    else:
        assert engine.metrics.host_hits == 0 and engine.metrics.prefill_tokens > 200


class StuckDisk(PaperDisk):
    """A disk that accepts all pages, and whose reads do not finish until `gives` is set."""

    gives = False
    damaged = 0.0

    def accept(self, key: PageKey) -> bool:
        return key not in self.files

    def run(self, plan: StepPlan, host: np.ndarray) -> dict[int, bool]:
        if self.gives:
            return super().run(plan, host)
        plan = dataclasses.replace(plan, confirm_fetched=plan.confirm_fetched[:0])
        return super().run(plan, host)


def ask(name: str, token: int, max_tokens: int = 3) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=name, prompt_ids=[token] * 30, params=params)


@pytest.mark.parametrize("patience", [0.05, 60.0])
def test_waiting_for_the_disk(patience: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other requests run meanwhile; a request that has waited too long computes its prefix."""
    monkeypatch.setattr("dsv3.engine.scheduler._DISK_PATIENCE", patience)
    disk = StuckDisk()
    engine, _ = paper_engine(12, max_batch_tokens=64, max_running=2, num_host_pages=8, disk=disk)
    for i in range(4):
        engine.add(ask(f"first {i}", 100 + i))
        finish(engine)
    assert disk.files
    waiting, other = ask("waiting", 100), ask("other", 200, max_tokens=8)
    engine.add(waiting)
    engine.add(other)
    done: dict[str, Completion] = {}
    while "other" not in done:
        done |= {o.request_id: o.completion for o in engine.step() if o.completion is not None}
    assert done["other"].token_ids == answer(other)[0]
    if patience == 60.0:
        assert "waiting" not in done and disk.reads
        disk.gives = True
    done |= finish(engine, max_steps=10**6)
    assert done["waiting"].token_ids == answer(waiting)[0]
    assert (done["waiting"].cached_tokens > 0) == disk.gives


def test_save_writes_all_cached_pages_once() -> None:
    """All cached pages are written to disk exactly once, even with little host memory."""
    disk = StuckDisk()
    engine, _ = paper_engine(40, max_batch_tokens=64, max_running=2, num_host_pages=3, disk=disk)
    for i in range(3):
        engine.add(ask(f"{i}", 100 + i))
        finish(engine)
    engine.stop()
    assert {key for i in range(3) for key in keys_of([100 + i] * 30)} <= disk.files.keys()
    num_offloaded = engine.metrics.offloads
    engine.stop()
    assert engine.metrics.offloads == num_offloaded

"""Which data-parallel group answers what, on paper."""

import pytest

from dsv3.errors import ConfigError, RequestError
from dsv3.request import Completion, Request, SamplingParams
from tests.paper_runner import PaperWorld, answer, finish, paper_world


def ask(name: str, prompt: list[int], tokens: int = 4) -> Request:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return Request(request_id=name, prompt_ids=prompt, params=params)


def text(first: int, length: int) -> list[int]:
    return [(first + 7 * i) % 300 + 2 for i in range(length)]


def check(done: dict[str, Completion], *requests: Request) -> None:
    assert done.keys() == {r.request_id for r in requests}
    for r in requests:
        assert (done[r.request_id].token_ids, done[r.request_id].finish_reason) == answer(r)


def busy_steps(world: PaperWorld) -> list[list[bool]]:
    """For each group, whether it computed anything in each step."""
    return [[len(plan.token_ids) > 0 for plan in group.plans] for group in world.groups]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("depth", [0, 1])
def test_any_number_of_requests(count: int, depth: int) -> None:
    """Fewer than groups, and more than can run."""
    engine, world = paper_world(3, 30, max_batch_tokens=16, max_running=2, pipeline_depth=depth)
    requests = [ask(f"r{i}", text(i, 3 + 5 * (i % 4))) for i in range(count)]
    for r in requests:
        engine.add(r)
    check(finish(engine), *requests)
    assert [len(busy) for busy in busy_steps(world)] == [world.num_steps] * 3
    assert sum(any(busy) for busy in busy_steps(world)) == min(count, 3)
    assert engine.metrics.prefill_tokens == sum(len(r.prompt_ids) for r in requests)
    assert engine.max_running == 6


def test_a_conversation_stays_where_it_is_cached() -> None:
    engine, _ = paper_world(2, 100, max_batch_tokens=500, max_running=4)
    talks = [text(1, 100), text(2, 100), text(5, 100)]
    homes: list[int] = []
    for turn in range(3):
        for i in (2, 0, 1):
            request = ask(f"{turn} {i}", talks[i])
            engine.add(request)
            homes.append(engine._sequences[request.request_id].group)
            done = finish(engine)[request.request_id]
            assert done.cached_tokens == (0 if turn == 0 else len(talks[i]) - 4)
            talks[i] = [*talks[i], *done.token_ids, 5, 6, 7]
    assert homes[:3] == homes[3:6] == homes[6:] and set(homes) == {0, 1}


def test_a_long_line_counts_more_than_a_short_prefix() -> None:
    engine, _ = paper_world(2, 1000, max_batch_tokens=500, max_running=8)
    engine.add(ask("first", text(1, 40)))
    finish(engine)
    groups = []
    for i in range(4):
        engine.add(ask(f"r{i}", text(1, 40) + text(i, 200)))
        groups.append(engine._sequences[f"r{i}"].group)
    assert groups[:2] == [0, 1] and sorted(groups) == [0, 0, 1, 1]
    finish(engine)


@pytest.mark.parametrize("shared", [0, 150])
def test_requests_about_one_text_go_where_it_is_computed(shared: int) -> None:
    """Three texts, six questions to each, all at once: every text is computed in one group."""
    engine, _ = paper_world(3, 600, max_batch_tokens=100, max_running=8)
    texts = [text(0, shared) + text(100 + i, 600) for i in range(3)]
    requests = [ask(f"{q} {i}", texts[i] + text(q, 5)) for i in range(3) for q in range(6)]
    groups: dict[str, set[int]] = {}
    for r in requests:
        engine.add(r)
        groups.setdefault(r.request_id[2:], set()).add(engine._sequences[r.request_id].group)
    assert sorted(groups.values(), key=min) == [{0}, {1}, {2}]
    done = finish(engine)
    check(done, *requests)
    assert engine.metrics.prefill_tokens == sum(len(t) for t in texts) + 18 * 5
    assert not any(scheduler._pages_to_come for scheduler in engine._schedulers)


def test_a_group_that_has_run_dry_helps_the_others() -> None:
    """Long answers in one group, short ones in the other: the line moves over."""
    engine, world = paper_world(2, 400, max_batch_tokens=100, max_running=1)
    requests = [ask(f"r{i}", text(i, 8), 40 if i % 2 == 0 else 2) for i in range(8)]
    for r in requests:
        engine.add(r)
    assert [engine._sequences[r.request_id].group for r in requests] == [0, 1] * 4
    check(finish(engine), *requests)
    first, second = (sum(busy) for busy in busy_steps(world))
    # All long answers in the first group would take 160 steps, beside 8 of the second.
    assert first + second == 4 * 40 + 4 * 2 and max(first, second) < 100


def test_preemption_stays_within_a_group() -> None:
    engine, world = paper_world(2, 9, max_batch_tokens=100, max_running=2, pipeline_depth=1)
    requests = [ask(f"r{i}", text(i, 9), 20) for i in range(4)]
    for r in requests:
        engine.add(r)
    check(finish(engine), *requests)
    assert engine.metrics.preemptions == 2
    assert all(any(busy) for busy in busy_steps(world))


def test_prewarmed_prefixes_are_in_every_group() -> None:
    engine, world = paper_world(3, 40, max_batch_tokens=100, max_running=2)
    prompts = [text(1, 20), text(2, 30)]
    assert engine.prewarm(prompts) == 50
    assert [len({*g.memory.flatten().tolist()}) > 40 for g in world.groups] == [True] * 3
    for group in range(3):
        request = ask(f"in {group}", prompts[1] + [9, 9])
        engine.add(request, group)
        assert finish(engine)[f"in {group}"].cached_tokens == 30
    assert engine.metrics.pages_pinned == 3 * (5 + 8)
    assert engine.max_seq_len == (40 - 13) * 4
    with pytest.raises(ConfigError, match="pins 104 of 160 cached tokens"):
        paper_world(2, 40)[0].prewarm([text(1, 104)])


def test_figures_are_of_all_groups_and_limits_of_one() -> None:
    engine, _ = paper_world(2, 10, max_batch_tokens=100, max_running=2)
    assert engine.cache_tokens == 80 and engine.max_seq_len == 40
    with pytest.raises(RequestError, match="the cache holds 40"):
        engine.add(ask("long", text(1, 41)))
    for i in range(2):
        engine.add(ask(str(i), text(i, 8)))
    engine.step()
    m = engine.metrics
    assert (m.running, m.waiting, m.pages_used, m.pages_free) == (2, 0, 4, 16)
    assert m.step_sequences.total == 2 and m.step_tokens.total == 16
    finish(engine)


def test_host_memory_is_each_groups_own() -> None:
    engine, world = paper_world(2, 8, max_batch_tokens=100, max_running=1, num_host_pages=20)
    prompts = [text(10 * i, 24) for i in range(6)]
    for turn in range(2):
        for i, prompt in enumerate(prompts):
            request = ask(f"{turn} {i}", prompt)
            engine.add(request)
            done = finish(engine)
            check(done, request)
            assert done[request.request_id].cached_tokens >= 16 * turn
    tiers = [g.tiers for g in world.groups if g.tiers is not None]
    assert len(tiers) == len(world.groups)
    assert all(each.num_offloaded and each.num_restored for each in tiers)
    assert engine.metrics.offloads == tiers[0].num_offloaded + tiers[1].num_offloaded
    assert engine.metrics.host_hits == tiers[0].num_restored + tiers[1].num_restored


def test_a_cancelled_request_leaves_its_group() -> None:
    engine, _ = paper_world(2, 40, max_batch_tokens=100, max_running=1)
    requests = [ask(f"r{i}", text(i, 8)) for i in range(5)]
    for r in requests:
        engine.add(r)
    engine.step()
    for r in requests[1:4]:
        engine.cancel(r.request_id)
    check(finish(engine), requests[0], requests[4])


def test_a_forgotten_conversation_is_gone_from_every_group() -> None:
    engine, _ = paper_world(2, 40, max_batch_tokens=100, max_running=1)
    for group in range(2):
        request = Request(
            request_id=str(group),
            prompt_ids=text(1, 20),
            params=SamplingParams(max_tokens=1),
            conversation_id="talk",
        )
        engine.add(request, group)
        finish(engine)
    engine.drop_conversation("talk")
    assert [scheduler.pages.num_idle for scheduler in engine._schedulers] == [0, 0]

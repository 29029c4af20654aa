"""Scheduling decisions; `tests/paper_runner.py` executes and checks every plan."""

from itertools import pairwise
from typing import Any

import pytest

from dsv3.cache.eviction import CostAware
from dsv3.errors import ConfigError, RequestError
from dsv3.request import Completion, Request, SamplingParams
from tests.paper_runner import EOS, answer, finish, next_token, paper_engine


def ask(name: str, length: int, **params: Any) -> Request:
    base = {"max_tokens": 8, "ignore_eos": True} | params
    prompt = [(sum(map(ord, name)) + 7 * i) % 300 + 2 for i in range(length)]
    return Request(request_id=name, prompt_ids=prompt, params=SamplingParams(**base))


def check(done: dict[str, Completion], *requests: Request) -> None:
    assert done.keys() == {r.request_id for r in requests}
    for r in requests:
        assert (done[r.request_id].token_ids, done[r.request_id].finish_reason) == answer(r)


@pytest.mark.parametrize("budget", [4, 5, 17, 1000])
def test_answers_do_not_depend_on_chunks(budget: int) -> None:
    engine, runner = paper_engine(40, max_batch_tokens=budget, max_running=4)
    requests = [ask(f"r{i}", n) for i, n in enumerate((1, 30, 3, 17, 4, 9))]
    for r in requests:
        engine.add(r)
    check(finish(engine), *requests)
    prompts = sum(len(r.prompt_ids) for r in requests)
    assert engine.metrics.prefill_tokens == prompts
    # The last token of an answer is never fed back.
    assert engine.metrics.decode_tokens == 6 * 7
    assert engine.metrics.steps == len(runner.plans)


def test_decoding_goes_on_while_a_long_prompt_comes_in() -> None:
    engine, runner = paper_engine(100, max_batch_tokens=16, max_running=4)
    engine.add(ask("short", 2, max_tokens=12))
    engine.step()
    engine.add(ask("long", 150))
    engine.step()
    for _ in range(8):
        engine.step()
        assert runner.plans[-1].query_len.tolist() == [1, 15]
    check(finish(engine), ask("short", 2, max_tokens=12), ask("long", 150))


@pytest.mark.parametrize("depth", [0, 1])
def test_a_step_that_computes_a_prompt_is_announced(depth: int) -> None:
    """With a pipeline, so is the step after it, which waits for the prompt's results."""
    engine, runner = paper_engine(100, max_batch_tokens=16, max_running=4, pipeline_depth=depth)
    engine.add(ask("short", 2, max_tokens=12))
    for _ in range(3):
        engine.step()
    engine.add(ask("long", 30))
    computes, announced = [False], []
    for _ in range(6):
        announced.append(engine.computes_prompts)
        engine.step()
        computes.append(bool(runner.plans[-1].query_len.max() > 1))
    assert computes == [False, True, True, False, False, False, False]
    want = [a or b for a, b in pairwise(computes)] if depth else computes[1:]
    assert announced == want


def test_sequences_join_and_leave_between_steps() -> None:
    engine, runner = paper_engine(100, max_batch_tokens=100, max_running=2)
    for name, tokens in (("a", 2), ("b", 5), ("c", 3)):
        engine.add(ask(name, 3, max_tokens=tokens))
    finish(engine)
    # a and b together; a leaves after two tokens and c takes its place in the next step.
    assert [p.query_len.tolist() for p in runner.plans] == [[3, 3], [1, 1], [1, 3], [1, 1], [1, 1]]


def test_first_come_first_served() -> None:
    """The cache is full: the next request in line waits, and no other request passes it."""
    engine, runner = paper_engine(10, max_batch_tokens=100, max_running=4)
    first, big, small = ask("first", 26), ask("big", 20), ask("small", 1, max_tokens=1)
    for r in (first, big, small):
        engine.add(r)
    engine.step()
    assert runner.plans[-1].query_len.tolist() == [26]
    done = finish(engine)
    check(done, first, big, small)
    assert [p.query_len.tolist() for p in runner.plans].index([1, 20]) == 8


@pytest.mark.parametrize("depth", [0, 1])
def test_the_last_to_come_gives_way_and_resumes(depth: int) -> None:
    engine, runner = paper_engine(9, max_batch_tokens=100, max_running=2, pipeline_depth=depth)
    first, last = ask("first", 9, max_tokens=20), ask("second", 9, max_tokens=20)
    engine.add(first)
    engine.add(last)
    check(finish(engine), first, last)
    assert engine.metrics.preemptions == 1
    # The first never stops; the other goes on afterwards, from the rest of its prefix.
    contexts = [p.context_len.max() for p in runner.plans]
    assert sorted(contexts[: 20 - 1]) == contexts[: 20 - 1]


def test_a_page_is_reused_by_its_tokens_when_drafts_go_beyond_it() -> None:
    """A step's drafts may end beyond a page whose last token it has just sampled."""
    engine, _ = paper_engine(60, num_drafts=3)
    prompt = ask("any", 6).prompt_ids
    done: dict[str, Completion] = {}
    requests: list[Request] = []
    for max_tokens in (1, 2, 3, 4, 5, 12, 20, 20):
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        requests.append(
            Request(request_id=str(len(requests)), prompt_ids=prompt, params=params),
        )
        engine.add(requests[-1])
        done |= finish(engine)
    check(done, *requests)
    again = [*prompt, *done["7"].token_ids[:-1]]
    engine.add(Request(request_id="again", prompt_ids=again, params=SamplingParams(max_tokens=1)))
    assert finish(engine)["again"].cached_tokens == len(again) - 1


def test_only_what_is_admitted_first_counts_as_a_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a request without room nor a resumed one counts as a reuse for the policy."""
    hits = []
    count = CostAware.hit

    def hit(policy: CostAware, *path: Any) -> None:
        hits.append(path)
        count(policy, *path)

    monkeypatch.setattr(CostAware, "hit", hit)
    engine, _ = paper_engine(9, max_batch_tokens=100, max_running=3)
    requests = [ask(name, 9, max_tokens=20) for name in ("first", "second", "third")]
    for r in requests:
        engine.add(r)
    check(finish(engine), *requests)
    assert engine.metrics.preemptions and len(hits) == 3


def test_priority_goes_first() -> None:
    engine, runner = paper_engine(50, max_batch_tokens=100, max_running=1)
    plain = ask("plain", 5)
    urgent = Request(request_id="urgent", prompt_ids=[9] * 6, params=plain.params, priority=-1)
    engine.add(plain)
    engine.add(urgent)
    engine.step()
    assert runner.plans[0].query_len.tolist() == [6]
    check(finish(engine), plain, urgent)


def shared(name: str, length: int, own: int, **params: Any) -> Request:
    """Return a request whose first `length` tokens are the same for all of them."""
    tail = [(sum(map(ord, name)) + 11 * i) % 300 + 2 for i in range(own)]
    base = {"max_tokens": 4, "ignore_eos": True} | params
    prompt = [3 + i % 290 for i in range(length)] + tail
    return Request(request_id=name, prompt_ids=prompt, params=SamplingParams(**base))


def test_a_second_turn_computes_its_new_tokens_only() -> None:
    engine, _ = paper_engine(100, max_batch_tokens=1000, max_running=4)
    first = ask("first", 61)
    engine.add(first)
    done = finish(engine)
    turn = [*first.prompt_ids, *done["first"].token_ids, 5, 6, 7]
    second = Request(request_id="second", prompt_ids=turn, params=first.params)
    before = engine.metrics.prefill_tokens
    engine.add(second)
    done = finish(engine)
    check(done, second)
    # All but the last token of the answer, which was never fed back, and the three new ones.
    assert done["second"].cached_tokens == len(turn) - 4
    assert engine.metrics.prefill_tokens - before == 4


def test_the_last_token_is_computed_again() -> None:
    engine, _ = paper_engine(100, max_batch_tokens=1000, max_running=4)
    for name in ("one", "two"):
        engine.add(shared(name, 30, 0))
        done = finish(engine)
    assert done["two"].cached_tokens == 29


def test_a_common_prefix_is_computed_once() -> None:
    """Requests that come together wait for the first to compute their common prefix."""
    engine, runner = paper_engine(200, max_batch_tokens=50, max_running=8)
    requests = [shared(f"r{i}", 120, 5) for i in range(6)]
    for r in requests:
        engine.add(r)
    done = finish(engine)
    check(done, *requests)
    assert engine.metrics.prefill_tokens == 120 + 6 * 5
    assert sorted(done[r.request_id].cached_tokens for r in requests) == [0] + [120] * 5
    assert runner.plans[0].query_len.tolist() == [50]


def test_without_reuse_no_request_waits_for_another() -> None:
    engine, runner = paper_engine(200, max_batch_tokens=500, max_running=8, prefix_reuse=False)
    requests = [shared(f"r{i}", 120, 5) for i in range(3)]
    for r in requests:
        engine.add(r)
    check(finish(engine), *requests)
    assert runner.plans[0].query_len.tolist() == [125] * 3


def test_those_admitted_together_share_too() -> None:
    """A common prefix that is computed in this very step is waited for."""
    engine, runner = paper_engine(200, max_batch_tokens=500, max_running=8)
    requests = [shared(f"r{i}", 120, 5) for i in range(3)] + [ask("other", 50)]
    for r in requests:
        engine.add(r)
    check(finish(engine), *requests)
    assert [p.query_len.tolist() for p in runner.plans[:2]] == [[50, 125], [1, 1, 5, 5]]


def test_a_request_is_skipped_a_limited_number_of_times() -> None:
    engine, _ = paper_engine(400, max_batch_tokens=100, max_running=1)
    engine.add(shared("warm", 80, 1))
    finish(engine)
    patient = ask("patient", 30)
    engine.add(patient)
    order = []
    for i in range(40):
        engine.add(shared(f"r{i}", 80, 1, max_tokens=1))
    while engine.has_work():
        order += [o.request_id for o in engine.step() if o.completion]
    assert 1 <= order.index("patient") <= 16
    assert len(order) == 41


def test_a_scored_prompt_reuses_nothing() -> None:
    engine, _ = paper_engine(100, max_batch_tokens=100, max_running=4)
    engine.add(shared("first", 40, 0))
    finish(engine)
    scored = shared("scored", 40, 0, prompt_logprobs=0)
    engine.add(scored)
    done = finish(engine)["scored"]
    assert done.cached_tokens == 0
    assert done.prompt_logprobs is not None and len(done.prompt_logprobs) == 39


def test_prewarmed_prompts_stay() -> None:
    engine, _ = paper_engine(20, max_batch_tokens=100, max_running=2)
    kept = shared("kept", 30, 0)
    assert engine.prewarm([kept.prompt_ids]) == 30
    for i in range(30):  # far more than the cache holds
        engine.add(ask(f"other {i}", 40))
    finish(engine)
    engine.add(shared("user", 30, 9))
    assert finish(engine)["user"].cached_tokens == 30
    # Others cannot use pinned tokens: their requests fail at once, instead of waiting.
    with pytest.raises(RequestError, match="need 60 cached tokens, the cache holds 48"):
        engine.add(ask("big", 53))
    with pytest.raises(ConfigError, match="more than half; raise --kv-cache-size"):
        engine.prewarm([ask("much", 40).prompt_ids])


def test_a_deadline_ends_an_answer() -> None:
    engine, _ = paper_engine(100, max_batch_tokens=100, max_running=4)
    late = Request(
        request_id="late", prompt_ids=[4, 5], params=SamplingParams(max_tokens=50), deadline=0.0
    )
    engine.add(late)
    assert finish(engine)["late"].finish_reason == "deadline"


def test_a_dropped_conversation_is_forgotten() -> None:
    engine, _ = paper_engine(100, max_batch_tokens=100, max_running=4)
    asked = shared("a", 40, 0)
    for name, drop in (("a", True), ("b", False), ("c", False)):
        request = Request(
            request_id=name,
            prompt_ids=asked.prompt_ids,
            params=asked.params,
            conversation_id="chat",
        )
        engine.add(request)
        cached = finish(engine)[name].cached_tokens
        assert cached == (39 if name == "c" else 0)
        if drop:
            engine.drop_conversation("chat")


def test_exactly_full_cache() -> None:
    engine, _ = paper_engine(5, max_batch_tokens=64, max_running=4)
    fits = ask("fits", 13, max_tokens=8)  # 13 + 7 cached positions are five pages of four
    engine.add(fits)
    with pytest.raises(RequestError, match="need 21 cached tokens, the cache holds 20"):
        engine.add(ask("not", 14, max_tokens=8))
    check(finish(engine), fits)


def test_cancel() -> None:
    engine, runner = paper_engine(10, max_batch_tokens=100, max_running=2)
    running, waiting, kept = ask("running", 20), ask("waiting", 9), ask("kept", 5)
    for r in (running, waiting, kept):
        engine.add(r)
    engine.step()
    engine.cancel("running")
    engine.cancel("waiting")
    engine.cancel("waiting")
    engine.cancel("never heard of")
    check(finish(engine), kept)
    assert runner.plans[1].query_len.tolist() == [5]
    engine.add(running)  # the name is free again
    check(finish(engine), running)


def test_ends() -> None:
    prompt = next(
        [n, 5] for n in range(2, 300) if next_token([n, 5], 0) == EOS and n not in (EOS, 5)
    )
    second = next_token([*prompt, EOS], 0)
    for params, tokens, reason in (
        (SamplingParams(max_tokens=3), [], "stop"),
        (SamplingParams(max_tokens=1, ignore_eos=True), [EOS], "length"),
        (SamplingParams(max_tokens=9, ignore_eos=True, stop_token_ids=(second,)), [EOS], "stop"),
        (SamplingParams(max_tokens=0), [], "length"),
    ):
        engine, _ = paper_engine(10)
        engine.add(Request(request_id="r", prompt_ids=prompt, params=params))
        done = finish(engine)["r"]
        assert (done.token_ids, done.finish_reason) == (tokens, reason), params
        assert done.prompt_ids == prompt


@pytest.mark.parametrize("budget", [2, 3, 100])
def test_scored_prompts(budget: int) -> None:
    """Every prompt token but the first, at its own position, however the prompt is cut."""
    engine, _ = paper_engine(40, max_batch_tokens=budget, max_running=2)
    scored = ask("scored", 11, max_tokens=0, prompt_logprobs=0)
    both = ask("both", 6, max_tokens=2, prompt_logprobs=0, logprobs=0)
    engine.add(scored)
    engine.add(both)
    done = finish(engine)
    for r in (scored, both):
        got = done[r.request_id].prompt_logprobs
        assert got is not None
        assert [t.token_id for t in got] == r.prompt_ids[1:]
        assert [t.logprob for t in got] == [-float(p) for p in range(1, len(r.prompt_ids))]
    assert done["scored"].logprobs is None
    logprobs = done["both"].logprobs
    assert logprobs is not None
    assert [t.token_id for t in logprobs] == answer(both)[0]
    assert [t.logprob for t in logprobs] == [-6.0, -7.0]


def test_seeds_reach_the_sampler_whole() -> None:
    engine, _ = paper_engine(50)
    requests = [ask(f"s{i}", 3, seed=s) for i, s in enumerate((0, -1, 2**63 - 1, -(2**63), 2**32))]
    for r in requests:
        engine.add(r)
    check(finish(engine), *requests)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask("r", 0), "the prompt is empty"),
        (ask("r", 101), "the prompt has 101 tokens, it may have 99"),
        (ask("r", 100), "the prompt has 100 tokens, it may have 99"),
        (ask("r", 101, max_tokens=0), "it may have 100"),
        (ask("r", 95), r"max_tokens=8 exceed the context of 100; max_tokens may be 5"),
        (ask("r", 3, stop=("x",)), "stop strings need a tokenizer"),
        (Request(request_id="r", prompt_ids=[3, 331], params=SamplingParams()), "token 331 is not"),
        (Request(request_id="r", prompt_ids=[-1], params=SamplingParams()), "token -1 is not in"),
        (ask("twice", 3), "'twice' is already in progress"),
    ],
)
def test_refused(request_: Request, message: str) -> None:
    engine, _ = paper_engine(1000, max_seq_len=100)
    engine.add(ask("twice", 3))
    with pytest.raises(RequestError, match=message):
        engine.add(request_)
    check(finish(engine), ask("twice", 3))  # the others go on


def test_the_longest_request_is_served() -> None:
    engine, _ = paper_engine(1000, max_seq_len=100)
    longest = [ask("answer", 92), ask("one", 99, max_tokens=1), ask("score", 100, max_tokens=0)]
    for r in longest:
        engine.add(r)
    check(finish(engine), *longest)


def test_nothing_to_do() -> None:
    engine, runner = paper_engine(4)
    assert not engine.has_work()
    assert engine.step() == [] and runner.plans == []

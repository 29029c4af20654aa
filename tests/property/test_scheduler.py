"""Any history of requests: nothing is lost, nothing is shared, every request gets its answer."""

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.cache.tiers import Tiers, extend_keys
from dsv3.errors import RequestError
from dsv3.request import Completion, Request, SamplingParams
from tests.paper_runner import PENALIZED, PaperDisk, PaperRunner, answer, finish, paper_world

requests = st.builds(
    lambda n, start, tokens, seed, scored, ignore: (
        [(start + 7 * i) % 300 + 2 for i in range(n)],
        SamplingParams(
            max_tokens=tokens,
            seed=seed,
            ignore_eos=ignore,
            prompt_logprobs=0 if scored else None,
            repetition_penalty=1.2 if seed == PENALIZED else 1.0,
            presence_penalty=0.5 if seed == PENALIZED else 0.0,
        ),
    ),
    st.integers(1, 40),
    st.integers(0, 3),
    st.integers(0, 12),
    st.integers(0, 2),
    st.booleans(),
    st.booleans(),
)
events = st.lists(
    st.one_of(
        requests.map(lambda r: ("add", r)),
        st.integers(0, 20).map(lambda i: ("cancel", i)),
        st.integers(1, 4).map(lambda n: ("step", n)),
    ),
    max_size=40,
)


class History:
    """Requests, answers so far, and the invariants of every step."""

    def __init__(
        self,
        num_groups: int,
        num_pages: int,
        page_size: int,
        budget: int,
        running: int,
        depth: int,
        reuse: bool,
        num_host_pages: int,
        disk: bool,
        num_drafts: int,
    ) -> None:
        self.engine, self.world = paper_world(
            num_groups,
            num_pages,
            page_size,
            max_batch_tokens=budget,
            max_running=running,
            pipeline_depth=depth,
            prefix_reuse=reuse,
            num_host_pages=num_host_pages,
            num_drafts=num_drafts,
            disk=PaperDisk() if disk and num_host_pages and num_groups == 1 else None,
        )
        self.schedulers = self.engine._schedulers
        self.num_pages, self.capacity = num_pages, num_pages * page_size
        self.expected: dict[str, Request] = {}
        self.done: dict[str, Completion] = {}
        self.streamed: dict[str, list[int]] = {}

    def add(self, name: str, asked: tuple[list[int], SamplingParams]) -> None:
        request = Request(request_id=name, prompt_ids=asked[0], params=asked[1])
        longest = len(asked[0]) + max(0, asked[1].max_tokens - 1)
        try:
            self.engine.add(request)
        except RequestError:
            assert longest > self.capacity
        else:
            self.expected[name] = request

    def cancel(self, index: int) -> None:
        names = list(self.expected)
        if names:
            name = names[index % len(names)]
            self.engine.cancel(name)
            if name not in self.done:
                del self.expected[name]

    def step(self) -> None:
        before, busy = self.world.num_steps, self.engine.has_work()
        in_flight = self.engine._in_flight is not None
        for out in self.engine.step():
            self.streamed.setdefault(out.request_id, []).extend(out.new_token_ids)
            if out.completion is not None:
                self.done[out.request_id] = out.completion
        # While a request is unfinished, a step does some work.
        assert not busy or self.world.num_steps == before + 1 or in_flight

    def check_pages(self) -> None:
        """A page has as many holders as sequences list it, and one more if the tree does."""
        for group, (scheduler, runner) in enumerate(
            zip(self.schedulers, self.world.groups, strict=True)
        ):
            running, pages = scheduler.running, scheduler.pages
            assert all(seq.group == group for seq in (*running, *scheduler.waiting))
            owned = Counter(page for seq in running for page in seq.pages)
            tree = scheduler.tree
            cached = [] if tree is None else [page for page, *_ in tree.deepest_first()]
            assert len(set(cached)) == len(cached)
            owned.update(cached)
            for page in range(1, self.num_pages + 1):
                assert pages._holders[page] == owned[page]
            assert pages.num_free == self.num_pages - len(owned)
            waiting = sum(seq.num_uncached for seq in scheduler.waiting)
            assert scheduler._num_waiting_tokens == waiting
            if scheduler.tiers is not None:
                self.check_host_pages(scheduler.tiers, runner)

    def check_host_pages(self, tiers: Tiers, runner: PaperRunner) -> None:
        """A host page is free or full, and holds the tokens that its name stands for."""
        host_pages = [*tiers._free, *tiers._host_pages.values(), *tiers._fetching.values()]
        assert sorted(host_pages) == list(range(len(tiers._keys)))
        texts: dict[tuple[bytes, ...], list[int]] = {}
        for request in self.expected.values():
            keys: list[tuple[bytes, ...]] = []
            tokens = [*request.prompt_ids, *answer(request)[0]]
            size = runner.page_size
            extend_keys(keys, tokens, len(tokens) // size, size)
            for i, key in enumerate(keys):
                texts[key] = tokens[i * size : (i + 1) * size]
        for key, host_page in tiers._host_pages.items():
            if key in texts:
                assert runner.host[host_page].tolist() == texts[key]

    def finish(self) -> None:
        self.done |= finish(self.engine)
        self.check_pages()
        for scheduler in self.schedulers:
            assert scheduler.pages.num_free + scheduler.pages.num_idle == self.num_pages
        assert self.done.keys() == self.expected.keys()
        for name, request in self.expected.items():
            tokens, reason = answer(request)
            got = self.done[name]
            assert (got.token_ids, got.finish_reason) == (tokens, reason)
            part = self.streamed.get(name, [])
            assert tokens[: len(part)] == part
            if request.params.prompt_logprobs is not None:
                assert got.prompt_logprobs is not None
                scored = [t.token_id for t in got.prompt_logprobs]
                assert scored == request.prompt_ids[1:]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    events=events,
    num_groups=st.sampled_from([1, 1, 2, 3]),
    num_pages=st.integers(1, 20),
    page_size=st.sampled_from([1, 4, 16]),
    budget=st.integers(3, 60),
    running=st.integers(1, 3),
    depth=st.integers(0, 1),
    reuse=st.booleans(),
    num_host_pages=st.integers(0, 6),
    disk=st.booleans(),
    num_drafts=st.integers(0, 3),
)
def test_any_history(
    events: list[tuple[str, Any]],
    num_groups: int,
    num_pages: int,
    page_size: int,
    budget: int,
    running: int,
    depth: int,
    reuse: bool,
    num_host_pages: int,
    disk: bool,
    num_drafts: int,
) -> None:
    num_host_pages *= reuse
    history = History(
        num_groups,
        num_pages,
        page_size,
        budget,
        running,
        depth,
        reuse,
        num_host_pages,
        disk,
        num_drafts,
    )
    for number, (kind, value) in enumerate(events):
        if kind == "add":
            history.add(str(number), value)
        elif kind == "cancel":
            history.cancel(value)
        else:
            for _ in range(value):
                history.step()
        history.check_pages()
    history.finish()

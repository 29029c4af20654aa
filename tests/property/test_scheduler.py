"""Any history of requests: nothing is lost, nothing is shared, everybody gets the right answer."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.cache.tiers import extend_keys
from dsv3.errors import RequestError
from dsv3.request import Completion, Request, SamplingParams
from tests.paper_runner import PaperDisk, answer, finish, paper_engine

requests = st.builds(
    lambda n, start, tokens, seed, scored, ignore: (
        [(start + 7 * i) % 300 + 2 for i in range(n)],
        SamplingParams(
            max_tokens=tokens,
            seed=seed,
            ignore_eos=ignore,
            prompt_logprobs=0 if scored else None,
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
    """What was asked, what came back so far, and what must hold at any time."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        budget: int,
        running: int,
        depth: int,
        reuse: bool,
        num_slots: int,
        disk: bool,
    ) -> None:
        self.engine, self.runner = paper_engine(
            num_pages,
            page_size,
            max_batch_tokens=budget,
            max_running=running,
            pipeline_depth=depth,
            prefix_reuse=reuse,
            num_slots=num_slots,
            disk=PaperDisk() if disk and num_slots else None,
        )
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
        before, busy = len(self.runner.plans), self.engine.has_work()
        in_flight = self.engine._in_flight is not None
        for out in self.engine.step():
            self.streamed.setdefault(out.request_id, []).extend(out.new_token_ids)
            if out.completion is not None:
                self.done[out.request_id] = out.completion
        # As long as anybody is left, a step does something.
        assert not busy or len(self.runner.plans) == before + 1 or in_flight

    def check_pages(self) -> None:
        """A page has as many holders as sequences list it, and one more if the tree does."""
        running, pages = self.engine._scheduler.running, self.engine._pages
        owned = Counter(page for seq in running for page in seq.pages)
        cached = [] if self.engine._tree is None else [page for page, _ in self.engine._tree]
        assert len(set(cached)) == len(cached)
        owned.update(cached)
        for page in range(1, self.num_pages + 1):
            assert pages.num_holders(page) == owned[page]
        assert pages.num_free == self.num_pages - len(owned)
        self.check_slots()

    def check_slots(self) -> None:
        """A slot is free or holds one full page; what a name stands for lies in its slot."""
        tiers = self.engine._tiers
        if tiers is None:
            return
        slots = [*tiers._free, *tiers._slots.values(), *tiers._fetching.values()]
        assert sorted(slots) == list(range(len(tiers._keys)))
        texts: dict[tuple[bytes, ...], list[int]] = {}
        for request in self.expected.values():
            keys: list[tuple[bytes, ...]] = []
            tokens = [*request.prompt_ids, *answer(request)[0]]
            size = self.runner.page_size
            extend_keys(keys, tokens, len(tokens) // size, size)
            for i, key in enumerate(keys):
                texts[key] = tokens[i * size : (i + 1) * size]
        for key, slot in tiers._slots.items():
            if key in texts:
                assert self.runner.host[slot].tolist() == texts[key]

    def finish(self) -> None:
        self.done |= finish(self.engine)
        self.check_pages()
        assert self.engine._pages.num_free + self.engine._pages.num_idle == self.num_pages
        assert self.done.keys() == self.expected.keys()
        for name, request in self.expected.items():
            tokens, reason = answer(request)
            got = self.done[name]
            assert (got.token_ids, got.finish_reason) == (tokens, reason)
            part = self.streamed.get(name, [])
            assert tokens[: len(part)] == part
            if request.params.prompt_logprobs is not None:
                scored = [t.token_id for t in got.prompt_logprobs]
                assert scored == request.prompt_ids[1:]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    events=events,
    num_pages=st.integers(1, 20),
    page_size=st.sampled_from([1, 4, 16]),
    budget=st.integers(3, 60),
    running=st.integers(1, 3),
    depth=st.integers(0, 1),
    reuse=st.booleans(),
    num_slots=st.integers(0, 6),
    disk=st.booleans(),
)
def test_any_history(
    events: list[tuple[str, object]],
    num_pages: int,
    page_size: int,
    budget: int,
    running: int,
    depth: int,
    reuse: bool,
    num_slots: int,
    disk: bool,
) -> None:
    num_slots *= reuse
    history = History(num_pages, page_size, budget, running, depth, reuse, num_slots, disk)
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

"""The main loop of a server: commands in, outputs out; answers that wait for their readers."""

import asyncio
import threading
from collections import deque
from queue import Empty, SimpleQueue
from typing import Any, cast

import pytest

from dsv3.engine.engine import Engine
from dsv3.errors import RankError, RequestError
from dsv3.request import Completion, Request, RequestOutput, SamplingParams
from dsv3.serve.answers import MAX_UNREAD_TOKENS, Answer, HttpError
from dsv3.serve.engine_loop import Cancel, Command, Drain, EngineLoop, Submit
from dsv3.serve.front import Front, Limits, Served
from dsv3.serve.outbox import Delivery, Outbox
from dsv3.text.defaults import Defaults


def output(name: str, *ids: int, is_last: bool = False) -> RequestOutput:
    done = None
    if is_last:
        done = Completion(
            request_id=name, prompt_ids=[1], token_ids=[*ids], text="", finish_reason="stop"
        )
    text = "".join(map(str, ids))
    return RequestOutput(request_id=name, new_token_ids=[*ids], new_text=text, completion=done)


def request(name: str, num_tokens: int = 2) -> Request:
    return Request(request_id=name, prompt_ids=[1], params=SamplingParams(max_tokens=num_tokens))


class FakeEngine:
    """Answers each request with the numbers from 0 on; refuses those of one token."""

    max_running = 2

    def __init__(self, last_step: int | None = None) -> None:
        self.left: dict[str, deque[int]] = {}
        self.steps = 0
        self.last_step = last_step  # fails
        self.computes_prompts = False
        self.cancelled: list[str] = []

    @property
    def num_unfinished(self) -> int:
        return len(self.left)

    def has_work(self) -> bool:
        return bool(self.left)

    def update_gauges(self) -> None:
        pass

    def add(self, request: Request) -> None:
        if request.params.max_tokens == 1:
            raise RequestError("one token is too few")
        self.left[request.request_id] = deque(range(request.params.max_tokens))

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.left.pop(request_id, None)

    def step(self) -> list[RequestOutput]:
        self.steps += 1
        if self.steps == self.last_step:
            raise RankError("a rank is gone")
        outputs = []
        for name, tokens in list(self.left.items()):
            token = tokens.popleft()
            outputs.append(output(name, token, is_last=not tokens))
            if not tokens:
                del self.left[name]
        return outputs


def run(*commands: Command) -> tuple[FakeEngine, list[Delivery]]:
    """Carry out commands until drained."""
    engine = FakeEngine()
    inbox: SimpleQueue[Command] = SimpleQueue()
    for command in commands:
        inbox.put(command)
    deliveries: list[Delivery] = []
    EngineLoop(cast(Engine, engine), inbox, deliveries.extend).run()
    return engine, deliveries


def test_requests_are_answered_before_the_end() -> None:
    answer = Answer(["a", "b"])
    engine, deliveries = run(Submit(answer, [request("a"), request("b", 3)]), Drain(60))
    assert not engine.left
    assert [item.request_id for _, item in deliveries if isinstance(item, RequestOutput)] == [
        *("a", "b", "a", "b", "b")
    ]


def test_all_answers_or_none() -> None:
    answer = Answer(["a", "b"])
    engine, deliveries = run(Submit(answer, [request("a"), request("b", 1)]), Drain(60))
    ((to, failure),) = deliveries
    assert to is answer and isinstance(failure, HttpError)
    assert (failure.status, failure.message) == (400, "one token is too few")
    assert engine.cancelled == ["a"]


def test_cancelled_requests_get_no_more_outputs() -> None:
    answer = Answer(["a"])
    engine, deliveries = run(Submit(answer, [request("a", 50)]), Cancel(["a", "z"]), Drain(60))
    assert not deliveries and engine.cancelled == ["a", "z"]


def test_answers_fail_when_the_time_to_drain_is_over() -> None:
    answer = Answer(["a"])
    engine, deliveries = run(Submit(answer, [request("a", 10**6)]), Drain(0.05))
    failure = deliveries[-1][1]
    assert isinstance(failure, HttpError) and failure.status == 503
    assert engine.cancelled == ["a"]


def tokens_of(name: str, deliveries: list[Delivery]) -> list[int]:
    """Return the tokens of a request."""
    items = [item for _, item in deliveries if isinstance(item, RequestOutput)]
    return [i for item in items if item.request_id == name for i in item.new_token_ids]


def outputs_at(times: list[float], num_streams: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the tokens of each delivery of one of several answers with one token a step."""
    sent: list[list[Delivery]] = []
    box = Outbox(sent.append)
    answers = {str(i): Answer([str(i)]) for i in range(num_streams)}
    for token, now in enumerate(times):
        monkeypatch.setattr("time.monotonic", lambda now=now: now)
        for name, answer in answers.items():
            box.add(answer, output(name, token, is_last=token == len(times) - 1))
        box.send_due()
    return [tokens_of("0", delivery) for delivery in sent]


def held(engine: FakeEngine, num_streams: int = 200) -> list[list[Delivery]]:
    """Run three steps of many streams and whatever comes then; return the deliveries."""
    inbox: SimpleQueue[Command] = SimpleQueue()
    for i in range(num_streams):
        inbox.put(Submit(Answer([f"{i}"]), [request(f"{i}", 5)]))
    sent: list[list[Delivery]] = []
    loop = EngineLoop(cast(Engine, engine), inbox, sent.append)
    with pytest.raises(RankError):
        loop.run()
    return sent


def test_a_step_that_fails_hands_over_the_tokens_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 100.0)  # no time passes
    sent = held(FakeEngine(last_step=4))
    assert [tokens_of("7", delivery) for delivery in sent] == [[0], [1, 2]]


def test_tokens_do_not_wait_for_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    engine = FakeEngine(last_step=4)
    engine.computes_prompts = True
    assert [tokens_of("7", delivery) for delivery in held(engine)] == [[0], [1], [2]]


def test_the_first_token_of_each_choice_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    sent: list[list[Delivery]] = []
    box = Outbox(sent.append)
    answers = {str(i): Answer([f"{i}a", f"{i}b"]) for i in range(200)}
    for choice in "ab":
        for name, answer in answers.items():
            box.add(answer, output(f"{name}{choice}", 1))
        box.send_due()
    assert tokens_of("7a", sent[0]) == tokens_of("7b", sent[1]) == [1]


def test_many_streams_get_their_tokens_together(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [100 + i / 32 for i in range(8)]
    assert outputs_at(steps, 1, monkeypatch) == [[0], [1], [2], [3], [4], [5], [6], [7]]
    assert outputs_at(steps, 20, monkeypatch) == [[0], [1, 2], [3, 4], [5, 6], [7]]
    # The first and the last ones never wait; no stream waits for longer than 0.1 s.
    assert outputs_at(steps, 200, monkeypatch) == [[0], [1, 2, 3, 4], [5, 6, 7]]


def test_a_last_output_does_not_take_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 100.0)  # no time passes
    sent: list[list[Delivery]] = []
    box = Outbox(sent.append)
    first, second = Answer(["a"]), Answer(["b"])
    for item in (output("a", 1), output("b", 1)):
        box.add(first if item.request_id == "a" else second, item)
    box.send_due()
    box.add(first, output("a", 2, is_last=True))
    box.add(second, output("b", 2))
    box.send_due()
    assert [(answer is first) for answer, _ in sent[-1]] == [True]
    box.add(second, output("b", 3))
    box.fail({second}, HttpError("gone", 503))
    assert [getattr(item, "new_token_ids", "gone") for _, item in sent[-2] + sent[-1]] == [
        *([2], [3], "gone")
    ]
    box.drop(second)


def test_outputs_that_a_failure_has_taken_along_are_not_due_again() -> None:
    sent: list[list[Delivery]] = []
    box = Outbox(sent.append)
    box.add(Answer(["a"]), output("a", 1))  # the first one, which does not wait
    box.fail(set(), HttpError("gone", 503))
    box.send_due()
    assert len(sent) == 1


def test_unread_outputs_are_joined() -> None:
    async def main() -> None:
        answer = Answer(["a", "b"])
        for item in (output("a", 1), output("b", 5), output("a", 2), output("a", 3, is_last=True)):
            answer.push(item)
        first, second = await answer.read()
        assert (first.new_token_ids, first.new_text) == ([1, 2, 3], "123")
        assert first.completion is not None and second.new_token_ids == [5]
        assert answer.unfinished == {"b"}
        assert await answer.read(0.01) == []
        answer.push(output("b", 6))
        answer.push(HttpError("gone", 503))
        assert [item.new_token_ids for item in await answer.read()] == [[6]]
        with pytest.raises(HttpError, match="gone"):
            await answer.read()

    asyncio.run(main())


def front(**limits: Any) -> Front:
    served = Served(model="m", fingerprint="", chat_format=None, defaults=Defaults())
    made = Front(served, Limits(**limits))
    made._engine = cast(Engine, FakeEngine())
    made.status = type(made.status).READY
    return made


def test_a_client_that_does_not_read_is_cut_off() -> None:
    async def main() -> None:
        made = front()
        with made.answering([request("a")]) as answer:
            made._receive([(answer, output("a", *range(MAX_UNREAD_TOKENS)))])
            made._receive([(answer, output("b", *range(MAX_UNREAD_TOKENS)))])
            assert made._inbox.qsize() == 1
            made._receive([(answer, output("a", 1))])
            assert isinstance(made._inbox.get(), Submit)
            assert made._inbox.get() == Cancel(("a",))

    asyncio.run(main())


def test_the_line_is_bounded_and_what_is_left_is_cancelled() -> None:
    async def main() -> None:
        made = front(max_waiting=1)
        with made.answering([request("a"), request("b"), request("c")]):
            with pytest.raises(HttpError) as refused, made.answering([request("d")]):
                pass
            assert (refused.value.status, refused.value.retry_after) == (429, 1)
            with pytest.raises(HttpError) as refused, made.preparing():
                pass
            assert refused.value.status == 429
        with pytest.raises(HttpError) as refused, made.answering([request(n) for n in "abcd"]):
            pass
        assert refused.value.status == 400, "never accepted, so not to be tried again"
        made._inbox.get()
        cancelled = made._inbox.get()
        assert isinstance(cancelled, Cancel) and {*cancelled.request_ids} == {"a", "b", "c"}
        full = pytest.raises(HttpError, match="queued")
        with made.answering([request("d")]), made.preparing(), made.preparing(), full:
            made.preparing().__enter__()

    asyncio.run(main())


def test_a_signal_before_the_model_is_ready_still_drains() -> None:
    made = front()
    made.status = type(made.status).LOADING
    made.drain(60)
    made.serve(cast(Engine, FakeEngine()), {})
    assert made.status.value == "draining"


def test_a_signal_does_not_hide_a_failure() -> None:
    made = front()
    made.fail("rank 1 has died")
    made.drain(60)
    assert (made.status.value, made.reason) == ("failed", "rank 1 has died")


def test_a_request_that_comes_after_the_last_step_is_told_that_the_server_stops() -> None:
    made = front()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    made.attach(loop)
    is_in_line = threading.Event()

    async def ask() -> str:
        with made.answering([request("late")]) as answer:
            is_in_line.set()
            with pytest.raises(HttpError) as failed:
                await answer.read()
        return failed.value.message

    class Late(SimpleQueue[Command]):
        """An inbox whose reader does not come to the last command."""

        def get(self, *args: Any, **more: Any) -> Command:
            assert is_in_line.wait(60)
            return Drain(0)

        def get_nowait(self) -> Command:
            raise Empty

    made._inbox = Late()
    try:
        asked = asyncio.run_coroutine_threadsafe(ask(), loop)
        made.serve(cast(Engine, FakeEngine()), {})
        assert asked.result(60) == "the server is stopping"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

"""The chat with a scripted engine and a console that is a list."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from dsv3.engine.engine import Engine
from dsv3.engine.metrics import Metrics
from dsv3.request import Completion, Request, RequestOutput
from dsv3.serve.chat import Chat
from dsv3.serve.conversation import OnFull
from dsv3.text.chat import ChatFormat
from dsv3.text.defaults import Defaults, Sampling
from dsv3.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[1] / "checkpoints" / "demo-v3"
TOKENIZER = Tokenizer.load(DEMO)
VOCAB_SIZE = 2048
THINKS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "[assistant]{{ '<think>' if thinking else '' }}"
)
INTERRUPT = "^C"  # among the pieces of an answer: here the user presses it


class ScriptedEngine:
    """Answers with given pieces of text, one per step."""

    tokenizer = None  # no grammar is asked for

    def __init__(self, answers: Sequence[Sequence[str]], max_seq_len: int = 1000) -> None:
        self.max_seq_len, self.vocab_size = max_seq_len, VOCAB_SIZE
        self.cache_tokens, self.metrics = 4096, Metrics()
        self.requests: list[Request] = []
        self.dropped: list[str] = []
        self.interrupted = False
        self._answers = deque(answers)
        self._left = deque[str]()
        self._said = ""

    @property
    def prompts(self) -> list[str]:
        return [TOKENIZER.decode(r.prompt_ids, False) for r in self.requests]

    def add(self, request: Request) -> None:
        self.requests.append(request)
        self._left, self._said = deque(self._answers.popleft()), ""

    def cancel(self, request_id: str) -> None:
        assert request_id == self.requests[-1].request_id
        self._left.clear()

    def drop_conversation(self, conversation_id: str) -> None:
        self.dropped.append(conversation_id)

    def has_work(self) -> bool:
        return bool(self._left)

    def step(self) -> list[RequestOutput]:
        if self._left[0] == INTERRUPT:
            self.interrupted = True
            return []
        request, text = self.requests[-1], self._left.popleft()
        if not self._said:
            self.metrics.pages_used = 1
            self.metrics.pages_idle = 1
            self.metrics.pages_free = 6
            self.metrics.prefill_tokens += 3
            self.metrics.reused_tokens += len(request.prompt_ids) - 3
        self._said += text
        output = RequestOutput(request_id=request.request_id, new_text=text)
        output.new_token_ids = TOKENIZER.encode(text, False)
        if not self._left:
            ids = TOKENIZER.encode(self._said, False)
            room = self.max_seq_len - len(request.prompt_ids)
            full = len(ids) >= min(room, request.params.max_tokens)
            output.completion = Completion(
                request_id=request.request_id,
                prompt_ids=request.prompt_ids,
                token_ids=ids,
                text=self._said,
                finish_reason="length" if full else "stop",
            )
        return [RequestOutput(request_id="another"), output]


class ListConsole:
    """Says the lines of a list, and notes all that it is shown."""

    help = "how to type"

    def __init__(self, engine: ScriptedEngine, lines: Sequence[str]) -> None:
        self._engine, self._lines = engine, deque(lines)
        self.answers: list[str] = [""]
        self.thoughts, self.shown = "", list[str]()

    def read(self) -> str | None:
        return self._lines.popleft() if self._lines else None

    def show(self, text: str) -> None:
        self.shown.append(text)

    def note(self, text: str) -> None:
        self.shown.append(text)

    def answer(self, text: str) -> None:
        self.answers[-1] += text

    def thought(self, text: str) -> None:
        self.thoughts += text

    def end_answer(self, remark: str) -> None:
        self.answers.append("")
        self.shown += [remark] if remark else []

    def interrupted(self) -> bool:
        found, self._engine.interrupted = self._engine.interrupted, False
        return found


def talk(
    lines: Sequence[str],
    answers: Sequence[Sequence[str]] = (),
    template: str | None = None,
    max_seq_len: int = 1000,
    on_full: OnFull = "drop",
    **defaults: Any,
) -> tuple[ScriptedEngine, ListConsole]:
    """Have a chat; return what the engine heard and what the user saw."""
    tokenizer = Tokenizer.load(DEMO)
    tokenizer.chat_template = template or tokenizer.chat_template
    engine = ScriptedEngine(answers, max_seq_len)
    console = ListConsole(engine, lines)
    settings = replace(Defaults(flags=Sampling(temperature=0.0)), **defaults)
    Chat(cast(Engine, engine), ChatFormat(tokenizer), settings, console, on_full).run("demo")
    return engine, console

"""The chat of rank 0: messages of the user, streamed answers, commands."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from dsv3.engine.engine import Engine
from dsv3.errors import CheckpointError, RequestError, one_line, shorten
from dsv3.request import Completion, Request, RequestOutput
from dsv3.serve.conversation import Conversation, OnFull, Question, RenderedPrompt, Turn
from dsv3.serve.settings import NAMES, Settings, known_name, split_setting
from dsv3.serve.terminal import Console
from dsv3.text.chat import ChatFormat
from dsv3.text.defaults import Defaults
from dsv3.text.text_request import token_requests
from dsv3.text.thoughts import AnswerParts, ThoughtStream

HELP = """\
/clear            begin a new conversation
/undo             forget the last message and its answer
/regenerate       answer the last message again
/set NAME VALUE   change temperature, top_p, seed ...; - is the first value
                  (/set alone shows all)
/system TEXT      set the system message; - removes it (/system alone shows it)
/stats            tokens, speed, use of the context
/help             this list
/exit             leave; also Ctrl-D
A message may begin with / if a space goes before it.
"""


@dataclass(slots=True, kw_only=True)
class _Answer:
    """An answer so far, and its statistics.

    Attributes:
        text: the whole text: marks, thought and content.
        content, thought: the two parts without marks.
        computed, reused: prompt tokens that were computed, and that were in the cache.
        first_seconds: seconds to the first token.
        completion: None if the user has stopped the answer.
    """

    prompt_len: int
    text: str = ""
    content: str = ""
    thought: str = ""
    computed: int = 0
    reused: int = 0
    num_tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0
    completion: Completion | None = None

    @property
    def pace(self) -> str:
        """The rate of tokens after the first one, in words; empty if there are none."""
        rate = (self.num_tokens - 1) / max(self.seconds - self.first_seconds, 1e-9)
        return f", then {rate:.1f} tok/s" if rate > 0 else ""

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt_len:,} tokens ({self.reused:,} reused, {self.computed:,} "
            f"computed), answer {self.num_tokens:,} tokens in {self.seconds:.1f} s"
        )


@dataclass(slots=True)
class Chat:
    """A user's chat with the model; `run` returns when the user leaves.

    Args:
        engine: answers requests; not used by other code meanwhile.
        format: renders conversations.
        defaults: sampling, thinking and the system message.
        console: reads messages and shows answers.
        on_full: "drop" the oldest turns when the context is full, or "stop".
    """

    engine: Engine
    format: ChatFormat
    defaults: Defaults
    console: Console
    on_full: OnFull = "drop"
    _settings: Settings = field(init=False)
    _talk: Conversation = field(init=False)
    _asked: Question | None = None
    _answers: list[_Answer] = field(default_factory=list)
    _num_conversations: int = 0
    _num_questions: int = 0
    _num_keys: int = 0

    def __post_init__(self) -> None:
        self._settings = Settings(self.defaults)
        self._begin()

    def run(self, model: str) -> None:
        """Show the model's name; answer messages until the user leaves."""
        self.console.note(
            f"{model}, context of {self.engine.max_seq_len:,} tokens; /help lists the commands, "
            "Ctrl-D leaves"
        )
        self._remark_thinking(self.defaults.thinking or None)
        while (message := self.console.read()) is not None:
            command = re.fullmatch(r"(/[a-zA-Z]*)(?:\s+(.*))?", message.rstrip(), re.DOTALL)
            if command is None:
                self._send(message)
            elif command[1].lower() == "/exit":
                return
            else:
                self._run_command(command[1].lower(), command[2] or "")

    def _run_command(self, command: str, text: str) -> None:
        commands: dict[str, Callable[[str], None]] = {
            "/clear": lambda _: self._clear(),
            "/undo": lambda _: self._undo(),
            "/regenerate": lambda _: self._regenerate(),
            "/set": self._set,
            "/system": lambda text: self._system(text.strip()),
            "/stats": lambda _: self._stats(),
            "/help": lambda _: self.console.show(HELP + self.console.help),
        }
        if command in commands:
            commands[command](text)
            return
        value_name = command.removeprefix("/").replace("-", "_")
        if value_name in NAMES:
            close = [f"/set {value_name}"]
        else:
            close = get_close_matches(command, [*commands, "/exit"], n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        self.console.note(f"{command} is not a command{hint}; /help lists them")

    @property
    def _name(self) -> str:
        """Name of the conversation, which changes with /clear."""
        return f"chat-{self._num_conversations}"

    def _begin(self) -> None:
        self._talk = Conversation(self.format, self.engine.max_seq_len, self.on_full)
        self._asked = None
        self._num_conversations += 1

    def _send(self, text: str) -> None:
        if text.strip():
            self._num_questions += 1
            self._num_keys += 1
            self._ask(Question(text, self._num_questions, self._num_keys), self._talk.turns)

    def _regenerate(self) -> None:
        """Answer the last message again with other random numbers."""
        if self._asked is None:
            self.console.note("there is no message to answer again")
            return
        if not self._settings.request([], "").params.temperature:
            self.console.note("the temperature is 0: the answer will be the same")
        question = replace(self._asked, attempt=self._asked.attempt + 1)
        self._ask(question, self._before(question))

    def _undo(self) -> None:
        """Remove the last message, and its answer if it has one."""
        if self._asked is None:
            self.console.note("there is nothing to undo")
            return
        self.console.note(f"forgotten: {one_line(shorten(self._asked.text))}")
        turns = self._talk.turns = self._before(self._asked)
        self._asked = turns[-1].question if turns else None

    def _before(self, question: Question) -> list[Turn]:
        return [turn for turn in self._talk.turns if turn.question.number < question.number]

    def _ask(self, question: Question, earlier: list[Turn]) -> None:
        """Answer a message after earlier turns; add both to the turns if there is an answer."""
        try:
            kept, prompt = self._talk.prompt(question, earlier, self._settings)
            request = self._request(question, prompt)
            self.engine.add(request)
        except (RequestError, CheckpointError) as error:
            self.console.note(one_line(f"not sent: {error}"))
            return
        self._asked = question
        self._drop(len(earlier) - len(kept))
        answer = self._stream(request)
        self._answers.append(answer)
        completion = answer.completion
        if completion is not None and not request.params.stop:  # tokens may include a stop string
            text = prompt.text + self.format.hide_answer(answer.text)
            self._talk.remember(RenderedPrompt(text, prompt.ids + completion.token_ids))
        remark = self._remark(answer)
        if answer.content or (completion is not None and completion.finish_reason == "stop"):
            reply = {"role": "assistant", "content": answer.content}
            if answer.thought:
                reply["reasoning_content"] = answer.thought.strip()
            num_tokens = answer.prompt_len + answer.num_tokens
            self._talk.turns = [*kept, Turn(question, reply, num_tokens)]
        elif len(self._talk.turns) > len(kept):
            remark += "; the previous answer is kept"
        else:
            remark += "; the question is forgotten, since it has no answer"
        self.console.end_answer(remark)

    def _drop(self, number: int) -> None:
        """Drop a number of the oldest turns."""
        if number:
            self._talk.turns = self._talk.turns[number:]
            oldest = "the oldest turn was" if number == 1 else f"the {number} oldest turns were"
            limit = self.engine.max_seq_len
            self.console.note(f"{oldest} dropped: the context of {limit:,} tokens is full")

    def _request(self, question: Question, prompt: RenderedPrompt) -> Request:
        """Return the engine's request for the answer to a message."""
        text_request = self._settings.request([], f"chat-{question.key}")
        name = f"{self._name}.{question.number}"
        request = token_requests(text_request, prompt.ids, name, self.engine)[0]
        return replace(request, conversation_id=self._name, answer=question.attempt)

    def _stream(self, request: Request) -> _Answer:
        """Stream the answer to the console until it ends or the user stops it."""
        answer = _Answer(prompt_len=len(request.prompt_ids))
        thoughts = ThoughtStream(self.format.opens_thought(request.prompt_ids))
        metrics_before = replace(self.engine.metrics)
        start = time.perf_counter()
        while answer.completion is None and self.engine.has_work():
            for output in self.engine.step():
                if output.request_id == request.request_id:
                    self._show(answer, output, thoughts, time.perf_counter() - start)
            if answer.completion is None and self.console.interrupted():
                self.engine.cancel(request.request_id)
                break
        answer.seconds = time.perf_counter() - start
        answer.computed = self.engine.metrics.prefill_tokens - metrics_before.prefill_tokens
        answer.reused = self.engine.metrics.reused_tokens - metrics_before.reused_tokens
        self._show_text(answer, thoughts.finish())
        return answer

    def _show(
        self, answer: _Answer, output: RequestOutput, thoughts: ThoughtStream, seconds: float
    ) -> None:
        if output.new_token_ids and not answer.num_tokens:
            answer.first_seconds = seconds
        answer.num_tokens += len(output.new_token_ids)
        answer.text += output.new_text
        self._show_text(answer, thoughts.push(output.new_text))
        answer.completion = output.completion

    def _show_text(self, answer: _Answer, parts: AnswerParts) -> None:
        answer.thought += parts.thought
        answer.content += parts.answer
        self.console.thought(parts.thought)
        if parts.answer and answer.thought and answer.content == parts.answer:
            self.console.answer("\n\n")  # a blank line after the thought
        self.console.answer(parts.answer)

    def _remark(self, answer: _Answer) -> str:
        """Return why an answer is incomplete; empty if it is complete."""
        limit = self.engine.max_seq_len
        if answer.completion is None:
            return "stopped"
        if answer.completion.error:
            return answer.completion.error
        if answer.completion.finish_reason != "length":
            return ""
        if answer.prompt_len + answer.num_tokens >= limit:
            advice = "/clear begins a new conversation"
            if self.on_full == "drop":
                advice = "the next message drops the oldest turns"
            return f"the context of {limit:,} tokens is full; {advice}"
        return f"cut at {answer.num_tokens:,} tokens; /set max_tokens allows more"

    def _clear(self) -> None:
        self.engine.drop_conversation(self._name)
        self._begin()
        self.console.note("a new conversation")

    def _set(self, text: str) -> None:
        """Set a value, or show one or all values."""
        name, value = split_setting(text)
        if not name:
            self.console.show("\n".join(f"{n:<20}{self._settings.shown(n)}" for n in NAMES))
            return
        try:
            name = known_name(name)
            if value:
                initial = Settings(self.defaults)
                self._settings = self._settings.with_value(name, value, initial)
        except RequestError as error:
            self.console.note(one_line(f"not set: {error}"))
            return
        if value and name == "seed":  # from here on, the same messages get the same answers
            self._num_keys = 0
        self.console.note(f"{name}: {self._settings.shown(name)}")
        if value and name == "thinking":
            self._remark_thinking(self._settings.defaults.thinking)

    def _remark_thinking(self, thinking: bool | None) -> None:
        if remark := self.format.thinking_remark(thinking):
            self.console.note(remark)

    def _system(self, text: str) -> None:
        if text:
            defaults = replace(self._settings.defaults, system=None if text == "-" else text)
            self._settings = replace(self._settings, defaults=defaults)
        system = self._settings.defaults.system
        self.console.note(f"system message: {system}" if system else "no system message")

    def _stats(self) -> None:
        if not self._answers:
            self.console.note("no answers yet")
            return
        last = self._answers[-1]
        metrics = self.engine.metrics
        context = self._talk.turns[-1].num_tokens if self._talk.turns else 0
        filled = metrics.pages_used + metrics.pages_idle
        cached = self.engine.cache_tokens * filled // max(1, filled + metrics.pages_free)
        total = _Answer(
            prompt_len=sum(answer.prompt_len for answer in self._answers),
            computed=sum(answer.computed for answer in self._answers),
            reused=sum(answer.reused for answer in self._answers),
            num_tokens=sum(answer.num_tokens for answer in self._answers),
            seconds=sum(answer.seconds for answer in self._answers),
        )
        lines = (
            f"last answer    {last}",
            f"{'':14} first token after {last.first_seconds:.2f} s{last.pace}",
            f"all {len(self._answers):<10,} {total}",
            f"context        {context:,} of {self.engine.max_seq_len:,} tokens",
            f"cache          {cached:,} of {self.engine.cache_tokens:,} tokens",
        )
        self.console.show("\n".join(lines))

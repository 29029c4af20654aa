"""The chat of rank 0: what the user says in, answers out as they are made, over many turns."""

import re
import time
from dataclasses import dataclass, field, replace
from typing import Any

from dsv3.engine.engine import Engine
from dsv3.errors import CheckpointError, RequestError, one_line
from dsv3.request import Completion, Request, RequestOutput
from dsv3.serve.terminal import Console
from dsv3.text.chat import ChatFormat
from dsv3.text.defaults import TURN_DEFAULTS, Defaults
from dsv3.text.openai_format import plain_request
from dsv3.text.text_request import token_requests
from dsv3.text.thoughts import Piece, ThoughtStream

HELP = """\
/clear         begin a new conversation
/system TEXT   set the system message (/system shows it, /system - removes it)
/stats         tokens, speed, room in the context
/help          this list
/exit          leave; also Ctrl-D
Ctrl-C stops an answer. A message may begin with / if a space goes before it."""


@dataclass(slots=True, kw_only=True)
class _Answer:
    """An answer while it is made, and what it took.

    Attributes:
        text: all of it, the thought included, as `content` and `thought` are without each other.
        computed, reused: tokens of the prompt that were computed or in the cache.
        first_seconds: until the first token.
        completion: None if it was stopped.
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
        """How fast further tokens came, if any did."""
        rate = (self.num_tokens - 1) / max(self.seconds - self.first_seconds, 1e-9)
        return f", then {rate:.1f} tok/s" if rate > 0 else ""

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt_len:,} tokens ({self.reused:,} reused, {self.computed:,} "
            f"computed), answer {self.num_tokens:,} tokens in {self.seconds:.1f} s"
        )


@dataclass(slots=True)
class Chat:
    """A user's dialogue with the model; `run` returns when the user leaves.

    Args:
        engine: answers requests; used by nobody else meanwhile.
        format: writes conversations.
        defaults: sampling, thinking and the system message.
        console: the user's side.
    """

    engine: Engine
    format: ChatFormat
    defaults: Defaults
    console: Console
    _messages: list[dict[str, Any]] = field(default_factory=list)
    _answers: list[_Answer] = field(default_factory=list)
    _num_conversations: int = 1
    _num_turns: int = 0
    # A prompt with its answer, as text and as tokens: the beginning of the next prompt.
    _known: tuple[str, list[int]] = ("", [])

    def run(self, model: str) -> None:
        """Greet in the name of the model; answer until the user leaves."""
        self.console.note(
            f"{model}, context of {self.engine.max_seq_len:,} tokens; /help lists the commands, "
            "Ctrl-D leaves"
        )
        if remark := self.format.thinking_remark(self.defaults.thinking or None):
            self.console.note(remark)
        while (line := self.console.read()) is not None:
            command = re.fullmatch(r"(/[a-zA-Z]*)(?:\s+(.*))?", line.rstrip(), re.DOTALL)
            if command is None:
                self._turn(line.strip())
            elif not self._obey(command[1].lower(), command[2] or ""):
                return

    def _obey(self, command: str, text: str) -> bool:
        """Do what a command says; return whether the chat goes on."""
        if command == "/clear":
            self._clear()
        elif command == "/system":
            self._system(text.strip())
        elif command == "/stats":
            self._stats()
        elif command == "/help":
            self.console.show(HELP)
        elif command != "/exit":
            self.console.note(f"{command} is not a command; /help lists them")
        return command != "/exit"

    @property
    def _conversation(self) -> str:
        return f"chat-{self._num_conversations}"

    def _turn(self, text: str) -> None:
        if not text:
            return
        asked = [*self._messages, {"role": "user", "content": text}]
        self._num_turns += 1
        try:
            prompt, request = self._request(asked)
            self.engine.add(request)
        except (RequestError, CheckpointError) as error:
            self.console.note(one_line(f"not sent: {error}"))
            return
        answer = self._stream(request)
        self._answers.append(answer)
        completion = answer.completion
        if completion is None:
            self._known = ("", [])
        else:
            text = prompt + self.format.hide_answer(answer.text)
            self._known = (text, request.prompt_ids + completion.token_ids)
        remark = self._remark(answer)
        if answer.content or (completion is not None and completion.finish_reason == "stop"):
            said = {"role": "assistant", "content": answer.content}
            if answer.thought:
                said["reasoning_content"] = answer.thought.strip()
            self._messages = [*asked, said]
        else:
            remark += "; without an answer the question is forgotten, too"
        self.console.end_answer(remark)

    def _request(self, messages: list[dict[str, Any]]) -> tuple[str, Request]:
        """Return the prompt of the next answer as text, and the request."""
        name = f"chat-{self._num_turns}"
        asked = plain_request(messages, name, self.defaults, TURN_DEFAULTS)
        assert asked.messages is not None
        prompt = self.format.render(asked.messages, bool(asked.thinking))
        ids = self._encode(prompt)
        limit = self.engine.max_seq_len
        if len(ids) >= limit:
            what = "the conversation with it has" if self._messages else "it has"
            way_out = "/clear begins a new one" if self._messages else "it must be shorter"
            raise RequestError(
                f"{what} {len(ids):,} tokens and the context holds {limit:,}, question and "
                f"answer together; {way_out}"
            )
        name = f"{self._conversation}.{self._num_turns}"
        request = token_requests(asked, ids, name, limit, self.engine.vocab_size)[0]
        return prompt, replace(request, conversation_id=self._conversation)

    def _encode(self, prompt: str) -> list[int]:
        """Make the tokens of a prompt; keep those it shares with the last one and its answer.

        The text of an answer may have other tokens than those the model chose, and it is those
        that are in the cache.
        """
        text, ids = self._known
        if text and prompt.startswith(text):
            return ids + self.format.encode(prompt.removeprefix(text))
        return self.format.encode(prompt)

    def _stream(self, request: Request) -> _Answer:
        """Show the answer as it is made, until it ends or the user has enough."""
        answer = _Answer(prompt_len=len(request.prompt_ids))
        thoughts = ThoughtStream(self.format.opens_thought(request.prompt_ids))
        before, start = replace(self.engine.metrics), time.perf_counter()
        while answer.completion is None and self.engine.has_work():
            for output in self.engine.step():
                if output.request_id == request.request_id:
                    self._show(answer, output, thoughts, time.perf_counter() - start)
            if answer.completion is None and self.console.interrupted():
                self.engine.cancel(request.request_id)
                break
        answer.seconds = time.perf_counter() - start
        answer.computed = self.engine.metrics.prefill_tokens - before.prefill_tokens
        answer.reused = self.engine.metrics.reused_tokens - before.reused_tokens
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

    def _show_text(self, answer: _Answer, piece: Piece) -> None:
        answer.thought += piece.thought
        answer.content += piece.answer
        self.console.thought(piece.thought)
        if piece.answer and answer.thought and answer.content == piece.answer:
            self.console.answer("\n\n")  # a blank line after the thought
        self.console.answer(piece.answer)

    def _remark(self, answer: _Answer) -> str:
        """Say why an answer has no end."""
        limit = self.engine.max_seq_len
        if answer.completion is None:
            return "stopped"
        if answer.completion.error:
            return answer.completion.error
        if answer.completion.finish_reason != "length":
            return ""
        if answer.prompt_len + answer.num_tokens >= limit:
            return f"the context of {limit:,} tokens is full; /clear begins a new conversation"
        return f"cut at {answer.num_tokens:,} tokens; --max-new-tokens allows more"

    def _clear(self) -> None:
        self.engine.drop_conversation(self._conversation)
        self._messages, self._known = [], ("", [])
        self._num_conversations += 1
        self.console.note("a new conversation")

    def _system(self, text: str) -> None:
        if text:
            self.defaults = replace(self.defaults, system=None if text == "-" else text)
        system = self.defaults.system
        self.console.note(f"system message: {system}" if system else "no system message")

    def _stats(self) -> None:
        if not self._answers:
            self.console.note("no answers yet")
            return
        last, metrics = self._answers[-1], self.engine.metrics
        context = last.prompt_len + last.num_tokens if self._messages else 0
        filled = metrics.pages_used + metrics.pages_idle
        cached = self.engine.cache_tokens * filled // max(1, filled + metrics.pages_free)
        summed = ("prompt_len", "computed", "reused", "num_tokens", "seconds")
        every = _Answer(**{name: sum(getattr(a, name) for a in self._answers) for name in summed})
        lines = (
            f"last answer    {last}",
            f"{'':14} first token after {last.first_seconds:.2f} s{last.pace}",
            f"all {len(self._answers):<10,} {every}",
            f"context        {context:,} of {self.engine.max_seq_len:,} tokens",
            f"cache          {cached:,} of {self.engine.cache_tokens:,} tokens",
        )
        self.console.show("\n".join(lines))

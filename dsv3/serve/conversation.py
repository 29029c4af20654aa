"""The turns of a chat, and the prompt of the next answer."""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dsv3.errors import RequestError
from dsv3.serve.settings import Settings
from dsv3.text.chat import ChatFormat

OnFull = Literal["drop", "stop"]
_FREE_PART = 8  # the context is full if less than 1 / 8 of it is free for the answer


@dataclass(frozen=True, slots=True)
class Question:
    """A message of the user.

    Attributes:
        number: number of the message in the chat.
        key: determines the random numbers of its answers, together with the seed.
        attempt: number of the answer; each has its own random numbers.
    """

    text: str
    number: int
    key: int
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """A message of the user with the model's reply.

    Attributes:
        num_tokens: tokens of the conversation up to the end of this turn.
    """

    question: Question
    reply: dict[str, Any]
    num_tokens: int

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The message and the reply in the OpenAI format."""
        return [{"role": "user", "content": self.question.text}, self.reply]


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A rendered conversation as text and as tokens."""

    text: str
    ids: list[int]


class Conversation:
    """The turns of a chat.

    Args:
        format: renders the turns as a prompt.
        limit: tokens of the context.
        on_full: "drop" the oldest turns from a prompt when the context is full, or "stop".

    Attributes:
        turns: the turns, oldest first.
    """

    def __init__(self, format: ChatFormat, limit: int, on_full: OnFull) -> None:
        self.turns: list[Turn] = []
        self._format = format
        self._limit = limit
        self._on_full = on_full
        # Prompts with answers, with which later prompts begin; two, for /regenerate.
        self._known: deque[RenderedPrompt] = deque(maxlen=2)

    def remember(self, rendered: RenderedPrompt) -> None:
        """Keep the tokens of a prompt and its answer for later prompts that begin with its text.

        Tokenizing an answer's text may give other tokens than the model has generated, but only
        the generated ones are in the cache.
        """
        self._known.append(rendered)

    def prompt(
        self, question: Question, earlier: list[Turn], settings: Settings
    ) -> tuple[list[Turn], RenderedPrompt]:
        """Return the turns to keep before a message, and the prompt.

        A full context is reduced to half its size, so that the next turns fit without dropping
        more, and begin with the same cached prompt.

        Raises:
            RequestError: the prompt does not fit the context.
        """
        prompt = self._render(question, earlier, settings)
        max_tokens = settings.request([], "").params.max_tokens
        is_full = len(prompt.ids) + min(max_tokens, self._limit // _FREE_PART) > self._limit
        if is_full and self._on_full == "drop":

            def fits(first: int) -> bool:
                ids = self._render(question, earlier[first:], settings).ids
                return len(ids) <= self._limit // 2

            earlier = earlier[bisect_left(range(len(earlier)), True, key=fits) :]
            prompt = self._render(question, earlier, settings)
        if len(prompt.ids) >= self._limit:
            subject = "it has"
            advice = "it must be shorter"
            if earlier:
                subject = "the conversation with it has"
                advice = "/clear begins a new one, --on-full drop drops the oldest turns"
            raise RequestError(
                f"{subject} {len(prompt.ids):,} tokens and the context holds {self._limit:,}, "
                f"question and answer together; {advice}"
            )
        return earlier, prompt

    def _render(
        self, question: Question, earlier: Sequence[Turn], settings: Settings
    ) -> RenderedPrompt:
        """Render a conversation up to the answer to a message."""
        messages = [message for turn in earlier for message in turn.messages]
        messages.append({"role": "user", "content": question.text})
        request = settings.request(messages, "")
        assert request.messages is not None
        text = self._format.render(request.messages, bool(request.thinking))
        for known in reversed(self._known):
            if text.startswith(known.text):
                new_ids = self._format.encode(text.removeprefix(known.text))
                return RenderedPrompt(text, known.ids + new_ids)
        return RenderedPrompt(text, self._format.encode(text))

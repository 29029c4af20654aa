"""The turns of a chat, and how they become the prompt of the next answer."""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dsv3.errors import RequestError
from dsv3.serve.settings import Settings
from dsv3.text.chat import ChatFormat

OnFull = Literal["drop", "stop"]
_ROOM = 8  # a full context has less than this part of it free for an answer


@dataclass(frozen=True, slots=True)
class Question:
    """A message of the user.

    Attributes:
        number: counts the messages of the chat.
        key: names the random numbers of its answers, together with the seed.
        attempt: counts its answers; each has random numbers of its own.
    """

    text: str
    number: int
    key: int
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """A message of the user with the model's reply.

    Attributes:
        num_tokens: of the conversation up to its end.
    """

    question: Question
    reply: dict[str, Any]
    num_tokens: int

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Both as the chat format takes them."""
        return [{"role": "user", "content": self.question.text}, self.reply]


@dataclass(frozen=True, slots=True)
class Written:
    """A conversation as text and as tokens."""

    text: str
    ids: list[int]


class Conversation:
    """The turns of a chat.

    Args:
        format: writes them as a prompt.
        limit: tokens of the context.
        on_full: leave the oldest turns out of a prompt when the context is full, or stop.

    Attributes:
        turns: from the oldest to the newest.
    """

    def __init__(self, format: ChatFormat, limit: int, on_full: OnFull) -> None:
        self.turns: list[Turn] = []
        self._format, self._limit, self._on_full = format, limit, on_full
        # Prompts with their answers: the beginnings of further prompts. Two, to answer one again.
        self._known: deque[Written] = deque(maxlen=2)

    def remember(self, written: Written) -> None:
        """Keep the tokens of a prompt with its answer for prompts that begin so.

        The text of an answer may have other tokens than the model chose, and it is those that are
        in the cache.
        """
        self._known.append(written)

    def prompt(
        self, question: Question, earlier: list[Turn], settings: Settings
    ) -> tuple[list[Turn], Written]:
        """Return the turns that stay before a message, and the prompt.

        A full context is emptied down to its half: further turns find room then, and the part of
        their prompts that is in the cache.

        Raises:
            RequestError: the context cannot hold it.
        """
        prompt = self._write(question, earlier, settings)
        asked = settings.request([], "").params.max_tokens
        is_full = len(prompt.ids) + min(asked, self._limit // _ROOM) > self._limit
        if is_full and self._on_full == "drop":

            def fits(first: int) -> bool:
                ids = self._write(question, earlier[first:], settings).ids
                return len(ids) <= self._limit // 2

            earlier = earlier[bisect_left(range(len(earlier)), True, key=fits) :]
            prompt = self._write(question, earlier, settings)
        if len(prompt.ids) >= self._limit:
            what, way_out = "it has", "it must be shorter"
            if earlier:
                what = "the conversation with it has"
                way_out = "/clear begins a new one, --on-full drop drops the oldest turns"
            raise RequestError(
                f"{what} {len(prompt.ids):,} tokens and the context holds {self._limit:,}, "
                f"question and answer together; {way_out}"
            )
        return earlier, prompt

    def _write(self, question: Question, earlier: Sequence[Turn], settings: Settings) -> Written:
        """Write a conversation up to the answer to a message."""
        messages = [message for turn in earlier for message in turn.messages]
        messages.append({"role": "user", "content": question.text})
        asked = settings.request(messages, "")
        assert asked.messages is not None
        text = self._format.render(asked.messages, bool(asked.thinking))
        for known in reversed(self._known):
            if text.startswith(known.text):
                rest = self._format.encode(text.removeprefix(known.text))
                return Written(text, known.ids + rest)
        return Written(text, self._format.encode(text))

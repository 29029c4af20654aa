"""Thoughts: the text between think marks before the actual answer.

A thought is opened either by the prompt, or by the model at the start of its answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from dsv3.request import RequestOutput
from dsv3.text.stop_strings import StopChecker
from dsv3.text.tokenizer import Tokenizer

THINK = "<think>"
END_THINK = "</think>"

_TAIL = 8  # tokens at the end of a prompt that may contain a mark and white space after it


@dataclass(frozen=True, slots=True)
class SplitAnswer:
    """A complete answer; `reasoning` is None without a thought."""

    reasoning: str | None
    content: str


class TextPiece(str):
    """New text of an answer.

    Attributes:
        is_thought: True for text of the thought before the answer, and for its marks.
    """

    is_thought = False

    @classmethod
    def of_thought(cls, text: str) -> "TextPiece":
        """Return a piece with `is_thought`."""
        piece = cls(text)
        piece.is_thought = True
        return piece


@dataclass(frozen=True, slots=True)
class AnswerParts:
    """New text of an answer, split into parts in text order.

    Attributes:
        opening, closing: the marks around the thought, with the blank lines after them.
    """

    opening: str = ""
    thought: str = ""
    closing: str = ""
    answer: str = ""

    @property
    def before_answer(self) -> str:
        """All text before the actual answer."""
        return self.opening + self.thought + self.closing

    def texts(self) -> list[TextPiece]:
        """Return the same text as up to two pieces: the thought with its marks, and the answer."""
        texts = TextPiece.of_thought(self.before_answer), TextPiece(self.answer)
        return [text for text in texts if text]


class _Place(Enum):
    START = 0  # only white space so far, or the beginning of a mark
    OPENED = 1  # in the blank lines after the mark that opens the thought
    THOUGHT = 2
    CLOSED = 3  # in the blank lines after the mark that ends the thought
    ANSWER = 4


class ThoughtStream:
    """Splits the incremental text of an answer; all returned parts together are that text.

    Args:
        inside: True if the prompt has opened a thought.

    Attributes:
        has_thought: True if a thought was found so far; it may be empty.
    """

    def __init__(self, inside: bool) -> None:
        self.has_thought = inside
        self._place = _Place.START
        self._pending = ""
        self._end = StopChecker((END_THINK,))

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks that are valid as the next text."""
        if self._place is _Place.START:
            return (THINK, END_THINK) if self.has_thought else (THINK,)
        return (END_THINK,) if self._place in (_Place.OPENED, _Place.THOUGHT) else ()

    def push(self, text: str) -> AnswerParts:
        """Add text; return the parts of the text whose place is known."""
        text = self._pending + text
        self._pending = ""
        opening, text = self._open(text)
        thought, text = self._think(text)
        closing, text = self._close(text)
        return AnswerParts(opening, thought, closing, text)

    def push_output(self, output: RequestOutput) -> list[AnswerParts]:
        """Add the text of an output; after the last one, pending text is returned as well."""
        parts = [self.push(output.new_text)]
        return parts if output.completion is None else [*parts, self.finish()]

    def finish(self) -> AnswerParts:
        """Return the pending text."""
        pending = self._pending + self._end.finish()
        self._pending = ""
        return AnswerParts(thought=pending) if self.has_thought else AnswerParts(answer=pending)

    def _open(self, text: str) -> tuple[str, str]:
        """Return the opening of the thought, and the text after it."""
        after = text
        if self._place is _Place.START:
            after = text.lstrip()
            if after.startswith(THINK):
                self.has_thought = True
                after = after.removeprefix(THINK)
            elif THINK.startswith(after):
                self._pending = text
                return "", ""
            elif not self.has_thought:
                self._place = _Place.ANSWER
                return "", text
            else:
                after = text
            self._place = _Place.OPENED
        if self._place is _Place.OPENED:
            after = after.lstrip("\n")
            self._place = _Place.THOUGHT if after else _Place.OPENED
        return text[: len(text) - len(after)], after

    def _think(self, text: str) -> tuple[str, str]:
        """Return the text of the thought, and the text from its end mark on."""
        if self._place is not _Place.THOUGHT:
            return "", text
        thought, is_over = self._end.push(text)
        if not is_over:
            return thought, ""
        self._place = _Place.CLOSED
        return thought, END_THINK + self._end.rest

    def _close(self, text: str) -> tuple[str, str]:
        """Return the end mark of the thought with the blank lines after it, and the answer."""
        if self._place is not _Place.CLOSED:
            return "", text
        answer = text.removeprefix(END_THINK).lstrip("\n")
        if answer:
            self._place = _Place.ANSWER
        return text[: len(text) - len(answer)], answer


def split_answer(text: str, inside: bool) -> SplitAnswer:
    """Split a complete answer; `inside` is True if the prompt has opened a thought."""
    stream = ThoughtStream(inside)
    pushed = stream.push(text)
    last = stream.finish()
    if not stream.has_thought:
        return SplitAnswer(None, text)
    return SplitAnswer((pushed.thought + last.thought).strip(), pushed.answer + last.answer)


def begins_in_thought(tokenizer: Tokenizer | None, prompt_ids: Sequence[int]) -> bool:
    """Return True if the prompt of a conversation ends with a mark that opens a thought.

    If the mark is a token, the same text in other tokens does not count, since a user wrote it.
    """
    if tokenizer is None:
        return False
    mark = tokenizer.id_of(THINK)
    tail = prompt_ids[-_TAIL:]
    if mark is None:
        return tokenizer.decode(tail, skip_special_tokens=False).rstrip().endswith(THINK)
    not_blank = (i for i in reversed(tail) if i == mark or tokenizer.token_text(i).strip())
    return next(not_blank, None) == mark

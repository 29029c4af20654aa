"""Thoughts: the part of an answer that comes before it, between think marks.

Either the prompt opens the thought, or the model does so itself at the start of its answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from dsv3.text.stop_strings import StopChecker
from dsv3.text.tokenizer import Tokenizer

THINK, END_THINK = "<think>", "</think>"

_TAIL = 8  # tokens at the end of a prompt that may hold a mark and the blanks after it


@dataclass(frozen=True, slots=True)
class SplitAnswer:
    """A whole answer; `reasoning` is None if it has no thought."""

    reasoning: str | None
    content: str


class TextPiece(str):
    """New text of an answer.

    Attributes:
        is_thought: it is of the thought before the answer, or a mark around it.
    """

    is_thought = False

    @classmethod
    def of_thought(cls, text: str) -> "TextPiece":
        """Make a piece of a thought."""
        piece = cls(text)
        piece.is_thought = True
        return piece


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of an answer, its parts in the order in which they come.

    Attributes:
        opening, closing: the marks around the thought, with the blank lines behind them.
    """

    opening: str = ""
    thought: str = ""
    closing: str = ""
    answer: str = ""

    @property
    def before_answer(self) -> str:
        """Everything but the answer itself."""
        return self.opening + self.thought + self.closing

    def texts(self) -> list[TextPiece]:
        """Return the same text, what comes before the answer apart."""
        texts = TextPiece.of_thought(self.before_answer), TextPiece(self.answer)
        return [text for text in texts if text]


class _Place(Enum):
    START = 0  # nothing but blanks so far, or the beginning of a mark
    OPENED = 1  # in the blank lines behind the mark that opens the thought
    THOUGHT = 2
    CLOSED = 3  # in the blank lines behind the mark that ends the thought
    ANSWER = 4


class ThoughtStream:
    """Splits the text of an answer while it comes. The pieces of all parts join to that text.

    Args:
        inside: whether the prompt has opened a thought.

    Attributes:
        has_thought: whether there is one, as far as is known; it may be empty.
    """

    def __init__(self, inside: bool) -> None:
        self.has_thought = inside
        self._place, self._held = _Place.START, ""
        self._end = StopChecker((END_THINK,))

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks that would count if they came next."""
        if self._place is _Place.START:
            return (THINK, END_THINK) if self.has_thought else (THINK,)
        return (END_THINK,) if self._place in (_Place.OPENED, _Place.THOUGHT) else ()

    def push(self, text: str) -> Piece:
        """Take more text; return the parts of it that are settled."""
        text, self._held = self._held + text, ""
        opening, text = self._open(text)
        thought, text = self._think(text)
        closing, text = self._close(text)
        return Piece(opening, thought, closing, text)

    def finish(self) -> Piece:
        """Return what was held back."""
        held, self._held = self._held + self._end.finish(), ""
        return Piece(thought=held) if self.has_thought else Piece(answer=held)

    def _open(self, text: str) -> tuple[str, str]:
        """Return what opens the thought, and the rest of the text."""
        rest = text
        if self._place is _Place.START:
            rest = text.lstrip()
            if rest.startswith(THINK):
                self.has_thought, rest = True, rest.removeprefix(THINK)
            elif THINK.startswith(rest):
                self._held = text
                return "", ""
            elif not self.has_thought:
                self._place = _Place.ANSWER
                return "", text
            else:
                rest = text
            self._place = _Place.OPENED
        if self._place is _Place.OPENED:
            rest = rest.lstrip("\n")
            self._place = _Place.THOUGHT if rest else _Place.OPENED
        return text[: len(text) - len(rest)], rest

    def _think(self, text: str) -> tuple[str, str]:
        """Return what belongs to the thought, and the rest, from the mark that ends it on."""
        if self._place is not _Place.THOUGHT:
            return "", text
        thought, is_over = self._end.push(text)
        if not is_over:
            return thought, ""
        self._place = _Place.CLOSED
        return thought, END_THINK + self._end.rest

    def _close(self, text: str) -> tuple[str, str]:
        """Return the mark that ends the thought with the blank lines behind it, and the answer."""
        if self._place is not _Place.CLOSED:
            return "", text
        answer = text.removeprefix(END_THINK).lstrip("\n")
        if answer:
            self._place = _Place.ANSWER
        return text[: len(text) - len(answer)], answer


def split_answer(text: str, inside: bool) -> SplitAnswer:
    """Split a whole answer; `inside` says whether the prompt has opened a thought."""
    stream = ThoughtStream(inside)
    pieces = (stream.push(text), stream.finish())
    if not stream.has_thought:
        return SplitAnswer(None, text)
    thought, answer = (
        "".join(getattr(piece, part) for piece in pieces) for part in ("thought", "answer")
    )
    return SplitAnswer(thought.strip(), answer)


def begins_in_thought(tokenizer: Tokenizer | None, prompt_ids: Sequence[int]) -> bool:
    """Return True if the prompt of a conversation ends with a mark that opens a thought.

    Where the mark is a token, the same text in other tokens does not count: it is a user's.
    """
    if tokenizer is None:
        return False
    mark, tail = tokenizer.id_of(THINK), prompt_ids[-_TAIL:]
    if mark is None:
        return tokenizer.decode(tail, skip_special_tokens=False).rstrip().endswith(THINK)
    written = (i for i in reversed(tail) if i == mark or tokenizer.token_text(i).strip())
    return next(written, None) == mark

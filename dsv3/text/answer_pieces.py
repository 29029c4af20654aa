"""The text of an answer, split into its thought and its content, piece by piece or at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from dsv3.request import Completion, RequestOutput
from dsv3.text.thoughts import AnswerParts, ThoughtStream, begins_in_thought, split_answer
from dsv3.text.tokenizer import Tokenizer


class Kind(Enum):
    """The kind of a piece of an answer."""

    REASONING = "reasoning"
    CONTENT = "content"


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of an answer; it is not empty."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """A complete answer; `reasoning` is None without a thought."""

    reasoning: str | None
    content: str
    finish_reason: str


class PieceStream:
    """Splits the outputs of one chat answer into pieces.

    White space at the end of a thought is not part of it, as in `parse_answer`.

    Args:
        tokenizer: of the model.
        prompt_ids: the prompt, which may have opened a thought.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int]) -> None:
        self._thoughts = ThoughtStream(begins_in_thought(tokenizer, prompt_ids))
        self._blank = ""  # white space that ends the thought, unless more of it follows
        self._has_thought_text = False

    def push(self, output: RequestOutput) -> list[Piece]:
        """Return the pieces of an output's text; after the last output, all that is pending."""
        parts = [self._thoughts.push(output.new_text)]
        if output.completion is not None:
            parts.append(self._thoughts.finish())
        return [piece for part in parts for piece in self._pieces(part)]

    def _pieces(self, parts: AnswerParts) -> list[Piece]:
        thought = self._blank + parts.thought
        if not self._has_thought_text:
            thought = thought.lstrip()
        shown = thought.rstrip()
        self._blank = thought[len(shown) :]
        self._has_thought_text |= bool(shown)
        pieces = Piece(Kind.REASONING, shown), Piece(Kind.CONTENT, parts.answer)
        return [piece for piece in pieces if piece.text]


def parse_answer(completion: Completion, tokenizer: Tokenizer | None) -> ParsedAnswer:
    """Return the parts of a complete answer in a conversation."""
    split = split_answer(completion.text, begins_in_thought(tokenizer, completion.prompt_ids))
    return ParsedAnswer(split.reasoning, split.content, completion.finish_reason)

"""Text of an answer while it is being made: whole characters only, and nothing past a stop.

`TextStream` is what the engine keeps per request; it joins a detokenizer, a `StopChecker` and,
for the answers of a conversation, a `ThoughtStream`.
"""

import codecs
from collections.abc import Iterable, Sequence

from dsv3.text.stop_strings import StopChecker
from dsv3.text.thoughts import END_THINK, THINK, Piece, ThoughtStream, begins_in_thought
from dsv3.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what bytes become that are no character, or not yet one
HALF_CHARACTER = 3  # at most this many of them stand for the first bytes of one character
CONTEXT = 8  # tokens kept in front of the next one
WINDOW = 32  # tokens decoded at once


class ByteDetokenizer:
    """Turns tokens into text as they come, never half a character.

    For vocabularies whose tokens are bytes, whatever stands around them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._piece = tokenizer.piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """Take more tokens; return the text that is settled now and was not before."""
        return self._decoder.decode(b"".join(self._piece(i) or b"" for i in ids))

    def finish(self) -> str:
        """Return what was held back: bytes that became no character."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """The same for any vocabulary: decodes the latest few tokens, and gives out what is new.

    Single tokens would not do: a character's bytes may lie in several of them, and some decoders
    drop the blank in front of the first. All tokens, every time, would cost O(n^2).

    Where tokens of single bytes stand for rare characters, one byte more can make all characters
    of such a run undecodable: a run is given out when it is over.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """Begin after `context`, the tokens in front, whose text is not given out again."""
        self._tokenizer = tokenizer
        self._window = list(context[-CONTEXT:])
        self._run: list[int] = []  # single bytes that are not over
        self._num_given = len(tokenizer.decode(self._window))

    def push(self, ids: Iterable[int]) -> str:
        """Take more tokens; return the text that is settled now and was not before."""
        num_before = len(self._window)
        for token_id in ids:
            self._run.append(token_id)
            if not self._is_in_run(token_id):
                self._window += self._run
                self._run.clear()
        if len(self._window) == num_before:
            return ""
        text = self._tokenizer.decode(self._window)
        num_unsettled = min(len(text) - len(text.rstrip(REPLACEMENT)), HALF_CHARACTER)
        settled = max(self._num_given, len(text) - num_unsettled)
        new, self._num_given = text[self._num_given : settled], settled
        num_held = len(text) - settled
        # Within a character it is no time to forget, unless it is one that never ends.
        if len(self._window) > (WINDOW if num_held == 0 else 4 * WINDOW):
            self._forget(num_held)
        return new

    def finish(self) -> str:
        """Return what was held back: bytes that became no character."""
        text = self._tokenizer.decode(self._window + self._run)
        new = text[self._num_given :]
        self._num_given = len(text)
        return new

    def _is_in_run(self, token_id: int) -> bool:
        """Return True for single bytes; tokens without a text do not end a run of them."""
        is_byte = self._tokenizer.is_byte(token_id)
        return is_byte or (len(self._run) > 1 and not self._tokenizer.decode([token_id]))

    def _forget(self, num_held: int) -> None:
        """Keep only the latest tokens, and `num_held` characters of them still to be given."""
        del self._window[:-CONTEXT]
        self._num_given = max(0, len(self._tokenizer.decode(self._window)) - num_held)


Detokenizer = ByteDetokenizer | WindowDetokenizer


def make_detokenizer(tokenizer: Tokenizer, context: Sequence[int] = ()) -> Detokenizer:
    """Begin after `context`, the tokens in front, whose text is not given out again."""
    # A vocabulary of bytes is one throughout; any token of it tells.
    if tokenizer.piece(0) is None:
        return WindowDetokenizer(tokenizer, context)
    return ByteDetokenizer(tokenizer)


class TextStream:
    """The text of one answer, from its tokens.

    Args:
        tokenizer: writes the text.
        prompt_ids: what the answer follows.
        stop: strings that end the answer.
        is_chat: the answer is of a conversation: its text keeps the marks of its thought, even
            where they are special tokens, and stop strings within the thought do not count.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: tuple[str, ...] = (),
        is_chat: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        # A prompt that ends within a character is no context: the answer's text is then the
        # decoding of its own tokens, as anywhere else.
        tail = prompt_ids[-CONTEXT:]
        is_cut = tokenizer.decode(tail).endswith(REPLACEMENT) or any(map(tokenizer.is_byte, tail))
        self._detokenizer = make_detokenizer(tokenizer, () if is_cut else tail)
        self._stop = StopChecker(stop)
        self._thoughts: ThoughtStream | None = None
        self._marks: dict[int, str] = {}
        if is_chat:
            self._thoughts = ThoughtStream(begins_in_thought(tokenizer, prompt_ids))
            self._marks = _hidden_marks(tokenizer)
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All the text given out so far."""
        return "".join(self._parts)

    def push(self, token_id: int) -> tuple[str, bool]:
        """Take the next token; return the new text, and whether a stop string ends the answer."""
        new, stopped = self._until_stop(self._decode(token_id))
        self._parts.append(new)
        return new, stopped

    def finish(self) -> str:
        """End the answer (no stop string did): return the text held back until now."""
        new, stopped = self._until_stop(self._detokenizer.finish())
        if not stopped and self._thoughts is not None:
            rest, stopped = self._cut(self._thoughts.finish())
            new += rest
        if not stopped:
            new += self._stop.finish()
        self._parts.append(new)
        return new

    def _decode(self, token_id: int) -> str:
        """Return the text that a token settles."""
        mark = self._marks.get(token_id)
        if mark is None or self._thoughts is None or mark not in self._thoughts.marks:
            return self._detokenizer.push((token_id,))
        text = self._detokenizer.finish() + mark
        self._detokenizer = make_detokenizer(self._tokenizer)
        return text

    def _until_stop(self, text: str) -> tuple[str, bool]:
        """Return the text before a stop string, and whether there is one."""
        if self._thoughts is None:
            return self._stop.push(text)
        return self._cut(self._thoughts.push(text))

    def _cut(self, piece: Piece) -> tuple[str, bool]:
        answer, stopped = self._stop.push(piece.answer)
        return piece.before_answer + answer, stopped


def _hidden_marks(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the think marks that are special tokens, which decoding leaves out."""
    ids = {mark: tokenizer.id_of(mark) for mark in (THINK, END_THINK)}
    return {i: mark for mark, i in ids.items() if i is not None and not tokenizer.decode([i])}

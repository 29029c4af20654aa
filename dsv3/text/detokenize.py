"""Text of an answer while it is being made: whole characters only, and nothing past a stop.

`TextStream` is what the engine keeps per request; it joins a detokenizer and a `StopChecker`.
"""

import codecs
from collections.abc import Iterable, Sequence

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
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """Begin after `context`, the tokens in front, whose text is not given out again."""
        self._tokenizer = tokenizer
        self._window = list(context[-CONTEXT:])
        self._num_given = len(tokenizer.decode(self._window))

    def push(self, ids: Iterable[int]) -> str:
        """Take more tokens; return the text that is settled now and was not before."""
        self._window.extend(ids)
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
        text = self._tokenizer.decode(self._window)
        new = text[self._num_given :]
        self._num_given = len(text)
        return new

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


class StopChecker:
    """Cut text before the first stop string, also one that comes in several pieces.

    Text that may be the beginning of a stop string is held back until it is known not to be.

    Attributes:
        rest: what came after the stop string together with it.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.rest = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; return what is safe to show, and whether a stop string came."""
        text = self._held + text
        found = [(at, len(stop)) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            at, length = min(found)
            self._held, self.rest = "", text[at + length :]
            return text[:at], True
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def finish(self) -> str:
        """Return what was held back: it did not become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Count the characters at the end of `text` that begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """The text of one answer, from its tokens."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: tuple[str, ...] = ()
    ) -> None:
        # A prompt that ends within a character is no context: the answer's text is then the
        # decoding of its own tokens, as anywhere else.
        tail = prompt_ids[-CONTEXT:]
        whole = not tokenizer.decode(tail).endswith(REPLACEMENT)
        self._detokenizer = make_detokenizer(tokenizer, tail if whole else ())
        self._stop = StopChecker(stop)
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All the text given out so far."""
        return "".join(self._parts)

    def push(self, token_id: int) -> tuple[str, bool]:
        """Take the next token; return the new text, and whether a stop string ends the answer."""
        new, stopped = self._stop.push(self._detokenizer.push((token_id,)))
        self._parts.append(new)
        return new, stopped

    def finish(self) -> str:
        """End the answer (no stop string did): return the text held back until now."""
        new, stopped = self._stop.push(self._detokenizer.finish())
        if not stopped:
            new += self._stop.finish()
        self._parts.append(new)
        return new

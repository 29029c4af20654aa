"""Incremental text of an answer: complete characters only, and nothing after a stop string.

The engine keeps a `TextStream` per request; it combines a detokenizer, a `StopChecker` and, for
the answers of a conversation, a `ThoughtStream`.
"""

import codecs
from collections.abc import Iterable, Sequence

from dsv3.text.stop_strings import StopChecker
from dsv3.text.thoughts import END_THINK, THINK, AnswerParts, ThoughtStream, begins_in_thought
from dsv3.text.tokenizer import Tokenizer
from dsv3.text.tools import CallForm

REPLACEMENT = "\ufffd"  # the decoding of bytes that are not, or not yet, a character
MAX_PARTIAL = 3  # most replacements for the first bytes of one character
CONTEXT = 8  # tokens kept before the next one
WINDOW = 32  # tokens decoded at once


class ByteDetokenizer:
    """Incremental detokenizer that returns complete characters only.

    It is for vocabularies whose tokens are bytes that do not depend on their neighbours.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._piece = tokenizer.piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """Add tokens; return the text that they complete."""
        return self._decoder.decode(b"".join(self._piece(i) or b"" for i in ids))

    def finish(self) -> str:
        """Return the pending text: bytes that are not a complete character."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """Incremental detokenizer for any vocabulary: decodes the latest tokens, returns the new text.

    Single tokens cannot be decoded alone: the bytes of a character may be in several of them, and
    some decoders drop the space before the first. Decoding all tokens every time would cost O(n^2).

    If tokens of single bytes spell rare characters, one more byte can make all characters of such a
    run undecodable. So the text of a run is returned when the run has ended.

    Args:
        tokenizer: decodes the tokens.
        context: the tokens before the first one; their text is not returned.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(context[-CONTEXT:])
        self._run: list[int] = []  # a run of single bytes that may continue
        self._num_returned = len(tokenizer.decode(self._window))

    def push(self, ids: Iterable[int]) -> str:
        """Add tokens; return the text that they complete."""
        num_before = len(self._window)
        for token_id in ids:
            self._run.append(token_id)
            if not self._is_in_run(token_id):
                self._window += self._run
                self._run.clear()
        if len(self._window) == num_before:
            return ""
        text = self._tokenizer.decode(self._window)
        num_partial = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_PARTIAL)
        num_complete = max(self._num_returned, len(text) - num_partial)
        new_text = text[self._num_returned : num_complete]
        self._num_returned = num_complete
        num_pending = len(text) - num_complete
        # Within a character, tokens are not dropped, unless the character never ends.
        if len(self._window) > (WINDOW if num_pending == 0 else 4 * WINDOW):
            self._drop_old_tokens(num_pending)
        return new_text

    def finish(self) -> str:
        """Return the pending text: bytes that are not a complete character."""
        text = self._tokenizer.decode(self._window + self._run)
        new_text = text[self._num_returned :]
        self._num_returned = len(text)
        return new_text

    def _is_in_run(self, token_id: int) -> bool:
        """Return True for single bytes, and within a run for tokens without text."""
        is_byte = self._tokenizer.is_byte(token_id)
        return is_byte or (len(self._run) > 1 and not self._tokenizer.decode([token_id]))

    def _drop_old_tokens(self, num_pending: int) -> None:
        """Keep only the latest tokens; the last `num_pending` characters are not returned yet."""
        del self._window[:-CONTEXT]
        self._num_returned = max(0, len(self._tokenizer.decode(self._window)) - num_pending)


Detokenizer = ByteDetokenizer | WindowDetokenizer


def make_detokenizer(tokenizer: Tokenizer, context: Sequence[int] = ()) -> Detokenizer:
    """Return a detokenizer that begins after `context`, the tokens before the first one."""
    # All tokens of a vocabulary are of one kind, so the first one shows it.
    if tokenizer.piece(0) is None:
        return WindowDetokenizer(tokenizer, context)
    return ByteDetokenizer(tokenizer)


class TextStream:
    """The incremental text of one answer.

    Args:
        tokenizer: decodes the tokens.
        prompt_ids: the prompt before the answer.
        stop: strings that end the answer.
        is_chat: the answer is of a conversation: its text keeps the marks of its thought, even
            if they are special tokens, and stop strings within the thought do not count.
        has_tools: the text keeps the marks of calls of tools as well.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: tuple[str, ...] = (),
        is_chat: bool = False,
        has_tools: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        # A prompt that ends within a character cannot be context: the answer's text is then the
        # decoding of its own tokens alone.
        tail = prompt_ids[-CONTEXT:]
        is_cut = tokenizer.decode(tail).endswith(REPLACEMENT) or any(map(tokenizer.is_byte, tail))
        self._detokenizer = make_detokenizer(tokenizer, () if is_cut else tail)
        self._stop = StopChecker(stop)
        self._thoughts: ThoughtStream | None = None
        self._marks: dict[int, str] = {}
        if is_chat:
            self._thoughts = ThoughtStream(begins_in_thought(tokenizer, prompt_ids))
            self._marks = _hidden_marks(tokenizer, (THINK, END_THINK))
        form = CallForm.of(tokenizer) if has_tools else None
        self._call_marks = {} if form is None else _hidden_marks(tokenizer, form.marks)
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._parts)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer; None if none has."""
        return self._stop.found

    def push(self, token_id: int) -> tuple[str, bool]:
        """Add the next token; return the new text, and True if a stop string ends the answer."""
        new_text, is_stopped = self._until_stop(self._decode(token_id))
        self._parts.append(new_text)
        return new_text, is_stopped

    def finish(self) -> str:
        """End an answer without a stop string; return the pending text."""
        new_text, is_stopped = self._until_stop(self._detokenizer.finish())
        if not is_stopped and self._thoughts is not None:
            pending, is_stopped = self._cut(self._thoughts.finish())
            new_text += pending
        if not is_stopped:
            new_text += self._stop.finish()
        self._parts.append(new_text)
        return new_text

    def _decode(self, token_id: int) -> str:
        """Return the text that a token completes."""
        mark = self._call_marks.get(token_id) or self._think_mark(token_id)
        if mark is None:
            return self._detokenizer.push((token_id,))
        text = self._detokenizer.finish() + mark
        self._detokenizer = make_detokenizer(self._tokenizer)
        return text

    def _think_mark(self, token_id: int) -> str | None:
        """Return the think mark of a token, where one is valid."""
        mark = self._marks.get(token_id)
        return mark if self._thoughts is not None and mark in self._thoughts.marks else None

    def _until_stop(self, text: str) -> tuple[str, bool]:
        """Return the text before a stop string, and True if there is one."""
        if self._thoughts is None:
            return self._stop.push(text)
        return self._cut(self._thoughts.push(text))

    def _cut(self, parts: AnswerParts) -> tuple[str, bool]:
        answer, is_stopped = self._stop.push(parts.answer)
        return parts.before_answer + answer, is_stopped


def _hidden_marks(tokenizer: Tokenizer, marks: Iterable[str]) -> dict[int, str]:
    """Return the marks that are special tokens, which decoding omits."""
    ids = {mark: tokenizer.id_of(mark) for mark in marks}
    return {i: mark for mark, i in ids.items() if i is not None and not tokenizer.decode([i])}

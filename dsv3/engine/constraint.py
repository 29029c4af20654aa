"""The tokens that may come next in an answer that follows a grammar, computed on rank 0."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3.engine.masks import Words, all_but, num_words
from dsv3.errors import shorten


class Constraint:
    """The tokens that may come next in one answer.

    Args:
        matcher: an llguidance matcher at the start of its grammar.
        subject: where the grammar comes from, for errors.
        vocab_size: logits of a row.
        eos_ids: tokens that end an answer.
        num_before: tokens of the prompt.
        after: the token after which the grammar begins, since the answer begins with a thought; no
            end token comes before it. None if it begins at once.

    Attributes:
        error: after `finish`, the reason that the grammar gave up; empty if the model ended the
            answer.
    """

    def __init__(
        self,
        matcher: Any,
        subject: str,
        vocab_size: int,
        eos_ids: Sequence[int],
        num_before: int,
        after: int | None,
    ) -> None:
        self._start = matcher
        self._matcher = matcher.deep_copy()
        self._subject = subject
        self._num_words = num_words(vocab_size)
        self._all_but_end = all_but(eos_ids, vocab_size)
        self._num_seen = num_before
        self._after = after
        self._num_outside = num_before  # tokens before the grammar begins
        self.error = ""

    def masks(self, token_ids: Sequence[int], drafts: Sequence[int] = ()) -> list[bytes]:
        """Return the masks of the next token, and of the one after each draft (`masks.py`).

        Args:
            token_ids: the prompt and the answer so far; it only grows from call to call.
            drafts: tokens that may come next.
        """
        self._follow(token_ids)
        after = self._after
        masks = [self._mask()]
        num_consumed = 0
        for draft in drafts:
            was_in_grammar = self._after is None
            if was_in_grammar and self._matcher.validate_tokens([draft]) == 0:
                break  # it cannot be sampled, so the rows after it do not count
            self._consume(draft)
            num_consumed += was_in_grammar
            masks.append(self._mask())
        self._after = after
        if num_consumed:
            self._take_back(num_consumed, token_ids)
        return masks + masks[-1:] * (1 + len(drafts) - len(masks))

    def finish(self, token_ids: Sequence[int]) -> str:
        """Return `error` of an answer that an end token ended after `token_ids`."""
        self._follow(token_ids)
        if self._after is None and self._allowed() is None:
            reason = error_of(self._matcher) or "no token may come next"
            self.error = f"{self._subject} cannot be followed to its end: {reason}"
        return self.error

    def _follow(self, token_ids: Sequence[int]) -> None:
        for place in range(self._num_seen, len(token_ids)):
            if self._after is not None:
                self._num_outside = place + 1
            self._consume(token_ids[place])
        self._num_seen = len(token_ids)

    def _consume(self, token_id: int) -> None:
        if self._after is None:
            self._matcher.consume_token(token_id)
        elif token_id == self._after:
            self._after = None

    def _take_back(self, num_tokens: int, token_ids: Sequence[int]) -> None:
        """Undo the last tokens in the grammar, so that it has read `token_ids` only."""
        if not self._matcher.is_error():
            self._matcher.rollback(num_tokens)
            return
        # It gave up at a draft, which no rollback undoes.
        self._matcher = self._start.deep_copy()
        if self._after is None:
            self._matcher.consume_tokens(token_ids[self._num_outside :])

    def _mask(self) -> bytes:
        if self._after is not None:
            return self._all_but_end.tobytes()
        words = self._allowed()
        return (~self._all_but_end if words is None else words).tobytes()

    def _allowed(self) -> Words | None:
        """Return the mask of the grammar; None if it has given up."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: self._num_words]
        return words if words.any() and not self._matcher.is_error() else None


def error_of(matcher: Any) -> str:
    """Return the reason that a matcher has given up; empty if it has not."""
    return shorten(str(matcher.get_error() or "").split("\n")[0], 200)

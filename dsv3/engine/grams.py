"""Earlier occurrences of the last tokens of a text, whose continuations make drafts."""

# Tokens that an earlier occurrence has in common with the end of a text.
_GRAM = 3
# Most tokens of a text that are indexed at once, its last ones, to bound the time of a step.
_MOST_SEARCHED = 1 << 15


class GramIndex:
    """Earlier occurrences of every three tokens of a text, the last one of each.

    Source: prompt lookup decoding (Saxena 2023).
    """

    def __init__(self) -> None:
        # Grams, and the position after the last occurrence of each.
        self._end: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def continuation(self, token_ids: list[int], drafts: list[int], count: int) -> list[int]:
        """Return the tokens after the last earlier occurrence of the end of text and drafts.

        Args:
            token_ids: the text; between calls, tokens are only appended to it.
            drafts: assumed tokens after the text.
            count: most tokens to return.
        """
        # The end of the text itself is no earlier occurrence.
        first = max(self._num_indexed + 1, len(token_ids) - _MOST_SEARCHED, _GRAM)
        for end in range(first, len(token_ids)):
            self._end[tuple(token_ids[end - _GRAM : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids) - 1)
        found = self._end.get(tuple((token_ids[-_GRAM:] + drafts)[-_GRAM:]))
        return [] if found is None else token_ids[found : found + count]

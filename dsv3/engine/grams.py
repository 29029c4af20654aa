"""Earlier occurrences of the last tokens of a text, whose continuations make drafts."""

# Tokens that an earlier occurrence has in common with the end of a text, and the tokens of a text
# that are searched.
_GRAM = 3
_MOST_KNOWN = 1 << 15


class GramIndex:
    """Where the last tokens of a text have occurred in it before.

    Source: prompt lookup decoding (Saxena 2023).
    """

    def __init__(self) -> None:
        self._end: dict[tuple[int, ...], int] = {}
        self._num_known = 0

    def continuation(self, token_ids: list[int], drafts: list[int], count: int) -> list[int]:
        """Return the tokens after the last earlier occurrence of the end of text and drafts.

        Args:
            token_ids: the text; it only grows from call to call.
            drafts: tokens after it, as they are assumed.
            count: most tokens wanted.
        """
        # The end of the text itself is no earlier occurrence.
        first = max(self._num_known + 1, len(token_ids) - _MOST_KNOWN, _GRAM)
        for end in range(first, len(token_ids)):
            self._end[tuple(token_ids[end - _GRAM : end])] = end
        self._num_known = max(self._num_known, len(token_ids) - 1)
        found = self._end.get(tuple((token_ids[-_GRAM:] + drafts)[-_GRAM:]))
        return [] if found is None else token_ids[found : found + count]

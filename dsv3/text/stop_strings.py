"""Stop strings in incremental text."""


class StopChecker:
    """Cuts incremental text before the first stop string, which may be spread over several pushes.

    Text that may be the beginning of a stop string is held back until the next push decides.

    Attributes:
        rest: the text after the stop string in the same push.
        found: the stop string; None before it was found.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._pending = ""
        self.rest = ""
        self.found: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; return the text that is safe to show, and True if a stop string was found."""
        if not self._stop:
            return text, False
        text = self._pending + text
        matches = [(text.find(stop), len(stop)) for stop in self._stop if stop in text]
        if matches:
            start, length = min(matches)
            self.found = text[start : start + length]
            self._pending = ""
            self.rest = text[start + length :]
            return text[:start], True
        num_pending = max((overlap(text, stop) for stop in self._stop), default=0)
        self._pending = text[len(text) - num_pending :]
        return text[: len(text) - num_pending], False

    def finish(self) -> str:
        """Return the text that was held back."""
        pending = self._pending
        self._pending = ""
        return pending


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

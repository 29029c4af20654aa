"""Stop strings: where a text that comes in pieces ends."""


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

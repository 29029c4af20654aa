"""What a rank knows of another one's progress."""

from dataclasses import dataclass


@dataclass(slots=True)
class Seen:
    """What a rank told last, and for how many seconds it told nothing, or the same.

    Attributes:
        progress: grows as it gets on.
        limit: seconds without progress that make it stuck; 0: it may rest.
        waits: in an exchange, for other ranks.
        stalled: seconds without progress.
        deserted: seconds in an exchange after another rank has left.
    """

    progress: int = 0
    limit: float = 0.0
    waits: bool = False
    stage: str = "start-up"
    silent: float = 0.0
    stalled: float = 0.0
    deserted: float = 0.0
    left: bool = False

    @property
    def is_stuck(self) -> bool:
        """Whether it has made no progress for longer than its stage may take."""
        return 0 < self.limit < self.stalled

    def note(self, progress: int, limit: float, waits: bool, stage: str) -> None:
        """Update from a report."""
        if (progress, stage) != (self.progress, self.stage):
            self.stalled = self.deserted = 0.0
        self.progress, self.limit, self.waits, self.stage = progress, limit, waits, stage

"""Dialogues: time to the first token of each turn, as the context grows."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from benchlib.contest import Contender
from benchlib.report import Report
from benchlib.workload import BenchRequest


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns of random user tokens, each answered at full length.

    Attributes:
        turns: number of turns.
        user: user tokens of each turn.
        answer: answer tokens of each turn.
    """

    turns: int
    user: int
    answer: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole dialogue."""
        return self.turns * (self.user + self.answer)


def dialogue(
    contenders: Sequence[Contender], shape: Dialogue, vocab_size: int, repeats: int
) -> Report:
    """Run `repeats` dialogues on each contender, alternating; report the medians."""
    seconds: dict[str, list[list[float]]] = defaultdict(list)
    for number in range(repeats + 1):
        for contender in contenders:
            turns = _talk(contender, shape, vocab_size, seed=number)
            if number:  # the first one warms up
                seconds[contender.name].append(turns)
    # New tokens of a turn: the user's, and the last answer token, which is not in the cache yet.
    new = [shape.user + (turn > 0) for turn in range(shape.turns)]
    report = Report("chat", x_label="turn", y_label="ms to the first token")
    medians = {name: [median(t) for t in zip(*s, strict=True)] for name, s in seconds.items()}
    for turn in range(shape.turns):
        context = turn * (shape.user + shape.answer)
        row = {"turn": turn + 1, "context": context, "new": new[turn]}
        report.rows.append(row | {f"{n}: ms": 1e3 * m[turn] for n, m in medians.items()})
    for name, m in medians.items():
        report.series[name] = (list(range(1, shape.turns + 1)), [1e3 * s for s in m])
        ratio = (m[-1] / new[-1]) / (m[0] / new[0])
        report.notes.append(
            f"{name}: turn {shape.turns} takes {ratio:.2f} times as long per new token as turn 1 "
            f"(medians of {repeats} dialogues)"
        )
    return report


def _talk(contender: Contender, shape: Dialogue, vocab_size: int, seed: int) -> list[float]:
    """Return the seconds to the first token of each turn."""
    rng = np.random.default_rng(seed)
    context: list[int] = []
    seconds: list[float] = []
    contender.reset()
    for _ in range(shape.turns):
        context = context + rng.integers(0, vocab_size, shape.user).tolist()
        result = contender.run([BenchRequest(context, shape.answer)])
        seconds += result.first_token
        context = context + result.answers[0]
    return seconds

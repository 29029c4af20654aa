"""Benchmark requests: random tokens with lengths from a distribution, reproducible by seed."""

from dataclasses import dataclass

import numpy as np

from dsv3.errors import ConfigError

Rng = np.random.Generator
_SIZES = {"fixed": 1, "uniform": 2, "lognormal": 2}


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths.

    Attributes:
        kind: "fixed", "uniform" or "lognormal".
        numbers: fixed: the length; uniform: least and greatest length; lognormal: the median, and
            sigma of the logarithm.
    """

    kind: str
    numbers: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """Read `N`, `uniform:LOW:HIGH` or `lognormal:MEDIAN:SIGMA`."""
        kind, *parts = text.split(":") if ":" in text else ("fixed", text)
        try:
            numbers = tuple(float(part) for part in parts)
        except ValueError:
            numbers = ()
        is_complete = len(numbers) == _SIZES.get(kind)
        is_valid = is_complete and 1 <= numbers[0] < np.inf and min(numbers) >= 0
        if not is_valid or (kind == "uniform" and numbers[1] < numbers[0]):
            raise ConfigError(
                f"{text!r} is no distribution of lengths; use N, uniform:LOW:HIGH or "
                "lognormal:MEDIAN:SIGMA, with lengths of 1 and more and LOW up to HIGH"
            )
        return cls(kind, numbers)

    def __str__(self) -> str:
        numbers = ":".join(f"{number:g}" for number in self.numbers)
        return numbers if self.kind == "fixed" else f"{self.kind}:{numbers}"

    @property
    def least(self) -> int:
        """Smallest length."""
        return 1 if self.kind == "lognormal" else int(self.numbers[0])

    def draw(self, rng: Rng, count: int) -> list[int]:
        """Return `count` lengths, each at least 1."""
        if self.kind == "fixed":
            return [int(self.numbers[0])] * count
        low, high = self.numbers
        if self.kind == "uniform":
            drawn = rng.integers(int(low), int(high) + 1, count)
        else:
            drawn = np.rint(rng.lognormal(np.log(low), high, count)).astype(np.int64)
        return [max(1, int(length)) for length in drawn]


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """A prompt, and the number of tokens to answer it with."""

    prompt_ids: list[int]
    num_tokens: int


def draw_requests(
    count: int, prompts: Lengths, answers: Lengths, vocab_size: int, limit: int, seed: int
) -> list[BenchRequest]:
    """Return random requests, the same for the same seed.

    Args:
        count: number of requests.
        prompts: distribution of prompt lengths.
        answers: distribution of answer lengths.
        vocab_size: tokens are drawn from 0 to vocab_size - 1.
        limit: longest prompt and answer together; longer ones are cut.
        seed: seed of all random numbers.
    """
    rng = np.random.default_rng(seed)
    requests = []
    for length, num_tokens in zip(prompts.draw(rng, count), answers.draw(rng, count), strict=True):
        tokens = rng.integers(0, vocab_size, min(length, limit - 1)).tolist()
        requests.append(BenchRequest(tokens, min(num_tokens, limit - len(tokens))))
    return requests

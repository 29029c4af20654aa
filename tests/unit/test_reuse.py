"""Reuse curves: learning from observations; the worth is the best rate of all plans."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.cache.reuse import ReuseCurve, _worth, age_bucket, bucket_start

BUCKETS = 24


@given(st.integers(1, 10**9))
def test_ages_lie_in_their_bucket(age: int) -> None:
    bucket = age_bucket(age)
    assert bucket_start(bucket) <= age < bucket_start(bucket + 1)
    assert 2**bucket <= age**2 < 2 ** (bucket + 1)


@given(st.lists(st.floats(0.001, 0.9), min_size=1, max_size=12))
def test_worth_is_the_best_of_all_plans(hazard: list[float]) -> None:
    worth = _worth(hazard)
    for start in range(len(hazard)):
        gain = 0.0
        time = 0.0
        left = 1.0
        best = 0.0
        for k in range(start, len(hazard)):
            width = 2 ** ((k + 1) / 2) - 2 ** (k / 2)
            gain += left * hazard[k]
            time += left * width * (1 - hazard[k] / 2)
            left *= 1 - hazard[k]
            best = max(best, gain / time)
        assert worth[start] == pytest.approx(best)


def live(curve: ReuseCurve, age: int | None, limit: int = BUCKETS) -> None:
    """Observe one life: a reuse at `age`, or no reuse up to bucket `limit`."""
    end = limit if age is None else min(age_bucket(age), limit - 1)
    for bucket in range(end):
        curve.observe(bucket, reused=False)
    if age is not None:
        curve.observe(end, reused=True)


def test_without_observations_the_oldest_page_is_worth_least() -> None:
    worth = ReuseCurve(BUCKETS).worth
    assert all(young > old for young, old in pairwise(worth))


def test_pages_about_to_be_reused_are_worth_most() -> None:
    """Pages reused at an age of about 100 are worth most just before it, little long after it."""
    curve, rng = ReuseCurve(BUCKETS), random.Random(1)
    for _ in range(3000):
        live(curve, rng.randrange(90, 128) if rng.random() < 0.5 else None)
    peak = age_bucket(100)
    assert max(curve.worth) in curve.worth[peak - 1 : peak + 1]
    assert curve.worth[0] < 0.7 * max(curve.worth)
    assert curve.worth[age_bucket(300)] < 0.05 * max(curve.worth)
    # Half of the pages are reused at ages 90 to 128; the others are held for 128. The estimate is
    # smoothed over one bucket on both sides.
    assert curve.worth[0] == pytest.approx(0.5 / 118, rel=0.25)


def test_a_curve_follows_its_parent_until_it_has_enough_observations() -> None:
    parent, rng = ReuseCurve(BUCKETS), random.Random(2)
    for _ in range(2000):
        live(parent, rng.randrange(30, 60) if rng.random() < 0.3 else None)
    child = ReuseCurve(BUCKETS, parent)
    assert child.worth == pytest.approx(parent.worth, rel=0.05)
    for _ in range(20):
        live(child, None)
    assert child.worth[5] < 0.9 * parent.worth[5]
    for _ in range(2000):
        live(child, None)
    assert child.worth[5] < 0.1 * parent.worth[5]


def test_a_curve_scales_its_parents_hazard() -> None:
    """A kind reused often at young ages is expected to be reused more often at old ages too."""
    parent, rng = ReuseCurve(BUCKETS), random.Random(2)
    for _ in range(4000):
        live(parent, int(2 ** rng.uniform(0, 8)) if rng.random() < 0.3 else None)
    child = ReuseCurve(BUCKETS, parent)
    for _ in range(200):
        child.observe(6, reused=rng.random() < 0.3)
    child.refresh()
    assert child.worth[12] > 1.5 * parent.worth[12]


def test_old_observations_fade() -> None:
    curve = ReuseCurve(BUCKETS)
    for _ in range(20_000):
        live(curve, None)
    unused = curve.worth[4]
    for _ in range(20_000):
        live(curve, 10)
    assert curve.worth[4] > 100 * unused
    assert curve.worth[4] == pytest.approx(1 / (bucket_start(6) - 4), rel=0.5)

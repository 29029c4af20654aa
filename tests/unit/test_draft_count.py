"""The number of drafts follows the measured times and the accepted drafts."""

from collections.abc import Callable

from dsv3.engine.draft_count import DraftCount


def run(
    draft: DraftCount, seconds: Callable[[int], float], accepts: int, num_sequences: int = 1
) -> list[int]:
    """Return the numbers chosen for 300 steps; `accepts` drafts of each step are accepted."""
    chosen = [draft.choose(num_sequences)]
    for _ in range(300):
        count = chosen[-1]
        draft.measure(num_sequences, count, seconds(count))
        draft.verified(count, min(count, accepts))
        chosen.append(draft.choose(num_sequences))
    return chosen


def test_a_fixed_number() -> None:
    assert set(run(DraftCount(2, is_adaptive=False), lambda count: 1.0 + count, 0)) == {2}


def test_drafts_that_cost_nothing_are_all_made() -> None:
    chosen = run(DraftCount(3, is_adaptive=True), lambda count: 1.0 + 0.01 * count, 3)
    assert chosen[0] == 0 and chosen[-100:] == [3] * 100


def test_drafts_that_cost_a_step_each_are_not_made() -> None:
    chosen = run(DraftCount(3, is_adaptive=True), lambda count: 1.0 + count, 3)
    assert chosen.count(0) > 290 and max(chosen) == 1


def test_rejected_drafts_are_given_up() -> None:
    draft = DraftCount(3, is_adaptive=True)
    assert run(draft, lambda count: 1.0 + 0.1 * count, 3)[-1] == 3
    assert run(draft, lambda count: 1.0 + 0.1 * count, 0)[-1] == 0


def test_the_size_of_the_batch_decides() -> None:
    draft = DraftCount(2, is_adaptive=True)
    for _ in range(3):
        few = run(draft, lambda count: 1.0 + 0.1 * count, 2, num_sequences=1)
        many = run(draft, lambda count: 64.0 * (1 + 1.5 * count), 2, num_sequences=64)
    assert few[-1] == 2 and many[-1] == 0


def test_prompts_count() -> None:
    """With long prompts and short answers, a slower pass over prompts outweighs the drafts."""
    draft = DraftCount(1, is_adaptive=True)
    for _ in range(50):
        count = draft.choose(1)
        draft.measure_prompts(1000, count, 1000.0 * (1.25 if count else 1.0))
        draft.verified(0, 0)
        for _ in range(5):
            draft.measure(1, count, 1.0 + 0.1 * count)
            draft.verified(count, count)
    assert draft.choose(1) == 0

from dataclasses import fields

import numpy as np

from dsv3.engine.step_plan import StepPlan


def random_plan(rng: np.random.Generator, size: int) -> StepPlan:
    """Every field of its own length, with all bits in use."""
    plan = StepPlan()
    for i, f in enumerate(fields(plan)):
        values = rng.integers(-(2**31), 2**31, size + i, np.int32)
        if getattr(plan, f.name).dtype == np.float32:
            values = rng.standard_normal(size + i, np.float32)
        setattr(plan, f.name, values)
    return plan


def test_unpack_undoes_pack() -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 1000):
        plan = random_plan(rng, size)
        words = plan.pack()
        assert words.dtype == np.int32
        back = StepPlan.unpack(words)
        for f in fields(plan):
            want, got = getattr(plan, f.name), getattr(back, f.name)
            assert got.dtype == want.dtype and got.tobytes() == want.tobytes(), f.name


def test_an_empty_plan() -> None:
    back = StepPlan.unpack(StepPlan().pack())
    assert all(len(getattr(back, f.name)) == 0 for f in fields(back))

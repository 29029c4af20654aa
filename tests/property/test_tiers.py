"""Conversations on a device cache far too small for them, with host memory and disk tiers."""

import random

import pytest

from dsv3.request import SamplingParams
from tests.property.test_scheduler import History


def turn_of(draw: random.Random, documents: list[list[int]]) -> tuple[list[int], SamplingParams]:
    """Return a prompt that begins with part of a random document."""
    document = draw.choice(documents)
    prompt = document[: draw.randrange(len(document) // 2, len(document) + 1)]
    scored = 0 if draw.random() < 0.1 else None
    params = SamplingParams(
        max_tokens=draw.randrange(6), seed=draw.randrange(2), prompt_logprobs=scored
    )
    return [*prompt, *(draw.randrange(2, 300) for _ in range(draw.randrange(3)))], params


def run(seed: int, depth: int, with_disk: bool, num_groups: int = 1) -> History:
    draw = random.Random(seed)
    history = History(
        num_groups,
        num_pages=draw.randrange(12, 30),
        page_size=4,
        budget=draw.randrange(4, 60),
        running=draw.randrange(1, 5 if depth == 0 else 4),
        depth=depth,
        reuse=True,
        num_host_pages=draw.randrange(1, 24),
        disk=with_disk,
        num_drafts=draw.randrange(3) if depth == 0 else 0,
    )
    shared = [draw.randrange(2, 300) for _ in range(9)]
    documents = [
        [*shared[: draw.randrange(10)], *(draw.randrange(2, 300) for _ in range(30))]
        for _ in range(5)
    ]
    for number in range(50):
        history.add(str(number), turn_of(draw, documents))
        for _ in range(draw.randrange(8)):
            history.step()
            history.check_pages()
        if draw.random() < 0.1:
            history.cancel(draw.randrange(50))
    history.finish()
    return history


@pytest.mark.parametrize("with_disk", [False, True], ids=["host", "disk"])
@pytest.mark.parametrize("depth", [0, 1])
def test_answers_are_right_with_offload_and_restore(depth: int, with_disk: bool) -> None:
    offloads = host_hits = disk_hits = 0
    for seed in range(8):
        history = run(seed, depth, with_disk)
        metrics = history.engine.metrics
        offloads += metrics.offloads
        host_hits += metrics.host_hits
        disk_hits += metrics.disk_hits
    # The histories do exercise the tiers.
    assert offloads > 400 and host_hits > 200
    assert (disk_hits > 80) == with_disk


@pytest.mark.parametrize("depth", [0, 1])
def test_every_group_has_its_own_host_memory(depth: int) -> None:
    total = [0, 0]
    for seed in range(4):
        history = run(seed, depth, with_disk=False, num_groups=2)
        hits = [each.tiers.num_restored for each in history.schedulers if each.tiers is not None]
        assert history.engine.metrics.host_hits == sum(hits)
        total = [total[0] + hits[0], total[1] + hits[1]]
    assert min(total) > 10

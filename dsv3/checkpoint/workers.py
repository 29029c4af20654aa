"""Run jobs on a fixed number of threads; results in order of completion."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """Return two threads per core, at most eight: some of them wait for the disk."""
    return min(8, 2 * (os.cpu_count() or 1))


def run_jobs(
    items: Iterable[Item], work: Callable[[Item], Result], workers: int
) -> Iterator[Result]:
    """Yield results in order of completion; raise the first failure.

    Args:
        items: inputs, started in this order, at most 2 * workers at a time.
        work: called with each item, from any thread.
        workers: number of threads.
    """
    waiting = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(work, item) for item in islice(waiting, 2 * workers)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    running |= {pool.submit(work, item) for item in islice(waiting, 1)}
                    yield future.result()
        finally:
            for future in running:
                future.cancel()

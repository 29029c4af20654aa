"""A fixed number of threads over a list of jobs, results as they come."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """Two for each core, up to eight: some of them wait for the disk."""
    return min(8, 2 * (os.cpu_count() or 1))


def run_jobs(
    items: Iterable[Item], work: Callable[[Item], Result], workers: int
) -> Iterator[Result]:
    """Yield results in whatever order they are there; raise the first failure.

    Args:
        items: started in this order, few of them ahead of the workers.
        work: called with each, from any thread.
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

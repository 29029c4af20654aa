"""A fixed number of threads over a list of jobs, results as they come."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """Two for each core, up to eight: some of them wait for the disk."""
    return min(8, 2 * (os.cpu_count() or 1))


def run_jobs(
    items: Sequence[Item], make_worker: Callable[[], Callable[[Item], Result]], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, result) in whatever order they finish; raise the first failure.

    Args:
        items: started in this order.
        make_worker: called once in each thread, so that a worker may keep a buffer.
        workers: number of threads.
    """
    waiting, lock, stop = iter(items), threading.Lock(), threading.Event()
    results: SimpleQueue[tuple[Item, Result] | BaseException] = SimpleQueue()

    def loop() -> None:
        try:
            work = make_worker()
            while not stop.is_set():
                with lock:
                    try:
                        item = next(waiting)
                    except StopIteration:
                        return
                results.put((item, work(item)))
        except BaseException as error:  # told to the caller, whatever it is
            results.put(error)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for _ in range(min(workers, len(items))):
                pool.submit(loop)
            for _ in items:
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            stop.set()

"""A user's script that observes or interrupts its own process while it uses the library.

Usage: [torchrun ...] process_script.py WAY FOLDER

WAY: unchanged, handlers, or FAULT-RANK with the fault interrupt, caught, kill or stop; its RANK may
be `all`. What this rank has seen goes to FOLDER/RANK.json.
"""

import ctypes
import faulthandler
import gc
import json
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dsv3 import LLM, SamplingParams
from dsv3.errors import Dsv3Error

SIZES: dict[str, Any] = {"max_seq_len": 512, "kv_cache_size": "2048tok"}
LONG = SamplingParams(max_tokens=500, ignore_eos=True)
RANK = os.environ.get("RANK", "0")
_PR_GET_PDEATHSIG = 2


def snapshot() -> dict[str, object]:
    """Return all settings of this process that a library could change."""
    wakeup_fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup_fd)
    timers = Path("/proc/self/timers")
    death_signal = ctypes.c_int()
    ctypes.CDLL(None).prctl(_PR_GET_PDEATHSIG, ctypes.byref(death_signal))
    limits = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    return {
        "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "signals of the kernel": kernel_signals(),
        "wakeup fd": wakeup_fd,
        "timers": timers.read_text() if timers.exists() else "",
        "signal at the end of the parent": death_signal.value,
        "environment": dict(os.environ),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "garbage collector": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "faulthandler": faulthandler.is_enabled(),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in limits},
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook),
        "directory": str(Path.cwd()),
    }


def kernel_signals() -> dict[str, list[int]]:
    """Return the signals that are blocked, ignored and caught, also outside of Python."""
    status = Path("/proc/self/status").read_text()
    masks = re.findall(r"(Sig(?:Blk|Ign|Cgt)):\s*([0-9a-f]+)", status)
    numbers = sorted(signal.valid_signals())  # not those that the C library keeps for itself
    return {
        name: [number for number in numbers if int(mask, 16) >> (number - 1) & 1]
        for name, mask in masks
    }


class Observer:
    """Compares this process with its state at the beginning."""

    def __init__(self) -> None:
        self._before = snapshot()
        self._threads = set(threading.enumerate())
        self.changes: list[str] = []

    def compare(self, when: str) -> None:
        now = snapshot()
        self.changes += [f"{when}: {name}" for name in now if now[name] != self._before[name]]

    def compare_threads(self, when: str) -> None:
        more = set(threading.enumerate()) - self._threads
        self.changes += [f"{when}: thread {thread.name}" for thread in more]


def sum_of_ones(llm: LLM) -> list[str]:
    return [done.text for done in llm.generate("1 + 1 =", {"max_tokens": 3})]


def unchanged() -> dict[str, Any]:
    """Use two models, one after the other, and in a world of one two at once."""
    observer = Observer()
    texts = []
    for number in ("first", "second"):
        with LLM(**SIZES) as llm:
            observer.compare(f"{number} model")
            for _ in llm.stream("What is MLA?", {"max_tokens": 4}):
                observer.compare(f"{number} model, in a stream")
            texts.append(sum_of_ones(llm))
            if "RANK" not in os.environ:
                with LLM(**SIZES) as other:
                    observer.compare("two at once")
                    texts += [sum_of_ones(other), sum_of_ones(llm)]
        observer.compare(f"{number} model closed")
        observer.compare_threads(f"{number} model closed")
    return {"changes": observer.changes, "texts": texts}


def handlers() -> dict[str, Any]:
    """Handle signals, with handlers installed before and after the model is made."""
    calls: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: calls.append(number))
    with LLM(**SIZES) as llm:
        signal.signal(signal.SIGINT, lambda number, _: calls.append(number))
        before = sum_of_ones(llm)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        after = sum_of_ones(llm)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    return {"calls": calls, "same": before == after}


@contextmanager
def signal_in_steps(number: int, rank: str) -> Iterator[None]:
    """Send a signal to this process, if it is this rank or all are, within the block."""
    if rank not in (RANK, "all"):
        yield
        return
    timer = threading.Timer(0.3, os.kill, (os.getpid(), number))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def fault(name: str, rank: str) -> dict[str, Any]:
    """Interrupt, kill or stop a rank while it answers."""
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(name, signal.SIGINT)
    seen: dict[str, Any] = {"interrupted": False}
    try:
        with LLM(**SIZES, rank_timeout=4.0) as llm:
            sum_of_ones(llm)
            try:
                with signal_in_steps(number, rank):
                    for _ in range(20):
                        llm.generate("A story:", LONG)
            except KeyboardInterrupt:
                seen["interrupted"] = True
                if name != "caught":
                    raise
            try:
                sum_of_ones(llm)
            except Dsv3Error as error:
                seen["next call"] = str(error)
    except KeyboardInterrupt:
        if name == "interrupt":
            write(seen)
            raise
    if "RANK" not in os.environ:
        with LLM(**SIZES) as llm:
            seen["next model"] = len(sum_of_ones(llm))
    return seen


def write(seen: dict[str, Any]) -> None:
    (Path(sys.argv[2]) / f"{RANK}.json").write_text(json.dumps(seen))


def main() -> None:
    way = sys.argv[1]
    # A shell that starts the tests in the background ignores SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if way == "unchanged":
        write(unchanged())
    elif way == "handlers":
        write(handlers())
    else:
        write(fault(*way.split("-")))


if __name__ == "__main__":
    main()

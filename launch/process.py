"""The process of a program: signals, standard streams, and its end with torchrun.

The library changes none of these. No torch here: the converter starts without it. Threads and
memory, which need the model, are in `common.py`.
"""

import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv3.distributed.watchdog import Watchdog

_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def prepare_process() -> None:
    """Set up signals and standard streams, at the start of a program."""
    raise_at_ctrl_c()
    open_closed_streams()
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)  # writes the stacks of all threads
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        # If torchrun is killed, a rank that survives it would keep its GPU and the terminal.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_at_ctrl_c() -> None:
    """End the program silently at SIGINT, before `raise_at_ctrl_c`: no traceback from an import."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_at_ctrl_c() -> None:
    """Raise KeyboardInterrupt at SIGINT, after `end_at_ctrl_c`.

    Where SIGINT is ignored, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def open_closed_streams() -> None:
    """Open closed standard streams on /dev/null.

    Otherwise the next opened file gets their descriptor; this may be a file of results, and
    libraries would write messages into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


@contextmanager
def end_at_signals(watchdog: "Watchdog") -> Iterator[None]:
    """Let SIGTERM and SIGINT end the job in order, on all ranks, while the block runs.

    Signals that are ignored stay so. Afterwards they are ignored if one has ended the job: torchrun
    sends more of them, which must not change the exit code.
    """
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {
        number: handler for number in _END_SIGNALS if (handler := signal.getsignal(number)) in usual
    }
    for number in before:
        signal.signal(number, lambda number, _: watchdog.request_end(number))
    if before:
        # Handlers run in the main thread, which may wait in an exchange; the watchdog does not.
        signal.set_wakeup_fd(watchdog.wakeup_fd, warn_on_full_buffer=False)
    try:
        yield
    finally:
        if before:
            signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if watchdog.end_signal else handler)


@contextmanager
def drain_at_signals(drain: Callable[[], None]) -> Iterator[None]:
    """Within `end_at_signals`, let SIGTERM and SIGINT call `drain` instead of ending the job.

    Afterwards both are ignored if one has come: more of them must not change the exit code.
    """
    is_draining = False

    def begin(number: int, frame: FrameType | None) -> None:
        nonlocal is_draining
        if not is_draining:
            is_draining = True
            drain()

    before = {number: signal.getsignal(number) for number in _END_SIGNALS}
    wakeup_fd = signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, begin)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if is_draining else handler)
        if not is_draining:
            signal.set_wakeup_fd(wakeup_fd, warn_on_full_buffer=False)

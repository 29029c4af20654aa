"""A timer of the operating system that kills this process."""

import ctypes
import math
import signal
import sys
import time


class KillTimer:
    """POSIX timer that sends SIGKILL to this process unless it is set again. Linux only.

    A process that is stopped (SIGSTOP) cannot end itself; the kernel's timer still fires.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._timer = ctypes.c_void_p()
        if self._libc is not None:
            event = (ctypes.c_int * 16)(0, 0, signal.SIGKILL)  # struct sigevent
            if self._libc.timer_create(time.CLOCK_MONOTONIC, event, ctypes.byref(self._timer)):
                self._libc = None

    def set(self, seconds: float) -> None:
        """Restart the timer: the process is killed after `seconds`; 0 disarms it."""
        if self._libc is not None:
            spec = (ctypes.c_long * 4)(0, 0, math.ceil(seconds), 0)  # struct itimerspec
            self._libc.timer_settime(self._timer, 0, spec, None)

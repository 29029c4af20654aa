"""A second CUDA stream for work whose result is needed later."""

from collections.abc import Callable

import torch
from torch import Tensor


class SideStream:
    """Runs work in parallel with the main stream; without CUDA, immediately.

    The work starts after all kernels launched before it, and the main stream waits for it before
    the result is used, so the streams may share memory. Only events order the streams, so a CUDA
    graph can capture them.

    A weight's locks (`make_locks`) allow one launch at a time. So a weight that is used here may be
    used on the main stream only before `start` or after the join.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, work: Callable[[], Tensor], beside: bool = True) -> Callable[[], Tensor]:
        """Start `work`; return a function that waits for it and returns its result.

        Args:
            work: launches kernels and returns their output.
            beside: use the second stream; otherwise the work runs on the main stream.
        """
        stream = self._stream
        if stream is None or not beside:
            result = work()
            return lambda: result
        main = torch.cuda.current_stream(stream.device)
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            result = work()

        def join() -> Tensor:
            main.wait_stream(stream)
            return result

        return join

    def finish(self) -> None:
        """Let the main stream wait for all work that was started, joined or not."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

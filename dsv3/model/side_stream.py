"""A second CUDA stream for work that nobody waits for yet."""

from collections.abc import Callable

import torch
from torch import Tensor


class SideStream:
    """Runs one piece of work beside the main stream; without CUDA, at once.

    Work begins after all that was launched before it and ends before its result is handed out, so
    memory may pass between the streams. Events alone order them: a CUDA graph captures the fork.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, work: Callable[[], Tensor], beside: bool = True) -> Callable[[], Tensor]:
        """Begin `work`; return a function that waits for it and returns its result.

        Args:
            work: launches kernels and returns what they write.
            beside: else it runs on the main stream.
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

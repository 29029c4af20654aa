"""torchrun that prints how many nodes are missing while it waits for them.

    python launch/run.py --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d \
        --rdzv-endpoint HOST:PORT launch/generate.py --ckpt-path DIR --interactive

All flags are torchrun's.
"""

import functools
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    from process import end_at_ctrl_c

    end_at_ctrl_c()  # the imports below are slow

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.run import main as torchrun

from process import raise_at_ctrl_c

Rendezvous = Callable[[RendezvousHandler], RendezvousInfo]
FIRST_HINT_SECONDS = 5.0
NEXT_HINT_SECONDS = 60.0


def hint(handler: RendezvousHandler) -> str:
    """Return a message with the number of missing nodes, as far as this agent knows it."""
    num_present = 1
    num_nodes = getattr(handler, "world_size", 0)
    if isinstance(handler, DynamicRendezvousHandler):
        num_present = len(handler._state_holder.state.participants)
        num_nodes = handler.settings.min_nodes
    return (
        f"waiting for {num_nodes - num_present} of {num_nodes} nodes: was torchrun started on the "
        "other host with the same --rdzv-endpoint (or --master-addr and --master-port)?"
    )


def with_hints(rendezvous: Rendezvous) -> Rendezvous:
    """Return the rendezvous with a hint on standard error from time to time while it waits."""

    @functools.wraps(rendezvous)
    def rendezvous_with_hints(handler: RendezvousHandler) -> RendezvousInfo:
        is_done = threading.Event()

        def print_hints() -> None:
            seconds = FIRST_HINT_SECONDS
            while not is_done.wait(seconds):
                print(hint(handler), file=sys.stderr, flush=True)
                seconds = NEXT_HINT_SECONDS

        threading.Thread(target=print_hints, daemon=True).start()
        try:
            return rendezvous(handler)
        finally:
            is_done.set()

    return rendezvous_with_hints


def main() -> int:
    """Run torchrun; print one line for a failed rank, which has reported its own error already."""
    raise_at_ctrl_c()
    try:
        torchrun()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        print(f"rank {rank} has ended with exit code {code}; see above", file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    except KeyboardInterrupt:  # before torchrun handles signals
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    handlers: tuple[Any, ...] = (DynamicRendezvousHandler, StaticTCPRendezvous)
    for handler in handlers:
        handler.next_rendezvous = with_hints(handler.next_rendezvous)
    sys.exit(main())

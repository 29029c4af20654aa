"""torchrun, but it says so when it waits for other hosts; torchrun itself waits without a word.

    python launch/run.py --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d \
        --rdzv-endpoint HOST:PORT launch/generate.py --ckpt-path DIR --interactive

All flags are torchrun's.
"""

import functools
import signal
import sys
import threading
from collections.abc import Callable

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of the imports, which are slow

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.run import main as torchrun

from dsv3.errors import raise_at_ctrl_c

Meet = Callable[[RendezvousHandler], RendezvousInfo]
HINT_SECONDS, AGAIN_SECONDS = 5.0, 60.0


def hint(handler: RendezvousHandler) -> str:
    """Say for whom an agent waits, as far as it knows."""
    here, nodes = 1, getattr(handler, "world_size", 0)
    if isinstance(handler, DynamicRendezvousHandler):
        here = len(handler._state_holder.state.participants)
        nodes = handler.settings.min_nodes
    return (
        f"waiting for {nodes - here} of {nodes} nodes: was torchrun started on the other host with "
        "the same --rdzv-endpoint (or --master-addr and --master-port)?"
    )


def talkative(meet: Meet) -> Meet:
    """Let an agent that meets others say so while it waits."""

    @functools.wraps(meet)
    def meet_and_talk(handler: RendezvousHandler) -> RendezvousInfo:
        has_met = threading.Event()

        def talk() -> None:
            seconds = HINT_SECONDS
            while not has_met.wait(seconds):
                print(hint(handler), file=sys.stderr, flush=True)
                seconds = AGAIN_SECONDS

        threading.Thread(target=talk, daemon=True).start()
        try:
            return meet(handler)
        finally:
            has_met.set()

    return meet_and_talk


def main() -> int:
    """Run torchrun; its ranks have said why they ended, so their stacks are not printed again."""
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
    for kind in (DynamicRendezvousHandler, StaticTCPRendezvous):
        kind.next_rendezvous = talkative(kind.next_rendezvous)
    sys.exit(main())

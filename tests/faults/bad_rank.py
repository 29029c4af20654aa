"""generate.py with a fault of one rank at one of its steps; not repeated after a restart.

Usage: torchrun bad_rank.py FAULT RANK STEP [arguments of generate.py]

FAULT: the name of a signal, hang, raise or miscount.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from dsv3.engine.sampler import Sampler
from dsv3.engine.step_result import StepResult

GENERATE = str(Path(__file__).resolve().parents[2] / "launch" / "generate.py")


def main() -> None:
    fault = sys.argv[1]
    bad_rank = int(sys.argv[2])
    bad_step = int(sys.argv[3])
    sys.argv = [GENERATE, *sys.argv[4:]]
    mark = Path(sys.argv[sys.argv.index("--input-file") + 1] + ".bad")
    sample, steps = Sampler.__call__, 0

    def sample_badly(self: Sampler, *args: Any) -> StepResult:
        nonlocal steps
        steps += 1
        sampled = sample(self, *args)
        if steps == bad_step and not mark.exists():
            mark.touch()
            if fault.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, fault))
            while fault == "hang":
                time.sleep(1)
            if fault == "raise":
                raise RuntimeError("the device is on fire")
            sampled.token_M[:1] += 1
        return sampled

    if int(os.environ["RANK"]) == bad_rank:
        mock.patch.object(Sampler, "__call__", sample_badly).start()
    sys.path.insert(0, str(Path(GENERATE).parent))  # as Python does for a program
    runpy.run_path(GENERATE, run_name="__main__")


if __name__ == "__main__":
    main()

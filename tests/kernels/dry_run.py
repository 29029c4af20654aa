"""Runs a program of ours on a GPU that is not there.

    TRITON_INTERPRET=0 python tests/kernels/dry_run.py --compile launch/bench.py rank --layers 2

The last line it prints is JSON: launches by kernel, bytes of shared memory and of stack of all that
was compiled for it, replays of CUDA graphs, pools that captures still allocate from, and where the
host waited for the device.
"""

import json
import runpy
import sys
from collections import defaultdict
from pathlib import Path
from unittest import mock

from tests.kernels.dry_cuda import dry_gpu
from tests.kernels.dry_gpu import Gpu


def summary(gpu: Gpu) -> str:
    compiled = defaultdict(list)
    for name, shared, stack in gpu.compiled.values():
        compiled[name].append((shared, stack))
    facts = {"launches": gpu.launches, "compiled": compiled, "replays": gpu.replays}
    return json.dumps(facts | {"waits": gpu.waits, "recording": len(gpu.recording)})


def main() -> None:
    compiles = sys.argv[1] == "--compile"
    del sys.argv[: 1 + compiles]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as Python does for a program
    # CUDA's own profiler finds these on a GPU.
    events = mock.patch("benchlib.rank_steps.kernel_events", lambda run: run() and [])
    with dry_gpu(compiles) as gpu, events:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    sys.stdout.write(f"{summary(gpu)}\n")


if __name__ == "__main__":
    main()

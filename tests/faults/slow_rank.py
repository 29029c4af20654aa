"""generate.py with one rank that hangs at a certain place.

Usage: HANG_AT="PLACE RANK" python slow_rank.py [arguments of generate.py]
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

GENERATE = str(Path(__file__).resolve().parents[2] / "launch" / "generate.py")


def hang(*_: Any, **__: Any) -> None:
    while True:
        time.sleep(1)


def main() -> None:
    place, rank = os.environ["HANG_AT"].split()
    if os.environ["RANK"] == rank:
        if place == "imports":
            os.kill(os.getpid(), signal.SIGSTOP)
        from dsv3.checkpoint import load, reader
        from dsv3.distributed import mesh
        from dsv3.text.chat import ChatFormat

        if place == "closing":
            mesh.Mesh.close = hang  # type: ignore[assignment]
        if place == "groups":
            mesh.make_mesh = hang  # type: ignore[assignment]
        if place == "headers":
            reader.Source.__init__ = hang  # type: ignore[method-assign, assignment]
        if place == "weights":
            load._load_target = hang  # type: ignore[assignment]
        if place == "template":
            ChatFormat.render = hang  # type: ignore[method-assign, assignment]
    sys.path.insert(0, str(Path(GENERATE).parent))  # as Python does for a program
    runpy.run_path(GENERATE, run_name="__main__")


if __name__ == "__main__":
    main()

"""A program with three cases that the tests of `gpu_check` run as a job."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchlib.gpu_check.jobs import Job

# Runs cases that another process has not begun; the second one ends as the argument says.
FAKE = """
import json, os, pathlib, sys, time
rows, end = pathlib.Path(sys.argv[1]), sys.argv[2]
begun = rows.read_text() if rows.exists() else ""
def write(**record):
    with rows.open("a") as file:
        print(json.dumps(record), file=file)
for case in ("a", "b", "c"):
    if f'"begin": "{case}"' in begun:
        continue
    write(begin=case)
    if case == "b" and end == "hang":
        print("waiting", flush=True)
        time.sleep(60)
    if case == "b" and end == "crash":
        print("error: no such device", flush=True)
        os.abort()
    if case == "b" and end == "spoil":
        write(case=case, result="failed", why="RuntimeError: CUDA error: misaligned address")
        sys.exit(3)
    write(case=case, result="passed")
"""


def fake(folder: Path, end: str, **more: Any) -> Job:
    rows = folder / f"{end}.jsonl"
    argv = (sys.executable, "-I", "-S", "-c", FAKE, str(rows), end)
    job = Job(end, argv, log=folder / f"{end}.log", cwd=folder, rows=rows)
    return replace(job, **more)

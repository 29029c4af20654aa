"""Run two turns of several conversations on a device cache that holds one of them.

torchrun --standalone --nproc-per-node N tests/distributed/tiers.py JOB.json RESULT.json

JOB.json: {"path": checkpoint, "prompts": [...], "cases": {name: engine settings}}.
RESULT.json: {name: {"answers": [...], "cached": [...], "stats": as --stats-file}}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from dsv3.distributed.mesh import Mesh, join_world
from dsv3.engine.engine import Engine, follow
from dsv3.engine.start import start
from dsv3.engine.stats import collect_stats
from dsv3.request import Completion, Request, SamplingParams
from dsv3.settings import EngineConfig


def ask(engine: Engine, name: str, prompt: list[int]) -> Completion:
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    engine.add(Request(request_id=name, prompt_ids=prompt, params=params))
    while True:
        for out in engine.step():
            if out.completion is not None:
                return out.completion


def run_case(mesh: Mesh, job: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    started = start(Path(job["path"]), EngineConfig(**settings), mesh)
    answers, cached = [], []
    if started.engine is None:
        follow(started.runner, started.channel)
    else:
        for turn in ("first", "second"):
            for i, prompt in enumerate(job["prompts"]):
                done = ask(started.engine, f"{turn} {i}", prompt)
                answers.append(done.token_ids)
                cached.append(done.cached_tokens)
        started.engine.stop()
    return {"answers": answers, "cached": cached, "stats": collect_stats(started, {})}


def main() -> None:
    job, results = json.loads(Path(sys.argv[1]).read_text()), {}
    with join_world("cpu") as mesh:
        torch.set_num_threads(1)
        for name, settings in job["cases"].items():
            results[name] = run_case(mesh, job, settings)
        if mesh.layout.rank == 0:
            Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()

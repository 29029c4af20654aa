"""Every way to run a model at one world size, inside one torchrun.

torchrun --standalone --nproc-per-node N tests/distributed/matrix.py JOB.json RESULT.json

JOB.json: {"cases": {name: [kind, engine settings, data-parallel groups]},
"paths": {kind: checkpoint directory}, "prompts": {kind: [...]}}.
RESULT.json: {name: {"answers": {request: tokens}, "stats": as --stats-file,
"static rows": sizes of the steps on static buffers}}.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dsv3.config import ParallelConfig
from dsv3.distributed.mesh import Mesh, join_world, make_mesh
from dsv3.engine.cuda_graphs import GraphRunner
from dsv3.engine.engine import Engine, follow
from dsv3.engine.sampler import Sampler
from dsv3.engine.start import start
from dsv3.engine.stats import collect_stats
from dsv3.request import Request, SamplingParams
from dsv3.settings import EngineConfig
from dsv3.text.grammar import answer_grammar
from dsv3.text.tools import CallForm, ToolUse

# Penalties, biases and floors, in greedy and in sampled answers.
FILTERS: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 1.5},
    {"temperature": 1.0, "min_p": 0.02, "frequency_penalty": 1.5},
    {"presence_penalty": 2.0, "frequency_penalty": 2.0, "logit_bias": {7: 90.0, 300: 90.0}},
    {"temperature": 1.5, "min_p": 0.05, "repetition_penalty": 0.7, "presence_penalty": -0.5},
    {"frequency_penalty": -1.0, "repetition_penalty": 1.2, "logit_bias": {5: 100.0}, "logprobs": 2},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "logit_bias": {11: -100.0}},
)

STRICT = ToolUse(
    tools=(
        {
            "type": "function",
            "function": {
                "name": "f",
                "strict": True,
                "parameters": {
                    "properties": {"x": {"enum": ["yes", "no", 1.5]}, "y": {"type": "string"}},
                    "required": ["x", "y"],
                },
            },
        },
    )
)
SCHEMA = {"type": "array", "items": {"enum": ["yes", "no", 1.5]}, "minItems": 3}


def requests(prompts: list[list[int]], max_tokens: int) -> list[Request]:
    """Ask for greedy, sampled and adjusted continuations of all prompts; score the longest."""
    greedy = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    found = [
        Request(request_id=f"greedy {i}", prompt_ids=prompt, params=greedy)
        for i, prompt in enumerate(prompts)
    ]
    for i, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            temperature=1.0,
            top_p=0.9,
            top_k=50,
            seed=(i - 1) << 40,
        )
        found.append(Request(request_id=f"sampled {i}", prompt_ids=prompt, params=params))
    for i, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, seed=(i - 1) << 40, **FILTERS[i % len(FILTERS)]
        )
        name = f"adjusted {i}"
        found.append(Request(request_id=name, prompt_ids=prompt, params=params, answer=i % 2))
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=3)
    found.append(Request(request_id="scored", prompt_ids=prompts[-1], params=scoring))
    return found


def constrained(prompts: list[list[int]], max_tokens: int) -> list[Request]:
    """Ask for answers that follow a JSON schema, greedy and sampled."""
    found = []
    grammar = answer_grammar(None, SCHEMA, None)
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=max_tokens, temperature=1.5 * (i % 2), seed=i)
        name = f"constrained {i}"
        found.append(Request(request_id=name, prompt_ids=prompt, params=params, grammar=grammar))
    return found


def calling(engine: Engine, prompts: list[list[int]], max_tokens: int) -> list[Request]:
    """Ask for calls of a strict tool, which a bias begins, if the model has a form of calls."""
    form = CallForm.of(engine.tokenizer)
    if engine.tokenizer is None or form is None:
        return []
    found = []
    grammar = answer_grammar(STRICT, None, engine.tokenizer)
    bias = {engine.tokenizer.id_of(form.marks[0]) or 0: 100.0}
    for i, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=max_tokens, temperature=1.5 * (i % 2), seed=i, logit_bias=bias
        )
        request = Request(
            request_id=f"calling {i}",
            prompt_ids=prompt,
            params=params,
            grammar=grammar,
            is_chat=True,
            has_tools=True,
        )
        found.append(request)
    return found


def answer(engine: Engine, asked: list[Request]) -> dict[str, list[int] | list[float]]:
    """Return the tokens of every answer, and the log-probabilities of the scored prompt.

    The first request is alone for a step or two: most data-parallel groups have nothing to do.
    """
    answers: dict[str, list[int] | list[float]] = {}
    engine.add(asked[0])
    outputs = engine.step() + engine.step()
    for request in asked[1:]:
        engine.add(request)
    while outputs or engine.has_work():
        for out in outputs:
            if (done := out.completion) is None:
                continue
            answers[out.request_id] = done.token_ids
            if done.prompt_logprobs is not None:
                answers[out.request_id] = [t.logprob for t in done.prompt_logprobs]
        outputs = engine.step()
    return answers


def run_case(
    mesh: Mesh,
    path: str,
    settings: dict[str, Any],
    prompts: list[list[int]],
    max_tokens: int,
) -> dict[str, Any]:
    """Run one case on all ranks; the answers are rank 0's.

    With the setting `static`, short steps run on static buffers, as on CUDA.
    """
    config = EngineConfig(**{name: value for name, value in settings.items() if name != "static"})
    started = start(Path(path), config, mesh)
    answers, static = {}, None
    if "static" in settings:
        runner = started.runner
        sampler = Sampler(runner.model, mesh.tp, mesh.device)
        steps = GraphRunner(runner.model, started.cache, sampler, runner.rule, runner._drafter)
        runner._static = static = steps
    if started.engine is None:
        follow(started.runner, started.channel)
    else:
        asked = requests(prompts, max_tokens)
        if started.engine.tokenizer is not None and find_spec("llguidance") is not None:
            asked += constrained(prompts, max_tokens)
            asked += calling(started.engine, prompts, max_tokens)
        answers = answer(started.engine, asked)
        started.engine.stop()
    sizes = [] if static is None else sorted({bucket.rows for bucket in static._inputs})
    return {"answers": answers, "stats": collect_stats(started, {}), "static rows": sizes}


def split(mesh: Mesh, dp: int) -> Mesh:
    """Return the ranks in another layout."""
    size, rank = mesh.layout.world_size, mesh.layout.rank
    layout = ParallelConfig(world_size=size, rank=rank, dp=dp)
    return make_mesh(layout, mesh.device, "gloo", False, mesh.host_of_rank)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    with join_world("cpu") as mesh:
        torch.set_num_threads(1)  # the models are tiny: more threads only wait
        meshes = {}
        for name, (kind, settings, dp) in job["cases"].items():
            path, prompts = job["paths"][kind], job["prompts"][kind]
            if dp not in meshes:
                meshes[dp] = mesh if dp == 1 else split(mesh, dp)
            results[name] = run_case(meshes[dp], path, settings, prompts, job["max_tokens"])
        for each in meshes.values():
            each.close()
        if mesh.layout.rank == 0:
            Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()

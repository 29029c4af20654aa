"""Part `demo`: answers of the demo model on the GPU compared with those of the CPU."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchlib.gpu_check.jobs import Job, JobResult
from benchlib.gpu_check.parts import Part, Setup
from benchlib.gpu_check.report import PartResult
from dsv3.errors import shorten

PROMPTS = (
    "What is MLA?",
    "My name is Anna and I live in Amsterdam. What is my name?",
    "1 + 1 =",
    "What is the capital of France?",
    "Tell me about experts.",
    "Hello!",
    "Name three colours.",
    "What does a cache do? " * 40,
)
_MAX_TOKENS = 40
CHECKPOINT = "checkpoints/demo-v3"


@dataclass(frozen=True, slots=True)
class Run:
    """A run of the demo model.

    Attributes:
        name: names its files.
        device: "cpu" or "cuda".
        dtype: numerics; in float32 all answers must be those of a CPU.
        flags: more flags of generate.py.
        ranks: number of processes.
    """

    name: str
    device: str
    dtype: str
    flags: tuple[str, ...] = ()
    ranks: int = 1

    @property
    def reference(self) -> str:
        """Name of the run on a CPU whose answers these are compared with."""
        return f"cpu {self.dtype}"


def references(runs: Iterable[Run]) -> list[Run]:
    """Return the runs on a CPU that runs are compared with."""
    dtypes = dict.fromkeys(run.dtype for run in runs)
    return [Run(f"cpu {dtype}", "cpu", dtype) for dtype in dtypes]


def demo_runs(setup: Setup) -> list[Run]:
    """Return the runs of the part `demo`: references first."""
    device = "cpu" if setup.rehearse else "cuda"
    runs = [
        Run("float32", device, "float32"),
        Run("float32 eager", device, "float32", ("--enforce-eager",)),
        Run("float32, 2 ranks", device, "float32", (), 2),
        Run("bfloat16", device, "bfloat16"),
        Run("fp8", device, "fp8"),
        Run("fp8, cache in fp8", device, "fp8", ("--kv-dtype", "fp8")),
    ]
    if setup.facts.has_overlap and not setup.rehearse:
        runs.append(Run("fp8, overlapping", device, "fp8", ("--overlap-launches",)))
    return [*references(runs), *runs]


def torchrun(ranks: int) -> list[str]:
    """Return the arguments of Python that start a program on several ranks; none for one."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return command if ranks > 1 else []


def _file(setup: Setup, part: str, name: str, suffix: str) -> Path:
    return setup.out / part / f"{_slug(name)}{suffix}"


def _slug(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def demo_jobs(setup: Setup, part: str, runs: Sequence[Run]) -> list[Job]:
    """Return the jobs of runs; prompts and answers are in a directory of the part."""
    folder = setup.out / part
    folder.mkdir(exist_ok=True)
    rows = folder / "prompts.jsonl"
    rows.write_text("".join(f"{json.dumps(_batch_row(i))}\n" for i in range(len(PROMPTS))))
    jobs = []
    for run in runs:
        argv = [*torchrun(run.ranks), "launch/generate.py", "--ckpt-path", CHECKPOINT]
        argv += ["--device", run.device, "--dtype", run.dtype, "--strict", "--debug", *run.flags]
        argv += ["--input-file", str(rows)]
        argv += ["--output-file", str(_file(setup, part, run.name, ".jsonl"))]
        jobs.append(setup.job(f"{part}_{_slug(run.name)}", *argv))
    return jobs


def _batch_row(index: int) -> dict[str, object]:
    message = {"role": "user", "content": PROMPTS[index]}
    body = {"messages": [message], "max_tokens": _MAX_TOKENS, "temperature": 0}
    row = {"custom_id": str(index), "method": "POST", "url": "/v1/chat/completions"}
    return row | {"body": body}


def read_answers(path: Path) -> dict[str, str]:
    """Return the answers of a run by row; none if it has written none."""
    answers = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            choices = ((row.get("response") or {}).get("body") or {}).get("choices")
            if choices:
                answers[row["custom_id"]] = choices[0]["message"]["content"]
    return answers


def judge_answers(
    runs: Sequence[Run], answers: dict[str, dict[str, str]], part: PartResult
) -> None:
    """Compare the answers of runs with those of their references, which are runs too.

    In float32 all must be the same. In other numerics sums are rounded in another order, so that
    a few may differ; most must be the same.
    """
    num_same = 0
    others = [run for run in runs if run.name != run.reference]
    for run in others:
        want = answers[run.reference]
        got = answers[run.name]
        different = [key for key in want if got.get(key) != want[key]]
        num_same += len(want) - len(different)
        allowed = 0 if run.dtype == "float32" else len(want) // 4
        if len(different) > allowed:
            key = different[0]
            part.fail(
                f"{run.name}: {len(different)} of {len(want)} answers differ from {run.reference}: "
                f"{shorten(PROMPTS[int(key)], 30)!r} gives {shorten(str(got.get(key)), 50)!r}, "
                f"not {shorten(want[key], 50)!r}"
            )
    total = len(others) * len(PROMPTS)
    if others:
        part.summary = f"{num_same} of {total} answers of {len(others)} runs are the CPU's"


def judge_runs(
    setup: Setup, runs: Sequence[Run], results: Sequence[JobResult], part: PartResult
) -> None:
    """Judge runs by exit codes and answers; runs without answers are not compared."""
    by_name = dict(zip((run.name for run in runs), results, strict=True))
    for name, result in by_name.items():
        part.add_end(name, result.fault, result.out_of_time)
    done = [run for run in runs if not by_name[run.name].fault and not by_name[run.reference].fault]
    answers = {run.name: read_answers(_file(setup, part.name, run.name, ".jsonl")) for run in done}
    judge_answers(done, answers, part)
    if len(done) < len(runs):
        reason = "out of time: " if any(result.out_of_time for result in results) else ""
        missing = f"{reason}{len(runs) - len(done)} runs have no answers to compare"
        part.summary = "; ".join(filter(None, [part.summary, missing]))


def _judge_demo(setup: Setup, results: Sequence[JobResult], part: PartResult) -> None:
    judge_runs(setup, demo_runs(setup), results, part)


DEMO = Part(
    name="demo",
    about="the demo model on the GPU against the CPU: float32, bfloat16, fp8, graphs, two ranks",
    limit=240,
    typical=120,
    make_jobs=lambda setup: demo_jobs(setup, "demo", demo_runs(setup)),
    judge=_judge_demo,
    unproven="the demo model ran on the CPU: no compiled kernel, no CUDA graph",
)

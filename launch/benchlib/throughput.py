"""Offline batches: how many requests and tokens a second, and what a request feels of it."""

from collections.abc import Sequence

import numpy as np

from benchlib.contest import Contender, RunResult, compete, middle
from benchlib.report import Report
from benchlib.workload import BenchRequest


def throughput(
    contenders: Sequence[Contender], requests: Sequence[BenchRequest], repeats: int
) -> Report:
    """Run the requests on every contender; the first one is compared with the others."""
    runs = compete(contenders, requests, repeats)
    num_prompt, num_answer = (
        sum(len(j.prompt_ids) for j in requests),
        sum(j.num_tokens for j in requests),
    )
    report = Report("throughput", x_label="contender", y_label="answer tokens a second")
    for name, done in runs.items():
        seconds = middle(done, lambda run: run.seconds)
        report.rows.append(
            {
                "contender": name,
                "requests/s": len(requests) / seconds,
                "prompt tok/s": num_prompt / seconds,
                "answer tok/s": num_answer / seconds,
                "first token s": middle(done, lambda run: _quantile(run.first_token, 50)),
                "p95": middle(done, lambda run: _quantile(run.first_token, 95)),
                "next token ms": 1e3 * middle(done, lambda run: _quantile(run.between_tokens, 50)),
                "p95 ms": 1e3 * middle(done, lambda run: _quantile(run.between_tokens, 95)),
                "host ms/step": _host_ms(done),
                "CPU s": middle(done, lambda run: run.cpu_seconds),
            }
        )
        report.series[name] = ([name], [num_answer / seconds])
    first, *others = runs
    for other in others:
        report.notes.append(_compare(first, runs[first], other, runs[other]))
    return report


def _quantile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else 0.0


def _host_ms(runs: Sequence[RunResult]) -> float | None:
    known = [1e3 * run.host_step for run in runs if run.host_step is not None]
    return float(np.median(known)) if known else None


def _compare(name: str, ours: Sequence[RunResult], other: str, theirs: Sequence[RunResult]) -> str:
    by_clock = middle(theirs, lambda r: r.seconds) / middle(ours, lambda r: r.seconds)
    by_cpu = middle(theirs, lambda r: r.cpu_seconds) / middle(ours, lambda r: r.cpu_seconds)
    answers = list(zip(ours[0].answers, theirs[0].answers, strict=True))
    same = sum(a == b for a, b in answers)
    return (
        f"{name} is {by_clock:.2f} times as fast as {other} by the clock, {by_cpu:.2f} times by "
        f"CPU time (medians of {len(ours)} runs each, in turns); {same} of {len(answers)} answers "
        "are the same"
    )

"""Offline batches: requests and tokens per second, and latencies of a request."""

from collections.abc import Sequence

import numpy as np

from benchlib.contest import Contender, RunResult, compete, median_of
from benchlib.report import Report
from benchlib.workload import BenchRequest


def throughput(
    contenders: Sequence[Contender], requests: Sequence[BenchRequest], repeats: int
) -> Report:
    """Run the requests on each contender, and compare the first contender with the others."""
    runs = compete(contenders, requests, repeats)
    num_prompt = sum(len(request.prompt_ids) for request in requests)
    num_answer = sum(request.num_tokens for request in requests)
    report = Report("throughput", x_label="contender", y_label="answer tokens a second")
    for name, results in runs.items():
        token_seconds = median_of(results, lambda run: _quantile(run.between_tokens, 50))
        seconds = median_of(results, lambda run: run.seconds)
        report.rows.append(
            {
                "contender": name,
                "requests/s": len(requests) / seconds,
                "prompt tok/s": num_prompt / seconds,
                "answer tok/s": num_answer / seconds,
                "first token s": median_of(results, lambda run: _quantile(run.first_token, 50)),
                "p95": median_of(results, lambda run: _quantile(run.first_token, 95)),
                "next token ms": 1e3 * token_seconds,
                "p95 ms": 1e3 * median_of(results, lambda run: _quantile(run.between_tokens, 95)),
                "host ms/step": _host_ms(results),
                "CPU s": median_of(results, lambda run: run.cpu_seconds),
            }
        )
        report.series[name] = ([name], [num_answer / seconds])
    ours, *others = runs
    for other in others:
        report.notes.append(_compare(ours, runs[ours], other, runs[other]))
    return report


def _quantile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else 0.0


def _host_ms(runs: Sequence[RunResult]) -> float | None:
    known = [1e3 * run.host_step for run in runs if run.host_step is not None]
    return float(np.median(known)) if known else None


def _compare(name: str, ours: Sequence[RunResult], other: str, theirs: Sequence[RunResult]) -> str:
    by_clock = median_of(theirs, lambda r: r.seconds) / median_of(ours, lambda r: r.seconds)
    by_cpu = median_of(theirs, lambda r: r.cpu_seconds) / median_of(ours, lambda r: r.cpu_seconds)
    answers = list(zip(ours[0].answers, theirs[0].answers, strict=True))
    same = sum(a == b for a, b in answers)
    return (
        f"{name} is {by_clock:.2f} times as fast as {other} by the clock, {by_cpu:.2f} times by "
        f"CPU time (medians of {len(ours)} runs each, in turns); {same} of {len(answers)} answers "
        "are the same"
    )

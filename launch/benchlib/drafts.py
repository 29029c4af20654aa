"""Drafts of the next tokens: tokens of a step, and speed beside steps without drafts."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from benchlib.contest import EngineContender, RunResult, compete, median_of
from benchlib.report import Report
from benchlib.workload import BenchRequest
from dsv3.engine.start import Started
from dsv3.errors import ConfigError
from dsv3.read_files import read_text
from dsv3.text.chat import ChatFormat, UnusableFormat

_MOST_BYTES = 1 << 30  # of a file of conversations


def read_conversations(
    path: Path, checkpoint: Path, started: Started, num_tokens: int
) -> list[BenchRequest]:
    """Return the requests of rows with `messages`, by themselves or in a `body`."""
    assert started.engine is not None
    chat = ChatFormat.of_directory(checkpoint, started.config.model_type)
    if isinstance(chat, UnusableFormat):
        raise ConfigError(f"{checkpoint}: no chat format for the conversations of {path}")
    requests = []
    for number, line in enumerate(read_text(path, limit=_MOST_BYTES).splitlines(), 1):
        try:
            row = json.loads(line)
            messages = row.get("body", row)["messages"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{path}: row {number} is no JSON with messages") from None
        ids = chat.prompt_ids(messages, None)
        if len(ids) + num_tokens <= started.engine.max_seq_len:
            requests.append(BenchRequest(ids, num_tokens))
    return requests


def compare_drafts(
    report: Report,
    contenders: Sequence[EngineContender],
    requests: Sequence[BenchRequest],
    concurrency: int,
    repeats: int,
) -> None:
    """Run the requests on each contender, and add a row for each; the first has no drafts."""
    runs = compete(contenders, requests, repeats)
    plain = runs[contenders[0].name]
    speeds: list[float] = []
    for contender in contenders:
        mine = runs[contender.name]
        m = contender.engine.metrics
        num_parts = m.decode_tokens - m.accepted_tokens  # a sequence's decoding steps
        places = zip(m.accepted_at, m.drafted_at, strict=True)
        shares = [f"{accepted / drafted:.2f}" for accepted, drafted in places if drafted]
        num_answer = sum(map(len, mine[0].answers))
        speeds.append(num_answer / median_of(mine, lambda run: run.seconds))
        report.rows.append(
            {
                "running": concurrency,
                "drafts": contender.name,
                "tokens/step": m.decode_tokens / max(1, num_parts),
                "accepted at each place": " ".join(shares) or "-",
                "answer tok/s": speeds[-1],
                "times as fast": _ratio(plain, mine, lambda run: run.seconds),
                "by CPU time": _ratio(plain, mine, lambda run: run.cpu_seconds),
            }
        )
        if [run.answers for run in mine] != [run.answers for run in plain]:
            report.notes.append(
                f"{contender.name}, {concurrency} running: not the answers of {contenders[0].name}"
            )
    labels = [contender.name for contender in contenders]
    report.series[f"{concurrency} running"] = labels, speeds


def _ratio(
    plain: Sequence[RunResult], mine: Sequence[RunResult], figure: Callable[[RunResult], float]
) -> float:
    return median_of(plain, figure) / median_of(mine, figure)

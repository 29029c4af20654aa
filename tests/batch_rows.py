"""Rows of batch files, their results, and jobs that write them."""

import json
from pathlib import Path

from dsv3.serve.batch_file import BatchInput, Row, result_line
from dsv3.serve.journal import BatchJournal
from dsv3.text.defaults import Defaults, Sampling
from dsv3.text.openai_answer import error_body


def batch(path: Path, rows: list[str], max_tokens: int | None = None) -> BatchInput:
    """Write an input file and open it."""
    path.write_text("\n".join(rows), errors="surrogateescape")
    return BatchInput(path, Defaults(flags=Sampling(max_tokens=max_tokens)))


def row(custom_id: str, prompt: str = "hi") -> str:
    body = {"prompt": prompt}
    return json.dumps({"custom_id": custom_id, "url": "/v1/completions", "body": body})


GOOD = [row("a"), row("b", "胡萝卜"), row("c")]
BAD = [row("a"), row("a"), '{"custom_id": "d"}', "{broken", "{broken", '"custom_id"', row("")]
ALL = [*GOOD, *BAD, row("e", "last")]


def result(row: Row, status: int = 200) -> bytes:
    """Return the result line of a row; a row that cannot be read gets its error."""
    if row.request is None:
        return result_line(row, 400, error_body(f"row {row.number}: {row.error}", 400, row.code))
    if status != 200:
        return result_line(row, status, error_body("of ours", status))
    return result_line(row, 200, {"text": f"answer\n to {row.custom_id} 胡"})


def run(path: Path, rows: BatchInput, stop_after: int = 10**9) -> list[bytes]:
    """Run a batch job that may end early; return the lines it wrote."""
    written: list[bytes] = []
    with BatchJournal(path) as journal:
        journal.resume(rows)
        for row in rows:
            if row not in journal and len(written) < stop_after:
                written.append(result(row))
                journal.write(written[-1])
        journal.finish()
    return written


def whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().split(b"\n")[:-1] if line]


def assert_every_row_once(path: Path, rows: BatchInput) -> None:
    lines = [json.loads(line) for line in path.read_bytes().splitlines(keepends=True)]
    done = [(line["custom_id"], line["response"]["request_id"]) for line in lines]
    assert sorted(done) == sorted((row.custom_id, row.digest) for row in rows)
    assert all(line["response"]["status_code"] < 500 for line in lines)

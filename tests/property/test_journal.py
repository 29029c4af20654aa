"""After any damage to the output file, a start repairs it, and each row is in it once."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3.errors import ConfigError
from dsv3.serve.batch_file import result_line
from dsv3.serve.journal import BatchJournal
from tests.batch_rows import ALL, GOOD, assert_every_row_once, batch, result, row, run, whole_lines


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_any_prefix_resumes(tmp_path: Path) -> None:
    rows = batch(tmp_path / "in.jsonl", [row("b", "胡萝卜"), "{broken", row("b"), row("e")])
    out = tmp_path / "out.jsonl"
    assert len(run(out, rows)) == 4
    full = out.read_bytes()
    for cut in range(len(full) + 1):
        out.write_bytes(full[:cut])
        kept = whole_lines(out)
        written = run(out, rows)
        assert len(written) + len(kept) in (4, 3)  # 3: one line lacked only its end
        assert out.read_bytes() == full


events = st.lists(
    st.one_of(
        st.tuples(st.just("run"), st.integers(0, 6)),
        st.tuples(st.just("cut"), st.integers(1, 400)),
        st.tuples(st.just("zeros"), st.integers(1, 300)),
        st.tuples(st.just("ours"), st.integers(0, len(GOOD) - 1)),
        st.tuples(st.just("twice"), st.integers(0, 5)),
        st.tuples(st.just("move"), st.integers(0, len(ALL))),
    ),
    max_size=12,
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(events)
def test_any_history_ends_with_every_row_once(
    tmp_path: Path, history: list[tuple[str, int]]
) -> None:
    out = tmp_path / "out.jsonl"
    out.unlink(missing_ok=True)
    # Rows without an id carry their place in their digest, so they keep it.
    rows = batch(tmp_path / "in.jsonl", ALL)
    for event, number in history:
        data = out.read_bytes() if out.exists() else b""
        if event == "run":
            run(out, rows, stop_after=number)
        elif event == "cut":  # killed, or a power cut
            out.write_bytes(data[:-number])
        elif event == "zeros":  # a power cut: the file has its length, not yet its contents
            out.write_bytes(data[:-number] + b"\0" * min(number, len(data)))
        elif event == "ours":  # a failure that is tried again
            failed = result(list(rows)[number], 500)
            out.write_bytes(data[: data.rfind(b"\n") + 1] + failed + b"\n")
        elif event == "twice":  # as if two jobs had written
            lines = whole_lines(out) if out.exists() else []
            out.write_bytes(b"".join(line + b"\n" for line in [*lines, *lines[number:]]))
        else:
            shuffled = [*GOOD[number % 3 :], *GOOD[: number % 3]]
            rows = batch(tmp_path / "in.jsonl", [*shuffled, *ALL[len(GOOD) :]])
    run(out, rows)
    assert_every_row_once(out, rows)
    assert run(out, rows) == []


def test_done_rows_keep_their_bytes(tmp_path: Path) -> None:
    rows = batch(tmp_path / "in.jsonl", ALL)
    out = tmp_path / "out.jsonl"
    first, second, *_ = list(rows)
    out.write_bytes(result(first) + b"\n" + result(second, 500) + b"\n" + result(first)[:50])
    with BatchJournal(out) as journal:
        journal.resume(rows)
        journal.begin()
        assert out.read_bytes() == result(first) + b"\n"
        assert first in journal
        assert second not in journal
        assert (journal.num_done, journal.num_failed) == (1, 0)


def test_bad_requests_are_final_until_they_are_changed(tmp_path: Path) -> None:
    bad = '{"custom_id": "d", "url": "/nowhere", "body": {}}'
    out = tmp_path / "out.jsonl"
    run(out, batch(tmp_path / "in.jsonl", [row("a"), bad, "{broken"]))
    assert run(out, batch(tmp_path / "in.jsonl", [row("a"), bad, "{broken"])) == []
    mended = batch(tmp_path / "in.jsonl", [row("a"), row("d"), row("f")])
    assert len(run(out, mended)) == 2
    assert_every_row_once(out, mended)


@pytest.mark.parametrize(
    ("changed", "max_tokens", "reason"),
    [
        ([row("a"), row("b", "other")], None, "row 2 was changed"),
        ([row("b")], None, "custom_id='a', but the input has no such row"),
        ([row("a"), row("b")], 5, "row 1 was changed"),
    ],
)
def test_answers_to_other_requests_stop_the_start(
    tmp_path: Path, changed: list[str], max_tokens: int | None, reason: str
) -> None:
    out = tmp_path / "out.jsonl"
    run(out, batch(tmp_path / "in.jsonl", [row("a"), row("b")]))
    before = out.read_bytes()
    rows = batch(tmp_path / "in.jsonl", changed, max_tokens)
    with pytest.raises(ConfigError, match=reason), BatchJournal(out) as journal:
        journal.resume(rows)
    assert out.read_bytes() == before
    with BatchJournal(out, overwrite=True) as journal:
        journal.resume(rows)
        assert journal.num_done == 0
        journal.finish()
    assert out.read_bytes() == b""


def test_answers_of_another_model_stop_the_start(tmp_path: Path) -> None:
    out, rows = tmp_path / "out.jsonl", batch(tmp_path / "in.jsonl", [row("a"), row("b")])
    first, second = rows
    line = result_line(first, 200, {"text": "answer", "system_fingerprint": "dsv3-one"})
    out.write_bytes(line + b"\n" + result(second, 500) + b"\n")
    with pytest.raises(ConfigError, match=r"line 1: an answer of another model .*dsv3-one.*-two"):
        BatchJournal(out, fingerprint="dsv3-two")
    with BatchJournal(out, fingerprint="dsv3-one") as journal:
        journal.resume(rows)
        assert (first in journal, second in journal) == (True, False)
    with BatchJournal(out, overwrite=True, fingerprint="dsv3-two") as journal:
        journal.resume(rows)
        assert journal.num_done == 0

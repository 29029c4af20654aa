"""Logs and errors of the programs reach a terminal as plain lines."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsv3.engine.program import (
    Parser,
    add_engine_flags,
    engine_config,
    run_program,
    set_up_logging,
)
from dsv3.errors import MAX_LINE, CheckpointError, ConfigError


@contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers.clear()
    set_up_logging(debug=False, folder=str(folder))
    try:
        yield
    finally:
        root.handlers[-1].close()
        root.handlers[:] = before
        root.setLevel(level)


def test_logs_command_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("dsv3")
    with logging_to(tmp_path):
        log.info("a table\n\tof %s", "\x1b[2Jnames")
        log.warning("%s: a tensor\nof a long name", "name" * 500)
        try:
            raise ValueError("\x1b[2J")
        except ValueError:
            log.exception("broken\x07")
    screen = capfd.readouterr().err.splitlines()
    assert screen[:2] == ["a table", "\tof \\x1b[2Jnames"]
    assert screen[2].startswith("namename")
    assert screen[2].endswith(": a tensor of a long name")
    assert len(screen[2]) <= MAX_LINE
    assert screen[3:5] == [r"broken\x07", "Traceback (most recent call last):"]
    assert screen[-1] == r"ValueError: \x1b[2J"
    kept = (tmp_path / "rank0.log").read_text()
    assert "INFO a table" in kept and "\x1b" not in kept


@pytest.mark.parametrize("debug", [True, False])
def test_an_error_is_one_harmless_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], debug: bool
) -> None:
    def main() -> int:
        raise CheckpointError("\x1b]0;x\x07.json: damaged\n" + "x" * 5000)

    monkeypatch.setattr("sys.argv", ["program", *["--debug"] * debug])
    with pytest.raises(SystemExit) as left:
        run_program(main)
    *story, line = capfd.readouterr().err.splitlines()
    assert left.value.code == 2
    assert bool(story) == debug
    assert "\x1b" not in "".join(story)
    assert line.startswith(r"error: \x1b]0;x\x07.json: damaged xxx")
    assert len(line) <= MAX_LINE + len("error: ")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("--max-seq-len -1", "--max-seq-len=-1 must be at least 0"),
        ("--attn-impl fast", "--attn-impl=fast is unknown; use one of auto, naive, absorb"),
        ("--kv-cache-size 4Q", "--kv-cache-size=4Q is not a size"),
        ("--kv-disk-cache d:4Q", "--kv-disk-cache=4Q is not a size"),
        ("--kv-disk-cache 4G", "--kv-disk-cache=4G is not DIR:BYTES"),
        ("--max-running 9999", "--max-running=9999 needs as many --max-batch-tokens (now 2048)"),
        (
            "--kv-host-cache 1G --no-prefix-reuse",
            "--kv-host-cache and --kv-disk-cache keep prefixes, --no-prefix-reuse uses none",
        ),
        ("--attn-impl naive --kv-dtype fp8", "--kv-dtype=fp8 packs latents, --attn-impl=naive"),
    ],
)
def test_errors_of_settings_name_flags(line: str, error: str) -> None:
    parser = Parser()
    add_engine_flags(parser)
    with pytest.raises(ConfigError) as refused:
        engine_config(parser.parse_args(line.split()))
    assert str(refused.value).startswith(error)

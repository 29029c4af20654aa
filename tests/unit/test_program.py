"""Logs and errors of the programs reach a terminal as plain lines."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsv3.errors import MAX_LINE, CheckpointError, ConfigError
from program import (
    Parser,
    add_engine_flags,
    engine_config,
    run_program,
    set_up_logging,
)


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


@pytest.mark.parametrize("name", ["--ckpt-path", "--config", "--log-dir", "--expert-placement"])
def test_empty_values_of_flags(name: str) -> None:
    parser = Parser()
    add_engine_flags(parser)
    if name == "--expert-placement":  # as it is without the flag
        assert parser.parse_args([name, ""]).expert_placement == ""
        return
    with pytest.raises(ConfigError, match=f"^{name} is empty; give a value, or leave it out$"):
        parser.parse_args([name, ""])


def test_a_misspelt_flag_is_compared_with_the_flags() -> None:
    parser = Parser()
    add_engine_flags(parser)
    with pytest.raises(ConfigError, match=r"--max-runing=3; did you mean --max-running\?$"):
        parser.parse_args(["--max-runing=3"])


def test_help_shows_defaults_that_are_values() -> None:
    parser = Parser()
    add_engine_flags(parser)
    text = " ".join(parser.format_help().split())
    assert "copies of experts in a layer, without a file (default: 0)" in text
    assert "do not reuse computed prefixes --eviction" in text


def run_program_file(program: str, first: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a program with modules of a folder before all others."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (first, root, root / "kernels")))
    return subprocess.run(
        [sys.executable, root / "launch" / f"{program}.py", "--help"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("program", "module"),
    [("generate", "torch"), ("bench", "torch"), ("run", "torch"), ("convert", "tqdm")],
)
def test_ctrl_c_during_the_imports_is_no_traceback(
    tmp_path: Path, program: str, module: str
) -> None:
    interrupt = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / f"{module}.py").write_text(interrupt)
    done = run_program_file(program, tmp_path)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


def test_ctrl_c_before_torchrun_handles_signals_is_no_traceback(tmp_path: Path) -> None:
    package = tmp_path / "torch"
    modules = {
        "": "",
        "distributed": "",
        "distributed/elastic": "",
        "distributed/elastic/multiprocessing": "class SignalException(Exception): pass",
        "distributed/elastic/multiprocessing/errors": "class ChildFailedError(Exception): pass",
        "distributed/elastic/rendezvous": "RendezvousHandler = RendezvousInfo = object",
        "distributed/elastic/rendezvous/dynamic_rendezvous": (
            "class DynamicRendezvousHandler: next_rendezvous = print"
        ),
        "distributed/elastic/rendezvous/static_tcp_rendezvous": (
            "class StaticTCPRendezvous: next_rendezvous = print"
        ),
        "distributed/run": "def main(): import os; os.kill(os.getpid(), 2)",
    }
    for name, text in modules.items():
        (package / name).mkdir()
        (package / name / "__init__.py").write_text(text)
    done = run_program_file("run", tmp_path)
    assert (done.returncode, done.stderr) == (130, b"")

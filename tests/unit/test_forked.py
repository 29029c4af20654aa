"""Programs in forks of one process."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import pytest

from tests.forked import Forked, run_forked


def test_exit_codes_are_right_while_other_threads_start_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "exit.py"
    script.write_text("raise SystemExit(3)")
    has_begun = threading.Event()
    read = forkserver.read_signed

    def read_late(descriptor: int) -> int:
        has_begun.set()
        time.sleep(1.0)
        return int(read(descriptor))

    with ThreadPoolExecutor() as pool:
        first = Forked([str(script)], "", {})
        monkeypatch.setattr(forkserver, "read_signed", read_late)
        ended = pool.submit(first.finish)
        assert has_begun.wait(60)
        monkeypatch.setattr(forkserver, "read_signed", read)
        second = pool.submit(run_forked, [str(script)])
        assert [ended.result().returncode, second.result().returncode] == [3, 3]

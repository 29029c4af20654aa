"""convert.py stopped, killed or short of memory: no partial output looks complete; it resumes."""

import contextlib
import dataclasses
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import convert as cli
from dsv3.checkpoint import convert as conversion
from dsv3.checkpoint.journal import JOURNAL
from tests.checkpoint_files import TINY, write_sparse
from tests.faults.converting import Convert, contents, looks_whole


def test_one_writer_at_a_time(hf: Path, tmp_path: Path, convert: Convert) -> None:
    (tmp_path / "out").mkdir()
    with conversion.ConversionJournal(tmp_path / "out"):
        code, _, err = convert(hf, tmp_path / "out", "--model-parallel", 2)
    assert code == 2
    assert "another conversion is writing here" in err


@pytest.mark.parametrize("stage", ["_last_file", "write_content", "_put_in_place"])
def test_stopped_at_the_end(
    stage: str, hf: Path, tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors are written, even renamed, but it is not whole until the manifest is there."""
    monkeypatch.setattr(conversion, stage, lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(hf, tmp_path / "out", "--model-parallel", 4)
    monkeypatch.undo()
    assert not looks_whole(tmp_path / "out")
    _, out, _ = convert(hf, tmp_path / "out", "--model-parallel", 4)
    assert "were there" in out
    assert convert(hf, tmp_path / "direct", "--model-parallel", 4)[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "direct")


def test_abandoned_conversion_gives_way(
    hf: Path, tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partial files of another plan are replaced; the result is the usual one."""
    monkeypatch.setattr(conversion, "_last_file", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(hf, tmp_path / "out", "--model-parallel", 4)
    monkeypatch.undo()
    assert list((tmp_path / "out").glob("*.partial"))
    assert not looks_whole(tmp_path / "out")
    assert convert(hf, tmp_path / "out", "--model-parallel", 2)[0] == 0
    assert convert(hf, tmp_path / "direct", "--model-parallel", 2)[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "direct")


SLOW = """
import os, runpy, sys, time
from dsv3.checkpoint import journal, writer
put = writer.TensorWriter.put
writer.TensorWriter.put = lambda *args: (time.sleep(0.004), put(*args))
journal.COMMIT_BYTES = 50_000
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as Python does for a program
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def finished_tensors(folder: Path) -> int:
    """Lines of the journal: tensors that a next run need not copy again."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / JOURNAL).read_bytes().count(b"\n")
    return 0


@pytest.mark.slow
def test_killed_twenty_times(hf: Path, tmp_path: Path, convert: Convert) -> None:
    """kill -9 at random moments, then the same command again: the same bytes, whenever."""
    assert convert(hf, tmp_path / "direct", "--model-parallel", 4)[0] == 0
    want = contents(tmp_path / "direct")
    rng = random.Random(0)
    resumed = 0
    target = tmp_path / "out"
    command = [sys.executable, "-c", SLOW, cli.__file__, "--hf-ckpt-path", str(hf)]
    command += ["--save-path", str(target), "--model-parallel", "4"]
    for _ in range(20):
        # Progress, not the clock, sets the moment: a fast machine must not be done before it.
        moment = finished_tensors(target) + rng.randint(1, 20)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and finished_tensors(target) < moment:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err
        if (target / "manifest.json").exists():
            resumed += b"were there" in out
            assert subprocess.run(command, check=False).returncode == 0
            assert contents(target) == want
            shutil.rmtree(target)
        elif target.exists():
            assert not looks_whole(target)
    done = subprocess.run(command, check=True, capture_output=True)
    assert contents(target) == want
    assert resumed or b"were there" in done.stdout


MEMORY = """
import os, runpy, sys
from pathlib import Path
os.pwrite = lambda descriptor, data, offset: len(data)
sys.argv = sys.argv[1:]
try:
    sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as Python does for a program
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert "torch" not in sys.modules
    status = Path("/proc/self/status").read_text()
    print("peak KiB", status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """One sparse source file of over 5 GB, read whole (writes are left out); no torch."""
    config = dataclasses.replace(
        TINY, hidden_size=4096, intermediate_size=142_000, moe_intermediate_size=8192
    )
    hf = write_sparse(tmp_path / "hf", config)
    assert (hf / "model.safetensors").stat().st_size > 5e9
    script = [str(cli.__file__), "--hf-ckpt-path", str(hf), "--save-path", str(tmp_path / "out")]
    command = [sys.executable, "-c", MEMORY, *script, "--model-parallel", "8", "--workers", "4"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout.split()[-1]) < 128 << 10

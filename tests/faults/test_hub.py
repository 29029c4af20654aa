"""The programs with a name on the hub in place of a directory."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv3.config_files import DEMO
from tests.forked import run_forked
from tests.hub_server import Hub
from tests.programs import ALONE, GENERATE, ROOT, environment, our_lines, run

CONVERT = str(ROOT / "launch" / "convert.py")
ASK = ["--prompt", "2+2=", "--max-new-tokens", "4"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the demo model, for all programs."""
    with Hub(folders={"demo/V3": DEMO}).serving() as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield hub


def test_two_ranks(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """One downloads, both load; later no network is needed."""
    command = [GENERATE, "--device", "cpu", "--ckpt-path", "demo/V3", *ASK]
    first = run_forked(command, num_ranks=2)
    assert first.returncode == 0, first.stderr
    sizes = {file.name: file.stat().st_size for file in DEMO.glob("*.safetensors")}
    assert {name: hub.sent[name] for name in sizes} == sizes
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(hub.asked)
    second = run_forked(command, num_ranks=2)
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert "HF_HUB_OFFLINE is set, so the hub is not asked; using the copy in" in second.stderr
    assert len(hub.asked) == asked


def test_a_killed_download_goes_on(hub: Hub, tmp_path: Path) -> None:
    """Each file is asked for from where the killed run has left it."""
    hub.seconds = 0.05
    command = [CONVERT, "--hf-ckpt-path", "demo/V3", "--verify"]
    process = subprocess.Popen(
        [*ALONE, *command], env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL
    )

    def left() -> list[int]:
        blobs = (tmp_path / "home/hub/models--demo--V3/blobs").glob("*.incomplete")
        return sorted(file.stat().st_size for file in blobs)

    until = time.monotonic() + 60
    while (len(left()) < 2 or not left()[0]) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    sizes = left()
    assert len(sizes) == 2 and sizes[0] > 0
    hub.seconds = 0.0
    done = run_forked(command)
    assert done.returncode == 0 and "verified: " in done.stdout, done.stderr
    begins = [begin for name, begin in hub.begins.items() if name.endswith(".safetensors")]
    assert sorted(begins) == sizes


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_wrong_name_is_one_line(hub: Hub, ranks: int) -> None:
    command = [GENERATE, "--device", "cpu", "--ckpt-path", "demo/none", *ASK]
    done = run_forked(command, num_ranks=ranks)
    lines = [line for line in our_lines(done.stderr) if line.startswith("error:")]
    assert lines == [
        f"error: demo/none: no such directory here, and {hub.url} has no repository of this name; "
        "if it is a private one, set HF_TOKEN to a token that may read it"
    ]
    assert done.returncode == 2
    assert "Traceback" not in "".join(our_lines(done.stderr))


def test_convert(hub: Hub, tmp_path: Path) -> None:
    command = [CONVERT, "--hf-ckpt-path", "demo/V3", "--tp", "2", "--save-path"]
    out = str(tmp_path / "out")
    done = run_forked([*command, out])
    assert done.returncode == 0 and "demo/V3: downloading 13." in done.stderr, done.stderr
    same = [CONVERT, "--hf-ckpt-path", str(DEMO), "--tp", "2", "--save-path", out]
    verified = run_forked([*same, "--verify"])
    assert verified.returncode == 0 and "bit for bit" in verified.stdout, verified.stderr
    inside = tmp_path / "home" / "hub" / "models--demo--V3" / "out"
    refused = run_forked([*command, str(inside)])
    assert refused.returncode == 2 and "in the cache of the hub" in refused.stderr
    wrong = run_forked([CONVERT, "--hf-ckpt-path", "demo/none", "--verify"])
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert "has no repository of this name" in wrong.stderr


def test_verify(hub: Hub, tmp_path: Path) -> None:
    """A snapshot's blobs are named by their digests."""
    command = [CONVERT, "--hf-ckpt-path", "demo/V3", "--verify"]
    done = run_forked(command)
    assert done.returncode == 0 and "matches the digests of the hub" in done.stdout, done.stderr
    file = max((tmp_path / "home/hub/models--demo--V3/blobs").iterdir(), key=os.path.getsize)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = run_forked(command)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "does not match its digest on the hub; remove " in done.stderr


def test_the_library_and_the_scripts(hub: Hub, tmp_path: Path) -> None:
    code = "from dsv3 import LLM\nwith LLM('demo/V3', device='cpu') as llm:\n"
    code += "    print(llm.generate(['2+2='])[0].text)"
    done = run([*ALONE, "-c", code])
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    plan = [str(ROOT / "launch" / "bench.py"), "plan", "--ckpt-path", "demo/V3"]
    planned = run_forked([*plan, "--hardware", "h200x8"])
    assert planned.returncode == 0, planned.stderr


@pytest.mark.parametrize("path", ["./demo/V3", "demo/V3/x", "~/V3", "/demo/V3", "V3"])
def test_misspelled_paths_do_not_go_to_the_hub(hub: Hub, path: str) -> None:
    done = run_forked([CONVERT, "--hf-ckpt-path", path, "--verify"])
    written = path.removeprefix("./")
    assert (done.returncode, done.stderr) == (2, f"error: {written}: no such directory\n")
    assert not hub.asked


def test_no_hub_at_all(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    done = run_forked([CONVERT, "--hf-ckpt-path", "demo/V3", "--verify"])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no such directory here, and the hub (http://127.0.0.1:1) cannot be reached" in (
        done.stderr
    )


def test_interrupted(hub: Hub) -> None:
    """Ctrl-C ends a download at once."""
    hub.seconds = 1.0
    command = [sys.executable, CONVERT, "--hf-ckpt-path", "demo/V3", "--verify"]
    process = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not any(name.endswith(".safetensors") for name in hub.sent) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)  # all of it would take minutes
    assert (
        process.returncode == 130
        and "run it again to resume" in stderr
        and "Traceback" not in stderr
    )

"""scripts/sensitivity.py: the same losses on any number of ranks, and after a kill."""

import importlib.util
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3.checkpoint.mixed import KINDS, sites
from tests.checkpoint_files import TINY, random_tensors, write_hf
from tests.programs import ALONE, ROOT, environment, run, torchrun

SCRIPT = str(ROOT / "scripts" / "sensitivity.py")


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("sensitivity")
    path = write_hf(folder / "hf", TINY, random_tensors(TINY))
    (path / "tokenizer.json").unlink()
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, 60)
    np.savez(folder / "texts.npz", tokens=tokens.astype(np.int32), offsets=np.array([0, 25]))
    return ["--ckpt-path", str(path), "--tokens", str(folder / "texts.npz"), "--max-seq-len", "64"]


def losses(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())["sensitivity"]
    return found


def test_losses_do_not_depend_on_ranks_and_kills(flags: list[str], tmp_path: Path) -> None:
    whole, two, resumed = (tmp_path / f"{name}.json" for name in ("whole", "two", "resumed"))
    done = run([*ALONE, SCRIPT, *flags, "--json", str(whole)])
    assert done.returncode == 0, done.stderr
    want = losses(whole)
    assert set(want) == {site for site, specs in sites(TINY).items() if not specs[0].mtp}
    assert all(set(kinds) == set(KINDS) for kinds in want.values())
    assert all(kinds["int8"] < kinds["int4-32"] for kinds in want.values())

    done = run([*torchrun(2), SCRIPT, *flags, "--json", str(two)])
    assert done.returncode == 0, done.stderr
    for site, kinds in losses(two).items():
        assert kinds == pytest.approx(want[site], rel=0.05, abs=1e-6), site

    command = [*ALONE, SCRIPT, *flags, "--json", str(resumed)]
    program = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not resumed.exists() and program.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    program.kill()
    program.wait()
    data = json.loads(resumed.read_text())
    first = next(iter(want))
    data["sensitivity"].setdefault(first, {})["int8"] = 7.0  # a resumed run does not measure it
    resumed.write_text(json.dumps(data))
    done = run(command)
    assert done.returncode == 0, done.stderr
    got = losses(resumed)
    assert got[first].pop("int8") == 7.0
    want[first].pop("int8")
    assert got == want


def test_a_file_of_other_flags_is_refused(flags: list[str], tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"sensitivity": {}, "model": "another", "texts": [25, 35]}))
    done = run([*ALONE, SCRIPT, *flags, "--json", str(file)])
    assert done.returncode != 0
    assert "measured with another model or other flags; remove it" in done.stderr
    assert "Traceback" not in done.stderr


def test_heat_map(flags: list[str], tmp_path: Path) -> None:
    plot = tmp_path / "s.png"
    done = run([*ALONE, SCRIPT, *flags, "--json", str(tmp_path / "s.json"), "--plot", str(plot)])
    if importlib.util.find_spec("matplotlib") is None:
        assert done.returncode != 0 and "--plot needs matplotlib" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert plot.read_bytes().startswith(b"\x89PNG")

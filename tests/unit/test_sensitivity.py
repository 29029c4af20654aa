"""`sensitivity.py`: results that resume and do not depend on the layout; flags; the heat map."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv3.checkpoint.mixed import KINDS, sites
from dsv3.config import ModelConfig, ParallelConfig
from dsv3.config_files import DEMO
from dsv3.distributed.collectives import SingleRank
from dsv3.distributed.mesh import Mesh
from dsv3.errors import ConfigError
from scripts import sensitivity
from tests.checkpoint_files import TINY, random_tensors, write_hf
from tests.forked import run_forked
from tests.programs import ALONE, ROOT, environment

SCRIPT = str(ROOT / "scripts" / "sensitivity.py")
SITES = ("0 self_attn.o_proj", "1 mlp.experts.down_proj")
RUN = ("--kv-cache-size", "512tok", "--longest", "24", "--most", "48")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    tokens = np.random.default_rng(5).integers(3, 2000, 60).astype(np.uint16)
    np.savez(tmp_path / "texts.npz", tokens=tokens, offsets=np.array([0, 1, 31]))
    return tmp_path / "texts.npz"


@pytest.fixture
def two_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    all_sites = sensitivity.sites

    def some(config: ModelConfig) -> dict[str, Any]:
        found = all_sites(config)
        return {site: found[site] for site in SITES}

    monkeypatch.setattr(sensitivity, "sites", some)


def flags(texts: Path, file: Path, *more: str) -> list[str]:
    return ["--ckpt-path", str(DEMO), "--tokens", str(texts), "--json", str(file), *RUN, *more]


def measure(monkeypatch: pytest.MonkeyPatch, given: list[str]) -> dict[str, Any]:
    """Run the script in this process; return its results."""
    monkeypatch.setattr(sys, "argv", ["sensitivity.py", *given])
    alone = SingleRank()
    mesh = Mesh(ParallelConfig(), torch.device("cpu"), alone, alone, alone, 1)
    args = sensitivity.parse_args()
    assert sensitivity.run(args, mesh) == 0
    results: dict[str, Any] = json.loads(args.json.read_text())
    return results


@pytest.mark.usefixtures("two_sites")
def test_a_run_that_was_ended_goes_on(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(monkeypatch, flags(texts, tmp_path / "whole.json"))
    assert set(whole["sensitivity"]) == set(SITES)
    for losses in whole["sensitivity"].values():
        assert 0 <= losses["int8"] < losses["int4-32"] <= losses["int4-128"] < 10
    write = sensitivity.write_output
    num_written = 0

    def ended(*given: Any) -> None:
        nonlocal num_written
        write(*given)
        num_written += 1
        if num_written == 4:
            raise KeyboardInterrupt

    part = tmp_path / "part.json"
    monkeypatch.setattr(sensitivity, "write_output", ended)
    with pytest.raises(KeyboardInterrupt):
        measure(monkeypatch, flags(texts, part))
    assert len(json.loads(part.read_text())["sensitivity"][SITES[1]]) == 1
    assert measure(monkeypatch, flags(texts, part)) == whole
    assert part.read_bytes() == (tmp_path / "whole.json").read_bytes()
    with pytest.raises(ConfigError, match=r"part\.json: measured with another model or other"):
        measure(monkeypatch, flags(texts, part, "--longest", "20"))


@pytest.mark.usefixtures("two_sites")
def test_the_weights_are_restored(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site measured last has the loss it has when it is measured alone."""
    whole = measure(monkeypatch, flags(texts, tmp_path / "whole.json"))
    rest = tmp_path / "rest.json"
    del whole["sensitivity"][SITES[1]]["int8"]
    rest.write_text(json.dumps(whole))
    alone = measure(monkeypatch, flags(texts, rest))
    assert alone == json.loads((tmp_path / "whole.json").read_text())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("sensitivity")
    path = write_hf(folder / "hf", TINY, random_tensors(TINY))
    (path / "tokenizer.json").unlink()
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, 60)
    np.savez(folder / "texts.npz", tokens=tokens.astype(np.int32), offsets=np.array([0, 25]))
    return ["--ckpt-path", str(path), "--tokens", str(folder / "texts.npz"), "--max-seq-len", "64"]


def losses(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())["sensitivity"]
    return found


def test_losses_do_not_depend_on_ranks_and_kills(tiny: list[str], tmp_path: Path) -> None:
    whole, two, resumed = (tmp_path / f"{name}.json" for name in ("whole", "two", "resumed"))
    logs = tmp_path / "logs"
    done = run_forked([SCRIPT, *tiny, "--json", str(whole)])
    assert done.returncode == 0, done.stderr
    want = losses(whole)
    assert set(want) == {site for site, specs in sites(TINY).items() if not specs[0].mtp}
    assert all(set(kinds) == set(KINDS) for kinds in want.values())
    assert all(kinds["int8"] < kinds["int4-32"] for kinds in want.values())

    command = [SCRIPT, *tiny, "--json", str(two), "--log-dir", str(logs)]
    done = run_forked(command, num_ranks=2)
    assert done.returncode == 0, done.stderr
    assert len(list(logs.iterdir())) == 2
    for site, kinds in losses(two).items():
        assert kinds == pytest.approx(want[site], rel=0.05, abs=1e-6), site

    command = [SCRIPT, *tiny, "--json", str(resumed)]
    program = subprocess.Popen(
        [*ALONE, *command], env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not resumed.exists() and program.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    program.kill()
    program.wait()
    data = json.loads(resumed.read_text())
    first = next(iter(want))
    data["sensitivity"].setdefault(first, {})["int8"] = 7.0  # a resumed run does not measure it
    resumed.write_text(json.dumps(data))
    done = run_forked(command)
    assert done.returncode == 0, done.stderr
    got = losses(resumed)
    assert got[first].pop("int8") == 7.0
    want[first].pop("int8")
    assert got == want


def no_change(path: Path) -> None:
    """Leave the file of results absent."""


def negative(path: Path) -> None:
    path.write_text(json.dumps({"sensitivity": {SITES[0]: {"int8": -1}}}))


def other(path: Path) -> None:
    path.write_text("a text")


@pytest.mark.parametrize(
    ("more", "prepare", "words"),
    [
        (("--dp", "2"), no_change, "--dp=2: the output is measured in one group"),
        (("--profile",), no_change, "unrecognized arguments: --profile"),
        (("--longest", "1"), no_change, "--longest=1 must be at least 2"),
        (("--most", "0"), no_change, "--most=0 must be at least 2"),
        (("--n-experts", "7"), no_change, "7"),
        (("--config", "absent.json"), no_change, "absent.json"),
        (("--dtype", "fp8"), no_change, "is stored in torch.float8_e4m3fn; .*give --weights auto"),
        (
            ("--weights", "fp8"),
            no_change,
            "is stored in torch.float8_e4m3fn; .*give --weights auto",
        ),
        ((), other, "--json="),
        ((), negative, "measured with another model"),
    ],
)
def test_flags_that_are_refused(
    more: tuple[str, ...],
    prepare: Callable[[Path], None],
    words: str,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare(tmp_path / "out.json")
    with pytest.raises(ConfigError, match=words) as caught:
        measure(monkeypatch, flags(texts, tmp_path / "out.json", *more))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-1, "1", None])
def test_wrong_losses_in_the_file(
    value: object, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.json"
    monkeypatch.setattr(sensitivity, "sites", lambda config: {})
    file.write_text('{"sensitivity": {}}')
    monkeypatch.setattr(sensitivity, "identify", lambda *args: "a model")
    monkeypatch.setattr(sensitivity, "digests", lambda texts: [])
    data = {"sensitivity": {SITES[0]: {"int8": value}}, "model": "a model", "texts": []}
    file.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"out\.json: sensitivity: 0 self_attn.o_proj: int8="):
        measure(monkeypatch, flags(texts, file))


@pytest.mark.usefixtures("two_sites")
@pytest.mark.parametrize("form", ["png", "svg"])
def test_the_heat_map(
    form: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / f"map.{form}"
    for _ in range(2):  # the second run measures nothing and replaces its own picture
        measure(monkeypatch, flags(texts, tmp_path / "out.json", "--plot", str(plot)))
        begin = plot.read_bytes()[:100]
        assert begin.startswith(b"\x89PNG" if form == "png" else b"<?xml")

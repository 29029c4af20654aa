"""convert.py --overwrite, killed or stopped: the old checkpoint stays, or the command goes on."""

import itertools
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint import convert as conversion
from dsv3.checkpoint.directory import SINGLE
from dsv3.checkpoint.journal import JOURNAL
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.source import open_source
from dsv3.config import ParallelConfig
from tests.checkpoint_files import random_tensors, write_hf
from tests.faults.converting import (
    CONFIG,
    Convert,
    contents,
    everything,
    looks_whole,
    old_hugging_face,
    old_single_file,
)
from tests.unit.test_source import EVEN, write_deepseek


class Killer:
    """Kills the process at one of the calls that change something on a disk."""

    calls = ("unlink", "replace", "open", "fsync", "fdatasync", "ftruncate", "mkdir")

    def __init__(self, moment: int) -> None:
        self.left = moment
        for name in self.calls:
            setattr(os, name, self.counting(getattr(os, name)))

    def counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **more: Any) -> Any:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **more)

        return counted


def killed_at(moment: int, run: Callable[[], object]) -> bool:
    """Run something in a process of its own; return True if it was killed at that moment."""
    child = os.fork()
    if not child:
        code = 1
        try:
            Killer(moment)
            run()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or not os.waitstatus_to_exitcode(status)
    return os.WIFSIGNALED(status)


def write_old(kind: str, folder: Path, convert: Convert, hf: Path) -> None:
    """Write the checkpoint that will be replaced."""
    match kind:
        case "rank files":
            assert convert(hf, folder, "--model-parallel", 2)[0] == 0
        case "hugging face":
            old_hugging_face(folder)
        case "single file":
            old_single_file(folder)
        case "deepseek":
            write_deepseek(folder, random_tensors(EVEN, seed=5), 2)
            shutil.copy(hf / "tokenizer.json", folder)


TO_RANKS = ("--model-parallel", "2")
TO_HF = ("--to", "hf")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "flags", "first"),
    [
        ("rank files", TO_RANKS, 1),
        ("hugging face", TO_HF, 1),
        ("single file", TO_HF, 2),
        ("deepseek", TO_RANKS, 2),
    ],
)
def test_a_kill_at_any_moment_leaves_the_old_checkpoint_or_goes_on(
    old: str,
    flags: tuple[str, ...],
    first: int,
    hf: Path,
    out: Path,
    tmp_path: Path,
    convert: Convert,
) -> None:
    """Every second moment: of two old checkpoints the odd ones, of two the even ones."""
    (hf / "encoding").mkdir()
    (hf / "encoding" / "encode.py").write_text("print()")
    new = write_hf(tmp_path / "new", CONFIG, random_tensors(CONFIG, seed=9))
    (new / "tokenizer.json").write_text('{"other": 1}')
    assert convert(new, tmp_path / "direct", *flags)[0] == 0
    want = everything(tmp_path / "direct")
    write_old(old, tmp_path / "old", convert, hf)
    before = everything(tmp_path / "old")
    kept = {name: data for name, data in before.items() if name.startswith("encoding")}
    kills = wholes = 0
    for moment in itertools.count(first, 2):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)
        overwrite = [*flags, "--overwrite", "--workers", 1]
        run = partial(convert, new, out, *overwrite)
        if not killed_at(moment, run):
            break
        kills += 1
        if kills % 2:
            killed_at(1 + moment % 11, run)  # while it is being mended
        is_old = everything(out).items() >= before.items()
        is_new = everything(out).items() >= want.items()
        wholes += is_old
        assert is_old or is_new or not looks_whole(out), moment
        # Once the old one is broken, the command works without --overwrite, too.
        verify = [*flags, "--verify"]
        if is_old or kills % 2:
            verify.append("--overwrite")
        code, _, err = convert(new, out, *verify)
        assert (code, err) == (0, ""), moment
        assert everything(out) == want | kept, moment
    assert kills > 15
    assert 0 < wholes < kills
    assert everything(out) == want | kept


def test_another_plan_after_a_kill_while_names_are_given(
    hf: Path, out: Path, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complete files that lack only their names are not thrown away unasked."""
    old_single_file(out)
    monkeypatch.setattr(conversion, "_put_in_place", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(hf, out, "--model-parallel", 2, "--overwrite")
    monkeypatch.undo()
    (out / SINGLE).unlink()  # the first that goes
    code, _, err = convert(hf, out, "--model-parallel", 4)
    assert (code, err.count("\n")) == (2, 1)
    assert "another conversion was stopped while its files got their names" in err
    assert convert(hf, out, "--model-parallel", 4, "--overwrite", "--verify")[0] == 0
    assert convert(hf, tmp_path / "direct", "--model-parallel", 4)[0] == 0
    assert contents(out) == contents(tmp_path / "direct")


def test_an_unfinished_overwriting_leaves_the_old_checkpoint_in_use(
    hf: Path, out: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old checkpoint verifies as before; only leftovers of the same conversion go."""
    assert convert(hf, out, "--model-parallel", 2)[0] == 0
    first = contents(out)
    monkeypatch.setattr(conversion, "_last_file", lambda *args: 1 / 0)
    for ranks in (4, 2):
        with pytest.raises(ZeroDivisionError):
            convert(hf, out, "--model-parallel", ranks, "--overwrite")
        assert contents(out).items() > first.items()
        assert convert(out, None, "--verify")[0] == 0
        assert "bit for bit" in convert(hf, out, "--model-parallel", 2)[1]
        assert (contents(out) == first) == (ranks == 2)


@pytest.mark.parametrize(
    "lines",
    [
        ['{"plan": "x", "names": ["../hf/config.json", "/x"], "replaces": ["../hf/config.json"]}'],
        ['{"plan": ', "\0\0"],
        ['{"plan": "PLAN", "names": []}', '["nothing", ["1"]]', '{"written": true}'],
        ['{"plan": "PLAN", "names": 3}'],
        ['{"plan": "PLAN", "names": ["a"]}', '["model.norm.weight", []]', "[[[["],
    ],
    ids=range(5),
)
def test_a_damaged_journal(lines: list[str], hf: Path, out: Path, convert: Convert) -> None:
    """Only the work in the journal is lost."""
    with open_source(hf) as source:
        plan = make_plan(source, ParallelConfig(world_size=2)).id
    (hf / "config.json.partial").write_text("mine")
    before = contents(hf)
    out.mkdir()
    (out / JOURNAL).write_text("\n".join(lines).replace("PLAN", plan) + "\n")
    code, _, err = convert(hf, out, "--model-parallel", 2, "--verify")
    assert (code, err) == (0, "")
    assert contents(hf) == before
    assert not (out / JOURNAL).exists()

"""convert.py --overwrite: the old checkpoint goes only when the new one is complete."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint import convert as conversion
from dsv3.checkpoint.journal import JOURNAL, ConversionJournal
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.source import open_source
from dsv3.config import ParallelConfig
from dsv3.config_files import hf_config_dict
from dsv3.errors import CheckpointError
from tests.checkpoint_files import random_tensors, write_file, write_hf
from tests.faults.converting import CONFIG, Convert, contents, looks_whole
from tests.unit.test_source import EVEN, write_deepseek

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def everything(folder: Path) -> dict[str, bytes]:
    """All files below a directory."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


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


def old_rank_files(folder: Path, convert: Convert, hf: Path) -> None:
    assert convert(hf, folder, "--model-parallel", 2)[0] == 0


def old_hugging_face(folder: Path, convert: Convert, hf: Path) -> None:
    write_hf(folder, CONFIG, random_tensors(CONFIG, seed=5), files=2)


def old_single_file(folder: Path, convert: Convert, hf: Path) -> None:
    write_hf(folder, CONFIG, random_tensors(CONFIG, seed=5), files=1)
    (folder / INDEX).unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / SINGLE)


def old_deepseek(folder: Path, convert: Convert, hf: Path) -> None:
    write_deepseek(folder, random_tensors(EVEN, seed=5), 2)
    shutil.copy(hf / "tokenizer.json", folder)


TO_RANKS, TO_HF = ("--model-parallel", "2"), ("--to", "hf")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "flags"),
    [
        (old_rank_files, TO_RANKS),
        (old_hugging_face, TO_HF),
        (old_single_file, TO_HF),
        (old_deepseek, TO_RANKS),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_kill_at_any_moment_leaves_the_old_checkpoint_or_goes_on(
    old: Callable[[Path, Convert, Path], None],
    flags: tuple[str, ...],
    hf: Path,
    out: Path,
    tmp_path: Path,
    convert: Convert,
) -> None:
    (hf / "encoding").mkdir()
    (hf / "encoding" / "encode.py").write_text("print()")
    new = write_hf(tmp_path / "new", CONFIG, random_tensors(CONFIG, seed=9))
    (new / "tokenizer.json").write_text('{"other": 1}')
    assert convert(new, tmp_path / "direct", *flags)[0] == 0
    want = everything(tmp_path / "direct")
    old(tmp_path / "old", convert, hf)
    before = everything(tmp_path / "old")
    kept = {name: data for name, data in before.items() if name.startswith("encoding")}
    moment = kills = wholes = 0
    while True:
        moment += 1
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)
        run = partial(convert, new, out, *flags, "--overwrite", "--workers", 1)
        if not killed_at(moment, run):
            break
        kills += 1
        if moment % 2:
            killed_at(1 + moment % 11, run)  # while it is being mended
        is_old = everything(out).items() >= before.items()
        is_new = everything(out).items() >= want.items()
        wholes += is_old
        assert is_old or is_new or not looks_whole(out), moment
        # Once the old one is broken, the command works without --overwrite, too.
        more = ["--overwrite"] if is_old or moment % 2 else []
        code, _, err = convert(new, out, *flags, *more, "--verify")
        assert (code, err) == (0, ""), moment
        assert everything(out) == want | kept, moment
    assert kills > 30
    assert 0 < wholes < kills
    assert everything(out) == want | kept


def test_another_plan_after_a_kill_while_names_are_given(
    hf: Path, out: Path, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complete files that lack only their names are not thrown away unasked."""
    old_single_file(out, convert, hf)
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
    """It verifies as before; only leftovers of the same conversion are removed."""
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


def test_a_second_conversion_is_refused_with_any_flags(
    hf: Path, out: Path, convert: Convert
) -> None:
    assert convert(hf, out, "--model-parallel", 2)[0] == 0
    with ConversionJournal(out) as journal:
        journal.begin("another", ["x.safetensors"], [])
        before = contents(out)
        for flags in (["--overwrite"], [], ["--overwrite", "--verify"]):
            code, _, err = convert(hf, out, "--model-parallel", 2, *flags)
            assert (code, err) == (2, f"error: {out}: another conversion is writing here\n")
        assert contents(out) == before


def test_the_disk_must_hold_both(
    hf: Path, out: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_single_file(out, convert, hf)
    before = contents(out)
    usage = shutil.disk_usage(out)._replace(free=6_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for flags in ([], ["--dry-run"]):
        code, _, err = convert(hf, out, "--model-parallel", 2, "--overwrite", *flags)
        assert (code, err.count("\n")) == (2, 1)
        assert "needed, the disk has 6 MB free; the checkpoint that is there, " in err
        assert "choose another disk, or remove it by hand" in err
    assert contents(out) == before


def test_a_dry_run_lists_replaced_files(hf: Path, out: Path, convert: Convert) -> None:
    old_single_file(out, convert, hf)
    (out / "tokenizer.json").write_text("other")
    (out / "README.md").write_text("mine")
    (hf / "README.md").write_text("theirs")
    before = contents(out)
    code, text, _ = convert(hf, out, "--to", "hf", "--overwrite", "--verify", "--dry-run")
    assert code == 0
    assert f"replaced in {out}: {SINGLE}, tokenizer.json" in text
    assert f"kept in {out}: README.md" in text
    assert "every byte is read back" in text
    assert contents(out) == before
    shutil.rmtree(out)
    assert convert(hf, out, "--to", "hf")[0] == 0
    assert "complete already" in convert(hf, out, "--to", "hf", "--dry-run")[1]
    for flags in (["--model-parallel", 2], ["--to", "bf16"]):  # refused without --dry-run, too
        code, text, err = convert(hf, out, *flags, "--dry-run")
        assert code == 2 and "give --overwrite to replace it" in err and "done:" not in text


def link_whole_folder(model: Path, edited: Path) -> Path:
    """The source is a directory of links into the target."""
    edited.mkdir()
    for file in model.iterdir():
        (edited / file.name).symlink_to(file)
    (edited / "config.json").unlink()
    shutil.copy(model / "config.json", edited)
    return model


def link_hard(model: Path, edited: Path) -> Path:
    shutil.copytree(model, edited, copy_function=os.link)
    return model


def link_one_file(model: Path, edited: Path) -> Path:
    """One file of the source lies in the target."""
    shutil.copytree(model, edited)
    target = model.with_name("target")
    old_single_file(target, None, model)  # type: ignore[arg-type]
    name = "model-00002-of-00003.safetensors"
    (edited / name).rename(target / name)
    (edited / name).symlink_to(target / name)
    return target


def link_back(model: Path, edited: Path) -> Path:
    """The target is a directory of links into the source."""
    shutil.copytree(model, edited)
    target = model.with_name("target")
    target.mkdir()
    for file in edited.iterdir():
        (target / file.name).symlink_to(file)
    return target


def same_folder(model: Path, edited: Path) -> Path:
    edited.symlink_to(model)
    return model


def folder_of_source(model: Path, edited: Path) -> Path:
    shutil.copytree(model, edited)
    (edited / "encoding").mkdir()
    (edited / "encoding" / "encode.py").write_text("print()")
    return edited / "encoding"


@pytest.mark.parametrize(
    "tie",
    [link_whole_folder, link_hard, link_one_file, link_back, same_folder, folder_of_source],
    ids=lambda tie: tie.__name__,
)
def test_files_of_the_source_are_never_touched(
    tie: Callable[[Path, Path], Path], hf: Path, tmp_path: Path, convert: Convert
) -> None:
    target = tie(hf, tmp_path / "edited")
    before = everything(tmp_path)
    for flags in (["--to", "hf"], ["--model-parallel", 2], ["--to", "bf16"]):
        code, _, err = convert(tmp_path / "edited", target, *flags, "--overwrite")
        assert code == 2
        assert err.splitlines()[-1].count("error: ") == 1
        assert everything(tmp_path) == before
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob(JOURNAL))


def test_a_target_inside_the_source(hf: Path, convert: Convert) -> None:
    """Only files of the directory itself are copied, so this common case is harmless."""
    before = contents(hf)
    assert convert(hf, hf / "mp2", "--model-parallel", 2, "--verify")[0] == 0
    assert convert(hf, hf / "mp2", "--model-parallel", 2, "--overwrite", "--verify")[0] == 0
    shutil.rmtree(hf / "mp2")
    assert contents(hf) == before


def test_no_side_file_is_written_into_the_source(
    hf: Path, tmp_path: Path, convert: Convert
) -> None:
    """The source has the name of a directory of side files in the target."""
    source = hf.rename(tmp_path / "encoding")
    (source / "encoding").mkdir()
    (source / "encoding" / "encode.py").write_text("print()")
    code, _, err = convert(source, tmp_path, "--to", "hf")
    assert (code, f"{source}: is {source}, which is read" in err) == (2, True)
    assert not (source / "encode.py").exists()


def test_a_file_that_cannot_be_replaced_is_named(
    hf: Path, out: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is mounted, or immutable."""
    old_single_file(out, convert, hf)
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == SINGLE:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        code, _, err = convert(hf, out, "--model-parallel", 2, "--overwrite")
    assert code == 2
    assert err.startswith(f"error: {out / SINGLE}: cannot be replaced (the new files are complete")
    assert convert(hf, out, "--model-parallel", 2, "--overwrite")[0] == 0
    assert convert(hf, out, "--model-parallel", 2, "--verify")[0] == 0


@pytest.mark.parametrize(
    ("call", "name"),
    [("write", JOURNAL), ("fsync", JOURNAL), ("fdatasync", "model0-mp2.safetensors.partial")],
)
def test_the_disk_becomes_full(
    call: str,
    name: str,
    hf: Path,
    out: Path,
    convert: Convert,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old_single_file(out, convert, hf)
    before = contents(out)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        code, _, err = convert(hf, out, "--model-parallel", 2, "--overwrite")
    line = f"error: {out / name}: cannot be written: No space left on device\n"
    assert (code, err.splitlines(keepends=True)[-1]) == (2, line)
    assert before.items() <= contents(out).items()
    assert convert(hf, out, "--model-parallel", 2, "--overwrite", "--verify")[0] == 0


def test_a_target_that_is_a_link_to_a_directory(
    hf: Path, out: Path, tmp_path: Path, convert: Convert
) -> None:
    (tmp_path / "disk").mkdir()
    out.symlink_to(tmp_path / "disk")
    assert convert(hf, out, "--model-parallel", 2, "--verify")[0] == 0
    assert convert(hf, out, "--model-parallel", 4, "--overwrite", "--verify")[0] == 0
    assert out.is_symlink()
    out.unlink()
    out.symlink_to(tmp_path / "none")
    code, _, err = convert(hf, out, "--model-parallel", 2)
    assert code == 2 and "a link to a directory that is not there" in err
    out.unlink()
    out.write_text("a file")
    for path, reason in ((out, "not a directory"), (out / "below", "cannot be made")):
        code, _, err = convert(hf, path, "--model-parallel", 2)
        assert code == 2 and f"{path}: {reason}" in err


OWN = ["README.md", "config.json", "tokenizer.json", "manifest.json", INDEX, SINGLE]
OWN += ["model0-mp2.safetensors", "model0-mp2.safetensors.partial", "README.md.partial", JOURNAL]
OWN += ["config.json.partial", "manifest.json.partial"]


@pytest.mark.parametrize("name", OWN)
def test_a_users_file_is_neither_replaced_nor_removed(
    name: str, hf: Path, out: Path, convert: Convert
) -> None:
    (hf / "README.md").write_text("the source's")
    out.mkdir()
    (out / name).write_text("mine")
    for flags in ([], ["--overwrite"]):
        code, text, err = convert(hf, out, "--model-parallel", 2, *flags)
        if name == "README.md" and flags:
            assert (code, (out / name).read_text()) == (0, "mine")
            assert f"kept in {out}, other than in the source: README.md" in text
            return
        assert (code, err.count("\n")) == (2, 1)
        assert name.removesuffix(".partial") in err
        assert contents(out) == {name: b"mine"}


def test_the_config_that_is_read_is_not_replaced(tmp_path: Path, convert: Convert) -> None:
    theirs = write_deepseek(tmp_path / "theirs", random_tensors(EVEN), 2)
    out = write_hf(tmp_path / "out", EVEN, random_tensors(EVEN, seed=1))
    config = out / "config.json"
    config.write_text(json.dumps({"transformers_version": "5"} | hf_config_dict(EVEN)))
    before = contents(out)
    flags = ("--model-parallel", 2, "--overwrite", "--config", config)
    code, _, err = convert(theirs, out, *flags)
    assert code == 2 and f"{config}: the same file as {config}, which is read" in err
    code, _, err = convert(theirs, out, *flags[:-1], out)
    assert code == 2 and f"{config}: the same file as {config}, which is read" in err
    assert contents(out) == before


@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=str)
@pytest.mark.parametrize("name", OWN)
def test_nothing_is_written_through_a_link(
    name: str, flags: list[str], hf: Path, out: Path, tmp_path: Path, convert: Convert
) -> None:
    (hf / "README.md").write_text("the source's")
    for wanted, target in (("mine", tmp_path / "mine"), (None, tmp_path / "none")):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / name).symlink_to(target)
        if wanted:
            target.write_text(wanted)
        code, _, _ = convert(hf, out, "--model-parallel", 2, *flags)
        assert code == (0 if name == "README.md" and flags else 2)
        assert (out / name).is_symlink()
        assert (target.read_text() if wanted else target.exists()) == (wanted or False)


@pytest.mark.parametrize(
    "name", ["config.json", INDEX, "manifest.json", SINGLE, JOURNAL, "encoding"]
)
def test_pipes_and_directories_in_the_way(name: str, hf: Path, out: Path, convert: Convert) -> None:
    (hf / "encoding").mkdir()
    (hf / "encoding" / "encode.py").write_text("print()")
    for make in (os.mkfifo, os.mkdir):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        make(out / name)
        code, _, err = convert(hf, out, "--model-parallel", 2, "--overwrite")
        if name == "encoding" and make is os.mkdir:
            assert code == 0
            continue
        assert (code, err.count("\n")) == (2, 1)
        assert name in err


def test_a_linked_folder_of_side_files(
    hf: Path, out: Path, tmp_path: Path, convert: Convert
) -> None:
    """Files that are the same behind it are left alone, no other is written there."""
    for folder in (hf / "encoding", tmp_path / "theirs", out):
        folder.mkdir()
    (hf / "encoding" / "encode.py").write_text("new")
    (out / "encoding").symlink_to(tmp_path / "theirs")
    for text in (None, "mine"):
        if text:
            (tmp_path / "theirs" / "encode.py").write_text(text)
        for flags in ([], ["--overwrite"]):
            code, _, err = convert(hf, out, "--model-parallel", 2, *flags)
            assert code == 2 and "encoding" in err
        assert contents(tmp_path / "theirs") == ({"encode.py": b"mine"} if text else {})
    (tmp_path / "theirs" / "encode.py").write_text("new")
    assert convert(hf, out, "--model-parallel", 2, "--verify")[0] == 0


def test_the_same_side_files_are_left_alone(
    hf: Path, out: Path, tmp_path: Path, convert: Convert
) -> None:
    out.mkdir()
    (out / "tokenizer.json").symlink_to(hf / "tokenizer.json")
    os.link(hf / "config.json", out / "config.json")
    for _ in range(2):
        assert convert(hf, out, "--model-parallel", 2, "--verify")[0] == 0
    assert (out / "tokenizer.json").is_symlink()
    # Here config.json has to change, and it is the source's own.
    before = contents(hf)
    code, _, err = convert(hf, out, "--to", "bf16", "--overwrite")
    assert code == 2 and "config.json: the same file as" in err
    assert contents(hf) == before


def test_files_that_change_the_model_and_are_not_of_the_source_are_named(
    hf: Path, out: Path, convert: Convert
) -> None:
    old_hugging_face(out, convert, hf)
    for name in ("chat_template.jinja", "vocab.json", "results.json", "train.py"):
        (out / name).write_text("mine")
    line = f"warning: {out}: read with the model, but not as in the source: "
    flags = ("--model-parallel", 2)
    code, _, err = convert(hf, out, *flags, "--overwrite")
    assert code == 0 and f"{line}chat_template.jinja, vocab.json\n" in err
    (hf / "tokenizer.json").write_text('{"another": 1}')
    for again in (flags, (*flags, "--verify")):
        code, text, err = convert(hf, out, *again)
        assert code == 0 and "verified" in text
        assert f"{line}tokenizer.json, chat_template.jinja, vocab.json\n" in err


def test_files_that_no_checkpoint_names_stay(hf: Path, out: Path, convert: Convert) -> None:
    old_hugging_face(out, convert, hf)
    for name in ("adapter.safetensors", "notes.json", "model.safetensors.partial", "x.partial"):
        (out / name).write_text("mine")
    code, _, _ = convert(hf, out, "--model-parallel", 2, "--overwrite", "--verify")
    assert code == 0
    mine = {name for name, data in contents(out).items() if data == b"mine"}
    assert mine == {"adapter.safetensors", "notes.json", "model.safetensors.partial", "x.partial"}
    assert not (out / INDEX).exists() and not list(out.glob("model-0*"))


def test_a_file_that_comes_while_converting_is_not_replaced(
    hf: Path, out: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = conversion._write

    def slow(*args: Any) -> int:
        (out / "tokenizer.json").write_text("mine")
        return write(*args)

    monkeypatch.setattr(conversion, "_write", slow)
    code, _, err = convert(hf, out, "--model-parallel", 2)
    assert code == 2 and "tokenizer.json: is in the way" in err
    assert (out / "tokenizer.json").read_text() == "mine"
    assert not looks_whole(out)
    monkeypatch.undo()
    (out / "tokenizer.json").rename(out / "mine.json")
    code, text, _ = convert(hf, out, "--model-parallel", 2, "--verify")
    assert code == 0 and "were there" in text


def test_a_source_that_changes_while_it_is_read(
    hf: Path, out: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_single_file(out, convert, hf)
    before = contents(out)
    last = conversion._write_tensors

    def changing(*args: Any) -> Any:
        yield from last(*args)
        os.utime(hf / "model-00002-of-00003.safetensors")

    monkeypatch.setattr(conversion, "_write_tensors", changing)
    code, _, err = convert(hf, out, "--model-parallel", 2, "--overwrite")
    assert code == 2 and f"{hf}: was changed while it was read" in err
    assert contents(out).items() > before.items()


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
        plan = make_plan(source, ParallelConfig(world_size=2)).fingerprint
    (hf / "config.json.partial").write_text("mine")
    before = contents(hf)
    out.mkdir()
    (out / JOURNAL).write_text("\n".join(lines).replace("PLAN", plan) + "\n")
    code, _, err = convert(hf, out, "--model-parallel", 2, "--verify")
    assert (code, err) == (0, "")
    assert contents(hf) == before
    assert not (out / JOURNAL).exists()


def test_without_a_new_checkpoint_nothing_is_made(hf: Path, out: Path, convert: Convert) -> None:
    (hf / "model-00002-of-00003.safetensors").unlink()
    assert convert(hf, out, "--model-parallel", 2, "--overwrite")[0] == 2
    assert not out.exists()


@pytest.mark.parametrize(
    "flags",
    [["--overwrite"], ["--dry-run"], ["--to", "hf"], ["--tp", 2], ["--scale-fmt", "ue8m0"]],
    ids=lambda flags: flags[0],
)
def test_flags_for_writing_need_a_target(flags: list[object], hf: Path, convert: Convert) -> None:
    code, _, err = convert(hf, None, "--verify", *flags)
    assert code == 2
    assert f"{flags[0]} is for writing; give --save-path, or leave it out" in err


def test_old_index_of_nothing_is_in_the_way(hf: Path, out: Path, convert: Convert) -> None:
    out.mkdir()
    (out / INDEX).write_text(json.dumps({"weight_map": ["x"]}))
    code, _, err = convert(hf, out, "--to", "hf", "--overwrite")
    assert code == 2 and "not the index of a checkpoint" in err


def test_weights_are_recognized_by_their_content(hf: Path, out: Path, convert: Convert) -> None:
    """A file of weights that no index names is one by its name and how it begins."""
    out.mkdir()
    write_file(out / SINGLE, random_tensors(CONFIG, seed=3))
    code, _, err = convert(hf, out, "--to", "hf")
    assert code == 2 and f"holds another checkpoint ({SINGLE}); choose an empty directory" in err
    assert convert(hf, out, "--to", "hf", "--overwrite", "--verify")[0] == 0
    assert not (out / SINGLE).exists()
    with pytest.raises(CheckpointError, match="no such directory"):
        open_source(out / "none")

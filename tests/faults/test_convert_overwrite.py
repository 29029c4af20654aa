"""convert.py --overwrite: the old checkpoint goes only when the new one is complete."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint import convert as conversion
from dsv3.checkpoint.directory import INDEX, SINGLE
from dsv3.checkpoint.journal import JOURNAL, ConversionJournal
from dsv3.checkpoint.source import open_source
from dsv3.errors import CheckpointError
from tests.checkpoint_files import random_tensors, write_file
from tests.faults.converting import (
    CONFIG,
    Convert,
    contents,
    everything,
    old_single_file,
)


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
    old_single_file(out)
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
    old_single_file(out)
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
    old_single_file(target)
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
    """For example a mounted or immutable file."""
    old_single_file(out)
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
    old_single_file(out)
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


def test_a_source_that_changes_while_it_is_read(
    hf: Path, out: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_single_file(out)
    before = contents(out)
    last = conversion._write_tensors

    def changing(*args: Any) -> Any:
        yield from last(*args)
        os.utime(hf / "model-00002-of-00003.safetensors")

    monkeypatch.setattr(conversion, "_write_tensors", changing)
    code, _, err = convert(hf, out, "--model-parallel", 2, "--overwrite")
    assert code == 2 and f"{hf}: was changed while it was read" in err
    assert contents(out).items() > before.items()


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

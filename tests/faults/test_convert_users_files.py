"""convert.py: files of the user in the target are neither replaced nor removed unasked."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint import convert as conversion
from dsv3.checkpoint.directory import INDEX, SINGLE
from dsv3.checkpoint.journal import JOURNAL
from dsv3.config_files import hf_config_dict
from tests.checkpoint_files import random_tensors, write_hf
from tests.faults.converting import Convert, contents, looks_whole, old_hugging_face
from tests.unit.test_source import EVEN, write_deepseek

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
    old_hugging_face(out)
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
    old_hugging_face(out)
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

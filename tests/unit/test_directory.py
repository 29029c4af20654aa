"""Errors say what a path is that is not a checkpoint directory."""

import json
import os
from pathlib import Path

import pytest

from dsv3.checkpoint.contradictions import source_warnings
from dsv3.checkpoint.directory import check_directory
from dsv3.checkpoint.source import open_source
from dsv3.errors import CheckpointError
from tests.checkpoint_files import TINY, random_tensors, write_file, write_hf


def refused(path: Path | str, words: str) -> None:
    """The first check of the programs and opening a source give the same message."""
    messages = []
    for check in (check_directory, open_source):
        with pytest.raises(CheckpointError, match=words) as caught:
            check(Path(path))
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]
    assert str(path) in messages[0]


def files(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(b"some")
    return folder


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(tmp_path / "some" / "where", "no such directory$")
    refused("deepseek-ai/DeepSeek-V3", "no such directory$")
    refused("DeepSeek-V2-Lite", "no such directory$")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    refused(tmp_path / "link", "a symbolic link to .*gone, which does not exist")
    with pytest.raises(CheckpointError, match=r"an address, .*; give deepseek-ai/DeepSeek-V3, or"):
        check_directory(Path("https://huggingface.co/deepseek-ai/DeepSeek-V3"))
    with pytest.raises(CheckpointError, match=r"an address, .*; give the name of a repository"):
        check_directory(Path("https://example.org/model"))
    with pytest.raises(CheckpointError, match="no such directory"):
        check_directory(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.gguf", b"GGUF", "a file, not a checkpoint directory; GGUF is not read"),
        ("DeepSeek-V3-Q4", b"GGUF\3\0\0\0", "GGUF is not read"),
        ("model.safetensors", b"", "give its directory, "),
        ("config.json", b"{}", "give its directory, "),
        ("model.tar", b"", "a file, not a checkpoint directory$"),
    ],
)
def test_files(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, words)


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "a file, not a checkpoint directory")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LORA", "base_model_name_or_path": "org/base"}, "a LoRA .* for org/base, "),
        ({"peft_type": "ADALORA"}, "an? ADALORA adapter, not a model; merge it"),
        ([], "a LoRA adapter, not a model; merge it"),
    ],
)
def test_adapters(config: object, words: str, tmp_path: Path) -> None:
    folder = files(tmp_path / "lora", "adapter_model.safetensors", "tokenizer.json")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused(folder, words)


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    """The snapshot of the main branch is named, from any folder above it."""
    repository = tmp_path / "hub" / "models--x--y"
    for commit in ("abc", "def"):
        files(repository / "snapshots" / commit, "config.json")
    files(repository / "refs")
    (repository / "refs" / "main").write_text("def")
    refused(
        repository,
        "a cache of the Hugging Face hub; give a snapshot .*/snapshots/def .or one of 1 more",
    )
    for folder in (repository / "snapshots", tmp_path / "hub", tmp_path):
        refused(
            folder, "a cache of the Hugging Face hub; give a snapshot .*models--x--y/snapshots/"
        )


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "an empty directory"),
        (("README.md",), "no .safetensors files here"),
        (("pytorch_model.bin", "config.json"), "PyTorch pickle files .pytorch_model.bin.; only"),
        (("consolidated.00.pth",), "PyTorch pickle files"),
        (("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"), "GGUF files .m-00001-of-00002.gguf."),
        (("__0_0.distcp", ".metadata"), "a torch.distributed checkpoint"),
        (("model0-mp2.safetensors.partial",), "an unfinished conversion"),
    ],
)
def test_directories_without_weights(names: tuple[str, ...], words: str, tmp_path: Path) -> None:
    refused(files(tmp_path / "some", *names), words)


def test_a_directory_above(tmp_path: Path) -> None:
    write_hf(tmp_path / "above" / "model", TINY, random_tensors(TINY))
    refused(tmp_path / "above", "no .safetensors files here, but in .*above/model; give that")


def test_an_adapter_next_to_a_model(tmp_path: Path) -> None:
    """The model is read, with a warning."""
    path = write_hf(tmp_path, TINY, random_tensors(TINY))
    write_file(path / "adapter_model.safetensors", {"a.lora_A.weight": ("F32", (1,), bytes(4))})
    (path / "adapter_config.json").write_text("{}")
    check_directory(path)
    with open_source(path) as source:
        (line,) = source_warnings(source)
    assert "adapter_model.safetensors is not applied" in line

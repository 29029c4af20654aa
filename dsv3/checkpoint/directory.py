"""Recognize paths that are not a readable checkpoint directory, and describe them in an error.

Programs run this check before they read a tokenizer, a config or another file.
"""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path

from dsv3.checkpoint.manifest import MANIFEST
from dsv3.errors import CheckpointError, os_errors_as
from dsv3.read_files import read_mapping

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
RANK_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
# `Path` collapses two slashes into one.
_ADDRESS = re.compile(
    r"(?:https?:/+(?:[\w.-]*huggingface\.co/(?P<repository>[\w.-]+/[\w.-]+))?|hf:)", re.ASCII
)
_MAX_FOLDERS = 100  # searched for a checkpoint
_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Other formats by file name suffix, in the order in which they are looked for.
_OTHER_FORMATS = {
    ".gguf": "GGUF files",
    ".bin": "PyTorch pickle files",
    ".pt": "PyTorch pickle files",
    ".pth": "PyTorch pickle files",
    ".distcp": "a torch.distributed checkpoint",
    ".h5": "TensorFlow files",
    ".msgpack": "Flax files",
    ".onnx": "ONNX files",
}
_SAVE_FIRST = "only safetensors files are read; save the model in that format"


def check_directory(path: Path) -> None:
    """Raise CheckpointError unless `path` is a directory with weights in safetensors files."""
    with os_errors_as(CheckpointError, f"{path}: cannot be read"):
        if not os.path.isdir(path):  # unlike Path.is_dir, of any name
            raise CheckpointError(_no_directory(path))
        names = {entry.name for entry in path.iterdir()}
        if not _has_weights(names):
            raise CheckpointError(f"{path}: {_no_checkpoint(path, names)}")


def unused_adapter(path: Path) -> str | None:
    """Return the name of an adapter file next to the weights; None if there is none."""
    name = _ADAPTER_WEIGHTS
    return name if (path / name).is_file() else None


def _has_weights(names: Iterable[str]) -> bool:
    return any(
        name in (INDEX, MANIFEST) or (name.endswith(".safetensors") and name != _ADAPTER_WEIGHTS)
        for name in names
    )


def _no_directory(path: Path) -> str:
    """Return the message for a path that is not a directory."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"{path}: a symbolic link to {path.readlink()}, which does not exist"
    if os.path.exists(path):
        return f"{path}: a file, not a checkpoint directory{_of_file(path)}"
    if address := _ADDRESS.match(str(path)):
        give = address["repository"] or "the name of a repository (owner/name)"
        return f"{path}: an address, not a directory; give {give}, or a directory"
    return f"{path}: no such directory"


def _of_file(path: Path) -> str:
    is_gguf = path.suffix == ".gguf"
    if path.is_file() and not is_gguf:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
    if is_gguf:
        return "; GGUF is not read, give a directory of safetensors files"
    if path.suffix in (".safetensors", ".json"):
        return f"; give its directory, {path.parent}"
    return ""


def _no_checkpoint(path: Path, names: set[str]) -> str:
    """Return a description of a directory without weights, and the remedy."""
    if _ADAPTER in names:
        return _adapter(path / _ADAPTER)
    snapshots = _snapshots(path)
    if snapshots:
        return f"a cache of the Hugging Face hub; give a snapshot in it: {_first_of(snapshots)}"
    if any(name.endswith(".safetensors.partial") for name in names):
        return "an unfinished conversion; run convert.py again"
    if _other_format(names):
        return no_weights(names)
    below = [
        folder
        for folder in islice(sorted(path.iterdir()), _MAX_FOLDERS)
        if folder.is_dir() and _has_weights(entry.name for entry in folder.iterdir())
    ]
    if below:
        return f"no .safetensors files here, but in {_first_of(below)}; give that directory"
    if not names:
        return "an empty directory; download the model's files into it"
    return no_weights(names)


def no_weights(names: Iterable[str]) -> str:
    """Return a description of a directory whose files have no safetensors weights."""
    return _other_format(names) or "no .safetensors files here (other formats are not read)"


def _other_format(names: Iterable[str]) -> str:
    for ending, kind in _OTHER_FORMATS.items():
        found = sorted(name for name in names if name.endswith(ending))
        if found:
            return f"holds {kind} ({found[0]}); {_SAVE_FIRST}"
    return ""


def _adapter(file: Path) -> str:
    """Return a description of an adapter from its config, which may be malformed."""
    kind = base = None
    with suppress(CheckpointError):
        config = read_mapping(file, CheckpointError)
        kind = config.get("peft_type")
        base = config.get("base_model_name_or_path")
    adapter = "a LoRA adapter" if kind in (None, "LORA") else f"a {kind} adapter"
    for_base = f" for {base}" if isinstance(base, str) and base else ""
    return (
        f"{adapter}{for_base}, not a model; merge it into its base model first (peft: "
        "merge_and_unload)"
    )


def _snapshots(path: Path) -> list[Path]:
    """Return the snapshots in a hub cache, in one of its repositories, or in `snapshots` itself."""
    for pattern in ("snapshots/*", "models--*/snapshots/*", "hub/models--*/snapshots/*"):
        found = [folder for folder in sorted(path.glob(pattern)) if folder.is_dir()]
        if found:
            return _main_first(path, found)
    if path.name == "snapshots":
        return [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    return []


def _main_first(path: Path, snapshots: list[Path]) -> list[Path]:
    """Return the snapshots with that of the main branch first."""
    main = path / "refs" / "main"
    commit = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    return sorted(snapshots, key=lambda folder: folder.name != commit)


def _first_of(folders: list[Path]) -> str:
    others = f" (or one of {len(folders) - 1} more)" if len(folders) > 1 else ""
    return f"{folders[0]}{others}"

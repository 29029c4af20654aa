"""Read the names and offsets of the tensors in a directory: index, single file, or rank files."""

import os
from dataclasses import dataclass
from pathlib import Path

from dsv3.checkpoint.directory import INDEX, RANK_FILE, SINGLE
from dsv3.checkpoint.index import read_index
from dsv3.checkpoint.safetensors_file import Entry, read_header
from dsv3.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, with its stored name."""

    name: str
    file: Path
    entry: Entry


@dataclass(frozen=True, slots=True)
class StoredFiles:
    """All tensors of a directory; `is_ranks` is True for DeepSeek's converter (a file per rank)."""

    tensors: tuple[StoredTensor, ...]
    is_ranks: bool = False


def read_stored(path: Path) -> StoredFiles:
    """Read the headers of a directory without a manifest.

    Raises:
        CheckpointError: a file is missing, truncated or of unknown kind.
    """
    if os.path.lexists(path / INDEX):
        return StoredFiles(_indexed(path))
    if os.path.lexists(path / SINGLE):
        return StoredFiles(_of_file(path / SINGLE))
    files = _rank_files(path)
    if files:
        return StoredFiles(tuple(tensor for file in files for tensor in _of_file(file)), True)
    raise CheckpointError(f"{path}: {INDEX} is missing; without it a lost file goes unseen")


def _of_file(file: Path) -> tuple[StoredTensor, ...]:
    entries = read_header(file).entries
    return tuple(StoredTensor(name, file, entry) for name, entry in entries.items())


def _indexed(path: Path) -> tuple[StoredTensor, ...]:
    headers: dict[str, dict[str, Entry]] = {}
    tensors = []
    for name, file_name in read_index(path / INDEX).items():
        file = path / file_name
        if file_name not in headers:
            if not os.path.isfile(file):
                raise CheckpointError(f"{file}: missing, but {INDEX} names it (tensor {name})")
            headers[file_name] = read_header(file).entries
        entry = headers[file_name].get(name)
        if entry is None:
            raise CheckpointError(f"{file}: tensor {name} is missing, but {INDEX} names it")
        tensors.append(StoredTensor(name, file, entry))
    return tuple(tensors)


def _rank_files(path: Path) -> list[Path]:
    """Return the rank files of DeepSeek's converter in rank order; none if there are none."""
    matches = [m for file in sorted(path.iterdir()) if (m := RANK_FILE.fullmatch(file.name))]
    worlds = {int(match[2]) for match in matches}
    if not worlds:
        return []
    if len(worlds) > 1:
        raise CheckpointError(f"{path}: files of several conversions (mp {sorted(worlds)})")
    world = worlds.pop()
    files: list[Path] = []
    for rank in range(world):  # stops at the first missing file, however large `world` is
        files.append(path / f"model{rank}-mp{world}.safetensors")
        if not files[-1].is_file():
            raise CheckpointError(f"{files[-1]}: missing; the directory needs {world} rank files")
    return files

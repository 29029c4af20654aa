"""The output directory of a conversion, and the files in it that may be replaced or removed.

These are the files of an earlier conversion, according to the journal, and with `--overwrite` the
files of a checkpoint, recognized by name and first bytes. No other file is touched: no user's file
of the same name, no file of the source under another name, and nothing through a link.
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3.checkpoint.directory import INDEX, SINGLE
from dsv3.checkpoint.journal import JOURNAL, JournalRecord, read_record
from dsv3.checkpoint.manifest import MANIFEST, is_manifest
from dsv3.checkpoint.plan import Plan
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.report import in_units
from dsv3.checkpoint.safetensors_file import MAX_HEADER
from dsv3.checkpoint.side_files import (
    Content,
    content_bytes,
    differing_files,
    is_content,
    is_document,
    side_files,
    side_folders,
)
from dsv3.checkpoint.writer import PARTIAL
from dsv3.errors import CheckpointError, os_errors_as
from dsv3.files import FileId

# Usual names of weight files; files with other names are weights only if an index names them.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+|\d+-mp\d+)?\.safetensors")


@dataclass(frozen=True, slots=True)
class Survey:
    """The files that a conversion will write, keep and remove.

    Attributes:
        sides: side files to write; the others already exist or are kept.
        kept: documents of the user that take the place of side files.
        replaces: files of another checkpoint to remove, in this order. Removing the first one
            makes that checkpoint recognizably incomplete.
    """

    sides: Mapping[str, Content]
    kept: tuple[str, ...]
    replaces: tuple[str, ...]


class OutputDirectory:
    """The output directory of one conversion.

    Args:
        folder: the directory; it may not exist yet.
        source: the checkpoint to read.
        plan: the files to write.
        overwrite: replace an existing checkpoint.
        inputs: other files that are read.

    Attributes:
        last: the file that is renamed last and completes the directory.
    """

    def __init__(
        self,
        folder: Path,
        source: Source,
        plan: Plan,
        overwrite: bool = False,
        inputs: Sequence[Path] = (),
    ) -> None:
        self.folder = folder
        self.plan = plan
        self.overwrite = overwrite
        self.last = INDEX if plan.layout is None else MANIFEST
        self._weights = [file.name for file in plan.files]
        self._sides = side_files(source.path, plan)
        self._source_files = dict(_files_of(source))
        folders = (*side_folders(source.path), *(p.parent for p in self._source_files.values()))
        self._source_files |= {FileId.at(path): path for path in inputs}
        self._source_folders = {FileId.at(path): path for path in folders}

    def partial(self, name: str) -> Path:
        """Return the temporary path of a file."""
        return self.folder / (name + PARTIAL)

    def names(self, survey: Survey) -> list[str]:
        """Return the files to write, in the order in which they are renamed."""
        return [*self._weights, *survey.sides, self.last]

    def read_record(self) -> JournalRecord:
        """Return the journal of earlier conversions in this directory.

        Raises:
            CheckpointError: this cannot be an output directory.
        """
        if self.folder.is_symlink() and not self.folder.exists():
            raise CheckpointError(f"{self.folder}: a link to a directory that is not there")
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: not a directory")
        self._check_no_source(self.folder)
        return read_record(self.folder)

    def survey(self, record: JournalRecord) -> Survey:
        """Return the files to write, keep and remove; change nothing.

        Args:
            record: journal of earlier conversions in this directory.

        Raises:
            CheckpointError: a file is in the way.
        """
        with os_errors_as(CheckpointError, f"{self.folder}: cannot be read"):
            if self.is_written(record):
                sides = {name: c for name, c in self._sides.items() if name in record.names}
                survey = Survey(sides, (), tuple(record.replaces))
            else:
                survey = self._look_for_others(record)
            self._check_files(record, survey)
        return survey

    def is_written(self, record: JournalRecord) -> bool:
        """Return True if all files are complete, and at most some renames are missing."""
        is_written = record.is_written and record.fits(self.plan)
        return (
            is_written
            and self.partial(self.last).exists()
            and all(
                file.num_bytes in (_size(self.partial(file.name)), _size(self.folder / file.name))
                for file in self.plan.files
            )
        )

    def check_space(self, record: JournalRecord) -> None:
        """Raise CheckpointError if the disk is too small for all files and the existing ones."""
        needed, free = self.disk_space(record)
        if needed <= free or self.is_written(record):
            return
        there = sum(_disk_bytes(self.folder / name) for name in self._checkpoint_files())
        hint = ""
        if self.overwrite and there:
            hint = (
                f"; the checkpoint that is there, {in_units(there)}, only goes when the new one is "
                "complete: choose another disk, or remove it by hand"
            )
        wanted = in_units(needed)
        has = in_units(free)
        raise CheckpointError(f"{self.folder}: {wanted} are needed, the disk has {has} free{hint}")

    def disk_space(self, record: JournalRecord) -> tuple[int, int]:
        """Return the bytes that are still needed on disk, and the free bytes."""
        there = sum(_disk_bytes(self.partial(name)) for name in record.names)
        sides = sum(content_bytes(content) for content in self._sides.values())
        parents = (self.folder, *self.folder.absolute().parents)
        existing = next(path for path in parents if path.exists())
        return max(0, self.plan.num_bytes + sides - there), shutil.disk_usage(existing).free

    def differing_files(self) -> list[str]:
        """Return the side files that differ from the source's."""
        return differing_files(self.folder, self._sides)

    def _look_for_others(self, record: JournalRecord) -> Survey:
        """Find files of other checkpoints and of the user."""
        is_ours = record.plan == self.plan.id
        if record.is_written and not is_ours and not self.overwrite:
            raise CheckpointError(
                f"{self.folder}: another conversion was stopped while its files got their names; "
                "give its command again to finish it, or --overwrite to replace it"
            )
        old = self._checkpoint_files()
        for name in old if is_ours else old or sorted(p.name for p in self._all_weights()):
            if not self.overwrite:
                raise CheckpointError(
                    f"{self.folder}: holds another checkpoint ({name}); choose an empty "
                    "directory, or give --overwrite to replace it"
                )
        sides = {n: c for n, c in self._sides.items() if not is_content(self.folder / n, c)}
        kept = [name for name in sides if self._is_kept(name, bool(old))]
        sides = {name: content for name, content in sides.items() if name not in kept}
        replaced = (name for name in sides if (self.folder / name).exists())
        return Survey(sides, tuple(kept), (*old, *replaced))

    def _all_weights(self) -> Iterator[Path]:
        return self.folder.glob("*.safetensors")

    def _checkpoint_files(self) -> list[str]:
        """Return the weights, index and manifest of an existing checkpoint.

        The order is safe for removal: a single weight file, which is readable without an index,
        comes before the index, and the index before the manifest, which readers prefer.
        """
        index = self.folder / INDEX
        manifest = self.folder / MANIFEST
        named = _named_by(index)
        if named is None and os.path.lexists(index):
            raise _in_the_way(index, "not the index of a checkpoint")
        if os.path.lexists(manifest) and not is_manifest(manifest):
            raise _in_the_way(manifest, "not the manifest of a checkpoint")
        found = [path for path in sorted(self._all_weights()) if path.name in (named or ())]
        for path in sorted(self._all_weights()):
            if path not in found and _WEIGHTS.fullmatch(path.name):
                found.append(path)
        for path in found:
            if not path.is_symlink() and not _is_weights(path):
                raise _in_the_way(path, "not a file of weights")
        names = [path.name for path in found]
        first = [n for n in (SINGLE,) if n in names]
        first += [path.name for path in (index, manifest) if path.exists()]
        return [*first, *(name for name in names if name not in first)]

    def _is_kept(self, name: str, is_checkpoint: bool) -> bool:
        """Return True for a user's document in the place of a side file.

        Raises:
            CheckpointError: the file is not a document, or `overwrite` is not given.
        """
        path = self.folder / name
        if not os.path.lexists(path):
            return False
        if is_document(name):
            if self.overwrite:
                return True
            raise _in_the_way(
                path, "differs from the source's file", "give --overwrite to keep it as it is"
            )
        if path.is_symlink() or not (self.overwrite and is_checkpoint):
            raise _in_the_way(path, "differs from the file of the source, or is a link")
        return False

    def _check_files(self, record: JournalRecord, survey: Survey) -> None:
        """Raise CheckpointError if a file to write or remove is not of a conversion."""
        is_written = self.is_written(record)
        for name in self.names(survey):
            path = self.folder / name
            partial = self.partial(name)
            self._check_folder(path.parent)
            self._check_file(path)
            if os.path.lexists(partial) and name not in record.names:
                raise _in_the_way(partial, "not of this conversion")
            is_named = is_written and not partial.exists()
            if path.exists() and name not in survey.replaces and not is_named:
                raise _in_the_way(path, "not of a checkpoint that is replaced")
        for name in (*survey.replaces, JOURNAL):
            self._check_file(self.folder / name)
        for name in record.names:
            self._check_folder(self.partial(name).parent)
            self._check_file(self.partial(name))

    def _check_folder(self, path: Path) -> None:
        if path != self.folder and (path.is_symlink() or (path.exists() and not path.is_dir())):
            raise _in_the_way(path, "not a directory, or a link")
        self._check_no_source(path)

    def _check_no_source(self, path: Path) -> None:
        if part := self._source_folders.get(FileId.at(path)):
            raise CheckpointError(f"{path}: is {part}, which is read; write to another directory")

    def _check_file(self, path: Path) -> None:
        """Raise CheckpointError for a link, a directory, a device, or a file of the source."""
        if path.is_symlink():
            raise _in_the_way(path, "a link")
        if not path.exists():
            return
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _in_the_way(path, "not a regular file")
        if source := self._source_files.get(FileId.of(status)):
            raise CheckpointError(
                f"{path}: the same file as {source}, which is read; write to another directory"
            )


def is_complete(folder: Path) -> bool:
    """Return True if a directory holds a finished checkpoint, of any kind or content."""
    return is_manifest(folder / MANIFEST) or _named_by(folder / INDEX) is not None


def _in_the_way(path: Path, reason: str, other: str = "") -> CheckpointError:
    ways = ["move it away", "choose an empty directory", *([other] if other else [])]
    return CheckpointError(f"{path}: is in the way ({reason}); {', or '.join(ways)}")


def _files_of(source: Source) -> Iterator[tuple[FileId, Path]]:
    """Yield all files of the source checkpoint."""
    weights = {piece.file for info in source.tensors.values() for piece in info.pieces}
    beside = (path for folder in side_folders(source.path) for path in folder.iterdir())
    for path in (*beside, *weights):
        if path.is_file():
            yield FileId.at(path), path


def _is_weights(path: Path) -> bool:
    """Return True if a file begins like a safetensors file."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        begin = file.read(9)
    return begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= MAX_HEADER


def _named_by(index: Path) -> set[str] | None:
    """Return the files that an index names; None if the file does not exist or is not an index."""
    if not index.is_file():
        return None
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name) for name in weight_map.values()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _disk_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.is_file() and not path.is_symlink() else 0

"""Names on the hub, `owner/name[@revision]`, and the hub's cache on this host.

The cache has the layout that huggingface_hub documents. Names are recognized without the library.
"""

import logging
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3.checkpoint.directory import INDEX
from dsv3.checkpoint.index import read_index

log = logging.getLogger(__name__)

MAIN = "main"
# Names that the hub allows; a path such as `./x/y` or `x/y/z` does not match.
_NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII
)
_MAX_CHARACTERS = 96
_FOLDER = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")  # of a repository in a cache
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository and a revision of it: a branch, a tag or a commit."""

    repository: str
    revision: str = MAIN

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision != MAIN else "")

    @property
    def folder(self) -> str:
        """Name of the repository's directory in a cache."""
        return f"models--{self.repository.replace('/', '--')}"


def hub_name(given: str | Path | None) -> HubName | None:
    """Return the hub name that a text denotes; None for a path.

    A `Path` and an existing file or directory are always paths.
    """
    if not isinstance(given, str) or os.path.lexists(given):
        return None
    match = _NAME.fullmatch(given)
    if match is None:
        return None
    repository = match["repository"]
    is_valid = not ("--" in repository or ".." in given or repository.endswith((".git", ".")))
    if not is_valid or len(repository) > _MAX_CHARACTERS:
        return None
    return HubName(repository, match["revision"] or MAIN)


def repository_folder(path: Path) -> Path | None:
    """Return the repository's directory in the hub cache for a path to a snapshot; else None."""
    folder = path.absolute().parent.parent
    is_snapshot = path.absolute().parent.name == "snapshots" and _FOLDER.fullmatch(folder.name)
    return folder if is_snapshot else None


def blob_digest(file: Path) -> str:
    """Return the SHA-256 of a snapshot's file from the name of its blob; empty if unknown."""
    if repository_folder(file.parent) is None or not file.is_symlink():
        return ""
    name = file.readlink().name
    return name if SHA256.fullmatch(name) else ""


def model_name(path: Path) -> str:
    """Return the repository's name for a snapshot, and the directory's name otherwise."""
    folder = repository_folder(path)
    match = folder and _FOLDER.fullmatch(folder.name)
    return f"{match['owner']}/{match['name']}" if match else path.name


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository; `etag` names its content."""

    name: str
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class HubCache:
    """A repository's directory in the cache."""

    folder: Path

    @classmethod
    def of(cls, name: HubName) -> "HubCache":
        """Return the cache of a repository; its directory may not exist."""
        from huggingface_hub import constants

        return cls(Path(constants.HF_HUB_CACHE).expanduser().absolute() / name.folder)

    def snapshot(self, commit: str) -> Path:
        """Return the directory of a commit; it holds links to blobs under the files' names."""
        return self.folder / "snapshots" / commit

    def commit(self, revision: str) -> str:
        """Return the commit of a revision at the last download; empty if there was none."""
        ref = self.folder / "refs" / revision
        if ref.is_file():
            return ref.read_text(encoding="utf-8", errors="replace").strip()
        return revision if self.snapshot(revision).is_dir() else ""

    def note(self, revision: str, commit: str) -> None:
        """Record the commit of a revision; ignore a cache that cannot be written."""
        ref = self.folder / "refs" / revision
        if revision == commit or self.commit(revision) == commit:
            return
        partial = ref.with_name(f"{ref.name}.{secrets.token_hex(4)}.tmp")
        try:
            ref.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(commit, encoding="utf-8")
            partial.replace(ref)
        except OSError as error:
            log.debug("%s: %s", ref, error)

    def blob(self, etag: str) -> Path:
        """Return the path of a complete blob."""
        return self.folder / "blobs" / etag

    def partial(self, etag: str) -> Path:
        """Return the path of an incomplete blob."""
        return self.folder / "blobs" / f"{etag}.incomplete"

    def lock(self, etag: str) -> Path:
        """Return the path of a blob's lock, which all programs use."""
        return self.folder.parent / ".locks" / self.folder.name / f"{etag}.lock"

    def bytes_of(self, file: RemoteFile, commit: str) -> int:
        """Return the number of bytes of a file that are on disk."""
        for path in (self.snapshot(commit) / file.name, self.blob(file.etag)):
            if path.is_file():
                return file.size
        parts = self.blob(file.etag).parent.glob(f"{file.etag}*.incomplete")
        return max((_size(part, file.size) for part in parts), default=0)

    def missing(self, commit: str) -> Sequence[str]:
        """Return the weight files that a snapshot lacks; the index, if it has no weights at all."""
        folder = self.snapshot(commit)
        if (folder / INDEX).is_file():
            names = sorted(set(read_index(folder / INDEX).values()))
            return [name for name in names if not (folder / name).is_file()]
        has_weights = any(folder.glob("*.safetensors"))
        return [] if has_weights else [INDEX]


def _size(path: Path, most: int) -> int:
    try:
        status = path.stat()
    except OSError:  # renamed meanwhile
        return 0
    return min(most, status.st_size, status.st_blocks * 512)  # it may have holes

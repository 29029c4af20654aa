"""Names of checkpoints on the Hugging Face hub, as users write them: `owner/name[@revision]`."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

MAIN = "main"
# Names that the hub allows; a path such as `./x/y` or `x/y/z` does not match.
_NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII
)
_MAX_CHARACTERS = 96
_FOLDER = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")  # of a repository in a cache

_SHA256 = re.compile(r"[0-9a-f]{64}")


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
    return name if _SHA256.fullmatch(name) else ""


def model_name(path: Path) -> str:
    """Return the repository's name for a snapshot, and the directory's name otherwise."""
    folder = repository_folder(path)
    match = folder and _FOLDER.fullmatch(folder.name)
    return f"{match['owner']}/{match['name']}" if match else path.name

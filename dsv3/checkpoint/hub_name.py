"""Names of checkpoints on the Hugging Face hub, as users write them: `owner/name[@revision]`."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

MAIN = "main"
# As the hub allows them; a path such as `./x/y` or `x/y/z` is never one.
_NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII
)
_MOST_CHARACTERS = 96
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
    """Return the name on the hub that a text is; None for a path.

    What exists here is a path, and so is a `Path`.
    """
    if not isinstance(given, str) or os.path.lexists(given):
        return None
    found = _NAME.fullmatch(given)
    if found is None:
        return None
    repository = found["repository"]
    is_valid = not ("--" in repository or ".." in given or repository.endswith((".git", ".")))
    if not is_valid or len(repository) > _MOST_CHARACTERS:
        return None
    return HubName(repository, found["revision"] or MAIN)


def repository_folder(path: Path) -> Path | None:
    """Return the repository's directory in a hub cache, for a snapshot in it; else None."""
    folder = path.absolute().parent.parent
    is_snapshot = path.absolute().parent.name == "snapshots" and _FOLDER.fullmatch(folder.name)
    return folder if is_snapshot else None


def blob_digest(file: Path) -> str:
    """Return the SHA-256 of a snapshot's file, which its blob is named by; empty if unknown."""
    if repository_folder(file.parent) is None or not file.is_symlink():
        return ""
    name = file.readlink().name
    return name if _SHA256.fullmatch(name) else ""


def model_name(path: Path) -> str:
    """Return a short name of the model in a directory: for a snapshot, the repository's."""
    folder = repository_folder(path)
    found = folder and _FOLDER.fullmatch(folder.name)
    return f"{found['owner']}/{found['name']}" if found else path.name

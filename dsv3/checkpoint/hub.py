"""Checkpoints on the Hugging Face hub: the commit of a name, and its directory in the hub's cache.

Only files that are read are downloaded: weights in safetensors files, index, JSON, tokenizer and
template; never pickles, other formats or Python code. A snapshot's files are links to blobs, as the
cache requires. Weights are downloaded last, so a snapshot with all weights is complete.

HTTP libraries are imported only when a name on the hub is used.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsv3.checkpoint.hub_cache import HubCache, HubName, RemoteFile
from dsv3.checkpoint.hub_errors import hub_error, hub_reason
from dsv3.checkpoint.hub_files import Download, Fetcher
from dsv3.errors import CheckpointError

_ANSWER_SECONDS = 10.0
_COMMIT = re.compile(r"[0-9A-Za-z]{1,64}")
_LOGGERS = ("huggingface_hub", "httpx", "httpx2", "filelock")


@dataclass(frozen=True, slots=True)
class Revision:
    """A commit of a repository; if the hub has failed, `outage` is the reason to use the cache."""

    commit: str
    outage: str = ""


def resolve(name: HubName) -> Revision:
    """Return the hub's commit of a revision, or the cached one if the hub is unreachable.

    Raises:
        CheckpointError: the revision does not exist, or the hub is unreachable and none is cached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    cache = HubCache.of(name)
    api = HfApi()
    try:
        with _quiet():
            info = api.repo_info(name.repository, revision=name.revision, timeout=_ANSWER_SECONDS)
        if not _COMMIT.fullmatch(info.sha or ""):
            raise ValueError(f"no commit but {info.sha!r}")
        return Revision(info.sha or "")
    except Exception as error:
        reason = hub_reason(name, cache.folder.parent, error)
        commit = cache.commit(name.revision)
        if commit and not isinstance(error, RevisionNotFoundError):
            return Revision(commit, reason)
        raise CheckpointError(f"{name}: no such directory here, and {reason}") from error


def fetch(name: HubName, revision: Revision, download: Download, has_weights: bool = True) -> Path:
    """Download the files of a commit into the cache, and return its directory there.

    If the hub is unreachable, a complete directory in the cache is used. Without `has_weights`, the
    weights are not downloaded.

    Raises:
        CheckpointError: there are no readable weights, the disk has too little space, or the
            download has failed; the same call resumes it.
    """
    cache = HubCache.of(name)
    commit = revision.commit
    with _quiet():
        try:
            files = {} if revision.outage else _listing(name, commit)
        except Exception as error:
            revision = Revision(commit, hub_reason(name, cache.folder.parent, error))
        if revision.outage:
            _check_cached(name, cache, revision, has_weights)
            download.say(f"{name}: {revision.outage}; using the copy in {cache.snapshot(commit)}")
            return cache.snapshot(commit)
        try:
            Fetcher(name, commit, cache, files).fetch(download, has_weights)
        except Exception as error:
            raise hub_error(name, cache.folder.parent, error) from error
    if has_weights:
        cache.note(name.revision, commit)
    return cache.snapshot(commit)


def fetch_beside(name: HubName, download: Download) -> Path:
    """Return a directory in the cache with all files of a repository except the weights."""
    return fetch(name, resolve(name), download, has_weights=False)


def snapshot(name: HubName, commit: str) -> Path:
    """Return the directory of a commit in the cache, after another rank has fetched it."""
    return HubCache.of(name).snapshot(commit)


def _check_cached(name: HubName, cache: HubCache, revision: Revision, has_weights: bool) -> None:
    """Raise CheckpointError unless a snapshot is complete."""
    folder = cache.snapshot(revision.commit)
    if not folder.is_dir():
        raise CheckpointError(f"{name}: {revision.outage}")
    if has_weights and (missing := cache.missing(revision.commit)):
        raise CheckpointError(
            f"{name}: {revision.outage}; the copy in {folder} is not complete (it lacks "
            f"{missing[0]})"
        )


def _listing(name: HubName, commit: str) -> Mapping[str, RemoteFile]:
    """Return all files of a commit by name."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi().list_repo_tree(name.repository, recursive=True, revision=commit)
    return {
        item.path: RemoteFile(item.path, item.size, item.lfs.sha256 if item.lfs else item.blob_id)
        for item in tree
        if isinstance(item, RepoFile)
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loggers of the libraries; failures are reported as CheckpointError."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""Download checkpoints from the Hugging Face hub into its cache on this host.

Only files that are read are downloaded: weights in safetensors files, index, JSON, tokenizer and
template; never pickles, other formats or Python code. A snapshot's files are links to blobs, as for
every program that uses the cache. Weights come last, so a snapshot with all of them is complete.

huggingface_hub begins a file anew after a kill; here a download goes on in the middle of a file.
Files in the hub's chunk store (Xet) are left to that library where it can read the store.

No HTTP library is imported before a name is given.
"""

import hashlib
import importlib.util
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

from tqdm import tqdm

from dsv3.checkpoint.directory import INDEX, RANK_FILE, SINGLE, no_weights
from dsv3.checkpoint.hub_errors import hub_error, hub_reason, may_pass
from dsv3.checkpoint.hub_name import HubName
from dsv3.checkpoint.index import read_index
from dsv3.checkpoint.report import in_units
from dsv3.errors import CheckpointError

log = logging.getLogger(__name__)

_FILES_AT_ONCE = 8
_TICK_SECONDS = 0.5
_LINE_SECONDS = 60.0
_LOCK_SECONDS = 1.0
_ANSWER_SECONDS = 10.0
_PARTIAL_CONTENT = 206  # a status of HTTP
# In a row, without a byte in between; the pauses double.
_MOST_FAILURES, _FIRST_PAUSE_SECONDS = 4, 0.25
_COMMIT = re.compile(r"[0-9A-Za-z]{1,64}")
# Files beside the weights, at the top of a repository.
_BESIDE = re.compile(r".*\.json|.*\.jinja|tokenizer\.model|.*tiktoken.*\.model|.*\.tiktoken")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_LOGGERS = ("huggingface_hub", "httpx", "httpx2", "filelock")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Revision:
    """A commit of a repository; `outage` says why it is the cached one, if the hub has failed."""

    commit: str
    outage: str = ""


class Download:
    """Progress of a download.

    Args:
        say: takes lines for the user.
        shows_bar: draw a bar, if standard error is a terminal.

    Attributes:
        num_bytes: on the disk so far, those of earlier runs included.
    """

    def __init__(self, say: Say, shows_bar: bool = True) -> None:
        self.say, self.num_bytes = say, 0
        self._shows_bar = shows_bar

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yield a function that takes the bytes that are on the disk.

        Where there is no bar, a line tells them from time to time.
        """
        disable = None if self._shows_bar else True
        with tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=disable) as shown:
            told = time.monotonic()

            def advance(num_bytes: int) -> None:
                nonlocal told
                shown.update(num_bytes - self.num_bytes)
                self.num_bytes = num_bytes
                if shown.disable and time.monotonic() > told + _LINE_SECONDS:
                    told = time.monotonic()
                    self.say(f"{name}: {in_units(num_bytes)} of {in_units(total)} are there")

            shown.initial = shown.n = self.num_bytes
            yield advance


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a repository; `etag` names its content."""

    name: str
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class _Cache:
    """A repository's directory in the cache; laid out as huggingface_hub documents it."""

    folder: Path

    @classmethod
    def of(cls, name: HubName) -> "_Cache":
        from huggingface_hub import constants

        return cls(Path(constants.HF_HUB_CACHE).expanduser().absolute() / name.folder)

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def commit(self, revision: str) -> str:
        """Return the commit of a revision as of the last download; empty if there was none."""
        ref = self.folder / "refs" / revision
        if ref.is_file():
            return ref.read_text(encoding="utf-8", errors="replace").strip()
        return revision if self.snapshot(revision).is_dir() else ""

    def note(self, revision: str, commit: str) -> None:
        """Note the commit of a revision, where the cache can be written."""
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
        return self.folder / "blobs" / etag

    def partial(self, etag: str) -> Path:
        return self.folder / "blobs" / f"{etag}.incomplete"

    def lock(self, etag: str) -> Path:
        """Return the lock that all programs take for a blob."""
        return self.folder.parent / ".locks" / self.folder.name / f"{etag}.lock"

    def bytes_of(self, file: _File, commit: str) -> int:
        """Return the bytes of a file that are on the disk."""
        for path in (self.snapshot(commit) / file.name, self.blob(file.etag)):
            if path.is_file():
                return file.size
        parts = self.blob(file.etag).parent.glob(f"{file.etag}*.incomplete")
        return max((_size(part, file.size) for part in parts), default=0)

    def missing(self, commit: str) -> Sequence[str]:
        """Return the weights that a snapshot lacks; the index where there are none at all."""
        folder = self.snapshot(commit)
        if (folder / INDEX).is_file():
            names = sorted(set(read_index(folder / INDEX).values()))
            return [name for name in names if not (folder / name).is_file()]
        has_weights = any(folder.glob("*.safetensors"))
        return [] if has_weights else [INDEX]


def resolve(name: HubName) -> Revision:
    """Return the hub's commit of a revision, or the cached one if the hub cannot be asked.

    Raises:
        CheckpointError: there is none, or the hub cannot be asked and nothing is cached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    cache, api = _Cache.of(name), HfApi()
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
    """Return the directory of a commit in the cache, once all of its files are there.

    Without the hub, a complete directory is used as it is; without `has_weights`, the weights are
    left out.

    Raises:
        CheckpointError: there are no weights that can be read, the disk has too little room, or the
            download has failed; the same call goes on from there.
    """
    cache, commit = _Cache.of(name), revision.commit
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
            _Fetcher(name, commit, cache, files).fetch(download, has_weights)
        except Exception as error:
            raise hub_error(name, cache.folder.parent, error) from error
    if has_weights:
        cache.note(name.revision, commit)
    return cache.snapshot(commit)


def fetch_beside(name: HubName, download: Download) -> Path:
    """Return a directory in the cache with all files of a repository but the weights."""
    return fetch(name, resolve(name), download, has_weights=False)


def snapshot(name: HubName, commit: str) -> Path:
    """Return the directory of a commit in the cache, which another rank has fetched."""
    return _Cache.of(name).snapshot(commit)


def _check_cached(name: HubName, cache: _Cache, revision: Revision, has_weights: bool) -> None:
    """Raise CheckpointError unless a snapshot is complete."""
    folder = cache.snapshot(revision.commit)
    if not folder.is_dir():
        raise CheckpointError(f"{name}: {revision.outage}")
    if has_weights and (missing := cache.missing(revision.commit)):
        raise CheckpointError(
            f"{name}: {revision.outage}; the copy in {folder} is not complete (it lacks "
            f"{missing[0]})"
        )


def _listing(name: HubName, commit: str) -> Mapping[str, _File]:
    """Return all files of a commit by name."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi().list_repo_tree(name.repository, recursive=True, revision=commit)
    return {
        item.path: _File(item.path, item.size, item.lfs.sha256 if item.lfs else item.blob_id)
        for item in tree
        if isinstance(item, RepoFile)
    }


def _is_beside(name: str) -> bool:
    """Return True for a file beside the weights that is needed."""
    is_index = name.endswith(".index.json") and name != INDEX
    return "/" not in name and _BESIDE.fullmatch(name) is not None and not is_index


class _Fetcher:
    """Brings the files of one commit into the cache."""

    def __init__(
        self, name: HubName, commit: str, cache: _Cache, files: Mapping[str, _File]
    ) -> None:
        self._name, self._commit, self._cache, self._files = name, commit, cache, files
        self._stopped = Event()

    def fetch(self, download: Download, has_weights: bool) -> None:
        """Download what is needed and not there yet."""
        beside = [file for file in self._files.values() if _is_beside(file.name)]
        weights = [self._files[name] for name in self._weights()] if has_weights else []
        wanted = [*beside, *weights]

        def on_disk() -> int:
            return sum(self._cache.bytes_of(file, self._commit) for file in wanted)

        total, download.num_bytes = sum(file.size for file in wanted), on_disk()
        if total > download.num_bytes:
            download.say(self._check_room(total, total - download.num_bytes))
        with download.bar(str(self._name), total) as advance:
            for group in (beside, weights):
                self._run(group, lambda: advance(on_disk()))

    def _weights(self) -> Sequence[str]:
        """Return the files with weights that are read."""
        names = self._files
        if not any(name.endswith(".safetensors") for name in names):
            raise CheckpointError(f"{self._name}: {no_weights(names)}")
        if INDEX in names:
            found = sorted(set(read_index(self._file_of_library(INDEX)).values()))
            if absent := [name for name in found if name not in names]:
                raise CheckpointError(
                    f"{self._name}: {INDEX} names {absent[0]}, which is not there"
                )
            return found
        if SINGLE in names:
            return [SINGLE]
        if found := [name for name in names if RANK_FILE.fullmatch(name)]:
            return found
        raise CheckpointError(
            f"{self._name}: neither {INDEX} nor {SINGLE} is there, so its weights cannot be read"
        )

    def _check_room(self, total: int, missing: int) -> str:
        """Return a line about a download; raise if the cache's disk has too little room."""
        folder = self._cache.folder
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < missing:
            raise CheckpointError(
                f"{self._name}: {in_units(missing)} are to be downloaded, the disk of "
                f"{folder.parent} has {in_units(free)} free; HF_HOME names another directory"
            )
        part = in_units(missing) + (f" of {in_units(total)}" if missing < total else "")
        return f"{self._name}: downloading {part} to {folder} ({in_units(free)} free)"

    def _run(self, files: Sequence[_File], tick: Callable[[], None]) -> None:
        """Download files, several at a time; call `tick` meanwhile."""
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            left = {pool.submit(self._fetch_file, file) for file in files}
            try:
                while left:
                    done, left = wait(left, _TICK_SECONDS, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    tick()
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _fetch_file(self, file: _File) -> None:
        if (self._cache.snapshot(self._commit) / file.name).exists():
            return
        if file.name.endswith(".safetensors"):
            self._fetch_blob(file)
        self._file_of_library(file.name)  # which finds the blob and makes the link to it

    def _file_of_library(self, name: str) -> Path:
        """Return a file in the snapshot, which the library has downloaded or found."""
        from huggingface_hub import hf_hub_download

        repository, silent = self._name.repository, _silent_bar()
        return Path(hf_hub_download(repository, name, revision=self._commit, tqdm_class=silent))

    def _fetch_blob(self, file: _File) -> None:
        """Download the content of a file from where an earlier run was cut off."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self._name.repository, file.name, revision=self._commit)
        found = get_hf_file_metadata(url, retry_on_errors=True)
        if found.etag is None or (found.xet_file_data is not None and _reads_chunk_store()):
            return
        blob, partial = self._cache.blob(found.etag), self._cache.partial(found.etag)
        for folder in (blob.parent, self._cache.lock(found.etag).parent):
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._cache.lock(found.etag), self._stopped):
            if blob.exists():
                return
            with partial.open("ab") as target:
                begin = self._receive(url, target, found.size or file.size)
            is_known = _SHA256.fullmatch(found.etag) is not None
            if begin and is_known and _sha256(partial, self._stopped) != found.etag:
                partial.unlink()
                raise CheckpointError(
                    f"{self._name}: {file.name} came out damaged when its download was continued; "
                    "the same command fetches it again"
                )
            partial.replace(blob)

    def _receive(self, url: str, target: BinaryIO, size: int) -> int:
        """Download the rest of a file; return the bytes that were there before."""
        if target.tell() > size:
            target.truncate(0)
        begin, num_failures = min(target.tell(), size), 0
        while target.seek(0, os.SEEK_END) < size:
            before = target.tell()
            try:
                self._receive_once(url, target)
                if target.tell() < size:
                    raise ConnectionResetError("the answer is too short")
            except Exception as error:
                num_failures = 0 if target.tell() > before else num_failures + 1
                if num_failures > _MOST_FAILURES or not may_pass(error):
                    raise
                if self._stopped.wait(_FIRST_PAUSE_SECONDS * 2**num_failures):
                    raise
        if target.tell() > size:
            target.truncate(0)
            raise CheckpointError(f"{self._name}: {url} is longer than the hub says")
        return begin

    def _receive_once(self, url: str, target: BinaryIO) -> None:
        """Append bytes from where a file ends, or all of it where parts are not sent."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        headers, begin = {**build_hf_headers(), "Accept-Encoding": "identity"}, target.tell()
        if begin:
            headers["Range"] = f"bytes={begin}-"
        with get_session().stream(
            "GET", url, headers=headers, timeout=_ANSWER_SECONDS, follow_redirects=True
        ) as response:
            hf_raise_for_status(response)
            if begin and response.status_code != _PARTIAL_CONTENT:
                target.truncate(0)
            for piece in response.iter_bytes():
                if self._stopped.is_set():
                    raise CheckpointError("the download was stopped")
                target.write(piece)
                target.flush()  # so that a kill leaves what was received


@contextmanager
def _locked(path: Path, stopped: Event) -> Iterator[None]:
    """Hold the lock of a blob; other hosts may share the cache."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(WeakFileLock(path, timeout=_LOCK_SECONDS))
                break
            except Timeout:
                if stopped.is_set():
                    raise
        yield


def _sha256(path: Path, stopped: Event) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while (block := file.read(16 << 20)) and not stopped.is_set():
            digest.update(block)
    return digest.hexdigest()


def _size(path: Path, most: int) -> int:
    try:
        status = path.stat()
    except OSError:  # renamed meanwhile
        return 0
    return min(most, status.st_size, status.st_blocks * 512)  # it may have holes


def _reads_chunk_store() -> bool:
    """Return True if the library can read the hub's chunk store."""
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None


def _silent_bar() -> Any:
    """Return a class of progress bars that show nothing: there is one bar for all files."""

    class Silent(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **{**more, "disable": True})

    return Silent


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the libraries log: what matters of it is told as an error."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

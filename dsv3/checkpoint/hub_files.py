"""Select and download the files of a checkpoint from the hub, in parallel and resumable.

huggingface_hub restarts a file after a kill; here a download resumes within a file. Files in the
hub's chunk store (Xet) are left to that library if it can read the store.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

from tqdm import tqdm

from dsv3.checkpoint.directory import INDEX, RANK_FILE, SINGLE, no_weights
from dsv3.checkpoint.hub_cache import SHA256, HubCache, HubName, RemoteFile
from dsv3.checkpoint.hub_errors import is_transient
from dsv3.checkpoint.index import read_index
from dsv3.checkpoint.report import in_units
from dsv3.errors import CheckpointError

_FILES_AT_ONCE = 8
_TICK_SECONDS = 0.5
_LINE_SECONDS = 60.0
_LOCK_SECONDS = 1.0
_ANSWER_SECONDS = 10.0
_PARTIAL_CONTENT = 206  # HTTP status
_MAX_FAILURES = 4  # in a row, without a byte received in between
_FIRST_PAUSE_SECONDS = 0.25  # doubles with each failure
# Files other than weights, at the top of a repository.
_BESIDE = re.compile(r".*\.json|.*\.jinja|tokenizer\.model|.*tiktoken.*\.model|.*\.tiktoken")
_ETAG = re.compile(r"[0-9A-Za-z_-]{1,128}")  # used as a file name


class Download:
    """Progress of a download.

    Args:
        say: called with lines for the user.
        shows_bar: draw a bar if standard error is a terminal.

    Attributes:
        num_bytes: bytes on disk so far, including those of earlier runs.
    """

    def __init__(self, say: Callable[[str], None], shows_bar: bool = True) -> None:
        self.say = say
        self.num_bytes = 0
        self._shows_bar = shows_bar

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yield a function to call with the number of bytes on disk.

        Without a bar, a line reports them from time to time.
        """
        disable = None if self._shows_bar else True
        with tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=disable) as shown:
            reported_at = time.monotonic()

            def advance(num_bytes: int) -> None:
                nonlocal reported_at
                shown.update(num_bytes - self.num_bytes)
                self.num_bytes = num_bytes
                if shown.disable and time.monotonic() > reported_at + _LINE_SECONDS:
                    reported_at = time.monotonic()
                    self.say(f"{name}: {in_units(num_bytes)} of {in_units(total)} downloaded")

            shown.initial = shown.n = self.num_bytes
            yield advance


def _is_beside(name: str) -> bool:
    """Return True for a needed file that has no weights, such as a config or a tokenizer."""
    is_index = name.endswith(".index.json") and name != INDEX
    return "/" not in name and _BESIDE.fullmatch(name) is not None and not is_index


class Fetcher:
    """Downloader of the files of one commit into the cache."""

    def __init__(
        self, name: HubName, commit: str, cache: HubCache, files: Mapping[str, RemoteFile]
    ) -> None:
        self._name = name
        self._commit = commit
        self._cache = cache
        self._files = files
        self._stopped = Event()

    def fetch(self, download: Download, has_weights: bool) -> None:
        """Download the needed files that are not in the cache yet."""
        beside = [file for file in self._files.values() if _is_beside(file.name)]
        weights = [self._files[name] for name in self._weights()] if has_weights else []
        wanted = [*beside, *weights]

        def on_disk() -> int:
            return sum(self._cache.bytes_of(file, self._commit) for file in wanted)

        total = sum(file.size for file in wanted)
        download.num_bytes = on_disk()
        if total > download.num_bytes:
            download.say(self._check_space(total, total - download.num_bytes))
        with download.bar(str(self._name), total) as advance:
            for group in (beside, weights):
                self._run(group, lambda: advance(on_disk()))

    def _weights(self) -> Sequence[str]:
        """Return the names of the weight files to download."""
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

    def _check_space(self, total: int, missing: int) -> str:
        """Return a line about the download; raise if the cache's disk has too little space."""
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

    def _run(self, files: Sequence[RemoteFile], tick: Callable[[], None]) -> None:
        """Download files in parallel; call `tick` regularly meanwhile."""
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            running = {pool.submit(self._fetch_file, file) for file in files}
            try:
                while running:
                    done, running = wait(running, _TICK_SECONDS, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    tick()
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _fetch_file(self, file: RemoteFile) -> None:
        if (self._cache.snapshot(self._commit) / file.name).exists():
            return
        if file.name.endswith(".safetensors"):
            self._fetch_blob(file)
        self._file_of_library(file.name)  # finds the blob and links to it

    def _file_of_library(self, name: str) -> Path:
        """Return a file in the snapshot; huggingface_hub downloads it if it is not cached."""
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(
            self._name.repository, name, revision=self._commit, tqdm_class=_silent_bar()
        )
        return Path(path)

    def _fetch_blob(self, file: RemoteFile) -> None:
        """Download the content of a file; resume where an earlier run was cut off."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self._name.repository, file.name, revision=self._commit)
        metadata = get_hf_file_metadata(url, retry_on_errors=True)
        etag = metadata.etag
        if etag is None or (metadata.xet_file_data is not None and _reads_chunk_store()):
            return
        if not _ETAG.fullmatch(etag):
            raise CheckpointError(f"{self._name}: {url} has an ETag that names no file")
        blob = self._cache.blob(etag)
        partial = self._cache.partial(etag)
        for folder in (blob.parent, self._cache.lock(etag).parent):
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._cache.lock(etag), self._stopped):
            if blob.exists():
                return
            with partial.open("ab") as target:
                begin = self._receive(url, target, metadata.size or file.size)
            is_sha256 = SHA256.fullmatch(etag) is not None
            if begin and is_sha256 and _sha256(partial, self._stopped) != etag:
                partial.unlink()
                raise CheckpointError(
                    f"{self._name}: {file.name} came out damaged when its download was continued; "
                    "the same command fetches it again"
                )
            partial.replace(blob)

    def _receive(self, url: str, target: BinaryIO, size: int) -> int:
        """Download the missing bytes of a file; return the number of bytes it had before."""
        if target.tell() > size:
            target.truncate(0)
        begin = min(target.tell(), size)
        num_failures = 0
        while target.seek(0, os.SEEK_END) < size:
            before = target.tell()
            try:
                self._receive_once(url, target)
                if target.tell() < size:
                    raise ConnectionResetError("the answer is too short")
            except Exception as error:
                num_failures = 0 if target.tell() > before else num_failures + 1
                if num_failures > _MAX_FAILURES or not is_transient(error):
                    raise
                if self._stopped.wait(_FIRST_PAUSE_SECONDS * 2**num_failures):
                    raise
        if target.tell() > size:
            target.truncate(0)
            raise CheckpointError(f"{self._name}: {url} is longer than the hub says")
        return begin

    def _receive_once(self, url: str, target: BinaryIO) -> None:
        """Append the bytes after the end of a file; all bytes, if the server sends no ranges."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        begin = target.tell()
        if begin:
            headers["Range"] = f"bytes={begin}-"
        with get_session().stream(
            "GET", url, headers=headers, timeout=_ANSWER_SECONDS, follow_redirects=True
        ) as response:
            hf_raise_for_status(response)
            if begin and response.status_code != _PARTIAL_CONTENT:
                target.truncate(0)
            for data in response.iter_bytes():
                if self._stopped.is_set():
                    raise CheckpointError("the download was stopped")
                target.write(data)
                target.flush()  # so that received bytes survive a kill


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


def _reads_chunk_store() -> bool:
    """Return True if the library can read the hub's chunk store."""
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None


def _silent_bar() -> Any:
    """Return a class of progress bars that show nothing, since one bar covers all files."""

    class Silent(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent

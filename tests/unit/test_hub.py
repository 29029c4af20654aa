"""Checkpoints by their names on the hub, downloaded from one on loopback."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv3.checkpoint.hub import Revision, fetch, fetch_beside, resolve
from dsv3.checkpoint.hub_cache import HubName, hub_name, model_name, repository_folder
from dsv3.checkpoint.hub_files import Download
from dsv3.checkpoint.source import open_source
from dsv3.errors import CheckpointError
from tests.checkpoint_files import TINY, random_tensors, write_file, write_hf
from tests.hub_server import COMMIT, Hub

NAME = HubName("some/model")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one repository; this process's library asks it."""
    from huggingface_hub import constants

    folder = write_hf(tmp_path / "repository", TINY, random_tensors(TINY))
    with Hub(folders={"some/model": folder}).serving() as hub:
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("dsv3.checkpoint.hub_files._FIRST_PAUSE_SECONDS", 0.0)
        yield hub


def download(name: HubName = NAME) -> tuple[Path, list[str]]:
    """Return the directory, and the lines that the user sees."""
    lines: list[str] = []
    return fetch(name, resolve(name), Download(lines.append)), lines


def failure(name: HubName = NAME) -> str:
    with pytest.raises(CheckpointError) as caught:
        download(name)
    text = str(caught.value)
    assert text.startswith(f"{name}: ") and "\n" not in text
    return text


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the library's next session of HTTP refuse to work."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("deepseek-ai/DeepSeek-V2-Lite", HubName("deepseek-ai/DeepSeek-V2-Lite")),
        ("a/b@v1.0", HubName("a/b", "v1.0")),
        ("a/b@refs/pr/3", HubName("a/b", "refs/pr/3")),
        *((path, None) for path in ("./a/b", "../a", "/a/b", "~/b", "a/b/c", "a", "a/b/", "a/..")),
        *(
            (path, None)
            for path in ("", "a--b/c", "a/b.git", "a/b@", "a/b@v/../x", "https://x/y", "é/b")
        ),
        (f"a/{'b' * 100}", None),
        (Path("a/b"), None),
        (None, None),
    ],
)
def test_names(given: str | Path | None, wanted: HubName | None) -> None:
    assert hub_name(given) == wanted
    if wanted is not None:
        assert str(wanted) == given


def test_an_existing_file_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_name("a/b") == HubName("a/b")
    Path("a").mkdir()
    Path("a/b").symlink_to("nowhere")
    assert hub_name("a/b") is None


def test_names_of_models() -> None:
    snapshot = Path("/cache/models--deepseek-ai--DeepSeek-V3/snapshots/0123")
    assert model_name(snapshot) == "deepseek-ai/DeepSeek-V3"
    assert repository_folder(snapshot) == snapshot.parents[1]
    assert model_name(Path("/data/DeepSeek-V3")) == "DeepSeek-V3"
    assert repository_folder(Path("/data/snapshots/x")) is None


def test_a_download(hub: Hub, cache: Path) -> None:
    """Only needed files are downloaded; the second time only metadata is requested."""
    folder = hub.folders["some/model"]
    for name in ("modeling.py", "pytorch_model.bin", "README.md", "consolidated.safetensors"):
        (folder / name).write_bytes(b"other")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"other")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "tiktoken.model").write_text("x")
    (folder / "pytorch_model.bin.index.json").write_text("{}")

    path, lines = download()

    assert path == cache / "models--some--model" / "snapshots" / COMMIT
    assert sorted(file.name for file in path.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
        "tiktoken.model",
        "tokenizer.json",
    ]
    assert len(lines) == 1 and "some/model: downloading " in lines[0] and "GB free)" in lines[0]
    with open_source(path) as ours, open_source(folder) as theirs:
        assert all(ours.read(name) == theirs.read(name) for name in theirs.tensors)
    sent = dict(hub.sent)
    assert sent["tokenizer.json"] == 2
    assert download() == (path, []) and hub.sent == sent


@pytest.mark.parametrize("single", [True, False])
def test_without_an_index(hub: Hub, single: bool) -> None:
    folder, names = hub.folders["some/model"], ["model0-mp2.safetensors", "model1-mp2.safetensors"]
    for file in folder.glob("model*"):
        file.unlink()
    for name in ["model.safetensors"] if single else names:
        write_file(folder / name, random_tensors(TINY))
    path, _ = download()
    assert sorted(f.name for f in path.glob("*.safetensors")) == (
        ["model.safetensors"] if single else names
    )


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model-q4.gguf"], r"holds GGUF files \(model-q4.gguf\)"),
        (["pytorch_model.bin"], "holds PyTorch pickle files"),
        (["config.json"], "no .safetensors files"),
        (["a.safetensors"], "neither model.safetensors.index.json nor model.safetensors is there"),
    ],
)
def test_no_weights(hub: Hub, cache: Path, names: list[str], words: str) -> None:
    """The error is raised before any download."""
    folder = hub.folders["some/model"]
    for file in folder.iterdir():
        file.unlink()
    for name in names:
        (folder / name).write_bytes(b"{}")
    assert words.replace("\\", "") in failure()
    assert not hub.sent and not cache.exists()


def test_an_index_of_other_files(hub: Hub) -> None:
    index = hub.folders["some/model"] / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "y.safetensors"}}))
    assert "names y.safetensors, which is not there" in failure()


def test_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = download()
    asked = len(hub.asked)
    go_offline(monkeypatch)
    assert resolve(NAME).commit == COMMIT
    found, lines = download()
    assert (found, len(lines)) == (path, 1)
    assert f"HF_HUB_OFFLINE is set, so the hub is not asked; using the copy in {path}" in lines[0]
    assert "no such directory here, and HF_HUB_OFFLINE is set" in failure(HubName("some/other"))
    (path / "model-00002-of-00003.safetensors").unlink()
    assert "is not complete (it lacks model-00002-of-00003.safetensors)" in failure()
    assert len(hub.asked) == asked


def test_the_hub_fails(hub: Hub) -> None:
    path, _ = download()
    hub.status = 503
    found, lines = download()
    assert found == path and "answers with status 503" in lines[0]
    assert "answers with status 503; try again later" in failure(HubName("some/other"))


def test_the_commit_of_a_revision_is_known_only_once_it_is_complete(hub: Hub) -> None:
    download()
    hub.commit, hub.num_cuts = "1" * 40, 10**6
    file = hub.folders["some/model"] / "model-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert "was cut" in failure()
    hub.status = 500
    assert resolve(NAME).commit == COMMIT


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "RepoNotFound", "has no repository of this name; if it is a private one"),
        (404, "RepoNotFound", "no such directory here, and .* has no repository of this name"),
        (404, "RevisionNotFound", "has no revision main"),
        (403, "GatedRepo", "accept a licence first: do so on http.*/some/model, then set HF_TOKEN"),
        (403, "", "refuses access"),
        (404, "", "has nothing of this name"),
        (429, "", "status 429; try again later"),
        (500, "", "status 500; try again later"),
    ],
)
def test_refusals(hub: Hub, status: int, code: str, words: str) -> None:
    hub.status, hub.error_code = status, code
    with pytest.raises(CheckpointError, match=words):
        download()


def test_a_licence_to_accept(hub: Hub) -> None:
    """The hub describes such a repository to all, and refuses its files."""
    hub.is_gated = True
    assert f"accept a licence first: do so on {hub.url}/some/model" in failure()


def test_lines_in_place_of_a_bar(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.checkpoint.hub_files._LINE_SECONDS", -1.0)
    lines = download()[1]
    assert len(lines) > 1 and re.fullmatch(r"some/model: (.* .B) of \1 downloaded", lines[-1])


def test_no_hub_but_a_web_page(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    def fail(*_: object, **__: object) -> None:
        raise json.JSONDecodeError("Expecting value", "<html>", 0)

    monkeypatch.setattr(HfApi, "repo_info", fail)
    assert "does not answer as a hub does (JSONDecodeError: Expecting value" in failure()


def test_no_such_name_or_revision(hub: Hub) -> None:
    assert f"{hub.url} has no repository of this name" in failure(HubName("some/other"))
    assert f"{hub.url}/some/model has no revision v2" in failure(HubName("some/model", "v2"))


def test_a_cut_connection_is_continued(hub: Hub) -> None:
    hub.cut_at, hub.num_cuts = 1 << 16, 2
    path, _ = download()
    file = hub.folders["some/model"] / "model-00001-of-00003.safetensors"
    assert (path / file.name).read_bytes() == file.read_bytes()
    assert hub.sent[file.name] == file.stat().st_size  # no byte twice


@pytest.mark.parametrize("ranges", [True, False])
def test_the_rest_of_a_file(hub: Hub, cache: Path, ranges: bool) -> None:
    """Bytes of a killed run are not fetched again if the server sends ranges."""
    hub.ranges, hub.num_cuts = ranges, 10**6
    assert "was cut" in failure()
    hub.num_cuts = 0
    blobs = cache / "models--some--model" / "blobs"
    whole = hub.folders["some/model"] / "model-00001-of-00003.safetensors"
    (blobs / f"{digest(whole)}.incomplete").write_bytes(whole.read_bytes()[:1000])
    path, _ = download()
    assert (path / whole.name).read_bytes() == whole.read_bytes()
    assert hub.sent[whole.name] == whole.stat().st_size - 1000 * ranges


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_digest_that_leaves_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.hub_server._etag", lambda _: "../../x")
    assert "has an ETag that names no file" in failure()


def test_a_damaged_rest(hub: Hub, cache: Path) -> None:
    """Wrong bytes at the beginning are detected by the digest, and fetched again."""
    file = hub.folders["some/model"] / "model-00001-of-00003.safetensors"
    blobs = cache / "models--some--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{digest(file)}.incomplete").write_bytes(bytes(1000))
    assert "came out damaged" in failure()
    path, _ = download()
    assert (path / file.name).read_bytes() == file.read_bytes()


def test_no_room(hub: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6, 12_345))
    text = failure()
    assert "are to be downloaded, the disk of " in text and "has 12.3 kB free" in text
    assert not any(name.endswith((".safetensors", "tokenizer.json")) for name in hub.sent)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_refuses(hub: Hub, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "/the/file")

    monkeypatch.setattr("dsv3.checkpoint.hub_files.Fetcher._receive_once", fail)
    full = "is full; free some space, then run it again to resume"
    text = (
        full if number == errno.ENOSPC else f"/the/file: cannot be written: {os.strerror(number)}"
    )
    assert text in failure()


def test_certificates(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, constants

    class ConnectError(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")

    monkeypatch.setattr(HfApi, "repo_info", fail)
    assert f"the certificate of {constants.ENDPOINT} cannot be verified" in failure()


def test_no_server(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "the hub (http://127.0.0.1:1) cannot be reached: " in failure()


def test_another_rank_decides_the_commit(hub: Hub, cache: Path) -> None:
    path = fetch(NAME, Revision(COMMIT), Download(lambda _: None))
    assert path.name == COMMIT and (cache / "models--some--model/refs/main").read_text() == COMMIT


def test_without_weights(hub: Hub) -> None:
    """For programs that only read the configuration; it does not count as complete."""
    path = fetch_beside(NAME, Download(lambda _: None))
    assert (path / "config.json").is_file() and not list(path.glob("*.safetensors"))
    hub.status = 500
    assert "no such directory here" in failure()


def test_progress(hub: Hub) -> None:
    shown = Download(lambda _: None)
    fetch(NAME, resolve(NAME), shown)
    folder = hub.folders["some/model"]
    assert shown.num_bytes == sum(file.stat().st_size for file in folder.iterdir())


def test_the_library_is_imported_for_names_only() -> None:
    code = """
import sys
import dsv3.checkpoint.hub, dsv3.checkpoint.hub_cache
dsv3.checkpoint.hub_cache.hub_name("a/b")
assert not {"huggingface_hub", "torch"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)

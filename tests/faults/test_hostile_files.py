"""Checkpoint files made to hang, to exhaust memory or to be misread: each is refused by name."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint.directory import INDEX
from dsv3.config_files import DEMO
from dsv3.errors import MAX_LINE, one_line
from tests.forked import run_forked
from tests.programs import GENERATE, HANG_SECONDS, ROOT, environment

WEIGHTS = "model-00001-of-00002.safetensors"
CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
A, B = "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"
CONVERT = str(ROOT / "launch" / "convert.py")
MEMORY_BYTES = 4 << 30  # address space of the process that opens all of them

Header = dict[str, Any]
Fault = Callable[[Path], None]


def raw_header(folder: Path) -> tuple[bytes, bytes]:
    data = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def put_header(folder: Path, text: bytes, tensors: bytes) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + tensors)


def header(change: Callable[[Header], object]) -> Fault:
    """Return a fault that changes the header of a weights file."""

    def make(folder: Path) -> None:
        text, tensors = raw_header(folder)
        entries = json.loads(text)
        change(entries)
        put_header(folder, json.dumps(entries).encode(), tensors)

    return make


def entry(**fields: object) -> Fault:
    """Return a fault that changes fields of one tensor's entry."""
    return header(lambda entries: entries[A].update(fields))


def overlap(entries: Header) -> None:
    entries[A]["data_offsets"] = entries[B]["data_offsets"]


def float_offsets(entries: Header) -> None:
    entries[A]["data_offsets"] = [float(at) for at in entries[A]["data_offsets"]]


def another(name: str, shape: list[int], end: int = 0) -> Fault:
    wanted = {"dtype": "U8", "shape": shape, "data_offsets": [0, end]}
    return header(lambda entries: entries.update({name: wanted}))


def header_text(text: bytes) -> Fault:
    return lambda folder: put_header(folder, text, raw_header(folder)[1])


def twice(folder: Path) -> None:
    text, tensors = raw_header(folder)
    again = json.dumps({A: json.loads(text)[B]})[1:]
    put_header(folder, text.rstrip()[:-1] + b"," + again.encode(), tensors)


def more_bytes(folder: Path) -> None:
    text, tensors = raw_header(folder)
    put_header(folder, text, tensors + b"xx")


def gap(folder: Path) -> None:
    text, tensors = raw_header(folder)
    entries = json.loads(text)
    for name in entries.keys() - {"__metadata__"}:
        entries[name]["data_offsets"] = [at + 16 for at in entries[name]["data_offsets"]]
    put_header(folder, json.dumps(entries).encode(), bytes(16) + tensors)


def content(name: str, text: str | bytes) -> Fault:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return make


def fields(name: str, **more: object) -> Fault:
    """Return a fault that changes fields of a JSON file."""

    def make(folder: Path) -> None:
        content(name, json.dumps(json.loads((folder / name).read_text()) | more))(folder)

    return make


def index(file_name: object) -> Fault:
    """Return a fault that has the index name another file for one tensor."""

    def make(folder: Path) -> None:
        data = json.loads((folder / INDEX).read_text())
        data["weight_map"][A] = file_name
        content(INDEX, json.dumps(data))(folder)

    return make


def pipe(name: str) -> Fault:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def device(name: str) -> Fault:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")

    return make


def huge(name: str) -> Fault:
    """Return a fault that makes a file of 1 TB, which takes no room on the disk."""

    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(1 << 40)

    return make


def manifest(**more: object) -> Fault:
    whole = {"format": "dsv3-checkpoint", "version": 1, "model_digest": "x", "tensors": {}}
    layout = {"world_size": 1, "tp": 1, "dp": 1}
    return content("manifest.json", json.dumps({**whole, "layout": layout, "files": [], **more}))


def tensor(**more: object) -> dict[str, object]:
    whole = {"dtype": "BF16", "shape": [2], "digest": "x", "shards": [[0]]}
    return {"t": {**whole, **more}}


BIG = 2**64
DEEP = "[" * 200_000
NO_SIZES = "is damaged: its {} is not a list of sizes"
NOT_OURS = f"{INDEX}: not an index of tensor names to files in its directory ({A} is in none"
FAULTS: dict[str, tuple[Fault, str]] = {
    # Headers of safetensors files.
    "overlap": (header(overlap), f"{WEIGHTS}: tensors {A} and {B} overlap"),
    "tensor twice": (twice, f"{WEIGHTS}: its header cannot be read: {A} is given twice"),
    "gap": (gap, f"{WEIGHTS}: 16 bytes belong to no tensor"),
    "bytes at the end": (more_bytes, f"{WEIGHTS}: 2 bytes belong to no tensor"),
    "offsets beyond the file": (another("z", [10**9], 10**9), "overlap"),
    "deep header": (header_text(DEEP.encode()), f"{WEIGHTS}: its header cannot be read: nested"),
    "header in UTF-16": (header_text("{}".encode("utf-16")), "byte 1 (0xff) is not UTF-8"),
    "header of NaN": (header_text(b'{"a": NaN}'), "its header cannot be read: not JSON: NaN is no"),
    "float offsets": (header(float_offsets), NO_SIZES.format("data_offsets")),
    "true offsets": (entry(data_offsets=[False, True]), NO_SIZES.format("data_offsets")),
    "negative offsets": (entry(data_offsets=[-2, 0]), NO_SIZES.format("data_offsets")),
    "three offsets": (entry(data_offsets=[0, 1, 2]), NO_SIZES.format("data_offsets")),
    "no offsets": (entry(data_offsets=None), NO_SIZES.format("data_offsets")),
    "float shape": (entry(shape=[1.0]), NO_SIZES.format("shape")),
    "shape of text": (entry(shape="12"), NO_SIZES.format("shape")),
    "negative shape": (entry(shape=[-1, -1]), NO_SIZES.format("shape")),
    "huge sizes": (another("z", [BIG, 0]), NO_SIZES.format("shape")),
    "many sizes": (another("z", [1] * 100_000, 1), NO_SIZES.format("shape")),
    "many huge sizes": (another("z", [BIG] * 100_000, 1), NO_SIZES.format("shape")),
    "other size": (entry(shape=[3]), "its shape and its data_offsets differ in size"),
    "dtype no name": (entry(dtype=[["F32"]]), "its dtype is not a name"),
    "dtype unknown": (entry(dtype="\x1b[2J" + "F" * 9000), "is \\x1b[2JFFFF"),
    "entry no object": (header(lambda h: h.update({A: [1, 2]})), "is damaged: it is not an object"),
    "metadata no object": (header(lambda h: h.update(__metadata__=[])), "__metadata__ is damaged"),
    "metadata no texts": (
        header(lambda h: h.update(__metadata__={"format": 1})),
        f"{WEIGHTS}: the header's __metadata__ is damaged",
    ),
    "long name": (another("n" * 1_000_000, [1], 1), "overlap; fetch it again"),
    "name that commands": (another("\x1b]0;x\x07\u202e", [5], 5), "\\x1b]0;x\\x07\\u202e"),
    "weights a pipe": (pipe(WEIGHTS), f"{WEIGHTS}: missing, but {INDEX} names it"),
    "weights a device": (device(WEIGHTS), f"{WEIGHTS}: missing, but {INDEX} names it"),
    "weights huge": (huge(WEIGHTS), f"{WEIGHTS}: its header cannot be read: not JSON"),
    # The index.
    "index deep": (content(INDEX, DEEP), f"{INDEX}: cannot be read: nested too deeply"),
    "index a pipe": (pipe(INDEX), f"{INDEX}: not a regular file but a named pipe"),
    "index a device": (device(INDEX), f"{INDEX}: not a regular file but a device"),
    "index huge": (huge(INDEX), f"{INDEX}: larger than the 536,870,912 bytes"),
    "index a list": (content(INDEX, '{"weight_map": []}'), f"{INDEX}: not an index of tensor"),
    "index twice": (
        content(INDEX, f'{{"weight_map": {{"{A}": "{WEIGHTS}", "{A}": "{WEIGHTS}"}}}}'),
        f"{INDEX}: cannot be read: {A} is given twice",
    ),
    "file name too long": (index("a" * 5000), NOT_OURS),
    "file name with zero": (index("a\0b"), NOT_OURS),
    "file name empty": (index(""), NOT_OURS),
    "file name a number": (index(5), NOT_OURS),
    "file name that commands": (index("\x1b[2J\n.safetensors"), "\\x1b[2J .safetensors: missing"),
    "file name half a pair": (index("\ud800"), "\\ud800: missing"),
    # Configurations.
    **{
        f"{name} {kind}": (make(name), f"{name}: {reason}")
        for name in (CONFIG, GENERATION, TOKENIZER_CONFIG)
        for kind, make, reason in (
            ("deep", lambda name: content(name, DEEP), "cannot be read: nested too deeply"),
            ("a pipe", pipe, "not a regular file but a named pipe"),
            ("a device", device, "not a regular file but a device"),
            ("huge", huge, "larger than the 16,777,216 bytes"),
            (
                "digits",
                lambda name: content(name, "9" * 10**5),
                "cannot be read: not JSON: Exceeds",
            ),
            ("NaN", lambda name: content(name, '{"a": NaN}'), "cannot be read: not JSON: NaN is"),
            ("a number", lambda name: content(name, "5"), "not a mapping of field names to values"),
            (
                "contradicts",
                lambda name: content(name, '{"a": 1, "a": 2}'),
                "cannot be read: a is given twice, with different values",
            ),
        )
    },
    # Tokenizer and chat template.
    "tokenizer deep": (content(TOKENIZER, DEEP), f"{TOKENIZER}: not a tokenizer file: "),
    "tokenizer a pipe": (pipe(TOKENIZER), f"{TOKENIZER}: not a regular file but a named pipe"),
    "tokenizer huge": (huge(TOKENIZER), f"{TOKENIZER}: larger than the 536,870,912 bytes"),
    "tokenizer that panics": (
        fields(TOKENIZER, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        f"{TOKENIZER}: not a tokenizer file: ",
    ),
    "bos_token a number": (fields(TOKENIZER_CONFIG, bos_token=5), "bos_token must be a text or"),
    "add_bos_token a text": (
        fields(TOKENIZER_CONFIG, add_bos_token="false"),
        "add_bos_token must be true or false",
    ),
    "template a number": (
        fields(TOKENIZER_CONFIG, chat_template=5),
        f"{TOKENIZER_CONFIG}: chat_template must be a text or a list of named ones",
    ),
    "templates no objects": (
        fields(TOKENIZER_CONFIG, chat_template=[5]),
        f"{TOKENIZER_CONFIG}: chat templates [], none is 'default'",
    ),
    "template a pipe": (pipe("chat_template.jinja"), "chat_template.jinja: not a regular file but"),
    "template in Latin-1": (content("chat_template.jinja", b"\xe9"), "byte 1 (0xe9) is not UTF-8"),
    "template damaged": (
        content("chat_template.jinja", "\n{% if %}"),
        "chat_template.jinja: chat template, line 2: ",
    ),
    "template too deep": (
        fields(TOKENIZER_CONFIG, chat_template="{{" + "(" * 10**5),
        f"{TOKENIZER_CONFIG}: chat template: nested too deeply",
    ),
    "template that computes too much": (
        fields(TOKENIZER_CONFIG, chat_template="{{ 'a' * 10 ** 10 }}"),
        f"{TOKENIZER_CONFIG}: chat template: more than 1,024 MiB of memory",
    ),
    # The manifest of a converted directory.
    "manifest a pipe": (pipe("manifest.json"), "manifest.json: not a regular file but a named"),
    "manifest deep": (content("manifest.json", DEEP), "manifest.json: cannot be read: nested too"),
    "manifest a list": (content("manifest.json", "[]"), "manifest.json: not a manifest that this"),
    "manifest of many ranks": (
        manifest(layout={"world_size": 10**12, "tp": 10**12, "dp": 1}),
        "manifest.json: its files are not those of 1000000000000 ranks",
    ),
    "manifest of float sizes": (manifest(tensors=tensor(shape=[2.0])), "manifest.json: damaged"),
    "manifest of no dtype": (manifest(tensors=tensor(dtype="F33")), "manifest.json: damaged"),
    "manifest of odd ranks": (manifest(tensors=tensor(shards=[["0"]])), "manifest.json: damaged"),
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Open a directory with each fault, all in one process of bounded time and memory."""
    folders = []
    for number, (make, _) in enumerate(FAULTS.values()):
        folder = tmp_path_factory.mktemp(f"fault{number}-")
        for file in DEMO.iterdir():
            (folder / file.name).symlink_to(file)
        make(folder)
        folders.append(folder)
    script = str(Path(__file__).with_name("open_checkpoint.py"))
    limited = ["prlimit", f"--as={MEMORY_BYTES}"] if shutil.which("prlimit") else []
    done = subprocess.run(
        [*limited, sys.executable, script, *map(str, folders)],
        stdout=subprocess.PIPE,
        env=environment() | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=HANG_SECONDS,
        cwd=ROOT,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(FAULTS, lines, strict=True))


@pytest.mark.parametrize("kind", FAULTS)
def test_a_hostile_file_is_refused_by_name(errors: dict[str, str], kind: str) -> None:
    line = one_line(errors[kind])
    assert FAULTS[kind][1] in line
    assert line.isprintable() and len(line) <= MAX_LINE


def test_unusual_but_valid_headers_are_read(tmp_path: Path) -> None:
    """Metadata of null, and a tensor without values; links as in a hub's cache."""
    for file in DEMO.iterdir():
        (tmp_path / file.name).symlink_to(file)
    header(lambda entries: entries.update(__metadata__=None))(tmp_path)
    another("model.extra.weight", [0, 2**40])(tmp_path)
    script = str(Path(__file__).with_name("open_checkpoint.py"))
    done = run_forked([script, str(tmp_path)])
    assert done.stdout == '""\n', done.stderr


@pytest.mark.parametrize("program", ["generate", "convert"])
def test_names_from_files_reach_no_terminal_as_commands(tmp_path: Path, program: str) -> None:
    name = "\x1b]0;title\x07\x1b[2J\u202e" + "n" * 5000
    for file in DEMO.iterdir():
        (tmp_path / file.name).symlink_to(file)
    header(lambda entries: entries.update({name: entries.pop(A)}))(tmp_path)
    entry_of = json.loads((tmp_path / INDEX).read_text())
    entry_of["weight_map"][name] = entry_of["weight_map"].pop(A)
    content(INDEX, json.dumps(entry_of))(tmp_path)
    (tmp_path / "in.txt").write_text("Hi\n")
    checkpoint = str(tmp_path)
    rows = str(tmp_path / "in.txt")
    out = str(tmp_path / "out")
    commands = {
        "generate": [GENERATE, "--ckpt-path", checkpoint, "--input-file", rows],
        "convert": [CONVERT, "--hf-ckpt-path", checkpoint, "--save-path", out, "--to", "hf"],
    }
    done = run_forked([*commands[program]])
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith("error: ") and "\\x1b]0;title\\x07" in line
    assert line.isprintable() and len(line) <= MAX_LINE + len("error: ")

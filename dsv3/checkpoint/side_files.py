"""Side files of a checkpoint directory, which are not weights: tokenizer, templates, configs."""

import filecmp
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv3.checkpoint.integer_config import integer_config
from dsv3.checkpoint.manifest import MANIFEST
from dsv3.checkpoint.plan import Plan
from dsv3.config_files import hf_config_dict, recast_config_dict
from dsv3.config_hf import text_part
from dsv3.config_quantization import QUANTIZATION_KEYS
from dsv3.errors import CheckpointError
from dsv3.files import new_file
from dsv3.read_files import read_mapping

_WEIGHTS = {".safetensors", ".partial", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}
_FOLDERS = ("encoding",)  # V3.2's conversation format is Python code, kept as documentation
_TOKENIZERS = ("tokenizer.json", "tiktoken.model", "tokenizer.model")
# Files that determine how the model is used; files with other suffixes are for people.
_READ_BY_PROGRAMS = {".json", ".jinja", ".model", ".py", ".tiktoken", ".yaml", ".yml"}
# Files among these that programs look for by name, without a reference in another file.
_FOUND_BY_NAME = re.compile(
    r".*\.(jinja|model|tiktoken)"
    r"|(.*_)?(config|tokenizer|vocab|tokens|tokens_map|template)\.json"
)

Content = Path | bytes  # a file to copy, or the bytes to write


def has_tokenizer(folder: Path) -> bool:
    """Return True if a directory has a tokenizer in a supported format."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def is_document(name: str) -> bool:
    """Return True if a side file is for people: a model card, a license, a picture."""
    return Path(name).suffix not in _READ_BY_PROGRAMS


def side_files(source: Path, plan: Plan) -> Mapping[str, Content]:
    """Return the contents of all side files by their path within the directory.

    They are the source's, except for a config.json that does not describe the output: for cast
    weights, or the text part of a multi-modal model, it is adjusted.
    """
    files: dict[str, Content] = {str(path.relative_to(source)): path for path in _files(source)}
    config = source / "config.json"
    if not config.is_file():
        data = hf_config_dict(plan.config)
        integers = None if plan.config.integers is None else integer_config(plan)
        files["config.json"] = _json(recast_config_dict(data, plan.config.quantization, integers))
        return files
    stated = read_mapping(config, CheckpointError)
    data = dict(text_part(stated, str(config)))
    is_described = not plan.is_cast and _describes_quantization(data, plan)
    if data == stated and is_described:
        return files
    if plan.config.integers is not None:
        integers = data["quantization_config"] if is_described else integer_config(plan)
        files["config.json"] = _json(recast_config_dict(data, None, integers))
    else:
        files["config.json"] = _json(recast_config_dict(data, plan.config.quantization))
    return files


def _describes_quantization(data: dict[str, Any], plan: Plan) -> bool:
    """Return True if config.json describes the quantization of the weights to be written."""
    stated = [data[key] for key in QUANTIZATION_KEYS if data.get(key) is not None]
    methods = [part.method for part in (plan.config.integers,) if part is not None]
    methods = methods or ["fp8"] * (plan.config.quantization is not None)
    if not methods or not stated:
        return not methods and not stated
    return isinstance(stated[0], dict) and stated[0].get("quant_method") in methods


def side_folders(source: Path) -> list[Path]:
    """Return the directories of a checkpoint whose files are side files."""
    return [source, *(source / name for name in _FOLDERS if (source / name).is_dir())]


def _files(source: Path) -> Iterator[Path]:
    for folder in side_folders(source):
        for file in sorted(folder.iterdir()):
            weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
            if file.is_file() and not weights and file.name[0] != "." and file.name != MANIFEST:
                yield file


def is_content(path: Path, content: Content) -> bool:
    """Return True if a file already has this content."""
    if not path.is_file():
        return False
    if isinstance(content, bytes):
        return path.stat().st_size == len(content) and path.read_bytes() == content
    return path.samefile(content) or filecmp.cmp(path, content, shallow=False)


def differing_files(folder: Path, sides: Mapping[str, Content]) -> list[str]:
    """Return the files in a directory that differ from `sides`.

    A file differs if it has other contents, or if programs find it by name and `sides` lacks it.
    """
    changed = [
        name
        for name, content in sides.items()
        if os.path.lexists(folder / name) and not is_content(folder / name, content)
    ]
    names = (str(path.relative_to(folder)) for path in _files(folder))
    return changed + [n for n in names if n not in sides and _FOUND_BY_NAME.fullmatch(n)]


def content_bytes(content: Content) -> int:
    """Return the size of a content in bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def write_content(path: Path, content: Content) -> None:
    """Write a new file and wait until it is on disk."""
    with new_file(path) as target:
        if isinstance(content, bytes):
            target.write(content)
            return
        with content.open("rb") as source:
            shutil.copyfileobj(source, target)


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()

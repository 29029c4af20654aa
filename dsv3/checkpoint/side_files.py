"""Everything of a checkpoint directory that is not weights: tokenizer, templates, configs."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3.checkpoint.manifest import MANIFEST
from dsv3.checkpoint.plan import Plan
from dsv3.checkpoint.source import INDEX
from dsv3.config_files import hf_config_dict, recast_config_dict
from dsv3.config_hf import text_part
from dsv3.config_quantization import QUANTIZATION_KEYS
from dsv3.errors import CheckpointError
from dsv3.read_files import read_mapping

_WEIGHTS = {".safetensors", ".partial", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}
_FOLDERS = ("encoding",)  # V3.2's conversation format is Python code, kept as documentation
_TOKENIZERS = ("tokenizer.json", "tiktoken.model", "tokenizer.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory holds any tokenizer that is read."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def copy_side_files(source: Path, target: Path, plan: Plan) -> None:
    """Copy every file that is not weights.

    config.json is adjusted where it does not describe what is written: cast weights, or the text
    model alone.
    """
    for file in _side_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    config = source / "config.json"
    if not config.is_file():
        _write_json(target / "config.json", hf_config_dict(plan.config))
        return
    stated = read_mapping(config, CheckpointError)
    data = dict(text_part(stated, str(config)))
    if plan.is_cast or data != stated or not _describes_quantization(data, plan):
        _write_json(target / "config.json", recast_config_dict(data, plan.config.quantization))


def _describes_quantization(data: dict[str, Any], plan: Plan) -> bool:
    """Return True if config.json describes the quantization of the weights to be written."""
    stated = [data[key] for key in QUANTIZATION_KEYS if data.get(key) is not None]
    if plan.config.quantization is None or not stated:
        return plan.config.quantization is None and not stated
    return isinstance(stated[0], dict) and stated[0].get("quant_method") == "fp8"


def _side_files(source: Path) -> Iterator[Path]:
    folders = [source, *(source / name for name in _FOLDERS if (source / name).is_dir())]
    for folder in folders:
        for file in sorted(folder.iterdir()):
            weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
            if file.is_file() and not weights and file.name[0] != "." and file.name != MANIFEST:
                yield file


def write_index(target: Path, plan: Plan) -> None:
    """Write the index of a Hugging Face directory; with it the directory is complete."""
    total = sum(output.num_bytes for output in plan.tensors.values())
    files = {name: plan.files[output.slots[0].file].name for name, output in plan.tensors.items()}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    write_atomically(target / INDEX, json.dumps(index, indent=2) + "\n")


def write_atomically(file: Path, text: str) -> None:
    """Write a file that is either wholly there, on disk, or not at all."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

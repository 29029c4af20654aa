"""Reading slices of every kind of directory, and refusing damaged ones in one line."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from dsv3.checkpoint import reader
from dsv3.checkpoint.check import check_tensors
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.directory import INDEX
from dsv3.checkpoint.names import weight_name
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.safetensors_file import DTYPE_BYTES, make_header, read_header
from dsv3.checkpoint.sharding import Split, tensor_region, tensor_specs
from dsv3.checkpoint.source import open_source
from dsv3.config import ParallelConfig, split_range
from dsv3.errors import CheckpointError, ConfigError
from tests.checkpoint_files import (
    FP8,
    TINY,
    Tensors,
    random_tensors,
    to_deepseek,
    write_file,
    write_hf,
)

CONFIG = dataclasses.replace(TINY, quantization=FP8)
# Sizes that DeepSeek's converter can split in two: even, also in scales.
EVEN = dataclasses.replace(
    CONFIG,
    num_attention_heads=16,
    vocab_size=330,
    intermediate_size=512,
    moe_intermediate_size=256,
)
SECOND = "model-00002-of-00003.safetensors"


def write_deepseek(path: Path, tensors: Tensors, world: int) -> Path:
    """A directory in the format of DeepSeek's convert.py: equal slices, other names, no config."""
    specs = tensor_specs(EVEN)
    path.mkdir()
    for rank in range(world):
        part: Tensors = {}
        for name, (dtype, shape, data) in tensors.items():
            spec = specs.get(name) or specs[weight_name(name) or ""]
            dim = {Split.ROWS: 0, Split.COLS: 1}.get(spec.split)
            values = np.frombuffer(data, np.uint8).reshape(*shape, DTYPE_BYTES[dtype])
            if dim is not None:
                assert shape[dim] % world == 0, (name, shape)
                values = np.split(values, world, dim)[rank]
            if spec.expert is None or spec.expert // (spec.num_experts // world) == rank:
                part[to_deepseek(name)] = dtype, values.shape[:-1], values.tobytes()
        write_file(path / f"model{rank}-mp{world}.safetensors", part)
    return path


def assert_slices_equal(source: Source, tensors: Tensors) -> None:
    """Whole tensors, and slices that begin and end anywhere."""
    for name, (dtype, shape, data) in tensors.items():
        values = np.frombuffer(data, np.uint8).reshape(*shape, DTYPE_BYTES[dtype])
        assert bytes(source.read(name)) == data, name
        region = tuple(split_range(size, 3, 1) for size in shape)
        part = values[tuple(slice(*bounds) for bounds in region)]
        out = np.zeros(part.nbytes, np.uint8)
        source.read(name, region, out.data)
        assert out.tobytes() == part.tobytes(), (name, region)


def test_hugging_face_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_STAGING_BYTES", 1000)  # many blocks, the last one short
    tensors = random_tensors(CONFIG)
    with open_source(write_hf(tmp_path, CONFIG, tensors)) as source:
        assert_slices_equal(source, tensors)


def test_single_file(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    write_hf(tmp_path, TINY, tensors, files=1)
    (tmp_path / INDEX).unlink()
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / "model.safetensors")
    with open_source(tmp_path) as source:
        assert_slices_equal(source, tensors)


def test_deepseek_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_STAGING_BYTES", 1000)
    tensors = random_tensors(EVEN)
    path = write_deepseek(tmp_path / "mp2", tensors, 2)
    with open_source(path, EVEN) as source:
        assert check_tensors(source) == ()
        assert_slices_equal(source, tensors)
    with pytest.raises(ConfigError, match=r"no config.json; give .* with --config"):
        open_source(path)
    (path / "model1-mp2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model1-mp2.safetensors: missing"):
        open_source(path, EVEN)


def test_converted_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of any other layout, out of pieces that cut blocks and share scales."""
    monkeypatch.setattr(reader, "_STAGING_BYTES", 1000)
    tensors = random_tensors(CONFIG)
    with open_source(write_hf(tmp_path / "hf", CONFIG, tensors)) as source:
        plan = make_plan(source, ParallelConfig(world_size=8, dp=2))
        convert(source, plan, tmp_path / "mp8", workers=1)
    with open_source(tmp_path / "mp8") as source:
        assert check_tensors(source) == ()
        assert_slices_equal(source, tensors)


def test_a_share_of_a_converted_directory(tmp_path: Path) -> None:
    """A host may hold the files of its own ranks only; the files of other ranks may be missing."""
    with open_source(write_hf(tmp_path / "hf", CONFIG, random_tensors(CONFIG))) as source:
        layout = ParallelConfig(world_size=2)
        convert(source, make_plan(source, layout), tmp_path / "mp2", workers=1)
    lost = tmp_path / "mp2" / "model0-mp2.safetensors"
    lost.unlink()
    with pytest.raises(CheckpointError, match=r"missing, but manifest\.json names it"):
        open_source(tmp_path / "mp2")
    with open_source(tmp_path / "mp2", is_share=True) as source:
        check_tensors(source)
        specs, own = tensor_specs(CONFIG), dataclasses.replace(layout, rank=1)
        for name, info in source.tensors.items():
            region = tensor_region(specs, name, info.shape, own)
            if region is not None:
                source.read(name, region)
        with pytest.raises(CheckpointError, match=f"{lost}: missing, and this rank reads it"):
            source.read("lm_head.weight")
    (tmp_path / "mp2" / "model1-mp2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing, but manifest\.json names it"):
        open_source(tmp_path / "mp2", is_share=True)


def test_headers_are_aligned_and_read_back(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    tensors: Tensors = {
        "a": ("F8_E4M3", (3,), b"abc"),
        "b": ("BF16", (2, 0), b""),
        "c": ("F32", (1,), b"defg"),
    }
    write_file(tmp_path / "x.safetensors", tensors)
    entries = read_header(tmp_path / "x.safetensors").entries
    assert {name: e.shape for name, e in entries.items()} == {"a": (3,), "b": (2, 0), "c": (1,)}
    assert all(entry.offset % DTYPE_BYTES[entry.dtype] == 0 for entry in entries.values())
    assert list(make_header([(n, t[0], t[1]) for n, t in tensors.items()])[1]) == ["c", "b", "a"]
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        assert sorted(file.keys()) == ["a", "b", "c"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf", CONFIG, random_tensors(CONFIG))


def refused(path: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        open_source(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(checkpoint: Path) -> None:
    (checkpoint / SECOND).unlink()
    refused(checkpoint, f"{SECOND}: missing, but {INDEX} names it")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(checkpoint: Path, keep: int) -> None:
    data = (checkpoint / SECOND).read_bytes()
    (checkpoint / SECOND).write_bytes(data[:keep])
    refused(checkpoint, rf"{SECOND}: .*truncated")


def test_file_cut_after_opening(checkpoint: Path) -> None:
    with open_source(checkpoint) as source:
        name = next(n for n, info in source.tensors.items() if info.pieces[0].file.name == SECOND)
        (checkpoint / SECOND).write_bytes(b"")
        with pytest.raises(CheckpointError, match=rf"{SECOND}: ends at byte"):
            source.read(name)


def test_file_replaced_after_opening(checkpoint: Path) -> None:
    """Another conversion may come between: old places in new bytes would be wrong weights."""
    with open_source(checkpoint) as source:
        name = next(n for n, info in source.tensors.items() if info.pieces[0].file.name == SECOND)
        data = (checkpoint / SECOND).read_bytes()
        (checkpoint / "new").write_bytes(data)
        os.utime(checkpoint / "new", ns=(0, 0))
        (checkpoint / "new").replace(checkpoint / SECOND)
        with pytest.raises(CheckpointError, match=rf"{SECOND}: was changed while the checkpoint"):
            source.read(name)


@pytest.mark.parametrize("text", ["{}", "[1", '{"a": 3}', '{"a": {"dtype": "F32"}}'])
def test_damaged_header(checkpoint: Path, text: str) -> None:
    (checkpoint / SECOND).write_bytes(len(text).to_bytes(8, "little") + text.encode())
    refused(checkpoint, f"{SECOND}: ")


def test_index_faults(checkpoint: Path) -> None:
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = SECOND
    (checkpoint / INDEX).write_text(json.dumps(index))
    refused(checkpoint, f"{SECOND}: tensor model.extra.weight is missing, but {INDEX} names it")
    index["weight_map"]["model.extra.weight"] = "../other.safetensors"
    (checkpoint / INDEX).write_text(json.dumps(index))
    refused(checkpoint, f"{INDEX}: not an index")
    (checkpoint / INDEX).unlink()
    refused(checkpoint, f"{INDEX} is missing")


def test_other_directories(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such directory")
    (tmp_path / "config.json").write_text(
        (write_hf(tmp_path / "a", TINY, {}) / "config.json").read_text()
    )
    refused(tmp_path, "no .safetensors files here")


def test_config_that_contradicts(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="hidden_size=320, but --config says 321"):
        open_source(checkpoint, dataclasses.replace(CONFIG, hidden_size=321))


def test_a_given_config_that_computes_otherwise_is_named(checkpoint: Path) -> None:
    given = dataclasses.replace(CONFIG, rope_scaling=None, rms_norm_eps=1e-5)
    with open_source(checkpoint, given) as source:
        assert source.config.rope_scaling == CONFIG.rope_scaling
        assert source.config.warning == (
            "config.json decides, although --config has another rope_scaling, rms_norm_eps"
        )
    with open_source(checkpoint, CONFIG) as source:
        assert source.config.warning == ""

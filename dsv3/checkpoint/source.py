"""Open a checkpoint directory of any kind as a `Source`.

Known are Hugging Face's (an index over several files, or one file), those that our converter
writes (a file per rank and a manifest), and those that DeepSeek's own converter writes (a file per
rank, its own tensor names, equal slices).
"""

import os
import re
from dataclasses import fields
from pathlib import Path

from dsv3.checkpoint.digest import file_digest
from dsv3.checkpoint.manifest import DIGEST_KEY, MANIFEST, read_manifest
from dsv3.checkpoint.names import from_deepseek, weight_name
from dsv3.checkpoint.reader import Piece, Source, TensorInfo
from dsv3.checkpoint.region import region_shape, whole
from dsv3.checkpoint.safetensors_file import Entry, read_header
from dsv3.checkpoint.sharding import Split, TensorSpec, tensor_specs
from dsv3.config import ModelConfig
from dsv3.config_files import load_model_config
from dsv3.errors import CheckpointError, ConfigError, shorten
from dsv3.read_files import TABLE_BYTES, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LONGEST_NAME = 255  # bytes, on every file system that holds checkpoints
_RANK_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
# Sizes that DeepSeek's own config files do not tell, or tell in another way.
_MAY_DIFFER = {"bos_token_id", "max_position_embeddings", "num_nextn_predict_layers"}


def open_source(
    path: str | Path, config: ModelConfig | None = None, is_share: bool = False
) -> Source:
    """Open a checkpoint directory; read its headers, but no tensor.

    Args:
        path: the directory.
        config: what the model is. Needed where the directory has no config.json; elsewhere held
            against it.
        is_share: a directory of ours may hold the files of some ranks only; what is read must be
            in them.

    Raises:
        CheckpointError: a file is missing, truncated or of unknown kind.
        ConfigError: the model is not supported, or `config` contradicts config.json.
    """
    path = Path(path)
    if not os.path.isdir(path):  # unlike Path.is_dir, of any name
        raise CheckpointError(f"{path}: no such directory")
    config = _config(path, config)
    if os.path.lexists(path / MANIFEST):
        return Source(path, config, _converted(path, is_share))
    if os.path.lexists(path / INDEX):
        return Source(path, config, _indexed(path))
    if os.path.lexists(path / SINGLE):
        file = path / SINGLE
        entries = read_header(file).entries.items()
        return Source(path, config, {n: _whole_tensor(n, entry, file) for n, entry in entries})
    if any(_RANK_FILE.fullmatch(file.name) for file in path.iterdir()):
        return Source(path, config, _deepseek(path, config))
    if any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path}: {INDEX} is missing; without it a lost file goes unseen")
    raise CheckpointError(f"{path}: no .safetensors files here (other formats are not read)")


def _config(path: Path, given: ModelConfig | None) -> ModelConfig:
    """The directory's own config, which `given` may not contradict."""
    if given is not None and not (path / "config.json").is_file():
        return given
    own = load_model_config(path)
    if given is None:
        return own
    for field in fields(ModelConfig):
        have, want = getattr(own, field.name), getattr(given, field.name)
        is_size = field.type in (int, int | None) and field.name not in _MAY_DIFFER
        if is_size and have != want:
            where = path / "config.json"
            raise ConfigError(f"{where}: {field.name}={have}, but --config says {want}")
    return own


def _whole_tensor(name: str, entry: Entry, file: Path) -> TensorInfo:
    piece = Piece(file, entry.offset, whole(entry.shape))
    return TensorInfo(name, entry.dtype, entry.shape, (piece,))


def _indexed(path: Path) -> dict[str, TensorInfo]:
    weight_map = _read_index(path / INDEX)
    headers: dict[str, dict[str, Entry]] = {}
    tensors = {}
    for name, file_name in weight_map.items():
        file = path / file_name
        if file_name not in headers:
            if not os.path.isfile(file):
                raise CheckpointError(f"{file}: missing, but {INDEX} names it (tensor {name})")
            headers[file_name] = read_header(file).entries
        entry = headers[file_name].get(name)
        if entry is None:
            raise CheckpointError(f"{file}: tensor {name} is missing, but {INDEX} names it")
        tensors[name] = _whole_tensor(name, entry, file)
    return tensors


def _read_index(file: Path) -> dict[str, str]:
    index = read_json(file, CheckpointError, TABLE_BYTES, unique_keys=True)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{file}: not an index of tensor names to file names; fetch it again")
    for tensor, name in weight_map.items():
        if not _is_file_name(name):
            raise CheckpointError(
                f"{file}: not an index of tensor names to file names ({shorten(tensor)} is in no "
                "file of this directory); fetch it again"
            )
    return weight_map


def _is_file_name(name: object) -> bool:
    """Return True if a file of a directory can have this name."""
    if not isinstance(name, str) or name in ("", "..") or "\0" in name or Path(name).name != name:
        return False
    return len(name.encode(errors="surrogatepass")) <= _LONGEST_NAME


def _converted(path: Path, is_share: bool) -> dict[str, TensorInfo]:
    """A directory of ours; each file must be the one that the manifest was written for."""
    manifest = read_manifest(path)
    shards = {(name, s.rank): s for name, r in manifest.tensors.items() for s in r.shards}
    pieces: dict[str, list[Piece]] = {name: [] for name in manifest.tensors}
    absent = []
    for rank, record in enumerate(manifest.files):
        file = path / record.name
        if not file.is_file():
            absent.append((rank, file))
            if is_share and len(absent) < len(manifest.files):
                continue
            raise CheckpointError(f"{file}: missing, but {MANIFEST} names it")
        header = read_header(file)
        digests = []
        for name, entry in header.entries.items():
            shard = shards.get((name, rank))
            is_same = shard is not None and manifest.tensors[name].dtype == entry.dtype
            if shard is None or not is_same or region_shape(shard.region) != entry.shape:
                raise CheckpointError(f"{file}: tensor {name} is not as {MANIFEST} tells")
            digests.append(shard.digest)
            pieces[name].append(Piece(file, entry.offset, shard.region, shard.digest))
        if (
            header.metadata.get(DIGEST_KEY) != manifest.model_digest
            or header.file_bytes != record.num_bytes
            or file_digest(header.prefix, digests) != record.digest
        ):
            raise CheckpointError(f"{file}: not the file that {MANIFEST} was written for")
    for rank, file in absent:  # behind those that are there: a copy of a slice will do
        for name, tensor in manifest.tensors.items():
            pieces[name] += [Piece(file, 0, s.region) for s in tensor.shards if s.rank == rank]
    return {
        name: TensorInfo(name, r.dtype, r.shape, tuple(pieces[name]), r.digest)
        for name, r in manifest.tensors.items()
    }


def _deepseek(path: Path, config: ModelConfig) -> dict[str, TensorInfo]:
    """A directory made by DeepSeek's converter: slices lie end to end in rank order."""
    files = _rank_files(path)
    specs = tensor_specs(config)
    held: dict[str, list[tuple[Path, Entry]]] = {}
    for file in files:
        for theirs, entry in read_header(file).entries.items():
            if theirs.startswith(("model.", "lm_head.")):
                raise CheckpointError(
                    f"{path}: an unfinished conversion (no manifest.json); run convert.py again"
                )
            held.setdefault(from_deepseek(theirs), []).append((file, entry))
    return {name: _join(name, specs, entries) for name, entries in held.items()}


def _rank_files(path: Path) -> list[Path]:
    matches = [m for file in sorted(path.iterdir()) if (m := _RANK_FILE.fullmatch(file.name))]
    worlds = {int(match[2]) for match in matches}
    if len(worlds) > 1:
        raise CheckpointError(f"{path}: files of several conversions (mp {sorted(worlds)})")
    world = worlds.pop()
    files = [path / f"model{rank}-mp{world}.safetensors" for rank in range(world)]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; the directory needs {world} rank files")
    return files


def _join(name: str, specs: dict[str, TensorSpec], entries: list[tuple[Path, Entry]]) -> TensorInfo:
    """One tensor from the slices in the rank files."""
    spec = specs.get(name) or specs.get(weight_name(name) or "")
    first = entries[0][1]
    if spec is None or spec.split not in (Split.ROWS, Split.COLS):
        pieces = tuple(Piece(file, entry.offset, whole(entry.shape)) for file, entry in entries)
        return TensorInfo(name, first.dtype, first.shape, pieces)
    dim = 0 if spec.split is Split.ROWS else 1
    joined, start = [], 0
    for file, entry in entries:
        region = list(whole(entry.shape))
        region[dim] = (start, start + entry.shape[dim])
        start = region[dim][1]
        joined.append(Piece(file, entry.offset, tuple(region)))
    shape = (*first.shape[:dim], start, *first.shape[dim + 1 :])
    return TensorInfo(name, first.dtype, shape, tuple(joined))

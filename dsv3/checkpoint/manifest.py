"""`manifest.json`: the contents of a converted directory; written last, once all files are there.

The manifest has the layout, every file with its size, and every tensor with its type, shape, digest
and slices. The digest of a tensor covers its bytes as one row-major whole, and
`model_digest` covers these digests, so both are the same in every layout. There are no paths and no
dates: the same weights in the same layout have the same manifest.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.checkpoint.region import Region, whole
from dsv3.checkpoint.safetensors_file import DTYPE_BYTES
from dsv3.config import ParallelConfig
from dsv3.errors import CheckpointError
from dsv3.read_files import TABLE_BYTES, read_json

MANIFEST = "manifest.json"
DIGEST_KEY = "model_digest"  # in the metadata of every file, so that files cannot be mixed
_FORMAT = "dsv3-checkpoint"
_VERSION = 2
_VERSIONS = (1, _VERSION)  # version 1 also has a digest of each file, which is not needed


@dataclass(frozen=True, slots=True)
class Shard:
    """The slice of a tensor that one rank's file holds."""

    rank: int
    region: Region
    digest: str


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor of the model and its slices."""

    dtype: str
    shape: tuple[int, ...]
    digest: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """The file of one rank."""

    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a converted directory; files in rank order, tensors in canonical order."""

    layout: ParallelConfig
    files: tuple[FileRecord, ...]
    tensors: Mapping[str, TensorRecord]
    model_digest: str

    def to_json(self) -> str:
        """Return the text of the file, with one line per tensor."""
        layout = {name: getattr(self.layout, name) for name in ("world_size", "tp", "dp")}
        head = {
            "format": _FORMAT,
            "version": _VERSION,
            "layout": layout,
            DIGEST_KEY: self.model_digest,
        }
        files = [json.dumps({"name": file.name, "bytes": file.num_bytes}) for file in self.files]
        tensors = [
            f"{json.dumps(name)}: {json.dumps(_record_json(record))}"
            for name, record in self.tensors.items()
        ]
        return (
            json.dumps(head, indent=1)[:-2]
            + ',\n "files": [\n  '
            + ",\n  ".join(files)
            + '\n ],\n "tensors": {\n  '
            + ",\n  ".join(tensors)
            + "\n }\n}\n"
        )


def is_manifest(file: Path) -> bool:
    """Return True if a file begins like the output of `Manifest.to_json`."""
    begin = (json.dumps({"format": _FORMAT}, indent=1)[:-2]).encode()
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(begin)) == begin


def rank_file(rank: int, world_size: int) -> str:
    """Return the name of a rank's file, the same as in DeepSeek's converter."""
    return f"model{rank}-mp{world_size}.safetensors"


def read_manifest(path: Path) -> Manifest:
    """Read a directory's manifest.

    Raises:
        CheckpointError: the manifest is damaged, or of another program or version.
    """
    file = path / MANIFEST
    data = read_json(file, CheckpointError, TABLE_BYTES, unique_keys=True)
    kind = {key: data.get(key) for key in ("format", "version")} if isinstance(data, dict) else None
    if kind not in [{"format": _FORMAT, "version": version} for version in _VERSIONS]:
        raise CheckpointError(f"{file}: not a manifest that this version reads ({kind})")
    try:
        layout = ParallelConfig(**data["layout"])
        files = tuple(FileRecord(_text(f["name"]), _size(f["bytes"])) for f in data["files"])
        tensors = {name: _record(item) for name, item in data["tensors"].items()}
        manifest = Manifest(layout, files, tensors, _text(data[DIGEST_KEY]))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{file}: damaged ({reason}); convert again") from None
    names = [rank_file(rank, len(files)) for rank in range(len(files))]
    if len(files) != layout.world_size or [f.name for f in files] != names:
        raise CheckpointError(f"{file}: its files are not those of {layout.world_size} ranks")
    return manifest


def _record_json(record: TensorRecord) -> dict[str, Any]:
    """Return a tensor's JSON; a shard is [rank] if it is the whole, else [rank, region, digest]."""
    everything = whole(record.shape)
    shards = [
        [s.rank] if s.region == everything else [s.rank, s.region, s.digest] for s in record.shards
    ]
    return {
        "dtype": record.dtype,
        "shape": record.shape,
        "digest": record.digest,
        "shards": shards,
    }


def _record(item: Mapping[str, Any]) -> TensorRecord:
    shape = tuple(map(_size, item["shape"]))
    digest = _text(item["digest"])
    shards = tuple(
        Shard(_size(s[0]), whole(shape), digest)
        if len(s) == 1
        else Shard(_size(s[0]), tuple((_size(a), _size(b)) for a, b in s[1]), _text(s[2]))
        for s in item["shards"]
    )
    dtype = _text(item["dtype"])
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype} is unknown")
    return TensorRecord(dtype, shape, digest, shards)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise TypeError(f"{type(value).__name__} in the place of a text")


def _size(value: object) -> int:
    if type(value) is int and value >= 0:
        return value
    raise TypeError(f"{type(value).__name__} in the place of a size")

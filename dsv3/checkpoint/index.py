"""`model.safetensors.index.json`: the file of every tensor of a Hugging Face directory.

An index that our converter wrote also has digests in its metadata, as a manifest does: one of each
tensor's bytes, and one of all. Other programs ignore them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dsv3.checkpoint.manifest import DIGEST_KEY
from dsv3.errors import CheckpointError, shorten
from dsv3.read_files import TABLE_BYTES, read_json

_DIGESTS = "tensor_digests"
# Longest name and path in bytes that every common file system allows.
_LONGEST_NAME = 255
_LONGEST_PATH = 3000


@dataclass(frozen=True, slots=True)
class IndexDigests:
    """Digests of each tensor's bytes, and one over these, names, types and shapes."""

    tensors: Mapping[str, str]
    model_digest: str


def index_json(files: Mapping[str, str], total_size: int, digests: IndexDigests) -> str:
    """Return the text of an index.

    Args:
        files: file name of each tensor.
        total_size: bytes of all tensors.
        digests: digests of the same tensors.
    """
    metadata = {
        "total_size": total_size,
        DIGEST_KEY: digests.model_digest,
        _DIGESTS: dict(sorted(digests.tensors.items())),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(files.items()))}
    return json.dumps(index, indent=2) + "\n"


def read_index(file: Path) -> dict[str, str]:
    """Return the file of each tensor, as a path inside the directory."""
    weight_map = _read(file).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{file}: not an index of tensor names to file names; fetch it again")
    for tensor, name in weight_map.items():
        if not _is_inside(name):
            raise CheckpointError(
                f"{file}: not an index of tensor names to files in its directory "
                f"({shorten(tensor)} is in none); fetch it again"
            )
    return {tensor: str(PurePosixPath(name)) for tensor, name in weight_map.items()}


def read_digests(file: Path) -> IndexDigests | None:
    """Return the digests in an index; None if it holds none."""
    metadata = _read(file).get("metadata")
    if not isinstance(metadata, dict) or _DIGESTS not in metadata:
        return None
    tensors = metadata[_DIGESTS]
    whole = metadata.get(DIGEST_KEY)
    are_texts = isinstance(tensors, dict) and all(isinstance(d, str) for d in tensors.values())
    if not are_texts or not isinstance(whole, str):
        raise CheckpointError(f"{file}: its {_DIGESTS} are damaged; convert again")
    return IndexDigests(tensors, whole)


def _read(file: Path) -> dict[str, Any]:
    index = read_json(file, CheckpointError, TABLE_BYTES, unique_keys=True)
    if not isinstance(index, dict):
        raise CheckpointError(f"{file}: not an index of tensor names to file names; fetch it again")
    return index


def _is_inside(name: object) -> bool:
    """Return True if a file in a directory can have this path."""
    if not isinstance(name, str) or "\0" in name:
        return False
    path = PurePosixPath(name)
    is_below = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    sizes = [len(part.encode(errors="surrogatepass")) for part in path.parts]
    return is_below and max(sizes) <= _LONGEST_NAME and sum(sizes) <= _LONGEST_PATH

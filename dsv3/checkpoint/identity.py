"""The identity of a model's weights, which does not depend on how a checkpoint stores them.

It is the same for all layouts and world sizes, so pages and answers of a model are recognized after
a conversion. Three values differ in how much they read:

- `model_digest` covers every byte. The converter writes it into manifest or index, and ranks that
  read converted directories compare it.
- `model_identity` samples every tensor, and several ranks can read a part each. Stored pages are
  named by it, and ranks that read different directories compare it.
- `model_fingerprint` is read by rank 0 alone, before loading, so it samples less, and only tensors
  and values in the file of rank 0. Results of a batch hold it.
"""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from dsv3.checkpoint.names import weight_name
from dsv3.checkpoint.reader import Source

# Values of each weight and each scale tensor in a fingerprint: all are in the file of rank 0.
_FIRST_VALUES = 16
_FIRST_SCALES = 1
_SMALL_BYTES = 1 << 28  # a model of at most this size is read completely
_SPOTS = 4  # places of each tensor in the identity of a larger model
_SPOT_VALUES = 256


def model_digest(tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """Return the SHA-256 over (name, dtype, shape, digest) of all tensors, sorted by name."""
    lines = sorted(f"{name} {dtype} {list(shape)} {d}\n" for name, dtype, shape, d in tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def model_fingerprint(source: Source, numerics: str) -> str:
    """Return a short name of weights and numerics, for the results of batches.

    It covers name, type, shape and first values of all tensors (of routed experts, only the first
    of each layer): training or quantizing a model changes some of them.

    Args:
        source: the checkpoint.
        numerics: the compute dtype and other numeric settings, such as "float32".
    """
    digest = hashlib.sha256(f"{numerics} {source.config}".encode())
    for name in sorted(source.tensors):
        if ".experts." in name and ".experts.0." not in name:
            continue
        info = source.tensors[name]
        first = tuple((0, min(1, size)) for size in info.shape[:-1])
        count = _FIRST_VALUES if weight_name(name) is None else _FIRST_SCALES
        last = tuple((0, min(count, size)) for size in info.shape[-1:])
        digest.update(f"{name} {info.dtype} {info.shape}".encode())
        digest.update(source.read(name, first + last))
    return f"dsv3-{digest.hexdigest()[:12]}"


def model_identity(
    source: Source, part: int = 0, num_parts: int = 1, advance: Callable[[], None] = lambda: None
) -> int:
    """Return a part of the 128-bit identity of all weights; the XOR of all parts is the identity.

    For a model above 256 MiB, it covers name, type and shape of each tensor and values at four
    places in it, since reading all bytes again would double the load time. It detects training, but
    may miss a single value changed by hand.

    Args:
        source: the checkpoint.
        part: which part of the tensors to read.
        num_parts: number of parts, if several ranks read one each.
        advance: called after each tensor.
    """
    names = islice(sorted(source.tensors), part, None, num_parts)
    is_small = source.num_bytes <= _SMALL_BYTES
    identity = 0
    with ThreadPoolExecutor(8) as pool:
        for digest in pool.map(lambda name: _digest_tensor(source, name, is_small), names):
            identity ^= int.from_bytes(digest, "big")
            advance()
    return identity


def _digest_tensor(source: Source, name: str, is_small: bool) -> bytes:
    info = source.tensors[name]
    digest = hashlib.blake2b(f"{name} {info.dtype} {info.shape}".encode(), digest_size=16)
    if is_small:
        digest.update(source.read(name))
        return digest.digest()
    *rows, width = info.shape or (1,)
    for spot in range(_SPOTS):
        positions = [(size - 1) * spot // (_SPOTS - 1) for size in rows]
        row = tuple((position, position + 1) for position in positions)
        start = max(0, width - _SPOT_VALUES) * spot // (_SPOTS - 1)
        digest.update(source.read(name, (*row, (start, min(width, start + _SPOT_VALUES)))))
    return digest.digest()

"""Tell models apart without reading them whole."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from dsv3.checkpoint.names import weight_name
from dsv3.checkpoint.reader import Source

_FIRST, _FIRST_SCALES = 16, 1  # values of each tensor, few enough to be in the file of rank 0
_VALUES = 256  # of each tensor
_WHOLE = 1 << 28  # a model of so few bytes is digested whole
_SPOTS = 4  # of each tensor of a larger one


def fingerprint(source: Source, numerics: str) -> str:
    """Name weights and numerics in a few characters; the same for every layout of a checkpoint.

    Covers name, type, shape and first values of all tensors (of routed experts, those of every
    layer's first): training or quantizing a model changes some of them.

    Args:
        source: the checkpoint.
        numerics: how it is computed with, such as "float32".
    """
    digest = hashlib.sha256(f"{numerics} {source.config}".encode())
    for name in sorted(source.tensors):
        if ".experts." in name and ".experts.0." not in name:
            continue
        info = source.tensors[name]
        first = tuple((0, min(1, size)) for size in info.shape[:-1])
        count = _FIRST if weight_name(name) is None else _FIRST_SCALES
        last = tuple((0, min(count, size)) for size in info.shape[-1:])
        digest.update(f"{name} {info.dtype} {info.shape}".encode())
        digest.update(source.read(name, first + last))
    return f"dsv3-{digest.hexdigest()[:12]}"


def digest_share(
    source: Source, rank: int, world_size: int, advance: Callable[[], None] = lambda: None
) -> bytes:
    """Return a rank's share of a digest of all weights; the shares XORed are the digest.

    The same for every layout of a checkpoint and every world size. Of a model of more than 256 MiB,
    it covers name, type and shape of every tensor, and values from four places of it: reading
    everything twice would double the time to load. Weights that were trained differ in them; one
    that was changed by hand in a single value may not. `advance` is called after every tensor.
    """
    names = islice(sorted(source.tensors), rank, None, world_size)
    is_small = source.num_bytes <= _WHOLE
    with ThreadPoolExecutor(8) as pool:
        digests = pool.map(lambda name: _digest_tensor(source, name, is_small), names)
        share = 0
        for digest in digests:
            share ^= int.from_bytes(digest, "big")
            advance()
    return share.to_bytes(16, "big")


def _digest_tensor(source: Source, name: str, is_small: bool) -> bytes:
    info = source.tensors[name]
    digest = hashlib.blake2b(f"{name} {info.dtype} {info.shape}".encode(), digest_size=16)
    if is_small:
        digest.update(source.read(name))
        return digest.digest()
    *rows, width = info.shape or (1,)
    for spot in range(_SPOTS):
        row = tuple((at, at + 1) for at in ((size - 1) * spot // (_SPOTS - 1) for size in rows))
        start = max(0, width - _VALUES) * spot // (_SPOTS - 1)
        digest.update(source.read(name, (*row, (start, min(width, start + _VALUES)))))
    return digest.digest()

"""Tell models apart without reading them whole."""

import hashlib

from dsv3.checkpoint.reader import Source

_VALUES = 256  # of each tensor


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
        last = tuple((0, min(_VALUES, size)) for size in info.shape[-1:])
        digest.update(f"{name} {info.dtype} {info.shape}".encode())
        digest.update(source.read(name, first + last))
    return f"dsv3-{digest.hexdigest()[:12]}"

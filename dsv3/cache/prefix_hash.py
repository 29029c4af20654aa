"""Hashes of token prefixes, chained over units of 64 positions."""

from hashlib import blake2b

from dsv3.cache.children import TOKEN_BYTES

# Hashes are chained over units of this many positions, so that they do not depend on page_size.
_HASH_UNIT = 64


def chain_hashes(parent: bytes, tokens: bytes) -> list[bytes]:
    """Return the hash of the prefix at the end of each unit of 64 tokens.

    Args:
        parent: hash of the prefix before `tokens`; empty at the start of a sequence.
        tokens: encoded tokens.
    """
    step = _HASH_UNIT * TOKEN_BYTES
    hashes = []
    for start in range(0, len(tokens), step):
        parent = blake2b(parent + tokens[start : start + step], digest_size=16).digest()
        hashes.append(parent)
    return hashes


def chain_hash(parent: bytes, tokens: bytes) -> bytes:
    """Return the hash of a prefix: that of its parent prefix extended by encoded tokens."""
    return chain_hashes(parent, tokens)[-1] if tokens else parent

"""Kimi-K2's vocabulary: `tiktoken.model`, read with the optional `tiktoken` library.

The pattern, the 256 reserved tokens and the splitting of very long texts are those of Moonshot's
published `tokenization_kimi.py`; another splitting would give other tokens.
"""

import base64
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsv3.errors import CheckpointError
from dsv3.read_files import TABLE_BYTES, read_bytes
from dsv3.text.tokenizer_errors import NoTokenizer, rust_errors_as

RESERVED_TOKENS = 256
MAX_PIECE = 400_000  # characters; tiktoken overflows its stack on longer ones
MAX_RUN = 25_000  # characters in a run of spaces or of non-spaces
MAX_ID_DIGITS = 10

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class TiktokenVocabulary:
    """`tiktoken.model` and the special tokens that `tokenizer_config.json` lists."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        try:
            import tiktoken
        except ImportError:
            raise NoTokenizer(
                f"{path}: this vocabulary needs the tiktoken library: pip install tiktoken"
            ) from None
        ranks = _read_ranks(path)
        reserved = range(len(ranks), len(ranks) + RESERVED_TOKENS)
        names = {i: f"<|reserved_token_{i}|>" for i in reserved}
        added = _added_tokens(path, config, reserved)
        names |= {i: entry["content"] for i, entry in added.items()}
        self._path = path
        self._special = {i for i, entry in added.items() if entry.get("special", True)}
        with rust_errors_as(f"{path}: not a vocabulary"):
            self._encoding = tiktoken.Encoding(
                name=path.name,
                pat_str=PATTERN,
                mergeable_ranks=ranks,
                special_tokens={name: i for i, name in names.items()},
            )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Encode `text`; this vocabulary adds no special tokens."""
        with rust_errors_as(f"{self._path}: cannot encode this text"):
            return [
                token_id
                for piece in _pieces(text)
                for token_id in self._encoding.encode(piece, allowed_special="all")
            ]

    def control_tokens(self) -> list[str]:
        """Return the names of all special tokens."""
        return sorted(self._encoding.special_tokens_set)

    def encode_ordinary(self, text: str) -> list[int]:
        """Encode `text` without special tokens: their names are ordinary text."""
        with rust_errors_as(f"{self._path}: cannot encode this text"):
            return [
                token_id
                for piece in _pieces(text)
                for token_id in self._encoding.encode_ordinary(piece)
            ]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Decode tokens to text."""
        skipped = self._special if skip_special_tokens else ()
        return b"".join(self.token_bytes(i) for i in ids if i not in skipped).decode(
            "utf-8", "replace"
        )

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token; none for an unknown id."""
        try:
            return bytes(self._encoding.decode_single_token_bytes(token_id))
        except KeyError:
            return b""

    def is_byte(self, token_id: int) -> bool:
        """Return False: the bytes of a token do not depend on its neighbours."""
        return False

    def piece(self, token_id: int) -> bytes | None:
        """Return the bytes that a token adds to a text; none for special tokens."""
        return b"" if token_id in self._special else self.token_bytes(token_id)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its name."""
        try:
            return int(self._encoding.encode_single_token(token))
        except KeyError:
            return None


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Read lines of `base64 rank`; ranks must count from 0, and include all single bytes."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path, CheckpointError, TABLE_BYTES).splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise CheckpointError(f"{path}: line {number} is not 'base64 rank'") from None
        if len(ranks) < number:
            raise CheckpointError(f"{path}: line {number} gives a token a second time")
    if set(ranks.values()) != set(range(len(ranks))):
        raise CheckpointError(f"{path}: the ranks are not the numbers from 0 to {len(ranks) - 1}")
    if any(bytes([byte]) not in ranks for byte in range(0x100)):
        raise CheckpointError(f"{path}: truncated: not all single bytes are tokens")
    return ranks


def _added_tokens(path: Path, config: dict[str, Any], reserved: range) -> dict[int, dict[str, Any]]:
    """Return the added tokens by id; their ids are above those of the file."""
    added = config.get("added_tokens_decoder") or {}
    if isinstance(added, dict) and all(map(_is_token, added.items())):
        tokens = {int(i): entry for i, entry in added.items()}
        if all(reserved.start <= i < 1 << 31 for i in tokens):
            return tokens
    raise CheckpointError(
        f"{path.with_name('tokenizer_config.json')}: added_tokens_decoder must hold tokens by "
        f"ids from {reserved.start} on, each with its content"
    )


def _is_token(item: tuple[str, Any]) -> bool:
    token_id, entry = item
    is_id = token_id.isdecimal() and len(token_id) < MAX_ID_DIGITS
    return is_id and isinstance(entry, dict) and isinstance(entry.get("content"), str)


def _pieces(text: str) -> Iterator[str]:
    """Split overlong texts, and overlong runs of spaces or non-spaces in them."""
    for start in range(0, len(text), MAX_PIECE):
        part = text[start : start + MAX_PIECE]
        cuts = [
            cut
            for run in re.finditer(r"\s+|\S+", part)
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN)
        ]
        yield from (part[a:b] for a, b in pairwise([0, *cuts, len(part)]))

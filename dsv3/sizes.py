"""Sizes in settings: bytes with a unit, a share of the available bytes, or tokens."""

import re
from dataclasses import dataclass

from dsv3.errors import ConfigError

# As in GNU's tools: G and GiB are 2**30 bytes, GB is 10**9.
_PREFIXES = "kmgt"
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)\s*"
_BYTES = re.compile(rf"{_NUMBER}(?:([{_PREFIXES}])(ib|b)?|b)?", re.IGNORECASE)
_SHARE = re.compile(rf"{_NUMBER}%")
_TOKENS = re.compile(r"(\d+)\s*tok(?:ens?)?", re.IGNORECASE)
_SYNTAX = "bytes (4GiB, 1.5G, 512M; 4GB is 4 * 10^9)"


@dataclass(frozen=True, slots=True)
class Size:
    """A number of bytes, or a share of the available bytes; off if both are 0."""

    num_bytes: int = 0
    share: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.num_bytes or self.share)

    @classmethod
    def parse(cls, name: str, text: str, whole: str) -> "Size":
        """Parse bytes, a share or `off`.

        Args:
            name: name of the setting, for errors.
            text: its value.
            whole: the bytes that a share refers to, in words.

        Raises:
            ConfigError: the text is not a size.
        """
        size = cls() if text == "off" else _bytes_or_share(text)
        if size is None:
            raise ConfigError(
                f"{name}={text} is not a size; use {_SYNTAX}, a share of {whole} (50%) or off"
            )
        return size

    def of(self, available: int) -> int:
        """Return the size in bytes, given the available bytes."""
        return int(self.share * available) if self.share else self.num_bytes


@dataclass(frozen=True, slots=True)
class CacheSize:
    """`auto`, bytes on every rank or a share of its free memory, or tokens of each tp group."""

    num_bytes: int | None = None
    num_tokens: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, name: str, text: str) -> "CacheSize":
        """Parse `auto`, bytes, a share or `Ntok`.

        Args:
            name: name of the setting, for errors.
            text: its value.

        Raises:
            ConfigError: the text is not a size, or is 0.
        """
        if text == "auto":
            return cls()
        tokens = _TOKENS.fullmatch(text)
        size = _bytes_or_share(text)
        if tokens and int(tokens[1]):
            return cls(num_tokens=int(tokens[1]))
        if not size:
            raise ConfigError(
                f"{name}={text} is not a size; use auto, {_SYNTAX}, a share of the memory "
                "left by the weights (90%) or tokens (65536tok)"
            )
        return cls(share=size.share) if size.share else cls(num_bytes=size.num_bytes)

    @property
    def depends_on_memory(self) -> bool:
        """True if the size depends on the free memory."""
        return self.num_bytes is None and self.num_tokens is None


def _bytes_or_share(text: str) -> Size | None:
    """Return the size; None if the text is not a size."""
    if (match := _SHARE.fullmatch(text)) and float(match[1]) <= 100:
        return Size(share=float(match[1]) / 100)
    match = _BYTES.fullmatch(text)
    if match is None or ("." in match[1] and not match[2]):
        return None
    whole, _, fraction = match[1].partition(".")
    power = _PREFIXES.index(match[2].lower()) + 1 if match[2] else 0
    unit = (1000 if (match[3] or "").lower() == "b" else 1024) ** power
    return Size(int(whole or 0) * unit + int(fraction or 0) * unit // 10 ** len(fraction))

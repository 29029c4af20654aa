"""The bytes of an input as UTF-8, readable any number of times: of a file, a pipe, standard input.

A pipe can be read once, so its content goes to a temporary file without a name first; so does text
in UTF-16 or UTF-32, as UTF-8. Compressed and other binary files are refused by the names of their
formats.
"""

import codecs
import io
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from dsv3.errors import ConfigError, os_errors_as
from dsv3.read_files import open_regular
from dsv3.streams import STANDARD, is_endless, is_stream, open_stream

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_BEGIN = 4096  # bytes at the beginning, enough to recognize a format
# UTF-32's mark in little-endian order begins as UTF-16's does.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


@dataclass(frozen=True, slots=True)
class _Binary:
    """A format that is not text: how its files begin, its name, and what to do about it."""

    begin: bytes
    name: str
    remedy: str


_TABLE = "write it as JSON Lines first, one row a line"
_BINARY = (
    _Binary(b"\x1f\x8b", "compressed with gzip", "unpack it first (gunzip -k FILE)"),
    _Binary(b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it first (unzstd FILE)"),
    _Binary(b"BZh", "compressed with bzip2", "unpack it first (bunzip2 -k FILE)"),
    _Binary(b"\xfd7zXZ\0", "compressed with xz", "unpack it first (unxz -k FILE)"),
    _Binary(b"\x04\x22\x4d\x18", "compressed with LZ4", "unpack it first (unlz4 FILE)"),
    _Binary(b"PK\3\4", "a zip archive or an Excel workbook", f"unpack it, or {_TABLE}"),
    _Binary(b"PK\5\6", "an empty zip archive", "give a file with rows"),
    _Binary(b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    _Binary(b"Rar!\x1a\7", "a RAR archive", "unpack it first"),
    _Binary(b"PAR1", "a Parquet file", _TABLE),
    _Binary(b"ARROW1", "an Arrow file", _TABLE),
    _Binary(b"ORC", "an ORC file", _TABLE),
    _Binary(b"Obj\1", "an Avro file", _TABLE),
    _Binary(b"SQLite format 3\0", "an SQLite database", _TABLE),
    _Binary(b"\x89HDF\r\n", "an HDF5 file", _TABLE),
    _Binary(b"\x93NUMPY", "a NumPy array", _TABLE),
    _Binary(b"\xd0\xcf\x11\xe0", "an old Excel workbook or Word document", _TABLE),
    _Binary(b"%PDF-", "a PDF document", "give its text"),
)
_TAR = _Binary(b"ustar", "a tar archive", "unpack it first")
_TAR_AT = 257


@dataclass(frozen=True, slots=True)
class InputFile:
    """An input that can be read.

    Attributes:
        flag: that names it.
        path: of a file; `-` is standard input.
        copy: the content where it cannot be read from there again, or not as UTF-8.
    """

    flag: str
    path: Path
    copy: BinaryIO | None = None

    @classmethod
    def find(cls, path: Path, flag: str) -> "InputFile":
        """Open an input and recognize it; a pipe is read to its end.

        Raises:
            ConfigError: it cannot be read, or is no text.
        """
        found, is_read_once = cls(flag, path), is_stream(path)
        with found._open(is_read_once) as source, os_errors_as(ConfigError, str(found)):
            begin = _read(source, _BEGIN)
            found._refuse_binary(begin)
            mark = next((mark for mark in _MARKS if begin.startswith(mark)), b"")
            if not is_read_once and not mark:
                return found
            return cls(flag, path, found._copied(begin, source, mark))

    def open(self) -> BinaryIO:
        """Return the content from its beginning, without a byte order mark."""
        file = self._open(False) if self.copy is None else _reader(self.copy)
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        return file

    @property
    def name(self) -> str:
        """The path, as a message tells it."""
        return "standard input" if self.path == STANDARD else str(self.path)

    def __str__(self) -> str:
        return f"{self.flag} {self.name}"

    def error(self, reason: str) -> ConfigError:
        """Return the error of this input."""
        return ConfigError(f"{self}: {reason}")

    def _open(self, is_read_once: bool) -> BinaryIO:
        if not is_read_once:
            try:
                return open(open_regular(self.path), "rb")
            except ConfigError as error:
                raise ConfigError(f"{self.flag} {error}") from None
        with os_errors_as(ConfigError, str(self)):
            file = os.fdopen(open_stream(self.path, os.O_RDONLY, 0), "rb", buffering=0)
        if is_endless(file.fileno()):
            file.close()
            raise self.error("a device, neither a file nor a pipe")
        if file.isatty():
            log.info("%s: reading what is typed; Ctrl-D ends it", self.name)
        return file

    def _refuse_binary(self, begin: bytes) -> None:
        found = [binary for binary in _BINARY if begin.startswith(binary.begin)]
        found += [_TAR] * begin.startswith(_TAR.begin, _TAR_AT)
        # Text may begin with the letters of some formats, but holds no control characters.
        if found and any(byte < 9 for byte in begin):
            remedy = found[0].remedy.replace("FILE", str(self.path))
            raise self.error(f"{found[0].name}, not text; {remedy}")
        even, odd = begin[:64:2], begin[1:64:2]
        for order, high, low in (("LE", odd, even), ("BE", even, odd)):
            if len(high) > 1 and not any(high) and all(low):
                raise self.error(
                    "line 1: UTF-16 without a byte order mark; convert the file first "
                    f"(iconv -f UTF-16{order} -t UTF-8)"
                )

    def _copied(self, begin: bytes, source: BinaryIO, mark: bytes) -> BinaryIO:
        """Return a temporary file with the content as UTF-8."""
        copy = tempfile.TemporaryFile()  # noqa: SIM115 (stays open)
        pieces = _pieces(begin, source)
        try:
            for data in self._decoded(pieces, mark) if mark else pieces:
                copy.write(data)
            copy.flush()
        except OSError as error:
            copy.close()
            raise self.error(
                f"cannot be kept in {tempfile.gettempdir()} ({error.strerror}); give a file, or "
                "another TMPDIR"
            ) from None
        return copy

    def _decoded(self, pieces: Iterator[bytes], mark: bytes) -> Iterator[bytes]:
        """Yield text in the encoding of a byte order mark as UTF-8."""
        codec, num_lines = _MARKS[mark], 1
        decoder = codecs.getincrementaldecoder(codec)()
        for data in chain([next(pieces)[len(mark) :]], pieces, [b""]):
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                num_lines += error.object[: error.start].decode(codec, "replace").count("\n")
                raise self.error(
                    f"line {num_lines}: not {codec.upper()}, as the byte order mark says; write "
                    "the file as UTF-8"
                ) from None
            num_lines += text.count("\n")
            yield text.encode()


class _Reader(io.RawIOBase):
    """Reads a file from its beginning, whatever else reads it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._at = descriptor, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place counted from the beginning."""
        assert whence == os.SEEK_SET
        self._at = offset
        return offset

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer; return the number of bytes."""
        count = os.preadv(self._descriptor, [buffer], self._at)
        self._at += count
        return count


def _reader(file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(_Reader(file.fileno()))


def _read(source: BinaryIO, size: int) -> bytes:
    """Return so many bytes, fewer only at the end."""
    parts, left = [], size
    while left and (data := source.read(left)):
        parts.append(data)
        left -= len(data)
    return b"".join(parts)


def _pieces(begin: bytes, source: BinaryIO) -> Iterator[bytes]:
    """Yield the content; at a terminal, the end is to be typed only once."""
    data, size = begin, _BEGIN
    while True:
        yield data
        if len(data) < size:
            return
        data, size = _read(source, _CHUNK), _CHUNK

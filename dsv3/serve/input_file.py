"""Input from a file, a pipe or standard input, as UTF-8 bytes that can be read several times.

A pipe can be read only once, so its content is first copied to an unnamed temporary file; so is
text in UTF-16 or UTF-32, converted to UTF-8. Compressed and other binary files are refused, with
the names of their formats.
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
# UTF-32 is first, since its little-endian mark begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


@dataclass(frozen=True, slots=True)
class _Binary:
    """A binary format: first bytes of its files, its name, and a remedy."""

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
    """A readable input.

    Attributes:
        flag: the flag that names the input.
        path: path of the input; `-` is standard input.
        copy: a copy of the content, if the input can be read only once or is not UTF-8.
    """

    flag: str
    path: Path
    copy: BinaryIO | None = None

    @classmethod
    def find(cls, path: Path, flag: str) -> "InputFile":
        """Open an input and check its format; read a pipe to its end.

        Raises:
            ConfigError: the input cannot be read, or is not text.
        """
        direct = cls(flag, path)
        is_read_once = is_stream(path)
        with direct._open(is_read_once) as source, os_errors_as(ConfigError, str(direct)):
            begin = _read(source, _BEGIN)
            direct._refuse_binary(begin)
            mark = next((mark for mark in _MARKS if begin.startswith(mark)), b"")
            if not is_read_once and not mark:
                return direct
            return cls(flag, path, direct._copied(begin, source, mark))

    def open(self) -> BinaryIO:
        """Return the content from its beginning, without a byte order mark."""
        file = self._open(False) if self.copy is None else _reader(self.copy)
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        return file

    @property
    def name(self) -> str:
        """The path in messages."""
        return "standard input" if self.path == STANDARD else str(self.path)

    def __str__(self) -> str:
        return f"{self.flag} {self.name}"

    def error(self, reason: str) -> ConfigError:
        """Return an error about this input."""
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
            log.info("%s: reading from the terminal; Ctrl-D ends it", self.name)
        return file

    def _refuse_binary(self, begin: bytes) -> None:
        formats = [binary for binary in _BINARY if begin.startswith(binary.begin)]
        if begin.startswith(_TAR.begin, _TAR_AT):
            formats.append(_TAR)
        # Text may begin with the letters of some formats, but has no control characters.
        if formats and any(byte < 9 for byte in begin):
            remedy = formats[0].remedy.replace("FILE", str(self.path))
            raise self.error(f"{formats[0].name}, not text; {remedy}")
        even = begin[:64:2]
        odd = begin[1:64:2]
        for order, high, low in (("LE", odd, even), ("BE", even, odd)):
            if len(high) > 1 and not any(high) and all(low):
                raise self.error(
                    "line 1: UTF-16 without a byte order mark; convert the file first "
                    f"(iconv -f UTF-16{order} -t UTF-8)"
                )

    def _copied(self, begin: bytes, source: BinaryIO, mark: bytes) -> BinaryIO:
        """Return a temporary file with the content as UTF-8."""
        copy = tempfile.TemporaryFile()  # noqa: SIM115 (stays open)
        chunks = _chunks(begin, source)
        try:
            for data in self._decoded(chunks, mark) if mark else chunks:
                copy.write(data)
            copy.flush()
        except OSError as error:
            copy.close()
            raise self.error(
                f"cannot be kept in {tempfile.gettempdir()} ({error.strerror}); give a file, or "
                "another TMPDIR"
            ) from None
        return copy

    def _decoded(self, chunks: Iterator[bytes], mark: bytes) -> Iterator[bytes]:
        """Yield text in the encoding of a byte order mark as UTF-8."""
        codec = _MARKS[mark]
        num_lines = 1
        decoder = codecs.getincrementaldecoder(codec)()
        for data in chain([next(chunks)[len(mark) :]], chunks, [b""]):
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
    """Reader of a shared descriptor with its own position."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._position = offset
        return offset

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = os.preadv(self._descriptor, [buffer], self._position)
        self._position += count
        return count


def _reader(file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(_Reader(file.fileno()))


def _read(source: BinaryIO, size: int) -> bytes:
    """Return `size` bytes; fewer at the end of the input."""
    parts: list[bytes] = []
    num_missing = size
    while num_missing and (data := source.read(num_missing)):
        parts.append(data)
        num_missing -= len(data)
    return b"".join(parts)


def _chunks(begin: bytes, source: BinaryIO) -> Iterator[bytes]:
    """Yield the content; after a short read, stop: a terminal's user types Ctrl-D only once."""
    yield begin
    data = begin
    size = _BEGIN
    while len(data) == size:
        data = _read(source, _CHUNK)
        size = _CHUNK
        yield data

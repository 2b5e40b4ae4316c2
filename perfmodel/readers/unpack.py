"""What are the bytes of a trace that comes packed: gzip, Zstandard, bzip2, xz or zip, told by their first bytes."""

import bz2
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from isal import igzip_lib

from perfmodel.errors import InputError

try:
    from compression import zstd  # type: ignore[import-not-found, unused-ignore] # Python 3.14 and newer
except ImportError:
    from backports import zstd

PIECE_BYTES = 2**18
MAX_LAYERS = 4  # a zip that holds a gzip that holds a trace has two
N_MAGIC_BYTES = 64
ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")  # the second where it is empty


class _Decompressor(Protocol):
    """What the decompressors of bz2, lzma, zstd and isal have in common."""

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """At most `max_length` bytes of content."""


# First bytes -> what the packing is called and what unpacks one frame of it.
_PACKINGS: dict[bytes, tuple[str, Callable[[], _Decompressor]]] = {
    b"\x1f\x8b": ("gzip", lambda: cast(_Decompressor, igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP))),
    b"\x28\xb5\x2f\xfd": ("Zstandard", lambda: cast(_Decompressor, zstd.ZstdDecompressor())),
    b"BZh": ("bzip2", lambda: cast(_Decompressor, bz2.BZ2Decompressor())),
    b"\xfd7zXZ\x00": ("xz", lambda: cast(_Decompressor, lzma.LZMADecompressor())),
}
_DAMAGED: Any = (
    igzip_lib.IsalError, zstd.ZstdError, lzma.LZMAError, zipfile.BadZipFile, zlib.error, OSError, EOFError,
    NotImplementedError, RuntimeError, ValueError,
)  # fmt: skip


class Unpacked(io.RawIOBase):
    """The content of a packed stream, unpacked as it is read.

    A packed stream that ends too early gives all that it holds; `is_cut_off` then tells. Raises InputError where its
    bytes are not what was packed, as far as its checksums show.
    """

    def __init__(self, packed: BinaryIO, packing: str, begin: Callable[[], _Decompressor]) -> None:
        super().__init__()
        self.is_cut_off = False
        self._packed, self._packing, self._begin = packed, packing, begin
        self._frame = begin()
        self._unread = b""

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        """How many bytes were unpacked into `target`; 0 at the end."""
        while True:
            if self._frame.eof and not self._next_frame():
                return 0
            if self._frame.needs_input:
                self._unread = self._unread or self._packed.read(PIECE_BYTES)
                if not self._unread:
                    self.is_cut_off = True
                    return 0
            try:
                content = self._frame.decompress(self._unread, len(target))
            except _DAMAGED as error:
                raise InputError(f"the {self._packing} data is damaged ({error}); copy or record it again") from None
            self._unread = b""
            if content:
                target[: len(content)] = content
                return len(content)

    def _next_frame(self) -> bool:
        """Whether more frames follow: packed streams may be joined, and padded with zeros."""
        rest = (self._frame.unused_data or self._packed.read(PIECE_BYTES)).lstrip(b"\0")
        if not rest:
            return False
        self._frame = self._begin()
        self._unread = rest
        return True


@contextmanager
def unpacked(path: Path) -> Iterator[tuple[io.BufferedReader, bytes]]:
    """The content of a file as a stream, and its first bytes; packed content is unpacked, whatever its suffix.

    Raises InputError where packed data is damaged or a zip archive does not hold exactly one file.
    """
    with path.open("rb") as file:
        stream: io.BufferedReader = file
        for _ in range(MAX_LAYERS):
            magic = stream.peek(N_MAGIC_BYTES)[:N_MAGIC_BYTES]
            layer = _layer(stream, magic)
            if layer is None:
                yield stream, magic
                return
            stream = layer
        raise InputError(f"packed more than {MAX_LAYERS} times over; unpack it and read the trace inside")


def is_packed(stream: io.BufferedReader) -> bool:
    """Does a stream unpack what a file holds, so that the file itself is something else."""
    return not isinstance(stream.raw, io.FileIO)


def is_cut_off(stream: io.BufferedReader) -> bool:
    """Did a packed stream that was read to its end lack its last part."""
    return isinstance(stream.raw, Unpacked) and stream.raw.is_cut_off


def _layer(stream: io.BufferedReader, magic: bytes) -> io.BufferedReader | None:
    if magic.startswith(ZIP_MAGIC):
        return _zip_member(stream)
    for start, (packing, begin) in _PACKINGS.items():
        if magic.startswith(start):
            return io.BufferedReader(Unpacked(stream, packing, begin))
    return None


def _zip_member(stream: io.BufferedReader) -> io.BufferedReader:
    """The one file in a zip archive; folders and what macOS adds do not count."""
    if not stream.seekable():
        raise InputError("a zip archive inside a packed file; unpack it and read the trace inside")
    try:
        archive = zipfile.ZipFile(stream)
        members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
        if len(members) != 1:
            names = ", ".join(m.filename for m in members[:5]) or "nothing"
            raise InputError(
                f"a zip archive that holds {len(members)} files ({names}), expected one trace; unpack it and read "
                "one of them, or the folder where they are the ranks of one job"
            )
        return io.BufferedReader(_Member(archive.open(members[0])))
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # RuntimeError: it wants a password
        raise InputError(f"a zip archive that cannot be unpacked ({error}); copy it again or unpack it") from None


class _Member(io.RawIOBase):
    """A file in a zip archive, whose damage shows while it is read."""

    def __init__(self, member: object) -> None:
        super().__init__()
        self._member = cast(io.BufferedReader, member)

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        """How many bytes were unpacked into `target`; 0 at the end."""
        try:
            content = self._member.read(len(target))
        except _DAMAGED as error:
            raise InputError(f"the zip data is damaged ({error}); copy or record it again") from None
        target[: len(content)] = content
        return len(content)

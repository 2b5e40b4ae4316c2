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
from perfmodel.readers.limits import Limits

try:
    from compression import zstd  # type: ignore[import-not-found, unused-ignore] # Python 3.14 and newer
except ImportError:
    from backports import zstd

PIECE_BYTES = 2**18
MAX_LAYERS = 4  # a zip that holds a gzip that holds a trace has two
N_MAGIC_BYTES = 64
_XZ_MEMORY_BYTES = 2**29  # a header may ask for 4 GiB; xz itself asks for 64 MiB at the most
# What packs in zip archives are unpacked by one read may be 20,000 times this, where they tell no end (bzip2, xz).
_MEMBER_PIECE_BYTES = 4096
_LISTING_BYTES = 2**20  # of the list of files in a zip archive; one file needs no more
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
    b"\xfd7zXZ\x00": ("xz", lambda: cast(_Decompressor, lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES))),
}
_DAMAGED: Any = (
    igzip_lib.IsalError, zstd.ZstdError, lzma.LZMAError, zipfile.BadZipFile, zlib.error, OSError, EOFError,
    NotImplementedError, RuntimeError, ValueError,
)  # fmt: skip


class _Layer(io.RawIOBase):
    """What one packing holds, counted while it is unpacked; `refuse` raises where it is too much."""

    def __init__(self, refuse: Callable[[int], None]) -> None:
        super().__init__()
        self._refuse = refuse
        self._n_bytes = 0

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        """How many bytes were unpacked into `target`; 0 at the end."""
        n_bytes = self._unpack(target)
        self._n_bytes += n_bytes
        self._refuse(self._n_bytes)
        return n_bytes

    def _unpack(self, target: memoryview) -> int:
        raise NotImplementedError


class Unpacked(_Layer):
    """The content of a packed stream, unpacked as it is read.

    A packed stream that ends too early gives all that it holds; `is_cut_off` then tells. Raises InputError where its
    bytes are not what was packed, as far as its checksums show.
    """

    def __init__(
        self,
        packed: BinaryIO,
        packing: str,
        begin: Callable[[], _Decompressor],
        refuse: Callable[[int], None],
    ) -> None:
        super().__init__(refuse)
        self.is_cut_off = False
        self._packed, self._packing, self._begin = packed, packing, begin
        self._frame = begin()
        self._unread = b""

    def _unpack(self, target: memoryview) -> int:
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


class _Watched(io.FileIO):
    """A file of which somebody hears how much was read."""

    def __init__(self, path: Path, progress: Callable[[int, int], None]) -> None:
        super().__init__(path)
        self._progress, self._size_bytes = progress, path.stat().st_size

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        """How many bytes were read into `target`; 0 at the end."""
        n_bytes = super().readinto(target)
        self._progress(self.tell(), self._size_bytes)
        return n_bytes


@contextmanager
def unpacked(path: Path, limits: Limits | None = None) -> Iterator[tuple[io.BufferedReader, bytes]]:
    """The content of a file as a stream, and its first bytes; packed content is unpacked, whatever its suffix.

    Raises InputError where packed data is damaged or a zip archive does not hold exactly one file, and TooLargeError
    where the file, or what any packing of it holds, is more than `limits` allow.
    """

    def refuse(n_bytes: int) -> None:
        if limits is not None:
            refuse_late()
            limits.refuse_bytes(n_bytes, size_bytes)

    size_bytes = path.stat().st_size
    refuse_late = limits.clock() if limits is not None else lambda: None
    refuse(size_bytes)
    raw = io.FileIO(path) if limits is None else _Watched(path, limits.progress)
    with io.BufferedReader(raw) as file:
        stream = cast(io.BufferedReader, file)
        for _ in range(MAX_LAYERS):
            magic = stream.peek(N_MAGIC_BYTES)[:N_MAGIC_BYTES]
            layer = _layer(stream, magic, refuse)
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


def _layer(stream: io.BufferedReader, magic: bytes, refuse: Callable[[int], None]) -> io.BufferedReader | None:
    if magic.startswith(ZIP_MAGIC):
        return _zip_member(stream, refuse)
    for start, (packing, begin) in _PACKINGS.items():
        if magic.startswith(start):
            return io.BufferedReader(Unpacked(stream, packing, begin, refuse))
    return None


def _zip_member(stream: io.BufferedReader, refuse: Callable[[int], None]) -> io.BufferedReader:
    """The one file in a zip archive; folders and what macOS adds do not count."""
    if not stream.seekable():
        raise InputError("a zip archive inside a packed file; unpack it and read the trace inside")
    try:
        archive = zipfile.ZipFile(cast(BinaryIO, _Pieces(stream)))
        members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
        if len(members) != 1:
            names = ", ".join(m.filename for m in members[:5]) or "nothing"
            raise InputError(
                f"a zip archive that holds {len(members)} files ({names}), expected one trace; unpack it and read "
                "one of them, or the folder where they are the ranks of one job"
            )
        packing = members[0].compress_type
        is_bounded = packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        return io.BufferedReader(_Member(archive.open(members[0]), None if is_bounded else _MEMBER_PIECE_BYTES, refuse))
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # RuntimeError: it wants a password
        raise InputError(f"a zip archive that cannot be unpacked ({error}); copy it again or unpack it") from None


class _Pieces:
    """A file that gives at most _LISTING_BYTES at once: a zip archive's list of files is read in one, whatever length
    it claims, and each file in it takes ten times its entry in memory."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self.seek, self.tell, self.seekable, self._read = stream.seek, stream.tell, stream.seekable, stream.read

    def read(self, n_bytes: int = -1) -> bytes:
        """At most so many bytes; the rest of the file, up to a piece, where the number is negative."""
        return self._read(_LISTING_BYTES if n_bytes < 0 else min(n_bytes, _LISTING_BYTES))


class _Member(_Layer):
    """A file in a zip archive, read at most `piece_bytes` at once; its damage shows while it is read."""

    def __init__(self, member: object, piece_bytes: int | None, refuse: Callable[[int], None]) -> None:
        super().__init__(refuse)
        self._member = cast(io.BufferedReader, member)
        self._piece_bytes = piece_bytes

    def _unpack(self, target: memoryview) -> int:
        try:
            content = self._member.read(min(len(target), self._piece_bytes or len(target)))
        except _DAMAGED as error:
            raise InputError(f"the zip data is damaged ({error}); copy or record it again") from None
        target[: len(content)] = content
        return len(content)

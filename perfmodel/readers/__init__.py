"""Which file is this, and what trace is in it: `read_trace` looks at the first bytes and calls the vendor's reader."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from isal import igzip

from perfmodel.cache import read_cached
from perfmodel.errors import InputError
from perfmodel.readers.kineto import read_kineto
from perfmodel.trace import Trace

GZIP_MAGIC = b"\x1f\x8b"
SQLITE_MAGIC = b"SQLite format 3\0"

NSYS_REPORTS = (".nsys-rep", ".qdrep")

_EXPECTED = "expected a PyTorch profiler trace (.json, .json.gz) or an Nsight Systems export (.sqlite)"
_COUNTERS = "counters of Nsight Compute, which hold no trace; `perfmodel.readers.ncu.read_ncu` reads them"
# First bytes of files that people hand over instead of a trace -> what they are and what to do.
_OTHER_FILES = {
    b"version https://git-lfs": "a Git LFS pointer, not the trace itself; fetch the file with `git lfs pull`",
    b"PK\x03\x04": "a zip archive; unpack it and read the trace inside",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive; unpack it with `zstd -d`",
    b"==PROF==": _COUNTERS,
    b'"ID","Process ID"': _COUNTERS,
    b"PAR1": f"a Parquet file; {_EXPECTED}",
}
# Suffix -> what to do; these formats have no open reader.
_OTHER_SUFFIXES = {
    ".ncu-rep": "an Nsight Compute report, which times single kernels and holds no trace; record one with nsys "
    "or torch, or export the counters with `ncu --import {name} --csv --page raw` for `perfmodel.readers.ncu.read_ncu`",
}


def read_trace(path: str | Path, cache: str | Path | None = None) -> Trace:
    """The trace in a file: PyTorch profiler JSON, plain or in gzip whatever its suffix, or an Nsight Systems .sqlite.

    A folder of Parquet files that `nsys` exported is read too, and a report (.nsys-rep) where `nsys` is installed.
    Any other folder holds the files of ranks and is one trace with `rank` set (`folder.read_ranks` has options).
    With `cache`, "beside" or a folder, it is kept there as Parquet and taken from there while the file is unchanged.
    Raises InputError, one sentence that says what was found and what was expected, for anything else.
    """
    path = Path(path)
    try:
        if path.is_dir() and not is_nsys_folder(path):
            from perfmodel.readers.folder import read_ranks  # which reads its files with this module

            return read_ranks(path, cache)
        return _read(path) if cache is None else read_cached(path, cache, _read)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (EOFError, zlib.error, igzip.BadGzipFile) as error:
        raise InputError(f"{path}: the gzip data is cut off or damaged ({error}); copy or record it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read(path: Path) -> Trace:
    if is_nsys_folder(path):
        from perfmodel.readers.nsys import read_nsys_parquet

        return read_nsys_parquet(path)
    with path.open("rb") as file:
        magic = file.read(64)
    _refuse_other_files(path, magic)
    if magic.startswith(SQLITE_MAGIC):
        from perfmodel.readers.nsys import read_nsys

        return read_nsys(path)
    if path.suffix in NSYS_REPORTS:
        from perfmodel.readers.nsys import read_nsys_report

        return read_nsys_report(path)
    with _opened(path, magic) as stream:
        return read_kineto(stream)


def is_nsys_folder(path: Path) -> bool:
    """Is this a folder that `nsys export --type parquetdir` wrote: one Parquet file for each table of a report."""
    return (path / "StringIds.parquet").is_file() or any(path.glob("CUPTI_ACTIVITY_KIND_*.parquet"))


def _refuse_other_files(path: Path, magic: bytes) -> None:
    if not magic:
        raise InputError(f"an empty file; {_EXPECTED}")
    if path.suffix in _OTHER_SUFFIXES and not magic.startswith(SQLITE_MAGIC):
        raise InputError(_OTHER_SUFFIXES[path.suffix].format(stem=path.stem, name=path.name))
    for start, found in _OTHER_FILES.items():
        if magic.startswith(start):
            raise InputError(found)
    if path.suffix in NSYS_REPORTS:
        return
    is_json = magic.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[", b"")
    if not is_json and not magic.startswith((GZIP_MAGIC, SQLITE_MAGIC)):
        raise InputError(f"a file that begins with {magic[:16]!r}; {_EXPECTED}")


@contextmanager
def _opened(path: Path, magic: bytes) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked when it is gzip."""
    if not magic.startswith(GZIP_MAGIC):
        with path.open("rb", buffering=0) as file:
            yield cast(BinaryIO, file)
        return
    with igzip.open(path, "rb") as unpacked:  # type: ignore[no-untyped-call]
        start = unpacked.read(len(SQLITE_MAGIC))
        if start == SQLITE_MAGIC:
            raise InputError("an SQLite file in gzip; unpack it with `gunzip` and read the .sqlite file")
        unpacked.seek(0)
        yield unpacked

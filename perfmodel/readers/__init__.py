"""Which file is this, and what trace is in it: `read_trace` looks at the first bytes and calls the vendor's reader."""

import shutil
import tempfile
from dataclasses import replace
from io import BufferedReader
from pathlib import Path

from perfmodel.errors import InputError
from perfmodel.readers.kineto import read_kineto
from perfmodel.readers.unpack import is_cut_off, is_packed, unpacked
from perfmodel.trace import Trace

SQLITE_MAGIC = b"SQLite format 3\0"

_EXPECTED = "expected a PyTorch profiler trace (.json, .json.gz) or an Nsight Systems export (.sqlite)"
_NSYS_EXPORT = "convert it with `nsys export --type sqlite --output {stem}.sqlite {name}` and read the .sqlite file"
# First bytes of files that people hand over instead of a trace -> what they are and what to do.
_OTHER_FILES = {
    b"version https://git-lfs": "a Git LFS pointer, not the trace itself; fetch the file with `git lfs pull`",
    b"PAR1": f"a Parquet file; {_EXPECTED}",
}
# Suffix -> what to do; these formats have no open reader.
_OTHER_SUFFIXES = {
    ".nsys-rep": f"an Nsight Systems report; {_NSYS_EXPORT}",
    ".qdrep": f"an Nsight Systems report; {_NSYS_EXPORT}",
    ".ncu-rep": "an Nsight Compute report, which times single kernels and holds no trace; record with nsys or torch",
}


def read_trace(path: str | Path) -> Trace:
    """The trace in a file: PyTorch profiler JSON or an Nsight Systems .sqlite, plain or packed, whatever its suffix.

    Raises InputError, one sentence that says what was found and what was expected, for anything else.
    """
    path = Path(path)
    try:
        return _read(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read(path: Path) -> Trace:
    if path.is_dir():
        raise InputError(f"a folder; {_EXPECTED}. Give one file of it")
    with unpacked(path) as (stream, magic):
        _refuse_other_files(path, magic)
        if not magic.startswith(SQLITE_MAGIC):
            trace = read_kineto(stream)
            note = "the packed file lacks its last part, so what was read of it could not be checked"
            return replace(trace, notes=(*trace.notes, note)) if is_cut_off(stream) else trace
        if is_packed(stream):
            return _read_unpacked_copy(stream)
        from perfmodel.readers.nsys import read_nsys  # its driver imports pandas and pyarrow where they are installed

        return read_nsys(path)


def _refuse_other_files(path: Path, magic: bytes) -> None:
    if not magic:
        raise InputError(f"an empty file; {_EXPECTED}")
    if path.suffix in _OTHER_SUFFIXES and not magic.startswith(SQLITE_MAGIC):
        raise InputError(_OTHER_SUFFIXES[path.suffix].format(stem=path.stem, name=path.name))
    for start, found in _OTHER_FILES.items():
        if magic.startswith(start):
            raise InputError(found)
    is_json = magic.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[", b"")
    if not is_json and not magic.startswith(SQLITE_MAGIC):
        raise InputError(f"a file that begins with {magic[:16]!r}; {_EXPECTED}")


def _read_unpacked_copy(stream: BufferedReader) -> Trace:
    """The trace in a packed SQLite file, which can only be read from a disk."""
    from perfmodel.readers.nsys import read_nsys

    with tempfile.TemporaryDirectory(prefix="perfmodel-") as folder:
        copy = Path(folder) / "unpacked.sqlite"
        with copy.open("wb") as file:
            shutil.copyfileobj(stream, file)
        return read_nsys(copy)

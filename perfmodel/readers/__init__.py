"""Which file is this, and what trace is in it: `read_trace` looks at the first bytes and calls the vendor's reader."""

import shutil
import tempfile
from codecs import BOM_UTF8
from dataclasses import replace
from functools import partial
from io import BufferedReader
from pathlib import Path

from perfmodel.cache import read_cached
from perfmodel.errors import InputError, about
from perfmodel.readers.folder import read_ranks
from perfmodel.readers.kineto import read_kineto
from perfmodel.readers.limits import Limits
from perfmodel.readers.unpack import is_cut_off, is_packed, unpacked
from perfmodel.trace import Trace

SQLITE_MAGIC = b"SQLite format 3\0"

NSYS_REPORTS = (".nsys-rep", ".qdrep")

_EXPECTED = "expected a PyTorch profiler trace (.json, .json.gz) or an Nsight Systems export (.sqlite)"
_BESIDE_TRACE = "give them beside one, `perfmodel analyze TRACE --ncu FILE`"
_COUNTERS = f"counters of Nsight Compute, which hold no trace; {_BESIDE_TRACE}"
_PICKLE = f"a Python pickle, such as a memory snapshot of torch.cuda; {_EXPECTED}"
# First bytes of files that people hand over instead of a trace -> what they are and what to do.
_OTHER_FILES = {
    b"version https://git-lfs": "a Git LFS pointer, not the trace itself; fetch the file with `git lfs pull`",
    b"==PROF==": _COUNTERS,
    b'"ID","Process ID"': _COUNTERS,
    b"\x80\x04": _PICKLE,
    b"\x80\x05": _PICKLE,
    b"<": f"a page of HTML or XML, as failed downloads and memory timelines are; {_EXPECTED}",
    b"PAR1": f"a Parquet file; {_EXPECTED}",
}
# Suffix -> what to do; these formats have no open reader.
_OTHER_SUFFIXES = {
    ".ncu-rep": "an Nsight Compute report, which times single kernels and holds no trace; record one with nsys "
    "or torch, or export the counters with `ncu --import {name} --csv --page raw` and " + _BESIDE_TRACE,
}


def read_trace(path: str | Path, cache: str | Path | None = None, limits: Limits | None = None) -> Trace:
    """The trace in a file: PyTorch profiler JSON or an Nsight Systems .sqlite, plain or packed, whatever its suffix.

    A folder of Parquet files that `nsys` exported is read too, and a report (.nsys-rep) where `nsys` is installed.
    Any other folder holds the files of ranks and is one trace with `rank` set (`folder.read_ranks` has options).
    With `cache`, "beside" or a folder, it is kept there as Parquet and taken from there while the file is unchanged.
    Raises InputError, one sentence that says what was found and what was expected, for anything else, and its subclass
    TooLargeError for what takes more than `limits` allow; a folder of ranks is then read by this process alone.
    """
    path = Path(path)
    with about(path):
        if not is_folder_of_ranks(path):
            read = partial(_read, limits=limits)
            return read(path) if cache is None else read_cached(path, cache, read)
    return read_ranks(path, cache, limits=limits)


def is_folder_of_ranks(path: Path) -> bool:
    """Is this a folder with a trace for each rank, and no export of a single one."""
    return path.is_dir() and not _is_nsys_folder(path)


def _read(path: Path, limits: Limits | None = None) -> Trace:
    is_report = path.suffix in NSYS_REPORTS and not path.is_dir() and not _begins_with(path, SQLITE_MAGIC)
    if limits is not None and (is_report or path.is_dir()):
        what = "an Nsight Systems report" if is_report else "a folder of Parquet files"
        raise InputError(f"{what}, which is not read here; export it with `nsys export --type sqlite`")
    if _is_nsys_folder(path):
        from perfmodel.readers.nsys import read_nsys_parquet

        return read_nsys_parquet(path)
    if is_report:
        from perfmodel.readers.nsys import read_nsys_report

        return read_nsys_report(path)
    with unpacked(path, limits) as (stream, magic):
        _refuse_other_files(path, magic)
        if not magic.startswith(SQLITE_MAGIC):
            trace = read_kineto(stream, limits=limits)
            note = "the packed file lacks its last part, so what was read of it could not be checked"
            return replace(trace, notes=(*trace.notes, note)) if is_cut_off(stream) else trace
        if is_packed(stream):
            return _read_unpacked_copy(stream, limits)
        from perfmodel.readers.nsys import read_nsys

        return read_nsys(path, limits)


def _is_nsys_folder(path: Path) -> bool:
    """Is this a folder that `nsys export --type parquetdir` wrote: one Parquet file for each table of a report."""
    return (path / "StringIds.parquet").is_file() or any(path.glob("CUPTI_ACTIVITY_KIND_*.parquet"))


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _refuse_other_files(path: Path, magic: bytes) -> None:
    if not magic:
        raise InputError(f"an empty file; {_EXPECTED}")
    if path.suffix in _OTHER_SUFFIXES and not magic.startswith(SQLITE_MAGIC):
        raise InputError(_OTHER_SUFFIXES[path.suffix].format(name=path.name))
    for start, found in _OTHER_FILES.items():
        if magic.startswith(start):
            raise InputError(found)
    is_json = magic.removeprefix(BOM_UTF8).lstrip()[:1] in (b"{", b"[", b"")
    if not is_json and not magic.startswith(SQLITE_MAGIC):
        raise InputError(f"a file that begins with {magic[:16]!r}; {_EXPECTED}")


def _read_unpacked_copy(stream: BufferedReader, limits: Limits | None) -> Trace:
    """The trace in a packed SQLite file, which can only be read from a disk."""
    from perfmodel.readers.nsys import read_nsys

    with tempfile.TemporaryDirectory(prefix="perfmodel-") as folder:
        copy = Path(folder) / "unpacked.sqlite"
        with copy.open("wb") as file:
            shutil.copyfileobj(stream, file)
        return read_nsys(copy, limits)

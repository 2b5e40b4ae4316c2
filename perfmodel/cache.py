"""How is a trace that was read once read again in a moment: one Parquet file, keyed by the bytes of its source.

A cache is used only when it is whole, was written by this schema and these readers, and its source is unchanged; that
is decided as git decides it for its index (docs/decisions/0013-cache.md). A cache is never the cause of an error: where
none can be written or trusted, the source is read.
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import polars as pl

from perfmodel.errors import InputError
from perfmodel.trace import EVENTS, Trace

# Raise it whenever a reader makes another Trace of the same bytes: every older cache is then read anew.
READER_VERSION = 4
SUFFIX = ".perfmodel.parquet"
BESIDE = "beside"

# A file written this close to the moment it was looked at may change again without a new time: FAT counts in 2 s.
RACY_NS = 2 * 10**9
_N_SAMPLES = 16
_SAMPLE_BYTES = 64 * 2**10
_SIDE_FILES = ("-wal", "-journal")  # SQLite keeps there what is not yet, or no longer, in the database itself
_NO_CHECKSUM = b"0" * 64  # stands in the file while its checksum is taken
_CHECKSUM_KEY = "perfmodel.checksum"
_MARK = _CHECKSUM_KEY.encode() + b"\x18\x40"  # the key as Parquet writes it: then a text, of 64 bytes


@dataclass(frozen=True)
class Stamp:
    """What tells without reading all of a source that it is the one seen before.

    `files` has size, mtime_ns, ctime_ns and inode of the file and of its side files, `sample` is the digest of blocks
    spread over them, `taken_ns` the moment before the first of this was looked at.
    """

    files: list[list[int]]
    sample: str
    taken_ns: int

    def is_racy(self) -> bool:
        """Could the source have changed after the stamp and bear the same times: was it written just before."""
        return any(max(mtime_ns, ctime_ns) >= self.taken_ns - RACY_NS for _, mtime_ns, ctime_ns, _ in self.files)


@dataclass(frozen=True)
class _Kept:
    """A sound cache file that is not decoded yet."""

    data: bytes
    stamp: Stamp
    digest: str
    record: dict[str, Any]


def read_cached(path: Path, cache: str | Path, read: Callable[[Path], Trace]) -> Trace:
    """The trace in a file, from its cache where that is sound, else by `read`, after which there is a cache.

    `cache` is "beside" (`NAME.perfmodel.parquet` beside the file) or a folder, made where absent, whose files bear a
    digest of the source. Raises what `read` raises; a cache that cannot be read, trusted or written is no error.
    """
    if not path.is_file():
        return read(path)  # a pipe can be read only once
    try:
        stamp = _stamp(path)
        place = _place(path, cache, stamp)
        kept = _open(place)
        if kept and _same(kept.stamp, stamp) and not kept.stamp.is_racy() and (trace := _decoded(kept)):
            return trace
        digest = _digest(path)
        if kept and kept.digest == digest and (trace := _decoded(kept)):
            if not stamp.is_racy():  # a racy stamp would spare nobody the digest
                save(trace, place, stamp, digest)
            return trace
    except OSError:
        return read(path)
    del kept
    trace = read(path)
    with suppress(OSError):
        if _same(_stamp(path), stamp):
            save(trace, place, stamp, digest)
    return trace


def cache_version() -> str:
    """Which schema and readers wrote a cache: a digest of the columns, the fields of Trace and the readers.

    Readers count by READER_VERSION, which is raised by hand.
    """
    columns = [f"{name}: {dtype}" for name, dtype in EVENTS.items()]
    text = json.dumps([READER_VERSION, columns, [field.name for field in fields(Trace)]])
    return hashlib.sha256(text.encode()).hexdigest()


def save(trace: Trace, place: Path, stamp: Stamp, digest: str) -> bool:
    """Whether a cache could be written: the whole of a trace as one Parquet file, beside its place and then renamed.

    None is written where the file system does not let us, or where JSON would not give back what the trace records.
    """
    record = {field.name: getattr(trace, field.name) for field in fields(trace) if field.name != "events"}
    record |= {"notes": list(trace.notes), "meta": dict(trace.meta)}
    if not _is_json(record):
        return False
    packed = BytesIO()
    trace.events.write_parquet(
        packed,
        compression="zstd",
        compression_level=1,
        metadata={
            "perfmodel.version": cache_version(),
            "perfmodel.source": json.dumps({**asdict(stamp), "digest": digest}),
            "perfmodel.record": json.dumps(record),
            _CHECKSUM_KEY: _NO_CHECKSUM.decode(),
        },
    )
    data = packed.getvalue()
    at = data.rfind(_MARK + _NO_CHECKSUM)
    if at < 0:
        return False
    at += len(_MARK)
    return _write(place, (data[:at], _checksum(data, at), data[at + len(_NO_CHECKSUM) :]))


def _write(place: Path, parts: tuple[bytes, ...]) -> bool:
    temporary = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.writelines(parts)
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _is_json(value: Any) -> bool:
    """Whether JSON gives back exactly this value; it would turn tuples into lists and other keys into text."""
    if isinstance(value, dict):
        return type(value) is dict and all(type(key) is str and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return type(value) is list and all(map(_is_json, value))
    return value is None or type(value) in (str, int, float, bool)


def _checksum(data: bytes, at: int) -> bytes:
    """The SHA-256 of a cache file as it was before its checksum was written at `at`."""
    view = memoryview(data)
    digest = hashlib.sha256(view[:at])
    digest.update(_NO_CHECKSUM)
    digest.update(view[at + len(_NO_CHECKSUM) :])
    return digest.hexdigest().encode()


def _place(path: Path, cache: str | Path, stamp: Stamp) -> Path:
    if cache == BESIDE:
        return path.with_name(path.name + SUFFIX)
    return Path(cache) / f"{stamp.sample[:32]}{SUFFIX}"


def _open(place: Path) -> _Kept | None:
    """The cache file at a place; None where there is none that is whole and of this version."""
    try:
        data = place.read_bytes()
    except OSError:
        return None
    at = data.rfind(_MARK) + len(_MARK)
    # Polars must not meet damaged bytes: it checks no sums, so they may be an error, a panic or a wrong number.
    if at < len(_MARK) or data[at : at + len(_NO_CHECKSUM)] != _checksum(data, at):
        return None
    metadata = pl.read_parquet_metadata(data)
    if metadata.get("perfmodel.version") != cache_version():
        return None
    source = json.loads(metadata["perfmodel.source"])
    digest = source.pop("digest")
    return _Kept(data, Stamp(**source), digest, json.loads(metadata["perfmodel.record"]))


def _decoded(kept: _Kept) -> Trace | None:
    record = kept.record | {"notes": tuple(kept.record["notes"])}
    try:
        return Trace(events=pl.read_parquet(kept.data), **record)
    except (InputError, pl.exceptions.PolarsError):  # written by a Polars that knows more than this one
        return None


def _same(one: Stamp, other: Stamp) -> bool:
    return one.files == other.files and one.sample == other.sample


def _sources(path: Path) -> list[Path]:
    """The file and those of its side files that hold anything."""
    sides = [path.with_name(path.name + suffix) for suffix in _SIDE_FILES]
    return [path, *(side for side in sides if side.exists() and side.stat().st_size)]


def _stamp(path: Path) -> Stamp:
    taken_ns = time.time_ns()
    files, digest = [], hashlib.sha256()
    for source in _sources(path):
        state = source.stat()
        files.append([state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino])
        digest.update(str(state.st_size).encode())
        last = max(state.st_size - _SAMPLE_BYTES, 0)
        with source.open("rb") as file:
            for offset in sorted({last * i // (_N_SAMPLES - 1) for i in range(_N_SAMPLES)}):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return Stamp(files, digest.hexdigest(), taken_ns)


def _digest(path: Path) -> str:
    """The SHA-256 of the file, and after a `+` those of its side files."""
    digests = []
    for source in _sources(path):
        with source.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return "+".join(digests)

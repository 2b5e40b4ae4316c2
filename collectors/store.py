"""The files of a capture folder: written whole or appended line by line, so that a killed measurement loses nothing.

Needs no torch. `capture.json` and `workloads.jsonl` are written beside and renamed; the journals (`calibration.jsonl`,
`observations.jsonl`, `left_out.jsonl`) grow by one flushed line per measurement, and a half-written last line is cut
off when the measurement continues.
"""

import errno
import gzip
import json
import os
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perfmodel.errors import InputError

CAPTURE, WORKLOADS, OBSERVATIONS, PROFILES = "capture.json", "workloads.jsonl", "observations.jsonl", "profiles"
PLAN = "plan.jsonl.gz"
CALIBRATION, LEFT_OUT = "calibration.jsonl", "left_out.jsonl"
SCHEMA = 1
LOCK_WAIT_S = 60.0
MOST_TRIED_FRAC = 0.9  # of a plan: then packing it saves nothing

Json = dict[str, Any]


def to_line(record: Mapping[str, object]) -> str:
    """One record as one compact line of JSON, newline included."""
    return json.dumps(record, separators=(",", ":")) + "\n"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises InputError when it cannot be written, such as on a full disk.
    """
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def write_capture(folder: Path, capture: Mapping[str, object], name: str = CAPTURE) -> None:
    """Write capture.json of a folder, or what stands for it in another kind of capture."""
    write_atomically(folder / name, json.dumps(capture, indent=1) + "\n")


def update_capture(folder: Path, **changes: object) -> Json:
    """Replace some entries of capture.json; returns the whole."""
    capture = {**read_capture(folder), **changes}
    write_capture(folder, capture)
    return capture


def read_capture(folder: Path, name: str = CAPTURE) -> Json:
    """The content of capture.json, or what stands for it; raises InputError when it is no capture of this schema."""
    path = folder / name
    try:
        capture = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(capture, dict) or capture.get("schema") != SCHEMA:
        raise InputError(f"{path} is not a capture of schema {SCHEMA}")
    return capture


def write_workloads(folder: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Write workloads.jsonl, one planned workload a line."""
    write_atomically(folder / WORKLOADS, "".join(to_line(line) for line in lines))


def read_workloads(folder: Path) -> list[Json]:
    """The planned workloads in file order; raises InputError when the file is missing or broken."""
    return _workload_lines(folder / WORKLOADS)


def _workload_lines(path: Path) -> list[Json]:
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        lines: list[Json] = [json.loads(line) for line in text.splitlines()]
        _ = [line["workload"] for line in lines]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error!r}") from None
    return lines


def pack_plan(folder: Path) -> None:
    """Leave in workloads.jsonl what was measured or left out; the whole plan goes packed to plan.jsonl.gz.

    A plan can be much longer than what its time reaches, and captures are meant to be handed on. Nothing happens when
    most of it was tried.
    """
    lines = read_workloads(folder)
    tried = {record.get("workload") for record in (*points(folder), *left_out(folder))}
    kept = [line for line in lines if line["workload"] in tried]
    if len(kept) > MOST_TRIED_FRAC * len(lines):
        return
    # No time in the header: equal plans are equal files.
    write_atomically(folder / PLAN, gzip.compress("".join(map(to_line, lines)).encode(), mtime=0))
    update_capture(folder, n_workloads=len(kept), n_planned=len(lines))
    write_workloads(folder, kept)


def unpack_plan(folder: Path) -> None:
    """Put the whole plan back into workloads.jsonl, where it was packed; raises InputError when it is damaged."""
    path = folder / PLAN
    if not path.exists():
        return
    lines = _workload_lines(path)
    write_workloads(folder, lines)
    update_capture(folder, n_workloads=len(lines), n_planned=len(lines))


def mend(folder: Path, name: str, keys: Sequence[str]) -> list[Json]:
    """The lines of a journal so far; a last line that a kill left unfinished is cut off the file.

    Raises InputError when a line before the last is broken or lacks a key: that is no interrupted write.
    """
    path = folder / name
    raw = path.read_bytes() if path.exists() else b""
    whole = raw[: raw.rfind(b"\n") + 1]
    records: list[Json] = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            for key in keys:
                _ = record[key]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}, is not a record of {', '.join(keys)}: {error!r}") from None
        records.append(record)
    if len(whole) < len(raw):
        with path.open("r+b") as file:
            file.truncate(len(whole))
            os.fsync(file.fileno())
    return records


def append(folder: Path, name: str, *records: Mapping[str, object]) -> None:
    """Add a line for each record to a journal and wait until they are on disk.

    Raises InputError when they cannot be written, such as on a full disk, and takes back what was written of them.
    """
    path, line = folder / name, "".join(map(to_line, records)).encode()
    try:
        with path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                n_written = file.write(line)
                if n_written != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def points(folder: Path) -> list[Json]:
    """The measured points so far (see `mend`)."""
    return mend(folder, OBSERVATIONS, ("workload", "run", "times_ns"))


def calibrations(folder: Path) -> list[Json]:
    """The calibration measurements so far (see `mend`)."""
    return mend(folder, CALIBRATION, ("probe", "params", "run", "value"))


def left_out(folder: Path) -> list[Json]:
    """What could not be measured, and why (see `mend`)."""
    return mend(folder, LEFT_OUT, ("reason",))


def lock(folder: Path, wait_s: float = LOCK_WAIT_S) -> int | None:
    """Keep others from writing to a folder: an open file descriptor that holds the lock while any process has it open.

    Waits for a writer that is about to end (the measuring process of a killed sweep finishes its point first). Null
    where the system has no such locks; raises InputError when the other writer stays.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    give_up = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > give_up:
                os.close(descriptor)
                raise InputError(f"another sweep is writing to {folder}; wait for it or choose another --out") from None
            time.sleep(0.1)
        except OSError:  # a file system without locks
            os.close(descriptor)
            return None

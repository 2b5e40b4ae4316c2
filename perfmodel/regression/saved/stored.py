"""Saved baselines: run medians of one machine, software and settings, in a folder of small JSON files fit for git.

`baseline.json` says what was measured, when, and what became of it; each workload has a file of its own, details of
traces stand in `details.json`. All files change together or not at all: what is to be written stands in `pending.json`
first, which is renamed into place, and counts from then on; then it is taken apart into the files and goes.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from perfmodel.capture_lines import Calibrated, Count, RunNumber, WorkloadLine, refuse_nested
from perfmodel.errors import InputError
from perfmodel.files import write_whole
from perfmodel.regression.evidence import CAPTURE
from perfmodel.text import short_name, shortened

STORE_SCHEMA = 1
HEAD, DETAILS, PENDING = "baseline.json", "details.json", "pending.json"
MAX_FILE_BYTES = 64 * 2**20
N_SLUG = 40  # characters of a file's or folder's name that are words
_CONFLICT = re.compile(rb"^(<{7}|={7}|>{7})( |\r?$)", re.MULTILINE)
_NUMBERS = re.compile(r"\[\n\s+([-\d][-+.\deE,\s]*)\n\s+\]")  # a list of numbers; strings hold no line ends in JSON

Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e300)]
Time = Annotated[float, msgspec.Meta(gt=1e-9, lt=1e19)]  # ns: what no clock tells has logarithms that lead nowhere
Finite = Annotated[float, msgspec.Meta(gt=-1e30, lt=1e30)]
LogSe = Annotated[float, msgspec.Meta(ge=0, lt=100)]
MAX_SECONDS = 250_000_000_000  # since 1970: a date of four digits
Second = Annotated[float, msgspec.Meta(ge=0, lt=MAX_SECONDS)]
Record = TypeVar("Record", bound=msgspec.Struct)


class _Strict(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A record of which no field may be unknown: a slip of the pen must not pass as nothing said."""


class RunLine(_Strict):
    """One run of an occasion; times are seconds since 1970, null where they are not known."""

    run: RunNumber
    started: Second | None = None
    finished: Second | None = None


class Occasion(_Strict):
    """One capture (or one set of traces) that stands in a baseline, by its digest, and what it was measured in.

    `taken` is the date of its collection. `calibration`, `settings`, `capabilities`, `collector` and what was `seen` of
    the machine on this occasion are those of the capture; `notes` are what a reader must know.
    """

    digest: str
    name: str
    runs: list[RunLine]
    taken: str | None = None
    may_drift: bool = False
    notes: list[str] = []
    collector: str | None = None
    settings: dict[str, Any] = {}
    capabilities: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    calibration: dict[str, Calibrated] = {}


class Entry(_Strict):
    """What was done to a baseline: with which capture, why, which facts it changed, and what became of the times.

    `old_ns` and `new_ns` are geometric means over the workloads of both, `ratio` new over old with its 90 % interval;
    null where there was nothing to compare. `n_left` workloads left the baseline, for the capture did not measure them.
    """

    event: Literal["saved", "added", "updated"]
    name: str
    digest: str
    n_workloads: Count
    taken: str | None = None
    reason: str | None = None
    changed: dict[str, tuple[Any, Any]] = {}
    n_left: Count = 0
    old_ns: Positive | None = None
    new_ns: Positive | None = None
    ratio: Positive | None = None
    ratio_low: Positive | None = None
    ratio_high: Positive | None = None


class Head(_Strict):
    """`baseline.json`: the fingerprint that all occasions share, the occasions, oldest first, what was done, and which
    workloads there are."""

    schema_version: int
    kind: Literal["capture", "traces"]
    fingerprint: dict[str, Any]
    occasions: list[Occasion]
    history: list[Entry]
    workloads: list[str]


class Planned(WorkloadLine, frozen=True, omit_defaults=True):
    """The line of a workload as it was planned."""


class Amounts(_Strict):
    """One detail: by the digest of an occasion and the number of a run its ns (or a count) of one step.

    `log_se` is the standard error of a single run's, by occasion, where the steps within it tell.
    """

    label: str
    medians_ns: dict[str, dict[RunNumber, Finite]]
    log_se: dict[str, LogSe] = {}
    facts: dict[str, Any] = {}


class Kept(Amounts, kw_only=True):
    """The file of a workload: what it is (`line` as planned, null for traces), and its run medians by occasion."""

    schema_version: int
    workload: str
    medians_ns: dict[str, dict[RunNumber, Time]]
    line: Planned | None = None


class Details(_Strict):
    """`details.json`: the costliest details by name, and how many were cut."""

    schema_version: int
    details: dict[str, Amounts]
    n_cut: Count = 0


class _Versioned(msgspec.Struct):
    schema_version: int


class _Pending(_Strict):
    schema_version: int
    files: dict[str, str]
    removed: list[str] = []


@dataclass(frozen=True)
class Baseline:
    """All files of one saved baseline, workloads by their key."""

    name: str
    head: Head
    workloads: Mapping[str, Kept]
    details: Mapping[str, Amounts] = field(default_factory=dict)
    n_details_cut: int = 0

    @property
    def occasions(self) -> dict[str, Occasion]:
        """The occasions by digest, oldest first."""
        return {one.digest: one for one in self.head.occasions}


def is_baseline(path: str | Path) -> bool:
    """Whether a folder is a saved baseline, be it one whose writing was cut short."""
    return (Path(path) / HEAD).is_file() or (Path(path) / PENDING).is_file()


def is_store(path: str | Path) -> bool:
    """Whether a folder holds saved baselines."""
    path = Path(path)
    return path.is_dir() and not is_baseline(path) and any(is_baseline(entry) for entry in path.iterdir())


def slug(words: str) -> str:
    """Words as a part of a file's name: lower case, digits and dashes, at most N_SLUG characters; may be empty."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:N_SLUG].rstrip("-")


def file_of(workload: str) -> str:
    """The name of a workload's file: its id, or for keys that no file should be named by words and a digest."""
    if re.fullmatch(r"[0-9a-f]{8,64}", workload):
        return f"{workload}.json"
    return f"{slug(workload) or 'workload'}-{short_name({'workload': workload})[:8]}.json"


@contextmanager
def locked(store: Path, *, to_write: bool) -> Iterator[None]:
    """Keep other writers from a store, or while reading all of them, until the end of the block.

    Where the system or a network's file system has no such locks, nobody is kept away; what is written is then still
    whole, and the last one wins.
    """
    with ExitStack() as held:
        with suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(store, os.O_RDONLY)
            held.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX if to_write else fcntl.LOCK_SH)
        yield


def read(folder: str | Path) -> Baseline:
    """All of a saved baseline; raises InputError naming the file that is missing, damaged or of another schema."""
    folder = Path(folder).resolve()  # its last part is its name, also where a path ends in `.`
    with locked(folder.parent, to_write=False):
        return read_unlocked(folder)


def read_unlocked(folder: Path) -> Baseline:
    """The same for who holds the lock."""
    pending = _pending(folder)
    head = _head(folder, pending)
    runs = {one.digest: {run.run for run in one.runs} for one in head.occasions}
    workloads = {}
    for key in head.workloads:
        file = file_of(key)
        kept = _decoded(folder, file, Kept, pending)
        other = {kept.workload, key if kept.line is None else kept.line.workload} - {key}
        if other:
            raise InputError(f"{_where(folder, file)} is of workload {_short(min(other))}, expected {_short(key)}")
        _check_runs(kept, runs, _where(folder, file), must_have=True)
        if head.kind == CAPTURE and kept.line is None:
            raise InputError(f"{_where(folder, file)} has no `line`, which every workload of a capture has")
        workloads[key] = kept
    if not workloads:
        raise InputError(f"{_where(folder, HEAD)} names no workload")
    details = Details(schema_version=STORE_SCHEMA, details={})
    if DETAILS in pending.files or (DETAILS not in pending.removed and (folder / DETAILS).is_file()):
        details = _decoded(folder, DETAILS, Details, pending)
    for detail in details.details.values():
        _check_runs(detail, runs, _where(folder, DETAILS), must_have=False)
    return Baseline(folder.name, head, workloads, details.details, details.n_cut)


def read_head(folder: Path) -> Head:
    """What a baseline is of, without its times; raises InputError as `read` does."""
    return _head(folder, _pending(folder))


def _head(folder: Path, pending: _Pending) -> Head:
    head = _decoded(folder, HEAD, Head, pending)
    if not head.occasions:
        raise InputError(f"{_where(folder, HEAD)} lists no occasion")
    return head


def foreign_files(folder: Path, head: Head) -> list[str]:
    """The names in the folder of a baseline that are none of its own files."""
    own = {HEAD, DETAILS, PENDING, *map(file_of, head.workloads)}
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in own)


def write(folder: Path, baseline: Baseline) -> None:
    """Make the files of a folder those of a baseline, for who holds the lock; what is the same already stays untouched.

    Raises InputError for what JSON cannot hold, and where a file cannot be written.
    """
    details = Details(schema_version=STORE_SCHEMA, details=dict(baseline.details), n_cut=baseline.n_details_cut)
    records: dict[str, msgspec.Struct] = {HEAD: baseline.head}
    records |= {file_of(key): kept for key, kept in baseline.workloads.items()}
    records |= {DETAILS: details} if baseline.details else {}
    texts = {name: _text(record) for name, record in records.items()}
    folder.mkdir(parents=True, exist_ok=True)
    before: set[str] = set()
    if is_baseline(folder):
        _take_apart(folder, _pending(folder))
        before = {HEAD, DETAILS, *map(file_of, read_head(folder).workloads)}
    changed = {name: words for name, words in texts.items() if _now(folder / name) != words.encode()}
    removed = sorted(name for name in before - set(texts) if (folder / name).is_file())
    if changed or removed:
        pending = _Pending(schema_version=STORE_SCHEMA, files=changed, removed=removed)
        write_whole(folder / PENDING, _text(pending).encode())
        _take_apart(folder, pending)


def _take_apart(folder: Path, pending: _Pending) -> None:
    """Make the files that are pending; doing it again after a crash does no harm."""
    for name, words in pending.files.items():
        write_whole(folder / name, words.encode())
    for name in (*pending.removed, PENDING):
        (folder / name).unlink(missing_ok=True)


def _pending(folder: Path) -> _Pending:
    nothing = _Pending(schema_version=STORE_SCHEMA, files={})
    if not (folder / PENDING).is_file():
        return nothing
    found = _decoded(folder, PENDING, _Pending, nothing)
    for name in (*found.files, *found.removed):
        if Path(name).name != name or not name.endswith(".json"):
            raise InputError(f"{_where(folder, PENDING)} names {_short(name)}, expected names of files in its folder")
    return found


def _now(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _where(folder: Path, file: str) -> str:
    return f"baseline {folder.name!r}: {file}"


def _short(words: str) -> str:
    return repr(shortened(words, N_SLUG))


def _decoded(folder: Path, name: str, of: type[Record], pending: _Pending) -> Record:
    where = _where(folder, name)
    if name in pending.files:
        content = pending.files[name].encode()
    else:
        try:
            if (folder / name).stat().st_size > MAX_FILE_BYTES:
                raise InputError(f"{where} has more than {MAX_FILE_BYTES // 2**20} MiB")
            content = (folder / name).read_bytes()
        except FileNotFoundError:
            raise InputError(f"{where} is missing") from None
        except OSError as error:
            raise InputError(f"{where} cannot be read: {error.strerror or error}") from None
    if _CONFLICT.search(content):
        raise InputError(f"{where} holds a merge conflict that is not resolved")
    try:
        refuse_nested(msgspec.json.decode(content), where)
        version = msgspec.json.decode(content, type=_Versioned).schema_version
        if version != STORE_SCHEMA:
            raise InputError(f"{where} has schema_version {version}, this version reads {STORE_SCHEMA}")
        return msgspec.json.decode(content, type=of)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{where} is damaged: {error}") from None


def _check_runs(one: Kept | Amounts, runs: Mapping[str, set[int]], where: str, *, must_have: bool) -> None:
    """Refuse medians of occasions or runs that the head does not know, and a workload without any."""
    for digest, medians in one.medians_ns.items():
        if digest not in runs:
            raise InputError(f"{where} has medians of occasion {_short(digest)}, which {HEAD} does not list")
        unknown = set(medians) - runs[digest]
        if unknown:
            raise InputError(f"{where} has a median of run {min(unknown)}, which {HEAD} does not list")
    if must_have and not any(one.medians_ns.values()):
        raise InputError(f"{where} holds no median")


def _text(record: msgspec.Struct) -> str:
    """A record as JSON for people and git: sorted keys, a line for each value, lists of numbers in one line."""
    plain = _plain(msgspec.to_builtins(record))
    try:
        words = json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        msgspec.json.decode(words.encode(), type=type(record))  # what could not be read again is not written
    except msgspec.MsgspecError as error:
        raise InputError(f"this cannot be saved: {error}") from None
    except ValueError:  # an encoding that cannot be, too
        raise InputError("a baseline cannot hold numbers that are none, nor broken characters") from None
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", words) + "\n"


def _plain(value: Any) -> Any:
    """The value with whole numbers written as such."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value

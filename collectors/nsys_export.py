"""Copy of an Nsight Systems export that holds what was measured and not whose machine it was; is it whole.

Needs the standard library alone. A report of nsys holds the environment, all processes and command lines of the
machine; so a new database is made of the tables, columns and strings that are known to be harmless, and what a later
version adds is left out until someone has looked at it.
"""

import getpass
import json
import re
import socket
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

from perfmodel.errors import InputError

# Tables whose columns of numbers are copied; newer versions may add a suffix such as _V2.
MEASURED = (
    "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME",
    "CUPTI_ACTIVITY_KIND_MEMCPY", "CUPTI_ACTIVITY_KIND_MEMSET", "CUPTI_ACTIVITY_KIND_GRAPH_TRACE",
    "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION", "CUPTI_ACTIVITY_KIND_OVERHEAD", "PROFILER_OVERHEAD", "OSRT_API",
    "NVTX_EVENTS", "DIAGNOSTIC_EVENT", "TARGET_INFO_GPU", "TARGET_INFO_CUDA_GPU", "TARGET_INFO_CUDA_DEVICE",
)  # fmt: skip
# Columns of text that are copied too, paths and names of host and user taken out of them.
WORDS = {
    "NVTX_EVENTS": ("text",),
    "DIAGNOSTIC_EVENT": ("text",),
    "TARGET_INFO_GPU": ("name", "chipName"),
    "TARGET_INFO_CUDA_GPU": ("name",),
}
# Serial numbers and addresses; stacks, whose tables are not copied; and the longest names, which say nothing new.
LEFT_COLUMNS = ("uuid", "luid", "busLocation", "pwGpuId", "virtualAddress", "callchainId", "mangledName")
STRING_COLUMNS = ("demangledName", "shortName", "nameId", "textId")  # ids of StringIds
# Of what the export says of itself, these names: versions and how graphs were recorded.
KEPT_META = re.compile(
    r"EXPORT_(PRODUCT_(NAME|VERSION)|SCHEMA_VERSION\w*)|CAPTURE_EVENT_TYPE|CUDA_GRAPH_TRACE\w*(:\w+)?"
)
PATH = re.compile(r"(?<![\w.>)\]}&*/])~?/[\w.@+-]+(/[\w.@+-]*)*|\b[A-Za-z]:\\\S+")
POINTS = "PERFMODEL_POINTS"  # our own table: the range of each point and its line of workloads.jsonl
PAGE_BYTES = 1024  # most tables are small, and each takes a page at least
MOST_BYTES = 800_000  # of the copy; beyond, the calls of the operating system are left out
RANGES = (59, 60, 70, 71)  # NVTX ranges, pushed and started
OWN = "perfmodel::"  # how the names of our ranges begin


def _base(table: str) -> str:
    return re.sub(r"_V\d+$", "", table)


def _columns(database: sqlite3.Connection, table: str) -> dict[str, str]:
    """The columns of a table with their declared types."""
    return {row[1]: row[2] for row in database.execute(f'PRAGMA table_info("{table}")')}


def _tables(database: sqlite3.Connection) -> list[str]:
    return [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]


def _identities() -> list[str]:
    """Names of this host and user that are long enough to be nothing else."""
    names = [socket.gethostname(), socket.gethostname().partition(".")[0]]
    with suppress(KeyError, OSError):  # a user without a name
        names.append(getpass.getuser())
    return sorted({name for name in names if len(name) > 4}, key=len, reverse=True)


def anonymous(words: str, identities: Iterable[str] = ()) -> str:
    """Words with paths and the given names taken out; names of kernels and of our ranges stay whole."""
    found = PATH.sub("(path)", words)
    for name in identities:
        found = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "(name)", found)
    return found


def _copy_table(old: sqlite3.Connection, new: sqlite3.Connection, table: str, identities: Iterable[str]) -> None:
    columns = {name: kind for name, kind in _columns(old, table).items() if name not in LEFT_COLUMNS}
    words = [name for name in WORDS.get(_base(table), ()) if name in columns]
    numbers = [name for name, kind in columns.items() if not re.search("TEXT|CHAR|CLOB|BLOB", kind, re.I)]
    numbers = [name for name in numbers if name not in words]
    if not numbers:
        return
    # Text in a number's place would bring along what the columns of text are left out for.
    asked = [f"CASE WHEN typeof(\"{c}\") IN ('integer', 'real') THEN \"{c}\" END" for c in numbers]
    asked += [f'CAST("{c}" AS TEXT)' for c in words]
    declared = [f'"{c}" {columns[c]}' for c in numbers] + [f'"{c}" TEXT' for c in words]
    new.execute(f'CREATE TABLE "{table}" ({", ".join(declared)})')
    marks = ", ".join("?" * len(declared))
    rows = (
        (*row[: len(numbers)], *(None if w is None else anonymous(w, identities) for w in row[len(numbers) :]))
        for row in old.execute(f'SELECT {", ".join(asked)} FROM "{table}"')
    )
    new.executemany(f'INSERT INTO "{table}" VALUES ({marks})', rows)


def _copy_strings(old: sqlite3.Connection, new: sqlite3.Connection, identities: Iterable[str]) -> None:
    """The strings that copied records refer to, and no others: the rest are processes, threads and environments."""
    if not {"id", "value"} <= set(_columns(old, "StringIds")):
        return
    wanted: set[int] = set()
    for table in _tables(new):
        for column in set(STRING_COLUMNS) & set(_columns(new, table)):
            wanted.update(i for (i,) in new.execute(f'SELECT DISTINCT "{column}" FROM "{table}"') if i is not None)
    new.execute("CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT)")
    for number, value in old.execute("SELECT id, CAST(value AS TEXT) FROM StringIds ORDER BY id"):
        if number in wanted:
            new.execute("INSERT OR IGNORE INTO StringIds VALUES (?, ?)", (number, anonymous(value or "", identities)))


def _copy_meta(old: sqlite3.Connection, new: sqlite3.Connection) -> None:
    for table in ("META_DATA_EXPORT", "META_DATA_CAPTURE"):
        if {"name", "value"} <= set(_columns(old, table)):
            rows = old.execute(f"SELECT CAST(name AS TEXT), CAST(value AS TEXT) FROM {table}").fetchall()
            kept = [(name, value) for name, value in rows if KEPT_META.fullmatch(name or "")]
            new.execute(f"CREATE TABLE {table} (name TEXT, value TEXT)")
            new.executemany(f"INSERT INTO {table} VALUES (?, ?)", kept)


def scrub(export: Path, clean: Path, lines: Mapping[str, Mapping[str, object]]) -> None:
    """Copy the measured part of an export into a new file, with the line of each point under the name of its range.

    Raises InputError when the export is no database that SQLite can read.
    """
    _copy(export, clean, lines, MEASURED)
    if clean.stat().st_size > MOST_BYTES:
        _copy(export, clean, lines, [table for table in MEASURED if table != "OSRT_API"])


def _copy(export: Path, clean: Path, lines: Mapping[str, Mapping[str, object]], kept: Sequence[str]) -> None:
    identities = _identities()
    clean.unlink(missing_ok=True)
    try:
        with (
            closing(sqlite3.connect(f"{export.absolute().as_uri()}?mode=ro", uri=True)) as old,
            closing(sqlite3.connect(clean)) as new,
        ):
            old.text_factory = lambda raw: raw.decode("utf-8", "replace")  # names may be cut inside a character
            new.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            for table in _tables(old):
                if _base(table) in kept:
                    _copy_table(old, new, table, identities)
            _copy_strings(old, new, identities)
            _copy_meta(old, new)
            new.execute(f"CREATE TABLE {POINTS} (range TEXT, line TEXT)")
            points = [(name, json.dumps(line, separators=(",", ":"))) for name, line in lines.items()]
            new.executemany(f"INSERT INTO {POINTS} VALUES (?, ?)", points)
            new.commit()
            new.execute("VACUUM")
    except sqlite3.Error as error:
        raise InputError(f"the export of nsys cannot be read ({error})") from None


def kernels_in_ranges(export: Path) -> dict[str, tuple[int, int]]:
    """For each name of our NVTX ranges how often it is there and how many kernels were launched within all of them."""
    with closing(sqlite3.connect(f"{export.absolute().as_uri()}?mode=ro", uri=True)) as database:
        tables = _tables(database)
        if "NVTX_EVENTS" not in tables:
            return {}
        columns = _columns(database, "NVTX_EVENTS")
        text = "n.text" if "text" in columns else "NULL"
        by_id = "SELECT value FROM StringIds s WHERE s.id = n.textId" if "textId" in columns else "SELECT NULL"
        kind = f"n.eventType IN {RANGES}" if "eventType" in columns else "1"
        ranges = database.execute(
            f"SELECT COALESCE({text}, ({by_id})), n.start, n.end, n.globalTid FROM NVTX_EVENTS n "
            f"WHERE {kind} AND n.end IS NOT NULL"
        ).fetchall()
        kernels = _kernel_counts(database, tables)
        calls = [t for t in tables if _base(t) == "CUPTI_ACTIVITY_KIND_RUNTIME"]
        launched = [
            (start, tid, kernels[link])
            for t in calls
            for start, tid, link in database.execute(f'SELECT start, globalTid, correlationId FROM "{t}"')
            if link in kernels
        ]
    found: dict[str, tuple[int, int]] = {}
    for name, start, end, tid in ranges:
        if name is not None and name.startswith(OWN):
            n_ranges, n_kernels = found.get(name, (0, 0))
            inside = sum(n for at, thread, n in launched if thread == tid and start <= at <= end)
            found[name] = n_ranges + 1, n_kernels + inside
    return found


def _kernel_counts(database: sqlite3.Connection, tables: Iterable[str]) -> dict[int, int]:
    """Kernels by the id of the call that launched them; the replay of a graph launches many."""
    counts: dict[int, int] = {}
    for table in tables:
        if _base(table) in ("CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL"):
            for link, n in database.execute(f'SELECT correlationId, count(*) FROM "{table}" GROUP BY correlationId'):
                counts[link] = counts.get(link, 0) + n
    return counts


def gaps(export: Path, expected: Mapping[str, int]) -> dict[str, str]:
    """What is missing of each expected range, by its name: empty when all is there.

    Raises InputError when there is no kernel or no expected range at all, saying what may be the cause.
    """
    try:
        found = kernels_in_ranges(export)
        with closing(sqlite3.connect(f"{export.absolute().as_uri()}?mode=ro", uri=True)) as database:
            n_kernels = sum(_kernel_counts(database, _tables(database)).values())
    except sqlite3.Error as error:
        raise InputError(f"the export of nsys has other tables than expected ({error})") from None
    if not n_kernels:
        raise InputError(
            "nsys recorded no CUDA kernel: another profiler (ncu, DCGM, a debugger, torch's profiler) holds the "
            "device's tracing, or this nsys is older than the driver"
        )
    if not any(name in found for name in expected):
        raise InputError(
            "nsys recorded kernels and none of the named ranges: without the nvtx package names are unregistered and "
            "need NSYS_NVTX_PROFILER_REGISTER_ONLY=0"
        )
    missing: dict[str, str] = {}
    for name, n_expected in expected.items():
        n_ranges, n_inside = found.get(name, (0, 0))
        if n_ranges != n_expected:
            missing[name] = f"nsys recorded the range {n_ranges} times, expected {n_expected}"
        elif not n_inside:
            missing[name] = "nsys recorded the range and no kernel launched in it"
    return missing

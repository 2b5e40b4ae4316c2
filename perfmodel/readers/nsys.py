"""How does an Nsight Systems export become EVENTS: an SQLite file, a folder of Parquet files, or a report to export."""

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from perfmodel.errors import InputError
from perfmodel.readers.limits import Limits
from perfmodel.readers.nsys_processes import PROCESS, Processes
from perfmodel.readers.nsys_tables import Tables, parquet_tables, sqlite_tables
from perfmodel.readers.nsys_words import column, named, strings_of
from perfmodel.trace import DEVICE_KINDS, EVENTS, MAX_DUR_NS, Trace, filtered, repeated

# Tables are written only when they have rows or might have had; newer ones may carry a suffix such as _V2.
TABLES = {
    "kernel": ("CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL"),
    "call": ("CUPTI_ACTIVITY_KIND_RUNTIME",),
    "copy": ("CUPTI_ACTIVITY_KIND_MEMCPY",),
    "set": ("CUPTI_ACTIVITY_KIND_MEMSET",),
    "replay": ("CUPTI_ACTIVITY_KIND_GRAPH_TRACE",),
    "range": ("NVTX_EVENTS",),
    "overhead": ("PROFILER_OVERHEAD", "CUPTI_ACTIVITY_KIND_OVERHEAD"),  # of the profiler itself, and of the driver
}
# Push/pop and start/end, and both from text files; other types mark an instant or name things.
NVTX_RANGES = (59, 60, 70, 71)

# Columns of any table, where present: the first that is there and not null counts.
_COLUMNS = {
    "start_ns": ("start",),
    "end_ns": ("end",),
    "tid": ("globalTid", "globalPid"),  # hardware 8 bits, VM 8, process 24, thread 24 (0 in globalPid)
    "end_tid": ("endGlobalTid",),
    "device": ("deviceId",),
    "stream": ("streamId",),
    "correlation": ("correlationId",),
    "name_id": ("demangledName", "shortName", "nameId", "textId"),
    "bytes": ("bytes",),
    "graph": ("graphId",),
    "graph_node": ("graphNodeId",),  # its upper half is the graph's id, in exports that lack graphId
    "copy_kind": ("copyKind",),
    "from_memory": ("srcKind",),
    "to_memory": ("dstKind",),
    "event_type": ("eventType",),
    "grid_x": ("gridX",),
    "grid_y": ("gridY",),
    "grid_z": ("gridZ",),
}
_MAX_CORRELATION = 2**32
_FARTHEST_NS = 2**61  # beyond it a difference of two times may overflow

_NEEDED = ("start_ns", "end_ns", "tid", "device", "correlation", "name_id")
_NAMED_BY = ("name_id", "copy_kind", "from_memory", "to_memory", "text")

# By kind the columns of EVENTS but `kind` and `name`, in pieces, and what tells these. `dur_ns` is null for what never
# ended and negative where the end lies before the start. Every column of a piece is one array, so that a table of all
# pieces need not be put together anew, and the pieces are all that is held of the records.
_Rows = dict[str, list[pl.DataFrame]]


def read_nsys(path: Path, limits: Limits | None = None) -> Trace:
    """The trace in an Nsight Systems SQLite export, opened read-only; times in ns from the start of its session.

    A replay of a CUDA graph recorded as a whole is an event of kind `replay`; a range that never ended lasts until
    the last event. `meta["session_start_ns"]` is the start of the session since 1970, where the export tells it.
    Raises InputError when the file is no database, is damaged, or holds no CUDA activity, TooLargeError when its tables
    have more rows than `limits` allow.
    """
    with sqlite_tables(path, limits) as tables:
        return _trace(tables)


def read_nsys_parquet(folder: Path) -> Trace:
    """The trace in a folder that `nsys export --type parquetdir` wrote: the same as `read_nsys` gives of that report.

    Raises InputError when a file of the folder is damaged or none holds CUDA activity.
    """
    return _trace(parquet_tables(folder))


def read_nsys_report(path: Path) -> Trace:
    """The trace in an Nsight Systems report (.nsys-rep, .qdrep), which only `nsys` itself can open.

    An .sqlite file beside it that is not older is read instead; else `nsys` exports one into a temporary folder.
    Raises InputError with the command to run where there is no `nsys` on PATH or it fails.
    """
    beside = path.with_suffix(".sqlite")
    if beside.is_file() and beside.stat().st_mtime_ns >= path.stat().st_mtime_ns:
        trace = read_nsys(beside)
        return replace(trace, notes=(*trace.notes, f"read from {beside.name}, the export beside the report"))
    command = shlex.join(["nsys", "export", "--type", "sqlite", "--output", f"{path.stem}.sqlite", path.name])
    nsys = shutil.which("nsys")
    if nsys is None:
        raise InputError(
            f"an Nsight Systems report, and `nsys` is not on PATH to open it; convert it with `{command}` "
            "where Nsight Systems is installed and read the .sqlite file"
        )
    with tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch) / f"{path.stem}.sqlite"
        options = ["--type", "sqlite", "--force-overwrite", "true", "--output", str(exported)]
        done = subprocess.run(
            [nsys, "export", *options, str(path.absolute())],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode or not exported.is_file():
            words = " ".join((done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1].split())
            raise InputError(f"an Nsight Systems report that `nsys` could not export ({words}); try `{command}`")
        return read_nsys(exported)


def _trace(tables: Tables) -> Trace:
    processes = Processes()
    found, n_records, n_timed = _records(tables, processes)
    rows = _near(found)
    del found
    n_dropped = n_timed - sum(piece.height for piece in _all(rows))
    if not any(piece.height for piece in _all({**rows, "overhead": []})):
        raise InputError(f"an Nsight Systems export whose {n_records} records hold no complete CUDA call or kernel")
    n_unended = sum(piece["dur_ns"].null_count() for piece in rows["range"])
    n_backwards = sum(int((piece["dur_ns"] < 0).sum()) for piece in _all(rows))
    is_one = len(processes.callers) < 2
    n_unknown = 0 if is_one else sum(p["process"].null_count() for kind in DEVICE_KINDS for p in rows[kind])
    n_replays = sum(piece.height for piece in rows["replay"])
    events = _events(rows, strings_of(tables, _name_ids(rows)), processes)
    notes = {
        f"{n_dropped} records were left out: without start or end, with times that cannot be true, or of device work "
        "without a device": n_dropped,
        f"{n_unended} NVTX ranges never ended; they are taken to last until the last event": n_unended,
        f"{n_unknown} records of device work name no process, so their launch calls are unknown": n_unknown,
        f"{n_replays} CUDA graph replays were recorded as a whole: each counts as busy time, but the kernels inside "
        "are invisible and missing from kernel counts and launch metrics; record with "
        "`nsys profile --cuda-graph-trace=node`": n_replays,
    }
    return Trace(
        events,
        "nsys",
        n_records,
        n_dropped=n_dropped,
        n_repaired=n_backwards + n_unended,
        notes=tuple(note for note, n in notes.items() if n),
        meta=_meta(tables),
    )


def _records(tables: Tables, processes: Processes) -> tuple[_Rows, int, int]:
    """The plausible records of each kind, how many records there are, and how many of them have a duration."""
    found = {
        kind: [t for name in names for t in tables.columns if re.fullmatch(rf"{name}(_V\d+)?", t)]
        for kind, names in TABLES.items()
    }
    if not any(found[kind] for kind in ("kernel", "call", "replay")):
        what = ", ".join(sorted(tables.columns)[:6]) or "no tables"
        raise InputError(
            f"an export without CUDA activity (found {what}); expected an Nsight Systems export with "
            f"{TABLES['kernel'][0]}: record with `nsys profile --trace=cuda,nvtx`"
        )
    rows: _Rows = {kind: [] for kind in found}
    n_records = n_timed = 0
    gpus = _renumbered_gpus(tables)
    for kind in sorted(found, key="call".__ne__):  # calls first: they tell whose is device work without a process
        for records in _pieces(tables, found[kind]):
            timed = _ranges(records) if kind == "range" else records
            # `n_events` counts what the application did, whatever the profiler tells of itself.
            n_records += 0 if kind == "overhead" else records.height
            n_timed += timed.height
            usable = _plausible(kind, timed)
            if usable.height:
                moved = _on_gpus(usable, gpus) if kind in DEVICE_KINDS and gpus is not None else usable
                rows[kind].append(_timed(kind, moved, processes))
    return rows, n_records, n_timed


def _pieces(tables: Tables, names: Sequence[str]) -> Iterator[pl.DataFrame]:
    """The records of the tables of one kind; records that two versions of a table share count once."""
    if len(names) == 1:
        yield from _table(tables, names[0])
    elif names:
        yield _together([pl.concat(_table(tables, name)) for name in names])


def _all(rows: _Rows) -> Iterator[pl.DataFrame]:
    return (piece for pieces in rows.values() for piece in pieces)


def _table(tables: Tables, table: str) -> Iterator[pl.DataFrame]:
    if "start" not in tables.columns[table]:
        has = ", ".join(sorted(tables.columns[table])[:6])
        raise InputError(f"an Nsight Systems export whose table {table} has no column start (it has {has})")
    there = {alias: [c for c in names if c in tables.columns[table]] for alias, names in _COLUMNS.items()}
    given = [pl.coalesce(names).alias(alias) for alias, names in there.items() if names]
    needed = [pl.lit(None, pl.Int64).alias(alias) for alias in _NEEDED if not there[alias]]
    for piece in tables.pieces(table, [c for names in there.values() for c in names], ["text"]):
        text = ["text"] if "text" in piece.columns else []
        yield piece.select(*given, *needed, *text)


def _together(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """One frame of several, without the records that they share."""
    filled = [frame for frame in frames if not frame.is_empty()]
    if len(filled) < 2:
        return filled[0] if filled else frames[0]
    shared = [c for c in filled[0].columns if all(c in frame.columns for frame in filled)]
    return pl.concat(filled, how="diagonal").unique(shared, keep="first", maintain_order=True)


def _ranges(records: pl.DataFrame) -> pl.DataFrame:
    """The NVTX records that have a duration; all of them where their type is not recorded."""
    kind = column(records, "event_type")
    return records.filter(kind.is_in(NVTX_RANGES) | kind.is_null())


def _plausible(kind: str, records: pl.DataFrame) -> pl.DataFrame:
    """The records with a start, an end (which a range may lack), times that can be true, and a device for its work."""
    start, end = (pl.col(name).is_between(-_FARTHEST_NS, _FARTHEST_NS) for name in ("start_ns", "end_ns"))
    duration = pl.col("end_ns") - pl.col("start_ns")
    is_whole = start & end & duration.is_between(-MAX_DUR_NS, MAX_DUR_NS)
    is_unended = pl.col("end_ns").is_null() & start if kind == "range" else pl.lit(False)
    has_device = pl.col("device").is_not_null() if kind in DEVICE_KINDS else pl.lit(True)
    return filtered(records, (is_whole.fill_null(False) | is_unended) & has_device)


def _near(rows: _Rows) -> _Rows:
    """The records without those that begin a week from the middle of all: no session lasts so long, so their time is
    damaged. Times before 0 can be true, since exports may be shifted."""
    if not any(piece.height for piece in _all(rows)):
        return rows
    starts = pl.concat([piece["start_ns"] for piece in _all(rows)], rechunk=False)
    first, last = starts.to_frame().select(first=pl.min("start_ns"), last=pl.max("start_ns")).row(0)
    if last - first <= MAX_DUR_NS:
        return rows
    is_near = (pl.col("start_ns") - starts.median()).is_between(-MAX_DUR_NS, MAX_DUR_NS)
    return {kind: [filtered(piece, is_near) for piece in pieces] for kind, pieces in rows.items()}


def _renumbered_gpus(tables: Tables) -> pl.DataFrame | None:
    """The GPUs (`gpuId`) that processes know under another number (CUDA_VISIBLE_DEVICES); null where there is none."""
    key = ["gpuId", "cudaId", "pid"]
    if not set(key) <= tables.columns.get("TARGET_INFO_CUDA_DEVICE", set()):
        return None
    gpus = tables.rows("TARGET_INFO_CUDA_DEVICE", key).drop_nulls().unique(["cudaId", "pid"], keep="first")
    return gpus if (gpus["gpuId"] != gpus["cudaId"]).any() else None


def _on_gpus(records: pl.DataFrame, gpus: pl.DataFrame) -> pl.DataFrame:
    """The records with the devices that processes number for themselves as the GPUs they are."""
    process = (pl.col("tid") // PROCESS % PROCESS).alias("pid")
    found = records.select("device", process).join(
        gpus, left_on=["device", "pid"], right_on=["cudaId", "pid"], how="left", maintain_order="left"
    )  # fmt: skip
    return records.with_columns(device=found.select(pl.coalesce("gpuId", "device")).to_series())


def _timed(kind: str, records: pl.DataFrame, processes: Processes) -> pl.DataFrame:
    """A piece of _Rows from records of one kind; links are unique, since processes use the same correlation ids: the
    number of the process * 2**32 + id, null where the process is unknown or the id cannot be true."""
    tid, end_tid, there = pl.col("tid"), column(records, "end_tid"), set(records.columns)
    owner, number = processes.owners(records["tid"], kind == "call")
    is_id = pl.col("correlation").is_between(0, _MAX_CORRELATION - 1)
    columns = {
        "start_ns": pl.col("start_ns"),
        "dur_ns": pl.col("end_ns") - pl.col("start_ns"),
        "process": owner % PROCESS,
    }
    if kind != "overhead":  # which names the call that it came up in, and starts nothing
        columns["link"] = pl.when(is_id).then(number * _MAX_CORRELATION + pl.col("correlation"))
    if kind in DEVICE_KINDS:
        columns |= {"device": pl.col("device"), "stream": column(records, "stream")}
    else:
        one_thread = end_tid.is_null() | (end_tid == 0) | (end_tid == tid)
        thread = tid - owner * PROCESS
        columns["thread"] = pl.when(one_thread).then(thread) if "end_tid" in there else thread
    if "bytes" in there:
        columns["bytes"] = pl.when(pl.col("bytes") >= 0).then("bytes")
    if kind == "kernel" and {"grid_x", "grid_y", "grid_z"} <= there:
        n_blocks = pl.col("grid_x") * pl.col("grid_y") * pl.col("grid_z")
        is_grid = pl.min_horizontal("grid_x", "grid_y", "grid_z") > 0
        columns["blocks"] = pl.when(is_grid).then(n_blocks).cast(EVENTS["blocks"], strict=False)
    if not there.isdisjoint(("graph", "graph_node")):
        columns["graph"] = pl.coalesce(column(records, "graph"), column(records, "graph_node") // 2**32)
    named_by = [c for c in _NAMED_BY if c in there]
    made = records.select(*(value.alias(name) for name, value in columns.items()), *named_by)
    known = {c.name: c.rechunk() for c in made if c.null_count() < len(c)}
    nulls = {name: repeated(name, None, made.height) for name in EVENTS if name not in ("kind", "name", *known)}
    words = {name: made[name] for name in named_by}
    return pl.DataFrame({**nulls, **words, **known})


def _name_ids(rows: _Rows) -> pl.Series:
    ids = [piece["name_id"].unique() for piece in _all(rows)]
    return pl.concat(ids).unique()


def _events(rows: _Rows, strings: pl.DataFrame, processes: Processes) -> pl.DataFrame:
    """EVENTS from all pieces, which `rows` then no longer holds; what never ended lasts until the last event."""
    ends = (pl.col("start_ns") + pl.col("dur_ns").fill_null(0).clip(0)).max().alias("end_ns")
    last_ns = pl.concat([piece.select(ends) for piece in _all({**rows, "overhead": []})])["end_ns"].max()
    ordered = {number: i for i, (_, number) in enumerate(sorted(processes.numbers.items()))}  # however tables lie
    is_ordered = all(number == i for number, i in ordered.items())
    number = (pl.col("link") // _MAX_CORRELATION).replace_strict(ordered, default=None, return_dtype=pl.Int64)
    made = []
    for kind, pieces in rows.items():
        pieces.reverse()
        while pieces:
            piece = pieces.pop()
            if piece["dur_ns"].null_count() or (piece["dur_ns"] < 0).any():
                piece = piece.with_columns(pl.col("dur_ns").fill_null(last_ns - pl.col("start_ns")).clip(0))
            if not is_ordered:
                piece = piece.with_columns(link=number * _MAX_CORRELATION + pl.col("link") % _MAX_CORRELATION)
            words = named(kind, piece, strings).rechunk()
            made.append(pl.DataFrame([words[name] if name in words else piece[name] for name in EVENTS]))
    return pl.concat([piece for piece in made if piece.height], rechunk=False)


def _meta(tables: Tables) -> dict[str, Any]:
    """What the export says of itself: `export` and `capture` as names and values, `gpus` by name, `sm_counts` by GPU,
    `session_start_ns` since 1970."""
    meta: dict[str, Any] = {}
    for key, table in (("export", "META_DATA_EXPORT"), ("capture", "META_DATA_CAPTURE")):
        if {"name", "value"} <= tables.columns.get(table, set()):
            meta[key] = dict(tables.rows(table, texts=["name", "value"]).iter_rows())
    for table in ("TARGET_INFO_CUDA_GPU", "TARGET_INFO_GPU"):  # before and since the middle of 2021
        if "name" in tables.columns.get(table, set()):
            meta["gpus"] = tables.rows(table, texts=["name"])["name"].to_list()
    if {"id", "smCount"} <= tables.columns.get("TARGET_INFO_GPU", set()):
        sms = tables.rows("TARGET_INFO_GPU", ["id", "smCount"]).drop_nulls()
        meta["sm_counts"] = {str(gpu): n_sms for gpu, n_sms in sms.iter_rows()}
    if "utcEpochNs" in tables.columns.get("TARGET_INFO_SESSION_START_TIME", set()):
        starts = tables.rows("TARGET_INFO_SESSION_START_TIME", ["utcEpochNs"]).to_series().drop_nulls()
        meta |= {"session_start_ns": starts[0]} if len(starts) else {}
    return meta

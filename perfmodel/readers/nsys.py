"""How does an Nsight Systems export become EVENTS: an SQLite file, a folder of Parquet files, or a report to export."""

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from perfmodel.errors import InputError
from perfmodel.readers.nsys_tables import Tables, parquet_tables, sqlite_tables
from perfmodel.readers.nsys_words import column, named, strings_of
from perfmodel.trace import DEVICE_KINDS, EVENTS, MAX_DUR_NS, Trace

# Tables are written only when they have rows or might have had; newer ones may carry a suffix such as _V2.
TABLES = {
    "kernel": ("CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL"),
    "call": ("CUPTI_ACTIVITY_KIND_RUNTIME",),
    "copy": ("CUPTI_ACTIVITY_KIND_MEMCPY",),
    "set": ("CUPTI_ACTIVITY_KIND_MEMSET",),
    "replay": ("CUPTI_ACTIVITY_KIND_GRAPH_TRACE",),
    "range": ("NVTX_EVENTS",),
}
NVTX_RANGES = (
    59,
    60,
    70,
    71,
)  # push/pop and start/end, and both from text files; others mark an instant or name things

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
}
_PROCESS = 2**24  # a process begins at this bit of a globalTid
_MAX_CORRELATION = 2**32
_FARTHEST_NS = 2**61  # beyond it a difference of two times may overflow

# The records by kind of event, with those columns of _COLUMNS that their tables have and always these.
_Rows = dict[str, pl.DataFrame]
_NEEDED = ("start_ns", "end_ns", "tid", "device", "correlation", "name_id")


def read_nsys(path: Path) -> Trace:
    """The trace in an Nsight Systems SQLite export, opened read-only; times in ns from the start of its session.

    A replay of a CUDA graph recorded as a whole is an event of kind `replay`; a range that never ended lasts until
    the last event. `meta["session_start_ns"]` is the start of the session since 1970, where the export tells it.
    Raises InputError when the file is no database, is damaged, or holds no CUDA activity.
    """
    with sqlite_tables(path) as tables:
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
    found = _rows(tables)
    n_records = sum(frame.height for frame in found.values())
    timed = {**found, "range": _ranges(found["range"])}
    usable = _plausible(timed)
    n_dropped = sum(timed[kind].height - usable[kind].height for kind in usable)
    if all(frame.is_empty() for frame in usable.values()):
        raise InputError(f"an Nsight Systems export whose {n_records} records hold no complete CUDA call or kernel")
    rows, n_unended = _ended(_on_gpus(tables, usable))
    n_backwards = sum(frame.filter(pl.col("end_ns") < pl.col("start_ns")).height for frame in rows.values())
    links, n_unknown = _links(rows)
    strings = strings_of(tables, pl.concat([frame["name_id"].unique() for frame in rows.values()]).unique())
    events = pl.concat([_events(kind, rows[kind], links[kind], strings) for kind in rows])
    n_replays = rows["replay"].height
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


def _rows(tables: Tables) -> _Rows:
    """The records of each kind, the columns of _COLUMNS that their tables have, and the text of ranges."""
    found = {
        kind: [t for t in tables.columns for name in names if re.fullmatch(rf"{name}(_V\d+)?", t)]
        for kind, names in TABLES.items()
    }
    if not any(found[kind] for kind in ("kernel", "call", "replay")):
        what = ", ".join(sorted(tables.columns)[:6]) or "no tables"
        raise InputError(
            f"an export without CUDA activity (found {what}); expected an Nsight Systems export with "
            f"{TABLES['kernel'][0]}: record with `nsys profile --trace=cuda,nvtx`"
        )
    return {kind: _together([_table(tables, name) for name in names]) for kind, names in found.items()}


def _table(tables: Tables, table: str) -> pl.DataFrame:
    if "start" not in tables.columns[table]:
        has = ", ".join(sorted(tables.columns[table])[:6])
        raise InputError(f"an Nsight Systems export whose table {table} has no column start (it has {has})")
    there = {alias: [c for c in names if c in tables.columns[table]] for alias, names in _COLUMNS.items()}
    rows = tables.rows(table, [c for names in there.values() for c in names], ["text"])
    needed = [pl.lit(None, pl.Int64).alias(alias) for alias in _NEEDED if not there[alias]]
    text = ["text"] if "text" in rows.columns else []
    return rows.select(*(pl.coalesce(names).alias(alias) for alias, names in there.items() if names), *needed, *text)


def _together(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """One frame of several; records that two versions of a table share count once."""
    filled = [frame for frame in frames if not frame.is_empty()]
    if len(filled) < 2:
        return filled[0] if filled else pl.DataFrame(schema=dict.fromkeys(_NEEDED, pl.Int64))
    shared = [c for c in filled[0].columns if all(c in frame.columns for frame in filled)]
    return pl.concat(filled, how="diagonal").unique(shared, keep="first", maintain_order=True)


def _ranges(records: pl.DataFrame) -> pl.DataFrame:
    """The NVTX records that have a duration; all of them where their type is not recorded."""
    kind = column(records, "event_type")
    return records.filter(kind.is_in(NVTX_RANGES) | kind.is_null())


def _plausible(rows: _Rows) -> _Rows:
    """The records with a start, an end (which a range may lack), times that can be true, and a device for its work.

    No event lasts a week, and no session: what begins a week from the middle of all records has a damaged time. Times
    before 0 can be true, since exports may be shifted.
    """
    start, end = (pl.col(name).is_between(-_FARTHEST_NS, _FARTHEST_NS) for name in ("start_ns", "end_ns"))
    duration = pl.col("end_ns") - pl.col("start_ns")
    is_whole = start & end & duration.is_between(-MAX_DUR_NS, MAX_DUR_NS)
    kept = {}
    for kind, frame in rows.items():
        is_unended = pl.col("end_ns").is_null() & start if kind == "range" else pl.lit(False)
        has_device = pl.col("device").is_not_null() if kind in DEVICE_KINDS else pl.lit(True)
        kept[kind] = _filtered(frame, (is_whole.fill_null(False) | is_unended) & has_device)
    middle = pl.concat([frame["start_ns"] for frame in kept.values()]).median()
    is_near = (pl.col("start_ns") - middle).is_between(-MAX_DUR_NS, MAX_DUR_NS)
    return {kind: _filtered(frame, is_near) for kind, frame in kept.items()}


def _filtered(frame: pl.DataFrame, keep: pl.Expr) -> pl.DataFrame:
    """The rows to keep, without a copy where that is all of them."""
    kept = frame.select(keep=keep & pl.col("start_ns").is_not_null())["keep"]
    return frame if kept.all() else frame.filter(kept)


def _on_gpus(tables: Tables, rows: _Rows) -> _Rows:
    """The records with the devices that processes number for themselves (CUDA_VISIBLE_DEVICES) as the GPUs they are."""
    key = ["gpuId", "cudaId", "pid"]
    if not set(key) <= tables.columns.get("TARGET_INFO_CUDA_DEVICE", set()):
        return rows
    gpus = tables.rows("TARGET_INFO_CUDA_DEVICE", key).drop_nulls().unique(["cudaId", "pid"], keep="first")
    if gpus.filter(pl.col("gpuId") != pl.col("cudaId")).is_empty():
        return rows
    process = (pl.col("tid") // _PROCESS % _PROCESS).alias("pid")
    found = {
        kind: rows[kind].select("device", process).join(
            gpus, left_on=["device", "pid"], right_on=["cudaId", "pid"], how="left", maintain_order="left"
        )
        for kind in DEVICE_KINDS
    }  # fmt: skip
    moved = {
        kind: rows[kind].with_columns(device=frame.select(pl.coalesce("gpuId", "device")).to_series())
        for kind, frame in found.items()
    }
    return {**rows, **moved}


def _ended(rows: _Rows) -> tuple[_Rows, int]:
    """The records with every range ended, at the last event of all where it never was, and how many those are."""
    n_unended = rows["range"]["end_ns"].null_count()
    last = pl.concat([frame.select(pl.max("start_ns", "end_ns")) for frame in rows.values()])
    end = pl.col("end_ns").fill_null(last.max().select(pl.max_horizontal(pl.all())).item())
    return {**rows, "range": rows["range"].with_columns(end)}, n_unended


def _links(rows: _Rows) -> tuple[dict[str, pl.Series], int]:
    """A number for each (process, correlation id) of each record, since processes use the same ids: rank of the
    process * 2**32 + id; and of how many records of device work the process is unknown.

    Exports that leave out the process of device work belong to the one process that made calls; with several such
    processes the link is null.
    """
    process = pl.col("tid") // _PROCESS
    owners = {kind: frame.select(owner=process)["owner"] for kind, frame in rows.items()}
    callers = owners["call"].drop_nulls().unique()
    if len(callers) == 1:
        owners = {kind: owner.fill_null(callers[0]) for kind, owner in owners.items()}
    ranks = pl.concat([owner.unique() for owner in owners.values()]).drop_nulls().unique().sort()
    rank = pl.col("owner").replace_strict(ranks, pl.int_range(len(ranks), eager=True), default=None)
    is_id = pl.col("correlation").is_between(0, _MAX_CORRELATION - 1)
    link = pl.when(is_id).then(rank * _MAX_CORRELATION + pl.col("correlation"))
    links = {kind: frame.with_columns(owners[kind]).select(link=link)["link"] for kind, frame in rows.items()}
    n_unknown = sum(owners[kind].null_count() for kind in DEVICE_KINDS) if len(callers) > 1 else 0
    return links, n_unknown


def _events(kind: str, rows: pl.DataFrame, links: pl.Series, strings: pl.DataFrame) -> pl.DataFrame:
    """EVENTS from the records of one kind."""
    words = named(kind, rows, strings)
    end_tid, moved = column(rows, "end_tid"), column(rows, "bytes")
    one_thread = end_tid.is_null() | (end_tid == 0) | (end_tid == pl.col("tid"))
    is_host = kind not in DEVICE_KINDS
    columns = {
        "kind": pl.lit(words["kind"]),
        "name": pl.lit(words["name"]),
        "start_ns": pl.col("start_ns"),
        "dur_ns": (pl.col("end_ns") - pl.col("start_ns")).clip(0),
        "process": pl.col("tid") // _PROCESS % _PROCESS,
        "thread": pl.when(one_thread).then(pl.col("tid") % _PROCESS) if is_host else pl.lit(None),
        "device": pl.lit(None) if is_host else pl.col("device"),
        "stream": pl.lit(None) if is_host else column(rows, "stream"),
        "link": pl.lit(links),
        "bytes": pl.when(moved >= 0).then(moved),
        "graph": pl.coalesce(column(rows, "graph"), column(rows, "graph_node") // 2**32),
    }
    return rows.select(columns.get(name, pl.lit(None)).cast(dtype).alias(name) for name, dtype in EVENTS.items())


def _meta(tables: Tables) -> dict[str, Any]:
    """What the export says of itself: `export` and `capture` as names and values, `gpus` by name, `session_start_ns`
    since 1970."""
    meta: dict[str, Any] = {}
    for key, table in (("export", "META_DATA_EXPORT"), ("capture", "META_DATA_CAPTURE")):
        if {"name", "value"} <= tables.columns.get(table, set()):
            meta[key] = dict(tables.rows(table, texts=["name", "value"]).iter_rows())
    for table in ("TARGET_INFO_CUDA_GPU", "TARGET_INFO_GPU"):  # before and since the middle of 2021
        if "name" in tables.columns.get(table, set()):
            meta["gpus"] = tables.rows(table, texts=["name"])["name"].to_list()
    if "utcEpochNs" in tables.columns.get("TARGET_INFO_SESSION_START_TIME", set()):
        starts = tables.rows("TARGET_INFO_SESSION_START_TIME", ["utcEpochNs"]).to_series().drop_nulls()
        meta |= {"session_start_ns": starts[0]} if len(starts) else {}
    return meta

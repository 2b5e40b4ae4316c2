"""How does an Nsight Systems SQLite export become EVENTS."""

from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import adbc_driver_sqlite.dbapi as sqlite
import polars as pl

from perfmodel.errors import InputError
from perfmodel.readers.api import with_api_kinds
from perfmodel.trace import EVENTS, Trace

# Tables are written only when they have rows or might have had; older and newer exports differ in their names.
TABLES = {
    "kernel": ("CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL"),
    "call": ("CUPTI_ACTIVITY_KIND_RUNTIME",),
    "copy": ("CUPTI_ACTIVITY_KIND_MEMCPY",),
    "set": ("CUPTI_ACTIVITY_KIND_MEMSET",),
    "range": ("NVTX_EVENTS",),
}
GRAPH_TABLE = "CUPTI_ACTIVITY_KIND_GRAPH_TRACE"
NVTX_RANGES = (59, 60)  # push/pop and start/end; other types mark an instant or declare a name

# Columns read from every table, where present: the first that is there and not null counts.
_COLUMNS = {
    "start_ns": ("start",),
    "end_ns": ("end",),
    "tid": ("globalTid", "globalPid"),  # hardware 8 bits, VM 8, process 24, thread 24 (0 in globalPid)
    "device": ("deviceId",),
    "stream": ("streamId",),
    "correlation": ("correlationId",),
    "name_id": ("demangledName", "shortName", "nameId", "textId"),
    "bytes": ("bytes",),
    "graph": ("graphId",),
    "copy_kind": ("copyKind",),
    "from_memory": ("srcKind",),
    "to_memory": ("dstKind",),
    "event_type": ("eventType",),
}
# Text in a number's place is no number: SQLite's own cast would make it 0.
_INTEGER = """CASE WHEN typeof("{0}") IN ('integer', 'real') THEN CAST("{0}" AS INTEGER) END"""
_COPY_KINDS = {
    1: "HtoD",
    2: "DtoH",
    3: "HtoA",
    4: "AtoH",
    5: "AtoA",
    6: "AtoD",
    7: "DtoA",
    8: "DtoD",
    9: "HtoH",
    10: "PtoP",
}
_MEMORY_KINDS = {
    0: "Pageable",
    1: "Pinned",
    2: "Device",
    3: "Array",
    4: "Managed",
    5: "Device Static",
    6: "Managed Static",
}


def read_nsys(path: Path) -> Trace:
    """The trace in an Nsight Systems SQLite export, opened read-only; times in ns from the start of its session.

    Raises InputError when the file is no database, is damaged, or holds no CUDA activity.
    """
    try:
        with closing(sqlite.connect(f"file:{quote(str(path.absolute()))}?mode=ro")) as connection:
            return _read(connection)
    except sqlite.Error as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"begins like an SQLite database but SQLite cannot read it ({reason}); expected an Nsight Systems export. "
            "Export or copy it again"
        ) from None


def _read(connection: Any) -> Trace:
    tables = _query(
        connection, "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')", pl.Schema({"name": pl.String})
    )
    present = set(tables["name"])
    found = {kind: [name for name in names if name in present] for kind, names in TABLES.items()}
    if not found["kernel"] and not found["call"]:
        what = ", ".join(sorted(present)[:6]) or "no tables"
        raise InputError(
            f"an SQLite database without CUDA activity (found {what}); expected an Nsight Systems export with "
            f"{TABLES['kernel'][0]}: record with `nsys profile --trace=cuda,nvtx`"
        )
    rows = pl.concat([_rows(connection, name, kind) for kind, names in found.items() for name in names])
    strings = _strings(connection, present)
    timed = rows.filter((pl.col("kind") != "range") | pl.col("event_type").is_in(NVTX_RANGES))
    usable = timed.filter(_is_usable())
    if usable.is_empty():
        raise InputError(f"an Nsight Systems export whose {rows.height} records hold no complete CUDA call or kernel")
    links, notes = _links(usable)
    events = with_api_kinds(_events(usable.with_columns(links), strings))
    return Trace(
        events,
        "nsys",
        rows.height,
        n_dropped=timed.height - usable.height,
        n_repaired=usable.filter(pl.col("end_ns") < pl.col("start_ns")).height,
        notes=(*notes, *_graph_notes(connection, present)),
        meta=_meta(connection, present),
    )


def _query(connection: Any, sql: str, schema: pl.Schema) -> pl.DataFrame:
    """The rows of a query; types are cast because the driver infers them from the first rows it meets."""
    with closing(connection.cursor()) as cursor:
        cursor.execute(sql)
        return pl.DataFrame(cursor.fetch_arrow()).cast(schema)


def _columns(connection: Any, table: str) -> set[str]:
    return set(
        _query(connection, f"SELECT name FROM pragma_table_info('{table}')", pl.Schema({"name": pl.String}))["name"]
    )


def _rows(connection: Any, table: str, kind: str) -> pl.DataFrame:
    """One table with the columns of _COLUMNS, null where it has none, its own text, and its kind of event."""
    present = _columns(connection, table)
    wanted = []
    for alias, names in _COLUMNS.items():
        there = [_INTEGER.format(name) for name in names if name in present] or ["CAST(NULL AS INTEGER)"]
        wanted.append(f"{there[0] if len(there) == 1 else 'COALESCE(' + ', '.join(there) + ')'} AS {alias}")
    text = "CAST(COALESCE(text, '') AS BLOB)" if "text" in present else "CAST('' AS BLOB)"
    frame = _query(
        connection,
        f'SELECT {", ".join(wanted)}, {text} AS text FROM "{table}"',
        pl.Schema({**dict.fromkeys(_COLUMNS, pl.Int64()), "text": pl.Binary()}),
    )
    text_column = pl.col("text").cast(pl.String, strict=False).fill_null("unknown")
    return frame.with_columns(text_column, pl.lit(kind, EVENTS["kind"]).alias("kind"))


def _strings(connection: Any, present: set[str]) -> pl.DataFrame:
    schema = pl.Schema({"name_id": pl.Int64(), "string": pl.String()})
    if "StringIds" not in present:
        return pl.DataFrame(schema=schema)
    raw = _query(
        connection,
        "SELECT id AS name_id, CAST(COALESCE(value, '') AS BLOB) AS string FROM StringIds",
        pl.Schema({"name_id": pl.Int64(), "string": pl.Binary()}),
    ).unique("name_id", keep="first", maintain_order=True)
    # Names cut at a byte limit may end inside a character.
    return raw.with_columns(
        string=pl.Series([value.decode("utf-8", "replace") for value in raw["string"]], dtype=pl.String)
    )


def _is_usable() -> pl.Expr:
    on_device = pl.col("kind").is_in(["kernel", "copy", "set"])
    return pl.all_horizontal(pl.col("start_ns", "end_ns").is_not_null()) & (~on_device | pl.col("device").is_not_null())


def _links(rows: pl.DataFrame) -> tuple[pl.Series, tuple[str, ...]]:
    """A number for each (process, correlation id), since processes use the same ids: process rank * 2**32 + id.

    Exports that leave out the process of device work belong to the one process that made calls; with several such
    processes the link is null, and a note says so.
    """
    process = rows.select((pl.col("tid") // 2**24).alias("process"), "correlation", "kind")
    callers = process.filter(pl.col("kind") == "call")["process"].drop_nulls().unique()
    known = pl.col("process").fill_null(callers[0]) if len(callers) == 1 else pl.col("process")
    links = process.select(((known.rank("dense").cast(pl.Int64) - 1) * 2**32 + pl.col("correlation")).alias("link"))
    n_unknown = process.filter(pl.col("process").is_null() & pl.col("kind").is_in(["kernel", "copy", "set"])).height
    if not n_unknown or len(callers) <= 1:
        return links["link"], ()
    note = f"{n_unknown} records of device work name no process, so their launch calls are unknown"
    return links["link"], (note,)


def _events(rows: pl.DataFrame, strings: pl.DataFrame) -> pl.DataFrame:
    """EVENTS from rows of all tables."""
    memory = [pl.col(c).replace_strict(_MEMORY_KINDS, default=None) for c in ("from_memory", "to_memory")]
    route = pl.format(" ({} -> {})", *memory).fill_null("")
    copy = pl.lit("Memcpy ") + pl.col("copy_kind").replace_strict(_COPY_KINDS, default="") + route
    text = pl.when(pl.col("text") != "").then("text")
    name = (
        pl.when(pl.col("kind") == "copy")
        .then(copy.str.strip_chars_end())
        .when(pl.col("kind") == "set")
        .then(pl.lit("Memset"))
        .otherwise(pl.coalesce(text, "string", pl.lit("unknown")))
    )
    is_call = pl.col("kind") == "call"
    return (
        rows.join(strings, on="name_id", how="left", maintain_order="left")
        .with_columns(name.alias("name"), (pl.col("end_ns") - pl.col("start_ns")).clip(0).alias("dur_ns"))
        .with_columns(
            pl.when(is_call).then(pl.col("name").str.replace(r"_v\d+$", "")).otherwise("name").alias("name"),
            (pl.col("tid") // 2**24 % 2**24).alias("process"),
            pl.when(~pl.col("kind").is_in(["kernel", "copy", "set"])).then(pl.col("tid") % 2**24).alias("thread"),
            pl.lit(None).alias("rank"),
            pl.lit(None).alias("external"),
            pl.lit(None).alias("inputs"),
        )
        .select(pl.col(column).cast(dtype) for column, dtype in EVENTS.items())
    )


def _graph_notes(connection: Any, present: set[str]) -> tuple[str, ...]:
    if GRAPH_TABLE not in present:
        return ()
    n_replays = _query(connection, f"SELECT COUNT(*) AS n FROM {GRAPH_TABLE}", pl.Schema({"n": pl.Int64})).item()
    if not n_replays:
        return ()
    return (
        f"{n_replays} CUDA graph replays were recorded as a whole: the kernels inside are invisible, and busy time and "
        "kernel counts are too low; record with `nsys profile --cuda-graph-trace=node`",
    )


def _meta(connection: Any, present: set[str]) -> dict[str, Any]:
    """What the export says of itself: `export` and `capture` as names and values, `gpus` by name."""
    meta: dict[str, Any] = {}
    for key, table in (("export", "META_DATA_EXPORT"), ("capture", "META_DATA_CAPTURE")):
        if table in present and {"name", "value"} <= _columns(connection, table):
            sql = f"SELECT CAST(name AS TEXT) AS name, COALESCE(CAST(value AS TEXT), '') AS value FROM {table}"
            meta[key] = dict(_query(connection, sql, pl.Schema({"name": pl.String, "value": pl.String})).iter_rows())
    if "TARGET_INFO_GPU" in present and "name" in _columns(connection, "TARGET_INFO_GPU"):
        sql = "SELECT COALESCE(CAST(name AS TEXT), '') AS name FROM TARGET_INFO_GPU"
        meta["gpus"] = _query(connection, sql, pl.Schema({"name": pl.String}))["name"].to_list()
    return meta

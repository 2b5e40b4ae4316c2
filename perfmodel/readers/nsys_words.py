"""How is a record of Nsight Systems named: by its strings, by what a copy moves, by the graph it replays."""

import polars as pl

from perfmodel.readers.api import api_kind
from perfmodel.readers.nsys_tables import Tables
from perfmodel.trace import EVENTS

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
    11: "HtoD",
    12: "DtoH",
    13: "DtoD",
}
_UNIFIED = (11, 12, 13)  # pages of managed memory that moved, whether or not the memory kinds are recorded
_NAMED_BY = {"copy": ["copy_kind", "from_memory", "to_memory"], "replay": ["graph"]}
_MEMORY_KINDS = {
    0: "Pageable",
    1: "Pinned",
    2: "Device",
    3: "Array",
    4: "Managed",
    5: "Device Static",
    6: "Managed Static",
}


def strings_of(tables: Tables, ids: pl.Series) -> pl.DataFrame:
    """The names that records refer to by `name_id`: as given, as a call is named, and the kind of such a call."""
    given = pl.DataFrame(schema={"id": pl.Int64, "value": pl.String})
    if {"id", "value"} <= tables.columns.get("StringIds", set()):
        given = tables.rows("StringIds", ["id"], ["value"]).filter(pl.col("id").is_in(ids.implode()))
    given = given.unique("id", keep="first", maintain_order=True)
    calls = given["value"].str.replace(r"_v\d+$", "")
    return given.select(
        name_id="id",
        name=pl.col("value").cast(EVENTS["name"]),
        call_name=calls.cast(EVENTS["name"]),
        call_kind=pl.Series([api_kind(name) for name in calls], dtype=EVENTS["kind"]),
    )


def column(frame: pl.DataFrame, name: str) -> pl.Expr:
    """A column of a frame, null where the frame has none."""
    return pl.col(name) if name in frame.columns else pl.lit(None, pl.Int64)


def named(kind: str, rows: pl.DataFrame, strings: pl.DataFrame) -> pl.DataFrame:
    """The `kind` and `name` of each record, in order; what is put into words is each distinct case, not each record."""
    if kind == "set":
        words = rows.with_columns(kind=pl.lit(kind, EVENTS["kind"]), name=pl.lit("Memset", EVENTS["name"]))
        return words.select("kind", "name")
    by = _NAMED_BY.get(kind, ["name_id"])
    keys = rows.with_columns(column(rows, key).alias(key) for key in by).select(by)
    if kind == "copy":
        words = keys.unique().with_columns(name=_copy_name())
    elif kind == "replay":
        words = keys.unique().with_columns(name=pl.format("CUDA graph {}", "graph").fill_null("CUDA graph"))
    elif kind == "call":
        words = strings.select("name_id", name="call_name", kind="call_kind")
    else:
        words = strings.select("name_id", "name")
    words = words.with_columns(pl.col("name").cast(EVENTS["name"]))
    found = keys.join(words, on=by, how="left", nulls_equal=True, maintain_order="left")
    name = [pl.col("name")]
    if "text" in rows.columns:
        name = [pl.when(rows["text"] != "").then(rows["text"]).cast(EVENTS["name"]), *name]
    unnamed = pl.lit("unknown", EVENTS["name"])
    kinds = pl.col("kind").fill_null(kind) if kind == "call" else pl.lit(kind, EVENTS["kind"])
    return found.with_columns(kind=kinds, name=pl.coalesce(*name, unnamed)).select("kind", "name")


def _copy_name() -> pl.Expr:
    """Words for a copy like those of Kineto: `Memcpy HtoD (Pinned -> Device)`, as much of it as is recorded."""
    is_unified = pl.col("copy_kind").is_in(_UNIFIED)
    memory = [
        pl.col(c).replace_strict(_MEMORY_KINDS, default=None).fill_null(pl.when(is_unified).then(pl.lit("Managed")))
        for c in ("from_memory", "to_memory")
    ]
    direction = pl.col("copy_kind").replace_strict(_COPY_KINDS, default="")
    return (pl.lit("Memcpy ") + direction + pl.format(" ({} -> {})", *memory).fill_null("")).str.strip_chars_end()

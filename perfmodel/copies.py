"""Which copies moved how much, how fast, and how much of it showed: by direction and kind of memory."""

import re

import polars as pl

from perfmodel.classify import Rules
from perfmodel.intervals import DEVICE, merged, overlap_ns
from perfmodel.overlap import device_doing
from perfmodel.text import NS_PER_S
from perfmodel.trace import COPY_KINDS

# Profilers name copies "Memcpy HtoD (Pinned -> Device)" and sets "Memset (Device)"; older ROCm "CopyHostToDevice".
_LETTERS = re.compile(r"\b([HDAP])to([HDAP])\b")
_WORDS = re.compile(r"(host|device|peer)\s*to\s*(host|device|peer)", re.IGNORECASE)
_MEMORIES = re.compile(r"\((?:([^()>]*?)\s*->)?\s*([^()>]*?)\)")
_ROUTE = ("direction", "from_memory", "to_memory")


def copy_route(name: str) -> tuple[str | None, str | None, str | None]:
    """Which way does a copy or set of this name go: direction (`HtoD`, `DtoH`, `DtoD` ...), memory kinds from and to.

    Kinds are the profiler's words (Pageable, Pinned, Device, Managed ...); null where the name does not say. A set has
    only the kind it writes to.
    """
    places = _LETTERS.search(name) or _WORDS.search(name)
    direction = f"{places[1][0].upper()}to{places[2][0].upper()}" if places else None
    memories = _MEMORIES.search(name)
    kinds = (memories[1], memories[2]) if memories else (None, None)
    source, target = (kind if kind and kind.lower() != "unknown" else None for kind in kinds)
    return direction, source, target


def with_routes(work: pl.DataFrame) -> pl.DataFrame:
    """Which way does each copy or set go: adds `direction`, `from_memory`, `to_memory`, read from its name."""
    names = work["name"].unique()
    routes = pl.DataFrame(
        [copy_route(name) for name in names.cast(pl.String)], schema=dict.fromkeys(_ROUTE, pl.String), orient="row"
    )
    return work.join(routes.with_columns(name=names), on="name", how="left", maintain_order="left")


def copies(events: pl.DataFrame, rules: Rules | None = None, doing: pl.DataFrame | None = None) -> pl.DataFrame:
    """Which copies and sets cost most: one row for each kind, direction and pair of memories, longest time first.

    Columns `kind` (copy, set), `direction`, `from_memory`, `to_memory` (null where the trace does not say), `n_copies`,
    `n_unsized` (those whose bytes are unknown), `bytes` and `bytes_per_s` (of the sized ones; null without any, or
    without time), `time_ns` (sum of durations), `exposed_ns` (time in which at least one ran and no compute kernel did
    on its device, see `overlap.exposed_time`). All devices together. `doing` is `overlap.device_doing` of the events,
    if it is known already.
    """
    columns = ["kind", "name", *DEVICE, "start_ns", "dur_ns", "bytes"]
    work = with_routes(events.select(columns).filter(pl.col("kind").is_in(COPY_KINDS)))
    routes = work.select("kind", *_ROUTE).unique().with_row_index("route")
    work = work.join(routes, on=["kind", *_ROUTE], nulls_equal=True)
    sized, is_sized = pl.col("bytes"), pl.col("bytes").is_not_null()
    sized_ns = pl.col("dur_ns").filter(is_sized).sum()
    sums = work.group_by("route").agg(
        n_copies=pl.len().cast(pl.Int64),
        n_unsized=(~is_sized).sum().cast(pl.Int64),
        bytes=pl.when(is_sized.any()).then(sized.sum()),
        bytes_per_s=pl.when(sized_ns > 0).then(sized.sum() / (sized_ns / NS_PER_S)),
        time_ns=pl.sum("dur_ns"),
    )
    return (
        routes.join(sums, on="route")
        .join(_exposed(work, device_doing(events, rules) if doing is None else doing), on="route")
        .drop("route")
        .sort(["time_ns", "n_copies", *_ROUTE], descending=[True, True, False, False, False])
    )


def _exposed(work: pl.DataFrame, doing: pl.DataFrame) -> pl.DataFrame:
    """For each `route` the time in which its copies ran and no compute kernel did, summed over devices."""
    union = merged(work.with_columns(pl.col("route").cast(pl.Int64)), ["route", *DEVICE])
    compute = doing.select(*DEVICE, "start_ns", "dur_ns", "doing").filter(pl.col("doing") == "compute")
    hidden = overlap_ns(union, compute)
    exposed = union.select(pl.col("route").cast(pl.UInt32), exposed_ns=pl.col("dur_ns") - hidden)
    return exposed.group_by("route").agg(pl.sum("exposed_ns"))

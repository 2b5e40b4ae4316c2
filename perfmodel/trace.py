"""The table every vendor file becomes: EVENTS, one timed interval per row, and `Trace`, the table with what is known
of its capture."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from perfmodel.errors import InputError

# What an event is. `launch`: an API call that starts device work (kernel, graph, copy, set); `sync`: an API call that
# waits for the device; `call`: any other runtime or driver API call; `op`: a framework operator on the host;
# `range`: a named annotation (record_function, NVTX); `kernel`, `copy`, `set`: work on a device; `replay`: one run
# of a CUDA graph recorded as a whole, which keeps its device busy with kernels that cannot be seen; `overhead`: time
# of the host that the profiler spent on itself, or saw the driver spend on its own affairs.
KINDS = ("op", "range", "launch", "sync", "call", "kernel", "copy", "set", "replay", "overhead")
DEVICE_KINDS = ("kernel", "copy", "set", "replay")
COPY_KINDS = ("copy", "set")  # what moves or fills memory without computing
API_KINDS = ("launch", "sync", "call")

EVENTS = pl.Schema(
    {
        "kind": pl.Enum(KINDS),
        "name": pl.Categorical(),
        "start_ns": pl.Int64(),
        "dur_ns": pl.Int64(),
        "rank": pl.Int32(),  # which process group member recorded it; null where the file does not say
        "process": pl.Int64(),
        "thread": pl.Int64(),
        "device": pl.Int64(),
        "stream": pl.Int64(),
        "link": pl.Int64(),  # joins an API call to the device work it started; unique to that pair in the trace
        "external": pl.Int64(),  # Kineto's id of an operator, repeated by what it started
        "bytes": pl.Int64(),  # moved by a copy or set
        "graph": pl.Int64(),  # CUDA graph the device work belongs to
        "inputs": pl.Categorical(),  # operand dims and dtypes of a matrix product as JSON: [dims, dtypes]
        "blocks": pl.Int32(),  # thread blocks of a kernel's grid
        "occupancy_frac": pl.Float32(),  # of a kernel, as the profiler estimated it: warps resident of those possible
        "collective": pl.Categorical(),  # what a collective is and between whom, as JSON: [name, group, its ranks]
    }
)

MODULE_PREFIX = "nn.Module: "  # how torch.profiler names calls of modules, of which readers keep those of MoE layers
# How torch names what a backend communicates, on threads of the backend: gloo:all_to_all ...
BACKEND_PREFIX = r"^(?i:gloo|nccl|mpi|ucc):"
MAX_RANK = 2**31 - 1  # the highest that the column holds
MAX_DUR_NS = 7 * 24 * 3600 * 10**9  # a single event longer than a week is a corrupt record (HTA issue 325)


@dataclass(frozen=True)
class Trace:
    """One capture: its events and what is known of how it was made.

    `source` is the vendor family (`kineto`, `nsys`); `n_events` counts the records of the file, kept or not;
    `n_dropped` those that were timed events but unusable, `n_repaired` those mended while reading; `notes` are
    sentences about the capture that a reader of its numbers must know. `meta` holds vendor facts as found.
    """

    events: pl.DataFrame
    source: str
    n_events: int
    n_dropped: int = 0
    n_repaired: int = 0
    notes: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_events(self.events)

    def of_kind(self, *kinds: str) -> pl.DataFrame:
        """The events of the given kinds, in file order."""
        return self.events.filter(pl.col("kind").is_in(kinds))


def check_events(events: pl.DataFrame) -> None:
    """Refuse a table that is not EVENTS: names, types, no null or negative time, device work without a device."""
    if events.schema != EVENTS:
        raise InputError(f"not an EVENTS table: found columns {dict(events.schema)}, expected {dict(EVENTS)}")
    n_bad = events.select(
        (
            pl.any_horizontal(pl.col("kind", "name", "start_ns", "dur_ns").is_null())
            | (pl.col("dur_ns") < 0)
            | (pl.col("kind").is_in(DEVICE_KINDS) & pl.col("device").is_null())
        ).sum()
    ).item()
    if n_bad:
        raise InputError(f"{n_bad} events have no time, a negative duration, or device work without a device")


def filtered(events: pl.DataFrame, keep: pl.Expr) -> pl.DataFrame:
    """The rows for which `keep` is true, not null; a filter that keeps all rows would copy them, this does not."""
    kept = events.select(keep.fill_null(value=False)).to_series()
    return events if kept.all() else events.filter(kept)


def repeated(name: str, value: int | None, n_rows: int) -> pl.Series:
    """A column of EVENTS with one value, written out: tables whose columns differ in their pieces are copied whole."""
    return pl.Series(name, [value], dtype=EVENTS[name]).new_from_index(0, n_rows)


def plain_name() -> pl.Expr:
    """What is an event called, whatever its circumstances: its name up to `|`, behind which our collectors write them.

    The same for calls of one operator or range with different batches, say; as text.
    """
    return pl.col("name").cast(pl.String).str.split("|").list.first()


def cut(trace: Trace, start_ns: int, end_ns: int) -> Trace:
    """The part of a trace whose host calls, and the device work they started, began in [start_ns, end_ns).

    Device work belongs to the window of the call that launched it; work without a known call belongs by its own start.
    """
    if end_ns <= start_ns:
        raise InputError(f"an empty window: start {start_ns} ns is not before end {end_ns} ns")
    inside = pl.col("start_ns").is_between(start_ns, end_ns, closed="left")
    api = trace.of_kind(*API_KINDS).filter(pl.col("link").is_not_null())
    kept_links = api.filter(inside)["link"].unique()
    known_links = api["link"].unique()
    is_device = pl.col("kind").is_in(DEVICE_KINDS)
    by_link = is_device & pl.col("link").is_in(known_links.implode())
    keep = pl.when(by_link.fill_null(False)).then(pl.col("link").is_in(kept_links.implode())).otherwise(inside)
    return replace(trace, events=trace.events.filter(keep))

"""What did profiling and the affairs of the driver cost: overhead that the profiler recorded of itself and of it."""

import polars as pl

from perfmodel.intervals import DEVICE, PROCESS, gaps, merged, overlap_ns
from perfmodel.launch import joined_work

# Affairs of the driver, which come up without a profiler too, in the words of Kineto and of Nsight Systems.
DRIVER_NAMES = r"(?i)loading|compiler|command buffer full"
# The host waits for room in the queue of launches: it is ahead of the device, so no device waits for that.
QUEUE_FULL = r"(?i)command buffer full"


def profiler_overhead(events: pl.DataFrame, work: pl.DataFrame | None = None) -> pl.DataFrame:
    """Which overhead did the profiler record, and how long were devices idle meanwhile: one row for each name.

    Columns `name`, `n_calls`, `time_ns` (the sum of durations), `is_driver` (the driver has to do it unwatched too:
    load modules and functions, compile, wait for room in its queue) and `idle_ns` (the time between two pieces of work
    of a device during which any of it went on, summed over devices). Longest first. `work` is `joined_work` of the
    events, if it is known already.
    """
    work = joined_work(events) if work is None else work
    beside = _beside_devices(events, work).with_columns(code=pl.col("name").to_physical().cast(pl.Int64))
    union = merged(beside, ["code", *DEVICE])
    idle = union.select("code", idle_ns=overlap_ns(union, gaps(work))).group_by("code").agg(pl.sum("idle_ns"))
    found = events.select("kind", "name", "dur_ns").filter(pl.col("kind") == "overhead")
    return (
        found.group_by("name")
        .agg(n_calls=pl.len().cast(pl.Int64), time_ns=pl.sum("dur_ns"))
        .with_columns(code=pl.col("name").to_physical().cast(pl.Int64))
        .join(idle, on="code", how="left")
        .with_columns(pl.col("name").cast(pl.String), pl.col("idle_ns").fill_null(0))
        .select("name", "n_calls", "time_ns", "idle_ns", is_driver=pl.col("name").str.contains(DRIVER_NAMES))
        .sort("time_ns", "name", descending=[True, False])
    )


def idle_beside_overhead_ns(events: pl.DataFrame, work: pl.DataFrame) -> int:
    """How long were devices idle between pieces of work while the profiler or the driver was busy with its own affairs.

    Overhead of several threads at once counts once, and waiting for room in the queue of launches not at all. `work` is
    `joined_work` of the events.
    """
    beside = _beside_devices(events, work)
    union = merged(beside.filter(~pl.col("name").cast(pl.String).str.contains(QUEUE_FULL)))
    return int(overlap_ns(union, gaps(work)).sum())


def _beside_devices(events: pl.DataFrame, work: pl.DataFrame) -> pl.DataFrame:
    """The overhead beside each device that its process drives, or beside all of its rank where no process is named."""
    overhead = events.select("kind", "name", *PROCESS, "start_ns", "dur_ns")
    overhead = overhead.filter(pl.col("kind") == "overhead")
    drivers = work.filter(pl.col("launch_row").is_not_null()).select(*DEVICE, process="launch_process").unique()
    named, unnamed = (overhead.filter(f) for f in (pl.col("process").is_not_null(), pl.col("process").is_null()))
    beside = (
        named.join(drivers, on=PROCESS, nulls_equal=True),
        unnamed.join(work.select(DEVICE).unique(), on="rank", nulls_equal=True),
    )
    return pl.concat(part.select("name", *DEVICE, "start_ns", "dur_ns") for part in beside)

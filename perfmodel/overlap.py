"""What hides under compute and what does not: copies and communication; and what the host did while devices idled."""

from collections.abc import Sequence

import polars as pl

from perfmodel.classify import COMMUNICATION, Rules, classify
from perfmodel.intervals import DEVICE, PROCESS, STREAM, busy_ns, gaps, merged, overlap_ns
from perfmodel.launch import joined_work

DOING = pl.Enum(("compute", "communication", "copy"))
# Kernels with which ROCm copies and fills memory, recorded as kernels by its older profilers.
_COPIES, _FILLS = r"^_*amd_rocclr_copy", r"^_*amd_rocclr_fill"
HOST = pl.Enum(("launch", "sync", "neither"))


def device_doing(events: pl.DataFrame, rules: Rules | None = None) -> pl.DataFrame:
    """What was each device doing: the kernels and copies of EVENTS with `doing`, one of compute, communication, copy.

    Communication is kernels of the classes `classify.COMMUNICATION` (collectives, MoE all-to-all over links), copy what
    the profiler recorded as copies between memories and the kernels with which ROCm's runtime makes them
    (`__amd_rocclr_copyBuffer` ...), compute all other kernels; sets, and kernels with which the runtime fills
    memory, are none of them. Columns `name`, `rank`, `device`, `stream`, `start_ns`, `dur_ns`, `collective`, `doing`.
    """
    work = events.select("kind", "name", *STREAM, "start_ns", "dur_ns", "collective")
    work = work.filter(pl.col("kind").is_in(["kernel", "copy"]))
    communicates = classify(work["name"], rules).is_in(list(COMMUNICATION))
    names = work["name"].unique()
    copying, filling = (names.filter(names.cast(pl.String).str.contains(p)).implode() for p in (_COPIES, _FILLS))
    doing = (
        pl.when(pl.col("kind") == "copy").then(pl.lit("copy", DOING))
        .when(pl.col("name").is_in(copying)).then(pl.lit("copy", DOING))
        .when(pl.col("name").is_in(filling)).then(pl.lit(None, DOING))
        .when(communicates).then(pl.lit("communication", DOING))
        .otherwise(pl.lit("compute", DOING))
    )  # fmt: skip
    done = work.with_columns(doing=doing).drop("kind")
    return done.drop_nulls("doing") if done["doing"].null_count() else done


def exposed_time(
    events: pl.DataFrame,
    rules: Rules | None = None,
    doing: pl.DataFrame | None = None,
    by: Sequence[str] = DEVICE,
) -> pl.DataFrame:
    """How long did each device copy or communicate without computing meanwhile: one row for each rank and device.

    Columns `rank`, `device`, `compute_busy_ns`, and for `copy` and `communication` each `..._busy_ns`,
    `..._exposed_ns` (no compute kernel ran on the device) and `..._hidden_ns`; exposed + hidden = busy. Times are
    unions, so several streams count once; the trace's totals are the sums of the columns. `doing` is `device_doing` of
    the events, if it is known already; `by` may name other groups of it than devices.
    """
    doing = (device_doing(events, rules) if doing is None else doing).select(*by, "start_ns", "dur_ns", "doing")
    compute = doing.filter(pl.col("doing") == "compute")
    table = doing.select(by).unique().sort(by)
    parts = [busy_ns(compute, by).select(*by, compute_busy_ns="busy_ns")]
    for word in ("copy", "communication"):
        union = merged(doing.filter(pl.col("doing") == word), by)
        hidden = union.select(*by, "dur_ns", overlap_ns(union, compute, by)).group_by(by)
        busy, covered = pl.sum("dur_ns"), pl.sum("overlap_ns")
        columns = {f"{word}_busy_ns": busy, f"{word}_exposed_ns": busy - covered, f"{word}_hidden_ns": covered}
        parts.append(hidden.agg(**columns))
    for part in parts:
        table = table.join(part, on=by, how="left", nulls_equal=True, maintain_order="left")
    return table.with_columns(pl.exclude(by).fill_null(0))


def idle_gaps(events: pl.DataFrame, work: pl.DataFrame | None = None) -> pl.DataFrame:
    """When did each device do nothing between two pieces of work, and what did the host do: one row a gap, in order.

    Columns `rank`, `device`, `start_ns`, `dur_ns`; `launch_ns`, `sync_ns` and `neither_ns`, the parts of the gap in
    which a thread was in a launch call, else one was waiting in a sync call, else neither; and `host`, the largest of
    them (the first named of equal ones). Threads are those of the processes that launched work on the device; null
    where no launch is known. Gaps of a device add up to its `gpu_idle_ns`. `work` is `joined_work` of the events, if it
    is known already.
    """
    work = joined_work(events) if work is None else work
    found = gaps(work)
    drivers = work.filter(pl.col("launch_row").is_not_null()).select(*DEVICE, process="launch_process").unique()
    calls = (
        events.select("kind", *PROCESS, "start_ns", "dur_ns")
        .filter(pl.col("kind").is_in(["launch", "sync"]))
        .join(drivers, on=PROCESS, nulls_equal=True)
    )
    launching = overlap_ns(found, calls.filter(pl.col("kind") == "launch"))
    either = overlap_ns(found, calls)
    parts = found.with_columns(launch_ns=launching, sync_ns=either - launching, neither_ns=pl.col("dur_ns") - either)
    names = ("launch_ns", "sync_ns", "neither_ns")
    most = pl.max_horizontal(names)
    host = (
        pl.when(pl.col("launch_ns") == most).then(pl.lit("launch", HOST))
        .when(pl.col("sync_ns") == most).then(pl.lit("sync", HOST))
        .otherwise(pl.lit("neither", HOST))
    )  # fmt: skip
    known = drivers.select(DEVICE).unique().with_columns(is_known=pl.lit(value=True))
    return (
        parts.with_columns(host=host)
        .join(known, on=DEVICE, how="left", nulls_equal=True, maintain_order="left")
        .with_columns(pl.when(pl.col("is_known")).then(pl.col(*names, "host")))
        .drop("is_known")
    )


def launch_gaps(events: pl.DataFrame, work: pl.DataFrame | None = None) -> pl.DataFrame:
    """How much did each device idle between pieces of work, and what did the host do: one row for each rank and device.

    Columns `rank`, `device`, `n_gaps`, `gap_ns`, `longest_gap_ns` (null without gaps), and for each of `launch`, `sync`
    and `neither` (see `idle_gaps`) `n_..._gaps`, the gaps in which the host did that longest, and `..._ns`, the time;
    null where the host is not known.
    """
    work = joined_work(events) if work is None else work
    counts = {f"n_{word}_gaps": (pl.col("host") == word).sum().cast(pl.Int64) for word in HOST.categories}
    sums = {f"{word}_ns": pl.sum(f"{word}_ns") for word in HOST.categories}
    all_gaps = {"n_gaps": pl.len().cast(pl.Int64), "gap_ns": pl.sum("dur_ns"), "longest_gap_ns": pl.max("dur_ns")}
    is_unknown = pl.col("host").null_count() > 0
    table = idle_gaps(events, work).group_by(DEVICE).agg(**all_gaps, **counts, **sums, is_unknown=is_unknown)
    names = [name for word in HOST.categories for name in (f"n_{word}_gaps", f"{word}_ns")]
    return (
        busy_ns(work)
        .select(DEVICE)
        .join(table, on=DEVICE, how="left", nulls_equal=True, maintain_order="left")
        .with_columns(pl.when(~pl.col("is_unknown")).then(pl.col(names)), pl.col("n_gaps", "gap_ns").fill_null(0))
        .select(*DEVICE, *all_gaps, *names)
    )

"""How long do kernels wait for their launch, and how busy are the devices: TKLQT, AKD, inference latency, idle time.

Equation numbers are those of SKIP (arXiv 2504.11750, section III).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import polars as pl

from perfmodel.errors import InputError
from perfmodel.intervals import DEVICE, busy_ns
from perfmodel.trace import API_KINDS, COPY_KINDS, DEVICE_KINDS, Trace, plain_name


@dataclass(frozen=True)
class DeviceMetrics:
    """How busy one device of one rank was (null where the trace names no rank); idle is null where it took no time."""

    rank: int | None
    device: int
    n_kernels: int
    kernel_time_ns: int
    kernel_busy_ns: int
    gpu_busy_ns: int
    gpu_span_ns: int | None
    gpu_idle_frac: float | None


@dataclass(frozen=True)
class LaunchMetrics:
    """How long kernels waited for their launch and how busy the devices were, of one trace.

    Launch metrics cover joined kernels only, graph kernels included; busy times cover all device work, and sum over
    devices. TKLQT is not wall time: kernels of one queue wait at the same time. Each figure is defined in
    docs/nomenclature.md.
    """

    source: str
    n_events: int
    n_launches: int
    n_kernels: int
    n_kernels_joined: int
    n_kernels_orphan: int
    n_kernels_graph: int
    tklqt_ns: int
    tklqt_non_graph_ns: int
    tklqt_graph_ns: int
    tklqt_first_kernel_ns: int
    delay_min_ns: int | None
    delay_median_ns: float | None
    delay_p99_ns: float | None
    delay_max_ns: int | None
    n_negative_delays: int
    n_queued: int
    queue_ns: int
    launch_call_ns: int
    kernel_launch_call_ns: int
    akd_ns: float | None
    kernel_time_ns: int
    kernel_busy_ns: int
    gpu_busy_ns: int
    gpu_span_ns: int | None
    gpu_idle_ns: int | None
    gpu_idle_frac: float | None
    gpu_idle_eq5_ns: int | None
    inference_latency_ns: int | None
    devices: tuple[DeviceMetrics, ...]

    def to_json(self) -> dict[str, Any]:
        """The metrics as a dict that JSON can hold, keys in the order of the fields."""
        return {**asdict(self), "devices": [asdict(device) for device in self.devices]}


# The figures of a group of device work: all of LaunchMetrics but what only a whole trace has.
FIGURES = tuple(f.name for f in fields(LaunchMetrics) if f.name not in ("source", "n_events", "devices"))
# Those that are never null: sums, which are 0 where there is nothing to sum.
_SUMS = tuple(f.name for f in fields(LaunchMetrics) if f.name in FIGURES and f.type is int)


def joined_work(events: pl.DataFrame, kinds: Sequence[str] = DEVICE_KINDS) -> pl.DataFrame:
    """Which call launched each piece of device work: the rows of EVENTS of these kinds in file order, with their calls.

    Adds `launch_row` (the call's row in EVENTS), `launch_name`, `launch_start_ns`, `launch_dur_ns`, `launch_process`,
    `launch_thread`, `delay_ns` (Eq 1: start of the work minus start of the call, negative where clocks disagree) and
    `is_graph`; all null for an orphan, whose call is not in the trace. Where several calls share a link, as in merged
    traces, the latest that began no later than the work counts, else the earliest.
    """
    work = events.filter(pl.col("kind").is_in(kinds))
    linked = pl.col("kind").is_in(API_KINDS) & pl.col("link").is_not_null()
    calls = events.select("kind", "link", "start_ns", row=pl.int_range(pl.len())).filter(linked)
    row = calls["row"].gather(_call_of(work, calls))
    names = events["name"].gather(row.unique()).unique()
    graph_names = names.filter(names.cast(pl.String).str.contains("GraphLaunch", literal=True).fill_null(value=False))
    return work.with_columns(
        launch_row=row,
        **{f"launch_{c}": events[c].gather(row) for c in ("name", "start_ns", "dur_ns", "process", "thread")},
    ).with_columns(
        delay_ns=pl.col("start_ns") - pl.col("launch_start_ns"),
        is_graph=pl.col("launch_name").is_in(graph_names.implode()),
    )


def joined_kernels(events: pl.DataFrame) -> pl.DataFrame:
    """Which call launched each kernel: `joined_work` of the kernels alone."""
    return joined_work(events, ("kernel",))


def call_starts(work: pl.DataFrame) -> pl.DataFrame:
    """When and on which thread did the call for each piece of `joined_work` begin: moments as `intervals` takes them.

    Columns `rank`, `process`, `thread` and `at_ns`, a row for each of `work`; null but for the rank of an orphan.
    """
    return work.select("rank", process="launch_process", thread="launch_thread", at_ns="launch_start_ns")


def _call_of(work: pl.DataFrame, calls: pl.DataFrame) -> pl.Series:
    """The row of `calls` that launched each row of `work`, null for none: a search in sorted links, then in starts.

    A join by hashes takes three times as long, and calls that all share one damaged link would multiply.
    """
    if work.is_empty() or calls.is_empty():
        return pl.Series([None] * work.height, dtype=pl.Int64)
    order = np.lexsort((calls["start_ns"].to_numpy(), calls["link"].to_numpy()))
    link, start = calls["link"].to_numpy()[order], calls["start_ns"].to_numpy()[order]
    wanted = work["link"].fill_null(0).to_numpy()
    first = np.searchsorted(link, wanted)
    is_once = (link[1:] != link[:-1]).all()
    here = first < len(link)
    here[here] = link[first[here]] == wanted[here]
    beyond = first + here if is_once else np.searchsorted(link, wanted, side="right")
    low, high = first + 1, beyond
    while (low < high).any():  # halve the calls that share the link until the first that began too late is found
        middle = np.minimum((low + high) // 2, len(link) - 1)
        is_late = (low < high) & (start[middle] > work["start_ns"].to_numpy())
        low, high = np.where(is_late | (low >= high), low, middle + 1), np.where(is_late, middle, high)
    found = pl.Series(order[np.minimum(low, len(link)) - 1], dtype=pl.Int64)
    known = pl.Series(beyond > first) & work["link"].is_not_null()
    return pl.select(pl.when(known).then(found)).to_series()


def device_table(work: pl.DataFrame, by: Sequence[str] = DEVICE) -> pl.DataFrame:
    """How busy was each device, or each group `by` of device work: one row each, in order.

    Columns `by`, `n_kernels`, `kernel_time_ns`, `kernel_busy_ns` and `gpu_busy_ns` (unions of kernels and of all work)
    and `gpu_span_ns` (first start to last end of any work); busy + idle = span.
    """
    work = work.select("kind", *by, "start_ns", "dur_ns")
    kernels = busy_ns(work.filter(pl.col("kind") == "kernel"), by).select(
        *by, n_kernels="n_intervals", kernel_time_ns="time_ns", kernel_busy_ns="busy_ns"
    )
    return (
        busy_ns(work, by)
        .select(*by, gpu_busy_ns="busy_ns", gpu_span_ns="span_ns")
        .join(kernels, on=by, how="left", nulls_equal=True, maintain_order="left")
        .with_columns(pl.col("n_kernels", "kernel_time_ns", "kernel_busy_ns").fill_null(0))
        .select(*by, "n_kernels", "kernel_time_ns", "kernel_busy_ns", "gpu_busy_ns", "gpu_span_ns")
    )


def figures(
    work: pl.DataFrame, calls: pl.DataFrame, first_ops: pl.DataFrame, devices: pl.DataFrame | None = None
) -> pl.DataFrame:
    """What are the launch metrics of each group of device work: one row for each `group`, columns FIGURES, in order.

    `work` is `joined_work` with `group` and `part`, whole numbers: busy times, spans and latencies are those of each
    part (an instance of a range, say) and device, summed over the group. `calls` holds `group` and `dur_ns` of all
    launch calls, `first_ops` `group`, `part` and `first_op_ns`, `devices` the `device_table` by group, part and device
    if it is known already. Sums over nothing are 0. Null: delays without a joined kernel, AKD without kernels, span and
    idle without device work, latency and what follows from it without an operator or kernels.
    """
    by = ["group", "part", *DEVICE]
    devices = device_table(work, by) if devices is None else devices
    needed = ("kind", "group", "part", "start_ns", "dur_ns", "delay_ns", "is_graph", "launch_row", "launch_dur_ns")
    kernels = work.select(needed).filter(pl.col("kind") == "kernel")
    latencies = _latencies(kernels, first_ops)
    tables = (
        _waits(kernels),
        calls.group_by("group").agg(n_launches=pl.len().cast(pl.Int64), launch_call_ns=pl.sum("dur_ns")),
        devices.group_by("group").agg(pl.sum("kernel_busy_ns", "gpu_busy_ns", "gpu_span_ns")),
        latencies.group_by("group").agg(pl.sum("inference_latency_ns")),
    )
    table = pl.concat(t.select("group") for t in tables).unique().sort("group")
    for columns in tables:
        table = table.join(columns, on="group", how="left", maintain_order="left")
    idle, span = pl.col("gpu_span_ns") - pl.col("gpu_busy_ns"), pl.col("gpu_span_ns")
    return table.with_columns(
        pl.col(_SUMS).fill_null(0),
        akd_ns=pl.col("kernel_time_ns") / pl.col("n_kernels"),
        gpu_idle_ns=idle,
        gpu_idle_frac=pl.when(span > 0).then(idle / span),
        gpu_idle_eq5_ns=pl.col("inference_latency_ns") - pl.col("kernel_time_ns"),
    ).select("group", *FIGURES)


def _waits(kernels: pl.DataFrame) -> pl.DataFrame:
    """For each group the counts and durations of its kernels and how long they waited for their launch."""
    delay, is_graph = pl.col("delay_ns"), pl.col("is_graph")
    queue = delay - pl.col("launch_dur_ns")
    launches = (
        kernels.filter(delay.is_not_null())
        .group_by("group", "launch_row")
        .agg(delay.min(), pl.first("launch_dur_ns"))
        .group_by("group")
        .agg(tklqt_first_kernel_ns=pl.sum("delay_ns"), kernel_launch_call_ns=pl.sum("launch_dur_ns"))
    )
    waits = kernels.group_by("group").agg(
        n_kernels=pl.len().cast(pl.Int64),
        n_kernels_joined=delay.count().cast(pl.Int64),
        n_kernels_orphan=delay.null_count().cast(pl.Int64),
        n_kernels_graph=is_graph.sum().cast(pl.Int64),
        tklqt_ns=delay.sum(),
        tklqt_non_graph_ns=delay.filter(~is_graph).sum(),
        tklqt_graph_ns=delay.filter(is_graph).sum(),
        delay_min_ns=delay.min(),
        delay_median_ns=delay.median(),
        delay_p99_ns=delay.quantile(0.99, "linear"),
        delay_max_ns=delay.max(),
        n_negative_delays=(delay < 0).sum().cast(pl.Int64),
        n_queued=(queue >= 0).sum().cast(pl.Int64),
        queue_ns=queue.clip(lower_bound=0).sum(),
        kernel_time_ns=pl.sum("dur_ns"),
    )
    return waits.join(launches, on="group", how="left")


def _latencies(kernels: pl.DataFrame, first_ops: pl.DataFrame) -> pl.DataFrame:
    """From the start of the first operator to the end of the last kernel (Eq 4), for parts that have both."""
    ends = kernels.group_by("group", "part").agg(end_ns=(pl.col("start_ns") + pl.col("dur_ns")).max())
    return first_ops.join(ends, on=["group", "part"]).select(
        "group", inference_latency_ns=pl.col("end_ns") - pl.col("first_op_ns")
    )


def launch_metrics(trace: Trace, work: pl.DataFrame | None = None) -> LaunchMetrics:
    """How long did the kernels of a trace wait for their launch, and how busy were the devices.

    `work` is `joined_work` of its events, if it is known already. What is null is said by `figures`; the latency of
    several ranks runs from the first operator of any to the last kernel of any.
    """
    work = joined_work(trace.events) if work is None else work
    devices = device_table(work)
    one_group = {"group": pl.lit(0, pl.Int64), "part": pl.lit(0, pl.Int64)}
    events = trace.events.select("kind", "start_ns", "dur_ns")
    first_op = events.filter(pl.col("kind") == "op").select(first_op_ns=pl.min("start_ns"), **one_group).drop_nulls()
    calls = events.filter(pl.col("kind") == "launch").select("dur_ns", group=pl.lit(0, pl.Int64))
    all_work = pl.DataFrame({"group": [0]})
    table = all_work.join(
        figures(work.with_columns(**one_group), calls, first_op, devices.with_columns(**one_group)),
        on="group",
        how="left",
    )
    row = table.with_columns(pl.col(_SUMS).fill_null(0)).drop("group").row(0, named=True)
    each = (
        DeviceMetrics(**d, gpu_idle_frac=1 - d["gpu_busy_ns"] / d["gpu_span_ns"] if d["gpu_span_ns"] else None)
        for d in devices.iter_rows(named=True)
    )
    return LaunchMetrics(source=trace.source, n_events=trace.n_events, **row, devices=tuple(each))


def by_kernel(events: pl.DataFrame, work: pl.DataFrame | None = None, sort_by: str = "time_ns") -> pl.DataFrame:
    """Which kernels cost most, on the device or in waiting for their launch: one row for each name.

    Columns `name`, `n_kernels`, `time_ns`, `tklqt_ns` (the launch tax: delays of joined kernels, null where none of
    that name is joined), `mean_delay_ns` and `tklqt_frac` (of the trace's TKLQT). Largest `sort_by` first, nulls last.
    Raises InputError on another column's name. `work` is `joined_work` of the events, if it is known already.
    """
    work = joined_kernels(events) if work is None else work.filter(pl.col("kind") == "kernel")
    delay = pl.col("delay_ns")
    table = (
        work.group_by("name")
        .agg(
            n_kernels=pl.len().cast(pl.Int64),
            time_ns=pl.sum("dur_ns"),
            tklqt_ns=pl.when(delay.count() > 0).then(delay.sum()),
            mean_delay_ns=delay.mean(),
        )
        .with_columns(tklqt_frac=pl.when(pl.sum("tklqt_ns") != 0).then(pl.col("tklqt_ns") / pl.sum("tklqt_ns")))
    )
    if sort_by not in table.columns[1:]:
        raise InputError(f"kernels cannot be sorted by {sort_by!r}; expected one of {', '.join(table.columns[1:])}")
    return table.sort(sort_by, pl.col("name").cast(pl.String), descending=[True, False], nulls_last=True)


def delay_counts(work: pl.DataFrame) -> pl.DataFrame:
    """How are launch delays distributed: one row for each eighth of a decade from the shortest to the longest.

    Columns `from_ns`, `to_ns` (beyond the last of them), `n_prompt`, kernels that began before their launch call had
    returned, and `n_queued`, those that began after it. `work` is `joined_work` of a trace; delays that are not above
    0, of clocks that disagree, are left out.
    """
    delays = work.filter((pl.col("kind") == "kernel") & (pl.col("delay_ns") > 0))
    # Edges rounded up are the first whole ns of each part; a floor of a logarithm would miss them, as log10(1000) does.
    edges = np.ceil(10.0 ** (np.arange(8 * 19) / 8)).astype(np.int64)
    eighth = pl.Series("eighth", np.searchsorted(edges, delays["delay_ns"].to_numpy(), side="right") - 1)
    is_queued = pl.col("delay_ns") >= pl.col("launch_dur_ns")
    counts = delays.group_by(eighth).agg(
        n_prompt=(~is_queued).sum().cast(pl.Int64), n_queued=is_queued.sum().cast(pl.Int64)
    )
    low, high = counts.select(pl.min("eighth"), high=pl.max("eighth")).row(0)
    every = pl.DataFrame({"eighth": range(low, high + 1) if counts.height else []}, schema={"eighth": pl.Int64})
    return (
        every.join(counts, on="eighth", how="left", maintain_order="left")
        .with_columns(pl.col("n_prompt", "n_queued").fill_null(0))
        .select(
            pl.lit(10.0).pow(pl.col("eighth") / 8).alias("from_ns"),
            pl.lit(10.0).pow((pl.col("eighth") + 1) / 8).alias("to_ns"),
            "n_prompt",
            "n_queued",
        )
    )


def by_launch_call(events: pl.DataFrame, work: pl.DataFrame | None = None) -> pl.DataFrame:
    """Which API calls launch device work, and what do they cost the host: one row for each name of a `launch` call.

    Columns `name`, `n_launches`, `time_ns` (on the host), `mean_ns`, `n_kernels` (what they launched),
    `kernels_per_launch`, `n_copies` (copies and sets) and `n_without_work` (calls whose device work is not in the
    trace). Longest first. `work` is `joined_work` of the events, if it is known already.
    """
    work = joined_work(events) if work is None else work
    is_kernel, is_copy = pl.col("kind") == "kernel", pl.col("kind").is_in(COPY_KINDS)
    launched = (
        work.select("kind", row="launch_row")
        .drop_nulls()
        .group_by("row")
        .agg(n_kernels=is_kernel.sum().cast(pl.Int64), n_copies=is_copy.sum().cast(pl.Int64))
    )
    return (
        events.select("kind", "name", "dur_ns", row=pl.int_range(pl.len()))
        .filter(pl.col("kind") == "launch")
        .join(launched, on="row", how="left")
        .group_by("name")
        .agg(
            n_launches=pl.len().cast(pl.Int64),
            time_ns=pl.sum("dur_ns"),
            mean_ns=pl.mean("dur_ns"),
            n_kernels=pl.sum("n_kernels"),
            kernels_per_launch=pl.sum("n_kernels") / pl.len(),
            n_copies=pl.sum("n_copies"),
            n_without_work=pl.col("n_kernels").null_count().cast(pl.Int64),
        )
        .sort(pl.col("time_ns"), pl.col("name").cast(pl.String), descending=[True, False])
    )


def by_host_name(events: pl.DataFrame, kind: str) -> pl.DataFrame:
    """Which operators (`op`) or named ranges (`range`) take the host's time: columns `name`, `n_calls`, `time_ns`.

    Longest first. Times include what a call contains, so nested ones count in both; ranges that carry their
    circumstances after a `|` count together.
    """
    calls = events.select("kind", "name", "dur_ns").filter(pl.col("kind") == kind)
    by_name = calls.group_by("name").agg(n_calls=pl.len().cast(pl.Int64), time_ns=pl.sum("dur_ns"))
    return (
        by_name.group_by(plain_name())
        .agg(pl.sum("n_calls", "time_ns"))
        .sort("time_ns", "name", descending=[True, False])
    )

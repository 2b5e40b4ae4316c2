"""How long do kernels wait for their launch, and how busy are the devices: TKLQT, AKD, inference latency, idle time.

Equation numbers are those of SKIP (arXiv 2504.11750, section III).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from perfmodel.errors import InputError
from perfmodel.intervals import DEVICE, busy_ns
from perfmodel.trace import API_KINDS, DEVICE_KINDS, Trace

# The plateau of TKLQT reads about 0 in published plots, so a plateau has this floor: the launch of a null kernel on
# A100, the lowest of SKIP Table V (2260.5 ns), times 300 launches, about one forward pass of an encoder.
PLATEAU_FLOOR_NS = 2260.5 * 300
# Launch calls of one workload vary by less than 2 over batch sizes (Table V: 2.26 to 2.77 us over machines); queueing
# multiplies TKLQT by ten and more within one doubling of the batch (Fig 6). Any factor from 1 to 30 finds the same.
RULE_FACTOR = 3.0


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
    devices. TKLQT is not wall time: kernels of one queue wait at the same time.
    """

    source: str
    n_events: int
    n_kernels: int
    n_kernels_joined: int
    n_kernels_orphan: int
    n_kernels_graph: int
    tklqt_ns: int
    tklqt_graph_ns: int
    tklqt_first_kernel_ns: int
    akd_ns: float | None
    kernel_time_ns: int
    kernel_busy_ns: int
    gpu_busy_ns: int
    gpu_span_ns: int | None
    gpu_idle_frac: float | None
    inference_latency_ns: int | None
    devices: tuple[DeviceMetrics, ...]

    def to_json(self) -> dict[str, Any]:
        """The metrics as a dict that JSON can hold, keys in the order of the fields."""
        return {**asdict(self), "devices": [asdict(device) for device in self.devices]}


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


def _call_of(work: pl.DataFrame, calls: pl.DataFrame) -> pl.Series:
    """The row of `calls` that launched each row of `work`, null for none: a search in sorted links, then in starts.

    A join by hashes takes three times as long, and calls that all share one damaged link would multiply.
    """
    if work.is_empty() or calls.is_empty():
        return pl.Series([None] * work.height, dtype=pl.Int64)
    order = np.lexsort((calls["start_ns"].to_numpy(), calls["link"].to_numpy()))
    link, start = calls["link"].to_numpy()[order], calls["start_ns"].to_numpy()[order]
    wanted = work["link"].fill_null(0).to_numpy()
    first, beyond = np.searchsorted(link, wanted), np.searchsorted(link, wanted, side="right")
    low, high = first + 1, beyond
    while (low < high).any():  # halve the calls that share the link until the first that began too late is found
        middle = np.minimum((low + high) // 2, len(link) - 1)
        is_late = (low < high) & (start[middle] > work["start_ns"].to_numpy())
        low, high = np.where(is_late | (low >= high), low, middle + 1), np.where(is_late, middle, high)
    found = pl.Series(order[np.minimum(low, len(link)) - 1], dtype=pl.Int64)
    known = pl.Series(beyond > first) & work["link"].is_not_null()
    return pl.select(pl.when(known).then(found)).to_series()


def device_metrics(events: pl.DataFrame) -> tuple[DeviceMetrics, ...]:
    """How busy was each device, in the order of ranks and device numbers; empty where no device work was recorded.

    The span runs from the first start to the last end of any work of the device; busy + idle = span.
    """
    work = events.filter(pl.col("kind").is_in(DEVICE_KINDS))
    is_kernel = pl.col("kind") == "kernel"
    end = pl.col("start_ns") + pl.col("dur_ns")
    kernel_busy = busy_ns(work.filter(is_kernel)).rename({"busy_ns": "kernel_busy_ns"})
    table = (
        work.group_by(DEVICE)
        .agg(
            n_kernels=is_kernel.sum(),
            kernel_time_ns=pl.col("dur_ns").filter(is_kernel).sum(),
            gpu_span_ns=end.max() - pl.col("start_ns").min(),
        )
        .join(kernel_busy, on=DEVICE, how="left", nulls_equal=True)
        .join(busy_ns(work).rename({"busy_ns": "gpu_busy_ns"}), on=DEVICE, nulls_equal=True)
        .with_columns(pl.col("kernel_busy_ns").fill_null(0))
        .sort(DEVICE)
    )
    return tuple(
        DeviceMetrics(**row, gpu_idle_frac=_idle_frac(row["gpu_busy_ns"], row["gpu_span_ns"]))
        for row in table.iter_rows(named=True)
    )


def _idle_frac(busy: int, span: int | None) -> float | None:
    return 1 - busy / span if span else None


def launch_metrics(trace: Trace) -> LaunchMetrics:
    """How long did the kernels of a trace wait for their launch, and how busy were the devices.

    TKLQT is Eq 2, AKD Eq 3 over all kernels, inference latency Eq 4, from the first operator to the end of the last
    kernel. Null: AKD without kernels, span and idle without device work, latency without kernels or operators.
    """
    kernels = joined_kernels(trace.events)
    delay, is_joined = pl.col("delay_ns"), pl.col("delay_ns").is_not_null()
    first = kernels.filter(is_joined).sort("start_ns").unique(["link", "launch_start_ns"], keep="first")
    sums = kernels.select(
        n_kernels_joined=is_joined.sum(),
        n_kernels_orphan=(~is_joined).sum(),
        n_kernels_graph=pl.col("is_graph").sum(),
        tklqt_ns=delay.sum(),
        tklqt_graph_ns=delay.filter(pl.col("is_graph")).sum(),
        kernel_time_ns=pl.col("dur_ns").sum(),
    ).row(0, named=True)
    devices = device_metrics(trace.events)
    busy = sum(device.gpu_busy_ns for device in devices)
    span = sum(device.gpu_span_ns or 0 for device in devices) if devices else None
    return LaunchMetrics(
        source=trace.source,
        n_events=trace.n_events,
        n_kernels=kernels.height,
        **sums,
        tklqt_first_kernel_ns=int(first["delay_ns"].sum()),
        akd_ns=sums["kernel_time_ns"] / kernels.height if kernels.height else None,
        kernel_busy_ns=sum(device.kernel_busy_ns for device in devices),
        gpu_busy_ns=busy,
        gpu_span_ns=span,
        gpu_idle_frac=_idle_frac(busy, span),
        inference_latency_ns=_inference_latency_ns(trace.events, kernels),
        devices=devices,
    )


def _inference_latency_ns(events: pl.DataFrame, kernels: pl.DataFrame) -> int | None:
    """From the start of the first operator to the end of the last kernel (Eq 4); null where either is missing."""
    first = events.filter(pl.col("kind") == "op").select(pl.col("start_ns").min()).item()
    last = kernels.select((pl.col("start_ns") + pl.col("dur_ns")).max()).item()
    return None if first is None or last is None else int(last - first)


def by_kernel(events: pl.DataFrame) -> pl.DataFrame:
    """Which kernels cost most: one row for each name, columns `name`, `n_kernels`, `time_ns`, `tklqt_ns`.

    Longest total time first. `tklqt_ns` sums the delays of joined kernels, null where none of that name is joined.
    """
    delays = pl.col("delay_ns").drop_nulls()
    return (
        joined_kernels(events)
        .group_by("name")
        .agg(
            n_kernels=pl.len().cast(pl.Int64),
            time_ns=pl.sum("dur_ns"),
            tklqt_ns=pl.when(delays.len() > 0).then(delays.sum()),
        )
        .sort(pl.col("time_ns"), pl.col("name").cast(pl.String), descending=[True, False])
    )


def by_host_name(events: pl.DataFrame, kind: str) -> pl.DataFrame:
    """Which operators (`op`) or named ranges (`range`) take the host's time: columns `name`, `n_calls`, `time_ns`.

    Longest first. Times include what a call contains, so nested ones count in both; ranges that carry their
    circumstances after a `|` count together.
    """
    host = events.filter(pl.col("kind") == kind)
    return (
        host.group_by(pl.col("name").cast(pl.String).str.split("|").list.first().alias("name"))
        .agg(n_calls=pl.len().cast(pl.Int64), time_ns=pl.sum("dur_ns"))
        .sort("time_ns", "name", descending=[True, False])
    )


def n_negative_delays(events: pl.DataFrame) -> int:
    """How many kernels began before their launch call did: a sign that host and device clocks were not aligned."""
    return joined_kernels(events).filter(pl.col("delay_ns") < 0).height


def is_device_bound(tklqt_ns: float, plateau_ns: float, rule_factor: float = RULE_FACTOR) -> bool:
    """Do kernels queue behind a busy device: is TKLQT above `rule_factor` times its host-bound plateau (with floor)."""
    return tklqt_ns > rule_factor * max(plateau_ns, PLATEAU_FLOOR_NS)


def transition_batch(batches: Sequence[int], tklqt_ns: Sequence[float], rule_factor: float = RULE_FACTOR) -> int | None:
    """From which batch size on is the device the bound: the first whose TKLQT leaves the plateau of the smallest one.

    The paper (section V-B) marks this point by eye; the rule is ours. Null when no batch leaves the plateau. The sweep
    must begin host-bound: a sweep that begins with a full queue shows no plateau. Raises InputError on unequal lengths
    or an empty sweep.
    """
    if len(batches) != len(tklqt_ns) or not batches:
        raise InputError(
            f"found {len(batches)} batch sizes and {len(tklqt_ns)} values of TKLQT; expected as many, not 0"
        )
    sweep = sorted(zip(batches, tklqt_ns, strict=True))
    plateau = sweep[0][1]
    return next((batch for batch, tklqt in sweep if is_device_bound(tklqt, plateau, rule_factor)), None)

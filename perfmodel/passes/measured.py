"""What did each MoE layer pass do: launches, gaps, kernel classes, communication hidden and exposed, active SMs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from perfmodel.classify import Rules, classify
from perfmodel.intervals import DEVICE, PROCESS, THREAD, busy_ns, earliest_held, gaps, merged, overlap_ns, parents
from perfmodel.overlap import device_doing, exposed_time
from perfmodel.passes.found import Found, exchanges
from perfmodel.trace import BACKEND_PREFIX, COPY_KINDS, DEVICE_KINDS, plain_name

# Ranges and operators that communicate, in traces without devices: gloo:all_to_all, c10d::alltoall_base_ ...
COMMUNICATES = rf"(?i){BACKEND_PREFIX}|^c10d::|^_c10d_functional::|all_?to_?all|record_param_comms"
Floats = NDArray[np.float64]


def windows(found: Found) -> pl.DataFrame:
    """On which device and when did each pass run: columns `pass`, `rank`, `device`, `start_ns`, `dur_ns`, in order.

    From the first start to the last end of its own device work, a row for each device; of the host, that of the range.
    """
    if found.how == "host":
        return found.spans.select("pass", *DEVICE, "start_ns", "dur_ns")
    own = found.work.filter(pl.col("pass").is_not_null())
    end = pl.col("start_ns") + pl.col("dur_ns")
    spans = own.group_by("pass", *DEVICE).agg(pl.min("start_ns"), dur_ns=end.max() - pl.min("start_ns"))
    return spans.sort("pass", *DEVICE)


def counts(found: Found, rules: Rules | None = None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """How many kernels, copies and launch calls has each pass, and which classes of kernels: two tables.

    The first has `pass`, `rank`, `device`, `n_kernels`, `n_graph_kernels`, `n_copies` (copies and sets), `n_replays`
    and `n_launches`, distinct calls, null where none is known; the second `class`, `n_kernels` and `time_ns` of each.
    """
    own = found.work.filter(pl.col("pass").is_not_null())
    is_kernel = pl.col("kind") == "kernel"
    table = own.group_by("pass", *DEVICE).agg(
        n_kernels=is_kernel.sum().cast(pl.Int64),
        n_graph_kernels=(is_kernel & pl.col("is_graph")).sum().cast(pl.Int64),
        n_copies=pl.col("kind").is_in(COPY_KINDS).sum().cast(pl.Int64),
        n_replays=(pl.col("kind") == "replay").sum().cast(pl.Int64),
        n_launches=pl.when(pl.col("launch_row").count() > 0).then(
            pl.col("launch_row").drop_nulls().n_unique().cast(pl.Int64)
        ),
    )
    kernels = own.filter(is_kernel)
    classes = (
        kernels.select("pass", *DEVICE, "dur_ns", classify(kernels["name"], rules))
        .group_by("pass", *DEVICE, "class")
        .agg(n_kernels=pl.len().cast(pl.Int64), time_ns=pl.sum("dur_ns"))
        .sort("pass", *DEVICE, "time_ns", "class", descending=[False, False, False, True, False])
    )
    return table, classes


def shares(events: pl.DataFrame, spans: pl.DataFrame, how: str, rules: Rules | None = None) -> pl.DataFrame:
    """What did the device (or the host, where nothing ran on a device) do while each pass ran: a row for each window.

    Columns `compute_busy_ns`, `communication_busy_ns`, `communication_hidden_ns`, `communication_exposed_ns`,
    `all_to_all_busy_ns`, `all_to_all_exposed_ns`, `busy_ns`, and on devices `n_gaps`, `longest_gap_ns`. Work of other
    passes and other micro-batches counts too: whatever computes meanwhile hides communication.
    """
    doing = _host_doing(events) if how == "host" else device_doing(events, rules)
    is_exchange = exchanges(doing)
    if how != "host":
        is_exchange |= classify(doing["name"], rules) == "moe_all_to_all"
    doing = doing.with_columns(is_all_to_all=is_exchange)
    by = list(PROCESS if how == "host" else DEVICE)
    cut = _inside(doing, spans, by)
    of_window = exposed_time(events, doing=cut, by=("window",))
    exchange = cut.filter((pl.col("doing") == "communication") & pl.col("is_all_to_all"))
    compute = cut.filter(pl.col("doing") == "compute")
    union = merged(exchange, ("window",))
    hidden = union.select("window", "dur_ns", overlap_ns(union, compute, ("window",)))
    all_to_all = hidden.group_by("window").agg(
        all_to_all_busy_ns=pl.sum("dur_ns"), all_to_all_exposed_ns=pl.sum("dur_ns") - pl.sum("overlap_ns")
    )
    any_work = cut if how == "host" else _inside(_work(events), spans, by)
    busy = busy_ns(any_work, ("window",)).select("window", "busy_ns")
    table = spans.with_row_index("window").with_columns(pl.col("window").cast(pl.Int64))
    for part in (of_window, all_to_all, busy):
        table = table.join(part, on="window", how="left", maintain_order="left")
    table = table.with_columns(pl.col("^.*_(busy|hidden|exposed)_ns|busy_ns$").fill_null(0))
    if how == "host":
        none = pl.lit(None, pl.Int64)
        return table.with_columns(n_gaps=none, longest_gap_ns=none)
    between = gaps(any_work, ("window",)).group_by("window").agg(
        n_gaps=pl.len().cast(pl.Int64), longest_gap_ns=pl.max("dur_ns")
    )  # fmt: skip
    return table.join(between, on="window", how="left", maintain_order="left").with_columns(
        pl.col("n_gaps").fill_null(0)
    )


def activity(events: pl.DataFrame, spans: pl.DataFrame, sm_counts: Mapping[int, int]) -> pl.DataFrame:
    """Which share of its multiprocessors was each device using while a pass ran: `sm_active_frac`, `occupancy_frac`.

    At every moment the running kernels hold min(1, sum of min(1, blocks / SMs)) of the SMs, and of all warps that fit
    the occupancy that the profiler estimated; the figures are the means over the window. An upper bound of what is
    active: a kernel counts with its whole grid until its last block ends, and one block on every SM counts as fully
    active, as in Nsight's "SM active", however little it does. Null where a kernel's grid (or occupancy) or the number
    of SMs is not recorded.
    """
    kernels = events.select("kind", *DEVICE, "start_ns", "dur_ns", "blocks", "occupancy_frac")
    kernels = kernels.filter(pl.col("kind") == "kernel").drop("kind")
    n_sms = pl.col("device").replace_strict(dict(sm_counts), default=None, return_dtype=pl.Int64)
    weighed = kernels.with_columns(sm=(pl.col("blocks") / n_sms).clip(0, 1), warps="occupancy_frac")
    cut = _inside(weighed, spans, DEVICE)
    names = {"sm": "sm_active_frac", "warps": "occupancy_frac"}
    found = {name: _mean_weight(cut, column, spans) for column, name in names.items()}
    return pl.DataFrame({name: pl.Series(values, dtype=pl.Float64, nan_to_null=True) for name, values in found.items()})


def sm_counts(meta: Mapping[str, Any]) -> dict[int, int]:
    """How many multiprocessors has each device of a trace, as far as it was recorded."""
    known = {}
    devices = meta.get("deviceProperties")
    for one in devices if isinstance(devices, list) else []:
        if isinstance(one, Mapping) and type(one.get("id")) is int and type(one.get("numSms")) is int:
            known[one["id"]] = one["numSms"]
    of_nsys = meta.get("sm_counts")
    known |= {int(gpu): n for gpu, n in of_nsys.items()} if isinstance(of_nsys, Mapping) else {}
    return {device: n for device, n in known.items() if n > 0}


def phases(events: pl.DataFrame, found: Found) -> pl.DataFrame:
    """How long did each part of the passes on a host take: `pass`, `name`, `n_calls`, `time_ns` of ranges right in it.

    Empty for passes on devices, where a range of the host tells how long launching took.
    """
    schema = {"pass": pl.Int64, "name": pl.String, "n_calls": pl.Int64, "time_ns": pl.Int64}
    if found.how != "host":
        return pl.DataFrame(schema=schema)
    ranges = events.filter(pl.col("kind") == "range").select(*THREAD, plain_name(), "start_ns", "dur_ns")
    passes = found.spans.select(*THREAD, "name", "start_ns", "dur_ns", "pass")
    keys = [*THREAD, "start_ns", "dur_ns"]
    inner = ranges.join(passes, on=keys, how="anti", nulls_equal=True).with_columns(
        pl.lit(None, pl.Int64).alias("pass")
    )
    both = pl.concat([passes, inner.select(passes.columns)])
    number = both["pass"].gather(parents(both))
    return (
        both.with_columns(number.alias("pass"))
        .filter(pl.col("pass").is_not_null())
        .group_by("pass", "name", maintain_order=True)
        .agg(n_calls=pl.len().cast(pl.Int64), time_ns=pl.sum("dur_ns"))
        .sort("pass", maintain_order=True)
    )


def _work(events: pl.DataFrame) -> pl.DataFrame:
    return events.filter(pl.col("kind").is_in(DEVICE_KINDS)).select(*DEVICE, "start_ns", "dur_ns")


def host_communication(events: pl.DataFrame) -> pl.DataFrame:
    """The operators and ranges of the host that communicate between ranks, with their plain names."""
    host = events.filter(pl.col("kind").is_in(["op", "range"])).select(
        "kind", *THREAD, plain_name(), "start_ns", "dur_ns"
    )
    return host.filter(pl.col("name").str.contains(COMMUNICATES))


def host_compute(events: pl.DataFrame) -> pl.DataFrame:
    """The operators of the host that neither communicate nor hold anything that does, with their plain names."""
    ops = events.filter(pl.col("kind") == "op").select(*THREAD, plain_name(), "start_ns", "dur_ns")
    ops = ops.filter(~pl.col("name").str.contains(COMMUNICATES))
    talks = host_communication(events).rename({"start_ns": "at_ns"})
    return ops.filter(earliest_held(ops, talks).is_null())


def _host_doing(events: pl.DataFrame) -> pl.DataFrame:
    """As `overlap.device_doing`, of hosts."""
    talks, ops = host_communication(events), host_compute(events)
    doing = pl.Enum(("compute", "communication", "copy"))
    parts = [(ops, "compute"), (talks.select(ops.columns), "communication")]
    none = pl.lit(None, pl.Categorical)
    return pl.concat([part.with_columns(doing=pl.lit(word, doing), collective=none) for part, word in parts])


def _inside(work: pl.DataFrame, spans: pl.DataFrame, by: list[str] | tuple[str, ...]) -> pl.DataFrame:
    """What of some work lies in each window, cut at its bounds: with `window`, the row of `spans`."""
    pieces = []
    windows_of = spans.with_row_index("window").partition_by(by, as_dict=True)
    for key, part in work.partition_by(by, as_dict=True).items():
        if key not in windows_of:
            continue
        done, mine = part.sort("start_ns"), windows_of[key]
        start, end = done["start_ns"].to_numpy(), (done["start_ns"] + done["dur_ns"]).to_numpy()
        low, high = mine["start_ns"].to_numpy(), (mine["start_ns"] + mine["dur_ns"]).to_numpy()
        first = np.searchsorted(np.maximum.accumulate(end), low, side="right")
        n = np.maximum(np.searchsorted(start, high) - first, 0)
        at = np.repeat(np.arange(mine.height), n)
        row = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n) + first[at]
        begins, ends = np.maximum(start[row], low[at]), np.minimum(end[row], high[at])
        kept = ends > begins
        times = {"start_ns": begins[kept], "dur_ns": (ends - begins)[kept]}
        window = pl.Series("window", mine["window"].to_numpy()[at[kept]], dtype=pl.Int64)
        pieces.append(
            done[row[kept]].with_columns(window, **{k: pl.Series(v, dtype=pl.Int64) for k, v in times.items()})
        )
    empty = work.clear().with_columns(window=pl.lit(None, pl.Int64))
    cut: pl.DataFrame = pl.concat([empty, *pieces])
    return cut


def _mean_weight(cut: pl.DataFrame, column: str, spans: pl.DataFrame) -> Floats:
    """The mean over each window of the sum of running kernels' weights, 1 at most; NaN where one is not known."""
    unknown = cut.group_by("window").agg(pl.col(column).null_count())
    weight, end = pl.col(column).fill_null(0).cast(pl.Float64), pl.col("start_ns") + pl.col("dur_ns")
    steps = (cut.select("window", at="start_ns", step=weight), cut.select("window", at=end, step=-weight))
    edges = pl.concat(steps).sort("window", "at")
    window, at = edges["window"].to_numpy(), edges["at"].to_numpy()
    level = np.cumsum(edges["step"].to_numpy())[:-1]  # every window ends at the level at which it began, zero
    lasts = np.where(window[1:] == window[:-1], np.diff(at), 0)
    area = np.zeros(spans.height)
    np.add.at(area, window[:-1], np.clip(level, 0, 1) * lasts)
    length = spans["dur_ns"].to_numpy().astype(float)
    area[unknown.filter(pl.col(column) > 0)["window"].to_numpy()] = np.nan
    area[np.setdiff1d(np.arange(spans.height), unknown["window"].to_numpy())] = np.nan
    return np.where(length > 0, area / np.maximum(length, 1), np.nan)

"""What does a step of a trace consist of: parts of its wall time, operators, kernel classes, launch metrics."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from perfmodel.attribution import by_operator
from perfmodel.classify import GEMMS, class_shares, classify
from perfmodel.intervals import merged, overlap_ns
from perfmodel.launch import launch_metrics
from perfmodel.matmuls import PRODUCTS, matmuls
from perfmodel.overlap import device_doing
from perfmodel.passes.measured import host_communication
from perfmodel.trace import DEVICE_KINDS, Trace

from .trace_steps import Steps

# Classes of kernels that compute for longer than they move: these, and `other`, of which nothing is known. All other
# classes move more than they compute. A convention of names: a GEMM of few rows waits for memory, too.
COMPUTE_CLASSES = (*GEMMS, "attention", "other")
METRICS = ("tklqt_ns", "queue_ns", "launch_call_ns", "n_launches", "n_kernels", "kernel_time_ns")
STEP_NS, IDLE_NS = "step_ns", "gpu_idle_ns"  # metrics that are time of the step
OPERATOR, CLASS, METRIC, PART = "operator", "class", "metric", "part"  # kinds of details
_LINE = pl.lit(0, pl.Int64).alias("line")  # all devices of a process lie on one line of time


@dataclass(frozen=True)
class Part:
    """One detail of a step: its `kind`, what tells it from others (`key`), what people call it, ns or a count of it."""

    kind: str
    key: str
    label: str
    value: float
    facts: Mapping[str, Any] = field(default_factory=dict)


def parts_of(trace: Trace, steps: Steps) -> list[Part]:
    """Everything that the steps around the median are made of, per step.

    Operators have the device time of what they launched, in traces without devices the host's time in them, and are
    told apart by the matrices that they multiply: of products the key has `k` x `n`, the label also the rows where
    these are always as many. Facts of an operator: `name`, `n_calls`, `n_flops` and `dtype` (of products); of a class
    `n_kernels`. Parts of PARTS sum to the step.
    """
    chosen = steps.of(steps.middle)
    n_steps = len(steps.middle)
    sub, names = _named_by_shape(replace(trace, events=chosen))
    found = [*_operators(sub, names, n_steps), *_classes(sub, n_steps)]
    wall = wall_parts(steps)
    found += [Part(PART, name, name, ns) for name, ns in wall.items()]
    found.append(Part(METRIC, STEP_NS, STEP_NS, sum(wall.values())))
    if _has_device(chosen):
        measured = launch_metrics(sub).to_json()
        found += [Part(METRIC, name, name, measured[name] / n_steps) for name in METRICS]
        found.append(Part(METRIC, IDLE_NS, IDLE_NS, wall["launch"] + wall["host"]))
    return found


def wall_parts(steps: Steps) -> dict[str, float]:
    """How long each part of PARTS took in a typical step, ns; together they are the median step.

    Every instant of a step belongs to one part. With a device: `compute` while any kernel of COMPUTE_CLASSES runs (or a
    graph whose kernels were not recorded), else `memory` for other kernels, else `communication`, else `copy exposure`,
    else `memory` for fills; while the devices idle `launch` if the host is in a launch call, else `host`. Without:
    `compute` in operators that multiply matrices or attend, else `communication`, else `memory` in other operators,
    else `host`. Shares are those of the steps around the median (`Steps.middle`), scaled to the median.
    """
    levels = list(_device_levels(steps.events) if _has_device(steps.events) else _host_levels(steps.events))
    windows = steps.windows.with_columns(_LINE)
    covered = windows.clear()
    found: dict[str, pl.Series] = {}
    before = pl.repeat(0, windows.height, dtype=pl.Int64, eager=True)
    for part, intervals in levels:
        both = pl.concat([covered, intervals.select("start_ns", "dur_ns").with_columns(_LINE)])
        covered = merged(both, ("line",)).select(covered.columns)
        until = overlap_ns(windows, covered, ("line",))
        found[part] = found.get(part, 0) + (until - before)
        before = until
    found["host"] = windows["dur_ns"] - before
    middle = steps.middle
    in_middle = {part: float(ns.to_numpy()[middle].sum()) for part, ns in found.items()}
    median_ns = float(windows["dur_ns"].median())  # type: ignore[arg-type]
    total_ns = float(steps.dur_ns[middle].sum())
    return {part: ns / total_ns * median_ns for part, ns in in_middle.items()}


def _has_device(events: pl.DataFrame) -> bool:
    return bool(events["kind"].is_in(DEVICE_KINDS).any())


def _device_levels(events: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """What each part of the wall time is, most important first, of a process with devices."""
    doing = device_doing(events)
    computes = doing["doing"] == "compute"
    is_compute = computes & classify(doing["name"]).cast(pl.String).is_in(COMPUTE_CLASSES)
    times = ("start_ns", "dur_ns")
    replays = events.filter(pl.col("kind") == "replay").select(times)
    yield "compute", pl.concat([doing.filter(is_compute).select(times), replays])
    yield "memory", doing.filter(computes & ~is_compute)
    yield "communication", doing.filter(pl.col("doing") == "communication")
    yield "copy exposure", doing.filter(pl.col("doing") == "copy")
    yield "memory", events.filter(pl.col("kind").is_in(DEVICE_KINDS))
    yield "launch", events.filter(pl.col("kind") == "launch")


def _host_levels(events: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """What each part of the wall time is, most important first, of a process without devices."""
    ops = events.filter(pl.col("kind") == "op")
    names = ops["name"].cast(pl.String)
    is_compute = names.is_in(list(PRODUCTS)) | classify(ops["name"]).cast(pl.String).is_in((*GEMMS, "attention"))
    yield "compute", ops.filter(is_compute)
    yield "communication", host_communication(events)
    yield "memory", ops


def _named_by_shape(trace: Trace) -> tuple[Trace, dict[str, Part]]:
    """The trace with operators of matrix products named by their shapes, and by these names what they are.

    A product is told from another of its operator by its batch and by `k` and `n`, which weights have; rows may differ
    from call to call, as those of an expert do.
    """
    products = matmuls(trace)
    shape = [pl.format("{}x{}", "k", "n")]
    shape += [pl.when(pl.col(name) > 1).then(pl.format(word + "{} ", name)).otherwise(pl.lit("")) for name, word in
              (("batch", "batch of "), ("n_experts", "experts of "))]  # fmt: skip
    named = products.with_columns(
        key=pl.concat_str(pl.col("op"), pl.lit(" "), *(part.fill_null("") for part in reversed(shape)))
    )
    table = named.group_by("key", maintain_order=True).agg(
        pl.first("op", "k", "n", "dtype"), pl.sum("flops"), m=pl.when(pl.n_unique("m") == 1).then(pl.first("m"))
    )
    found = {}
    for row in table.iter_rows(named=True):
        rows = "" if row["m"] is None else f"{row['m']}x"
        label = row["key"].replace(f"{row['k']}x{row['n']}", f"{rows}{row['k']}x{row['n']}")
        found[row["key"]] = Part(
            OPERATOR, row["key"], label, 0.0, {"n_flops": float(row["flops"]), "dtype": row["dtype"]}
        )
    names = trace.events["name"].cast(pl.String).scatter(named["row"], named["key"]).cast(pl.Categorical)
    return replace(trace, events=trace.events.with_columns(name=names)), found


def _operators(trace: Trace, products: Mapping[str, Part], n_steps: int) -> Iterable[Part]:
    table = by_operator(trace.events)
    time = pl.col("kernel_time_ns") + pl.col("copy_time_ns") if _has_device(trace.events) else pl.col("self_ns")
    counts = pl.coalesce("n_calls", pl.col("n_kernels") + pl.col("n_copies"))
    rows = table.select("name", pl.col("part").cast(pl.String), n_calls=counts, time_ns=time.fill_null(0))
    for row in rows.iter_rows(named=True):
        product = products.get(row["name"])
        if not row["time_ns"] and product is None:
            continue
        facts = {"name": row["name"], "part": row["part"], "n_calls": row["n_calls"] / n_steps}
        label = row["name"]
        if product is not None:
            n_flops = product.facts["n_flops"] / n_steps
            facts |= {"name": row["name"].split(" ")[0], "n_flops": n_flops, "dtype": product.facts["dtype"]}
            label = product.label
        yield Part(OPERATOR, row["name"], label, row["time_ns"] / n_steps, facts)


def _classes(trace: Trace, n_steps: int) -> Iterable[Part]:
    for row in class_shares(trace.events).iter_rows(named=True):
        name = str(row["class"])
        yield Part(CLASS, name, name, row["time_ns"] / n_steps, {"n_kernels": row["n_kernels"] / n_steps})

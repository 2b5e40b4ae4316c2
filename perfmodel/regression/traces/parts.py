"""What does a step of a trace consist of: parts of its wall time, operators, kernel classes, launch metrics."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import polars as pl

from perfmodel.attribution import by_operator
from perfmodel.classify import GEMMS, class_shares, classify
from perfmodel.intervals import merged, overlap_ns
from perfmodel.launch import launch_metrics
from perfmodel.matmuls import PRODUCTS, matmuls
from perfmodel.overlap import device_doing
from perfmodel.passes.measured import host_communication
from perfmodel.regression.evidence import Measured
from perfmodel.trace import DEVICE_KINDS, Trace

from .steps import Steps

# Classes of kernels that compute for longer than they move: these, and `other`, of which nothing is known. All other
# classes move more than they compute. A convention of names: a GEMM of few rows waits for memory, too.
COMPUTE_CLASSES = (*GEMMS, "attention", "other")
METRICS = ("tklqt_ns", "queue_ns", "launch_call_ns", "n_launches", "n_kernels", "kernel_time_ns")
STEP_NS, IDLE_NS = "step_ns", "gpu_idle_ns"  # metrics that are time of the step
OPERATOR, CLASS, METRIC, PART = "operator", "class", "metric", "part"  # kinds of details
_LINE = pl.lit(0, pl.Int64).alias("line")  # all devices of a process lie on one line of time


def details_of(trace: Trace, steps: Steps) -> dict[str, Measured]:
    """Everything that the steps around the median are made of, per step, as the run 0, by kind and name.

    Operators have the device time of what they launched, in traces without devices the host's time in them. Those that
    multiply matrices are told apart by `k` x `n`, batch and experts; their label also has the rows, where these are
    always as many. Facts have the `kind`; of an operator also `name`, `part` (`attribution.PARTS`) and `n_calls`, of a
    product `shape`, `result` (null where rows change), `n_flops` and `dtype`; of a class `n_kernels`. Parts of PARTS
    sum to the step.
    """
    n_steps = len(steps.middle)
    sub, products = _named_by_shape(replace(trace, events=steps.of(steps.middle)))
    wall = wall_parts(steps)
    found = [*_operators(sub, products, n_steps), *_classes(sub, n_steps)]
    found += [_one(PART, name, ns) for name, ns in wall.items()]
    found.append(_one(METRIC, STEP_NS, sum(wall.values())))
    if has_device(sub.events):
        measured = launch_metrics(sub).to_json()
        found += [_one(METRIC, name, measured[name] / n_steps) for name in METRICS]
        found.append(_one(METRIC, IDLE_NS, wall["launch"] + wall["host"]))
    return {one.workload: one for one in found}


def key_of(kind: str, name: str) -> str:
    """Under which key details have a detail of this kind."""
    return f"{kind} {name}"


def _one(kind: str, name: str, value: float, label: str | None = None, /, **facts: Any) -> Measured:
    return Measured(key_of(kind, name), label or name, {0: value}, facts={"kind": kind, **facts})


def wall_parts(steps: Steps) -> dict[str, float]:
    """How long each part of PARTS took in a typical step, ns; together they are the median step.

    Every instant of a step belongs to one part. With a device: `compute` while any kernel of COMPUTE_CLASSES runs (or a
    graph whose kernels were not recorded), else `memory` for other kernels, else `communication`, else `copy exposure`,
    else `memory` for fills; while the devices idle `launch` if the host is in a launch call, else `host`. Without:
    `compute` in operators that multiply matrices or attend, else `communication`, else `memory` in other operators,
    else `host`. Shares are those of the steps around the median (`Steps.middle`), scaled to the median.
    """
    levels = list(_device_levels(steps.events) if has_device(steps.events) else _host_levels(steps.events))
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


def has_device(events: pl.DataFrame) -> bool:
    """Whether anything ran on a device."""
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
    yield "compute", ops.filter(multiplies_or_attends(ops["name"]))
    yield "communication", host_communication(events)
    yield "memory", ops


def multiplies_or_attends(operators: pl.Series) -> pl.Series:
    """Which operators compute for longer than they move, by their names: those that multiply matrices or attend."""
    is_class = classify(operators).cast(pl.String).is_in((*GEMMS, "attention"))
    return operators.cast(pl.String).is_in(list(PRODUCTS)) | is_class


def _named_by_shape(trace: Trace) -> tuple[Trace, dict[str, dict[str, Any]]]:
    """The trace with operators of matrix products named by their shapes, and by these names what they are.

    A product is told from another of its operator by its batch and by `k` and `n`, which weights have; rows may differ
    from call to call, as those of an expert do.
    """
    many = [
        pl.when(pl.col(name) > 1).then(pl.format(words, name)).otherwise(pl.lit(""))
        for name, words in (("n_experts", "{} experts, "), ("batch", "batch {}, "))
    ]
    products = matmuls(trace).with_columns(shape=pl.format("{}{}{}x{}", *many, "k", "n"))
    products = products.with_columns(key=pl.format("{} {}", "op", "shape"))
    is_one, result = pl.n_unique("m") == 1, pl.format("{}{}{}x{}", *many, "m", "n").first()
    rows = pl.when(is_one).then(pl.format("{}x", pl.first("m"))).otherwise(pl.lit(""))
    table = products.group_by("key", maintain_order=True).agg(
        pl.first("op", "shape", "dtype"),
        pl.sum("flops"),
        result=pl.when(is_one).then(result),
        label=pl.format("{} {}{}{}{}x{}", "op", *many, rows, "k", "n").first(),
    )
    names = trace.events["name"].cast(pl.String).scatter(products["row"], products["key"]).cast(pl.Categorical)
    named = replace(trace, events=trace.events.with_columns(name=names))
    return named, {row["key"]: row for row in table.iter_rows(named=True)}


def _operators(trace: Trace, products: Mapping[str, dict[str, Any]], n_steps: int) -> Iterable[Measured]:
    time = pl.col("kernel_time_ns") + pl.col("copy_time_ns") if has_device(trace.events) else pl.col("self_ns")
    counts = pl.coalesce("n_calls", pl.col("n_kernels") + pl.col("n_copies"))
    table = by_operator(trace.events).select("name", pl.col("part").cast(pl.String), n=counts, ns=time.fill_null(0))
    for name, part, n_calls, time_ns in table.iter_rows():
        facts = {"name": name, "part": part, "n_calls": n_calls / n_steps}
        product = products.get(name)
        if product is not None:
            n_flops = product["flops"] / n_steps
            facts |= {name: product[name] for name in ("shape", "result", "dtype")}
            facts |= {"name": product["op"], "n_flops": n_flops}
        if time_ns or product is not None:
            yield _one(OPERATOR, name, time_ns / n_steps, None if product is None else product["label"], **facts)


def _classes(trace: Trace, n_steps: int) -> Iterable[Measured]:
    for row in class_shares(trace.events).iter_rows(named=True):
        yield _one(CLASS, str(row["class"]), row["time_ns"] / n_steps, n_kernels=row["n_kernels"] / n_steps)

"""Everything that the page of a trace says, computed once: coverage, findings, launch metrics and tables."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import polars as pl

from perfmodel.attribution import FOUND_BY, attributed, by_operator
from perfmodel.bound import Bound, bound
from perfmodel.classify import Rules, class_shares, classify
from perfmodel.copies import copies
from perfmodel.findings import Finding, findings
from perfmodel.groups import launch_metrics_by
from perfmodel.hardware import HardwareProfile
from perfmodel.launch import LaunchMetrics, by_host_name, by_kernel, by_launch_call, launch_metrics
from perfmodel.matmuls import alike, launch_points, matmuls, points_on_roof
from perfmodel.overhead import profiler_overhead
from perfmodel.overlap import device_doing, exposed_time, launch_gaps
from perfmodel.trace import Trace

# The tables of an analysis, in the order in which JSON has them.
TABLES = (
    *("groups", "exposed", "gaps", "steps", "classes", "kernels", "launch_calls", "operators"),
    *("host_operators", "ranges", "copies", "products", "counted", "profiler_overhead"),
)


@dataclass(frozen=True)
class Analysis:
    """What is known of one trace.

    `n_kernels_found_by` counts kernels by how their operator was found (`attribution.FOUND_BY`); `groups` holds the
    launch metrics of each group `by` that was asked for. The tables hold all their rows, costliest first: `classes`
    (`classify.class_shares`), `kernels` (`launch.by_kernel`), `launch_calls` (`launch.by_launch_call`), `operators`
    (`attribution.by_operator`), `host_operators` and `ranges` (`launch.by_host_name`), `copies` (`copies.copies`),
    `exposed` (`overlap.exposed_time`), `gaps` (`overlap.launch_gaps`), `steps` (`groups.launch_metrics_by`),
    `profiler_overhead` (`overhead.profiler_overhead`), `products` (alike `matmuls` taken together, with the roof of the
    machine where it is known) and `counted` (kernels that Nsight Compute counted, likewise). Null: what was not asked
    for.
    """

    trace: Trace
    metrics: LaunchMetrics
    bound: Bound
    n_kernels_found_by: dict[str, int]
    findings: tuple[Finding, ...]
    classes: pl.DataFrame
    kernels: pl.DataFrame
    launch_calls: pl.DataFrame
    operators: pl.DataFrame
    host_operators: pl.DataFrame
    ranges: pl.DataFrame
    copies: pl.DataFrame
    exposed: pl.DataFrame
    gaps: pl.DataFrame
    steps: pl.DataFrame
    products: pl.DataFrame
    profiler_overhead: pl.DataFrame
    counted: pl.DataFrame | None = None
    by: str | None = None
    groups: pl.DataFrame | None = None

    def to_json(self, n_top: int | None = None) -> dict[str, Any]:
        """The analysis as a dict that JSON can hold: the launch metrics, then tables cut after `n_top` rows."""
        tables = {name: getattr(self, name) for name in TABLES}
        return {
            **self.metrics.to_json(),
            "n_repaired": self.trace.n_repaired,
            "n_dropped": self.trace.n_dropped,
            "notes": list(self.trace.notes),
            "n_kernels_found_by": self.n_kernels_found_by,
            "bound": self.bound.to_json(),
            "findings": [finding.to_json() for finding in self.findings],
            "by": self.by,
            "profiler_overhead_ns": int(self.profiler_overhead["time_ns"].sum()),
            **{name: None if table is None else _rows(table, n_top) for name, table in tables.items()},
        }


def analyse(
    trace: Trace,
    *,
    hardware: HardwareProfile | None = None,
    by: str | None = None,
    counted: pl.DataFrame | None = None,
    rules: Rules | None = None,
) -> Analysis:
    """What does a trace say: everything that its page shows.

    `hardware` adds what the machine could do, `by` a grouping of the launch metrics (`groups.GROUPINGS`), `counted` the
    launches that Nsight Compute counted (`readers.ncu.read_ncu`); `rules` tell kernel classes instead of the shipped
    ones (`classify.read_rules`).
    """
    events = trace.events
    work = attributed(events)
    is_kernel = pl.col("kind") == "kernel"
    work = work.with_columns(pl.when(is_kernel).then(classify(work["name"], rules)).alias("class"))
    metrics = launch_metrics(trace, work)
    found_by = dict(work.filter(is_kernel).group_by(pl.col("found_by").cast(pl.String)).agg(pl.len()).iter_rows())
    doing = device_doing(events, rules)
    copied, exposed = copies(events, rules, doing), exposed_time(events, rules, doing)
    # Each of these takes long alone and spends its time outside of the interpreter's lock; the longest begin first.
    tables: dict[str, Callable[[], Any]] = {
        "findings": lambda: tuple(findings(events, work, metrics, copied, exposed, hardware)),
        "operators": lambda: by_operator(events, work),
        "steps": lambda: launch_metrics_by(events, "step", work).filter(pl.col("name").is_not_null()),
        "products": lambda: _with_roof(_products(trace, work), hardware),
        "gaps": lambda: launch_gaps(events, work),
        "bound": lambda: bound(events, work),
        "launch_calls": lambda: by_launch_call(events, work),
        "kernels": lambda: by_kernel(events, work),
        "classes": lambda: class_shares(events, rules),
        "host_operators": lambda: by_host_name(events, "op"),
        "ranges": lambda: by_host_name(events, "range"),
        "profiler_overhead": lambda: profiler_overhead(events, work),
        "groups": lambda: None if by is None else launch_metrics_by(events, by, work),
    }
    with ThreadPoolExecutor(2) as pool:  # more would hold more tables at once
        done = dict(zip(tables, pool.map(lambda compute: compute(), tables.values()), strict=True))
    return Analysis(
        trace=trace,
        metrics=metrics,
        n_kernels_found_by={how: found_by.get(how, 0) for how in FOUND_BY.categories},
        copies=copied,
        exposed=exposed,
        counted=None if counted is None else _with_roof(alike(launch_points(counted), ("op", "dtype")), hardware),
        by=by,
        **done,
    )


def _products(trace: Trace, work: pl.DataFrame) -> pl.DataFrame:
    """The matrix products of a trace, those of one operator, shape and type together."""
    timed = matmuls(trace, work).filter(pl.col("time_ns") > 0)
    return alike(timed, ("op", "m", "n", "k", "batch", "n_experts", "dtype"))


def _with_roof(points: pl.DataFrame, hardware: HardwareProfile | None) -> pl.DataFrame:
    return points if hardware is None else points_on_roof(points, hardware)


def _rows(table: pl.DataFrame, n_top: int | None) -> list[dict[str, Any]]:
    """The first rows of a table as JSON can hold them."""
    shown = table if n_top is None else table.head(n_top)
    return shown.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String)).to_dicts()

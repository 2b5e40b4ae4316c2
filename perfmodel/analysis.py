"""Everything that the page of a trace says, computed once: coverage, findings, launch metrics and tables."""

from dataclasses import dataclass
from typing import Any

import polars as pl

from perfmodel.attribution import FOUND_BY, attributed, by_operator
from perfmodel.classify import class_shares, classify
from perfmodel.findings import Finding, findings
from perfmodel.hardware import HardwareProfile
from perfmodel.launch import LaunchMetrics, by_host_name, by_kernel, launch_metrics
from perfmodel.trace import Trace


@dataclass(frozen=True)
class Analysis:
    """What is known of one trace.

    `n_kernels_found_by` counts kernels by how their operator was found (`attribution.FOUND_BY`). The tables hold all
    their rows, costliest first: `classes` (`classify.class_shares`), `kernels` (`launch.by_kernel`), `operators`
    (`attribution.by_operator`), `ranges` and `host_operators` (`launch.by_host_name`).
    """

    trace: Trace
    metrics: LaunchMetrics
    n_kernels_found_by: dict[str, int]
    findings: tuple[Finding, ...]
    classes: pl.DataFrame
    kernels: pl.DataFrame
    operators: pl.DataFrame
    ranges: pl.DataFrame
    host_operators: pl.DataFrame

    def to_json(self, n_top: int | None = None) -> dict[str, Any]:
        """The analysis as a dict that JSON can hold: the launch metrics, then tables cut after `n_top` rows."""
        tables = {name: getattr(self, name) for name in ("classes", "kernels", "operators", "ranges")}
        return {
            **self.metrics.to_json(),
            "n_repaired": self.trace.n_repaired,
            "n_dropped": self.trace.n_dropped,
            "notes": list(self.trace.notes),
            "n_kernels_found_by": self.n_kernels_found_by,
            "findings": [finding.to_json() for finding in self.findings],
            **{name: _rows(table if n_top is None else table.head(n_top)) for name, table in tables.items()},
        }


def analyse(trace: Trace, hardware: HardwareProfile | None = None) -> Analysis:
    """What does a trace say: everything that its page shows; `hardware` adds what the machine could do."""
    events = trace.events
    work = attributed(events)
    is_kernel = pl.col("kind") == "kernel"
    work = work.with_columns(pl.when(is_kernel).then(classify(work["name"])).alias("class"))
    metrics = launch_metrics(trace)
    found_by = dict(work.filter(is_kernel).group_by(pl.col("found_by").cast(pl.String)).agg(pl.len()).iter_rows())
    return Analysis(
        trace=trace,
        metrics=metrics,
        n_kernels_found_by={how: found_by.get(how, 0) for how in FOUND_BY.categories},
        findings=tuple(findings(events, work, metrics, hardware)),
        classes=class_shares(events),
        kernels=by_kernel(events),
        operators=by_operator(events, work),
        ranges=by_host_name(events, "range"),
        host_operators=by_host_name(events, "op"),
    )


def _rows(table: pl.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as JSON can hold them."""
    return table.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String)).to_dicts()

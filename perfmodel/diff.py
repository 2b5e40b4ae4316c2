"""What differs between two traces: launch metrics, kernel classes and operators side by side.

Kernels are not compared by name, since other GPUs and builds run others for the same operator.
"""

from dataclasses import dataclass
from typing import Any

import polars as pl

from perfmodel.attribution import attributed, by_operator
from perfmodel.classify import class_shares
from perfmodel.groups import profiler_steps
from perfmodel.launch import launch_metrics
from perfmodel.trace import Trace

# Of the launch metrics, those that grow with the length of a trace, and those that do not.
SUMS = (
    "n_kernels",
    "n_kernels_joined",
    "n_kernels_orphan",
    "n_kernels_graph",
    "tklqt_ns",
    "tklqt_graph_ns",
    "tklqt_first_kernel_ns",
    "kernel_time_ns",
    "kernel_busy_ns",
    "gpu_busy_ns",
    "gpu_span_ns",
    "inference_latency_ns",
)
MEANS = ("akd_ns", "gpu_idle_frac")


@dataclass(frozen=True)
class TraceDiff:
    """Two traces side by side, `a` the one that stands first.

    `n_steps_a` and `n_steps_b` count the profiler's steps; where both have some, changes and ratios are per step.
    `metrics` has a row for each launch metric: `metric`, `a`, `b`, `change` (b - a) and `ratio` (b / a). `classes` has
    one for each kernel class: `class`, `n_kernels_a`, `n_kernels_b`, `time_ns_a`, `time_ns_b`; `operators` one for each
    operator: `name`, `part`, `n_calls_*`, `self_ns_*`, `n_kernels_*`, `kernel_time_ns_*`, `tklqt_ns_*` (see
    `attribution.by_operator`); both with `change_ns` and `ratio` of the kernel time, of the host's time in operators
    where no side has kernels, the greatest change first. Null: what a side does not have, and the ratio to nothing.
    """

    n_steps_a: int
    n_steps_b: int
    metrics: pl.DataFrame
    classes: pl.DataFrame
    operators: pl.DataFrame

    @property
    def per_step(self) -> bool:
        """Whether changes and ratios are per step."""
        return self.n_steps_a > 0 and self.n_steps_b > 0

    def to_json(self, n_top: int | None = None) -> dict[str, Any]:
        """The comparison as a dict that JSON can hold: all metrics, and the other tables cut after `n_top` rows."""
        classes, operators = (t if n_top is None else t.head(n_top) for t in (self.classes, self.operators))
        return {
            "n_steps_a": self.n_steps_a,
            "n_steps_b": self.n_steps_b,
            "metrics": self.metrics.to_dicts(),
            "classes": classes.to_dicts(),
            "operators": operators.to_dicts(),
        }


def diff(a: Trace, b: Trace) -> TraceDiff:
    """What differs between two traces, by launch metric, kernel class and operator.

    Every column of a side sums to the total of its trace: what only one side has is a row with null on the other.
    """
    steps = len(profiler_steps(a.events)), len(profiler_steps(b.events))
    per = steps if all(steps) else (1, 1)
    classes = _side_by_side(_classes(a), _classes(b), "time_ns", per)
    time = "self_ns" if classes.is_empty() else "kernel_time_ns"
    operators = _side_by_side(_operators(a), _operators(b), time, per)
    return TraceDiff(*steps, _metrics(a, b, per), classes, operators)


def _classes(trace: Trace) -> pl.DataFrame:
    return class_shares(trace.events).select(pl.col("class").cast(pl.String), "n_kernels", "time_ns")


def _operators(trace: Trace) -> pl.DataFrame:
    table = by_operator(trace.events, attributed(trace.events))
    return table.select("name", "part", "n_calls", "self_ns", "n_kernels", "kernel_time_ns", "tklqt_ns")


def _metrics(a: Trace, b: Trace, per: tuple[int, int]) -> pl.DataFrame:
    sides = [launch_metrics(trace).to_json() for trace in (a, b)]
    names = [*SUMS, *MEANS]
    table = pl.DataFrame(
        {"metric": names, **{side: [values[name] for name in names] for side, values in zip("ab", sides, strict=True)}},
        schema={"metric": pl.String, "a": pl.Float64, "b": pl.Float64},
        strict=False,
    )
    is_sum = pl.col("metric").is_in(SUMS)
    old, new = (pl.col(side) / pl.when(is_sum).then(n).otherwise(1) for side, n in zip("ab", per, strict=True))
    return table.with_columns(change=new - old, ratio=_ratio(new, old))


def _side_by_side(a: pl.DataFrame, b: pl.DataFrame, time: str, per: tuple[int, int]) -> pl.DataFrame:
    """The rows of both tables by what names them, their numbers paired, with the change and ratio of a time."""
    keys = [column for column in a.columns if column in ("class", "name", "part")]
    values = [column for column in a.columns if column not in keys]
    sides = [t.rename({c: f"{c}_{side}" for c in values}) for t, side in ((a, "a"), (b, "b"))]
    old, new = (pl.col(f"{time}_{side}") / n for side, n in zip("ab", per, strict=True))
    return (
        sides[0]
        .join(sides[1], on=keys, how="full", coalesce=True)
        .select(*keys, *(f"{c}_{side}" for c in values for side in "ab"))
        .with_columns(change_ns=new.fill_null(0) - old.fill_null(0), ratio=_ratio(new, old))
        .sort(pl.col("change_ns").abs(), *keys, descending=[True, *(False for _ in keys)])
    )


def _ratio(new: pl.Expr, old: pl.Expr) -> pl.Expr:
    return pl.when(old != 0).then(new / old)

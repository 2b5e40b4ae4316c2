"""What does each pass of a MoE layer cost, from a trace: launches, gaps, hidden communication, active SMs."""

from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from perfmodel.classify import KERNEL_CLASS, Rules
from perfmodel.errors import InputError
from perfmodel.groups import step_at
from perfmodel.intervals import DEVICE, PROCESS
from perfmodel.passes.found import Found, bare_name, find_passes
from perfmodel.passes.measured import activity, counts, phases, shares, sm_counts, windows
from perfmodel.trace import Trace

PASSES = pl.Schema(
    {
        "pass": pl.Int64(),
        "step": pl.Int64(),
        "rank": pl.Int32(),
        "device": pl.Int64(),
        "name": pl.String(),
        "start_ns": pl.Int64(),
        "dur_ns": pl.Int64(),
        "n_kernels": pl.Int64(),
        "n_graph_kernels": pl.Int64(),
        "n_copies": pl.Int64(),
        "n_replays": pl.Int64(),
        "n_launches": pl.Int64(),
        "busy_ns": pl.Int64(),
        "idle_ns": pl.Int64(),
        "n_gaps": pl.Int64(),
        "longest_gap_ns": pl.Int64(),
        "compute_busy_ns": pl.Int64(),
        "communication_busy_ns": pl.Int64(),
        "communication_hidden_ns": pl.Int64(),
        "communication_exposed_ns": pl.Int64(),
        "all_to_all_busy_ns": pl.Int64(),
        "all_to_all_exposed_ns": pl.Int64(),
        "sm_active_frac": pl.Float64(),
        "occupancy_frac": pl.Float64(),
    }
)
CLASSES_OF_PASSES = pl.Schema(
    {"pass": pl.Int64(), "rank": pl.Int32(), "device": pl.Int64(), "class": KERNEL_CLASS, "n_kernels": pl.Int64(),
     "time_ns": pl.Int64()}
)  # fmt: skip
# What the passes of a trace are summed up by: each figure's median.
MEDIANS = tuple(name for name in PASSES if name not in ("pass", "step", "rank", "device", "name", "start_ns"))


@dataclass(frozen=True)
class Passes:
    """The MoE layer passes of one trace, in time order.

    `how` says how they were told: `ranges` or `kernels` (see `passes.found.Found`), or `host`, ranges of a trace
    without device work, whose launches and gaps are null. `passes` is the table PASSES, a row for each pass and device;
    `classes` CLASSES_OF_PASSES; `phases` the ranges right within passes on a host. busy + idle = duration, and hidden +
    exposed = busy of communication, as `passes.measured.shares` defines them.
    """

    how: str
    passes: pl.DataFrame
    classes: pl.DataFrame
    phases: pl.DataFrame
    notes: tuple[str, ...]

    def medians(self, part: pl.DataFrame | None = None) -> dict[str, float | None]:
        """The median pass: of each figure of MEDIANS its median over passes (of a part of PASSES), null where unknown.

        `communication_hidden_frac` and `idle_frac` are sums over all passes divided by sums, null where these are 0.
        """
        table = self.passes if part is None else part
        found: dict[str, float | None] = dict(table.select(pl.median(*MEDIANS)).row(0, named=True))
        total = table.select(pl.sum("dur_ns", "idle_ns", "communication_busy_ns", "communication_hidden_ns"))
        dur_ns, idle_ns, busy_ns, hidden_ns = total.row(0)
        found["idle_frac"] = idle_ns / dur_ns if dur_ns else None
        found["communication_hidden_frac"] = hidden_ns / busy_ns if busy_ns else None
        return found

    def of_step(self, step: int) -> "Passes":
        """The passes of one step; raises InputError where there is none in it."""
        kept = self.passes.filter(pl.col("step") == step)
        if kept.is_empty():
            there = ", ".join(map(str, self.passes["step"].drop_nulls().unique().sort().head(8))) or "none"
            raise InputError(f"no MoE layer pass in step {step}; there are passes in {there}")
        mine = pl.col("pass").is_in(kept["pass"].implode())
        return replace(self, passes=kept, classes=self.classes.filter(mine), phases=self.phases.filter(mine))

    def to_json(self, n_top: int | None = None) -> dict[str, Any]:
        """The passes as a dict that JSON can hold, tables cut after `n_top` passes."""
        first = self.passes["pass"].unique().sort()[:n_top]
        kept = {
            name: table.filter(pl.col("pass").is_in(first.implode())).with_columns(pl.col(pl.Enum).cast(pl.String))
            for name, table in (("passes", self.passes), ("classes", self.classes), ("phases", self.phases))
        }
        return {
            "how": self.how,
            "n_passes": self.passes["pass"].n_unique(),
            "notes": list(self.notes),
            "medians": self.medians(),
            **{name: table.to_dicts() for name, table in kept.items()},
        }


def moe_passes(trace: Trace, pattern: str | None = None, rules: Rules | None = None) -> Passes:
    """Which are the MoE layer passes of a trace, and what does each cost: named ranges, else groups of kernels.

    `pattern` is a regular expression for the names of ranges and operators that are passes; `rules` tell kernel classes
    instead of the shipped ones. Raises InputError where there is no MoE layer pass (`passes.found.find_passes`).
    """
    events = trace.events
    found = find_passes(events, pattern, rules)
    spans = windows(found)
    counted, classes = counts(found, rules)
    table = shares(events, spans, found.how, rules) if found.how != "host" else _on_host(events, found)
    active = activity(events, spans, sm_counts(trace.meta))
    if found.how == "host":
        active = active.with_columns(pl.lit(None, pl.Float64).alias(name) for name in active.columns)
    named = found.spans.select("pass", pl.col("name"), step=_steps(events, found))
    table = (
        pl.concat([table, active], how="horizontal")
        .with_columns(idle_ns=pl.col("dur_ns") - pl.col("busy_ns"))
        .join(counted, on=["pass", *DEVICE], how="left", nulls_equal=True, maintain_order="left")
        .join(named, on="pass", how="left", maintain_order="left")
        .select(pl.col(name).cast(dtype) for name, dtype in PASSES.items())
    )
    return Passes(found.how, table, classes.match_to_schema(CLASSES_OF_PASSES), phases(events, found), found.notes)


def _on_host(events: pl.DataFrame, found: Found) -> pl.DataFrame:
    """The shares of passes on a host, whose windows are told by their process."""
    spans = found.spans.select("pass", *PROCESS, "device", "start_ns", "dur_ns")
    return shares(events, spans, found.how)


def _steps(events: pl.DataFrame, found: Found) -> pl.Series:
    """In which step did each pass begin (`groups.step_at`), by its range, else by its first launch call."""
    begins = found.spans.select("rank", "process", at_ns="start_ns")
    if found.how == "kernels":
        first = (
            found.work.filter(pl.col("pass").is_not_null() & pl.col("launch_start_ns").is_not_null())
            .group_by("pass")
            .agg(at_ns=pl.min("launch_start_ns"), process=pl.first("launch_process"))
        )
        begins = found.spans.select("pass", "rank").join(first, on="pass", how="left", maintain_order="left")
    return step_at(events, begins)


__all__ = ["CLASSES_OF_PASSES", "MEDIANS", "PASSES", "Passes", "bare_name", "find_passes", "moe_passes"]

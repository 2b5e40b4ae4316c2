"""MoE layer passes of traces: what each consists of, who waits for whom, how runs scale."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from perfmodel import text
from perfmodel.passes import Passes
from perfmodel.passes.ranks import LayerRanks

from .drawing import GUIDE, PALETTE, layout, literal, time_ticks

MAX_BARS = 60  # passes or members in one figure; more are too thin to be told apart
PARTS = ("computing or copying", "communication, exposed", "idle")


def _place(row: Mapping[str, Any]) -> str:
    """A member (a rank, a device of it) in words; what is null is not said."""
    said = [f"{name} {row[name]}" for name in ("rank", "device") if row[name] is not None]
    return ", ".join(said) or "host"


def _stacked(labels: Sequence[str], table: pl.DataFrame, title: str, x: str) -> go.Figure:
    """Bars of the parts of a duration: `dur_ns`, of it `idle_ns` and `communication_exposed_ns`, null where unknown."""
    figure = go.Figure()
    idle, exposed = (pl.col(name).fill_null(0.0) for name in ("idle_ns", "communication_exposed_ns"))
    parts = table.select(pl.col("dur_ns") - idle - exposed, exposed.alias("exposed"), idle.alias("idle"))
    for i, (name, column) in enumerate(zip(PARTS, parts.iter_columns(), strict=True)):
        values = column.to_list()
        figure.add_bar(
            x=list(labels),
            y=values,
            name=name,
            marker={
                "color": "rgba(128,128,128,0.3)" if name == "idle" else PALETTE[i],
                "pattern": {"shape": "/" if i == 1 else ""},
            },
            hovertext=[f"{literal(label)}<br>{name} {text.ns(ns)}" for label, ns in zip(labels, values, strict=True)],
            hoverinfo="text",
        )
    layout(figure, title, x, "")
    figure.update_xaxes(type="category")
    time_ticks(figure.layout.yaxis, float(table["dur_ns"].max() or 1.0))  # type: ignore[arg-type]
    return figure.update_layout(barmode="stack", height=400, margin={"l": 80})


def pass_figures(found: Passes) -> list[tuple[go.Figure, str]]:
    """What each of the first passes of a trace consists of, with words for it."""
    rows = found.passes.head(MAX_BARS)
    labels = [
        f"{row['pass']}" + (f" on {_place(row)}" if found.how != "host" else "") for row in rows.iter_rows(named=True)
    ]
    n = found.passes.height
    title = "MoE layer passes" if n <= MAX_BARS else f"First {MAX_BARS} of {text.count(n)} MoE layer passes"
    return [(_stacked(labels, rows, title, "pass"), f"{title}: computing, exposed communication, idle")]


def rank_figures(found: LayerRanks, step: int | None = None) -> list[tuple[go.Figure, str]]:
    """The median pass of each member of a run, slowest first, and who waits for whom in a step (null: the one with most
    waiting), with words for each."""
    known = found.members.filter(pl.col("dur_ns").is_not_null()).sort("dur_ns", descending=True, maintain_order=True)
    rows = known.head(MAX_BARS).with_columns(idle_ns=pl.col("dur_ns") * pl.col("idle_frac"))
    drawn = []
    if rows.height:
        labels = [_place(row) for row in rows.iter_rows(named=True)]
        drawn.append(
            (_stacked(labels, rows, "Median pass, slowest first", ""), "The median pass of each rank or device")
        )
    if found.waits.is_empty():
        return drawn
    worst = found.late.sort("wait_ns", descending=True, maintain_order=True)["step"][0] if step is None else step
    waits = found.waits.filter(pl.col("step").eq_missing(worst))
    waits = waits.sort("caused_ns", "wait_ns", descending=[True, False], maintain_order=True).head(MAX_BARS)
    figure = go.Figure()
    labels = [_place(row) for row in waits.iter_rows(named=True)]
    for i, (name, key) in enumerate((("waits for others", "wait_ns"), ("others wait for it", "caused_ns"))):
        figure.add_bar(
            x=labels,
            y=waits[key].to_list(),
            name=name,
            marker={"color": PALETTE[i], "pattern": {"shape": "/" if i else ""}},
            hovertext=[f"{label}<br>{name} {text.ns(ns)}" for label, ns in zip(labels, waits[key], strict=True)],
            hoverinfo="text",
        )
    when = "the trace" if worst is None else f"step {worst}"
    layout(figure, f"Who waits for whom in {when}", "", "")
    time_ticks(figure.layout.yaxis, max(*waits["wait_ns"], *waits["caused_ns"], 1.0))
    figure.update_layout(barmode="group", height=400, margin={"l": 80})
    return [*drawn, (figure, f"Who waits for whom in {when}")]


def scaling_figures(rows: Sequence[Mapping[str, Any]]) -> list[tuple[go.Figure, str]]:
    """Overlap efficiency of runs on more and more GPUs, with words for it."""
    figure = go.Figure(
        go.Scatter(
            x=[str(row["n_gpus"]) for row in rows],
            y=[row["overlap_efficiency_frac"] for row in rows],
            mode="lines+markers",
            line={"color": PALETTE[0]},
            text=[f"{row['n_gpus']} GPUs, {text.ns(row['latency_ns'])}" for row in rows],
            hoverinfo="text+y",
        )
    )
    figure.add_hline(y=1, line=GUIDE)
    layout(figure, "Overlap efficiency against the fewest GPUs", "GPUs", "O_e")
    figure.update_xaxes(type="category")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return [(figure.update_layout(showlegend=False), "Overlap efficiency of runs on more and more GPUs")]

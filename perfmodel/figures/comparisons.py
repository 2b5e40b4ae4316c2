"""Several traces, ranks, chain lengths or passes side by side."""

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import polars as pl

from perfmodel import text
from perfmodel.bound import PLATEAU_FLOOR_NS, Sweep
from perfmodel.diff import TraceDiff
from perfmodel.intervals import DEVICE
from perfmodel.passes import Passes
from perfmodel.ranks import RankSummary, straggler
from perfmodel.report.traces import place

from .drawing import PALETTE, TIME_DECADES_NS, decades, layout, literal, time_ticks
from .traces import IDLE, Figures, stacked

MOST_CHANGES = 12
MOST_RANKS = 64
MOST_PASSES = 32


def sweep(found: Sweep, name: str = "") -> go.Figure:
    """TKLQT of each batch size, the plateau's limit, and from which batch size on the device is the bound."""
    figure = go.Figure()
    looks = {"host-bound": (PALETTE[0], "circle"), "device-bound": (PALETTE[1], "square")}
    batches, times = found.table["batch"].to_list(), found.table["tklqt_ns"].to_list()
    figure.add_scatter(
        x=batches, y=times, mode="lines", line={"color": "#999999", "width": 1}, showlegend=False, hoverinfo="skip"
    )
    for label, (colour, symbol) in looks.items():
        own = found.table.filter(pl.col("label") == label)
        figure.add_scatter(
            x=own["batch"],
            y=own["tklqt_ns"],
            mode="markers",
            name=label,
            marker={"color": colour, "symbol": symbol, "size": 10},
            hovertext=[
                f"batch {b:,}: TKLQT {text.ns(t)}, {label}" for b, t in own.select("batch", "tklqt_ns").iter_rows()
            ],
            hoverinfo="text",
        )
    limit_ns = found.rule_factor * max(found.plateau_ns, PLATEAU_FLOOR_NS)
    figure.add_hline(y=limit_ns, line={"color": "#999999", "dash": "dash", "width": 1})
    if found.transition_batch is not None:
        figure.add_vline(x=found.transition_batch, line={"color": PALETTE[1], "dash": "dot", "width": 2})
    where = "no batch size is device-bound"
    if found.transition_batch is not None:
        where = f"device-bound from batch {text.count(found.transition_batch)} on"
    title = f"{literal(name)}: {where}" if name else f"TKLQT against batch size: {where}"
    layout(figure, title, "batch size", "TKLQT")
    figure.update_xaxes(type="log", tickvals=batches, ticktext=[text.count(batch) for batch in batches])
    words, at = f"limit of the rule: {text.ns(limit_ns)}", limit_ns
    if min(times) > 0:
        decades(figure.layout.yaxis, TIME_DECADES_NS)
        at = math.log10(limit_ns)  # where words stand on such an axis; lines are at the value itself
    else:  # a logarithm has no place for the 0 that published plots are read as
        time_ticks(figure.layout.yaxis, max(*times, limit_ns))
    place_of = {"xref": "x domain", "x": 0, "xanchor": "left", "y": at, "yanchor": "bottom"}
    figure.add_annotation(text=words, showarrow=False, **place_of)
    return figure.update_layout(height=400, margin={"l": 80, "b": 100})


def fusion(table: pl.DataFrame) -> go.Figure:
    """What fusing would save at best, by chain length, from `fusion.fusion_table`."""
    known = table.drop_nulls("ideal_speedup")
    figure = go.Figure(
        go.Scatter(
            x=known["length"],
            y=known["ideal_speedup"],
            mode="lines+markers",
            line={"color": PALETTE[0]},
            marker={"size": 9},
            hovertext=[
                f"chains of {row['length']}: {text.count(row['n_fused'])} fused, "
                f"{text.count(row['n_launches'])} of {text.count(row['n_kernels'])} launches left"
                f"<br>ideal speed-up {row['ideal_speedup']:.3f}x"
                for row in known.iter_rows(named=True)
            ],
            hoverinfo="text",
        )
    )
    layout(
        figure,
        "Ideal speed-up of fusing chains of kernels, where the host is the bound",
        "kernels in a chain",
        "ideal speed-up",
    )
    figure.update_xaxes(type="log", tickvals=known["length"].to_list(), ticktext=[str(n) for n in known["length"]])
    top = max(known["ideal_speedup"].to_list(), default=1.0)
    figure.update_yaxes(range=[0.95, max(top * 1.05, 1.2)], ticksuffix="x")
    return figure.update_layout(height=340, margin={"b": 60})


def changes(table: pl.DataFrame, key: str, title: str) -> go.Figure:
    """What takes longer and what less in the second of two traces: the greatest changes, from `diff.TraceDiff`."""
    most = table.filter(pl.col("change_ns") != 0).head(MOST_CHANGES)
    values = most["change_ns"].to_list()
    figure = go.Figure(
        go.Bar(
            y=list(range(most.height)),
            x=values,
            orientation="h",
            marker={
                "color": [PALETTE[1] if value > 0 else PALETTE[0] for value in values],
                "pattern": {
                    "shape": ["/" if value > 0 else "" for value in values],
                    "fillmode": "overlay",
                    "fgcolor": "white",
                },
            },
            text=[f"{'+' if value > 0 else ''}{text.ns(value)}" for value in values],
            textposition="outside",
            cliponaxis=False,
            hovertext=[literal(name) for name in most[key]],
            hoverinfo="text",
        )
    )
    layout(figure, title, "", "")
    low, high = min([*values, 0]), max([*values, 0])
    room = 0.25 * max(high - low, 1)  # for the words beside the longest
    ends = [low - room if low else 0, high + room if high else 0]
    figure.update_xaxes(showticklabels=False, showgrid=False, range=ends, zeroline=True)
    figure.update_yaxes(
        tickvals=list(range(most.height)),
        ticktext=[literal(text.shortened(str(name).removeprefix("void "), 44)) for name in most[key]],
        autorange="reversed",
        automargin=True,
    )
    return figure.update_layout(height=110 + 26 * max(most.height, 2), showlegend=False, margin={"b": 20})


def ranks(table: pl.DataFrame) -> go.Figure:
    """Kernel time of computation and of communication on each rank, the rank that the others wait for named."""
    slow = straggler(table)
    title = "Kernel time of each rank"
    if slow is not None:
        title += f": rank {slow.rank} computes longest, {text.frac(slow.excess_frac)} above the median"
    shown = table
    if table.height > MOST_RANKS:
        title += f" ({MOST_RANKS} that compute longest of {text.count(table.height)})"
        shown = table.sort("compute_time_ns", descending=True).head(MOST_RANKS).sort("rank")
    names = [f"rank {rank}" + (" (longest)" if slow and rank == slow.rank else "") for rank in shown["rank"]]
    series = {
        "computation": shown["compute_time_ns"].to_list(),
        "communication, with waiting in it": shown["communication_time_ns"].to_list(),
    }
    figure = stacked(names, series, (PALETTE[0], PALETTE[4]), title, "kernel time")
    if slow is not None:
        figure.add_vline(x=slow.median_compute_time_ns, line={"color": "#999999", "dash": "dash", "width": 1})
    return figure.update_layout(height=200 + 24 * max(shown.height, 2))


def waits(by_step: pl.DataFrame) -> go.Figure:
    """How long each rank or device waited for others in collectives, and others for it, from `waits.waits_of_steps`."""
    both = by_step.group_by(DEVICE).agg(pl.sum("wait_ns", "caused_ns")).sort(DEVICE).head(MOST_RANKS)
    names = [
        place(("rank", "device") if row["device"] is not None else ("rank",), row) for row in both.iter_rows(named=True)
    ]
    series = {"waits for others": both["wait_ns"].to_list(), "others wait for it": both["caused_ns"].to_list()}
    figure = stacked(
        names, series, (PALETTE[4], PALETTE[1]), "Who waits for whom in collectives", "time in collectives"
    )
    top = max([*series["waits for others"], *series["others wait for it"], 1])
    time_ticks(figure.layout.xaxis, top)
    return figure.update_layout(barmode="group", height=200 + 44 * max(both.height, 2))


def pass_parts(found: Passes) -> go.Figure:
    """What the passes of MoE layers are made of: parts of the layer on a host, kernel classes on devices."""
    on_host = found.how == "host"
    key, table = (
        ("name", found.phases) if on_host else ("class", found.classes.with_columns(pl.col("class").cast(pl.String)))
    )
    order = found.passes.select("pass", "name", "step", "rank").unique("pass", maintain_order=True)
    shown = order.head(MOST_PASSES)
    sums = table.group_by("pass", key).agg(pl.sum("time_ns"))
    parts = sums.group_by(key).agg(pl.sum("time_ns")).sort("time_ns", descending=True)[key].to_list()
    kept, rest = parts[: len(PALETTE) - 1], parts[len(PALETTE) - 1 :]
    spaces = {str(part).partition("::")[0] for part in parts}  # one that all share says nothing in a legend
    prefix = f"{spaces.pop()}::" if len(spaces) == 1 else ""
    series: dict[str, Sequence[float]] = {}
    for part in kept:
        of_pass: Mapping[int, int] = dict(sums.filter(pl.col(key) == part).select("pass", "time_ns").iter_rows())
        series[part.removeprefix(prefix) if on_host else part.replace("_", " ")] = [
            of_pass.get(n, 0) for n in shown["pass"]
        ]
    if rest:
        others = sums.filter(pl.col(key).is_in(rest)).group_by("pass").agg(pl.sum("time_ns"))
        of_pass = dict(others.iter_rows())
        series["all others"] = [of_pass.get(n, 0) for n in shown["pass"]]
    several = shown["rank"].n_unique() > 1
    names = [
        f"pass {row['pass']}" + (f" (rank {row['rank']})" if several else "") for row in shown.iter_rows(named=True)
    ]
    title = "MoE layer passes by " + ("part" if on_host else "kernel class")
    if order.height > shown.height:
        title += f": the first {MOST_PASSES} of {text.count(order.height)}"
    colours = [*PALETTE[: len(kept)], IDLE][: len(series)]
    return stacked(names, series, colours, title, "time of the host" if on_host else "kernel time").update_layout(
        height=270 + 20 * max(shown.height, 3), margin={"b": 150}
    )


def sweep_figures(found: Mapping[str, Sweep]) -> Figures:
    """The figures of a report on sweeps over batch sizes, by name."""
    return [(sweep(one, name), "TKLQT against batch size, with the transition marked.") for name, one in found.items()]


def fusion_figures(by_length: pl.DataFrame) -> Figures:
    """The figure of a report on chains of kernels."""
    return [(fusion(by_length), "Ideal speed-up by chain length; it assumes that all launches cost the same.")]


def diff_figures(found: TraceDiff) -> Figures:
    """The figures of a report on two traces: what changed by kernel class and by operator."""
    unit = "per step" if found.per_step else "in all"
    drawn = []
    if not found.classes.is_empty():
        drawn.append((changes(found.classes, "class", f"Kernel classes: b minus a, {unit}"), "Change by kernel class."))
    time = "host time" if found.classes.is_empty() else "kernel time"
    figure = changes(found.operators, "name", f"Operators, {time}: b minus a, {unit}")
    return [*drawn, (figure, "Change by operator; hatched: b takes longer.")]


def ranks_figures(found: RankSummary) -> Figures:
    """The figure of a report on a folder of ranks, where any rank has kernels."""
    if not found.ranks["n_kernels"].sum():
        return []
    return [(ranks(found.ranks), "Kernel time of each rank; dashed: the median of computation.")]

"""What every thread and stream of a trace did in a window, with the delays between launches and kernels."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
import polars as pl

from perfmodel import text
from perfmodel.timeline import Timeline

from .drawing import PALETTE, layout, literal, short, time_ticks

ROW_PIXELS = 22
LEAST_LABEL_FRAC = 0.03  # of the window; on shorter bars no name could be read

# Colour and pattern of what bars show, in the order of the legend: the host's, then kernels by class, then the others.
LOOKS = {
    "range": ("#B4BFCC", ""),
    "operator": ("#8494A8", ""),
    "communication of the host": (PALETTE[1], "x"),
    "launch call": (PALETTE[4], "\\"),
    "call that waits": (PALETTE[1], "\\"),
    "grouped_gemm": (PALETTE[0], ""),
    "gemm": (PALETTE[5], ""),
    "attention": (PALETTE[2], ""),
    "moe_dispatch": (PALETTE[4], ""),
    "moe_all_to_all": (PALETTE[1], ""),
    "collective": (PALETTE[1], "/"),
    "elementwise": (PALETTE[7], ""),
    "reduction": (PALETTE[7], "/"),
    "copy": (PALETTE[3], "/"),
    "other": ("#999999", ""),
    "copy or set": (PALETTE[3], ""),
    "graph replay": (PALETTE[0], "x"),
}
_DARK = PALETTE[:3]


def lines_and_bars(drawn: Timeline, title: str) -> go.Figure:
    """A line for each thread and stream, a bar for each event or for several short ones, thin lines from some launch
    calls to the kernels that they started."""
    figure = go.Figure()
    for what, (colour, pattern) in LOOKS.items():
        bars = drawn.bars.filter(pl.col("what") == what)
        if bars.height:
            figure.add_trace(_bars(bars, drawn, what, colour, pattern))
    _add_delays(figure, drawn)
    length_ns = drawn.end_ns - drawn.start_ns
    layout(figure, literal(short(title, 100)), "time since the window began", "")
    time_ticks(figure.layout.xaxis, length_ns, 10)
    figure.update_xaxes(range=[0, length_ns], showgrid=True)
    several = drawn.lines["rank"].n_unique() > 1
    figure.update_yaxes(
        tickvals=list(range(drawn.lines.height)),
        ticktext=[_label(line, several) for line in drawn.lines.iter_rows(named=True)],
        range=[drawn.lines.height - 0.5, -0.5],
        automargin=True,
        showgrid=False,
        zeroline=False,
    )
    return figure.update_layout(
        barmode="overlay",
        height=200 + ROW_PIXELS * max(drawn.lines.height, 3),
        margin={"b": 110},
        uniformtext={"mode": "hide", "minsize": 9},
        hoverlabel={"align": "left"},
    )


def _bars(bars: pl.DataFrame, drawn: Timeline, what: str, colour: str, pattern: str) -> go.Bar:
    least_ns = LEAST_LABEL_FRAC * (drawn.end_ns - drawn.start_ns)
    rows = bars.to_dicts()
    return go.Bar(
        y=bars["row"],
        base=(bars["start_ns"] - drawn.start_ns),
        x=(bars["end_ns"] - bars["start_ns"]),
        orientation="h",
        width=0.82,
        name=what.replace("_", " "),
        marker={
            "color": colour,
            "pattern": {"shape": pattern, "fillmode": "overlay", "size": 6, "solidity": 0.25, "fgcolor": "white"},
            "line": {"width": 0},
            "opacity": [1.0 if row["n_events"] == 1 else 0.6 for row in rows],
        },
        text=[_name(row, 40) if row["end_ns"] - row["start_ns"] >= least_ns else "" for row in rows],
        textposition="inside",
        insidetextanchor="start",
        insidetextfont={"color": "white" if colour in _DARK else "#1A1A1A"},  # on the bar, whatever the theme
        textangle=0,
        hovertext=[_hover(row, drawn.start_ns) for row in rows],
        hoverinfo="text",
    )


def _add_delays(figure: go.Figure, drawn: Timeline) -> None:
    """Thin lines from the start of a launch call to the start of its kernel."""
    x: list[float | None] = []
    y: list[float | None] = []
    words: list[str] = []
    for one in drawn.delays.iter_rows(named=True):
        x += [one["from_ns"] - drawn.start_ns, one["to_ns"] - drawn.start_ns, None]
        y += [one["from_row"], one["to_row"], None]
        words += [f"launch delay {text.ns(one['delay_ns'])}<br>{literal(short(one['name'], 90))}"] * 2 + [""]
    if x:
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines+markers",
            name="launch delay, some of the longest",
            line={"color": PALETTE[1], "width": 1},
            marker={"symbol": "arrow", "angleref": "previous", "size": 8, "color": PALETTE[1]},
            hovertext=words,
            hoverinfo="text",
        )


def _label(line: Mapping[str, Any], several_ranks: bool) -> str:
    """What a line is, in words beside it; nothing for ranges within others, whose line is right above."""
    number = "unknown" if line["line"] is None else line["line"]
    if line["lane"]:
        return ""
    if line["family"] == "calls":
        return "its launches and waits"
    rank = f"rank {line['rank']} " if several_ranks and line["rank"] is not None else ""
    return f"{rank}thread {number}" if line["family"] == "host" else f"{rank}device {line['owner']} stream {number}"


def _name(row: Mapping[str, Any], limit: int) -> str:
    name = f"{text.count(row['n_events'])} events" if row["name"] is None else str(row["name"]).removeprefix("void ")
    return literal(short(name, limit))


def _hover(row: Mapping[str, Any], start_ns: int) -> str:
    length = text.ns(row["end_ns"] - row["start_ns"])
    since = text.ns(row["start_ns"] - start_ns)
    if row["name"] is None:
        words = f"{text.count(row['n_events'])} short events, most time in {row['what'].replace('_', ' ')}"
        return f"{words}<br>busy {text.ns(row['busy_ns'])} of {length}, from {since}"
    return f"{_name(row, 110)}<br>{row['what'].replace('_', ' ')}, {length} from {since}"

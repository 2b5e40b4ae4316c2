"""What all figures share: colours, escaping of names, axes whose ticks are words, the place of the legend."""

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from perfmodel import text

# Okabe-Ito, readable without colour vision; order of use.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#F0E442")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot")
GUIDE = {"color": "grey", "dash": "dash", "width": 1}  # a line that data is held against
MAX_POINTS = 5000  # drawn in one figure: browsers take seconds for more


def _round(words: str) -> str:
    """A round number with its unit, without the zeros that would tell how exact it is."""
    number, unit = words.split(" ", 1)
    return f"{float(number.replace(',', '')):,g} {unit}"


TIME_DECADES_NS = tuple(
    (size * ns, f"{size} {unit}")
    for unit, ns in (("ns", 1), ("µs", 1e3), ("ms", 1e6), ("s", 1e9))
    for size in (1, 10, 100)
)
RATE_DECADES = tuple((10.0**e, _round(text.flops_per_s(10.0**e))) for e in range(6, 17))


def literal(words: object) -> str:
    """A string from a file, to be shown letter by letter: kernel names hold <, > and &, which Plotly interprets."""
    return html.escape(str(words), quote=False)


def layout(figure: go.Figure, title: str, x: str, y: str) -> go.Figure:
    """Title, axes and legend as all our figures have them; returns the figure."""
    return figure.update_layout(
        title={"text": title, "font": {"size": 15}},
        xaxis_title=x,
        yaxis_title=y,
        colorway=list(PALETTE),
        margin={"l": 60, "r": 20, "t": 48, "b": 120},
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0.01, "x": 0},
        height=440,
    )


def decades(axis: Any, ticks: Sequence[tuple[float, str]]) -> None:
    """Make an axis logarithmic, with ticks in words (TIME_DECADES_NS, RATE_DECADES)."""
    axis.update(type="log", tickvals=[value for value, _ in ticks], ticktext=[word for _, word in ticks])


def diagonal(figure: go.Figure, ends: Sequence[float], name: str | None = None) -> None:
    """The line on which both axes say the same, from end to end; in the legend where it has a name."""
    figure.add_scatter(
        x=ends, y=ends, mode="lines", line=GUIDE, name=name, showlegend=name is not None, hoverinfo="skip"
    )


def translucent(colour: str) -> str:
    """A colour of the palette as a ribbon or an area behind lines has it."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def short(name: str, limit: int = 48) -> str:
    """A name cut to what fits beside an axis."""
    return name if len(name) <= limit else name[: limit - 1] + "…"


def time_ticks(axis: Any, top_ns: float, n: int = 6) -> None:
    """Ticks of a linear axis of times from 0 to `top_ns` at round times, in words; about `n` of them."""
    step = next(round(10.0**p * m, 6) for p in range(-3, 20) for m in (1, 2, 5) if 10.0**p * m >= top_ns / n)
    values = [step * i for i in range(int(top_ns / step) + 1)]
    axis.update(tickvals=values, ticktext=[_round(text.ns(value)) if value else "0" for value in values])


def inked(figure: go.Figure, ink: str) -> go.Figure:
    """A copy of a figure whose words along axes and on its area have the colour `ink`."""
    words = {"tickfont": {"color": ink}, "title": {"font": {"color": ink}}}
    found = go.Figure(figure).update_layout(font={"color": ink})
    return found.update_xaxes(words).update_yaxes(words)

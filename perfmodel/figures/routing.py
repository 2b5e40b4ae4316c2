"""How routing spreads over layers and experts."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from perfmodel import text
from perfmodel.routing import Shares, coverage_curve, covering_fracs, served_curves

from .drawing import MAX_POINTS, PALETTE, diagonal, layout, translucent

if TYPE_CHECKING:
    from perfmodel.routing import RoutingSummary

MOST_ROWS = 100  # layers drawn by themselves: more are joined
COVERED = 0.9  # of assignments, whose experts are counted
SHOWN_UP_TO = 0.99  # quantile of loads at which the colours end: a few experts would leave one colour to the others


def routing_map(shares: Shares, layers: Sequence[int], is_ranked: bool = True) -> go.Figure:
    """How often each expert of each layer is used, in multiples of an even share, `shares[layer, expert]`: experts by
    rank (the most used first) or by id. Neighbours share a cell, which has their mean, where there are too many."""
    n_layers, n_experts = shares.shape
    even = shares / shares.mean(axis=1, keepdims=True)
    ranked = -np.sort(-even, axis=1) if is_ranked else even
    n_rows = min(n_layers, MOST_ROWS)
    n_columns = min(n_experts, MAX_POINTS // n_rows)
    rows, columns = (_edges(n, n_of) for n, n_of in ((n_layers, n_rows), (n_experts, n_columns)))
    cells = _joined(_joined(ranked, rows, 0), columns, 1)
    row_names = [_range(layers[a], layers[b - 1]) for a, b in itertools.pairwise(rows)]
    first = 1 if is_ranked else 0  # ranks count from 1, ids from 0
    column_names = [_range(a + first, b - 1 + first) for a, b in itertools.pairwise(columns)]
    what = "rank" if is_ranked else "expert"
    figure = go.Figure(
        go.Heatmap(
            z=cells.astype(np.float32),
            x=np.arange(n_columns),
            y=np.arange(n_rows),
            zmin=0,
            zmax=max(float(np.quantile(cells, SHOWN_UP_TO)), 1.0),
            colorscale="Cividis",
            colorbar={"title": {"text": "x even share", "side": "right"}, "thickness": 12},
            text=[[f"layer {row}, {what} {column}" for column in column_names] for row in row_names],
            hovertemplate="%{text}: %{z:.2f} times the even share<extra></extra>",
        )
    )
    joined = -(-n_experts // n_columns)
    more = f", means of up to {joined}" if joined > 1 else ""
    layout(
        figure,
        "How often each expert is used",
        f"experts by {'rank, most used first' if is_ranked else 'id'}{more}",
        "",
    )
    for axis, names, most in ((figure.layout.xaxis, column_names, 12), (figure.layout.yaxis, row_names, 12)):
        at = range(0, len(names), max(1, -(-len(names) // most)))
        axis.update(
            tickvals=list(at), ticktext=[names[i].partition("-")[0] for i in at], showgrid=False, zeroline=False
        )
    figure.update_yaxes(autorange="reversed")
    return figure.update_layout(height=min(160 + 16 * n_rows, 440) if n_rows > 2 else 220, margin={"b": 60})


def _edges(n: int, n_parts: int) -> list[int]:
    return [int(edge) for edge in np.linspace(0, n, n_parts + 1).round()]


def _joined(values: Shares, edges: list[int], axis: int) -> Shares:
    """Means of neighbours along an axis, between edges."""
    sums: Shares = np.add.reduceat(values, edges[:-1], axis=axis)
    sizes = np.diff(edges)
    return sums / (sizes[:, None] if axis == 0 else sizes)


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def coverage(shares: Shares) -> go.Figure:
    """The Lorenz-like curve of routing, `shares[layer, expert]`: the part of assignments that the hottest experts of a
    layer serve, mean over layers and the range of layers; how many serve 90 % is marked."""
    experts, served = coverage_curve(shares)
    each = served_curves(shares)
    figure = go.Figure()
    if len(each) > 1:
        figure.add_scatter(
            x=[*experts, *experts[::-1]],
            y=[*each.max(axis=0), *each.min(axis=0)[::-1]],
            fill="toself",
            fillcolor=translucent(PALETTE[0]),
            line={"width": 0},
            hoverinfo="skip",
            name="range of layers",
        )
    figure.add_scatter(
        x=list(experts),
        y=list(served),
        mode="lines",
        line={"color": PALETTE[0], "width": 3},
        name="mean of layers",
        hovertemplate="%{x:.0%} of experts serve %{y:.1%}<extra></extra>",
    )
    diagonal(figure, [0, 1], "even")
    at = float(covering_fracs(shares, COVERED).mean())
    figure.add_annotation(
        x=at,
        y=COVERED,
        text=f"{COVERED:.0%} of assignments<br>on {text.frac(at)} of experts",
        showarrow=True,
        arrowhead=2,
        arrowcolor="#888888",
        axref="x",
        ayref="y",
        ax=0.98,
        ay=0.3,
        xanchor="right",
    )
    layout(figure, "How concentrated routing is", "hottest experts of a layer", "share of assignments")
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    return figure.update_layout(height=400, margin={"b": 110})


def routing_figures(summary: "RoutingSummary") -> list[tuple[Any, str]]:
    """The figures of a recording with what each shows: use by layer and expert, and concentration."""
    recording = summary.recording
    shares, layers = recording.shares, recording.layers.tolist()
    return [
        (routing_map(shares, layers), "How often each expert of each layer is used, by rank"),
        (routing_map(shares, layers, is_ranked=False), "How often each expert of each layer is used, by id"),
        (coverage(shares), "The share of assignments that the hottest experts serve"),
    ]

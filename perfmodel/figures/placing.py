"""What it costs to move experts off the device, and how routing spreads over them."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from perfmodel import text
from perfmodel.physics import PARTS
from perfmodel.predict import Prediction

from .drawing import PALETTE, SYMBOLS, layout, literal, time_ticks, translucent

LINEAR_UP_TO = 15  # slowdowns above this make a linear axis hide the small ones


def slowdown(curves: Mapping[str, Sequence[Prediction]]) -> go.Figure:
    """Slowdown against offloaded fraction, one line a label, with the interval as a ribbon where there is one."""
    figure = go.Figure()
    for i, (label, predictions) in enumerate(curves.items()):
        colour = PALETTE[i % len(PALETTE)]
        x = [p.n_offloaded / p.n_experts for p in predictions]
        if all(p.interval for p in predictions):
            bounds = [[p.interval[side] / p.baseline_latency_ns for p in predictions if p.interval] for side in (0, 1)]
            figure.add_scatter(
                x=[*x, *x[::-1]],
                y=[*bounds[1], *bounds[0][::-1]],
                fill="toself",
                fillcolor=translucent(colour),
                line={"width": 0},
                showlegend=False,
                hoverinfo="skip",
            )
        figure.add_scatter(
            x=x,
            y=[p.slowdown for p in predictions],
            mode="lines+markers",
            name=literal(label),
            line={"color": colour},
            marker={"size": 5, "symbol": SYMBOLS[i % len(SYMBOLS)]},
            text=[f"{p.slowdown:.2f}x, {text.ns(p.latency_ns)}, {p.bottleneck}-bound" for p in predictions],
            hoverinfo="text+name",
        )
    figure.add_hline(y=1, line={"color": "grey", "dash": "dash", "width": 1})
    layout(figure, "Slowdown against offloaded fraction", "experts offloaded, least used first", "slowdown")
    figure.update_xaxes(tickformat=".0%", range=[-0.02, 1.02])
    highest = max(p.slowdown for predictions in curves.values() for p in predictions)
    if highest > LINEAR_UP_TO:
        ticks = [
            step * 10**power for power in range(-1, 5) for step in (1, 2, 5) if 0.4 < step * 10**power < highest * 2
        ]
        figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}x" for tick in ticks])
    else:
        figure.update_yaxes(ticksuffix="x", rangemode="tozero")
    return figure


def parts(predictions: Mapping[str, Prediction]) -> go.Figure:
    """What the time of each labelled prediction consists of, as stacked bars."""
    figure = go.Figure()
    for i, part in enumerate(PARTS):
        values = [p.parts.get(part, 0.0) for p in predictions.values()]
        if max(values) > 0:
            figure.add_bar(
                y=[literal(label) for label in predictions],
                x=values,
                name=part,
                orientation="h",
                marker={"color": PALETTE[i % len(PALETTE)]},
                text=[
                    text.ns(v) if v > 0.05 * p.latency_ns else ""
                    for v, p in zip(values, predictions.values(), strict=True)
                ],
                hovertext=[f"{part} {text.ns(v)}" for v in values],
                hoverinfo="text",
            )
    layout(figure, "What the time consists of", "latency per layer", "")
    top = max(p.latency_ns for p in predictions.values())
    time_ticks(figure.layout.xaxis, top)
    return figure.update_layout(barmode="stack", height=300)


def coverage(expert_frac: Sequence[float], token_frac: Sequence[float]) -> go.Figure:
    """The Lorenz-like curve of routing: share of assignments that the hottest fraction of experts serves."""
    figure = go.Figure(go.Scatter(x=list(expert_frac), y=list(token_frac), mode="lines", line={"color": PALETTE[0]}))
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": "grey", "dash": "dash", "width": 1}, hoverinfo="skip"
    )
    layout(figure, "How concentrated routing is", "hottest experts", "share of token assignments")
    figure.update_xaxes(tickformat=".0%")
    figure.update_yaxes(tickformat=".0%")
    return figure.update_layout(showlegend=False, height=320, margin={"b": 48})

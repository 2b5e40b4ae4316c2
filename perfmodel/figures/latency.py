"""Predictions beside measurements, and the roofline that both stand under."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from perfmodel import text
from perfmodel.hardware import HardwareProfile
from perfmodel.physics import ceilings
from perfmodel.roofline import tiers

from .drawing import DASHES, MAX_POINTS, PALETTE, RATE_DECADES, SYMBOLS, TIME_DECADES_NS, decades, layout, literal

BAND_FRAC = 0.10  # the parity plot's grey band


def parity(held_out: Mapping[str, Sequence[Any]], errors: Mapping[str, Any]) -> go.Figure:
    """Predicted against measured latency of held-out points, log-log, with y = x and a 10 % band; one colour a shape.

    `held_out` has columns shape, op, n_tokens, routing, measured_ns, predicted_ns; `errors` are the model's over all.
    """
    table = pl.DataFrame(dict(held_out)).head(MAX_POINTS)
    low, high = (f([*table["measured_ns"], *table["predicted_ns"]]) for f in (min, max))
    figure = go.Figure()
    line = [low * 0.8, high * 1.25]
    figure.add_scatter(
        x=[*line, *line[::-1]],
        y=[line[0] * (1 - BAND_FRAC), line[1] * (1 - BAND_FRAC), line[1] * (1 + BAND_FRAC), line[0] * (1 + BAND_FRAC)],
        fill="toself",
        fillcolor="rgba(128,128,128,0.25)",
        mode="none",
        hoverinfo="skip",
        name="within 10 %",
    )
    figure.add_scatter(
        x=line,
        y=line,
        mode="lines",
        line={"color": "grey", "dash": "dash", "width": 1},
        showlegend=False,
        hoverinfo="skip",
    )
    for i, ((shape,), rows) in enumerate(table.group_by("shape", maintain_order=True)):
        figure.add_scatter(
            x=rows["measured_ns"],
            y=rows["predicted_ns"],
            mode="markers",
            name=literal(shape),
            marker={
                "color": PALETTE[i % len(PALETTE)],
                "symbol": SYMBOLS[(i // 2) % len(SYMBOLS)],
                "size": 7,
                "opacity": 0.8,
            },
            text=[
                f"{literal(row['op'])}, {row['n_tokens']} tokens, {literal(row['routing'])}<br>measured "
                f"{text.ns(row['measured_ns'])}, predicted {text.ns(row['predicted_ns'])}"
                for row in rows.iter_rows(named=True)
            ],
            hoverinfo="text+name",
        )
    layout(
        figure,
        f"Predicted vs measured: median error {text.frac(errors['median_ape_frac'])}, "
        f"p90 {text.frac(errors['p90_ape_frac'])}",
        "measured latency",
        "predicted latency",
    )
    shown = [d for d in TIME_DECADES_NS if low / 10 < d[0] < high * 10]
    decades(figure.layout.xaxis, shown)
    decades(figure.layout.yaxis, shown)
    return figure


def roofline(profile: HardwareProfile, dtype: str, points: pl.DataFrame | None = None) -> go.Figure:
    """The roofline of a machine with one slanted ceiling per memory tier, and observations under it.

    `points` is the table of `roofline.points`, or None for the ceilings alone.
    """
    peak = ceilings(profile, dtype).flops_per_s
    figure = go.Figure()
    shown = tiers(profile, dtype)
    low, high = 0.1, max(tier.ridge_flops_per_byte for tier in shown) * 10
    for i, tier in enumerate(shown):
        ridge = tier.ridge_flops_per_byte
        figure.add_scatter(
            x=[low, ridge, high],
            y=[low * tier.bytes_per_s, peak, peak],
            mode="lines",
            line={"color": PALETTE[i], "dash": DASHES[i % len(DASHES)]},
            name=f"{tier.name} {text.bytes_per_s(tier.bytes_per_s)} ({tier.kind}), ridge {ridge:.0f} FLOP/B",
            hoverinfo="name",
        )
    if points is not None and not points.is_empty():
        sample = points.head(MAX_POINTS)
        figure.add_scatter(
            x=sample["flops_per_byte"],
            y=sample["achieved_flops_per_s"],
            mode="markers",
            name="measured",
            marker={"color": PALETTE[4], "size": 6, "opacity": 0.7, "line": {"width": 0.5, "color": "black"}},
            text=[
                f"{literal(r['shape'])}, {literal(r['op'])}, {r['n_tokens']} tokens, {literal(r['routing'])}<br>"
                f"{text.flops_per_s(r['achieved_flops_per_s'])}, {text.frac(r['roof_frac'])} of the {r['bound']} roof"
                for r in sample.iter_rows(named=True)
            ],
            hoverinfo="text",
        )
    layout(figure, "Roofline", "FLOP per byte", "compute rate")
    figure.update_xaxes(type="log", dtick=1)
    decades(figure.layout.yaxis, [d for d in RATE_DECADES if low * shown[-1].bytes_per_s / 10 < d[0] < peak * 10])
    return figure

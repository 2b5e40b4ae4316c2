"""Predictions beside measurements that they were not made from: how near, where not, and whether intervals hold."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from perfmodel import text
from perfmodel.evaluation import coverage_by_level, ratios_by_tokens

from .drawing import GUIDE, MAX_POINTS, PALETTE, SYMBOLS, TIME_DECADES_NS, decades, diagonal, layout, literal

BAND_FRAC = 0.10  # the grey band around what was measured
RATIOS = (0.1, 0.2, 0.33, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)


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
    diagonal(figure, line)
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
        f"Predicted vs measured: median error {text.frac(errors['median_ape_frac'])}",
        "measured latency",
        "predicted latency",
    )
    shown = [d for d in TIME_DECADES_NS if low / 10 < d[0] < high * 10]
    decades(figure.layout.xaxis, shown)
    decades(figure.layout.yaxis, shown)
    return figure


def residuals(held_out: Mapping[str, Sequence[Any]]) -> go.Figure:
    """Predicted over measured of each held-out point by the size of its batch, with the median of each size, the range
    of eight points in ten, and a 10 % band."""
    table = pl.DataFrame(dict(held_out))
    by_size = ratios_by_tokens(table)
    sample = table.head(MAX_POINTS).with_columns(ratio=pl.col("predicted_ns") / pl.col("measured_ns"))
    n_tokens, ratio = by_size["n_tokens"].to_list(), sample["ratio"].to_list()
    low, high = n_tokens[0], n_tokens[-1]
    figure = go.Figure()
    figure.add_hrect(y0=1 - BAND_FRAC, y1=1 + BAND_FRAC, fillcolor="rgba(128,128,128,0.25)", line_width=0)
    figure.add_hline(y=1, line=GUIDE)
    for i, ((op,), rows) in enumerate(sample.sort("op").group_by("op", maintain_order=True)):
        figure.add_scatter(
            x=rows["n_tokens"],
            y=rows["ratio"],
            mode="markers",
            name=literal(op),
            marker={"color": PALETTE[5 - 2 * (i % 3)], "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 5, "opacity": 0.55},
            text=[
                f"{literal(row['shape'])}, {row['n_tokens']:,} tokens, {literal(row['routing'])}<br>predicted "
                f"{row['ratio']:.2f}x of measured {text.ns(row['measured_ns'])}"
                for row in rows.iter_rows(named=True)
            ],
            hoverinfo="text+name",
        )
    median, below, above = (by_size[f"{name}_ratio"] for name in ("median", "p10", "p90"))
    figure.add_scatter(
        x=by_size["n_tokens"],
        y=median,
        mode="lines+markers",
        name="median, and eight points in ten",
        line={"color": PALETTE[1], "width": 2},
        marker={"size": 7},
        error_y={"type": "data", "symmetric": False, "array": above - median, "arrayminus": median - below},
        text=[
            f"{row['n_tokens']:,} tokens, {row['n']} points: median {row['median_ratio']:.2f}x, eight in ten "
            f"{row['p10_ratio']:.2f}x to {row['p90_ratio']:.2f}x"
            for row in by_size.iter_rows(named=True)
        ],
        hoverinfo="text",
    )
    layout(figure, "Predicted over measured, by batch size", "tokens in the batch", "predicted / measured")
    ticks = [2**i for i in range(0, 40, 2) if low / 2 < 2**i < high * 2]
    figure.update_xaxes(
        type="log",
        tickvals=ticks,
        ticktext=[text.count(tick) for tick in ticks],
        range=[math.log10(low / 1.5), math.log10(high * 1.5)],
    )
    ratios = [one for one in RATIOS if min(ratio) / 1.6 < one < max(ratio) * 1.6 or one == 1]
    figure.update_yaxes(type="log", tickvals=ratios, ticktext=[f"{one:g}x" for one in ratios])
    return figure


def held_coverage(coverage: pl.DataFrame) -> go.Figure:
    """Stated against achieved coverage of intervals on shapes that they were not made from (`coverage_by_level`): all
    shapes together, and each as a faint line."""
    figure = go.Figure()
    diagonal(figure, [0, 1], "as stated")
    achieved = pl.col("n_covered").sum() / pl.col("n").sum()
    for i, ((shape,), rows) in enumerate(coverage.group_by("shape", maintain_order=True)):
        own = rows.group_by("stated_frac", maintain_order=True).agg(achieved)
        figure.add_scatter(
            x=own["stated_frac"],
            y=own["n_covered"],
            mode="lines",
            line={"color": "rgba(128,128,128,0.35)", "width": 1},
            name="each shape",
            legendgroup="shapes",
            showlegend=i == 0,
            text=[f"{literal(shape)}: {text.frac(y)} of {rows['n'][0]} points" for y in own["n_covered"]],
            hoverinfo="text",
        )
    all_ = coverage.group_by("stated_frac", maintain_order=True).agg(achieved).sort("stated_frac")
    figure.add_scatter(
        x=all_["stated_frac"],
        y=all_["n_covered"],
        mode="lines+markers",
        line={"color": PALETTE[0], "width": 2},
        marker={"size": 8},
        name="all shapes",
        text=[f"stated {text.frac(x)}, achieved {text.frac(y)}" for x, y in all_.iter_rows()],
        hoverinfo="text",
    )
    layout(figure, "Do intervals hold on shapes they were not made from?", "stated coverage", "achieved coverage")
    figure.update_xaxes(tickformat=".0%", range=[0.45, 1.0])
    return figure.update_yaxes(tickformat=".0%", rangemode="tozero", range=[0, 1.03])


def accuracy_figures(held_out: pl.DataFrame, errors: Mapping[str, Any]) -> list[tuple[go.Figure, str]]:
    """What a report and the dashboard show of a model's held-out points: figures, each with what it shows in words."""
    found = [
        (parity(held_out.to_dict(as_series=False), errors), "Predicted against measured latency of held-out points"),
        (residuals(held_out.to_dict(as_series=False)), "Predicted over measured latency by tokens in the batch"),
    ]
    coverage = coverage_by_level(held_out)
    if coverage.height:
        found.append((held_coverage(coverage), "Stated against achieved coverage of intervals"))
    return found

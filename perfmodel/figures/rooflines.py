"""The roofline of a machine, with what was measured under it."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from perfmodel import text
from perfmodel.roofline import LOST_TO, Roof, Roofline, Tier

from .drawing import MAX_POINTS, PALETTE, RATE_DECADES, SYMBOLS, decades, layout, literal, short

MOST_AREA_PX = 26  # diameter of the point that took most of the time
TIER_COLOURS = {
    "device memory": PALETTE[0],
    "host link, copy": PALETTE[1],
    "host link, read in place": PALETTE[4],
    "host memory": PALETTE[2],
}
POINT_COLOURS = (PALETTE[5], PALETTE[3], PALETTE[2], PALETTE[4])
LABEL = 11  # size of words on lines
CLOSE = 1.6  # tiers whose speeds differ by less run close together
PLOT_PX = (980, 380)  # of the axes on a page of 1280 x 800, for words along slanted lines
MAX_LINES = 4  # routings of one shape that are joined

Limits = tuple[float, float, float, float]  # of both axes: FLOP per byte, then FLOP/s


def roofline_figures(found: Roofline, shape: str | None = None) -> list[tuple[go.Figure, str]]:
    """What a report and the dashboard show of a roofline: figures, each with what it shows in words."""
    words = f"Roofline of {found.title}, {found.dtype}, with {text.counted(found.points.height, 'point')}"
    return [(roofline(found, shape), words)]


def roofline(found: Roofline, shape: str | None = None) -> go.Figure:
    """One slanted ceiling per memory tier, solid as reached and dashed as the datasheet has it, ridge points, and the
    points: area is the share of the time of all, colour and symbol the operation; `customdata` is the row in the table.

    Of `shape` points of growing batches are joined, one line for each routing, and the others fade.
    """
    figure = go.Figure()
    limits = _limits(found)
    low, high, floor, top = limits
    _ceilings(figure, found.reached, low, high, "solid")
    if found.nominal is not None:
        same = {(tier.name, tier.bytes_per_s) for tier in found.reached.tiers}
        kept = tuple(tier for tier in found.nominal.tiers if (tier.name, tier.bytes_per_s) not in same)
        _ceilings(figure, Roof(found.nominal.flops_per_s, found.nominal.kind, kept), low, high, "dash")
        for words, dash in (("as reached", "solid"), ("nominal, from the datasheet", "dash")):
            figure.add_scatter(x=[None], y=[None], mode="lines", line={"color": "grey", "dash": dash}, name=words)
    _labels(figure, found, limits)
    sample = found.points.with_row_index("row").sort("lost_ns", descending=True, nulls_last=True).head(MAX_POINTS)
    is_chosen = pl.lit(True) if shape is None else pl.col("shape") == shape
    for i, ((op,), rows) in enumerate(sample.sort("op").group_by("op", maintain_order=True)):
        most_frac = max(sample["time_frac"])
        _points(figure, rows.filter(~is_chosen), str(op), i, most_frac, is_context=True)
        _points(figure, rows.filter(is_chosen), str(op), i, most_frac)
    if shape is not None:
        _trajectories(figure, found.points.filter(pl.col("shape") == shape))
    layout(figure, "Roofline", "FLOP per byte moved over the tier that binds", "compute rate")
    figure.update_xaxes(range=[math.log10(low), math.log10(high)])
    decades(figure.layout.xaxis, _intensity_ticks(low, high))
    decades(figure.layout.yaxis, [d for d in RATE_DECADES if floor < d[0] < top])
    figure.update_yaxes(range=[math.log10(floor), math.log10(top)])
    return figure.update_layout(
        title={"text": literal(f"{found.title}, {found.dtype}")},
        height=520,
        margin={"t": 40, "b": 90, "l": 70},
        legend={"itemsizing": "constant"},
    )


def _limits(found: Roofline) -> Limits:
    """Limits of both axes: all points and all ridge points, with room for words."""
    roofs = [found.reached, *([found.nominal] if found.nominal else [])]
    ridges = [tier.ridge_flops_per_byte for roof in roofs for tier in roof.tiers]
    x, y = (found.points[name].drop_nulls().to_list() for name in ("flops_per_byte", "flops_per_s"))
    low, high = min([*x, min(ridges) / 30]) / 1.5, max([*x, max(ridges) * 2.5]) * 4
    slowest = min(tier.bytes_per_s for tier in found.reached.tiers)
    floor = min([*y, low * slowest]) / 1.5
    return low, high, floor, max(roof.flops_per_s for roof in roofs) * 2


def _intensity_ticks(low: float, high: float) -> list[tuple[float, str]]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [(10.0**e, f"{10.0**e:,g}") for e in powers]


def _ceilings(figure: go.Figure, roof: Roof, low: float, high: float, dash: str) -> None:
    """The lines of one sort of ceilings; the ridge points of what is reached are marked."""
    peak, is_reached = roof.flops_per_s, dash == "solid"
    sort, width = ("reached", 2) if is_reached else ("nominal", 1.2)
    first = min([tier.ridge_flops_per_byte for tier in roof.tiers], default=low)
    figure.add_scatter(
        x=[first, high],
        y=[peak, peak],
        mode="lines",
        line={"color": "grey", "dash": dash, "width": width},
        name=f"compute, {sort}",
        text=f"{text.flops_per_s(peak)} ({roof.kind})",
        hoverinfo="text",
        showlegend=False,
    )
    for tier in roof.tiers:
        figure.add_scatter(
            x=[low, tier.ridge_flops_per_byte],
            y=[low * tier.bytes_per_s, peak],
            mode="lines+markers" if is_reached else "lines",
            marker={"size": [0, 9], "symbol": "diamond-open", "color": TIER_COLOURS[tier.name]},
            line={"color": TIER_COLOURS[tier.name], "dash": dash, "width": width},
            name=f"{tier.name}, {sort}",
            text=f"{_tier(tier)}<br>ridge {text.figure('flops_per_byte', tier.ridge_flops_per_byte)} FLOP/B",
            hoverinfo="text",
            showlegend=False,
        )


def _tier(tier: Tier) -> str:
    return f"{tier.name} {text.bytes_per_s(tier.bytes_per_s)} ({tier.kind})"


def _labels(figure: go.Figure, found: Roofline, limits: Limits) -> None:
    """Words on the lines as reached, along slanted ones, and the ridge points in FLOP per byte. Tiers of nearly the
    same speed run close together: their words stand one after the other above the highest of them."""
    low, high, floor, top = (math.log10(limit) for limit in limits)
    slope = (PLOT_PX[1] / (top - floor)) / (PLOT_PX[0] / (high - low))
    roofs = [found.reached, *([found.nominal] if found.nominal else [])]
    rates = [tier.bytes_per_s for roof in roofs for tier in roof.tiers]
    peak = math.log10(found.reached.flops_per_s)
    for group in _close_together(found.reached.tiers):
        highest = math.log10(max(rate for rate in rates if rate < CLOSE * group[0].bytes_per_s))
        for i, tier in enumerate(group):
            x = low + (peak - highest - low) * (len(group) - i - 0.5) / len(group)
            _label(
                figure,
                (x, x + highest),
                _tier(tier),
                textangle=-math.degrees(math.atan(slope)),
                xshift=-10 * math.sin(math.atan(slope)),
                yshift=10 * math.cos(math.atan(slope)),
            )
        ridges = [text.figure("flops_per_byte", tier.ridge_flops_per_byte) for tier in group]
        words = f"ridge {' to '.join(dict.fromkeys([ridges[0], ridges[-1]]))} FLOP/B"
        place = (math.log10(group[-1].ridge_flops_per_byte), peak)
        _label(figure, place, words, xanchor="left", yanchor="top", xshift=4, yshift=-3)
    words, nominal = f"{found.dtype} GEMM {text.flops_per_s(found.reached.flops_per_s)} ({found.reached.kind})", peak
    if found.nominal is not None and found.nominal.flops_per_s != found.reached.flops_per_s:
        words += f", dashed {text.flops_per_s(found.nominal.flops_per_s)} ({found.nominal.kind})"
        nominal = max(peak, math.log10(found.nominal.flops_per_s))
    _label(figure, (high, nominal), words, xanchor="right", yanchor="bottom")


def _close_together(tiers: Sequence[Tier]) -> list[list[Tier]]:
    """Tiers, fastest first, in groups of nearly the same speed."""
    groups: list[list[Tier]] = []
    for tier in tiers:
        if groups and groups[-1][0].bytes_per_s < CLOSE * tier.bytes_per_s:
            groups[-1].append(tier)
        else:
            groups.append([tier])
    return groups


def _label(figure: go.Figure, place: tuple[float, float], words: str, **how: Any) -> None:
    """Words at a place of a figure whose axes are logarithms."""
    x, y = place
    figure.add_annotation(x=x, y=y, text=literal(words), showarrow=False, font={"size": LABEL}, **how)


def _points(figure: go.Figure, rows: pl.DataFrame, op: str, i: int, most_frac: float, is_context: bool = False) -> None:
    """The points of one operation; faint and not in the legend where they are but context."""
    if rows.is_empty():
        return
    figure.add_scatter(
        x=rows["flops_per_byte"],
        y=rows["flops_per_s"],
        mode="markers",
        name=literal(op),
        marker={
            "color": POINT_COLOURS[i % len(POINT_COLOURS)],
            "symbol": SYMBOLS[i % len(SYMBOLS)],
            "size": rows["time_frac"],
            "sizemode": "area",
            "sizeref": most_frac / MOST_AREA_PX**2 * 2,
            "sizemin": 2.5,
            "opacity": 0.15 if is_context else 0.75,
            "line": {"width": 0.5, "color": "grey"},
        },
        text=[_words(row) for row in rows.iter_rows(named=True)],
        customdata=rows["row"].to_list(),
        hoverinfo="text",
        showlegend=not is_context,
    )


def _words(row: dict[str, object]) -> str:
    """What hovering over a point says."""
    n = row["n_tokens"]
    batch = "" if n is None else f", {n:,} tokens, {literal(row['routing'])}"
    gemm = "" if row["gemm"] is None else f" {literal(row['gemm'])}"
    access = "" if row["access"] in (None, "resident") else f", {literal(row['access'])}"
    roof = "compute roof" if row["bound"] == "compute" else f"roof of {row['tier']}"
    why = "" if row["why"] is None else f"<br>most of it: {LOST_TO[str(row['why'])]}"
    return (
        f"{literal(row['op'])}, {literal(row['shape'])}{gemm}{batch}{access}<br>"
        f"{text.flops_per_s(_number(row['flops_per_s']))}, {text.frac(_number(row['roof_frac']))} of the {roof}<br>"
        f"{text.frac(_number(row['time_frac']))} of the time, {text.ns(_number(row['lost_ns']))} above the roof{why}"
    )


def _number(value: object) -> float | None:
    return value if isinstance(value, float) else None


def _trajectories(figure: go.Figure, rows: pl.DataFrame) -> None:
    """Points of growing batches joined, a line for each operation, size of its GEMM, routing and access, through the
    medians of several points of one batch; both ends say their tokens."""
    lines = rows.drop_nulls("n_tokens").group_by("op", "gemm", "routing", "access", maintain_order=True)
    drawn: list[tuple[Sequence[object], pl.DataFrame]] = [
        (key, part.group_by("n_tokens").agg(pl.median("flops_per_byte", "flops_per_s")).sort("n_tokens"))
        for key, part in lines
        if part["n_tokens"].n_unique() > 1
    ]
    drawn.sort(key=lambda one: -one[1].height)
    for i, (key, part) in enumerate(drawn[:MAX_LINES]):
        ends = [""] * part.height
        for end in (0, -1):
            ends[end] = f"\u00a0\u00a0\u00a02<sup>{math.log2(part['n_tokens'][end]):.3g}</sup> tokens"
        figure.add_scatter(
            x=part["flops_per_byte"],
            y=part["flops_per_s"],
            mode="lines+text" if i == 0 else "lines",
            text=ends,
            textposition="bottom right",
            textfont={"size": LABEL},
            line={"color": "grey", "width": 1.5, "dash": ("solid", "dot", "dash", "dashdot")[i % 4]},
            name=literal(short(", ".join(str(word) for word in key if word not in (None, "resident")))),
            hoverinfo="name",
        )

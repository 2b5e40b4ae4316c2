"""A candidate against its baseline and against a model: each workload with its interval, and both questions crossed."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from perfmodel import text

from .drawing import MAX_POINTS, PALETTE, layout, literal, translucent

if TYPE_CHECKING:  # these bring scipy and scikit-learn, which other figures do not need
    from perfmodel.regression import Case, Comparison, PartChange

HEIGHT = 400
OVER = "candidate over baseline"
PART_PX = 44  # of a bar with two lines of words beside it
LONG = 12  # letters of a name
MANY = 150  # workloads from which on marks are drawn thinner
MAX_NAME = 60  # letters of a workload's name: its middle goes first
MAX_NAMED = 30  # workloads that have room for their names beside the axis
EXPLAINED = "explained"
MARKS = {  # colour and symbol of each verdict, and of slower workloads that are explained, in the order of the legend
    "regressed": (PALETTE[1], "triangle-up"),
    "suspect": (PALETTE[1], "diamond-open"),
    EXPLAINED: (PALETTE[4], "triangle-up-open"),
    "inconclusive": (PALETTE[6], "circle-open"),
    "ok": (PALETTE[0], "circle"),
    "improved": (PALETTE[2], "triangle-down"),
}
TICKS = (
    *(0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2, 2.5),
    *(3, 4, 5, 7, 10, 20, 50, 100),
)
TICKS_WIDE, TICKS_HIGH = 6, 12  # of an axis that names leave little room, and of one that is as high as a figure
LEAST_LOG = 1e-6  # below which a factor's logarithm is no divisor
# The cells of the two questions crossed: column, row, colour, what it means.
SQUARES = {
    "explained": (0, 1, PALETTE[4], "slower, and the<br>calibrated rates<br>account for it"),
    "regression to chase": (1, 1, PALETTE[1], "slower, and no<br>calibrated rate<br>accounts for it"),
    "fine": (0, 0, PALETTE[2], "not slower, and<br>what the model<br>expects"),
    "left on the table": (1, 0, PALETTE[3], "not slower, yet<br>above what the<br>model expects"),
}


def check_figures(comparison: "Comparison") -> list[tuple[go.Figure, str]]:
    """The figures of a comparison with what each shows in words."""
    overall = comparison.overall.verdict
    words = (
        f"Each workload's time on {comparison.candidate} over that on {comparison.baseline} with its 90 % interval, "
        f"slowest first; {overall.ratio:.2f} over all"
    )
    figures = [(forest(comparison), words)]
    if comparison.model is not None:
        cells = ", ".join(f"{n} {name}" for name, n in comparison.cells().items())
        figures.append((crossed(comparison), f"Slower than the baseline crossed with slower than the model: {cells}"))
    if comparison.is_divided:
        added = ", ".join(f"{part.part} {100 * part.change_frac:+.1f} %" for part in comparison.parts)
        figures.append((changed_parts(comparison), f"What each part adds to the time of the baseline: {added}"))
    return figures


def forest(comparison: "Comparison") -> go.Figure:
    """Ratios of all workloads with 90 % intervals, slowest first, over the band of the margin; as dashes what the
    model expects where the machines' calibrated rates differ.

    Few workloads stand below each other with their names, many side by side with names on hovering.
    """
    cases = comparison.each[: MAX_POINTS // 2]
    is_named = len(cases) <= MAX_NAMED
    figure = go.Figure()
    for mark, (colour, symbol) in MARKS.items():
        at = [i for i, case in enumerate(cases) if _mark(case) == mark]
        if at:
            figure.add_scatter(
                **_whiskers([cases[i] for i in at], at, len(cases), is_named=is_named, colour=colour, symbol=symbol)
            )
    expected = [(i, case.expected_ratio) for i, case in enumerate(cases) if case.expected_ratio not in (None, 1.0)]
    if expected:
        ranks, ratios = [list(column) for column in zip(*expected, strict=True)]
        figure.add_scatter(
            **_along(ranks, ratios, is_named=is_named),
            mode="markers",
            name="model expects",
            marker={
                "symbol": "line-ns" if is_named else "line-ew",
                "size": 8,
                "line": {"width": 2, "color": PALETTE[3]},
            },
            hovertemplate=f"model expects %{{{'x' if is_named else 'y'}:.3f}}x<extra></extra>",
        )
    overall = comparison.overall.verdict
    title = (
        f"Time against the baseline: {overall.ratio:.2f}x ({overall.ratio_low:.2f} to {overall.ratio_high:.2f}), "
        f"margin {100 * comparison.margin_frac:g} %"
    )
    layout(figure, title, "", "")
    _axes(figure, cases, comparison.margin_frac, is_named=is_named)
    return figure


def _along(ranks: Sequence[int], ratios: Sequence[float], *, is_named: bool) -> dict[str, Any]:
    """Ranks and ratios on the axes on which they stand."""
    return {"x": ratios, "y": ranks} if is_named else {"x": ranks, "y": ratios}


def _mark(case: "Case") -> str:
    """Which of MARKS a workload has."""
    return EXPLAINED if case.cell == EXPLAINED else case.verdict.verdict


def _whiskers(
    cases: "Sequence[Case]", ranks: Sequence[int], n_all: int, *, is_named: bool, colour: str, symbol: str
) -> dict[str, Any]:
    """Dots with their intervals, of one mark."""
    verdicts = [case.verdict for case in cases]
    error = {
        "type": "data",
        "symmetric": False,
        "array": [v.ratio_high - v.ratio for v in verdicts],
        "arrayminus": [v.ratio - v.ratio_low for v in verdicts],
        "thickness": 1.2 if n_all <= MANY else 0.7,
        "width": 0,
        "color": colour,
    }
    return {
        **_along(ranks, [v.ratio for v in verdicts], is_named=is_named),
        ("error_x" if is_named else "error_y"): error,
        "mode": "markers",
        "name": f"{'slower, ' if _mark(cases[0]) == EXPLAINED else ''}{_mark(cases[0])} ({len(cases)})",
        "marker": {"color": colour, "symbol": symbol, "size": 7 if n_all <= MANY else 5},
        "text": [_hover(case) for case in cases],
        "hoverinfo": "text",
    }


def _hover(case: "Case") -> str:
    verdict, found = case.verdict, case.expectation
    lines = [
        literal(verdict.label),
        f"{verdict.ratio:.3f}x ({verdict.ratio_low:.3f} to {verdict.ratio_high:.3f}): {verdict.verdict}",
    ]
    if found is not None:
        low, high = text.ns(found.model_low_ns), text.ns(found.model_high_ns)
        ends = "" if found.model_low_ns is None else f" ({low} to {high})"
        lines.append(f"measured {text.ns(found.measured_ns)}, model {text.ns(found.model_ns)}{ends}")
        lines.append(case.cell)
    return "<br>".join(lines)


def _axes(figure: go.Figure, cases: "Sequence[Case]", margin_frac: float, *, is_named: bool) -> None:
    """The logarithmic axis of ratios with the margin's band and the line of no change, and the axis of workloads."""
    ends = [1 / (1 + margin_frac), 1 + margin_frac]
    for case in cases:
        ends += [case.verdict.ratio_low, case.verdict.ratio_high, case.expected_ratio or 1.0]
    low, high = min(ends) / 1.03, max(ends) * 1.03
    ticks = _ticks(low, high, TICKS_WIDE if is_named else TICKS_HIGH)
    ratios = {
        "type": "log",
        "tickvals": ticks,
        "ticktext": [f"{tick:g}x" for tick in ticks],
        "range": [math.log10(low), math.log10(high)],
        "title": OVER,
    }
    band = {"fillcolor": translucent(PALETTE[0]), "line_width": 0, "layer": "below"}
    line = {"line": {"color": "grey", "width": 1}, "layer": "below"}
    if is_named:
        figure.add_vrect(x0=1 / (1 + margin_frac), x1=1 + margin_frac, **band)
        figure.add_vline(x=1, **line)
        labels, shared = text.told_apart([case.verdict.label for case in cases])
        names = [literal(text.shortened(label, MAX_NAME)) for label in labels]
        ratios["title"] = OVER + (literal(f" (all: {text.shortened(shared, MAX_NAME)})") if shared else "")
        figure.update_yaxes(tickvals=list(range(len(cases))), ticktext=names, autorange="reversed", zeroline=False)
        figure.update_layout(xaxis=ratios, height=200 + 20 * len(cases))
        figure.update_yaxes(automargin=True)
    else:
        figure.add_hrect(y0=1 / (1 + margin_frac), y1=1 + margin_frac, **band)
        figure.add_hline(y=1, **line)
        figure.update_xaxes(title=f"{len(cases)} workloads, slowest first", showticklabels=False, zeroline=False)
        figure.update_xaxes(showgrid=False, range=[-1, len(cases)])
        figure.update_layout(yaxis=ratios, margin={"b": 84}, height=HEIGHT)


def _ticks(low: float, high: float, n_most: int) -> list[float]:
    """Round ratios within these ends, 1 among them, none nearer to the next than the `n_most`th part of the axis."""
    least, kept = math.log(high / low) / n_most, [1.0]
    for tick in (tick for tick in TICKS if 1 < tick <= high):
        if math.log(tick / kept[-1]) >= least:
            kept.append(tick)
    for tick in (tick for tick in reversed(TICKS) if low <= tick < 1):
        if math.log(kept[0] / tick) >= least:
            kept.insert(0, tick)
    return kept


def crossed(comparison: "Comparison") -> go.Figure:
    """Both questions crossed: how many workloads stand in each of four cells, and what each cell means."""
    counts = comparison.cells()
    figure = go.Figure()
    for name, (column, row, colour, meaning) in SQUARES.items():
        fill = translucent(colour) if counts[name] else "rgba(0,0,0,0)"
        ends = {"x0": column + 0.015, "x1": column + 0.985, "y0": row + 0.02, "y1": row + 0.98}
        figure.add_shape(type="rect", **ends, fillcolor=fill, line={"color": colour, "width": 1.5})
        centre = {"x": column + 0.5, "showarrow": False}
        figure.add_annotation(text=f"<b>{counts[name]}</b>", y=row + 0.8, font={"size": 26}, **centre)
        figure.add_annotation(text=f"<b>{_two_lines(name)}</b>", y=row + 0.5, font={"size": 13}, **centre)
        figure.add_annotation(text=meaning, y=row + 0.2, font={"size": 11}, **centre)
    others = [f"{counts[name]} {name}" for name in ("undecided", "not judged by the model") if counts[name]]
    layout(figure, "Both questions crossed", " and ".join(others) + " besides" if others else "", "")
    figure.update_xaxes(
        range=[0, 2],
        tickvals=[0.5, 1.5],
        ticktext=["as the model<br>expects", "slower than<br>expected"],
        showgrid=False,
    )
    figure.update_yaxes(range=[0, 2], tickvals=[0.5, 1.5], ticktext=["not slower", "slower"], showgrid=False)
    figure.update_yaxes(tickangle=-90, zeroline=False)
    figure.update_xaxes(zeroline=False, tickangle=0)
    return figure.update_layout(showlegend=False, height=HEIGHT, margin={"b": 70, "l": 40})


def changed_parts(comparison: "Comparison") -> go.Figure:
    """What each part adds to the time over all workloads, a bar each with its 90 % interval, and what the parts leave;
    beside the names how many times longer each takes."""
    parts, left = comparison.parts, comparison.unexplained_frac or 0.0
    values = [part.change_frac for part in parts]
    ends = [[_added_frac(part, end) for end in (part.factor_low, part.factor_high)] for part in parts]
    names = [literal(part.part) for part in parts]
    names = [f"{name} (graphs)" if name in names[:i] else name for i, name in enumerate(names)]
    figure = go.Figure()
    figure.add_bar(
        orientation="h",
        y=list(range(len(parts) + 1)),
        x=[*values, left],
        marker_color=[*(PALETTE[1] if value > 0 else PALETTE[2] for value in values), PALETTE[6]],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [*(max(high - value, 0.0) for (_, high), value in zip(ends, values, strict=True)), 0.0],
            "arrayminus": [*(max(value - low, 0.0) for (low, _), value in zip(ends, values, strict=True)), 0.0],
            "color": "grey",
            "thickness": 1.5,
            "width": 4,
        },
        hovertext=[*(literal(part.evidence) for part in parts), "what no part explains"],
        hovertemplate="%{x:+.1%}<br>%{hovertext}<extra></extra>",
    )
    of = " in the mean of the workloads" if len(comparison.each) > 1 else ""
    layout(figure, f"What changed: {100 * (sum(values) + left):+.1f} %{of}", "", "")
    figure.update_xaxes(title="adds, of the baseline's time", tickformat="+.0%", zeroline=True, zerolinecolor="grey")
    figure.update_yaxes(
        tickvals=list(range(len(parts) + 1)),
        ticktext=[*(f"{name}<br>{_takes(part)}" for name, part in zip(names, parts, strict=True)), "not explained"],
        autorange="reversed",
        automargin=True,
        zeroline=False,
    )
    return figure.update_layout(showlegend=False, height=120 + PART_PX * (len(parts) + 1), margin={"b": 60})


def _takes(part: "PartChange") -> str:
    """How many times longer a part takes, with its interval where one is known."""
    if part.factor is None:
        return "new"
    ends = (
        ""
        if part.factor_low is None or part.factor_high is None
        else f" ({part.factor_low:.2f} to {part.factor_high:.2f})"
    )
    return f"takes {part.factor:.2f}x{ends}"


def _added_frac(part: "PartChange", factor: float | None) -> float:
    """What a part would add with another factor: as much more as its logarithm is larger."""
    if factor is None or part.factor is None:
        return part.change_frac
    if abs(math.log(part.factor)) < LEAST_LOG:
        return part.share_frac * math.log(factor)
    return part.change_frac * math.log(factor) / math.log(part.factor)


def _two_lines(name: str) -> str:
    """A name of some words, broken after the first, where the whole is too long for its square."""
    return name.replace(" ", "<br>", 1) if len(name) > LONG else name

"""What it costs to move experts off the device: curves, parts of the time, policies, memory against slowdown."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from perfmodel import text
from perfmodel.physics import PARTS
from perfmodel.placing import OURS, TO_COMPARE
from perfmodel.placing.curves import FREE_FRAC, frontier, knee, most_free
from perfmodel.predict import Prediction

from .drawing import DASHES, GUIDE, PALETTE, SYMBOLS, layout, literal, time_ticks, translucent
from .routing import routing_map

if TYPE_CHECKING:
    from perfmodel.placing.answers import Answer, Point
    from perfmodel.placing.compare import Outcome

LABELLED_FRAC = 0.15  # of the longest bar: shorter parts have no room for words
BEYOND = 2  # lines that reach more than this times the first one leave the axis
LINEAR_UP_TO = 15  # slowdowns above this make a linear axis hide the small ones
GREY = "#888888"  # of lines that compare: readable on light and on dark
FREE = "rgba(0,158,115,0.16)"


def slowdown(
    curves: Mapping[str, Sequence[Prediction]],
    *,
    chosen: Prediction | None = None,
    measured: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    free_of: Collection[str] | None = None,
    within_frac: float = FREE_FRAC,
) -> go.Figure:
    """Slowdown against offloaded fraction, one line a label, with the interval as a ribbon where there is one.

    The fractions are shaded that are free: where the slowdown stays `within_frac`, of that line among `free_of` (null:
    all) that has most of them.
    The axis is that of the first line, on which `chosen` is marked; others may leave it, and then say how far they go.
    `measured` are fractions and slowdowns that somebody measured, by source; all of them are on the axis.
    """
    figure = go.Figure()
    for i, (label, predictions) in enumerate(curves.items()):
        colour = PALETTE[i % len(PALETTE)]
        sure = [(p.n_offloaded / p.n_experts, p.interval, p.baseline_latency_ns) for p in predictions if p.interval]
        if len(sure) > 1:
            x = [frac for frac, _, _ in sure]
            bounds = [[ends[side] / base_ns for _, ends, base_ns in sure] for side in (0, 1)]
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
            x=[p.n_offloaded / p.n_experts for p in predictions],
            y=[p.slowdown for p in predictions],
            mode="lines+markers",
            name=literal(label),
            line={"color": colour, "width": 3 if i == 0 else 1.5, "dash": DASHES[i % len(DASHES)]},
            marker={"size": 5 if i == 0 else 4, "symbol": SYMBOLS[i % len(SYMBOLS)]},
            text=[
                f"{_leave(p)}: {p.slowdown:.2f}x, {text.ns(p.latency_ns)}, {p.bottleneck}-bound" for p in predictions
            ],
            hoverinfo="text+name",
        )
    for i, (label, points) in enumerate((measured or {}).items()):
        figure.add_scatter(
            x=[frac for frac, _ in points],
            y=[value for _, value in points],
            mode="markers",
            name=literal(label),
            marker={"size": 12, "symbol": ("x", "cross")[i % 2], "color": PALETTE[3]},
            hovertemplate="%{y:.2f}x at %{x:.1%} offloaded",
        )
    figure.add_hline(y=1, line=GUIDE)
    layout(figure, "Slowdown against offloaded fraction", "experts offloaded, least used first", "slowdown")
    figure.update_xaxes(tickformat=".0%", range=[-0.02, 1.02])
    candidates = {label: curve for label, curve in curves.items() if free_of is None or label in free_of}
    label, free, n_experts = most_free(candidates, within_frac)
    if free:
        by = f" with {literal(label)}" if len(curves) > 1 else ""
        figure.add_vrect(
            x0=0,
            x1=free / n_experts,
            fillcolor=FREE,
            line_width=0,
            annotation={"text": f"free{by}: {text.counted(free, 'expert')}", "font": {"size": 12}},
            annotation_position="bottom left",
        )
    if chosen is not None:
        figure.add_scatter(
            x=[chosen.n_offloaded / chosen.n_experts],
            y=[chosen.slowdown],
            mode="markers+text",
            marker={"size": 14, "symbol": "circle-open", "color": PALETTE[0], "line": {"width": 3}},
            text=[f"{chosen.slowdown:.2f}x"],
            textposition="top left",
            textfont={"size": 14},
            showlegend=False,
            hoverinfo="skip",
        )
    tops = {label: max(p.slowdown for p in predictions) for label, predictions in curves.items()}
    first = next(iter(tops.values()))
    highest = max(top for top in tops.values() if top <= BEYOND * first)
    highest = max([highest, *(value for points in (measured or {}).values() for _, value in points)])
    for line in figure.data:
        if line.name in tops and tops[line.name] > highest:
            line.name = f"{line.name} (to {tops[line.name]:.0f}x)"
    if highest > LINEAR_UP_TO:
        ticks = [
            step * 10**power for power in range(-1, 5) for step in (1, 2, 5) if 0.4 < step * 10**power < highest * 2
        ]
        figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}x" for tick in ticks])
    else:
        figure.update_yaxes(ticksuffix="x", range=[0, highest * 1.15])
    return figure


def _leave(p: Prediction) -> str:
    return f"{p.n_offloaded} of {p.n_experts} offloaded"


def parts(predictions: Mapping[str, Prediction]) -> go.Figure:
    """What the time of each labelled prediction consists of, as stacked bars."""
    figure = go.Figure()
    top_ns = max(p.latency_ns for p in predictions.values())
    for i, part in enumerate(PARTS):
        values = [p.parts.get(part, 0.0) for p in predictions.values()]
        if max(values) > 0:
            figure.add_bar(
                y=[literal(label) for label in predictions],
                x=values,
                name=part,
                orientation="h",
                marker={
                    "color": PALETTE[i % len(PALETTE)],
                    "pattern": {"shape": "" if i < len(PALETTE) else "/"},  # there are more parts than colours
                },
                text=[text.ns(v) if v > LABELLED_FRAC * top_ns else "" for v in values],
                textangle=0,
                hovertext=[f"{part} {text.ns(v)}" for v in values],
                hoverinfo="text",
            )
    layout(figure, "What the time consists of", "latency of a layer", "")
    time_ticks(figure.layout.xaxis, top_ns, 4)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure.update_layout(
        barmode="stack",
        height=210 + 55 * len(predictions),
        margin={"b": 130, "l": 10, "r": 30},
        legend={"traceorder": "normal", "font": {"size": 11}},
    )


def policies(outcomes: Sequence["Outcome"], best: "Outcome") -> go.Figure:
    """The slowdown of each policy in steps it has not seen, the fastest first, as bars that begin at 1x, all resident.
    Ours, others and what nobody can choose are told apart."""
    ranked = sorted(outcomes, key=lambda one: one.slowdown)
    labels = [f"{literal(one.policy)} (taken)" if one.policy == best.policy else literal(one.policy) for one in ranked]
    kind_of = {name: "ours" for name in OURS} | {name: "to compare with" for name in TO_COMPARE}
    figure = go.Figure()
    for kind, colour, pattern in (
        ("ours", PALETTE[0], ""),
        ("published and simple", PALETTE[6], ""),
        ("to compare with", PALETTE[6], "/"),
    ):
        which = [i for i, one in enumerate(ranked) if kind_of.get(one.policy, "published and simple") == kind]
        if which:
            figure.add_bar(
                y=[labels[i] for i in which],
                x=[ranked[i].slowdown - 1 for i in which],
                base=1,
                orientation="h",
                name=kind,
                marker={"color": colour, "pattern": {"shape": pattern, "solidity": 0.2}},
                text=[f"{ranked[i].slowdown:.3f}x" for i in which],
                textposition="outside",
                hovertext=[f"{labels[i]}: {ranked[i].slowdown:.3f}x" for i in which],
                hoverinfo="text",
            )
    layout(figure, "Policies on steps they have not seen", "slowdown; bars begin at 1x, all experts resident", "")
    slowdowns = [one.slowdown for one in ranked]
    figure.update_xaxes(ticksuffix="x", range=[min(1, *slowdowns), 1 + max(max(slowdowns) - 1, 1e-3) * 1.15])
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=labels)
    return figure.update_layout(height=150 + 26 * len(ranked), margin={"b": 90, "l": 120}, bargap=0.3)


def trade_off(
    points: Sequence["Point"], chosen: tuple[float, float], others: Mapping[str, tuple[float, float]] = {}
) -> go.Figure:
    """GPU memory for experts against slowdown: every placement that was evaluated faint (`others` by name, bytes and
    slowdown), those that none beats in both bold, what was chosen and the knee marked."""
    front, all_bytes = frontier([(p.capacity_bytes, p.slowdown) for p in points]), max(p.capacity_bytes for p in points)
    figure = go.Figure()
    figure.add_scatter(
        x=[size for size, _ in others.values()],
        y=[value for _, value in others.values()],
        mode="markers",
        name="other placements",
        marker={"size": 8, "color": GREY, "opacity": 0.55, "symbol": "square"},
        text=[f"{literal(name)}: {value:.3f}x in {text.n_bytes(size)}" for name, (size, value) in others.items()],
        hoverinfo="text",
    )
    figure.add_scatter(
        x=[points[i].capacity_bytes for i in front],
        y=[points[i].slowdown for i in front],
        mode="lines+markers",
        name="least slowdown for its memory",
        line={"color": PALETTE[0], "width": 3, "shape": "linear"},
        marker={"size": 8},
        text=[f"{points[i].n_resident} resident: {points[i].slowdown:.3f}x" for i in front],
        hoverinfo="text",
    )
    bend = knee([(points[i].capacity_bytes, points[i].slowdown) for i in front])
    if bend is not None:
        at = points[front[bend]]
        figure.add_annotation(
            x=at.capacity_bytes,
            y=at.slowdown,
            text=f"knee: {text.n_bytes(at.capacity_bytes)}, {at.slowdown:.2f}x",
            showarrow=True,
            arrowhead=2,
            arrowcolor=GREY,
            ax=40,
            ay=-45,
        )
    figure.add_scatter(
        x=[chosen[0]],
        y=[chosen[1]],
        mode="markers+text",
        name="chosen",
        marker={"size": 15, "symbol": "star", "color": PALETTE[1]},
        text=[f"chosen: {chosen[1]:.2f}x"],
        textposition="bottom left",
        hoverinfo="text",
    )
    layout(figure, "GPU memory against slowdown", "GPU memory for experts", "slowdown")
    ticks = [all_bytes * i / 4 for i in range(5)]
    figure.update_xaxes(tickvals=ticks, ticktext=[text.n_bytes(tick) for tick in ticks], rangemode="tozero")
    figure.update_yaxes(ticksuffix="x")
    return figure


def trade_off_of(placed: "Answer") -> go.Figure:
    """The trade-off of an answer: the placements of its policies and access modes are the other points."""

    def at(one: "Outcome") -> tuple[float, float]:
        return int((one.tier == 0).sum()) * placed.question.shape.expert_bytes, one.slowdown

    others = {one.policy: at(one) for one in placed.outcomes if one.policy not in TO_COMPARE}
    others |= {f"best under {name}": at(one) for name, one in placed.accesses.items()}
    return trade_off(placed.trade_off, at(placed.best), others)


def prediction_figures(
    curves: Mapping[str, Sequence[Prediction]],
    chosen: Prediction,
    measured: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> list[tuple[Any, str]]:
    """The figures of a prediction with what each shows: the curve it lies on, what its time consists of."""
    found = [
        (
            slowdown(curves, chosen=chosen, measured=measured),
            "Predicted slowdown against the fraction of offloaded experts",
        )
    ]
    first = next(iter(curves.values()))[0]
    bars = {"all resident": first} | ({_leave(chosen): chosen} if chosen.n_offloaded else {})
    return [*found, (parts(bars), "What the predicted time of a layer consists of")]


def placing_figures(placed: "Answer") -> list[tuple[Any, str]]:
    """The figures of an answer with what each shows: policies, what the time consists of, memory, and routing."""
    found = [(policies(placed.outcomes, placed.best), "The slowdown of each placement policy")]
    shown = {name: one for name, one in placed.predictions.items() if name == placed.best.policy}
    found.append((parts(shown), "What the predicted time of a layer consists of under the placement that was taken"))
    if placed.trade_off:
        found.append((trade_off_of(placed), "GPU memory for experts against slowdown"))
    question = placed.question
    return [*found, (routing_map(question.popularity, range(question.n_layers)), "How often each expert is used")]

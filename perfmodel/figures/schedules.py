"""Expert-parallel layers: who does what when, where the time goes, how schedules compare over batches and skews."""

import textwrap
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from perfmodel import report, text
from perfmodel.ep_capture import EpWorkload
from perfmodel.schedule.captured import Beside
from perfmodel.schedule.curves import TOKENS, Curve
from perfmodel.schedule.drawn import DRAWN_LANES, DRAWN_PHASES, Panel, measured, predicted, scheduled
from perfmodel.schedule.pictured import LAUNCH, PARTS, WAITING, Picture
from perfmodel.schedule.timeline import TRANSFERS, Span

from .drawing import DASHES, GUIDE, PALETTE, SYMBOLS, layout, literal, time_ticks

MAX_GPUS = 16  # of more, a Gantt is too tall to be seen at once
EDGE = {"width": 0.5, "color": "rgba(128,128,128,0.7)"}  # of bars, seen on light and on dark
GREY = ("rgba(90,90,90,0.9)", "rgba(128,128,128,0.15)")  # launches, waiting
DARK = "rgba(40,40,40,0.6)"  # hatching over a colour
PANEL_GAP = 70  # pixels between panels of a Gantt: ticks and a title
HOW_TO_READ = (
    "A gap in compute is waiting. Thinner bars: phases that are under way together. Dashed: the end of what is drawn."
)


def gantt(
    panels: Sequence[Panel], title: str = "One MoE layer", member: str = "GPU", n_most: int = MAX_GPUS
) -> go.Figure:
    """Who does what when in one MoE layer: panels on one time axis, a row for each GPU (`member`) and lane.

    Where a lane has several phases under way together, as in a fused kernel, later ones are drawn thinner, over the
    earlier. Of more than `n_most` GPUs those are drawn that compute most, and as many that compute least.
    """
    n_all = max(one.n_gpus for one in panels)
    drawn = sorted(range(n_all), key=lambda gpu: (-sum(one.busy_ns(gpu) for one in panels), gpu))
    head = [title]
    if n_all > n_most:
        half = n_most // 2
        drawn = drawn[:half] + drawn[-half:]
        head.append(
            f"Of {n_all} {member}s those {half} are drawn that compute most, and those {half} that compute least."
        )
    kept = {gpu: [f"{member} {gpu} {lane}" for lane in DRAWN_LANES] for gpu in sorted(drawn)}
    spans = [[span for span in one.spans if span.gpu in kept] for one in panels]
    used = [{f"{member} {span.gpu} {span.lane}" for span in own} for own in spans]
    labels = [[label for lanes in kept.values() for label in lanes if label in own] for own in used]
    heights = [18 * max(len(own), 1) for own in labels]
    height = sum(heights) + PANEL_GAP * (len(panels) - 1)
    figure = make_subplots(
        rows=len(panels),
        shared_xaxes=True,
        row_heights=heights,
        vertical_spacing=PANEL_GAP / height if len(panels) > 1 else 0.0,
        subplot_titles=[literal(one.title) for one in panels],
    )
    for panel, one in enumerate(panels, 1):
        for bar in _bars(spans[panel - 1], member):
            bar.showlegend = not any(trace.name == bar.name for trace in figure.data)
            figure.add_trace(bar, row=panel, col=1)
        order = labels[panel - 1][::-1]
        figure.update_yaxes(categoryorder="array", categoryarray=order, dtick=1, row=panel, col=1)
        figure.add_vline(x=one.latency_ns, row=panel, col=1, line=GUIDE)
    figure.update_annotations(font={"size": 13}, x=0, xanchor="left")  # titles of panels, above their first bar
    top = max(one.latency_ns for one in panels)
    time_ticks(figure.layout.xaxis, top, 10)
    ticks = figure.layout.xaxis
    figure.update_xaxes(range=[0, top * 1.02], tickvals=ticks.tickvals, ticktext=ticks.ticktext, showticklabels=True)
    figure.update_xaxes(title="time since the layer began", row=len(panels), col=1)
    lines = [literal(line) for words in head for line in textwrap.wrap(words, 130)]
    above = 130 + 20 * len(lines)
    whole = height + above + 60
    return figure.update_layout(
        title={
            "text": "<br>".join([*lines, f"<span style='font-size:12px;font-weight:400'>{HOW_TO_READ}</span>"]),
            "font": {"size": 15},
            "x": 0.01,
            "yref": "container",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 12},
        },
        legend={"orientation": "h", "yref": "container", "yanchor": "top", "y": 1 - (above - 85) / whole, "x": 0},
        barmode="overlay",
        height=whole,
        margin={"l": 160, "r": 20, "t": above, "b": 60},
    )


def _bars(spans: Sequence[Span], member: str) -> list[go.Bar]:
    """The spans of a panel, a trace for each phase."""
    shown = [phase for phase in DRAWN_PHASES if any(span.phase == phase for span in spans)]
    thinner = 0.7 / len(shown) if _has_overlaps(spans) else 0.0
    has_pieces = len({span.piece for span in spans}) > 1
    bars = []
    for depth, phase in enumerate(shown):
        own = [span for span in spans if span.phase == phase]
        bars.append(
            go.Bar(
                y=[f"{member} {span.gpu} {span.lane}" for span in own],
                base=[span.start_ns for span in own],
                x=[span.dur_ns for span in own],
                orientation="h",
                width=0.85 - thinner * depth,
                name=phase,
                legendgroup=phase,
                marker=_look(phase),
                opacity=0.85,
                hovertext=[
                    f"{phase}{f', piece {span.piece}' if has_pieces else ''}, {member} {span.gpu} {span.lane}"
                    f"<br>{text.ns(span.dur_ns)}, from {text.ns(span.start_ns)} to "
                    f"{text.ns(span.start_ns + span.dur_ns)}"
                    for span in own
                ],
                hoverinfo="text",
            )
        )
    return bars


def _look(phase: str) -> dict[str, Any]:
    """How the bars of a phase look, the same in all figures."""
    if phase in (LAUNCH, WAITING):
        return {"color": GREY[phase == WAITING], "pattern": {"shape": ""}, "line": EDGE}
    i = DRAWN_PHASES.index(phase)
    return {
        "color": PALETTE[i % len(PALETTE)],
        "pattern": {"shape": "/" if i >= len(PALETTE) else ""},
        "line": EDGE,
    }


def _has_overlaps(spans: Sequence[Span]) -> bool:
    """Whether a lane of a GPU has two spans under way at once."""
    until: dict[tuple[int, str], float] = {}
    for span in sorted(spans, key=lambda span: span.start_ns):
        if span.start_ns < until.get((span.gpu, span.lane), 0.0) * (1 - 1e-9):
            return True
        until[span.gpu, span.lane] = span.start_ns + span.dur_ns
    return False


def stacked(found: Picture) -> go.Figure:
    """Where the time of the slowest GPU goes under each schedule: bars that sum to the latency, fastest at the top.

    Transfers are drawn, hatched, as far as no computing hides them.
    """
    rows = found.ranked[::-1]
    parts = {one.schedule: one.parts for one in found.breakdowns}
    figure = go.Figure()
    for name in PARTS:
        values = [parts[one.schedule].get(name, 0.0) for one in rows]
        if not any(values):
            continue
        label = f"{name}, exposed" if name in TRANSFERS else name
        look = _look(name)
        if name in TRANSFERS:
            look |= {"pattern": {"shape": "x", "size": 7, "solidity": 0.25, "fillmode": "overlay", "fgcolor": DARK}}
        figure.add_bar(
            y=[one.schedule for one in rows],
            x=values,
            name=label,
            orientation="h",
            marker=look,
            hovertext=[
                f"{label}<br>{text.ns(ns)}, {text.frac(ns / one.latency_ns)} of {one.schedule}"
                for ns, one in zip(values, rows, strict=True)
            ],
            hoverinfo="text",
        )
    top = rows[0].latency_ns
    for one in rows:
        said = text.ns(one.latency_ns) + (f", {top / one.latency_ns:.2f}x" if len(rows) > 1 else "")
        figure.add_annotation(x=one.latency_ns, y=one.schedule, text=said, showarrow=False, xanchor="left", xshift=6)
    layout(figure, "Where the time of the slowest GPU goes", "", "")
    time_ticks(figure.layout.xaxis, top)
    figure.update_xaxes(range=[0, top * 1.35])
    height = 150 + 64 * len(rows)
    return figure.update_layout(
        barmode="stack", height=height, margin={"l": 70, "r": 10, "t": 40, "b": 100}, legend={"traceorder": "normal"}
    )


def speedup(found: Curve, chosen: float | None = None) -> go.Figure:
    """How many times as fast as the base each schedule is along a curve; a band at the `chosen` value, dashed lines
    where another schedule becomes the fastest."""
    figure, is_batch = go.Figure(), found.along == TOKENS
    for i, (name, values) in enumerate(found.speedups.items()):
        figure.add_scatter(
            x=found.at,
            y=values,
            mode="lines+markers",
            name=name,
            line={"color": PALETTE[i], "dash": DASHES[i]},
            marker={"size": 7, "symbol": SYMBOLS[i]},
            text=[
                f"{name}, {text.ns(ns)}<br>{value:.2f}x as fast as {found.base}"
                for ns, value in zip(found.latency_ns[name], values, strict=True)
            ],
            hoverinfo="text+x" if not is_batch else "text",
        )
    for one in found.stretches:
        if one.high is not None:
            figure.add_vline(x=one.high, line={"color": "grey", "width": 1, "dash": "dash"})
    if chosen is not None and found.at[0] <= chosen <= found.at[-1]:
        sides = (chosen * 0.97, chosen * 1.03) if is_batch else (chosen - 0.01, chosen + 0.01)
        figure.add_vrect(x0=sides[0], x1=sides[1], fillcolor="grey", opacity=0.3, line_width=0)
    what = "tokens on each GPU" if is_batch else "exponent of the power law of popularity"
    layout(figure, f"Against the {'batch' if is_batch else 'skew'}", what, f"times as fast as {found.base}")
    if is_batch:
        ticks = found.at[:: 2 if len(found.at) > 8 else 1]
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[text.count(tick) for tick in ticks])
    figure.update_yaxes(ticksuffix="x", rangemode="tozero")
    return figure.update_layout(height=360, margin={"l": 60, "r": 10, "t": 40, "b": 100})


def schedule_figures(
    found: Picture, curves: Sequence[Curve] = (), n_most: int = MAX_GPUS
) -> list[tuple[go.Figure, str]]:
    """The figures of a layer's schedules with what each shows: where the time goes, who does what when, and speed-ups
    along curves."""
    panels = [scheduled(one) for one in found.timelines]
    return [
        (stacked(found), f"Where the time goes. {report.fastest_words(found)}"),
        (gantt(panels, report.schedule_head(found), n_most=n_most), "What each GPU does when, by schedule"),
        *((speedup(one), f"Speed-up over {one.base}. {report.stretch_words(one)}") for one in curves),
    ]


def beside(found: Beside, workload: EpWorkload) -> go.Figure:
    """Phases of a measured workload beside the prediction: of the rank that takes longest, of collectives from when all
    ranks are there, and the whole step. What waiting for cores adds is predicted alone."""
    rows = report.phase_pairs(found, workload)
    figure = go.Figure()
    names = [name for name, *_ in rows]
    columns: dict[str, list[float | None]] = {
        "measured": [row[1] for row in rows],
        "predicted": [row[2] for row in rows],
    }
    for i, (label, values) in enumerate(columns.items()):
        figure.add_bar(
            x=names,
            y=values,
            name=label,
            marker={"color": PALETTE[i], "pattern": {"shape": "/" if i else ""}, "line": EDGE},
            hovertext=[f"{name}<br>{label} {text.ns(ns)}" for name, ns in zip(names, values, strict=True)],
            hoverinfo="text",
        )
    layout(figure, "Phases: the rank that takes longest, collectives, the whole step", "", "")
    time_ticks(figure.layout.yaxis, max(ns for _, *pair in rows for ns in pair if ns is not None))
    return figure.update_layout(barmode="group", height=440, margin={"l": 70, "r": 10, "t": 40, "b": 80})


def phase_figures(pairs: Sequence[tuple[Beside, EpWorkload]]) -> list[tuple[go.Figure, str]]:
    """The figures of measured workloads with what each shows: ranks in time, measured above predicted, and phases."""
    panels = [panel for found, one in pairs for panel in (measured(found.capture, one), predicted(found, one))]
    head = "; ".join(report.workload_head(found.capture, one) for found, one in pairs)
    bars = [(beside(found, one), f"Phases of {report.workload_head(found.capture, one)}") for found, one in pairs]
    return [(gantt(panels, head, "rank"), "Which rank did what when, measured and as predicted"), *bars]

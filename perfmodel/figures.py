"""Tables and records in, Plotly figures out; the dashboard and reports draw nothing else."""

import html
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from perfmodel import text
from perfmodel.hardware import HardwareProfile
from perfmodel.launch import LaunchMetrics
from perfmodel.physics import PARTS, ceilings
from perfmodel.predict import Prediction
from perfmodel.roofline import tiers
from perfmodel.schedule.drawn import DRAWN_LANES, DRAWN_PHASES, Panel
from perfmodel.schedule.timeline import Span

# Okabe-Ito, readable without colour vision; order of use.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#F0E442")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")
BAND_FRAC = 0.10  # the parity plot's grey band
MAX_POINTS = 5000
MAX_GPUS = 16  # of more, a Gantt is too tall to be seen at once
PANEL_GAP = 70  # pixels between panels of a Gantt: ticks and a title
HOW_TO_READ = (
    "A gap in compute is waiting. Thinner bars: phases that are under way together. Dashed: the end of what is drawn."
)
LINEAR_UP_TO = 15  # slowdowns above this make a linear axis hide the small ones

_TIME_DECADES_NS = (
    (1e3, "1 µs"),
    (1e4, "10 µs"),
    (1e5, "100 µs"),
    (1e6, "1 ms"),
    (1e7, "10 ms"),
    (1e8, "100 ms"),
    (1e9, "1 s"),
    (1e10, "10 s"),
)
_RATE_DECADES = tuple((10.0**e, text.flops_per_s(10.0**e)) for e in range(6, 17))


def literal(words: object) -> str:
    """A string from a file, to be shown letter by letter: kernel names hold <, > and &, which Plotly interprets."""
    return html.escape(str(words), quote=False)


def _layout(figure: go.Figure, title: str, x: str, y: str) -> go.Figure:
    return figure.update_layout(
        title={"text": title, "font": {"size": 15}},
        xaxis_title=x,
        yaxis_title=y,
        colorway=list(PALETTE),
        margin={"l": 60, "r": 20, "t": 48, "b": 120},
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0.01, "x": 0},
        height=440,
    )


def _decades(axis: Any, decades: Sequence[tuple[float, str]]) -> None:
    axis.update(type="log", tickvals=[value for value, _ in decades], ticktext=[word for _, word in decades])


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
    _layout(
        figure,
        f"Predicted vs measured: median error {text.frac(errors['median_ape_frac'])}, "
        f"p90 {text.frac(errors['p90_ape_frac'])}",
        "measured latency",
        "predicted latency",
    )
    shown = [d for d in _TIME_DECADES_NS if low / 10 < d[0] < high * 10]
    _decades(figure.layout.xaxis, shown)
    _decades(figure.layout.yaxis, shown)
    return figure


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
                fillcolor=_translucent(colour),
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
    _layout(figure, "Slowdown against offloaded fraction", "experts offloaded, least used first", "slowdown")
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


def _translucent(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


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
    _layout(figure, "What the time consists of", "latency per layer", "")
    top = max(p.latency_ns for p in predictions.values())
    figure.update_xaxes(tickvals=[top * i / 4 for i in range(5)], ticktext=[text.ns(top * i / 4) for i in range(5)])
    return figure.update_layout(barmode="stack", height=300)


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
            line={"color": PALETTE[i], "dash": ("solid", "dash", "dot", "dashdot")[i % 4]},
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
    _layout(figure, "Roofline", "FLOP per byte", "compute rate")
    figure.update_xaxes(type="log", dtick=1)
    _decades(figure.layout.yaxis, [d for d in _RATE_DECADES if low * shown[-1].bytes_per_s / 10 < d[0] < peak * 10])
    return figure


def busy(metrics: LaunchMetrics) -> go.Figure:
    """Busy with kernels, busy with copies and sets alone, and idle time of each device, as stacked bars."""
    figure = go.Figure()
    devices = [d for d in metrics.devices if d.gpu_span_ns]
    names = [f"device {d.device}" for d in devices]
    series = {
        "kernels": [d.kernel_busy_ns for d in devices],
        "copies and sets alone": [d.gpu_busy_ns - d.kernel_busy_ns for d in devices],
        "idle": [(d.gpu_span_ns or 0) - d.gpu_busy_ns for d in devices],
    }
    for (name, values), colour in zip(series.items(), (PALETTE[0], PALETTE[1], "#BBBBBB"), strict=True):
        figure.add_bar(
            y=names,
            x=values,
            name=name,
            orientation="h",
            marker={"color": colour},
            hovertext=[f"{name} {text.ns(v)}" for v in values],
            hoverinfo="text",
        )
    _layout(figure, "Where device time goes", "time from first to last device work", "")
    top = max((d.gpu_span_ns or 0) for d in devices) if devices else 1
    figure.update_xaxes(tickvals=[top * i / 4 for i in range(5)], ticktext=[text.ns(top * i / 4) for i in range(5)])
    return figure.update_layout(barmode="stack", height=240 + 40 * len(devices))


def shares(table: pl.DataFrame, label: str, value: str, title: str) -> go.Figure:
    """A ranked bar chart of a time column by a label column, longest on top."""
    ranked = table.sort(value, descending=False).tail(15)
    figure = go.Figure(
        go.Bar(
            y=list(range(ranked.height)),
            x=ranked[value],
            orientation="h",
            marker={"color": PALETTE[0]},
            text=[text.ns(v) for v in ranked[value]],
            hovertext=[literal(name) for name in ranked[label]],
            hoverinfo="text",
        )
    )
    _layout(figure, title, "time", "")
    figure.update_xaxes(showticklabels=False)
    figure.update_yaxes(
        tickvals=list(range(ranked.height)), ticktext=[literal(_short(str(name))) for name in ranked[label]]
    )
    return figure.update_layout(height=120 + 28 * max(ranked.height, 1), showlegend=False, margin={"b": 40})


def _short(name: str, limit: int = 48) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def coverage(expert_frac: Sequence[float], token_frac: Sequence[float]) -> go.Figure:
    """The Lorenz-like curve of routing: share of assignments that the hottest fraction of experts serves."""
    figure = go.Figure(go.Scatter(x=list(expert_frac), y=list(token_frac), mode="lines", line={"color": PALETTE[0]}))
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": "grey", "dash": "dash", "width": 1}, hoverinfo="skip"
    )
    _layout(figure, "How concentrated routing is", "hottest experts", "share of token assignments")
    figure.update_xaxes(tickformat=".0%")
    figure.update_yaxes(tickformat=".0%")
    return figure.update_layout(showlegend=False, height=320, margin={"b": 48})


def gantt(panels: Sequence[Panel], title: str = "One MoE layer", member: str = "GPU") -> go.Figure:
    """Who does what when in one MoE layer: panels on one time axis, a row for each GPU (`member`) and lane.

    Where a lane has several phases under way together, as in a fused kernel, later ones are drawn thinner, over the
    earlier. Of more than MAX_GPUS GPUs those are drawn that compute most, and as many that compute least.
    """
    n_all = max(one.n_gpus for one in panels)
    drawn = sorted(range(n_all), key=lambda gpu: (-sum(one.busy_ns(gpu) for one in panels), gpu))
    head = [title]
    if n_all > MAX_GPUS:
        half = MAX_GPUS // 2
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
        figure.add_vline(x=one.latency_ns, row=panel, col=1, line={"color": "grey", "dash": "dash", "width": 1})
    top = max(one.latency_ns for one in panels)
    step = next(round(10.0**p * m, 6) for p in range(-3, 20) for m in (1, 2, 5) if 10.0**p * m >= top / 10)
    ticks = [step * i for i in range(int(top / step) + 1)]
    words = [text.ns(tick) for tick in ticks]
    figure.update_xaxes(range=[0, top * 1.02], tickvals=ticks, ticktext=words, showticklabels=True)
    figure.update_xaxes(title="time since the layer began", row=len(panels), col=1)
    lines = [literal(line) for words in head for line in textwrap.wrap(words, 130)]
    above = 110 + 20 * len(lines)
    whole = height + above + 60
    return figure.update_layout(
        title={
            "text": "<br>".join([*lines, f"<span style='font-size:12px'>{HOW_TO_READ}</span>"]),
            "font": {"size": 15},
            "x": 0.01,
            "yref": "container",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 12},
        },
        legend={"orientation": "h", "yref": "container", "yanchor": "top", "y": 1 - (above - 65) / whole, "x": 0},
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
        i = DRAWN_PHASES.index(phase)
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
                marker={
                    "color": PALETTE[i % len(PALETTE)],
                    "pattern": {"shape": "/" if i >= len(PALETTE) else ""},
                    "line": {"width": 0.5, "color": "white"},
                },
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


def _has_overlaps(spans: Sequence[Span]) -> bool:
    """Whether a lane of a GPU has two spans under way at once."""
    until: dict[tuple[int, str], float] = {}
    for span in sorted(spans, key=lambda span: span.start_ns):
        if span.start_ns < until.get((span.gpu, span.lane), 0.0) * (1 - 1e-9):
            return True
        until[span.gpu, span.lane] = span.start_ns + span.dur_ns
    return False

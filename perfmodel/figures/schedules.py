"""Who does what when in an expert-parallel layer."""

import textwrap
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from perfmodel import text
from perfmodel.schedule.drawn import DRAWN_LANES, DRAWN_PHASES, Panel
from perfmodel.schedule.timeline import Span

from .drawing import PALETTE, literal

MAX_GPUS = 16  # of more, a Gantt is too tall to be seen at once
PANEL_GAP = 70  # pixels between panels of a Gantt: ticks and a title
HOW_TO_READ = (
    "A gap in compute is waiting. Thinner bars: phases that are under way together. Dashed: the end of what is drawn."
)


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

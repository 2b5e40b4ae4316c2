"""Where the time of a trace went."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from perfmodel import text
from perfmodel.analysis import Analysis
from perfmodel.launch import LaunchMetrics, delay_counts, joined_kernels
from perfmodel.report.traces import place
from perfmodel.timeline import step_windows, timeline, typical_step, whole_window

from .drawing import PALETTE, TIME_DECADES_NS, decades, layout, literal, short, time_ticks
from .timelines import lines_and_bars

IDLE = "#BBBBBB"
FEW = 3  # parts of a bar; of more, hatching would be in the way
HATCH = {"shape": "/", "fillmode": "overlay", "fgcolor": "white", "size": 7, "solidity": 0.25}
MOST_BARS = 15
MOST_MEMBERS = 16  # devices, say, with a bar or two each

Figures = list[tuple[go.Figure, str]]


def stacked(
    names: Sequence[str], series: Mapping[str, Sequence[float]], colours: Sequence[str], title: str, x: str
) -> go.Figure:
    """Bars of times that add up, one for each name from the top, in words when pointed at."""
    figure = go.Figure()
    for i, ((what, values), colour) in enumerate(zip(series.items(), colours, strict=True)):
        is_hatched = i == 1 and len(series) <= FEW  # told apart without colours too
        figure.add_bar(
            y=list(range(len(names))),
            x=list(values),
            name=literal(what),
            orientation="h",
            marker={"color": colour, "pattern": HATCH if is_hatched else {"shape": ""}},
            hovertext=[f"{literal(name)}: {literal(what)} {text.ns(v)}" for name, v in zip(names, values, strict=True)],
            hoverinfo="text",
        )
    layout(figure, title, x, "")
    totals = [sum(row) for row in zip(*series.values(), strict=True)]
    time_ticks(figure.layout.xaxis, max(totals, default=0) or 1)
    labels = [literal(short(str(name))) for name in names]
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=labels, autorange="reversed", automargin=True)
    figure.update_layout(legend={"traceorder": "normal"})
    return figure.update_layout(barmode="stack", height=190 + 34 * max(len(names), 1), margin={"b": 90})


def busy(metrics: LaunchMetrics) -> go.Figure:
    """Busy with kernels, busy with copies and sets alone, and idle time of each device, as stacked bars."""
    devices = [d for d in metrics.devices if d.gpu_span_ns]
    title = "Where device time goes"
    if len(devices) > MOST_MEMBERS:
        title += f": the {MOST_MEMBERS} of {text.count(len(devices))} devices that are idle longest"
        devices = sorted(devices, key=lambda d: d.gpu_busy_ns - (d.gpu_span_ns or 0))[:MOST_MEMBERS]
    names = [place(("rank", "device"), {"rank": d.rank, "device": d.device}) for d in devices]
    series = {
        "kernels": [d.kernel_busy_ns for d in devices],
        "copies and sets alone": [d.gpu_busy_ns - d.kernel_busy_ns for d in devices],
        "idle": [(d.gpu_span_ns or 0) - d.gpu_busy_ns for d in devices],
    }
    return stacked(names, series, (PALETTE[0], PALETTE[1], IDLE), title, "time from first to last device work")


def idle_reasons(gaps: pl.DataFrame) -> go.Figure:
    """What the host did while each device was idle between two pieces of work, from `overlap.launch_gaps`."""
    known = gaps.drop_nulls("launch_ns").sort("gap_ns", descending=True).head(MOST_MEMBERS)
    names = [place(("rank", "device"), row) for row in known.iter_rows(named=True)]
    words = {
        "in a launch call": "launch_ns",
        "waiting for the device": "sync_ns",
        "neither, such as Python and dispatch": "neither_ns",
    }
    series = {word: known[column].to_list() for word, column in words.items()}
    return stacked(names, series, (PALETTE[4], PALETTE[1], IDLE), "What the host did in idle gaps", "idle time")


def exposed(table: pl.DataFrame) -> go.Figure:
    """How much of copies and communication is hidden under compute on each device, from `overlap.exposed_time`."""
    names, hidden, shown = [], [], []
    most = table.sort(pl.col("copy_busy_ns") + pl.col("communication_busy_ns"), descending=True).head(MOST_MEMBERS)
    for row in most.sort("rank", "device").iter_rows(named=True):
        for word, label in (("copy", "copies"), ("communication", "communication")):
            if row[f"{word}_busy_ns"]:
                names.append(f"{place(('rank', 'device'), row)}: {label}")
                hidden.append(row[f"{word}_hidden_ns"])
                shown.append(row[f"{word}_exposed_ns"])
    series = {"hidden under compute": hidden, "exposed: no compute meanwhile": shown}
    return stacked(names, series, (PALETTE[0], PALETTE[1]), "Copies and communication beside compute", "busy time")


def shares(table: pl.DataFrame, label: str, value: str, title: str) -> go.Figure:
    """A ranked bar chart of a time column by a label column, longest on top; rows without a time are left out."""
    ranked = table.drop_nulls(value).sort(value, descending=True).head(MOST_BARS)
    figure = go.Figure(
        go.Bar(
            y=list(range(ranked.height)),
            x=ranked[value],
            orientation="h",
            marker={"color": PALETTE[0]},
            text=[text.ns(v) for v in ranked[value]],
            textposition="outside",
            cliponaxis=False,
            hovertext=[f"{literal(name)}<br>{text.ns(v)}" for name, v in ranked.select(label, value).iter_rows()],
            hoverinfo="text",
        )
    )
    layout(figure, title, "", "")
    longest = max([*ranked[value], 1])
    figure.update_xaxes(showticklabels=False, showgrid=False, zeroline=False, range=[0, 1.2 * longest])
    figure.update_yaxes(
        tickvals=list(range(ranked.height)),
        ticktext=[literal(text.shortened(str(name).removeprefix("void "), 48)) for name in ranked[label]],
        range=[max(ranked.height, 3) - 0.5, -0.5],
        automargin=True,
    )
    return figure.update_layout(height=100 + 26 * max(ranked.height, 3), showlegend=False, margin={"b": 20})


def groups(table: pl.DataFrame, by: str, value: str, words: str) -> go.Figure:
    """One launch metric of the groups of a trace, the largest on top, from `groups.launch_metrics_by`."""
    keys = [key for key in table.columns[: table.columns.index("n_launches")] if key in ("rank", "name", by, "device")]
    keys = ["rank", "name"] if "name" in table.columns else keys
    keys = [*keys, *(key for key in ("process",) if by == "thread")]
    named = table.with_columns(
        label=pl.Series([place(keys, row) for row in table.iter_rows(named=True)], dtype=pl.String)
    )
    n_more = f", {MOST_BARS} of {text.count(table.height)}" if table.height > MOST_BARS else ""
    return shares(named, "label", value, f"{words} by {by}{n_more}")


def delays(table: pl.DataFrame) -> go.Figure:
    """How long kernels waited for their launch, from `launch.delay_counts`: while the call went on, and after it."""
    figure = go.Figure()
    words = {
        "began before the launch call had returned": ("n_prompt", PALETTE[0], ""),
        "began after it had returned": ("n_queued", PALETTE[1], "/"),
    }
    for word, (column, colour, pattern) in words.items():
        figure.add_bar(
            x=(table["from_ns"] * table["to_ns"]).sqrt(),
            y=table[column],
            width=(table["to_ns"] - table["from_ns"]) * 0.94,
            name=word,
            marker={"color": colour, "pattern": {"shape": pattern, "fillmode": "overlay", "fgcolor": "white"}},
            hovertext=[
                f"{text.count(n)} kernels, {text.ns(low)} to {text.ns(high)}<br>{word}"
                for n, low, high in table.select(column, "from_ns", "to_ns").iter_rows()
            ],
            hoverinfo="text",
        )
    layout(
        figure,
        "How long kernels waited for their launch",
        "from start of the launch call to start of the kernel",
        "kernels",
    )
    decades(figure.layout.xaxis, TIME_DECADES_NS)
    return figure.update_layout(barmode="stack", height=360, bargap=0)


def one_step(found: Analysis) -> tuple[go.Figure, str]:
    """The step of median length, or the whole of a trace without steps, with what the picture shows in words."""
    events, work = found.trace.events, joined_kernels(found.trace.events)
    steps = step_windows(events, work)
    if steps.is_empty():
        title, window = "The whole trace", whole_window(events)
    else:
        row = steps.row(typical_step(steps), named=True)
        title, window = f"One step: {row['name']}", (row["start_ns"], row["end_ns"])
    drawn = timeline(events, *window, work)
    alt = ". ".join(["What every thread and stream did, from left to right", *drawn.notes])
    return lines_and_bars(drawn, title), alt + "."


def trace_figures(found: Analysis) -> Figures:
    """The figures of a report on one trace, the most telling first."""
    metrics = found.metrics
    drawn: list[Any] = []
    if metrics.devices:
        drawn.append((busy(metrics), "Busy and idle time of each device."))
    if metrics.n_kernels:
        drawn.append((shares(found.classes, "class", "time_ns", "Kernel time by class"), "Kernel time by class."))
    else:
        drawn.append((host_time(found), "The operators that take most time of the host themselves."))
    if not found.trace.events.is_empty():
        drawn.append(one_step(found))
    if metrics.n_kernels_joined:
        tax = shares(found.kernels, "name", "tklqt_ns", "Launch tax: TKLQT by kernel")
        drawn.append((delays(delay_counts(joined_kernels(found.trace.events))), "The distribution of launch delays."))
        drawn.append((tax, "The kernels that waited longest for their launch, all calls together."))
    if found.gaps["launch_ns"].count():
        drawn.append((idle_reasons(found.gaps), "What the host did while devices were idle."))
    if found.exposed.select(pl.sum("copy_busy_ns") + pl.sum("communication_busy_ns")).item():
        drawn.append((exposed(found.exposed), "Copies and communication, hidden under compute and exposed."))
    if found.groups is not None and found.by is not None:
        drawn.append((groups(found.groups, found.by, "tklqt_ns", "TKLQT"), f"TKLQT of each {found.by}."))
    return drawn


def host_time(found: Analysis) -> go.Figure:
    """The operators that take most time of the host, without what they call."""
    return shares(found.operators, "name", "self_ns", "Host time by operator, without what it calls")

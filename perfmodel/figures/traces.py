"""Where the time of a trace went."""

import plotly.graph_objects as go
import polars as pl

from perfmodel import text
from perfmodel.launch import LaunchMetrics

from .drawing import PALETTE, layout, literal, short, time_ticks


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
    layout(figure, "Where device time goes", "time from first to last device work", "")
    top = max((d.gpu_span_ns or 0) for d in devices) if devices else 1
    time_ticks(figure.layout.xaxis, top)
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
    layout(figure, title, "time", "")
    figure.update_xaxes(showticklabels=False)
    figure.update_yaxes(
        tickvals=list(range(ranked.height)), ticktext=[literal(short(str(name))) for name in ranked[label]]
    )
    return figure.update_layout(height=120 + 28 * max(ranked.height, 1), showlegend=False, margin={"b": 40})

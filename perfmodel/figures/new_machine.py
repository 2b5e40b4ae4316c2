"""A machine that has just arrived: what it reaches of what it is held against, and its roofline."""

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from .drawing import GUIDE, PALETTE, layout, literal
from .rooflines import roofline_figures

if TYPE_CHECKING:
    from perfmodel.regression.machine.new_machine import NewMachine

MARKS = {  # colour and symbol of each verdict, in the order of the legend
    "look at": (PALETTE[1], "triangle-down"),
    "healthy": (PALETTE[2], "circle"),
    "not judged": (PALETTE[6], "circle-open"),
}
ROW_PX = 26
SECTIONS = {"calibrated rates": "rate", "the sweep against a model": "sweep", "machine and software": "machine"}


def new_machine_figures(found: "NewMachine") -> list[tuple[go.Figure, str]]:
    """What a report shows of a machine: figures, each with what it shows in words."""
    drawn = []
    if any(item.least_frac is not None for item in found.items):
        words = "What the machine reaches of what it is held against, with the least that is sound"
        drawn.append((shares(found), words))
    return drawn + (roofline_figures(found.points) if found.points is not None else [])


def shares(found: "NewMachine") -> go.Figure:
    """A row for each item with a number: a point for the share found, a line for the least that is sound."""
    items = [item for item in found.items if item.frac is not None and item.least_frac is not None]
    names = [f"{SECTIONS.get(item.section, item.section)}: {item.name}" for item in items]
    figure = go.Figure()
    for verdict, (colour, symbol) in MARKS.items():
        chosen = [i for i, item in enumerate(items) if item.verdict == verdict]
        if chosen:
            figure.add_scatter(
                x=[items[i].frac for i in chosen],
                y=chosen,
                mode="markers",
                name=verdict,
                marker={"color": colour, "symbol": symbol, "size": 11},
                text=[literal(f"{items[i].name}: {items[i].words}") for i in chosen],
                hoverinfo="text",
            )
    figure.add_scatter(
        x=[item.least_frac for item in items],
        y=list(range(len(items))),
        mode="markers",
        name="least that is sound",
        marker={"symbol": "line-ns-open", "color": "grey", "size": 14, "line": {"width": 2}},
        hoverinfo="skip",
    )
    layout(figure, "Shares of what the machine is held against", "", "")
    figure.update_yaxes(
        tickvals=list(range(len(items))),
        ticktext=[literal(name) for name in names],
        autorange="reversed",
        automargin=True,
    )
    figure.update_xaxes(rangemode="tozero", tickformat=".0%")
    figure.add_vline(x=1, line=GUIDE, layer="below")
    return figure.update_layout(height=150 + ROW_PX * len(items), margin={"b": 80})

"""Experts over several GPUs or domains: policies and systems by their time, and how busy each part is."""

from collections.abc import Sequence

import plotly.graph_objects as go

from perfmodel import text
from perfmodel.balance import Comparison
from perfmodel.trimoe import Comparison as ThreeDomains

from .drawing import PALETTE, SYMBOLS, layout, literal, time_ticks


def _ranked(names: Sequence[str], times_ns: Sequence[float], marked: int, title: str) -> go.Figure:
    """Horizontal bars of times, in the order given from the top, one of them in another colour."""
    figure = go.Figure(
        go.Bar(
            y=[literal(name) for name in names],
            x=list(times_ns),
            orientation="h",
            marker={"color": [PALETTE[2 if i == marked else 0] for i in range(len(names))]},
            text=[text.ns(ns) for ns in times_ns],
            textposition="outside",
            cliponaxis=False,
            hoverinfo="y+text",
        )
    )
    layout(figure, title, "", "")
    time_ticks(figure.layout.xaxis, max(times_ns))
    figure.update_xaxes(range=[0, 1.18 * max(times_ns)])
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure.update_layout(showlegend=False, height=110 + 30 * len(names), margin={"b": 40})


def balance_figures(found: Comparison) -> list[tuple[go.Figure, str]]:
    """The time of a layer under each policy, from the rows of every expert where they are known, and for each GPU how
    much of it the GPU works, with words for each."""
    outcomes = found.outcomes
    by_rows = [one.layer_by_rows_ns for one in outcomes]
    has_rows = all(ns is not None for ns in by_rows)
    times = [ns for ns in by_rows if ns is not None] if has_rows else [one.layer_ns for one in outcomes]
    names = [one.policy for one in outcomes]
    title = "Time of a layer" + (", from the tokens of every expert" if has_rows else "")
    loads = go.Figure()
    for i, one in enumerate(outcomes):
        loads.add_scatter(
            x=list(range(len(one.idle_frac))),
            y=[1 - frac for frac in one.idle_frac],
            mode="markers",
            name=literal(one.policy),
            marker={"color": PALETTE[i % len(PALETTE)], "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 9},
            text=[
                f"{literal(one.policy)}, GPU {gpu}<br>works {text.frac(1 - idle)} of a layer, waited for in "
                f"{text.frac(last)} of layers"
                for gpu, (idle, last) in enumerate(zip(one.idle_frac, one.straggler_frac, strict=True))
            ],
            hoverinfo="text",
        )
    layout(loads, "How much of a layer each GPU works", "GPU", "of the layer's time")
    loads.update_xaxes(dtick=1 if len(outcomes[0].idle_frac) <= 32 else None)
    loads.update_yaxes(tickformat=".0%", range=[0, 1.05])
    return [
        (_ranked(names, times, found.best, title), f"Time of a layer by policy; best is {names[found.best]}"),
        (loads, "How much of a layer each GPU works, by policy"),
    ]


def trimoe_figures(found: ThreeDomains) -> list[tuple[go.Figure, str]]:
    """The experts of a decode step under each system, and how busy GPU, CPU and near-data modules are, with words for
    each."""
    system = found.system
    others = [one for one in (*found.baselines, *found.ladder, found.no_amx) if one is not None and one is not system]
    rows = [*others, system]
    names = [one.system.name for one in rows]
    used = go.Figure()
    for i, unit in enumerate(dict.fromkeys(unit for one in rows for unit in one.utilisation)):
        values = [one.utilisation.get(unit) for one in rows]
        used.add_bar(
            x=[literal(name) for name in names],
            y=values,
            name=unit.upper(),
            marker={"color": PALETTE[i]},
            hovertext=[f"{unit.upper()} busy {text.frac(value)}" for value in values],
            hoverinfo="text",
        )
    layout(used, "How busy each domain is", "", "of the experts' time")
    used.update_yaxes(tickformat=".0%", range=[0, 1.05])
    times = _ranked(names, [one.step_ns for one in rows], len(rows) - 1, "Experts of a decode step")
    return [
        (times, "Time of the experts of a decode step by system, the one asked for last"),
        (used.update_layout(barmode="group"), "How busy each domain is under each system"),
    ]

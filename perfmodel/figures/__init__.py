"""Tables and records in, Plotly figures out; the dashboard and reports draw nothing else."""

from .comparisons import (
    changes,
    diff_figures,
    fusion,
    fusion_figures,
    pass_parts,
    ranks,
    ranks_figures,
    sweep,
    sweep_figures,
    waits,
)
from .drawing import MAX_POINTS, PALETTE, SYMBOLS, literal
from .latency import BAND_FRAC, parity, roofline
from .page import html_page
from .placing import coverage, parts, slowdown
from .schedules import MAX_GPUS, gantt
from .timelines import lines_and_bars
from .traces import busy, delays, exposed, groups, host_time, idle_reasons, shares, trace_figures

__all__ = [
    "BAND_FRAC",
    "MAX_GPUS",
    "MAX_POINTS",
    "PALETTE",
    "SYMBOLS",
    "busy",
    "changes",
    "coverage",
    "delays",
    "diff_figures",
    "exposed",
    "fusion",
    "fusion_figures",
    "gantt",
    "groups",
    "host_time",
    "html_page",
    "idle_reasons",
    "lines_and_bars",
    "literal",
    "parity",
    "parts",
    "pass_parts",
    "ranks",
    "ranks_figures",
    "roofline",
    "shares",
    "slowdown",
    "sweep",
    "sweep_figures",
    "trace_figures",
    "waits",
]

"""Tables and records in, Plotly figures out; the dashboard and reports draw nothing else."""

from .drawing import MAX_POINTS, PALETTE, SYMBOLS, literal
from .latency import BAND_FRAC, parity, roofline
from .page import html_page
from .placing import coverage, parts, slowdown
from .schedules import MAX_GPUS, beside, gantt, phase_figures, schedule_figures, speedup, stacked
from .traces import busy, shares

__all__ = [
    "BAND_FRAC",
    "MAX_GPUS",
    "MAX_POINTS",
    "PALETTE",
    "SYMBOLS",
    "beside",
    "busy",
    "coverage",
    "gantt",
    "html_page",
    "literal",
    "parity",
    "parts",
    "phase_figures",
    "roofline",
    "schedule_figures",
    "shares",
    "slowdown",
    "speedup",
    "stacked",
]

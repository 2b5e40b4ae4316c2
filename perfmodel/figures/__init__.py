"""Tables and records in, Plotly figures out; the dashboard and reports draw nothing else."""

from .balancing import balance_figures, trimoe_figures
from .drawing import MAX_POINTS, PALETTE, SYMBOLS, literal
from .latency import BAND_FRAC, parity, roofline
from .page import html_page
from .passes import pass_figures, rank_figures, scaling_figures
from .placing import coverage, parts, slowdown
from .schedules import MAX_GPUS, beside, gantt, phase_figures, schedule_figures, speedup, stacked
from .traces import busy, shares

__all__ = [
    "BAND_FRAC",
    "MAX_GPUS",
    "MAX_POINTS",
    "PALETTE",
    "SYMBOLS",
    "balance_figures",
    "beside",
    "busy",
    "coverage",
    "gantt",
    "html_page",
    "literal",
    "parity",
    "parts",
    "pass_figures",
    "phase_figures",
    "rank_figures",
    "roofline",
    "scaling_figures",
    "schedule_figures",
    "shares",
    "slowdown",
    "speedup",
    "stacked",
    "trimoe_figures",
]

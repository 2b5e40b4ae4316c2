"""Tables and records in, Plotly figures out; the dashboard and reports draw nothing else."""

from .drawing import MAX_POINTS, PALETTE, SYMBOLS, literal
from .latency import BAND_FRAC, accuracy_figures, held_coverage, parity, residuals
from .page import html_page
from .placing import coverage, parts, slowdown
from .rooflines import roofline, roofline_figures
from .schedules import MAX_GPUS, gantt
from .traces import busy, shares

__all__ = [
    "BAND_FRAC",
    "MAX_GPUS",
    "MAX_POINTS",
    "PALETTE",
    "SYMBOLS",
    "accuracy_figures",
    "busy",
    "coverage",
    "gantt",
    "held_coverage",
    "html_page",
    "literal",
    "parity",
    "parts",
    "residuals",
    "roofline",
    "roofline_figures",
    "shares",
    "slowdown",
]

"""Tables and records in, Plotly figures out; the dashboard and reports draw nothing else."""

from .checks import check_figures, crossed, forest
from .drawing import MAX_POINTS, PALETTE, SYMBOLS, literal
from .latency import BAND_FRAC, parity, roofline
from .page import html_page
from .placing import coverage, parts, slowdown
from .schedules import MAX_GPUS, gantt
from .traces import busy, shares

__all__ = [
    "BAND_FRAC",
    "MAX_GPUS",
    "MAX_POINTS",
    "PALETTE",
    "SYMBOLS",
    "busy",
    "check_figures",
    "coverage",
    "crossed",
    "forest",
    "gantt",
    "html_page",
    "literal",
    "parity",
    "parts",
    "roofline",
    "shares",
    "slowdown",
]

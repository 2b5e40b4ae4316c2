"""Tables and records in, Plotly figures out; the dashboard and reports draw nothing else."""

from .drawing import MAX_POINTS, PALETTE, SYMBOLS, literal
from .latency import BAND_FRAC, accuracy_figures, held_coverage, parity, residuals
from .page import html_page
from .placing import parts, placing_figures, policies, prediction_figures, slowdown, trade_off, trade_off_of
from .rooflines import roofline, roofline_figures
from .routing import coverage, routing_figures, routing_map
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
    "placing_figures",
    "policies",
    "prediction_figures",
    "residuals",
    "roofline",
    "roofline_figures",
    "routing_figures",
    "routing_map",
    "shares",
    "slowdown",
    "trade_off",
    "trade_off_of",
]

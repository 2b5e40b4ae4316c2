"""Tables and records in, Plotly figures out; the dashboard and reports draw nothing else."""

from .balancing import balance_figures, trimoe_figures
from .checks import check_figures, crossed, forest
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
from .drawing import MAX_POINTS, inked, literal
from .latency import accuracy_figures, held_coverage, parity, residuals
from .new_machine import new_machine_figures
from .page import html_page
from .passes import pass_figures, rank_figures, scaling_figures
from .placing import parts, placing_figures, policies, prediction_figures, slowdown, trade_off, trade_off_of
from .rooflines import roofline, roofline_figures
from .routing import coverage, routing_figures, routing_map
from .schedules import MAX_GPUS, beside, gantt, phase_figures, schedule_figures, speedup, stacked
from .timelines import lines_and_bars
from .traces import busy, delays, exposed, groups, host_time, idle_reasons, shares, trace_figures

__all__ = [
    "MAX_GPUS",
    "MAX_POINTS",
    "accuracy_figures",
    "balance_figures",
    "beside",
    "busy",
    "changes",
    "check_figures",
    "coverage",
    "crossed",
    "delays",
    "diff_figures",
    "exposed",
    "forest",
    "fusion",
    "fusion_figures",
    "gantt",
    "groups",
    "held_coverage",
    "host_time",
    "html_page",
    "idle_reasons",
    "inked",
    "lines_and_bars",
    "literal",
    "new_machine_figures",
    "parity",
    "parts",
    "pass_figures",
    "pass_parts",
    "phase_figures",
    "placing_figures",
    "policies",
    "prediction_figures",
    "rank_figures",
    "ranks",
    "ranks_figures",
    "residuals",
    "roofline",
    "roofline_figures",
    "routing_figures",
    "routing_map",
    "scaling_figures",
    "schedule_figures",
    "shares",
    "slowdown",
    "speedup",
    "stacked",
    "sweep",
    "sweep_figures",
    "trace_figures",
    "trade_off",
    "trade_off_of",
    "trimoe_figures",
    "waits",
]

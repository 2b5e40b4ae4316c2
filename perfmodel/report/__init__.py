"""Text pages for people: what a trace, a fit, a comparison or a schedule says, as words and plain tables."""

from perfmodel.report.balance import balance_json, balance_page
from perfmodel.report.captures import check_page
from perfmodel.report.checks import capture_page, captures_page, findings_page
from perfmodel.report.fits import evaluation_page, fit_page
from perfmodel.report.headlines import capture_headlines
from perfmodel.report.layers import layer_ranks_page, pass_words, passes_page, scaling_page
from perfmodel.report.pairs import diff_page, fusion_page, sweep_page
from perfmodel.report.phases import efficiency_page, phases_json, phases_page, workload_head, workload_page
from perfmodel.report.placing import placing_json, placing_page
from perfmodel.report.ranks import ranks_page
from perfmodel.report.routing import MOST_LAYERS, routing_page
from perfmodel.report.schedule import schedule_head, schedule_json, schedule_page
from perfmodel.report.traces import coverage_text, findings_text, trace_page
from perfmodel.report.trimoe import trimoe_page
from perfmodel.report.words import N_TOP, WIDTH, table

__all__ = [
    "MOST_LAYERS",
    "N_TOP",
    "WIDTH",
    "balance_json",
    "balance_page",
    "capture_headlines",
    "capture_page",
    "captures_page",
    "check_page",
    "coverage_text",
    "diff_page",
    "efficiency_page",
    "evaluation_page",
    "findings_page",
    "findings_text",
    "fit_page",
    "fusion_page",
    "layer_ranks_page",
    "pass_words",
    "passes_page",
    "phases_json",
    "phases_page",
    "placing_json",
    "placing_page",
    "ranks_page",
    "routing_page",
    "scaling_page",
    "schedule_head",
    "schedule_json",
    "schedule_page",
    "sweep_page",
    "table",
    "trace_page",
    "trimoe_page",
    "workload_head",
    "workload_page",
]

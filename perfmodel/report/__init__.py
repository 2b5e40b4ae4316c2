"""Text pages for people: what a trace, a fit, a comparison or a schedule says, as words and plain tables."""

from perfmodel.report.balance import balance_json, balance_page
from perfmodel.report.baselines import (
    baseline_page,
    baseline_workload_page,
    baselines_page,
    saving_page,
    update_command,
)
from perfmodel.report.captures import (
    QUANTITY_HEADER,
    changed_lines,
    changed_tables,
    check_page,
    conclusion,
    quantity_cells,
    remarks,
)
from perfmodel.report.check_files import check_json, check_junit, check_markdown
from perfmodel.report.checks import capture_page, captures_page, findings_page
from perfmodel.report.fits import (
    LIMITS_HEADER,
    MODELS_HEADER,
    SHAPES_HEADER,
    evaluation_page,
    fit_page,
    limits,
    limits_page,
    models_rows,
    shape_rows,
)
from perfmodel.report.headlines import capture_headlines
from perfmodel.report.layers import layer_ranks_page, pass_words, passes_page, scaling_page
from perfmodel.report.new_machine import (
    new_machine_junit,
    new_machine_markdown,
    new_machine_page,
    new_machine_verdict,
)
from perfmodel.report.pairs import diff_page, fusion_page, sweep_page
from perfmodel.report.phases import (
    efficiency_page,
    error_rows,
    miss_words,
    phase_pairs,
    phases_json,
    phases_page,
    workload_head,
    workload_page,
)
from perfmodel.report.pictured import fastest_words, pictured_page, schedule_facts, stretch_words, why_words
from perfmodel.report.placing import (
    change_lines,
    labelled,
    placing_json,
    placing_page,
    policy_rows,
    prediction_facts,
    verdict_lines,
)
from perfmodel.report.ranks import ranks_page
from perfmodel.report.roofline import (
    CEILINGS_HEADER,
    COSTLIEST_HEADER,
    NO_DATASHEET,
    ceiling_rows,
    costliest_rows,
    lost_words,
    roofline_json,
    roofline_page,
)
from perfmodel.report.routing import MOST_LAYERS, routing_page
from perfmodel.report.schedule import schedule_head, schedule_json, schedule_page
from perfmodel.report.traces import coverage_text, findings_text, trace_page
from perfmodel.report.trimoe import trimoe_page
from perfmodel.report.words import N_TOP, WIDTH, table

__all__ = [
    "CEILINGS_HEADER",
    "COSTLIEST_HEADER",
    "LIMITS_HEADER",
    "MODELS_HEADER",
    "MOST_LAYERS",
    "NO_DATASHEET",
    "N_TOP",
    "QUANTITY_HEADER",
    "SHAPES_HEADER",
    "WIDTH",
    "balance_json",
    "balance_page",
    "baseline_page",
    "baseline_workload_page",
    "baselines_page",
    "capture_headlines",
    "capture_page",
    "captures_page",
    "ceiling_rows",
    "change_lines",
    "changed_lines",
    "changed_tables",
    "check_json",
    "check_junit",
    "check_markdown",
    "check_page",
    "conclusion",
    "costliest_rows",
    "coverage_text",
    "diff_page",
    "efficiency_page",
    "error_rows",
    "evaluation_page",
    "fastest_words",
    "findings_page",
    "findings_text",
    "fit_page",
    "fusion_page",
    "labelled",
    "layer_ranks_page",
    "limits",
    "limits_page",
    "lost_words",
    "miss_words",
    "models_rows",
    "new_machine_junit",
    "new_machine_markdown",
    "new_machine_page",
    "new_machine_verdict",
    "pass_words",
    "passes_page",
    "phase_pairs",
    "phases_json",
    "phases_page",
    "pictured_page",
    "placing_json",
    "placing_page",
    "policy_rows",
    "prediction_facts",
    "quantity_cells",
    "ranks_page",
    "remarks",
    "roofline_json",
    "roofline_page",
    "routing_page",
    "saving_page",
    "scaling_page",
    "schedule_facts",
    "schedule_head",
    "schedule_json",
    "schedule_page",
    "shape_rows",
    "stretch_words",
    "sweep_page",
    "table",
    "trace_page",
    "trimoe_page",
    "update_command",
    "verdict_lines",
    "why_words",
    "workload_head",
    "workload_page",
]

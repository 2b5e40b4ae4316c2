"""Three places for an expert: the GPU, the host's CPU, and the memory module that holds it (TriMoE, arXiv 2603.01058).

`costs` are what an expert takes in each place, `scheduler` who computes which, `prediction` what the next step will
need, `relayout` what is moved for it, `simulate` steps of a model under a system, `systems` TriMoE, its parts and what
it is compared with, `steps` the routing. `study` and `study_page` make docs/trimoe.md.
"""

from .costs import Costs, Machine, Options, Table, costs_of, machine_of, read_table
from .prediction import Accuracy, Bounds, accuracy, classify, ema
from .relayout import Layout, Relayout, Window, relayout
from .scheduler import Busy, busy, greedy, refine, schedule
from .simulate import Outcome, System, Workload, simulate, workload
from .study import Comparison, compare, made_workload, sensitivity
from .systems import BASELINES, LADDER, TRIMOE

__all__ = [
    "BASELINES",
    "LADDER",
    "TRIMOE",
    "Accuracy",
    "Bounds",
    "Busy",
    "Comparison",
    "Costs",
    "Layout",
    "Machine",
    "Options",
    "Outcome",
    "Relayout",
    "System",
    "Table",
    "Window",
    "Workload",
    "accuracy",
    "busy",
    "classify",
    "compare",
    "costs_of",
    "ema",
    "greedy",
    "machine_of",
    "made_workload",
    "read_table",
    "refine",
    "relayout",
    "schedule",
    "sensitivity",
    "simulate",
    "workload",
]

"""Regression checks: is a candidate slower than its baseline, and slower than a model says it should be."""

from perfmodel.regression.machine.items import HEALTHY, LOOK_AT, OPEN, Item
from perfmodel.regression.machine.new_machine import NewMachine, new_machine
from perfmodel.regression.traces.sides import of_trace, of_traces

from .against import (
    OUTSIDE_MODEL,
    SLOWER_THAN_MODEL,
    against_model,
    expected_ratio,
    model_for,
)
from .compared import (
    CELLS,
    CHASE,
    DEFAULT_FAILURES,
    EXPLAINED,
    FAILURES,
    FINE,
    NOT_JUDGED,
    ON_THE_TABLE,
    UNDECIDED,
    Case,
    Change,
    Comparison,
    Moved,
    compare,
)
from .evidence import AXES, AXIS_WORDS, Evidence, Measured, Run, axes_of, differences, of_capture, require_comparable
from .given import evidence, sides, store_of
from .packed import folders_below, refuse_large, unpack_sides
from .parts import PARTS, Detail, PartChange
from .spread import CONFIDENCE, OVERALL
from .verdicts import DEFAULT_MARGIN_FRAC, SLOWER, Verdict, check, is_slower, n_missing

__all__ = [
    "AXES",
    "AXIS_WORDS",
    "CELLS",
    "CHASE",
    "CONFIDENCE",
    "DEFAULT_FAILURES",
    "DEFAULT_MARGIN_FRAC",
    "EXPLAINED",
    "FAILURES",
    "FINE",
    "HEALTHY",
    "LOOK_AT",
    "NOT_JUDGED",
    "ON_THE_TABLE",
    "OPEN",
    "OUTSIDE_MODEL",
    "OVERALL",
    "PARTS",
    "SLOWER",
    "SLOWER_THAN_MODEL",
    "UNDECIDED",
    "Case",
    "Change",
    "Comparison",
    "Detail",
    "Evidence",
    "Item",
    "Measured",
    "Moved",
    "NewMachine",
    "PartChange",
    "Run",
    "Verdict",
    "against_model",
    "axes_of",
    "check",
    "compare",
    "differences",
    "evidence",
    "expected_ratio",
    "folders_below",
    "is_slower",
    "model_for",
    "n_missing",
    "new_machine",
    "of_capture",
    "of_trace",
    "of_traces",
    "refuse_large",
    "require_comparable",
    "sides",
    "store_of",
    "unpack_sides",
]

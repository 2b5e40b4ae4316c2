"""Regression checks: is a candidate slower than its baseline, and slower than a model says it should be.

Imports run one way: `evidence` and `parts` (records), then `spread`, `verdicts` and `against` (statistics), then
`traces` and `changes` (what a change consists of), `compared` (both questions crossed), then `saved` and
`machine`; on top `given` and `packed`, which read what people hand over.
"""

from perfmodel.regression.changes.calibrated import Moved
from perfmodel.regression.machine.items import HEALTHY, LOOK_AT, OPEN
from perfmodel.regression.machine.new_machine import NewMachine, new_machine
from perfmodel.regression.traces.sides import of_trace

from .against import OUTSIDE_MODEL, SLOWER_THAN_MODEL, against_model, model_for
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
    compare,
)
from .evidence import AXES, AXIS_WORDS, Evidence, Measured, Run, axes_of, differences, of_capture
from .given import evidence, sides, store_of
from .packed import folders_below, refuse_large, unpack_sides
from .parts import PARTS, Detail, PartChange
from .spread import OVERALL
from .verdicts import DEFAULT_MARGIN_FRAC, SLOWER, Verdict, check

__all__ = [
    "AXES",
    "AXIS_WORDS",
    "CELLS",
    "CHASE",
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
    "folders_below",
    "model_for",
    "new_machine",
    "of_capture",
    "of_trace",
    "refuse_large",
    "sides",
    "store_of",
    "unpack_sides",
]

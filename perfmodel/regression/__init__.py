"""Regression checks: is a candidate slower than its baseline, and slower than a model says it should be."""

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
from .evidence import AXES, AXIS_WORDS, Evidence, Measured, Run, differences, of_capture, require_comparable
from .given import evidence
from .packed import refuse_large, unpack_captures
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
    "NOT_JUDGED",
    "ON_THE_TABLE",
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
    "PartChange",
    "Run",
    "Verdict",
    "against_model",
    "check",
    "compare",
    "differences",
    "evidence",
    "expected_ratio",
    "is_slower",
    "model_for",
    "n_missing",
    "of_capture",
    "refuse_large",
    "require_comparable",
    "unpack_captures",
]

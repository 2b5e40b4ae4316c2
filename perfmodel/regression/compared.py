"""Both questions about a candidate, crossed: slower than the baseline, slower than the model; and what changed."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import polars as pl

from perfmodel.capture import Capture, profile_of
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.latency import LatencyModel
from perfmodel.regression.changes.attributed import Attribution, attribute
from perfmodel.regression.changes.calibrated import Moved, moved_quantities
from perfmodel.regression.changes.profiled import profile_details
from perfmodel.regression.traces.changes import changed_details, changed_parts, grown_part, require_same_work

from .against import (
    AS_EXPECTED,
    OUTSIDE_MODEL,
    SLOWER_THAN_MODEL,
    Expectation,
    against_model,
    datasheet_of,
    expected_ratio,
    judged_rows,
    model_for,
)
from .evidence import TRACES, Evidence, Measured, differences, doubts, is_declared, may_excuse, untold
from .parts import Detail, PartChange
from .spread import OVERALL
from .verdicts import DEFAULT_MARGIN_FRAC, SLOWER, Verdict, check

CHECK_SCHEMA = 1
CHASE, EXPLAINED, ON_THE_TABLE, FINE = "regression to chase", "explained", "left on the table", "fine"
UNDECIDED, NOT_JUDGED = "undecided", "not judged by the model"  # beside the four: one question has no answer
CELLS = (CHASE, EXPLAINED, ON_THE_TABLE, FINE, UNDECIDED, NOT_JUDGED)
IMPROVED, MISSING = "improved", "missing"
FAILURES = ("regressed", "explained", SLOWER_THAN_MODEL, IMPROVED, MISSING)  # what --fail-on may name
DEFAULT_FAILURES = ("regressed", SLOWER_THAN_MODEL)


@dataclass(frozen=True)
class Case:
    """One workload, or all of them, under both questions.

    `expectation` is null where no model judged it, `expected_ratio` what the model makes of the calibrated rates of
    both machines (null likewise), `datasheet` the same question with the ceilings of a datasheet (null without one),
    `part` the part of a slower workload's time that grew (one of `parts.PARTS`, null where none can be named).
    """

    verdict: Verdict
    expectation: Expectation | None
    expected_ratio: float | None
    datasheet: Expectation | None
    cell: str
    part: str | None = None


@dataclass(frozen=True)
class Change:
    """A fact of machine, software, kernel or settings in which the captures differ, and whether that was declared."""

    key: str
    baseline: object
    candidate: object
    is_declared: bool


@dataclass(frozen=True)
class Comparison:
    """A candidate held against a baseline and against a model; `cases` begin with all workloads together.

    `model` is null where no model could be had, and `no_model` says why. The model's answer to all together is over
    those workloads that it judged, and stands in no cell where these are the minority. `n_missing` counts workloads
    that only the other side measured, `lost` are those of the baseline that the candidate did not. `parts` tell what
    the change of time consists of, largest first, and `unexplained_frac` what they leave of the mean change (null
    without parts); `findings` say in sentences what parts cannot. `details` are the operators, classes and launch
    metrics of traces, `notes` what a reader must know of the sides. `update_command` takes an improvement over into a
    saved baseline, null where there is none.
    """

    baseline: str
    candidate: str
    margin_frac: float
    axes: tuple[str, ...]
    cases: tuple[Case, ...]
    changes: tuple[Change, ...]
    quantities: tuple[Moved, ...]
    model: str | None
    no_model: str | None
    datasheet: str | None
    n_missing: dict[str, int]
    parts: tuple[PartChange, ...] = ()
    unexplained_frac: float | None = None
    findings: tuple[str, ...] = ()
    details: tuple[Detail, ...] = ()
    notes: tuple[str, ...] = ()
    lost: tuple[Measured, ...] = ()
    update_command: str | None = None

    @property
    def overall(self) -> Case:
        """All workloads together."""
        return self.cases[0]

    @property
    def each(self) -> tuple[Case, ...]:
        """The workloads one by one, slowest against the baseline first."""
        return self.cases[1:]

    @property
    def n_judged(self) -> int:
        """How many workloads the model could judge: those it knows and that lie inside what it was fitted on."""
        return sum(_is_judged(case) for case in self.each)

    def cells(self) -> dict[str, int]:
        """How many workloads stand in each cell of the two questions crossed; those never met are zero."""
        return {name: sum(case.cell == name for case in self.each) for name in CELLS}

    def slower(self) -> list[Case]:
        """What is slower than the baseline, all workloads together among it."""
        return [case for case in self.cases if case.verdict.verdict in SLOWER]

    @property
    def is_divided(self) -> bool:
        """Whether pages tell the parts of the change: where anything is slower, or all together faster."""
        return bool(self.parts) and (bool(self.slower()) or self.overall.verdict.verdict == IMPROVED)

    def failures_of(self, case: Case, fail_on: Sequence[str] = DEFAULT_FAILURES) -> list[str]:
        """Which of the named conditions a case meets; raises InputError for an unknown one.

        `regressed`: slower than the baseline, and no declared change of the machine explains it. `explained`: slower,
        and the model explains it by the rates of another machine, declared as such. `slower-than-model`: longer than
        the model's interval allows, said of all workloads together alone, for of any twenty workloads one is expected
        to lie above a 90 % interval. `improved`: faster than the baseline, of all together alone for the same reason.
        `missing` is of no case, but of what is lost.
        """
        unknown = set(fail_on) - set(FAILURES)
        if unknown:
            raise InputError(f"unknown condition {min(unknown)!r}; known: {', '.join(FAILURES)}")
        # On what is said to be the same machine, rates that fell are the regression, not an excuse for it.
        is_slower = case.verdict.verdict in SLOWER
        is_explained = is_slower and may_excuse(self.axes) and case.cell == EXPLAINED
        expectation = case.expectation if case is self.overall and case.cell != NOT_JUDGED else None
        holds = {
            "regressed": is_slower and not is_explained,
            "explained": is_explained,
            SLOWER_THAN_MODEL: expectation is not None and expectation.verdict == SLOWER_THAN_MODEL,
            IMPROVED: case is self.overall and case.verdict.verdict == IMPROVED,
        }
        return [name for name in holds if name in fail_on and holds[name]]

    def failures(self, fail_on: Sequence[str] = DEFAULT_FAILURES) -> list[str]:
        """Which of the named conditions hold: those that any case meets, and `missing` where the candidate lost
        workloads of the baseline; raises InputError for an unknown one."""
        found = {name for case in self.cases for name in self.failures_of(case, fail_on)}
        found |= {MISSING} & set(fail_on) if self.lost else set()
        return [name for name in FAILURES if name in found]

    def exit_code(self, fail_on: Sequence[str] = DEFAULT_FAILURES, *, must_conclude: bool = False) -> int:
        """What a command ends with: 1 where a failure holds, 4 where all is inconclusive and must not be, else 0."""
        if self.failures(fail_on):
            return 1
        return 4 if must_conclude and self.overall.verdict.verdict == "inconclusive" else 0

    def table(self) -> pl.DataFrame:
        """One row a workload, slowest against the baseline first; null where no model judged it."""
        rows = [
            {
                "workload": case.verdict.label,
                "cell": case.cell,
                "verdict": case.verdict.verdict,
                "ratio": case.verdict.ratio,
                "ratio_low": case.verdict.ratio_low,
                "ratio_high": case.verdict.ratio_high,
                "baseline_ns": case.verdict.baseline_ns,
                "candidate_ns": case.verdict.candidate_ns,
                "expected_ratio": case.expected_ratio,
                "measured_over_model": None if case.expectation is None else case.expectation.ratio,
                "against_model": None if case.expectation is None else case.expectation.verdict,
                "n_more_runs": case.verdict.n_more_runs,
            }
            for case in self.each
        ]
        return pl.DataFrame(rows, infer_schema_length=None)

    def to_json(self, fail_on: Sequence[str] = DEFAULT_FAILURES, *, must_conclude: bool = False) -> dict[str, Any]:
        """All of it as plain values, with what a command asked to fail by these conditions ends with."""
        return {
            "schema_version": CHECK_SCHEMA,
            "baseline": self.baseline,
            "candidate": self.candidate,
            "margin_frac": self.margin_frac,
            "axes": list(self.axes),
            "is_slower": bool(self.slower()),
            "fail_on": [name for name in FAILURES if name in fail_on],
            "failures": self.failures(fail_on),
            "exit_code": self.exit_code(fail_on, must_conclude=must_conclude),
            "model": self.model,
            "no_model": self.no_model,
            "datasheet": self.datasheet,
            "cells": [{"cell": name, "n_workloads": n} for name, n in self.cells().items()],
            "n_missing_workloads": self.n_missing,
            "lost_workloads": [{"workload": one.workload, "label": one.label} for one in self.lost],
            "verdicts": [_case_json(case) for case in self.cases],
            "changes": [asdict(change) for change in self.changes],
            "quantities": [asdict(moved) for moved in self.quantities],
            "parts": [asdict(part) for part in self.parts],
            "unexplained_frac": self.unexplained_frac,
            "findings": list(self.findings),
            "details": [asdict(detail) for detail in self.details],
            "notes": list(self.notes),
            "update_command": self.update_command,
        }


def _case_json(case: Case) -> dict[str, Any]:
    def plain(one: Expectation | None) -> dict[str, Any] | None:
        if one is None:
            return None
        return {key: value for key, value in asdict(one).items() if key not in ("workload", "label")} | {
            "measured_over_model": one.ratio
        }

    return asdict(case.verdict) | {
        "cell": case.cell,
        "expected_ratio": case.expected_ratio,
        "part": case.part,
        "against_model": plain(case.expectation),
        "against_datasheet": plain(case.datasheet),
    }


def compare(
    baseline: Evidence,
    candidate: Evidence,
    margin_frac: float = DEFAULT_MARGIN_FRAC,
    axes: Sequence[str] = (),
    model: LatencyModel | None = None,
    datasheet: HardwareProfile | None = None,
    *,
    with_model: bool = True,
) -> Comparison:
    """A candidate against a baseline, and against a model carried to the candidate's machine as it was calibrated.

    `model` is null for that of the baseline (`model_for`); where none can be had, the second question stays open and
    the comparison says why. `datasheet` holds nominal ceilings for the second question, null for the shipped profile of
    the candidate's GPU, if there is one. Raises NotComparableError as `check` does, and InputError for a given model or
    datasheet that does not fit the candidate.
    """
    are_traces = baseline.kind == candidate.kind == TRACES
    how_told = require_same_work(baseline, candidate) if are_traces else []
    verdicts = check(baseline, candidate, margin_frac, axes)
    first, other = baseline.capture, candidate.capture
    quantities = () if first is None or other is None else tuple(moved_quantities(first, other))
    judged = _Judged(no_model="no model was asked for")
    if with_model:
        judged = _judged(first, other, model, datasheet, verdicts, margin_frac)
    found, details = Attribution(), tuple[Detail, ...]()
    if are_traces:
        parts, details = changed_parts(baseline, candidate), changed_details(baseline, candidate)
        grown = grown_part(parts)
        slower = [verdict.workload for verdict in verdicts if verdict.verdict in SLOWER]
        found = Attribution(parts=parts, part_of=dict.fromkeys(slower, grown))
    elif with_model and first is not None and other is not None:
        found = attribute(baseline, candidate, verdicts, quantities, margin_frac, judged.own)
        details = profile_details(first, other)
    cases = judged.cases or [Case(verdict, None, None, None, NOT_JUDGED) for verdict in verdicts]
    said = (
        *doubts(baseline, candidate),
        *untold(baseline, candidate, axes),
        *baseline.notes,
        *candidate.notes,
        *how_told,
    )
    cases = [replace(case, part=found.part_of.get(case.verdict.workload)) for case in cases]
    lost = tuple(one for key, one in baseline.workloads.items() if key not in candidate.workloads)
    return Comparison(
        baseline=baseline.name,
        candidate=candidate.name,
        margin_frac=margin_frac,
        axes=tuple(axes),
        cases=tuple(cases),
        changes=tuple(
            Change(key, a, b, is_declared(key, axes)) for key, (a, b) in differences(baseline, candidate).items()
        ),
        quantities=quantities,
        model=judged.model,
        no_model=judged.no_model,
        datasheet=judged.datasheet,
        n_missing={"baseline": len(candidate.workloads.keys() - baseline.workloads.keys()), "candidate": len(lost)},
        parts=found.parts,
        unexplained_frac=found.unexplained_frac,
        findings=found.findings,
        details=details,
        notes=tuple(dict.fromkeys(said)),
        lost=lost,
    )


@dataclass(frozen=True)
class _Judged:
    """The second question answered: the cases, by which model and datasheet; without cases, why by none.

    `own` is a model of the baseline's own, null where another was given or none can be had.
    """

    cases: tuple[Case, ...] = ()
    model: str | None = None
    no_model: str | None = None
    datasheet: str | None = None
    own: LatencyModel | None = None


def _judged(
    baseline: Capture | None,
    candidate: Capture | None,
    model: LatencyModel | None,
    datasheet: HardwareProfile | None,
    verdicts: Sequence[Verdict],
    margin_frac: float,
) -> _Judged:
    is_given = model is not None or datasheet is not None
    if baseline is None or candidate is None:
        why_not = "a model judges captures, not traces"
        if is_given:
            raise InputError(f"{why_not}: leave out --model and --hardware")
        return _Judged(no_model=why_not)
    own = None
    try:
        used = model or model_for(baseline)
        own = used if model is None else None
        nominal = datasheet or datasheet_of(candidate)
        cases = _cases(baseline, candidate, used, nominal, verdicts, margin_frac)
    except InputError as error:
        if is_given:
            raise
        return _Judged(no_model=str(error), own=own)
    return _Judged(tuple(cases), used.profile.name, None, None if nominal is None else nominal.name, own)


def _cases(
    baseline: Capture,
    candidate: Capture,
    model: LatencyModel,
    datasheet: HardwareProfile | None,
    verdicts: Sequence[Verdict],
    margin_frac: float,
) -> list[Case]:
    """The verdicts with what the model says of each."""
    only = [verdict.workload for verdict in verdicts if verdict.workload != OVERALL]
    found = {one.workload: one for one in against_model(candidate, model, None, only)}
    nominal = [] if datasheet is None else against_model(candidate, model, datasheet, only)
    by_datasheet = {one.workload: one for one in nominal}
    rows = judged_rows(candidate, model, only)
    ratios = expected_ratio(model, rows, profile_of(baseline), profile_of(candidate))
    expected = dict(zip(rows["workload"], map(float, ratios), strict=True))
    inside = [found[key].verdict != OUTSIDE_MODEL for key in expected]
    logs = [math.log(ratio) for ratio, is_in in zip(expected.values(), inside, strict=True) if is_in or not any(inside)]
    expected[OVERALL] = math.exp(math.fsum(logs) / len(logs))
    cases = []
    for verdict in verdicts:
        key = verdict.workload
        case = Case(verdict, found.get(key), expected.get(key), by_datasheet.get(key), NOT_JUDGED)
        cases.append(replace(case, cell=cell_of(case, margin_frac)))
    if 2 * sum(map(_is_judged, cases[1:])) < len(only):  # a minority says nothing of the whole
        cases[0] = replace(cases[0], cell=NOT_JUDGED)
    return cases


def _is_judged(case: Case) -> bool:
    return case.expectation is not None and case.expectation.verdict != OUTSIDE_MODEL


def cell_of(case: Case, margin_frac: float) -> str:
    """Where a workload stands when both questions are crossed.

    A slower one is explained only where the measurement lies within the model's interval and the calibrated rates of
    both machines account for it: the model's ratio, with the margin, reaches the measured interval. Rates so low that
    the measurement lies below the model's interval are not those that it was measured at, and explain nothing.
    """
    expectation, expected = case.expectation, case.expected_ratio
    if expectation is None or expected is None or not _is_judged(case):
        return NOT_JUDGED
    if case.verdict.verdict == "inconclusive":
        return UNDECIDED
    is_above = expectation.verdict == SLOWER_THAN_MODEL
    if case.verdict.verdict not in SLOWER:
        return ON_THE_TABLE if is_above else FINE
    accounts = case.verdict.ratio_low <= expected * (1 + margin_frac)
    return EXPLAINED if accounts and expectation.verdict == AS_EXPECTED else CHASE

"""What moved between two sides of traces: parts of a step's time, operators, kernel classes and launch metrics."""

from typing import TYPE_CHECKING

from perfmodel import text
from perfmodel.report.words import HEADERS, N_TOP, ratio

if TYPE_CHECKING:  # these bring scipy and scikit-learn, which reading a trace does not need
    from perfmodel.regression import Comparison, Detail

STEP_NS = "step_ns"
LEAST_FRAC = 0.001  # of the step, below which a change is not shown
_TITLES = {"operator": "operators", "class": "kernel classes", "metric": "launch metrics"}
_WORDS = {**HEADERS, "gpu_idle_ns": "devices idle"}
_SIDES = ("baseline", "candidate", "change", "ratio")


def trace_lines(comparison: "Comparison") -> list[str]:
    """What a step took on both sides and in which part it changed; none of captures."""
    step = next((one for one in comparison.details if one.name == STEP_NS), None)
    if step is None or step.baseline is None or step.candidate is None:
        return []
    of = comparison.each[0].verdict.label
    change_ns = step.candidate - step.baseline
    lines = [f"{of}: {text.ns(step.baseline)} to {text.ns(step.candidate)} ({_signed(change_ns)})"]
    moved = [one for one in comparison.parts if abs(one.change_frac) >= LEAST_FRAC]
    if moved:
        parts = (
            f"{one.part} {_signed(one.change_frac * step.baseline)}" + (f" ({one.evidence})" if one.evidence else "")
            for one in moved
        )
        lines.append(f"of that {'; '.join(parts)}")
    return lines


def moved_tables(comparison: "Comparison") -> list[tuple[list[str], list[list[str]]]]:
    """Headers and rows, as words, of what a step consists of and of what moved most in it; none of captures."""
    step = next((one for one in comparison.details if one.name == STEP_NS), None)
    if step is None or not step.baseline:
        return []
    of = f"of a {comparison.each[0].verdict.label}"
    parts = []
    for one in comparison.parts:
        times = (share * step.baseline for share in (one.share_frac, one.share_frac + one.change_frac))
        parts.append([one.part, *_sides("time_ns", *times), ratio(one.factor)])
    tables = [([f"parts of the time {of}", *_SIDES], parts)]
    for kind, title in _TITLES.items():
        rows = [one for one in comparison.details if one.kind == kind and one is not step]
        if kind != "metric":
            rows = [one for one in rows if abs(one.change_frac or 0.0) >= LEAST_FRAC]
        tables.append(([f"{title} {of}", *_SIDES], [_cells(one) for one in rows[:N_TOP]]))
    return [(head, rows) for head, rows in tables if rows]


def _cells(one: "Detail") -> list[str]:
    is_metric = one.kind == "metric"
    name = _WORDS.get(one.name, one.name) if is_metric else one.name
    return [name, *_sides(one.name if is_metric else "time_ns", one.baseline, one.candidate), ratio(one.ratio)]


def _sides(unit: str, old: float | None, new: float | None) -> list[str]:
    """Both sides and the change between them as words, by the unit at the end of a name."""
    change = (new or 0.0) - (old or 0.0)
    is_same = abs(change) <= LEAST_FRAC * max(abs(old or 0.0), abs(new or 0.0))
    sides = ("-" if side is None else text.figure(unit, side) for side in (old, new))
    return [*sides, "same" if is_same else _signed(change, unit)]


def _signed(change: float, unit: str = "time_ns") -> str:
    return f"{'+' if change > 0 else ''}{text.figure(unit, change)}"

"""What the profiled traces of two captures say of their structure: kernels, idle devices, where operators' time goes.

A profiler slows the host down, and captures time nothing under it. Its traces are therefore no source of times: what is
told here are counts and shares of the profiled time.
"""

from collections.abc import Mapping

import polars as pl

from perfmodel.capture import Capture
from perfmodel.diff import TraceDiff, diff
from perfmodel.errors import InputError
from perfmodel.readers import read_trace
from perfmodel.readers.limits import Limits
from perfmodel.regression.parts import Detail

LIMITS = Limits()  # of one profile, for a stranger's may unpack without end
N_DETAILS = 12
LEAST_MOVED_FRAC = 0.02  # of the profiled time, that an operator's share must move by to be told
LEAST_RATIO = 1.02  # by which counts must differ


def profile_details(baseline: Capture, candidate: Capture) -> tuple[Detail, ...]:
    """What moved in the points that both captures profiled, means over these: launch metrics and operators.

    Of kind `metric`, named as what they count (`n_kernels`, `gpu_idle_frac`) or as the operator and its share of the
    profiled time (`aten::mm self_frac`), the greatest change first; empty where no point was profiled on both sides.
    """
    theirs = {path.name: path for path in candidate.traces}
    found: list[Mapping[str, tuple[float | None, float | None]]] = []
    for path in baseline.traces:
        if path.name not in theirs or not (path.is_file() and theirs[path.name].is_file()):
            continue
        try:
            a, b = (read_trace(one, limits=LIMITS) for one in (path, theirs[path.name]))
            found.append(_structure(diff(a, b)))
        except InputError:
            continue  # a damaged or empty profile: points that both sides have are told
    names = list(dict.fromkeys(name for one in found for name in one))
    details = [_detail(name, [one[name] for one in found if name in one]) for name in names]
    moved = [one for one in details if one is not None]
    return tuple(sorted(moved, key=lambda one: -abs(_size(one)))[:N_DETAILS])


def _structure(found: TraceDiff) -> dict[str, tuple[float | None, float | None]]:
    """Counts by step and shares of both sides."""
    steps = (found.n_steps_a, found.n_steps_b) if found.per_step else (1, 1)
    metrics = {name: (a, b) for name, a, b in found.metrics.select("metric", "a", "b").iter_rows()}
    told = {
        name: (_over(a, steps[0]), _over(b, steps[1]))
        for name, (a, b) in metrics.items()
        if name in ("n_kernels", "n_kernels_graph") and (a or b)
    }
    if metrics["gpu_idle_frac"] != (None, None):
        told["gpu_idle_frac"] = metrics["gpu_idle_frac"]
    kernels, waits = metrics["kernel_time_ns"], metrics["tklqt_ns"]
    if kernels[0] and kernels[1]:
        told["tklqt_per_kernel_time"] = (_over(waits[0], kernels[0]), _over(waits[1], kernels[1]))
    time = "self_ns" if found.classes.is_empty() else "kernel_time_ns"
    table = found.operators.filter(pl.col("part") == "operator")
    sums = [float(table[f"{time}_{side}"].sum()) for side in "ab"]
    for name, a, b in table.select("name", f"{time}_a", f"{time}_b").iter_rows():
        if all(sums):
            told[f"{name} self_frac"] = ((a or 0.0) / sums[0], (b or 0.0) / sums[1])
    return told


def _over(value: float | None, n: float) -> float | None:
    return None if value is None else value / n


def _detail(name: str, pairs: list[tuple[float | None, float | None]]) -> Detail | None:
    """The mean over profiled points, null where nothing moved."""
    sides = [[pair[side] for pair in pairs if pair[side] is not None] for side in (0, 1)]
    a, b = (sum(x for x in side if x is not None) / len(side) if side else None for side in sides)
    if a is None or b is None:
        return Detail("metric", name, a, b, None, None)
    ratio = b / a if a else None
    if name.endswith("_frac"):
        is_moved = abs(b - a) >= LEAST_MOVED_FRAC
    else:
        is_moved = ratio is None or max(ratio, 1 / max(ratio, 1e-12)) >= LEAST_RATIO
    return Detail("metric", name, a, b, ratio, None) if is_moved else None


def _size(detail: Detail) -> float:
    """How telling a detail is: by how much a share moved, or the part by which a count did."""
    if detail.baseline is None or detail.candidate is None:
        return 1.0
    change = detail.candidate - detail.baseline
    return change if detail.name.endswith("_frac") else change / max(abs(detail.baseline), 1e-12)

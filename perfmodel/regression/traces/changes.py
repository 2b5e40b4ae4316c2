"""Is the work of two sides of traces the same, and what of a step's time changed."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
import polars as pl

from perfmodel import text
from perfmodel.capture_lines import Physical
from perfmodel.classify import COMMUNICATION
from perfmodel.errors import InputError, NotComparableError
from perfmodel.regression.evidence import Evidence, Measured
from perfmodel.regression.parts import PARTS, Detail, PartChange
from perfmodel.regression.spread import LEAST_VARIANCE, Variance, half_width

from .parts import CLASS, COMPUTE_CLASSES, IDLE_NS, METRIC, OPERATOR, PART, STEP_NS, key_of, multiplies_or_attends

# Shares of the work that must be on both sides. In public traces (docs/regression-traces.md) the same work has
# 1.00 of FLOPs and at least 0.88 of calls; twice the tokens has 0.50 of FLOPs, another model none and at most 0.47 of
# calls.
LEAST_SAME_FLOPS_FRAC = 0.9
LEAST_SAME_CALLS_FRAC = 0.7
LEAST_SAME_AMOUNT_FRAC = (
    0.9  # of calls that most of the time is in, beyond which there is more or less of the same work
)
LEAST_OPERATORS_FRAC = 0.5  # of the time, below which operators do not say what the work is: graphs replay it
NOTABLE_FRAC, NOTABLE_CALLS_FRAC = 0.001, 0.05  # of FLOPs, and of the time, from which a difference is told
LEAST_AMOUNT = 1e-9  # ns, or a count, of a step, below which there is nothing
_MOVED_SHOWN, _MOVED_LEAST_FRAC = 2, 0.1  # classes named as evidence, and of the change of the first what others need
NO_SHAPES = (
    "the traces do not tell the shapes of matrix products (record_shapes), so that another batch size would be taken "
    "for another speed"
)


def mean_of(side: Evidence, key: str) -> float | None:
    """What a detail is in a mean run of a side, a run without it counting as 0; null where no run has it."""
    found = side.details.get(key)
    if found is None:
        return None
    mean = math.fsum(found.run_ns.values()) / len(side.runs)
    return mean if abs(mean) >= LEAST_AMOUNT else 0.0


def require_same_work(baseline: Evidence, candidate: Evidence) -> list[str]:
    """Refuse sides whose steps do other work; returns what a reader must know of how that was told.

    Matrix products must be the same by operands (`k` x `n`, batch, experts) for LEAST_SAME_FLOPS_FRAC of the FLOPs of
    the larger side, which no GPU and no library changes, but another batch or model does. Of gradients of an expert's
    weights `k` is its rows, which change with the tokens: what operands leave over is matched by results. Operators
    must be called as often for LEAST_SAME_CALLS_FRAC of the time, so that one that was added or fused away is a change
    and no other work, and most of them as often within LEAST_SAME_AMOUNT_FRAC, for a longer recording is no slower one;
    where operators do not hold most of the time, as with CUDA graphs, kernels of each class. Names of kernels
    are not looked at. Raises NotComparableError naming what differs most.
    """
    for side in (baseline, candidate):
        _require_facts(side)
    if baseline.workloads.keys() != candidate.workloads.keys():
        ways = " and ".join(f"{side.name!r} by its {next(iter(side.workloads))}" for side in (baseline, candidate))
        raise NotComparableError(
            f"not comparable: traces are judged by the best that marks their steps, {ways}; record both with the same "
            "ranges around their steps, such as those of torch.profiler.schedule"
        )
    return [*_same_products(baseline, candidate), *_same_calls(baseline, candidate)]


class _Facts(msgspec.Struct):
    """What a detail says of itself, which a saved baseline may have from anybody."""

    kind: Literal["operator", "class", "metric", "part"]
    name: str | None = None
    part: str | None = None
    n_calls: Physical | None = None
    shape: str | None = None
    n_flops: Physical | None = None
    n_kernels: Physical | None = None


_NEEDED = {OPERATOR: ("name", "part", "n_calls"), CLASS: ("n_kernels",)}


def _require_facts(side: Evidence) -> None:
    for key, one in side.details.items():
        try:
            facts = msgspec.convert(one.facts, _Facts)
        except msgspec.ValidationError as error:
            raise InputError(f"{side.name!r}: the facts of detail {text.shortened(key, 80)!r}: {error}") from None
        needed = (*_NEEDED.get(facts.kind, ()), *(("shape",) if facts.n_flops else ()))
        missing = [name for name in needed if getattr(facts, name) is None]
        if missing:
            raise InputError(f"{side.name!r}: the facts of detail {text.shortened(key, 80)!r} lack {missing[0]}")


def _same_products(baseline: Evidence, candidate: Evidence) -> list[str]:
    a, b = _flops(baseline), _flops(candidate)
    if not a or not b:
        return [NO_SHAPES]
    shapes = [*a, *(shape for shape in b if shape not in a)]
    most = max(math.fsum(a.values()), math.fsum(b.values()))
    result = {**_results(baseline), **_results(candidate)}
    alone: tuple[dict[str, float], ...] = ({}, {})  # what one side alone computes, by its result
    for shape in shapes:
        excess, key = a.get(shape, 0.0) - b.get(shape, 0.0), result.get(shape, shape)
        for found, more in zip(alone, (excess, -excess), strict=True):
            found[key] = found.get(key, 0.0) + max(more, 0.0)
    same = math.fsum(min(a.get(shape, 0.0), b.get(shape, 0.0)) for shape in shapes)
    same = (same + math.fsum(map(min, alone[0].values(), alone[1].values()))) / most

    def apart(shape: str) -> float:
        """The FLOPs of a shape in which the sides differ, but for those that others of its result make up for."""
        key = result.get(shape, shape)
        return min(abs(a.get(shape, 0.0) - b.get(shape, 0.0)), abs(alone[0][key] - alone[1][key]))

    worst = max(shapes, key=apart)
    either = (one for side in (baseline, candidate) for one in side.details.values())
    label = next(one.label for one in either if one.facts.get("shape") == worst)
    sides = " and ".join(
        f"{text.count(one.get(worst, 0.0))} FLOP on the {side}" for one, side in ((a, "baseline"), (b, "candidate"))
    )
    words = f"{text.frac(same)} of the FLOPs of matrix products are on both sides; {label}: {sides} in a step"
    if same < LEAST_SAME_FLOPS_FRAC:
        raise NotComparableError(f"not comparable: another model or batch size: only {words}")
    return [words] if same < 1 - NOTABLE_FRAC else []


def _flops(side: Evidence) -> dict[str, float]:
    """What a step computes in products of each shape, whatever the operator: others fuse a bias, or take fp8."""
    found: dict[str, float] = {}
    for one in side.details.values():
        if one.facts.get("n_flops"):
            found[one.facts["shape"]] = found.get(one.facts["shape"], 0.0) + one.facts["n_flops"]
    return found


def _results(side: Evidence) -> dict[str, str]:
    """By shape the rows and columns of what products of this shape result in, where these are always the same."""
    found: dict[str, set[str | None]] = {}
    for one in side.details.values():
        if one.facts.get("n_flops"):
            found.setdefault(one.facts["shape"], set()).add(one.facts.get("result"))
    return {shape: f"to {only}" for shape, (only, *more) in found.items() if only is not None and not more}


def _calls(side: Evidence, *, with_flops: bool) -> dict[str, tuple[float, float]] | None:
    """How often a step calls each operator, and for how long; null where most of the time is in none.

    With FLOPs, which are compared by themselves, matrix products count as one call, whichever operators they are.
    """
    found: dict[str, tuple[float, float]] = {}
    all_ns = 0.0
    for key, one in side.details.items():
        if one.facts["kind"] != OPERATOR:
            continue
        time_ns = mean_of(side, key) or 0.0
        all_ns += time_ns
        if one.facts["part"] == "operator":
            is_product = with_flops and "shape" in one.facts
            name = "matrix products" if is_product else one.facts["name"]
            n_calls, so_far_ns = found.get(name, (0.0, 0.0))
            found[name] = (1.0 if is_product else n_calls + one.facts["n_calls"], so_far_ns + time_ns)
    known_ns = math.fsum(time_ns for _, time_ns in found.values())
    return found if known_ns > 0 and known_ns >= LEAST_OPERATORS_FRAC * all_ns else None


def _kernels(side: Evidence) -> dict[str, tuple[float, float]]:
    return {
        one.label: (one.facts["n_kernels"], mean_of(side, key) or 0.0)
        for key, one in side.details.items()
        if one.facts["kind"] == CLASS
    }


def _same_calls(baseline: Evidence, candidate: Evidence) -> list[str]:
    with_flops = bool(_flops(baseline) and _flops(candidate))
    a, b = (_calls(side, with_flops=with_flops) for side in (baseline, candidate))
    of, notes = "calls of operators", []
    if a is None or b is None:
        a, b, of = _kernels(baseline), _kernels(candidate), "kernels of each class"
        notes.append("operators do not tell most of the work, so that it was compared by kernels of each class alone")
    if not a or not b:
        return ["neither operators nor kernels tell whether both sides did the same work"]
    totals = [math.fsum(time_ns for _, time_ns in side.values()) or 1.0 for side in (a, b)]
    nothing = (0.0, 0.0)

    def apart(name: str) -> float:
        """The part of the time, as a mean of both sides, that calls on one side alone take."""
        (n, time_ns), (m, other_ns) = a.get(name, nothing), b.get(name, nothing)
        return (time_ns / totals[0] + other_ns / totals[1]) / 2 * (1 - min(n, m) / max(n, m, 1e-9))

    names = [*a, *(name for name in b if name not in a)]
    same = 1 - math.fsum(map(apart, names))
    worst = max(names, key=apart)
    counts = [f"{side.get(worst, nothing)[0]:,.4g}" for side in (a, b)]
    words = (
        f"{of} are as many for {text.frac(same)} of the time of a step; {worst}: {counts[0]} in a step of "
        f"the baseline, {counts[1]} of the candidate"
    )
    if same < LEAST_SAME_CALLS_FRAC:
        raise NotComparableError(f"not comparable: another model or other settings: {words}")
    typical = _typical_ratio(a, b)
    if not LEAST_SAME_AMOUNT_FRAC <= typical <= 1 / LEAST_SAME_AMOUNT_FRAC:
        raise NotComparableError(
            f"not comparable: more or less of the same work: most {of} are {typical:.2f} times as many on the "
            f"candidate, as in a longer recording or with more layers; {words}"
        )
    return [*notes, words] if same < 1 - NOTABLE_CALLS_FRAC else notes


def _typical_ratio(a: Mapping[str, tuple[float, float]], b: Mapping[str, tuple[float, float]]) -> float:
    """How many times as many calls the second side makes: the median over what both call, weighted with its time, which
    one that was added or fused away does not move."""
    both = sorted((b[name][0] / a[name][0], a[name][1] + b[name][1]) for name in a if name in b and a[name][0])
    times = np.cumsum([time_ns for _, time_ns in both])
    return both[int(np.searchsorted(times, times[-1] / 2))][0] if both else 1.0


def changed_parts(baseline: Evidence, candidate: Evidence) -> tuple[PartChange, ...]:
    """What the change of a step's time consists of, the largest first: PARTS of the wall time, which sum to it.

    Means over the runs of a side; intervals by Welch over the runs, where both sides have several that have the part.
    """
    step_ns = mean_of(baseline, key_of(METRIC, STEP_NS)) or 1.0
    found = []
    for part in PARTS:
        key = key_of(PART, part)
        old, new = (mean_of(side, key) or 0.0 for side in (baseline, candidate))
        if not old and not new:
            continue
        low, high = _factor_interval(baseline.details.get(key), candidate.details.get(key))
        factor = new / old if old else None
        evidence = _evidence(part, baseline, candidate)
        found.append(PartChange(part, old / step_ns, (new - old) / step_ns, factor, low, high, evidence))
    return tuple(sorted(found, key=lambda one: -abs(one.change_frac)))


def _factor_interval(a: Measured | None, b: Measured | None) -> tuple[float | None, float | None]:
    """The interval (`spread.half_width`) of how many times longer a part takes, null where runs do not tell."""
    if a is None or b is None:
        return None, None
    runs = [list(one.run_ns.values()) for one in (a, b)]
    if min(map(len, runs)) < 2 or min(map(min, runs)) < LEAST_AMOUNT:
        return None, None
    logs = [np.log(one) for one in runs]
    factor = float(logs[1].mean() - logs[0].mean())
    variances = [Variance(max(float(one.var(ddof=1)), LEAST_VARIANCE) / len(one), len(one) - 1) for one in logs]
    half = half_width(variances)
    return math.exp(factor - half), math.exp(factor + half)


def _evidence(part: str, baseline: Evidence, candidate: Evidence) -> str:
    """What a part's change rests on: the classes of kernels that moved most, operators on the host, counts of calls."""
    sides = (baseline, candidate)
    if part in ("compute", "memory", "communication"):
        either = {key: one for side in sides for key, one in side.details.items()}
        named = {key: one.label for key, one in either.items() if one.facts["kind"] == CLASS}
        parts = {key: part_of_class(name) for key, name in named.items()}
        if not named:  # no device
            named = {key: one.label for key, one in either.items() if one.facts["kind"] == OPERATOR}
            names = pl.Series([str(either[key].facts["name"]) for key in named], dtype=pl.String)
            computes = multiplies_or_attends(names.cast(pl.Categorical)).to_list()
            parts = {key: "compute" if yes else "memory" for key, yes in zip(named, computes, strict=True)}
        moved = []
        for key in sorted(key for key in named if parts[key] == part):
            old, new = (mean_of(side, key) or 0.0 for side in sides)
            moved.append((abs(new - old), f"{named[key]} {text.ns(old)} to {text.ns(new)}"))
        moved.sort(reverse=True)
        return ", ".join(words for by, words in moved[:_MOVED_SHOWN] if by >= _MOVED_LEAST_FRAC * moved[0][0])
    if part == "launch":
        counts = [mean_of(side, key_of(METRIC, "n_launches")) for side in sides]
        return f"devices idle during launch calls, {text.count(counts[0])} to {text.count(counts[1])} of them"
    return {"copy exposure": "copies under no kernel", "host": "nothing runs that was launched or called"}.get(part, "")


def part_of_class(name: str) -> str:
    """Which part of the wall time a kernel class counts to."""
    return "communication" if name in COMMUNICATION else "compute" if name in COMPUTE_CLASSES else "memory"


def changed_details(baseline: Evidence, candidate: Evidence) -> tuple[Detail, ...]:
    """Operators, kernel classes and launch metrics of both sides, in this order, what adds most to the step first."""
    step_ns = mean_of(baseline, key_of(METRIC, STEP_NS)) or 1.0
    found: list[Detail] = []
    for kind in (OPERATOR, CLASS, METRIC):
        either: Mapping[str, Measured] = {**candidate.details, **baseline.details}
        rows = [
            _detail(kind, either[key], mean_of(baseline, key), mean_of(candidate, key), step_ns)
            for key in either
            if either[key].facts["kind"] == kind
        ]
        found += sorted(rows, key=lambda one: (-abs(one.change_frac or 0.0), one.name))
    return tuple(found)


def _detail(kind: str, one: Measured, old: float | None, new: float | None, step_ns: float) -> Detail:
    is_time = kind != METRIC or one.label in (STEP_NS, IDLE_NS)
    ratio = new / old if old and new is not None else None
    change = ((new or 0.0) - (old or 0.0)) / step_ns if is_time else None
    return Detail(kind, one.label, old, new, ratio, change)


def grown_part(parts: Sequence[PartChange]) -> str | None:
    """The part that grew most, null where none did."""
    grown = max(parts, key=lambda one: one.change_frac, default=None)
    return grown.part if grown is not None and grown.change_frac > 0 else None

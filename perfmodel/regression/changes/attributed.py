"""Which part of the time changed between two captures: launch, compute, memory, link, copies, host; or none of them.

Each part takes f times as long on the candidate, the same f for all workloads; workloads differ in what their time
consists of (`division`), so that a sweep itself says which part it was, also where no calibration can: something that
ran beside it, another setting of a library. Workloads that changed for themselves are told apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from perfmodel.errors import InputError
from perfmodel.latency import LatencyModel
from perfmodel.physics import Array
from perfmodel.regression.evidence import Evidence
from perfmodel.regression.parts import PartChange
from perfmodel.regression.spread import OVERALL
from perfmodel.regression.verdicts import SLOWER, Verdict

from .alone import what_they_share
from .calibrated import Moved
from .division import CAUSES, EXPOSURE, REPLAY, Division, divide
from .factors import Fit, Sides, fit_changes, interval_of, sides_of

Interval = tuple[float, float, float]

ALONE_SIGMAS = 3.0  # from which on a workload's change is its own
# What adds less than this beside the largest part, and changed by less than this part of its change, may come from an
# error of the largest part's shares.
LEAST_BESIDE_FRAC, LEAST_CHANGE_FRAC = 0.15, 0.5
# A few rows read an expert's weights for as long as a kernel computes on rows that it does not have, so that a sweep
# may say no more than that: constants held at multiples of what fits best, which give such time to the other roof.
OTHER_SHARES: tuple[Mapping[str, float], ...] = (
    {"eff_memory": 0.6},
    {"call_rows": 0.3, "tile_overhead_rows": 0.3},
)
MOST_WORSE = 1.3  # how many times a fit's own errors may be those of another that is believed as well
LEAST_BIG_FRAC = 0.05  # of the time, from which on a part is asked whether it changed like all others

# The calibrated quantities that tell of a part, as beginnings or ends of their names.
TELLS = {
    "launch": ("call_overhead_ns", "launch_overhead_ns", "null_kernel_ns"),
    REPLAY: ("graph_launch_ns", "graph_kernel_ns"),
    "compute": ("bf16_gemm", "fp16_gemm", "fp8_gemm", "fp32_gemm", "tf32_gemm"),
    "memory": ("memory_stream", "memory_copy", "memory_triad"),
    "link": ("link_",),
    EXPOSURE: (),
    "host": ("host_",),
}
LONGER, SHORTER, SAME, OPEN, SMALL = "longer", "shorter", "unchanged", "open", "small"


@dataclass(frozen=True)
class Attribution:
    """What a change of time consists of.

    `parts` tell it over all workloads, largest first; `part_of` names the part of a workload (and of OVERALL) that is
    slower, null where none can be named; `unexplained_frac` is what the parts leave of the mean change, null where
    nothing could be divided; `findings` say in sentences what the parts cannot: which ones the workloads cannot tell
    apart, which workloads changed alone and what they share.
    """

    parts: tuple[PartChange, ...] = ()
    part_of: Mapping[str, str | None] = field(default_factory=dict)
    unexplained_frac: float | None = None
    findings: tuple[str, ...] = ()


def attribute(
    baseline: Evidence,
    candidate: Evidence,
    verdicts: Sequence[Verdict],
    moved: Sequence[Moved],
    margin_frac: float,
    model: LatencyModel | None = None,
) -> Attribution:
    """What the change of time between two captures consists of; `verdicts` are those of `check` with this margin,
    `moved` the calibrated quantities of both sides, `model` one of the baseline's own (null: constants are fitted).

    A part is named only where the whole 90 % interval of its factor lies above the margin; a workload's where that part
    is most of what it changed by. Where the baseline cannot be divided, a finding says why.
    """
    if baseline.capture is None or candidate.capture is None:
        return Attribution()
    asked = [verdict.workload for verdict in verdicts if verdict.workload != OVERALL]
    try:
        division = divide(baseline.capture, asked, model)
    except InputError as error:
        return Attribution(findings=(f"What the change consists of is not known: {error}.",))
    keys = division.keys
    log_ratio, noise, sides = sides_of(baseline, candidate, keys)
    clusters = division.facts["shape"].rank("dense").to_numpy().astype(np.int64)
    fit = fit_changes(log_ratio, noise, division, clusters)
    intervals = [interval_of(direction, fit, sides) for direction in np.eye(len(division.causes))]
    added = division.added(fit.changes)
    states = _states(division, fit, intervals, np.abs(added.mean(axis=0)), margin_frac)
    alike = _alike(division, states, intervals)
    if any(state in (LONGER, SHORTER) for state in states):
        others = [divide(baseline.capture, asked, model, held) for held in OTHER_SHARES]
        most = MOST_WORSE * _size_of(division.misfit)
        for other in (one for one in others if one.keys == keys and _size_of(one.misfit) <= most):
            again = fit_changes(log_ratio, noise, other, clusters)
            states = _confirmed(states, division, added.mean(axis=0), other, again, sides, margin_frac)
    slower = {verdict.workload for verdict in verdicts if verdict.verdict in SLOWER}
    is_alone = (fit.left > np.maximum(ALONE_SIGMAS * fit.sigma, log_ratio / 2)) & np.array([k in slower for k in keys])
    named = {
        key: None if is_alone[i] else _largest(added[i], float(np.expm1(log_ratio[i])), division.causes, states)
        for i, key in enumerate(keys)
        if key in slower
    }
    whole = float(np.expm1(log_ratio).mean())
    if OVERALL in slower and not alike:
        named[OVERALL] = _largest(added.mean(axis=0), whole, division.causes, states)
    parts = [
        _part(i, division, intervals[i], states[i], float(added[:, i].mean()), moved)
        for i in range(len(division.causes))
    ]
    unexplained = whole - float(added.mean(axis=0).sum())
    return Attribution(
        parts=tuple(sorted(parts, key=lambda part: -abs(part.change_frac))),
        part_of=named,
        unexplained_frac=unexplained,
        findings=(
            *alike,
            *_together(division, fit, sides, states, added.mean(axis=0), margin_frac),
            *what_they_share(division.facts, is_alone),
            *(f"{n} workloads could not be divided into parts: {why}." for why, n in division.left_out.items()),
        ),
    )


def _confirmed(
    states: Sequence[str],
    division: Division,
    added: Array,
    other: Division,
    again: Fit,
    sides: Sides,
    margin_frac: float,
) -> list[str]:
    """The states that a fit to another division of the same workloads does not contradict, OPEN where it does.

    The part that adds most must add at least half as much there; of lesser ones it must say the same.
    """
    intervals = [interval_of(direction, again, sides) for direction in np.eye(len(other.causes))]
    sizes = other.added(again.changes).mean(axis=0)
    told = _states(other, again, intervals, np.abs(sizes), margin_frac)
    there = {cause: (state, size) for cause, state, size in zip(other.causes, told, sizes.tolist(), strict=True)}
    found = []
    for i, (cause, state) in enumerate(zip(division.causes, states, strict=True)):
        said, size = there.get(cause, (OPEN, 0.0))
        holds = size / added[i] >= LEAST_CHANGE_FRAC if i == np.abs(added).argmax() else said == state
        found.append(OPEN if state in (LONGER, SHORTER) and not holds else state)
    return found


def _size_of(misfit: Array) -> float:
    return float(np.sqrt(np.mean(misfit**2)))


def _states(division: Division, fit: Fit, intervals: Sequence[Interval], sizes: Array, margin_frac: float) -> list[str]:
    """Whether each part takes longer: by its interval, and where it is needed and not small beside the largest."""
    logs = np.abs(fit.changes)
    is_small = (sizes < LEAST_BESIDE_FRAC * sizes.max()) & (logs < LEAST_CHANGE_FRAC * logs[sizes.argmax()])
    found = [_state(cause, interval, margin_frac) for cause, interval in zip(division.causes, intervals, strict=True)]
    for i, state in enumerate(found):
        if state in (LONGER, SHORTER) and (is_small[i] or not fit.is_needed[i]):
            found[i] = SMALL if is_small[i] else OPEN
    return found


def _state(cause: str, interval: Interval, margin_frac: float) -> str:
    """Whether a part takes longer, by the same rule as workloads."""
    _, low, high = interval
    margin = margin_frac if cause == EXPOSURE else float(np.log1p(margin_frac))
    if low > margin:
        return LONGER
    if high < -margin:
        return SHORTER
    return SAME if -margin <= low and high <= margin else OPEN


def _largest(added: Array, change: float, causes: Sequence[str], states: Sequence[str]) -> str | None:
    """The part that a change lies in: one that takes longer and adds at least half of it and of what all parts add."""
    by_part: dict[str, float] = {}
    for cause, frac, state in zip(causes, added.tolist(), states, strict=True):
        by_part[CAUSES[cause]] = by_part.get(CAUSES[cause], 0.0) + frac * (state == LONGER)
    part = max(by_part, key=lambda one: by_part[one])
    return part if by_part[part] >= max(change, float(added[added > 0].sum())) / 2 > 0 else None


def _part(
    i: int,
    division: Division,
    interval: Interval,
    state: str,
    change_frac: float,
    moved: Sequence[Moved],
) -> PartChange:
    cause = division.causes[i]
    share = float(division.shares[:, i].mean())
    value, low, high = (float(np.exp(x)) for x in interval)
    evidence = _evidence(cause, state, interval, moved)
    if cause != EXPOSURE:
        return PartChange(CAUSES[cause], share, change_frac, value, low, high, evidence)
    if share == 0 or interval[0] == 0:
        return PartChange(CAUSES[cause], share, change_frac, None, None, None, evidence)
    # A share of an overlap that was lost adds to what was exposed before.
    value, low, high = (1 + x * change_frac / interval[0] / share for x in interval)
    return PartChange(CAUSES[cause], share, change_frac, value, low, high, evidence)


def _evidence(cause: str, state: str, interval: Interval, moved: Sequence[Moved]) -> str:
    """What a part's factor rests on in words: what the sweep says, and whether the calibration agrees."""
    words = {
        LONGER: "longer in the sweep",
        SHORTER: "shorter in the sweep",
        SAME: "unchanged in the sweep",
        OPEN: "the sweep cannot tell",
        SMALL: "too little beside the largest part to be told from an error of its shares",
    }[state]
    if cause == REPLAY:
        words = f"calls replayed from graphs: {words}"
    known = [one for one in moved if one.key.startswith(TELLS[cause]) and one.moved]
    told = [f"{one.key} {_became(one)}" for one in known if one.moved != "same"]
    if not TELLS[cause]:
        return f"{words}; no calibration measures it"
    if not known:
        return f"{words}; not calibrated on both sides"
    if told:
        return f"{words}; {', '.join(told)}{_agreement(state, interval, known)}"
    if state == LONGER:
        return (
            f"{words}; calibration shows no change: look at what ran at the time of the sweep, or a setting of the "
            "library"
        )
    return f"{words}; calibration shows no change"


def _agreement(state: str, interval: Interval, known: Sequence[Moved]) -> str:
    """How calibrated quantities that moved agree with a factor, as the end of a sentence; empty where they do."""
    _, low, high = interval
    logs = [float(np.log(one.ratio or 1.0)) * (1 if one.key.endswith("_ns") else -1) for one in known]
    if state not in (LONGER, SHORTER):
        return ", which the sweep does not show" if high < min(logs) or max(logs) < low else ""
    if state == SHORTER:
        low, high, logs = -high, -low, [-log for log in logs]
    if max(logs) <= 0:
        return ", which does not account for it"
    if max(logs) < low:
        return ", which accounts for a part of it"
    return ", more than the sweep shows" if min(logs) > high else ""


def _became(one: Moved) -> str:
    ratio = one.ratio or 1.0
    note = "" if one.is_alike else " (measured in another way)"
    return f"{'fell' if ratio < 1 else 'rose'} to {ratio:.2f}x{note}"


def _alike(division: Division, states: Sequence[str], intervals: Sequence[Interval]) -> list[str]:
    """A sentence where all parts take longer, several beyond doubt, by what may be the same factor."""
    big = [
        i
        for i in range(len(states))
        if division.shares[:, i].mean() > LEAST_BIG_FRAC and division.causes[i] != EXPOSURE
    ]
    low, high = max(intervals[i][1] for i in big), min(intervals[i][2] for i in big)
    n_longer = sum(states[i] == LONGER for i in big)
    if n_longer < 2 or low > high or any(states[i] not in (LONGER, OPEN) for i in big):
        return []
    return [
        f"All parts take longer alike, about {np.exp((low + high) / 2):.2f}x: look at clocks, power limits and what "
        "ran beside before any single part."
    ]


def _together(
    division: Division,
    fit: Fit,
    sides: Sides,
    states: Sequence[str],
    sizes: Array,
    margin_frac: float,
) -> list[str]:
    """Sentences on parts that only together are slower beyond doubt."""
    weights = fit.slopes.mean(axis=0)
    unsettled = [i for i, state in enumerate(states) if state == OPEN and weights[i] > 0]
    for chosen in (some for n in range(2, len(unsettled) + 1) for some in combinations(unsettled, n)):
        names = list(dict.fromkeys(CAUSES[division.causes[i]] for i in chosen))
        if len(names) == 1 or sizes[list(chosen)].sum() < LEAST_BESIDE_FRAC * np.abs(sizes).max():
            continue
        direction = np.zeros(len(states))
        direction[list(chosen)] = weights[list(chosen)] / weights[list(chosen)].sum()
        value, low, high = interval_of(direction, fit, sides)
        if low > np.log1p(margin_frac):
            words = " or ".join(names)
            return [
                f"{words[0].upper()}{words[1:]} takes longer, together {np.exp(value):.2f}x ({np.exp(low):.2f} to "
                f"{np.exp(high):.2f}); these workloads cannot tell which."
            ]
    return []

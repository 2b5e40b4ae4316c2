"""Is the candidate slower than the baseline: comparability first, then an interval on run medians per workload."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perfmodel.errors import InputError, NotComparableError

from .evidence import Evidence, require_comparable, require_same_content
from .spread import CONFIDENCE, OVERALL, Mean, Variance, both_means, combined, half_width, quantile, tail

DEFAULT_MARGIN_FRAC = 0.03
MARGIN_LEVEL = (1 - CONFIDENCE) / 2  # chance of an alarm where the candidate is slower by exactly the margin
# The same where nothing changed, however large the noise: 1 % in all, the lesser part of it for single workloads, whose
# variances are lent and less sure (docs/decisions/0036).
NO_CHANGE_LEVEL, EACH_NO_CHANGE_LEVEL = 0.0075, 0.0025
POWER = 0.8  # chance that the runs asked for suffice
MOST_MORE_RUNS = 1 << 16  # what would take more is not helped by runs
SLOWER = ("regressed", "suspect")  # verdicts that say so


@dataclass(frozen=True)
class Verdict:
    """One workload compared: candidate over baseline as a ratio with its 90 % interval, and what it means.

    `ok` says slower by no more than the margin; `inconclusive` that the runs cannot tell, with `n_more_runs` wanted on
    each side (null where more runs of this kind cannot help); `suspect` slower, but resting on an assumed spread
    between runs, because a side has only one. `baseline_ns` and `candidate_ns` are the geometric means over its runs.
    """

    workload: str
    label: str
    ratio: float
    ratio_low: float
    ratio_high: float
    n_runs_baseline: int
    n_runs_candidate: int
    verdict: str
    n_more_runs: int | None
    baseline_ns: float
    candidate_ns: float


def check(
    baseline: Evidence, candidate: Evidence, margin_frac: float = DEFAULT_MARGIN_FRAC, axes: Sequence[str] = ()
) -> list[Verdict]:
    """Candidate against baseline: first all workloads together, then each, slowest first.

    A run (a fresh process) is the sampling unit; where a side has three occasions, they are. What is called slower (or
    faster) is so beyond the margin (MARGIN_LEVEL) and beyond doubt that it changed at all (NO_CHANGE_LEVEL), and single
    ones stay so under Holm's correction over all. Raises NotComparableError when the sides differ outside `axes` or
    share no workload, or mean other work by one id.
    """
    if not 0 < margin_frac < 10:
        raise InputError(f"margin is {margin_frac:g}, expected a fraction above 0 and below 10, such as 0.03 for 3 %")
    require_comparable(baseline, candidate, axes)
    common = [key for key in baseline.workloads if key in candidate.workloads]
    if not common:
        raise NotComparableError(f"not comparable: the {baseline.kind}s share no workload")
    labels = {OVERALL: OVERALL} | {key: baseline.workloads[key].label for key in common}
    a, b = both_means(baseline, candidate, common)
    require_same_content(baseline, candidate)
    margin = math.log1p(margin_frac)
    (overall,) = _verdicts([OVERALL], labels, a, b, margin, NO_CHANGE_LEVEL)
    each = _verdicts(common, labels, a, b, margin, EACH_NO_CHANGE_LEVEL)
    return [overall, *sorted(each, key=lambda v: -v.ratio)]


def _verdicts(
    keys: Sequence[str], labels: dict[str, str], a: dict[str, Mean], b: dict[str, Mean], margin: float, level: float
) -> list[Verdict]:
    """The verdicts on workloads that are one family for Holm's correction; `level` is that of no change."""
    gaps = [b[key].log_ns - a[key].log_ns for key in keys]
    spreads = [combined([*a[key].parts, *b[key].parts]) for key in keys]
    slower, faster = (
        _holm([_excess(sign * gap, margin, spread, level) for gap, spread in zip(gaps, spreads, strict=True)])
        for sign in (1, -1)
    )
    found = []
    for i, key in enumerate(keys):
        gap, half = gaps[i], half_width([spreads[i]])
        more = None
        if slower[i]:
            verdict = "suspect" if min(a[key].n_units, b[key].n_units) < 2 else "regressed"
        elif faster[i]:
            verdict = "improved"
        elif gap + half < margin:
            verdict = "ok"
        else:
            verdict, more = "inconclusive", n_more_runs(gap, margin, a[key], b[key], level, len(keys))
        ratios = math.exp(gap), math.exp(gap - half), math.exp(gap + half)
        times = math.exp(a[key].log_ns), math.exp(b[key].log_ns)
        found.append(Verdict(key, labels[key], *ratios, a[key].n_runs, b[key].n_runs, verdict, more, *times))
    return found


def _excess(gap: float, margin: float, spread: Variance, level: float) -> float:
    """The larger of two one-sided p-values, each over its level: of no more than the margin, and of no change."""
    se = math.sqrt(spread.value)
    beyond, at_all = (tail(excess / se, spread.df) for excess in (gap - margin, gap))
    return max(beyond / MARGIN_LEVEL, at_all / level)


def n_more_runs(
    gap: float, margin: float, a: Mean, b: Mean, level: float, n_family: int = 1, *, n_least: int = 1
) -> int | None:
    """Runs wanted on each side, `n_least` or more, to tell a difference of `gap` (log units) with a chance of POWER;
    null where no number would do, because what runs cannot show hides it."""
    wanted = [(max(abs(gap - margin), margin / 2), MARGIN_LEVEL)]
    if gap > margin:  # Holm's first step
        wanted = [(wanted[0][0], MARGIN_LEVEL / n_family), (gap, level / n_family)]

    def suffices(n_more: int) -> bool:
        spread = combined([*a.parts_with(n_more), *b.parts_with(n_more)])
        se, power = math.sqrt(spread.value), quantile(POWER, spread.df)
        return all(size >= (quantile(1 - chance, spread.df) + power) * se for size, chance in wanted)

    if not suffices(MOST_MORE_RUNS):
        return None
    low, high = n_least - 1, MOST_MORE_RUNS  # too few, enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def _holm(levels: Sequence[float]) -> list[bool]:
    """Which hypotheses Holm's step-down procedure rejects, from p-values over the family-wise level (Holm 1979)."""
    rejected = [False] * len(levels)
    for rank, index in enumerate(np.argsort(levels)):
        if levels[index] > 1 / (len(levels) - rank):
            break
        rejected[index] = True
    return rejected

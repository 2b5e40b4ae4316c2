"""Is the candidate slower than the baseline: comparability first, then an interval on run medians per workload."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from perfmodel.errors import InputError, NotComparableError

from .evidence import Evidence, alternate, require_comparable
from .spread import CONFIDENCE, OVERALL, Mean, combined, drift_of, means_of

DEFAULT_MARGIN_FRAC = 0.03
POWER = 0.8  # chance that the runs asked for suffice
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

    A run (a fresh process) is the sampling unit; where a side has three occasions, they are. Per-workload regressions
    are kept only where Holm's correction over all workloads keeps them. Raises NotComparableError when the sides differ
    outside `axes` or share no workload.
    """
    if not 0 < margin_frac < 10:
        raise InputError(f"margin is {margin_frac:g}, expected a fraction above 0, such as 0.03 for 3 %")
    require_comparable(baseline, candidate, axes)
    common = [key for key in baseline.workloads if key in candidate.workloads]
    if not common:
        raise NotComparableError(f"not comparable: the {baseline.kind}s share no workload")
    labels = {key: baseline.workloads[key].label for key in common}
    a, b = both_means(baseline, candidate, common)
    compared = [_compare(key, labels[key], a[key], b[key], margin_frac) for key in common]
    overall, _ = _compare(OVERALL, OVERALL, a[OVERALL], b[OVERALL], margin_frac)
    kept = _holm([p for _, p in compared], (1 - CONFIDENCE) / 2)
    verdicts = [
        v if keep or v.verdict not in SLOWER else _as_inconclusive(v)
        for (v, _), keep in zip(compared, kept, strict=True)
    ]
    return [overall, *sorted(verdicts, key=lambda v: -v.ratio)]


def both_means(baseline: Evidence, candidate: Evidence, keys: Sequence[str]) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """The means of these workloads on both sides, with what drifts between them.

    Where one side has three occasions, they show the drift of the other; runs that took turns drifted alike.
    """
    drifts = [drift_of(side, keys) for side in (baseline, candidate)]
    if not any(drifts) and alternate(baseline, candidate):
        drifts = [{}, {}]
    return means_of(baseline, keys, drifts[1]), means_of(candidate, keys, drifts[0])


def _compare(workload: str, label: str, a: Mean, b: Mean, margin_frac: float) -> tuple[Verdict, float]:
    """A verdict on one workload, before correction for many, with its one-sided p-value."""
    d, spread, m = b.log_ns - a.log_ns, combined([*a.parts, *b.parts]), math.log1p(margin_frac)
    se = math.sqrt(spread.value)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, spread.df)) * se
    low, high = d - half, d + half
    more = None
    if low > m:
        verdict = "suspect" if min(a.n_units, b.n_units) < 2 else "regressed"
    elif high < -m:
        verdict = "improved"
    elif high < m:
        verdict = "ok"
    else:
        verdict = "inconclusive"
        more = _n_more_runs(max(abs(d - m), m / 2), a, b)
    ratio, ratio_low, ratio_high = math.exp(d), math.exp(low), math.exp(high)
    times = math.exp(a.log_ns), math.exp(b.log_ns)
    found = Verdict(workload, label, ratio, ratio_low, ratio_high, a.n_runs, b.n_runs, verdict, more, *times)
    return found, float(stats.t.sf((d - m) / se, spread.df))


def _n_more_runs(gap: float, a: Mean, b: Mean) -> int | None:
    """Runs wanted on each side to tell a difference of `gap` (log units) with stated confidence and power; None where
    no number would do, because what runs cannot show hides it."""
    needed = (gap / float(stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER))) ** 2
    left = needed - math.fsum(one.value for side in (a, b) for one in side.fixed)
    if left <= 0:
        return None
    of_units = math.fsum(one.value for side in (a, b) for one in side.of_units)
    return max(math.ceil(of_units / left) - min(a.n_units, b.n_units), 1)


def _as_inconclusive(v: Verdict) -> Verdict:
    return replace(v, verdict="inconclusive", n_more_runs=None)


def _holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses Holm's step-down procedure rejects at family-wise level alpha (Holm 1979)."""
    order = np.argsort(p_values)
    rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > alpha / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def n_missing(one: Evidence, other: Evidence) -> int:
    """How many workloads of one side the other did not measure."""
    return len(set(one.workloads) - set(other.workloads))


def is_slower(verdicts: Sequence[Verdict]) -> bool:
    """Whether any verdict says the candidate is slower."""
    return any(v.verdict in SLOWER for v in verdicts)

"""How sure is the mean of a few runs: what workloads of a run share, what each has of its own, what no run shows.

A run slows all its workloads together (clocks, neighbours), and each a little on its own. The first is known from the
runs alone; the second is of like size for many workloads, so that each may lend its degrees of freedom to the others
(moderated variances: Smyth 2004, Statistical Applications in Genetics and Molecular Biology 3(1), sections 3 and 4),
but for a workload whose own runs scatter far more than others'.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from perfmodel.errors import NotComparableError

from .evidence import Evidence, alternate

Array = NDArray[np.float64]

OVERALL = "all workloads"
CONFIDENCE = 0.90  # two-sided, so 5 % on the side that matters
ASSUMED_RUN_SD = 0.05  # log sd between runs, assumed where a side holds a single run
# Of a single workload among many in a single run: shipped captures scatter by 3 to 8 % of their own, two of three with
# tails like those of Student's t with 2.3 and 2.5 degrees of freedom (docs/decisions/0036).
ASSUMED_OWN_SD, ASSUMED_OWN_DF = 0.07, 2.5
# Log sd between captures of a virtual machine that took less than evidence.SHORT_CAPTURE_S: of the mean over all
# workloads, and of a single one (docs/decisions/0008).
ASSUMED_DRIFT_SD, ASSUMED_WORKLOAD_DRIFT_SD = 0.07, 0.2
LEAST_OCCASIONS = 3  # fewer say nothing of the drift between them
LEAST_LENDERS = 8  # fewer workloads do not say how alike their variances are
LEAST_VARIANCE = 1e-6  # run medians are timer readings: below a per mille the spread of a few runs says nothing
OUTLYING = 0.01  # a variance so unlikely among those of other workloads stands for itself


@dataclass(frozen=True)
class Variance:
    """A variance and its degrees of freedom, infinite where it is assumed."""

    value: float
    df: float = math.inf


@dataclass(frozen=True)
class Mean:
    """The mean of the log times of one workload, or of all together, on one side.

    `of_units` are the variances of one unit (a run, or an occasion), which a mean over more units divides; `fixed`
    those that no number of units makes smaller. `n_lent` is 1 where these units also tell how far the other side, which
    is a single occasion, may lie from its own mean.
    """

    log_ns: float
    n_units: int
    n_runs: int
    of_units: tuple[Variance, ...]
    fixed: tuple[Variance, ...] = ()
    n_lent: int = 0

    @property
    def parts(self) -> list[Variance]:
        """What the variance of the mean consists of."""
        return self.parts_with(0)

    def parts_with(self, n_more: int) -> list[Variance]:
        """What it would consist of with so many more units."""
        # One estimate that serves both sides is one part: as two it would count its degrees of freedom twice.
        share = 1 / (self.n_units + n_more) + self.n_lent
        # What is assumed for a single unit would be known from more of them.
        gained = [n_more if self.n_units == 1 and n_more else one.df + n_more for one in self.of_units]
        return [Variance(one.value * share, df) for one, df in zip(self.of_units, gained, strict=True)] + [*self.fixed]

    @property
    def lasting(self) -> list[Variance]:
        """What no number of units makes smaller."""
        return [*self.fixed, *(Variance(self.n_lent * one.value, one.df) for one in self.of_units if self.n_lent)]

    @property
    def interval(self) -> tuple[float, float, float]:
        """The mean and the ends of its interval (CONFIDENCE), log ns."""
        half = half_width(self.parts)
        return self.log_ns, self.log_ns - half, self.log_ns + half


def combined(parts: Sequence[Variance]) -> Variance:
    """The sum of independent variances, with the degrees of freedom of Welch and Satterthwaite."""
    value = math.fsum(one.value for one in parts)
    estimated = math.fsum(one.value**2 / one.df for one in parts)
    return Variance(value, value**2 / estimated if estimated else math.inf)


def quantile(p: float, df: float) -> float:
    """Student's t, and the normal distribution where nothing is estimated."""
    return float(special.ndtri(p) if math.isinf(df) else special.stdtrit(df, p))


def tail(t: float, df: float) -> float:
    """The chance that Student's t exceeds `t`."""
    return float(special.ndtr(-t) if math.isinf(df) else special.stdtr(df, -t))


def half_width(parts: Sequence[Variance]) -> float:
    """Half the interval (CONFIDENCE) of what has these variances, by Student's t."""
    spread = combined(parts)
    return quantile((1 + CONFIDENCE) / 2, spread.df) * math.sqrt(spread.value)


def both_means(baseline: Evidence, candidate: Evidence, keys: Sequence[str]) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """The means of these workloads on both sides, with what drifts between them.

    Where one side has three occasions, they show the drift of the other; runs that took turns drifted alike.
    """
    by_occasion = [_by_occasion(side) for side in (baseline, candidate)]
    is_known = any(by_occasion) or alternate(baseline, candidate)
    first, other = (means_of(side, keys, is_drift_known=is_known) for side in (baseline, candidate))
    if by_occasion == [True, False]:
        first = {key: replace(mean, n_lent=1) for key, mean in first.items()}
    if by_occasion == [False, True]:
        other = {key: replace(mean, n_lent=1) for key, mean in other.items()}
    return first, other


def means_of(evidence: Evidence, keys: Sequence[str], *, is_drift_known: bool = False) -> dict[str, Mean]:
    """The means of these workloads, and under OVERALL of their geometric mean.

    What a short capture of a virtual machine may drift by is assumed, unless `is_drift_known` from elsewhere; where the
    side has three occasions, they are its units and its means have no need of it. Raises NotComparableError where no
    run measured most of the workloads.
    """
    logs, runs_of = logs_of(evidence, keys)
    is_drifting = evidence.may_drift and not is_drift_known and not _by_occasion(evidence)
    drift = (Variance(ASSUMED_DRIFT_SD**2),) if is_drifting else ()
    own_drift = (Variance(ASSUMED_WORKLOAD_DRIFT_SD**2, ASSUMED_OWN_DF),) if is_drifting else ()
    values, used = _together(logs)
    n = len(values)
    of_mean = Variance(max(float(values.var(ddof=1)), LEAST_VARIANCE), n - 1) if n > 1 else _single(evidence, keys)
    found = {OVERALL: Mean(float(values.mean()), n, int(runs_of[:, used].max(axis=0).sum()), (of_mean,), drift)}
    of_units = _variances(logs, evidence, keys)
    levels, n_units, n_runs = np.nanmean(logs, axis=1), (~np.isnan(logs)).sum(axis=1), runs_of.sum(axis=1)
    for i, key in enumerate(keys):
        found[key] = Mean(float(levels[i]), int(n_units[i]), int(n_runs[i]), of_units[i], own_drift)
    return found


def _by_occasion(evidence: Evidence) -> bool:
    return len({one.occasion for one in evidence.runs}) >= LEAST_OCCASIONS


def logs_of(evidence: Evidence, keys: Sequence[str]) -> tuple[Array, NDArray[np.int64]]:
    """Log time by workload and unit `[workload, unit]`, NaN where not measured; and of how many runs each is."""
    runs = sorted({run for key in keys for run in evidence.workloads[key].run_ns})
    logs = np.full((len(keys), len(runs)), np.nan)
    place = {run: i for i, run in enumerate(runs)}
    for i, key in enumerate(keys):
        for run, time_ns in evidence.workloads[key].run_ns.items():
            logs[i, place[run]] = math.log(time_ns)
    is_there = ~np.isnan(logs)
    if not _by_occasion(evidence):
        return logs, is_there.astype(np.int64)
    of = evidence.occasions
    groups = [[place[run] for run in runs if of[run] == one] for one in sorted({of[run] for run in runs})]
    sums = np.column_stack([np.where(is_there, logs, 0.0)[:, group].sum(axis=1) for group in groups])
    counts = np.column_stack([is_there[:, group].sum(axis=1) for group in groups])
    with np.errstate(invalid="ignore"):
        return sums / counts, counts


def _together(logs: Array) -> tuple[Array, NDArray[np.bool_]]:
    """The mean log time of all workloads in each unit that can tell it, and which units these are.

    Where most units measured all workloads, these; else those that measured most, the levels of what they lack taken
    from the others.
    """
    n_there = (~np.isnan(logs)).sum(axis=0)
    whole = n_there == len(logs)
    if 2 * whole.sum() > len(whole):
        return logs[:, whole].mean(axis=0), whole
    most = 2 * n_there > len(logs)
    if not most.any() or np.isnan(logs[:, most]).all(axis=1).any():
        if whole.any():
            return logs[:, whole].mean(axis=0), whole
        raise NotComparableError("not comparable: a side has no runs that measured most of the workloads of both")
    levels, offsets = _levels_and_offsets(logs[:, most])
    return levels.mean() + offsets, most


def _single(evidence: Evidence, keys: Sequence[str], n_workloads: int = 1) -> Variance:
    """The variance of a single run: what is assumed between runs, and what is known from its steps.

    Of one workload among many it is larger, with heavier tails, for one of them is always the unluckiest.
    """
    within = [evidence.workloads[key].log_se or 0.0 for key in keys]
    known = ASSUMED_RUN_SD**2 + float(np.mean(np.square(within))) / len(keys)
    if n_workloads < LEAST_LENDERS:
        return Variance(known)
    return Variance(known + ASSUMED_OWN_SD**2, ASSUMED_OWN_DF)


def _variances(logs: Array, evidence: Evidence, keys: Sequence[str]) -> list[tuple[Variance, ...]]:
    """Of one unit: the variance that all workloads share, where it can be told apart, and each one's own."""
    n_units = (~np.isnan(logs)).sum(axis=1)
    repeated = np.flatnonzero(n_units > 1)
    found: list[tuple[Variance, ...]] = [
        (_single(evidence, [key], len(keys)),) if n == 1 else () for n, key in zip(n_units.tolist(), keys, strict=True)
    ]
    alone = np.maximum(np.nanvar(logs[repeated], axis=1, ddof=1), LEAST_VARIANCE) if len(repeated) else np.empty(0)
    if len(repeated) < LEAST_LENDERS:
        for i, value in zip(repeated.tolist(), alone.tolist(), strict=True):
            found[i] = (Variance(value, int(n_units[i]) - 1),)
        return found
    kept = logs[repeated]
    kept = kept[:, ~np.isnan(kept).all(axis=0)]
    is_there = ~np.isnan(kept)
    levels, offsets = _levels_and_offsets(kept)
    residuals = kept - levels[:, None] - offsets
    # Each offset is a mean over workloads and takes its part of their degrees of freedom with it.
    df = (n_units[repeated] - 1) * (1 - 1 / len(repeated))
    each = np.maximum(np.nansum(residuals**2, axis=1) / df, LEAST_VARIANCE)
    of_noise = float(((is_there * each[:, None]).sum(axis=0) / is_there.sum(axis=0) ** 2).mean())
    shared = Variance(max(float(offsets.var(ddof=1)) - of_noise, 0.0), len(offsets) - 1)
    for i, own in zip(repeated.tolist(), moderated(each, df), strict=True):
        found[i] = (shared, own)
    return found


def _levels_and_offsets(logs: Array) -> tuple[Array, Array]:
    """The level of each workload `[workload]` and what each unit adds to all of them `[unit]`, by least squares."""
    offsets = np.zeros(logs.shape[1])
    for _ in range(20 if np.isnan(logs).any() else 1):
        offsets = np.nanmean(logs - np.nanmean(logs - offsets, axis=1, keepdims=True), axis=0)
    offsets -= offsets.mean()
    return np.nanmean(logs - offsets, axis=1), offsets


def moderated(variances: Array, df: Array) -> list[Variance]:
    """Sample variances of many workloads, each drawn towards what is typical of all, with the degrees of freedom that
    it gains, at most those of all together; one that is far above what is typical stays as it is.

    The typical variance and its weight are found by the moments of log variances (Smyth 2004, section 6.2).
    """
    logs = np.log(variances) - special.digamma(df / 2) + np.log(df / 2)
    excess = float(logs.var(ddof=1) - special.polygamma(1, df / 2).mean())
    d0 = _inverse_trigamma(excess) * 2 if excess > 1e-9 else math.inf
    if math.isinf(d0):
        typical = math.exp(float(logs.mean()))
        values = np.full(len(df), typical)
        chances = special.chdtrc(df, df * variances / typical)
    else:
        typical = math.exp(float(logs.mean()) + float(special.digamma(d0 / 2)) - math.log(d0 / 2))
        values = (d0 * typical + df * variances) / (d0 + df)
        chances = special.fdtrc(df, d0, variances / typical)
    is_outlying = chances < OUTLYING
    values = np.where(is_outlying, variances, values)
    gained = np.where(is_outlying, df, np.minimum(d0 + df, df.sum()))
    return [Variance(value, own) for value, own in zip(values.tolist(), gained.tolist(), strict=True)]


def _inverse_trigamma(value: float) -> float:
    """The number whose trigamma is `value`."""
    return math.exp(optimize.brentq(lambda x: float(special.polygamma(1, math.exp(x))) - value, -12.0, 25.0))

"""How sure is the mean of a few runs: what workloads of a run share, what each has of its own, what no run shows.

A run slows all its workloads together (clocks, neighbours), and each a little on its own. The first is known from the
runs alone; the second is of like size for many workloads, so that each may lend its degrees of freedom to the others
(moderated variances: Smyth 2004, Statistical Applications in Genetics and Molecular Biology 3(1), sections 3 and 4),
but for a workload whose own runs scatter far more than others'.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from perfmodel.errors import NotComparableError

from .evidence import Evidence

Array = NDArray[np.float64]

OVERALL = "all workloads"
CONFIDENCE = 0.90  # two-sided, so 5 % on the side that matters
ASSUMED_RUN_SD = 0.05  # log sd between runs, assumed where a side holds a single run
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
    those that no number of units makes smaller.
    """

    log_ns: float
    n_units: int
    n_runs: int
    of_units: tuple[Variance, ...]
    fixed: tuple[Variance, ...] = ()

    @property
    def parts(self) -> list[Variance]:
        """What the variance of the mean consists of."""
        return [Variance(one.value / self.n_units, one.df) for one in self.of_units] + list(self.fixed)

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


def half_width(parts: Sequence[Variance]) -> float:
    """Half the interval (CONFIDENCE) of what has these variances, by Student's t."""
    both = combined(parts)
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, both.df)) * math.sqrt(both.value)


def means_of(evidence: Evidence, keys: Sequence[str], drift: dict[str, tuple[Variance, ...]] | None = None) -> dict[
    str, Mean
]:  # fmt: skip
    """The means of these workloads, and under OVERALL of their geometric mean.

    `drift` are the variances between occasions by workload (`drift_of` the other side), which replace those that are
    assumed for a short capture of a virtual machine; where the side has three occasions, they are its units and its
    means have no need of them. Raises NotComparableError where no run measured all of the workloads.
    """
    logs, n_runs = _matrix(evidence, keys)
    if _by_occasion(evidence):
        fixed: dict[str, tuple[Variance, ...]] = {}
    elif drift is not None:
        fixed = drift
    else:
        fixed = _assumed(keys) if evidence.may_drift else {}
    whole = ~np.isnan(logs).any(axis=0)
    if not whole.any():
        raise NotComparableError("not comparable: a side has no run that measured every workload of both")
    found = {OVERALL: _overall(logs[:, whole].mean(axis=0), evidence, keys, fixed.get(OVERALL, ()))}
    of_units = _variances(logs, evidence, keys)
    for i, key in enumerate(keys):
        row = logs[i][~np.isnan(logs[i])]
        found[key] = Mean(float(row.mean()), len(row), int(n_runs[i]), of_units[i], fixed.get(key, ()))
    return found


def drift_of(evidence: Evidence, keys: Sequence[str]) -> dict[str, tuple[Variance, ...]] | None:
    """The variance between occasions of each workload and of all together, null for fewer than three occasions.

    It holds what runs within an occasion differ by, too, and is a little too large for that.
    """
    if not _by_occasion(evidence):
        return None
    return {key: mean.of_units for key, mean in means_of(evidence, keys).items()}


def _by_occasion(evidence: Evidence) -> bool:
    return len({one.occasion for one in evidence.runs}) >= LEAST_OCCASIONS


def _assumed(keys: Sequence[str]) -> dict[str, tuple[Variance, ...]]:
    each = (Variance(ASSUMED_WORKLOAD_DRIFT_SD**2),)
    return {OVERALL: (Variance(ASSUMED_DRIFT_SD**2),), **dict.fromkeys(keys, each)}


def _matrix(evidence: Evidence, keys: Sequence[str]) -> tuple[Array, NDArray[np.int64]]:
    """Log time by workload and unit `[workload, unit]`, NaN where not measured; and the runs behind each workload."""
    runs = sorted({run for key in keys for run in evidence.workloads[key].run_ns})
    logs = np.full((len(keys), len(runs)), np.nan)
    place = {run: i for i, run in enumerate(runs)}
    for i, key in enumerate(keys):
        for run, time_ns in evidence.workloads[key].run_ns.items():
            logs[i, place[run]] = math.log(time_ns)
    n_runs = (~np.isnan(logs)).sum(axis=1)
    if not _by_occasion(evidence):
        return logs, n_runs
    of = evidence.occasions
    groups = [[place[run] for run in runs if of[run] == one] for one in sorted({of[run] for run in runs})]
    is_there = ~np.isnan(logs)
    sums = [np.where(is_there, logs, 0.0)[:, group].sum(axis=1) for group in groups]
    counts = [is_there[:, group].sum(axis=1) for group in groups]
    with np.errstate(invalid="ignore"):
        return np.column_stack([a / n for a, n in zip(sums, counts, strict=True)]), n_runs


def _overall(
    means: Array, evidence: Evidence, keys: Sequence[str], fixed: tuple[Variance, ...]
) -> Mean:  # fmt: skip
    """All workloads together: the mean log time of each unit that measured them all."""
    n = len(means)
    own = Variance(max(float(means.var(ddof=1)), LEAST_VARIANCE), n - 1) if n > 1 else _single(evidence, keys)
    n_runs = len(set.intersection(*(set(evidence.workloads[key].run_ns) for key in keys)))
    return Mean(float(means.mean()), n, n_runs, (own,), fixed)


def _single(evidence: Evidence, keys: Sequence[str]) -> Variance:
    """The variance of a single run: what is assumed between runs, and what is known from its steps."""
    within = [evidence.workloads[key].log_se or 0.0 for key in keys]
    return Variance(ASSUMED_RUN_SD**2 + float(np.mean(np.square(within))))


def _variances(logs: Array, evidence: Evidence, keys: Sequence[str]) -> list[tuple[Variance, ...]]:
    """Of one unit: the variance that all workloads share, where it can be told apart, and each one's own."""
    n_units = (~np.isnan(logs)).sum(axis=1)
    found: list[tuple[Variance, ...]] = [
        (Variance(max(float(np.nanvar(row, ddof=1)), LEAST_VARIANCE), n - 1) if n > 1 else _single(evidence, [key]),)
        for row, n, key in zip(logs, n_units.tolist(), keys, strict=True)
    ]
    repeated = np.flatnonzero(n_units > 1)
    if len(repeated) < LEAST_LENDERS:
        return found
    offsets, residuals = _shared_and_own(logs[repeated])
    # Each offset is a mean over workloads and takes its part of their degrees of freedom with it.
    df = (n_units[repeated] - 1) * (1 - 1 / len(repeated))
    each = np.maximum(np.nansum(residuals**2, axis=1) / df, LEAST_VARIANCE)
    of_offsets = float(offsets.var(ddof=1)) - float(each.mean()) / len(repeated)
    shared = Variance(max(of_offsets, 0.0), len(offsets) - 1)
    for i, own in zip(repeated.tolist(), moderated(each, df), strict=True):
        found[i] = (shared, own)
    return found


def _shared_and_own(logs: Array) -> tuple[Array, Array]:
    """What each unit adds to all workloads `[unit]`, and what is left `[workload, unit]`."""
    offsets = np.zeros(logs.shape[1])
    for _ in range(20 if np.isnan(logs).any() else 1):
        levels = np.nanmean(logs - offsets, axis=1, keepdims=True)
        offsets = np.nanmean(logs - levels, axis=0)
    levels = np.nanmean(logs - offsets, axis=1, keepdims=True)
    return offsets, logs - levels - offsets


def moderated(variances: Array, df: Array) -> list[Variance]:
    """Sample variances of many workloads, each drawn towards what is typical of all, with the degrees of freedom that
    it gains; one that is far above what is typical stays as it is.

    The typical variance and its weight are found by the moments of log variances (Smyth 2004, section 6.2).
    """
    logs = np.log(variances) - special.digamma(df / 2) + np.log(df / 2)
    excess = float(logs.var(ddof=1) - special.polygamma(1, df / 2).mean())
    d0 = _inverse_trigamma(excess) * 2 if excess > 1e-9 else math.inf
    typical = math.exp(float(logs.mean()) + (special.digamma(d0 / 2) - math.log(d0 / 2) if d0 < math.inf else 0.0))
    found = []
    for value, own in zip(variances.tolist(), df.tolist(), strict=True):
        is_outlying = (
            stats.f.sf(value / typical, own, d0) if d0 < math.inf else stats.chi2.sf(own * value / typical, own)
        )
        if is_outlying < OUTLYING:
            found.append(Variance(value, own))
        elif d0 == math.inf:
            found.append(Variance(typical))
        else:
            found.append(Variance((d0 * typical + own * value) / (d0 + own), d0 + own))
    return found


def _inverse_trigamma(value: float) -> float:
    """The number whose trigamma is `value`."""
    return math.exp(optimize.brentq(lambda x: float(special.polygamma(1, math.exp(x))) - value, -12.0, 25.0))

"""By how much each part of the time changed, fitted to the ratios of all workloads, and how sure that is.

Weights fall with the residual, so that a few workloads which changed for themselves do not speak for a part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from perfmodel.physics import Array
from perfmodel.regression.evidence import Evidence
from perfmodel.regression.spread import ASSUMED_RUN_SD, OVERALL, Mean, Variance, both_means, half_width, logs_of

from .division import COMPUTE, EXPOSURE, MEMORY, Division

PRIOR_LOG = 1.0  # a part seldom takes more than 2.7 times as long as before, or less than 0.37 times
MOST_LOG, LEAST_LOSS = 3.0, -0.5  # how far changes are searched; an overlap may also have become better
LIKELIHOOD = 1.353  # half the 90 % quantile of chi-squared: what a fit without a change is worse by where it is needed
# How much of a workload's time a model may give to another part, of what it could be wrong by; and how unlike parts
# change at least, as a part of the change, as far as anybody knows.
SHARES_ERR_FRAC, LEAST_UNLIKE = 0.3, 0.5
LEAST_SIGMA = 0.01  # no model's ratios are better than this, log units
CAUCHY = 2.385  # residuals in units of sigma from which on weights fall (Holland & Welsch 1977: 95 % efficient)
N_ROUNDS = 4


@dataclass(frozen=True, eq=False)
class Fit:
    """Changes by cause that explain log ratios best.

    `slopes[workload, cause]` are means of the way to `changes[cause]`, `gain[cause, workload]` is by how much each
    follows each log ratio. `posterior[cause, cause]` is what noise and errors of the shares leave open where workloads
    err alone, `clustered` where those of a shape err alike, `leak[cause]` how far off a change may be where some of one
    part's time is another's, and `is_needed[cause]` says whether other changes would explain much less without it.
    `left[workload]` and `sigma[workload]` are residuals and what they may be.
    """

    changes: Array
    slopes: Array
    gain: Array
    leak: Array
    is_needed: NDArray[np.bool_]
    posterior: Array
    clustered: Array
    n_clusters: int
    left: Array
    sigma: Array


def fit_changes(log_ratio: Array, noise: Array, division: Division, clusters: NDArray[np.int64]) -> Fit:
    """The changes, by cause, that bring the baseline's model to these ratios, `log_ratio[workload]`; `noise` are the
    variances that the runs leave them, `clusters` the workloads whose shares err alike.

    Least squares with a prior of no change (PRIOR_LOG) and Cauchy's weights, found by repeated weighting.
    """
    n = len(division.causes)
    begin, at_begin = division.log_ns(np.zeros(n)), division.slopes(np.zeros(n))
    x, wrong, misfit, weight = np.zeros(n), SHARES_ERR_FRAC * np.abs(log_ratio), LEAST_SIGMA, np.ones(len(log_ratio))
    for _ in range(N_ROUNDS):
        sigma = np.sqrt(noise + misfit**2 + wrong**2)
        scale = np.sqrt(weight) / sigma
        x, cost, at_end = _solve(division, log_ratio + begin, scale, x)
        left = log_ratio - division.log_ns(x) + begin
        spread = 1.4826 * float(np.median(np.abs(left)))
        misfit = max(spread**2 - float(np.median(noise)), LEAST_SIGMA**2) ** 0.5
        weight = 1 / (1 + (left / (CAUCHY * sigma)) ** 2)
        slopes = (at_begin + at_end) / 2  # of the way to the change, for which roof binds turns with it
        # Shares sum to one, so that what is too much of one part lacks in another; parts that change alike hide it,
        # but that they do is known from the shares.
        explained = slopes @ x
        unlike = (np.abs(slopes) * np.abs(x - explained[:, None])).sum(axis=1)
        wrong = np.hypot(SHARES_ERR_FRAC, division.misfit) * np.maximum(unlike, LEAST_UNLIKE * np.abs(explained))
    weighted = slopes.T * (weight / sigma**2)
    prior = np.eye(n) / PRIOR_LOG**2
    posterior = np.linalg.inv(weighted @ slopes + prior)
    names = np.unique(clusters)
    scores = np.stack([weighted[:, clusters == name] @ left[clusters == name] for name in names])
    clustered = posterior @ (scores.T @ scores * len(names) / max(len(names) - 1, 1) + prior) @ posterior
    needed = [
        abs(x[i]) > 2 * LEAST_SIGMA and _solve(division, log_ratio + begin, scale, x, without=i)[1] - cost > LIKELIHOOD
        for i in range(n)
    ]
    gain, leak = posterior @ weighted, _leak(x, slopes, division.causes)
    return Fit(x, slopes, gain, leak, np.array(needed), posterior, clustered, len(names), left, sigma)


def _solve(
    division: Division, log_ns: Array, scale: Array, start: Array, without: int | None = None
) -> tuple[Array, float, Array]:
    """The changes that bring the model nearest to `log_ns[workload]`, residuals weighed by `scale`; half the sum of
    their squares and the prior's; and slopes there of all changes but `without`, which stays away where it is given."""
    n = len(start)
    low = np.array([LEAST_LOSS if cause == EXPOSURE else -MOST_LOG for cause in division.causes])
    high = np.array([1.0 if cause == EXPOSURE else MOST_LOG for cause in division.causes])
    free = np.arange(n) != without

    def changes(at: Array) -> Array:
        found = np.zeros(n)
        found[free] = at
        return found

    solved = least_squares(
        lambda at: np.concatenate([scale * (log_ns - division.log_ns(changes(at))), at / PRIOR_LOG]),
        start[free],
        lambda at: np.vstack([-scale[:, None] * division.slopes(changes(at))[:, free], np.eye(free.sum()) / PRIOR_LOG]),
        bounds=(low[free], high[free]),
        max_nfev=8,
        xtol=1e-3,
        ftol=1e-3,
    )
    return changes(solved.x), float(solved.cost), -solved.jac[: len(scale)] / scale[:, None]


def _leak(changes: Array, shares: Array, causes: tuple[str, ...]) -> Array:
    """How far each change may be off because a part of what the model takes for its time belongs to the other parts of
    the same workloads, `[cause]`: SHARES_ERR_FRAC of the difference to these, as far as they meet in workloads.

    Compute and memory meet in all: one of the two bounds each product, and a model that has it the wrong way round
    sees nothing of the other.
    """
    meet = shares.T @ shares
    meet = np.clip(meet / np.maximum(np.diag(meet), 1e-12)[:, None], 0.0, 1.0)
    under_roofs = np.array([cause in (COMPUTE, MEMORY) for cause in causes])
    meet = np.where(np.outer(under_roofs, under_roofs), 1.0, meet)
    return np.asarray(SHARES_ERR_FRAC * (meet * np.abs(changes[:, None] - changes)).max(axis=1))


@dataclass(frozen=True, eq=False)
class Sides:
    """What of both sides is known of the uncertainty of log ratios: deviations of each unit from the means, `[workload,
    unit]`, of each side, and variances that no run shows, of all workloads together and `[workload]`."""

    deviations: tuple[Array, Array]
    shared: float
    own: Array

    def variances(self, gain: Array) -> list[Variance]:
        """The variances of a combination of log ratios, `gain[workload]`."""
        found = [Variance(float(gain.sum()) ** 2 * self.shared + float(gain**2 @ self.own))]
        for deviations in self.deviations:
            n = deviations.shape[1]
            if n > 1:
                found.append(Variance(float(np.square(gain @ deviations).sum()) / (n - 1) / n, n - 1))
            else:
                found.append(Variance((float(gain.sum()) * ASSUMED_RUN_SD) ** 2))
        return found


def interval_of(direction: Array, fit: Fit, sides: Sides) -> tuple[float, float, float]:
    """A combination of changes with the ends of its 90 % interval.

    Runs are the sampling unit. What is left unexplained errs by workload or by shape, whichever is more; what wrong
    shares of all workloads at once would make of it is no matter of chance and widens the interval as it is.
    """
    alone, alike = (float(direction @ spread @ direction) for spread in (fit.posterior, fit.clustered))
    of_shares = Variance(alike, fit.n_clusters - 1) if alike > alone and fit.n_clusters > 1 else Variance(alone)
    value = float(direction @ fit.changes)
    half = half_width([of_shares, *sides.variances(direction @ fit.gain)])
    if np.count_nonzero(direction) == 1:  # what parts take from each other cancels in what they add together
        half += float(np.abs(direction) @ fit.leak)
    return value, value - half, value + half


def sides_of(baseline: Evidence, candidate: Evidence, keys: Sequence[str]) -> tuple[Array, Array, Sides]:
    """Log ratios of workloads with the variances that they have for themselves, and the uncertainty they share."""
    a, b = both_means(baseline, candidate, keys)

    def total(variances: Callable[[Mean], list[Variance]], key: str) -> float:
        return sum(one.value for side in (a, b) for one in variances(side[key]))

    ratio = np.array([b[key].log_ns - a[key].log_ns for key in keys])
    own = np.array([total(lambda mean: [Variance(mean.of_units[-1].value / mean.n_units)], key) for key in keys])
    fixed = [total(lambda mean: mean.lasting, key) for key in keys]
    deviations = (_deviations(baseline, keys), _deviations(candidate, keys))
    return ratio, own, Sides(deviations, total(lambda mean: mean.lasting, OVERALL), np.array(fixed))


def _deviations(side: Evidence, keys: Sequence[str]) -> Array:
    """By how much each unit lies above the mean of each workload, `[workload, unit]`, 0 where it measured none."""
    logs, _ = logs_of(side, keys)
    return np.asarray(np.nan_to_num(logs - np.nanmean(logs, axis=1, keepdims=True)))

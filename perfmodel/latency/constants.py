"""The constants of the physical model from measurements: robust least squares in the logarithm, with priors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from perfmodel.physics import Array, Ceilings, Form, Prior, Work, total

PRIOR_ROWS = 2.0  # a prior weighs like this many observations
ANCHOR_GROUPS = 30.0  # an anchor's prior weighs as if the rows were this many independent ones
LOSS_SCALE = 0.1  # a residual of 10 % is where the loss turns from squares to absolute values
MAX_ROWS = 2000  # of more, as many are drawn: constants this few need no more
LEAST_NOISE_LOG = 1e-3  # measurements are never taken to be surer than this


@dataclass(frozen=True, eq=False)
class Solved:
    """Constants that fit best, `values`; one sigma of each, `sigmas`, in log units or in the prior's `unit`, from data
    and prior together; `misfit`, half the sum of losses; `noise_log`, what a row scatters."""

    values: dict[str, float]
    sigmas: dict[str, float]
    misfit: float
    noise_log: float


def solve(
    names: Sequence[str],
    priors: Mapping[str, Prior],
    prior: Any,
    log_predicted: Callable[[Any], Array],
    log_measured: Array,
    *,
    start: Any = None,
    n_steps: int = 40,
    groups: NDArray[np.int64] | None = None,
) -> Solved:
    """The constants `names` of the dataclass `prior` that bring `log_predicted(constants)[item]` nearest to
    `log_measured[item]`: soft-L1 loss, priors around `prior`, normal in the logarithm or in the prior's unit.

    `start` is where the search begins, `prior` when null; it evaluates the model at `n_steps` places at most (slopes
    apart). Errors of rows in one of `groups[item]` are taken to be
    alike where that makes the constants less sure; null: all rows are independent.
    """
    chosen = [priors[name] for name in names]
    is_log = np.array([p.unit is None for p in chosen], dtype=bool)
    unit = np.array([p.unit or 1.0 for p in chosen])

    def encode(values: list[float]) -> Array:
        x = np.array(values)
        return np.where(is_log, np.log(np.where(is_log, x, 1.0)), x / unit)

    def decode(z: Array) -> dict[str, float]:
        values = np.where(is_log, np.exp(np.where(is_log, z, 0.0)), z * unit)
        return {n: float(v) for n, v in zip(names, values, strict=True)}

    n = len(log_measured)
    weight = LOSS_SCALE * np.array([np.sqrt(n / ANCHOR_GROUPS if p.anchor else PRIOR_ROWS) / p.sigma for p in chosen])
    centre = encode([getattr(prior, name) for name in names])
    lower, upper = encode([p.low for p in chosen]), encode([p.high for p in chosen])

    def residuals(z: Array) -> Array:
        predicted = log_predicted(replace(prior, **decode(z)))
        return np.concatenate([predicted - log_measured, (z - centre) * weight])

    begin = centre if start is None else encode([getattr(start, name) for name in names])
    solved = least_squares(
        residuals,
        np.clip(begin, lower + 1e-6, upper - 1e-6),
        bounds=(lower, upper),
        loss="soft_l1",
        f_scale=LOSS_SCALE,
        max_nfev=n_steps,
    )
    noise = max(1.4826 * float(np.median(np.abs(solved.fun[:n]))), LEAST_NOISE_LOG)
    sigmas = _sigmas(solved.jac[:n] / noise, solved.fun[:n] / noise, np.array([p.sigma for p in chosen]), groups)
    return Solved(
        decode(solved.x),
        {name: float(s) for name, s in zip(names, sigmas, strict=True)},
        float(solved.cost),
        noise,
    )


def _sigmas(slopes: Array, residuals: Array, prior_sigmas: Array, groups: NDArray[np.int64] | None) -> Array:
    """One sigma of each constant, from residuals `[item]` and slopes `[item, constant]` in units of the noise: of
    independent rows, or where that is more, of rows that share errors within groups (sandwich estimate, Liang & Zeger,
    Biometrika 1986)."""
    prior = np.diag(prior_sigmas**-2.0)
    spread = np.linalg.inv(slopes.T @ slopes + prior)
    variance = np.diag(spread)
    if groups is not None and (n_groups := len(np.unique(groups))) > 1:
        scores = np.stack([slopes[groups == g].T @ residuals[groups == g] for g in np.unique(groups)])
        meat = scores.T @ scores * n_groups / (n_groups - 1) + prior
        variance = np.maximum(variance, np.diag(spread @ meat @ spread))
    return np.asarray(np.sqrt(variance))


def fit_constants(form: Form, work: Work, log_measured: Array, roof: Ceilings, prior: Any) -> Any:
    """The constants that bring predictions nearest to measurements, `log_measured[item]` (see `solve`). Constants that
    this work cannot inform stay at the prior."""
    if work.n_items > MAX_ROWS:
        chosen = np.sort(np.random.default_rng(0).choice(work.n_items, MAX_ROWS, replace=False))
        work, log_measured = work.take(chosen), log_measured[chosen]
    prepared = form.prepare(work)

    def log_predicted(constants: Any) -> Array:
        return np.asarray(np.log(work.mean(total(form.parts(prepared, roof, constants)))))

    solved = solve(form.identified(work), form.priors, prior, log_predicted, log_measured)
    return replace(prior, **solved.values)

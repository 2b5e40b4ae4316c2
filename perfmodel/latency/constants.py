"""The constants of the physical model from measurements: robust least squares in the logarithm, with priors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
class Coordinates:
    """Some constants of a form as the numbers that a search moves, `[name]`: natural logarithms, or multiples of the
    unit of a constant that may be zero."""

    names: tuple[str, ...]
    priors: tuple[Prior, ...]

    @cached_property
    def is_log(self) -> Any:
        """Which constants are fitted in the logarithm."""
        return np.array([prior.unit is None for prior in self.priors], dtype=bool)

    @cached_property
    def unit(self) -> Array:
        """What one step of a constant is that is not."""
        return np.array([prior.unit or 1.0 for prior in self.priors])

    def encode(self, values: Sequence[float]) -> Array:
        """Coordinates of the values of the constants, in the order of names."""
        x = np.array(values, dtype=np.float64)
        return np.where(self.is_log, np.log(np.where(self.is_log, x, 1.0)), x / self.unit)

    def of(self, constants: Any) -> Array:
        """Coordinates of the constants of a model."""
        return self.encode([getattr(constants, name) for name in self.names])

    def decode(self, z: Array, others: Any) -> Any:
        """Constants at these coordinates, those not named as in `others`."""
        values = np.where(self.is_log, np.exp(np.where(self.is_log, z, 0.0)), z * self.unit)
        return replace(others, **{n: float(v) for n, v in zip(self.names, values, strict=True)})

    @property
    def limits(self) -> tuple[Array, Array]:
        """The lowest and the highest coordinates that the priors allow."""
        return self.encode([p.low for p in self.priors]), self.encode([p.high for p in self.priors])


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
    apart). Errors of rows in one of `groups[item]` are taken to be alike where that makes the constants less sure;
    null: all rows are independent.
    """
    chosen = tuple(priors[name] for name in names)
    at = Coordinates(tuple(names), chosen)
    n = len(log_measured)
    weight = LOSS_SCALE * np.array([np.sqrt(n / ANCHOR_GROUPS if p.anchor else PRIOR_ROWS) / p.sigma for p in chosen])
    centre, (lower, upper) = at.of(prior), at.limits

    def residuals(z: Array) -> Array:
        predicted = log_predicted(at.decode(z, prior))
        return np.concatenate([predicted - log_measured, (z - centre) * weight])

    begin = centre if start is None else at.of(start)
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
    found = at.decode(solved.x, prior)
    return Solved(
        {name: getattr(found, name) for name in names},
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

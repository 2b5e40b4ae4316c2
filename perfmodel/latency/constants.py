"""The constants of the physical model from measurements: robust least squares in the logarithm, with priors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from perfmodel.physics import Array, Ceilings, Form, Prior, Work, total

PRIOR_ROWS = 2.0  # a prior weighs like this many observations
ANCHOR_GROUPS = 30.0  # an anchor's prior weighs as if the rows were this many independent ones
LOSS_SCALE = 0.1  # a residual of 10 % is where the loss turns from squares to absolute values
MAX_ROWS = 2000  # of more, as many are drawn: constants this few need no more


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Some constants of a form as the numbers that a search moves, `[name]`: natural logarithms, or multiples of the
    unit of a constant that may be zero."""

    names: tuple[str, ...]
    priors: tuple[Prior, ...]

    @property
    def is_log(self) -> Any:
        """Which constants are fitted in the logarithm."""
        return np.array([prior.unit is None for prior in self.priors], dtype=bool)

    @property
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


def coordinates(form: Form, names: Sequence[str]) -> Coordinates:
    """Coordinates of these constants of a form."""
    return Coordinates(tuple(names), tuple(form.priors[name] for name in names))


def fit_constants(
    form: Form, work: Work, log_measured: Array, roof: Ceilings, prior: Any, *, start: Any = None, n_steps: int = 40
) -> Any:
    """The constants that bring predictions nearest to measurements, `log_measured[item]`: least squares on
    log(predicted / measured) with soft-L1 loss and log-normal priors around `prior`.

    `start` is where the search begins, the prior when null. Constants that this work cannot inform stay at the prior.
    """
    if work.n_items > MAX_ROWS:
        chosen = np.sort(np.random.default_rng(0).choice(work.n_items, MAX_ROWS, replace=False))
        work, log_measured = work.take(chosen), log_measured[chosen]
    at = coordinates(form, form.identified(work))
    n = work.n_items
    weight = LOSS_SCALE * np.array(
        [np.sqrt(n / ANCHOR_GROUPS if p.anchor else PRIOR_ROWS) / p.sigma for p in at.priors]
    )
    centre, (lower, upper) = at.of(prior), at.limits
    prepared = form.prepare(work)

    def residuals(z: Array) -> Array:
        predicted = work.mean(total(form.parts(prepared, roof, at.decode(z, prior))))
        return np.concatenate([np.log(predicted) - log_measured, (z - centre) * weight])

    begin = centre if start is None else at.of(start)
    solved = least_squares(
        residuals,
        np.clip(begin, lower + 1e-6, upper - 1e-6),
        bounds=(lower, upper),
        loss="soft_l1",
        f_scale=LOSS_SCALE,
        max_nfev=n_steps,
    )
    return at.decode(solved.x, prior)

"""The constants of the physical model from measurements: robust least squares in the logarithm, with priors."""

from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from perfmodel.physics import Array, Ceilings, Form, Work, total

PRIOR_ROWS = 2.0  # a prior weighs like this many observations
ANCHOR_GROUPS = 30.0  # an anchor's prior weighs as if the rows were this many independent ones
LOSS_SCALE = 0.1  # a residual of 10 % is where the loss turns from squares to absolute values
MAX_ROWS = 2000  # of more, as many are drawn: constants this few need no more


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
    names = form.identified(work)
    priors = [form.priors[name] for name in names]
    is_log = np.array([p.unit is None for p in priors])
    unit = np.array([p.unit or 1.0 for p in priors])

    def encode(values: list[float]) -> Array:
        x = np.array(values)
        return np.where(is_log, np.log(np.where(is_log, x, 1.0)), x / unit)

    def decode(z: Array) -> Any:
        values = np.where(is_log, np.exp(np.where(is_log, z, 0.0)), z * unit)
        return replace(prior, **{n: float(v) for n, v in zip(names, values, strict=True)})

    n = work.n_items
    weight = LOSS_SCALE * np.array([np.sqrt(n / ANCHOR_GROUPS if p.anchor else PRIOR_ROWS) / p.sigma for p in priors])
    centre = encode([getattr(prior, name) for name in names])
    lower, upper = encode([p.low for p in priors]), encode([p.high for p in priors])
    prepared = form.prepare(work)

    def residuals(z: Array) -> Array:
        predicted = work.mean(total(form.parts(prepared, roof, decode(z))))
        return np.concatenate([np.log(predicted) - log_measured, (z - centre) * weight])

    begin = centre if start is None else encode([getattr(start, name) for name in names])
    solved = least_squares(
        residuals,
        np.clip(begin, lower + 1e-6, upper - 1e-6),
        bounds=(lower, upper),
        loss="soft_l1",
        f_scale=LOSS_SCALE,
        max_nfev=n_steps,
    )
    return decode(solved.x)

"""Which part of the time changed between two captures: launch, compute, memory, link, copies, host; or none of them.

Each part takes f times as long on the candidate, the same f for all workloads; workloads differ in what their time
consists of (`division`), so that a sweep itself says which part it was, also where no calibration can: something that
ran beside it, another setting of a library. Factors are fitted to the ratios of all workloads with weights that fall
with the residual, so that a few workloads which changed for themselves do not speak for a part; they are told apart.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from perfmodel.errors import InputError
from perfmodel.latency import LatencyModel
from perfmodel.physics import Array

from .alone import what_they_share
from .division import CAUSES, EXPOSURE, REPLAY, Division, divide
from .evidence import Evidence
from .parts import PartChange
from .spread import ASSUMED_RUN_SD, OVERALL, Mean, Variance, half_width
from .verdicts import SLOWER, Verdict, both_means

if TYPE_CHECKING:
    from .compared import Moved

PRIOR_LOG = 1.0  # a part seldom takes more than 2.7 times as long as before, or less than 0.37 times
MOST_LOG, LEAST_LOSS = 3.0, -0.5  # how far changes are searched; an overlap may also have become better
LIKELIHOOD = 1.353  # half the 90 % quantile of chi-squared: what a fit without a change is worse by where it is needed
SHARES_ERR_FRAC = 0.3  # how much of a workload's time a model may give to another part, of what it could be wrong by
LEAST_UNLIKE = 0.5  # how unlike parts change at least, as a part of the change, as far as anybody knows
# What adds less than this beside the largest part, and changed by less than this part of its change, may come from an
# error of the largest part's shares.
LEAST_BESIDE_FRAC, LEAST_CHANGE_FRAC = 0.15, 0.5
LEAST_SIGMA = 0.01  # no model's ratios are better than this, log units
CAUCHY = 2.385  # residuals in units of sigma from which on weights fall (Holland & Welsch 1977: 95 % efficient)
N_ROUNDS = 4
ALONE_SIGMAS = 3.0  # from which on a workload's change is its own

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


def fit_changes(
    log_ratio: Array, noise: Array, division: Division, clusters: NDArray[np.int64], n_rounds: int = N_ROUNDS
) -> Fit:
    """The changes, by cause, that bring the baseline's model to these ratios, `log_ratio[workload]`; `noise` are the
    variances that the runs leave them, `clusters` the workloads whose shares err alike.

    Least squares with a prior of no change (PRIOR_LOG) and Cauchy's weights, found by repeated weighting.
    """
    n = len(division.causes)
    begin, at_begin = division.log_ns(np.zeros(n)), division.slopes(np.zeros(n))
    x, wrong, misfit, weight = np.zeros(n), SHARES_ERR_FRAC * np.abs(log_ratio), LEAST_SIGMA, np.ones(len(log_ratio))
    for _ in range(n_rounds):
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
    gain, leak = posterior @ weighted, _leak(x, slopes)
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


def _leak(changes: Array, shares: Array) -> Array:
    """How far each change may be off because a part of what the model takes for its time belongs to the other parts of
    the same workloads, `[cause]`: SHARES_ERR_FRAC of the difference to these, as far as they meet in workloads."""
    meet = shares.T @ shares
    meet = np.clip(meet / np.maximum(np.diag(meet), 1e-12)[:, None], 0.0, 1.0)
    return np.asarray(SHARES_ERR_FRAC * (meet * np.abs(changes[:, None] - changes)).max(axis=1))


@dataclass(frozen=True, eq=False)
class _Sides:
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


def _interval(direction: Array, fit: Fit, sides: _Sides) -> tuple[float, float, float]:
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


def _sides(baseline: Evidence, candidate: Evidence, keys: Sequence[str]) -> tuple[Array, Array, _Sides]:
    """Log ratios of workloads with the variances that they have for themselves, and the uncertainty they share."""
    a, b = both_means(baseline, candidate, keys)

    def total(variances: Callable[[Mean], list[Variance]], key: str) -> float:
        return sum(one.value for side in (a, b) for one in variances(side[key]))

    ratio = np.array([b[key].log_ns - a[key].log_ns for key in keys])
    own = np.array([total(lambda mean: [Variance(mean.of_units[-1].value / mean.n_units)], key) for key in keys])
    fixed = [total(lambda mean: list(mean.fixed), key) for key in keys]
    deviations = (_deviations(baseline, keys, a), _deviations(candidate, keys, b))
    return ratio, own, _Sides(deviations, total(lambda mean: list(mean.fixed), OVERALL), np.array(fixed))


def _deviations(side: Evidence, keys: Sequence[str], means: Mapping[str, Mean]) -> Array:
    """By how much each run lies above the mean of each workload, `[workload, run]`, 0 where it measured none; by
    occasion where these are the units of the means."""
    runs = sorted({run for key in keys for run in side.workloads[key].run_ns})
    place = {run: i for i, run in enumerate(runs)}
    found = np.full((len(keys), len(runs)), np.nan)
    for i, key in enumerate(keys):
        for run, time_ns in side.workloads[key].run_ns.items():
            found[i, place[run]] = np.log(time_ns) - means[key].log_ns
    unit_of = np.array([side.occasions.get(run, 0) for run in runs])
    if means[OVERALL].n_units < len(runs) and len(np.unique(unit_of)) > 1:
        by_unit = [np.nan_to_num(found[:, unit_of == unit]).mean(axis=1) for unit in np.unique(unit_of)]
        return np.column_stack(by_unit)
    return np.asarray(np.nan_to_num(found))


def attribute(
    baseline: Evidence,
    candidate: Evidence,
    verdicts: Sequence[Verdict],
    moved: Sequence["Moved"],
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
    log_ratio, noise, sides = _sides(baseline, candidate, keys)
    clusters = division.facts["shape"].rank("dense").to_numpy().astype(np.int64)
    fit = fit_changes(log_ratio, noise, division, clusters)
    intervals = [_interval(direction, fit, sides) for direction in np.eye(len(division.causes))]
    added = division.added(fit.changes)
    states = [_state(cause, interval, margin_frac) for cause, interval in zip(division.causes, intervals, strict=True)]
    sizes, logs = np.abs(added.mean(axis=0)), np.abs(fit.changes)
    is_small = (sizes < LEAST_BESIDE_FRAC * sizes.max()) & (logs < LEAST_CHANGE_FRAC * logs[sizes.argmax()])
    for i, state in enumerate(states):
        if state in (LONGER, SHORTER) and (is_small[i] or not fit.is_needed[i]):
            states[i] = SMALL if is_small[i] else OPEN
    slower = {verdict.workload for verdict in verdicts if verdict.verdict in SLOWER}
    is_alone = (fit.left > np.maximum(ALONE_SIGMAS * fit.sigma, log_ratio / 2)) & np.array([k in slower for k in keys])
    named = {
        key: None if is_alone[i] else _largest(added[i], float(np.expm1(log_ratio[i])), division.causes, states)
        for i, key in enumerate(keys)
        if key in slower
    }
    whole = float(np.expm1(log_ratio).mean())
    if OVERALL in slower:
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
            *_together(division, fit, sides, states, intervals, margin_frac),
            *what_they_share(division.facts, is_alone),
            *(f"{n} workloads could not be divided into parts: {why}." for why, n in division.left_out.items()),
        ),
    )


def _state(cause: str, interval: tuple[float, float, float], margin_frac: float) -> str:
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
    interval: tuple[float, float, float],
    state: str,
    change_frac: float,
    moved: Sequence["Moved"],
) -> PartChange:
    cause = division.causes[i]
    share = float(division.shares[:, i].mean())
    value, low, high = (float(np.exp(x)) for x in interval)
    evidence = _evidence(cause, state, moved)
    if cause != EXPOSURE:
        return PartChange(CAUSES[cause], share, change_frac, value, low, high, evidence)
    if share == 0 or interval[0] == 0:
        return PartChange(CAUSES[cause], share, change_frac, None, None, None, evidence)
    # A share of an overlap that was lost adds to what was exposed before.
    value, low, high = (1 + x * change_frac / interval[0] / share for x in interval)
    return PartChange(CAUSES[cause], share, change_frac, value, low, high, evidence)


def _evidence(cause: str, state: str, moved: Sequence["Moved"]) -> str:
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
    wanted = {LONGER: "slower", SHORTER: "faster"}.get(state)
    if not TELLS[cause]:
        return f"{words}; no calibration measures it"
    if not known:
        return f"{words}; not calibrated on both sides"
    if told:
        agrees = wanted is not None and any(one.moved == wanted for one in known)
        against = "" if agrees or wanted is None else ", which does not account for it"
        return f"{words}; {', '.join(told)}{against}"
    if state == LONGER:
        return (
            f"{words}; calibration shows no change: look at what ran at the time of the sweep, or a setting of the "
            "library"
        )
    return f"{words}; calibration shows no change"


def _became(one: "Moved") -> str:
    ratio = one.ratio or 1.0
    note = "" if one.is_alike else " (measured in another way)"
    return f"{'fell' if ratio < 1 else 'rose'} to {ratio:.2f}x{note}"


def _together(
    division: Division,
    fit: Fit,
    sides: _Sides,
    states: Sequence[str],
    intervals: Sequence[tuple[float, float, float]],
    margin_frac: float,
) -> list[str]:
    """Sentences on parts that only together are slower beyond doubt, and on a whole that is slower in all of them."""
    longer = [i for i, state in enumerate(states) if state == LONGER]
    low, high = (f([intervals[i][end] for i in longer]) if longer else 0.0 for f, end in ((max, 1), (min, 2)))
    big = [i for i in range(len(states)) if division.shares[:, i].mean() > 0.05]
    if len(longer) > 1 and set(big) <= set(longer) and low <= high:
        return [
            f"All parts take longer alike, about {np.exp((low + high) / 2):.2f}x: look at clocks, power limits and "
            "what ran beside before any single part."
        ]
    weights = fit.slopes.mean(axis=0)
    unsettled = [i for i, state in enumerate(states) if state == OPEN and weights[i] > 0]
    sets = [pair for n in range(2, len(unsettled) + 1) for pair in combinations(unsettled, n)]
    for chosen in sets:
        direction = np.zeros(len(states))
        direction[list(chosen)] = weights[list(chosen)] / weights[list(chosen)].sum()
        value, low, high = _interval(direction, fit, sides)
        if low > np.log1p(margin_frac):
            names = " or ".join(dict.fromkeys(CAUSES[division.causes[i]] for i in chosen))
            return [
                f"{names[0].upper()}{names[1:]} takes longer, together {np.exp(value):.2f}x ({np.exp(low):.2f} to "
                f"{np.exp(high):.2f}); these workloads cannot tell which."
            ]
    return []

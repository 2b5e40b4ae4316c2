"""A model of a new machine, driver or kernel version from a fitted one and a few measured points."""

import copy
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student_t

from perfmodel.errors import InputError
from perfmodel.evaluation import errors_of
from perfmodel.hardware import HardwareProfile
from perfmodel.latency import ANOMALY_LOG, COVERAGE, LatencyModel, work_of
from perfmodel.latency.trees import Trees
from perfmodel.latency.work import LAYER_OPS
from perfmodel.physics import Array
from perfmodel.transfer import (
    SHAPE_FRAC,
    SIGMAS_90,
    Physics,
    covariance,
    joint_covariance,
    sigma_of,
    spread_of,
    transferred,
)

LEAST_POINTS = 3  # with fewer, leaving one out says nothing
IDENTIFIED_FRAC = 0.8  # a constant whose spread the points do not narrow to less than this of the prior's stays
STUDENT_DF = 4.0  # degrees of freedom of the errors: a failed point must not bend a constant
N_STEPS = 6  # of Gauss and Newton; three are enough where nothing hits a limit
# How much more, or less, constants may have moved than SPREADS says, how much larger errors may be than the source's
# held-out ones, and what either is worth before the points are seen: that nothing changed is as likely as not.
MOVED = {0.0: 0.5, 0.5: 0.2, 1.0: 0.2, 2.0: 0.1}
NOISIER = {1.0: 0.2, 1.5: 0.3, 2.0: 0.3, 3.0: 0.2}
UNMOVED_PROB = 0.5  # from which on nothing moves
STEP_FRACS = (0.25, 0.5, 0.75, 1.0)  # of the way from the transferred model to what the points say
SURE = 0.90  # one-sided, that leaving points out shows a gain and not chance
GAIN_FRAC = 0.02  # of the zero-shot error, what leave-one-out errors must be below it for anything to change
SCALAR_SPREAD = 0.05  # log units: what is left over all points once the constants have moved
MOST_FOLDS = 30  # in which points are left out: of up to as many each by itself
SOURCE_POINTS = 5  # the source's held-out errors count like this many points of the new machine


@dataclass(frozen=True, eq=False)
class Points:
    """A few measurements on a new machine and what the transferred model says of them, `[point]`."""

    physics: Physics
    log_measured: Array
    sigma: Array
    spread: Array
    shape_of: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Solution:
    """What points say of the constants: coordinates `z[name]`, their standard deviations `sd[name]`, which are free,
    how likely it is that nothing moved, and by how many times SPREADS and the source's errors these were judged."""

    z: Array
    sd: Array
    is_free: NDArray[np.bool_]
    unmoved_prob: float
    moved: float
    noisier: float


def calibrate(
    model: LatencyModel, observations: pl.DataFrame, profile: HardwareProfile | None = None, kernel: str | None = None
) -> LatencyModel:
    """The model on the machine of a few observations, `[point]` rows of OBSERVATIONS with `time_ns`.

    Constants that the points identify move, the others stay; the residual is the source's; intervals widen by what
    leaving out each point shows. Where leaving out shows no gain over the model as it was transferred, nothing moves.
    `profile` is the new machine, that of the model when null. `evidence_["calibrated"]` says all of it. Raises
    InputError with fewer than LEAST_POINTS points, several dtypes, offloaded experts, or no row the model knows.
    """
    dtype = _checked(model, observations)
    start = transferred(model, profile or model.profile, dtype=dtype, kernel=kernel)
    points = points_of(start, observations)
    zero_shot = points.physics.log_ns(points.physics.z) - points.log_measured
    weights = _weights(points)
    solution = solve(points, weights)
    left_out = _left_out(points, weights)
    part = _part(left_out, zero_shot)
    z = points.physics.z + part * (solution.z - points.physics.z)
    errors = zero_shot + part * (left_out - zero_shot)
    scalar, errors = _scalar(errors, points.sigma)
    factor = _factor(errors, points.sigma)
    found = copy.copy(start)
    found.constants_ = points.physics.constants(z)
    found.residual_ = _shifted(start.residual_, scalar)
    if start.confidence_ is not None:
        found.confidence_ = replace(start.confidence_, quantile=start.confidence_.quantile * factor)
        found.typical_half_width_ = None if start.typical_half_width_ is None else start.typical_half_width_ * factor
    found.held_out_, found.errors_, found.points_, found.anomalies_ = None, None, None, []
    moved = {name for name, is_free in zip(points.physics.at.names, solution.is_free, strict=True) if is_free}
    found.informed_ = [name for name in vars(start.constants_) if name in moved or name in model.informed_]
    found.n_observations_ = len(errors)
    found.ops_ = sorted({*model.ops_, *observations["op"].cast(pl.String).unique()})
    measured_ns = observations["time_ns"].to_numpy()
    found.evidence_ = {
        "launch": observations["launch"][0],
        "calibrated": {
            "from": _origin(model),
            "n_points": len(errors),
            "shapes": observations["shape"].unique(maintain_order=True).to_list(),
            "zero_shot": asdict(errors_of(np.exp(zero_shot) * measured_ns, measured_ns)),
            "left_out": asdict(errors_of(np.exp(errors) * measured_ns, measured_ns)),
            "n_anomalies": int((np.abs(errors) >= ANOMALY_LOG).sum()),
            "part": part,
            "scalar_log": scalar,
            "widened": factor,
            "constants": _changes(start, found, points, solution, part),
        },
    }
    return found


def _origin(model: LatencyModel) -> dict[str, Any]:
    """What the calibrated model was made from."""
    return {
        "hardware": model.profile.name,
        "kernel": model.kernel,
        "dtype": model.dtype,
        "n_observations": model.n_observations_,
        "evidence": model.evidence_,
    }


def _changes(
    start: LatencyModel, found: LatencyModel, points: Points, solution: Solution, part: float
) -> list[dict[str, Any]]:
    """Each constant before and after, its spread in coordinates before and after, and why it stayed where it did."""
    at = points.physics.at
    rows = []
    for name in (field.name for field in fields(start.constants_)):
        before, after = getattr(start.constants_, name), getattr(found.constants_, name)
        row = {"name": name, "before": before, "after": after, "spread_before": None, "spread_after": None}
        if name not in at.names:
            rows.append({**row, "why": "no point depends on it"})
            continue
        i = at.names.index(name)
        row |= {"spread_before": float(points.spread[i]), "spread_after": float(solution.sd[i])}
        if not solution.is_free[i]:
            why = f"the points leave more than {100 * IDENTIFIED_FRAC:.0f} % of its spread"
        elif solution.unmoved_prob >= UNMOVED_PROB:
            why = "the points are as far off as the model's own errors are"
        elif part == 0:
            why = "leaving points out shows no sure gain"
        else:
            why = None
        rows.append({**row, "why": why})
    return rows


def _checked(model: LatencyModel, observations: pl.DataFrame) -> str:
    """The one dtype of the observations; raises InputError where they cannot calibrate the model."""
    dtypes = observations["dtype"].unique().sort().to_list()
    if len(dtypes) != 1:
        raise InputError(f"found points of {len(dtypes)} dtypes ({', '.join(dtypes)}), expected one")
    if observations.height < LEAST_POINTS:
        raise InputError(f"found {observations.height} points, expected at least {LEAST_POINTS} to calibrate with")
    if set(observations["access"].unique()) != {"resident"} or observations["offload_frac"].max():
        raise InputError("points with offloaded experts say nothing of resident ones, which a calibration takes")
    ops = set(observations["op"].cast(pl.String).unique())
    known = {*model.ops_, *(LAYER_OPS if set(LAYER_OPS) & set(model.ops_) else ())}
    if not ops <= known:
        words = ", ".join(sorted(ops - known))
        raise InputError(f"found points of {words}, and the model was fitted on {', '.join(model.ops_)} alone")
    return str(dtypes[0])


def points_of(model: LatencyModel, observations: pl.DataFrame) -> Points:
    """Observations beside a transferred model."""
    work = work_of(observations, model.tiles_)
    physics = Physics(model, work)
    spread = spread_of(model, physics.at)
    return Points(
        physics=physics,
        log_measured=np.log(observations["time_ns"].to_numpy()),
        sigma=sigma_of(model, work),
        spread=spread,
        shape_of=observations["shape"].rank("dense").to_numpy().astype(np.int64) - 1,
    )


def solve(points: Points, weights: Array) -> Solution:
    """The most likely constants given the points, `weights[point]` 0 for those that do not count (model A3
    to A5)."""
    physics, spread = points.physics, points.spread
    slopes = physics.slopes(physics.z)
    used = weights > 0
    off = points.log_measured - physics.log_ns(physics.z)
    sd = np.sqrt(np.diag(covariance(slopes[used], spread, points.sigma[used], points.shape_of[used], weights[used])))
    is_free = sd < IDENTIFIED_FRAC * spread
    moved, noisier, unmoved = _judged(
        slopes[used][:, is_free], spread[is_free], points.sigma[used], points.shape_of[used], weights[used], off[used]
    )
    z = physics.z.copy()
    if unmoved < UNMOVED_PROB and is_free.any():
        z[is_free] = most_likely(points, weights, is_free, moved, noisier)
        z = physics.z + (1 - unmoved) * (z - physics.z)
    return Solution(z, sd, is_free, unmoved, moved, noisier)


def most_likely(points: Points, weights: Array, is_free: NDArray[np.bool_], moved: float, noisier: float) -> Array:
    """Coordinates of the free constants where log posterior density is highest (Gauss-Newton)."""
    physics, used = points.physics, weights > 0
    spread, sigma = moved * points.spread[is_free], noisier * points.sigma[used]
    lower, upper = (limit[is_free] for limit in physics.at.limits)
    z = physics.z.copy()
    for _ in range(N_STEPS):
        slopes = physics.slopes(z)[used][:, is_free]
        off = (points.log_measured - physics.log_ns(z))[used] + slopes @ (z - physics.z)[is_free]
        joint, weighted = joint_covariance(slopes, spread, sigma, points.shape_of[used], weights[used])
        step = (joint @ (weighted @ off))[: is_free.sum()]
        z[is_free] = np.clip(physics.z[is_free] + step, lower, upper)
    return z[is_free]


def _judged(
    slopes: Array, spread: Array, sigma: Array, shape_of: NDArray[np.int64], weights: Array, off: Array
) -> tuple[float, float, float]:
    """How far constants moved and how much noisier the machine is, as multiples, by the marginal likelihood of the
    transferred model's errors `off[point]` (evidence, MacKay 1992; model A4); and the probability that nothing
    moved."""
    shared = (shape_of[:, None] == shape_of[None, :]) * SHAPE_FRAC * np.outer(sigma, sigma)
    noise = shared + np.diag((1 - SHAPE_FRAC) * sigma**2 / weights)
    signal = (slopes * spread**2) @ slopes.T
    scores = {}
    for moved, p in MOVED.items():
        for noisier, q in NOISIER.items():
            v = moved**2 * signal + noisier**2 * noise
            fit = off @ np.linalg.solve(v, off) + np.linalg.slogdet(v)[1]
            scores[moved, noisier] = np.log(p * q) - fit / 2
    top = max(scores.values())
    mass = {key: float(np.exp(value - top)) for key, value in scores.items()}
    unmoved = sum(value for (moved, _), value in mass.items() if moved == 0) / sum(mass.values())
    moved, noisier = max((key for key in mass if key[0] > 0), key=lambda key: mass[key])
    return moved, noisier, unmoved


def _weights(points: Points) -> Array:
    """How much each point counts, 1 or less: those that even constants moved far would not explain count less (errors
    of Student's distribution, by iterated weights)."""
    physics, spread = points.physics, 2 * points.spread
    slopes = physics.slopes(physics.z)
    off = points.log_measured - physics.log_ns(physics.z)
    weights = np.ones(len(off))
    for _ in range(10):
        joint, weighted = joint_covariance(slopes, spread, points.sigma, points.shape_of, weights)
        left = off - slopes @ (joint @ (weighted @ off))[: len(spread)]
        weights = (STUDENT_DF + 1) / (STUDENT_DF + (left / points.sigma) ** 2)
    return np.minimum(weights, 1.0)


def _left_out(points: Points, weights: Array) -> Array:
    """The log error of each point when predicted by a calibration on the others, `[point]`; of many points several are
    left out together."""
    found, k = np.empty(len(weights)), len(weights)
    for held in np.array_split(np.random.default_rng(0).permutation(k), min(k, MOST_FOLDS)):
        others = weights.copy()
        others[held] = 0.0
        found[held] = (points.physics.log_ns(solve(points, others).z) - points.log_measured)[held]
    return found


def _part(left_out: Array, zero_shot: Array) -> float:
    """How much of the way constants go, 0 or one of STEP_FRACS: where the gain of leave-one-out errors over those of
    the transferred model is surest, by its lower limit (Student's t, SURE); anomalies count as ANOMALY_LOG."""
    before = np.minimum(np.abs(zero_shot), ANOMALY_LOG)
    best = 0.0, GAIN_FRAC * float(before.mean())
    for part in STEP_FRACS:
        gain = before - np.minimum(np.abs(zero_shot + part * (left_out - zero_shot)), ANOMALY_LOG)
        sure = _least_gain(gain)
        if gain.mean() >= GAIN_FRAC * before.mean() and sure > 0 and (best[0] == 0 or sure > best[1]):
            best = part, sure
    return best[0]


def _least_gain(gain: Array) -> float:
    """What the mean gain is at least, one-sided with SURE, by Student's t."""
    k = len(gain)
    return float(gain.mean() - student_t.ppf(SURE, k - 1) * gain.std(ddof=1) / np.sqrt(k))


def _shrunk_mean(errors: Array, sigma: Array) -> float:
    """The common part of errors, drawn to zero by SCALAR_SPREAD; anomalies do not count."""
    normal = np.abs(errors) < ANOMALY_LOG
    weight = normal / sigma**2
    return float((weight * errors).sum() / (weight.sum() + SCALAR_SPREAD**-2))


def _scalar(errors: Array, sigma: Array) -> tuple[float, Array]:
    """A factor (log) on all predictions where leaving points out says it helps, else 0; and the errors after it."""
    k = len(errors)
    others = np.array([_shrunk_mean(errors[np.arange(k) != i], sigma[np.arange(k) != i]) for i in range(k)])
    gain = np.minimum(np.abs(errors), ANOMALY_LOG) - np.minimum(np.abs(errors - others), ANOMALY_LOG)
    if gain.mean() < GAIN_FRAC * np.abs(errors).mean() or _least_gain(gain) <= 0:
        return 0.0, errors
    return -_shrunk_mean(errors, sigma), errors - others


def _shifted(residual: Trees | None, scalar: float) -> Trees | None:
    """The residual with a constant added; one leaf where there was none."""
    if scalar == 0.0:
        return residual
    if residual is not None:
        return replace(residual, base=residual.base + scalar)
    leaf = np.zeros((1, 1), dtype=np.int64)
    return Trees(scalar, 0, leaf, np.zeros((1, 1)), leaf, leaf, np.zeros((1, 1)))


def _factor(errors: Array, sigma: Array) -> float:
    """How much wider intervals must be than the source's, at least 1: the conformal quantile of errors over the
    source's half-width, between ranks, pooled with SOURCE_POINTS as its own errors are; anomalies do not count."""
    normal = np.abs(errors) < ANOMALY_LOG
    source = norm.ppf((1 + (np.arange(SOURCE_POINTS) + 0.5) / SOURCE_POINTS) / 2)
    ratio = np.concatenate([np.abs(errors[normal]) / sigma[normal], source]) / SIGMAS_90
    return max(1.0, float(np.quantile(ratio, COVERAGE, method="weibull")))

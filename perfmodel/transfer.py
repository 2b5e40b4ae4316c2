"""A fitted model on another machine, and what is believed of its constants there before anything is measured.

Everything here is linear about the model as it is: log latencies, their slopes in the constants, normal errors.
"(model A1)" is a formula of docs/model.md, section 12.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile, names, profile_name
from perfmodel.latency import LatencyModel, base_half_width
from perfmodel.latency.constants import Coordinates
from perfmodel.physics import Array, Ceilings, Form, Work, ceilings, total, transferred_ceilings
from perfmodel.tile_rules import TileRule, candidates

# How far a constant moves from one machine, driver or kernel version to another: one sigma, natural log units. Shares
# of a roof and passes over memory are of the kernel and stay nearly what they are, time on host and scheduler does not.
SPREADS = {
    "eff_compute": 0.20,
    "eff_memory": 0.15,
    "tile_overhead_rows": 0.30,
    "tile_overhead_cols": 0.30,
    "tile_overhead_terms": 0.30,
    "smooth_p": 0.15,
    "call_ns": 0.50,
    "expert_ns": 0.50,
    "layer_ns": 0.50,
    "active_ns": 0.50,
    "page_ns": 0.50,
    "score_ns": 0.50,
    "row_passes": 0.40,
    "token_passes": 0.40,
    "misaligned_compute": 0.20,
    "misaligned_memory": 0.20,
    "host_call_ns": 0.70,
    "host_layer_ns": 0.70,
}
OTHER_SPREAD = 0.30  # of a constant not named above, or this part of what its form allows where it is no logarithm
SHAPE_FRAC = 0.2  # of the variance of held-out errors, what all points of a shape share (0.04 and 0.30 on two kernels)
SIGMAS_90 = 1.645  # a 90 % interval of a normal error in standard deviations
LEAST_SIGMA, UNKNOWN_SIGMA = 0.02, 0.10  # log units: a floor, and the error of a model that could hold nothing out
STEP = 1e-3  # of a coordinate, for slopes


def coordinates(form: Form, names: Sequence[str]) -> Coordinates:
    """Coordinates of these constants of a form."""
    return Coordinates(tuple(names), tuple(form.priors[name] for name in names))


def transferred(
    model: LatencyModel, profile: HardwareProfile, *, dtype: str | None = None, kernel: str | None = None
) -> LatencyModel:
    """The model as one of another machine (or dtype, or kernel): the same constants, its efficiencies restated
    relative to the ceilings of `profile`, so that it predicts what `model.forecast(work, profile)` does (model A1).

    Raises InputError for a CPU where the model is of a GPU, and the other way.
    """
    if profile.device != model.profile.device:
        raise InputError(
            f"the model is of a {model.profile.device} ({model.profile.name}) and says nothing of a {profile.device} "
            f"({profile.name})"
        )
    found = copy.copy(model)
    found.profile, found.dtype, found.kernel = profile, dtype or model.dtype, kernel or model.kernel
    own = found.roof
    if found.dtype == model.dtype:
        reached = transferred_ceilings(profile, model.dtype, model.profile)
    else:
        reached = _of_other_dtype(model, profile, found.dtype)
    scale = {
        "eff_compute": reached.flops_per_s / own.flops_per_s,
        "eff_memory": reached.bytes_per_s / own.bytes_per_s,
    }
    priors = model.form.priors
    moved = {
        name: float(np.clip(getattr(model.constants_, name) * factor, priors[name].low, priors[name].high))
        for name, factor in scale.items()
    }
    found.constants_ = replace(model.constants_, **moved)
    found.tiles_ = _tiles(model, found)
    if profile.own_quantities != model.profile.own_quantities:
        found.offload_ = None  # a link and a host of its own
    return found


def _tiles(model: LatencyModel, found: LatencyModel) -> TileRule | None:
    """The rule of launch configurations on the other machine: that of the model, or of the other kernel's framework,
    where the model knows rules at all. A kernel without rules keeps the model's, on which its residual rests."""
    if model.tiles_ is None:
        return None
    profile = found.profile
    machine = profile.name if profile.name in names() else profile_name(profile.title) or profile.name
    rule = candidates(found.kernel, replace(profile, name=machine))[0]
    if rule is None or found.kernel == model.kernel:
        return replace(rule or model.tiles_, framework=model.tiles_.framework, machine=machine)
    return rule


def _of_other_dtype(model: LatencyModel, profile: HardwareProfile, dtype: str) -> Ceilings:
    """The ceilings that efficiencies of another dtype are relative to: by ratio of nominal peaks where one machine
    knows an achieved rate in one dtype and not in the other."""
    own, theirs = ceilings(profile, dtype), model.roof
    memory = transferred_ceilings(profile, model.dtype, model.profile).bytes_per_s
    unlike = ("_gemm_" in own.from_keys[0]) != ("_gemm_" in theirs.from_keys[0])
    peak, their_peak = (f"{one.from_keys[0].split('_')[0]}_peak_flops_per_s" for one in (own, theirs))
    if unlike and peak in profile.quantities and their_peak in model.profile.quantities:
        return Ceilings(theirs.flops_per_s * profile[peak] / model.profile[their_peak], memory, own.from_keys)
    return Ceilings(own.flops_per_s, memory, own.from_keys)


class Physics:
    """Log latencies of some work as a function of the constants alone, and their slopes; residuals stay as they are."""

    def __init__(self, model: LatencyModel, work: Work) -> None:
        self.model, self.work = model, work
        self.at = coordinates(model.form, model.form.identified(work))
        self.prepared = model.form.prepare(work)
        self.z = self.at.of(model.constants_)

    @cached_property
    def offset(self) -> Array:
        """What the residual adds at the model's own constants, log ns `[item]`."""
        return np.asarray(np.log(self.model.forecast(self.work).ns) - self.physical(self.z))

    def constants(self, z: Array) -> Any:
        """The constants at these coordinates; those whose coordinate is the model's keep its very value."""
        own, there = self.model.constants_, self.at.decode(z, self.model.constants_)
        kept = [name for name, a, b in zip(self.at.names, z, self.z, strict=True) if a == b]
        return replace(there, **{name: getattr(own, name) for name in kept})

    def physical(self, z: Array) -> Array:
        """Log ns of the physical part `[item]`."""
        parts = self.model.form.parts(self.prepared, self.model.roof, self.constants(z))
        return np.log(self.work.mean(total(parts)))

    def log_ns(self, z: Array) -> Array:
        """Log ns with what the residual adds, `[item]`."""
        return self.physical(z) + self.offset

    def slopes(self, z: Array) -> Array:
        """The change of log ns for a step of each coordinate, `[item, name]`, by central differences."""
        columns = []
        for step in np.eye(len(z)) * STEP:
            columns.append((self.physical(z + step) - self.physical(z - step)) / (2 * STEP))
        return np.column_stack(columns) if columns else np.zeros((self.work.n_items, 0))


def spread_of(model: LatencyModel, at: Coordinates) -> Array:
    """The prior's standard deviation of each coordinate on another machine, `[name]`.

    Of a constant that the model's own measurements said nothing about, its form's prior holds.
    """
    found = []
    for name, prior in zip(at.names, at.priors, strict=True):
        if name not in model.informed_:
            found.append(prior.sigma)
        else:
            found.append(SPREADS.get(name, OTHER_SPREAD) if prior.unit is None else OTHER_SPREAD * prior.sigma)
    return np.array(found)


def zero_shot_half_width(model: LatencyModel, work: Work, profile: HardwareProfile, kernel: str | None = None) -> Array:
    """The half-width of each item's interval, log units `[item]`, for a model on a machine (or a kernel) that it saw
    nothing of: its own, and beside it what constants that move by SPREADS do to the prediction. NaN as its own."""
    moved = transferred(model, profile, kernel=kernel)
    physics = Physics(moved, work)
    by_constant = physics.slopes(physics.z) * spread_of(moved, physics.at)
    own = model.forecast(work, profile).log_half_width
    return np.asarray(np.hypot(own, SIGMAS_90 * np.sqrt((by_constant**2).sum(axis=1))))


def sigma_of(model: LatencyModel, work: Work) -> Array:
    """How far a measurement is expected from a right prediction, log units `[item]`, by the model's held-out errors."""
    width = base_half_width(model, work)
    if width is None:
        return np.full(work.n_items, UNKNOWN_SIGMA)
    return np.maximum(width / SIGMAS_90, LEAST_SIGMA)


def covariance(
    slopes: Array, spread: Array, sigma: Array, shape_of: NDArray[np.int64], weights: Array | None = None
) -> Array:
    """The covariance of coordinates once points with these slopes `[point, name]` are measured, `[name, name]`:
    inverse of the prior's information plus the points', whose errors a shape shares in part (SHAPE_FRAC; model
    A2)."""
    joint = joint_covariance(slopes, spread, sigma, shape_of, weights)[0]
    return np.asarray(joint[: len(spread), : len(spread)])


def joint_covariance(
    slopes: Array, spread: Array, sigma: Array, shape_of: NDArray[np.int64], weights: Array | None
) -> tuple[Array, Array]:
    """The covariance of coordinates and the error that each shape shares, in sigmas; and the weighted design that a
    vector of errors is multiplied with, `[unknown, point]`."""
    shared = np.eye(int(shape_of.max()) + 1 if len(shape_of) else 0)[shape_of] * sigma[:, None]
    design = np.column_stack([slopes, shared])
    own = (1 - SHAPE_FRAC) * sigma**2 / (1.0 if weights is None else np.maximum(weights, 1e-9))
    prior = np.concatenate([spread**-2.0, np.full(shared.shape[1], 1 / SHAPE_FRAC)])
    weighted = design.T / own
    return np.asarray(np.linalg.inv(np.diag(prior) + weighted @ design)), weighted

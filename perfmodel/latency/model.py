"""Observations in, `LatencyModel` out: physical constants, a screened residual, and what held-out errors allow."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from perfmodel.capture_lines import GRAPH
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.physics import Array, Ceilings, Form, Work, ceilings, form_for, total, transferred_ceilings
from perfmodel.tile_rules import TileRule, candidates

from .anomalies import anomalies
from .confidence import (
    ANOMALY_LOG,
    DIRECTIONS,
    LEAST_IN_STEP,
    Confidence,
    Ladder,
    ladder_of,
    octaves_outside,
    ranges_of,
    width_of,
)
from .constants import fit_constants
from .trees import Trees, grow
from .work import hull_features, launched, residual_features, work_of

CLIP_LOG = 0.25  # a residual moves a physical prediction by no more than this, log units
LEAST_FOR_TREES, LEAST_GROUPS = 250, 5
GAIN_FRAC = 0.02  # held-out error that a residual must take away to be used
MAX_FOLDS = 12
# Octaves outside for which an interval is offered, if they were tried: by more tokens, and in any other direction.
TOKEN_STEPS, OTHER_STEPS = (1.0, 2.0, 4.0), (0.5, 1.0, 2.0)


@dataclass(frozen=True, eq=False)
class Forecast:
    """Predicted latencies, `[item]`: `ns`, the half-width of the interval in log units, NaN where none can be given
    because the item lies too far outside what was fitted, and `physical_ns`, what it is without the residual."""

    ns: Array
    log_half_width: Array
    physical_ns: Array


class LatencyModel(BaseEstimator):  # type: ignore[misc]
    """Predicts latency in ns of workloads on one machine and kernel from fitted physical constants.

    `fit(observations)` learns `constants_` (of which `informed_` were fitted), `residual_` (trees on the log residual,
    null where held-out errors did not say that it helps), `confidence_` (intervals and hull, of which
    `typical_half_width_` is the median, log units), `anomalies_` (slices of measurements that no physics explains, in
    words) and `held_out_` (each row's prediction by a model that saw nothing of its shape). `offload_` holds what
    `offload.fit_offload` learned of offloaded experts, null where none were measured. Nothing is pooled across kernels,
    dtypes or machines.
    """

    def __init__(self, profile: HardwareProfile, dtype: str, kernel: str, prior: Any = None) -> None:
        self.profile = profile
        self.dtype = dtype
        self.kernel = kernel
        self.prior = prior

    @property
    def roof(self) -> Ceilings:
        """The ceilings the efficiencies are relative to."""
        return ceilings(self.profile, self.dtype)

    @property
    def form(self) -> Form:
        """The form of the physical model that the kernel has."""
        return form_for(self.profile, self.kernel, self.dtype)

    def fit(
        self,
        observations: pl.DataFrame,
        y: Array | None = None,
        *,
        progress: Callable[[str], None] = lambda _: None,
        n_folds: int = MAX_FOLDS,
    ) -> Self:
        """Fit to `time_ns` (or `y`); `n_folds` is into how many the shapes are held out in turn, at most.

        With fewer than three shapes nothing can be held out: then there is no residual and no interval. Raises
        InputError for other dtypes or offloaded experts among the rows, no row, and times that are not above zero.
        """
        _require_resident(observations, self.dtype)
        measured = _logarithms(observations["time_ns"].to_numpy() if y is None else np.asarray(y))
        prior = self.prior or self.form.defaults
        self.tiles_, work, self.constants_ = self._tiles(observations, measured, prior)
        self.informed_ = self.form.identified(work)
        self.ops_ = sorted(observations["op"].cast(pl.String).unique())
        self.n_observations_ = len(measured)
        groups = observations["shape"].rank("dense").to_numpy().astype(np.int64)
        tried = _held_out(self, work, measured, groups, prior, progress, n_folds)
        self.residual_: Trees | None = None
        self.confidence_: Confidence | None = None
        self.held_out_: Array | None = None
        self.anomalies_: list[str] = []
        self.typical_half_width_: float | None = None
        self.offload_: dict[str, Any] | None = None
        # `fitting.fit_source` knows these; how calls were launched is known here.
        self.errors_: Any = None
        self.points_: Any = None
        self.evidence_: dict[str, Any] = {"launch": GRAPH if observations["launch"].is_not_null().all() else None}
        if tried is not None:
            self._conclude(work, measured, groups, prior, tried)
            observed = observations.with_columns(time_ns=np.exp(measured))
            self.anomalies_ = anomalies(observed, np.exp(tried.chosen(self.residual_)))
        return self

    def _tiles(self, observations: pl.DataFrame, measured: Array, prior: Any) -> tuple[TileRule | None, Work, Any]:
        """The rule of launch configurations that explains the measurements best, of those the kernel may have."""
        found = []
        unconfigured = work_of(observations)
        for rule in candidates(self.kernel, self.profile):
            work = launched(unconfigured, observations, rule)
            constants = fit_constants(self.form, work, measured, self.roof, prior)
            error = np.abs(np.log(_physical(self, work, constants)[0]) - measured)
            found.append((float(np.minimum(error, ANOMALY_LOG).mean()), rule, work, constants))
        return min(found, key=lambda one: one[0])[1:]

    def _conclude(self, work: Work, measured: Array, groups: NDArray[np.int64], prior: Any, tried: "Tried") -> None:
        """Decide on the residual from held-out errors, and make the intervals of what is used."""
        physical, features = _physical(self, work, self.constants_)
        if tried.helps(measured):
            self.residual_ = _residual(features, measured - np.log(physical))
        predicted = tried.chosen(self.residual_)
        self.held_out_ = np.exp(predicted)
        error = np.abs(predicted - measured)
        normal = error < ANOMALY_LOG
        if normal.sum() < 10 or 2 * normal.sum() < len(normal):  # an interval of a minority promises nothing
            return
        quantile, scale = width_of(features[normal], error[normal], groups[normal])
        hull = hull_features(work, self.roof)
        none = {direction: Ladder() for direction in DIRECTIONS}
        n_anomalies = int((~normal).sum())
        inside = Confidence(quantile, scale, ranges_of(hull), none, int(normal.sum()), tried.n_groups, n_anomalies)
        relative = (error / inside.base_half_width(features))[normal]
        ladders = {
            direction: ladder_of(tried.octaves[direction][normal], relative, OTHER_STEPS) for direction in DIRECTIONS
        }
        ladders["tokens"] = self._by_tokens(work, measured, prior, inside)
        self.confidence_ = replace(inside, ladders=ladders)
        self.typical_half_width_ = float(np.median(inside.base_half_width(features)))

    def _by_tokens(self, work: Work, measured: Array, prior: Any, inside: Confidence) -> Ladder:
        """How errors grow with more tokens than were fitted: the largest batches of these observations, predicted by
        models of batches smaller by each step."""
        n_tokens = work.mean(work.n_tokens)
        octaves, relative = [], []
        for before, step in pairwise((0.0, *TOKEN_STEPS)):
            small = np.flatnonzero(n_tokens <= n_tokens.max() / 2**step)
            large = np.flatnonzero(n_tokens > n_tokens.max() / 2 ** (step - before))
            if len(large) < LEAST_IN_STEP:  # then nearer ones count for it too
                large = np.flatnonzero(n_tokens > n_tokens.max() / 2**step)
            if len(small) < LEAST_FOR_TREES // 2 or len(large) < LEAST_IN_STEP:
                continue
            constants, residual = _train(self, work.take(small), measured[small], prior)
            physical, features = _physical(self, work.take(large), constants)
            error = np.abs(np.log(_with_residual(physical, features, residual)) - measured[large])
            normal = error < 2 * ANOMALY_LOG
            octaves.append(np.full(int(normal.sum()), step))
            relative.append((error / inside.base_half_width(features))[normal])
        return ladder_of(np.concatenate(octaves), np.concatenate(relative), TOKEN_STEPS) if octaves else Ladder()

    def predict(self, observations: pl.DataFrame) -> Array:
        """Predicted latency of each row, ns `[row]`."""
        return self.forecast(self.work(observations)).ns

    def work(self, observations: pl.DataFrame, machine: HardwareProfile | None = None) -> Work:
        """Observations as work for this model's kernel, its launches configured as on `machine`, where given.

        Raises InputError for a machine of another kind of device, and for another dtype.
        """
        if machine is not None and machine.device != self.profile.device:
            raise InputError(
                f"the model was fitted on a {self.profile.device} ({self.profile.name}), {machine.name!r} is a "
                f"{machine.device}"
            )
        if observations.is_empty():
            raise InputError("there are no observations to predict")
        if set(observations["dtype"].unique()) != {self.dtype}:
            found = ", ".join(observations["dtype"].unique())
            raise InputError(f"the model is of {self.dtype}, these observations of {found}")
        tiles = self.tiles_
        if tiles is not None and machine is not None:
            tiles = replace(tiles, machine=machine.name)
        return work_of(observations, tiles)

    def forecast(self, work: Work, profile: HardwareProfile | None = None) -> Forecast:
        """Latency of each item of work with its interval, on this model's machine or on another of the same kind."""
        physical, features = _physical(self, work, self.constants_, profile)
        ns = _with_residual(physical, features, self.residual_)
        if self.confidence_ is None:
            return Forecast(ns, np.full(len(ns), np.nan), physical)
        width = self.confidence_.half_width(features, hull_features(work, self.roof))
        width = np.where(np.logical_or.reduce(list(self._unseen(work).values())), np.nan, width)
        return Forecast(ns, width, physical)

    def outside(self, work: Work) -> list[str]:
        """The axes along which any item lies outside what was fitted, each as a phrase; empty when inside."""
        found = [f"{what} was among the observations" for what, items in self._unseen(work).items() if items.any()]
        if self.confidence_ is None:
            return [*found, "too few measurements could be held out, so nothing is known of its errors"]
        return found + self.confidence_.outside(hull_features(work, self.roof))

    def _unseen(self, work: Work) -> dict[str, NDArray[np.bool_]]:
        """Which items are of a kind that was not fitted, `[item]` by what is missing: constants of their own stayed at
        the default, and held-out errors are those of another kind."""
        is_layer, is_eager = work.mean(work.layer) > 0, work.mean(work.eager) > 0
        found = {
            "no whole layer": is_layer & all(op == "grouped_gemm" for op in self.ops_),
            "no bare grouped GEMM": ~is_layer & ("grouped_gemm" not in self.ops_),
        }
        if self.profile.device == "gpu":
            is_graph = self.evidence_.get("launch") == GRAPH
            found["no call launched by the host"] = is_eager & is_graph
            found["no call replayed from a graph"] = ~is_eager & (not is_graph)
        return found


def hull_of(model: LatencyModel, observations: pl.DataFrame) -> dict[str, Array]:
    """Where observations lie along the axes of HULL on the model's machine, `[row]` by axis."""
    return hull_features(model.work(observations), model.roof)


def base_half_width(model: LatencyModel, work: Work) -> Array | None:
    """The half-width of each item's interval in log units, were it inside the hull, `[item]`; null without any."""
    if model.confidence_ is None:
        return None
    _, features = _physical(model, work, model.constants_)
    return model.confidence_.base_half_width(features)


def _logarithms(times_ns: Array) -> Array:
    wrong = times_ns[~((times_ns > 0) & (times_ns < np.inf))]
    if len(wrong):
        raise InputError(f"found {len(wrong)} times such as {wrong[0]}, expected numbers above zero")
    return np.asarray(np.log(times_ns))


def _require_resident(observations: pl.DataFrame, dtype: str) -> None:
    """Refuse what would be pooled although it differs: offloaded experts, another dtype."""
    if observations.is_empty():
        raise InputError("there are no observations to fit a model to")
    found = set(observations["access"].unique()) - {"resident"}
    if found or observations["offload_frac"].max():
        raise InputError(
            f"observations with offloaded experts ({', '.join(sorted(found))}) say nothing of resident ones; "
            "`fit_offload` takes them"
        )
    if set(observations["dtype"].unique()) != {dtype}:
        raise InputError(f"observations of {', '.join(observations['dtype'].unique())} cannot fit a model of {dtype}")


def _physical(
    model: LatencyModel, work: Work, constants: Any, profile: HardwareProfile | None = None
) -> tuple[Array, Array]:
    """Physical predictions, ns `[item]`, and the features that a residual is learned from."""
    roof = model.roof if profile is None else transferred_ceilings(profile, model.dtype, model.profile)
    parts = model.form.resident_parts(work, roof, constants)
    return work.mean(total(parts)), residual_features(work, parts)


def _residual(features: Array, residual: Array) -> Trees | None:
    """Trees on the log residual, from measurements that are no anomalies; null where most of them are."""
    kept = np.abs(residual - np.median(residual)) < ANOMALY_LOG
    if 2 * kept.sum() < len(kept):
        return None
    return grow(features[kept], residual[kept], least=40 if kept.sum() > 1000 else 20)


def _train(model: LatencyModel, work: Work, measured: Array, prior: Any) -> tuple[Any, Trees | None]:
    """Constants and, with enough rows, the residual, of some of the observations. The search begins at the prior: from
    constants of all rows it may end in another minimum, and what is held out would have a say."""
    constants = fit_constants(model.form, work, measured, model.roof, prior)
    if len(measured) < LEAST_FOR_TREES:
        return constants, None
    physical, features = _physical(model, work, constants)
    return constants, _residual(features, measured - np.log(physical))


def _with_residual(physical: Array, features: Array, residual: Trees | None) -> Array:
    """Physical predictions, ns `[item]`, moved by what the trees say of their features; as they are without trees."""
    if residual is None:
        return physical
    return np.asarray(physical * np.exp(np.clip(residual.predict(features), -CLIP_LOG, CLIP_LOG)))


@dataclass(frozen=True, eq=False)
class Tried:
    """Held-out predictions, log ns `[item]`, by physics alone and with the residual, and how far outside the shapes of
    its fold's training each item lay."""

    physical: Array
    hybrid: Array
    octaves: dict[str, Array]
    n_groups: int

    def chosen(self, residual: Trees | None) -> Array:
        """The predictions of what is used."""
        return self.physical if residual is None else self.hybrid

    def helps(self, measured: Array) -> bool:
        """Whether the residual takes away at least GAIN_FRAC of the held-out error, and none of the tail's is added."""
        with_it, without = (np.abs(x - measured) for x in (self.hybrid, self.physical))
        normal = without < ANOMALY_LOG
        if not normal.any():
            return False
        with_it, without = with_it[normal], without[normal]
        tail = np.quantile(with_it, 0.9) <= (1 + GAIN_FRAC) * np.quantile(without, 0.9)
        return bool(tail and with_it.mean() < (1 - GAIN_FRAC) * without.mean())


def _held_out(
    model: LatencyModel,
    work: Work,
    measured: Array,
    groups: NDArray[np.int64],
    prior: Any,
    progress: Callable[[str], None],
    n_folds: int,
) -> Tried | None:
    """Each group predicted by a model of the others; null with fewer than three groups."""
    names = np.random.default_rng(0).permutation(np.unique(groups))
    if len(names) < 3:
        return None
    physical, hybrid = np.zeros(len(measured)), np.zeros(len(measured))
    octaves = {direction: np.zeros(len(measured)) for direction in DIRECTIONS}
    hull = hull_features(work, model.roof)
    folds = np.array_split(names, min(n_folds, len(names)))
    for i, fold in enumerate(folds, 1):
        progress(f"holding out {i} of {len(folds)}")
        held = np.isin(groups, fold)
        train, test = np.flatnonzero(~held), np.flatnonzero(held)
        constants, residual = _train(model, work.take(train), measured[train], prior)
        if len(names) < LEAST_GROUPS:
            residual = None
        alone, features = _physical(model, work.take(test), constants)
        physical[held], hybrid[held] = np.log(alone), np.log(_with_residual(alone, features, residual))
        ranges = ranges_of({name: values[~held] for name, values in hull.items()})
        outside = octaves_outside(ranges, {name: values[held] for name, values in hull.items()})
        for direction, values in outside.items():
            octaves[direction][held] = values
    return Tried(physical, hybrid, octaves, len(names))

"""The constants of offloading from measurements: each way to reach offloaded experts for itself, residents fixed.

Fitted is the slowdown. The model's added time stands on top of the *measured* resident time of the same workload, so an
error of the resident model does not end up in constants of the link; where a workload was not measured with all experts
resident, the model's resident time stands for it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.latency.confidence import conformal_quantile
from perfmodel.latency.constants import solve
from perfmodel.latency.model import LatencyModel
from perfmodel.physics import Array, Work, total

from .constants import ASSUMED, PRIORS, OffloadConstants
from .device import Device, Host, Mask, rate_keys
from .fitted import REREAD_ROWS, Fitted, HeldOut, OffloadFit, Way, WayFit, from_json
from .modes import offload_parts

MAX_FOLDS = 12
LEAST_GROUPS = 3  # fewer shapes or fractions cannot be held out in turn
LEAST_SCORES = 10  # held-out errors below which there is no interval
SAME_WORKLOAD = ("op", "shape", "n_tokens", "routing", "tokens_per_expert", "gemm_k", "gemm_n", "dtype", "device")
PLAUSIBLE = 1.92  # half the 95 % quantile of chi-squared: what a discrete constant may fit worse and still be possible

# The constants each access mode has; of those, what can be known depends on what was measured (`_names`).
CONSTANTS_OF: dict[str, tuple[str, ...]] = {
    "zero-copy": ("reread_frac", "link_overlap_frac", "link_eff"),
    "copy": ("copy_eff", "copy_ns"),
    "copy-overlap": ("copy_eff", "copy_ns", "copy_overlap_frac"),
    "cpu": ("host_eff_compute", "host_eff_memory", "host_expert_ns", "merge_ns"),
    "near-data": ("ndp_eff", "merge_ns"),
    "paged": ("copy_eff", "copy_ns"),
}


@dataclass(frozen=True, eq=False)
class Measured:
    """The offloaded items of one way, `[item]`: their work, which experts are gone `[batch, expert]`, log of the time,
    measured and predicted resident time of the same workload (measured: NaN where none was), and groups."""

    work: Work
    offloaded: Mask
    log_ns: Array
    resident_ns: Array
    resident_model_ns: Array
    shape: NDArray[np.int64]
    frac: NDArray[np.int64]

    def take(self, items: NDArray[np.int64]) -> "Measured":
        """Some of the items."""
        chosen = np.isin(self.work.item_of, items)
        columns = {name: getattr(self, name)[items] for name in ("log_ns", "resident_ns", "resident_model_ns")}
        groups = {name: getattr(self, name)[items] for name in ("shape", "frac")}
        return Measured(self.work.take(items), self.offloaded[chosen], **columns, **groups)


def fit_offload(
    model: LatencyModel,
    observations: pl.DataFrame,
    *,
    host: Host | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> OffloadFit:
    """Constants of every way to reach offloaded experts that was measured, with errors held out by shape and fraction.

    `observations` is an OBSERVATIONS table with one row per workload, offloaded and resident, from which rows of the
    model's dtype are taken. `host` is a fitted model of the CPU beside the GPU. Raises InputError when no expert is
    offloaded in any row.
    """
    rows = observations.filter(pl.col("dtype") == model.dtype)
    away = rows.filter(pl.col("access") != "resident")
    if not away.height:
        raise InputError(f"no {model.dtype} workload with offloaded experts among {observations.height} observations")
    found = {}
    for access, residency in sorted(away.select("access", "residency").unique().iter_rows(), key=str):
        way = Way(access, residency)
        progress(f"fitting {way}")
        measured = _measured(model, rows, way)
        device = Device(
            model.profile, model.roof, model.form, model.constants_, ASSUMED, residency=residency, host=host
        )
        found[way] = _fit_way(way, measured, device)
    return OffloadFit(found)


def without_rates(profile: HardwareProfile, offloaded: pl.DataFrame) -> dict[Way, str]:
    """The ways among offloaded rows that a machine lacks a rate for (a probe failed), each with what is missing."""
    found = {}
    for access, residency in offloaded.select("access", "residency").unique().sort(pl.all()).iter_rows():
        try:
            rate_keys(profile, access, residency)
        except InputError as error:
            found[Way(access, residency)] = str(error)
    return found


def rows_of_other_ways(observations: pl.DataFrame, ways: Iterable[Way]) -> pl.DataFrame:
    """The rows of an OBSERVATIONS table that are of none of these ways."""
    for way in ways:
        mine = (pl.col("access") == way.access) & pl.col("residency").eq_missing(pl.lit(way.residency))
        observations = observations.filter(~mine)
    return observations


def judge_offload(model: LatencyModel, observations: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """How far the offloaded rows of an OBSERVATIONS table lie from what a model says of its own machine, by way: n,
    median_ape, p90_ape, worst_ape, and whether the way's constants were fitted (else they are assumed).

    As in a fit the model's added time stands on the measured resident time of a workload, where there is one.
    """
    rows = observations.filter(pl.col("dtype") == model.dtype)
    away = rows.filter(pl.col("access") != "resident")
    away = rows_of_other_ways(away, without_rates(model.profile, away)).select("access", "residency").unique()
    known = from_json(model.offload_ or {})
    found = {}
    for access, residency in sorted(away.iter_rows(), key=str):
        constants, is_fitted = known.constants_of(access, residency)
        device = Device(model.profile, model.roof, model.form, model.constants_, constants, residency=residency)
        measured = _measured(model, rows, Way(access, residency))
        ape = np.abs(np.expm1(log_predicted(access, measured, device) - measured.log_ns))
        found[str(Way(access, residency))] = {
            "n": len(ape),
            "median_ape": float(np.median(ape)),
            "p90_ape": float(np.quantile(ape, 0.9)),
            "worst_ape": float(ape.max()),
            "is_fitted": is_fitted,
        }
    return found


def _fit_way(way: Way, measured: Measured, device: Device) -> WayFit:
    constants, fitted = _fit(way, measured, device)
    by_shape = _held_out(way, measured, device, constants, measured.shape)
    by_frac = _held_out(way, measured, device, constants, measured.frac)
    scored = [one.quantile for one in (by_shape, by_frac) if one is not None and one.n >= LEAST_SCORES]
    return WayFit(
        constants=fitted,
        by_shape=by_shape,
        by_frac=by_frac,
        log_half_width=max(scored) if scored else None,
        n_observations=len(measured.log_ns),
        n_with_resident=int(np.isfinite(measured.resident_ns).sum()),
    )


def _measured(model: LatencyModel, rows: pl.DataFrame, way: Way) -> Measured:
    """The offloaded rows of a way beside the resident ones of the same workloads, as arrays."""
    numbered = rows.with_row_index("row")
    away = numbered.filter((pl.col("access") == way.access) & pl.col("residency").eq_missing(pl.lit(way.residency)))
    resident = numbered.filter(pl.col("access") == "resident")
    partner = _partners(away, resident)
    work = model.work(away.drop("row"))
    n_items = work.n_items
    resident_ns = np.full(n_items, np.nan)
    resident_model_ns = work.mean(total(model.form.resident_parts(work, model.roof, model.constants_)))
    paired = np.flatnonzero(partner >= 0)
    if len(paired):
        found = resident[partner[paired].tolist()].drop("row")
        theirs = model.work(found)
        parts = model.form.resident_parts(theirs, model.roof, model.constants_)
        resident_model_ns[paired] = theirs.mean(total(parts))
        resident_ns[paired] = found["time_ns"].to_numpy()
    offloaded = np.zeros((n_items, work.rows.shape[1]), dtype=bool)
    for item, experts in enumerate(away["offloaded"].to_list()):
        offloaded[item, experts or []] = True
    return Measured(
        work,
        offloaded[work.item_of],
        np.log(away["time_ns"].to_numpy()),
        resident_ns,
        resident_model_ns,
        away["shape"].rank("dense").to_numpy().astype(np.int64),
        away["offload_frac"].round(4).rank("dense").to_numpy().astype(np.int64),
    )


def _partners(away: pl.DataFrame, resident: pl.DataFrame) -> NDArray[np.int64]:
    """For each offloaded row the place of a resident row of the same workload, -1 for none; one that was launched the
    same way before one that was not."""
    places: dict[tuple[Any, ...], int] = {}
    others: dict[tuple[Any, ...], int] = {}
    for place, row in enumerate(resident.select(*SAME_WORKLOAD, "launch").iter_rows()):
        key = tuple(tuple(x) if isinstance(x, list) else x for x in row)
        places.setdefault(key, place)
        others.setdefault(key[:-1], place)
    found = []
    for row in away.select(*SAME_WORKLOAD, "launch").iter_rows():
        key = tuple(tuple(x) if isinstance(x, list) else x for x in row)
        found.append(places.get(key, others.get(key[:-1], -1)))
    return np.array(found, dtype=np.int64)


def log_predicted(access: str, measured: Measured, device: Device) -> Array:
    """Logarithm of the latency, ns `[item]`: what the model adds, on top of the measured resident time where known.

    Where offloading takes time away (experts computed elsewhere), it is the model's ratio that counts instead.
    """
    parts, _ = offload_parts(measured.work, measured.offloaded, access, device)
    ns = measured.work.mean(total(parts))
    added = ns - measured.resident_model_ns
    on_top = np.where(added >= 0, measured.resident_ns + added, measured.resident_ns * ns / measured.resident_model_ns)
    return np.asarray(np.log(np.where(np.isfinite(measured.resident_ns), on_top, ns)))


def _names(way: Way, measured: Measured, device: Device) -> tuple[str, ...]:
    """The constants of a way that these measurements can say anything about."""
    names = CONSTANTS_OF[way.access]
    if device.host is not None:
        names = tuple(name for name in names if not name.startswith("host_"))
    asks_host = way.access != "zero-copy" or way.residency == "split"
    return (*names, "counts_ns") if asks_host and bool(measured.work.layer.any()) else names


def _fit(
    way: Way, measured: Measured, device: Device, start: OffloadConstants | None = None, n_steps: int = 40
) -> tuple[OffloadConstants, dict[str, Fitted]]:
    """The constants of a way, and how far each is known. How many rows a read serves is a number of tiles, so it is
    searched among REREAD_ROWS instead of following a slope that has steps; of those that fit alike, the one nearest
    to the assumed is taken."""
    names = _names(way, measured, device)
    candidates = REREAD_ROWS if way.access == "zero-copy" else (ASSUMED.reread_rows,)
    tried = []
    for reread_rows in candidates:
        prior = replace(ASSUMED, reread_rows=reread_rows)
        begin = None if start is None else replace(start, reread_rows=reread_rows)
        solved = solve(
            names,
            PRIORS,
            prior,
            lambda constants: log_predicted(way.access, measured, replace(device, offload=constants)),
            measured.log_ns,
            start=begin,
            n_steps=n_steps,
            groups=measured.shape,
        )
        tried.append((solved, replace(prior, **solved.values)))
    least = min(solved.misfit for solved, _ in tried)
    possible = [one for one in tried if one[0].misfit <= least + PLAUSIBLE * one[0].noise_log ** 2]
    solved, constants = min(possible, key=lambda one: abs(np.log(one[1].reread_rows / ASSUMED.reread_rows)))
    fitted = {name: Fitted.of(name, value, solved.sigmas[name]) for name, value in solved.values.items()}
    if way.access == "zero-copy":
        rows = [one.reread_rows for _, one in possible]
        is_known = len(rows) == 1 and fitted["reread_frac"].low > 0
        fitted["reread_rows"] = Fitted(constants.reread_rows, min(rows), max(rows), is_known)
    return constants, fitted


def _held_out(
    way: Way, measured: Measured, device: Device, start: OffloadConstants, groups: NDArray[np.int64]
) -> HeldOut | None:
    """Errors of each group predicted by constants of the others; null with fewer than LEAST_GROUPS."""
    names = np.unique(groups)
    if len(names) < LEAST_GROUPS:
        return None
    error = np.empty(len(groups))
    for fold in np.array_split(np.random.default_rng(0).permutation(names), min(MAX_FOLDS, len(names))):
        held = np.isin(groups, fold)
        constants, _ = _fit(way, measured.take(np.flatnonzero(~held)), device, start, n_steps=12)
        asked = measured.take(np.flatnonzero(held))
        error[held] = log_predicted(way.access, asked, replace(device, offload=constants)) - asked.log_ns
    absolute = np.abs(np.expm1(error))
    return HeldOut(
        n=len(error),
        n_groups=len(names),
        median_frac=float(np.median(absolute)),
        p90_frac=float(np.quantile(absolute, 0.9)),
        worst_frac=float(absolute.max()),
        quantile=conformal_quantile(np.abs(error)),
    )

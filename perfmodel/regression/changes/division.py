"""What the time of workloads consists of: the baseline's model as a function of how much longer each part takes.

The physical model (docs/model.md) with its constants fitted to the baseline gives every workload's time; here its rates
and overheads are scaled, part by part. The slope of log time over a log factor is the part's share of the time, and
shares sum to one, for times are homogeneous in what they are made of.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from perfmodel.capture import Capture, per_workload, profile_of
from perfmodel.capture_lines import GRAPH, RESIDENT
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.latency import LatencyModel, fit_constants, work_of
from perfmodel.latency.constants import solve
from perfmodel.offload import PRIORS, Device, Mask, OffloadConstants, offload_parts
from perfmodel.offload.fit import CONSTANTS_OF
from perfmodel.offload.fitted import from_json
from perfmodel.physics import Array, Ceilings, Form, Parts, Work, ceilings, form_for, total

LAUNCH, COMPUTE, MEMORY, LINK, EXPOSURE, HOST = "launch", "compute", "memory", "link", "copy exposure", "host"
REPLAY = "replay"
# What may change for itself, and the part of regression.PARTS that it is: calls replayed from a CUDA graph cost the
# host nothing each, so that they change apart from those that it launches.
CAUSES = {
    LAUNCH: LAUNCH,
    REPLAY: LAUNCH,
    COMPUTE: COMPUTE,
    MEMORY: MEMORY,
    LINK: LINK,
    EXPOSURE: EXPOSURE,
    HOST: HOST,
}
NOT_LAUNCH = {"page_ns": MEMORY, "score_ns": COMPUTE}  # constants in ns that are no cost of calls
N_STEPS = 20  # of a search for constants of offloading
N_ADDED = 4  # steps of the way along which slopes are summed
STEP = 1e-3  # of logarithms, for slopes
LEAST_SHARE_FRAC = 0.02  # of any workload's time, that a part must have to be judged at all

# What times of offloaded workloads follow besides calls, compute and memory, by access mode.
FOLLOWS = {
    "zero-copy": (LINK,),
    "copy": (LINK,),
    "copy-overlap": (LINK, EXPOSURE),
    "cpu": (LINK, HOST),
}
Times = Callable[[dict[str, float]], Array]
PINNED = 0.03  # how far a fit may move a constant that is held, in the prior's own sigmas


@dataclass(frozen=True, eq=False)
class Group:
    """Workloads of one kind: their places, their times as a function of changes by cause, and which causes matter."""

    places: NDArray[np.int64]
    times: Times
    causes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Division:
    """The time of workloads, `keys`, as a function of what changes, `causes` (some of CAUSES).

    A change is the logarithm of how many times longer a part takes; of `copy exposure` it is the share of what hid
    under compute and no longer does. `shares[workload, cause]` are parts of the baseline's time, the link's of
    overlapped copies under `copy exposure`; `misfit[workload]` is how far the model is from the baseline's own times,
    log units; `facts` has a row for each workload. `left_out` says of how many others no model can be had, by the
    reason.
    """

    keys: tuple[str, ...]
    causes: tuple[str, ...]
    shares: Array
    misfit: Array
    facts: pl.DataFrame
    left_out: dict[str, int]
    groups: tuple[Group, ...]

    def log_ns(self, changes: Array) -> Array:
        """Log time of each workload, `[workload]`, with these changes, `[cause]`."""
        return _log_ns(self.groups, len(self.keys), dict(zip(self.causes, changes.tolist(), strict=True)))

    def slopes(self, changes: Array) -> Array:
        """By how much log times follow each change, `[workload, cause]`."""
        return _slopes(self.groups, len(self.keys), self.causes, dict(zip(self.causes, changes.tolist(), strict=True)))

    def added(self, changes: Array) -> Array:
        """What each change adds to each workload's time, as a part of the baseline's, `[workload, cause]`.

        Slopes are summed along the way from no change to these (Aumann and Shapley's values), so that parts which do
        not change add nothing and all together add the whole.
        """
        begin = self.log_ns(np.zeros(len(changes)))
        found = np.zeros((len(self.keys), len(changes)))
        for step in (np.arange(N_ADDED) + 0.5) / N_ADDED:
            at = step * changes
            found += np.exp(self.log_ns(at) - begin)[:, None] * self.slopes(at) * changes / N_ADDED
        missing = np.expm1(self.log_ns(changes) - begin) - found.sum(axis=1)
        sizes = np.abs(found)
        return np.asarray(found + missing[:, None] * sizes / np.maximum(sizes.sum(axis=1, keepdims=True), 1e-12))


def divide(
    capture: Capture, keys: Sequence[str], model: LatencyModel | None = None, held: Mapping[str, float] | None = None
) -> Division:
    """How the time of these workloads of a baseline divides into parts.

    Workloads are taken by dtype and kind of launch, and offloaded ones by how they are reached. `model` is one that was
    fitted to this capture: its constants serve the workloads of its kind; those of others are fitted here, beginning
    from it. Constants that are `held` are taken that many times as large as they fit best, and the others are fitted
    beside them. Raises InputError where the capture's machine has no ceilings, or no workload can be divided.
    """
    rows = per_workload(capture.observations).filter(pl.col("workload").is_in(list(keys)))
    profile, kernel = profile_of(capture), str(capture.manifest["kernel"])
    constants: dict[tuple[str, str | None], Any] = {}
    groups: list[Group] = []
    tables: list[pl.DataFrame] = []
    n = 0
    left_out: dict[str, int] = {}
    for (dtype, launch, access, residency), found in _by_kind(rows):
        form = form_for(profile, kernel, dtype)
        try:
            tiles = model.tiles_ if model is not None and model.dtype == dtype else None
            work, roof = work_of(found, tiles), ceilings(profile, dtype)
            prior = _prior(model, form, constants, dtype, launch)
            if access == RESIDENT:
                log_ns = np.log(found["time_ns"].to_numpy())
                if not _is_of(model, dtype, launch):
                    prior = fit_constants(form, work, log_ns, roof, prior)
                if held:
                    prior = _beside(held, form, work, log_ns, roof, prior)
            constants.setdefault((dtype, launch), prior)
            device = Device(profile, roof, form, prior, residency=residency)
            offloaded = _offloaded(found, work)
            if access != RESIDENT:
                device = replace(device, offload=_offload(model, found, work, offloaded, access, device))
            calls = REPLAY if launch == GRAPH else LAUNCH
            times = _times(work, offloaded, device, access, calls)
            times({})
        except InputError as error:
            left_out[str(error)] = left_out.get(str(error), 0) + found.height
            continue
        groups.append(Group(np.arange(n, n + found.height), times, (calls, COMPUTE, MEMORY, *FOLLOWS.get(access, ()))))
        tables.append(found)
        n += found.height
    if not groups:
        raise InputError(min(left_out) if left_out else "no workload to divide into parts")
    facts = pl.concat(tables)
    shares = _slopes(groups, n, tuple(CAUSES), {})
    overlapped = (facts["access"] == "copy-overlap").to_numpy()
    link, exposed = (list(CAUSES).index(cause) for cause in (LINK, EXPOSURE))
    matters = np.abs(shares).max(axis=0) >= LEAST_SHARE_FRAC
    matters[exposed] = overlapped.any()
    shares[:, exposed] = np.where(overlapped, shares[:, link], 0.0)
    shares[:, link] = np.where(overlapped, 0.0, shares[:, link])
    causes = tuple(cause for cause, is_there in zip(CAUSES, matters, strict=True) if is_there)
    misfit = np.log(facts["time_ns"].to_numpy()) - _log_ns(groups, n, {})
    return Division(tuple(facts["workload"]), causes, shares[:, matters], misfit, facts, left_out, tuple(groups))


def _beside(held: Mapping[str, float], form: Form, work: Work, log_ns: Array, roof: Ceilings, best: Any) -> Any:
    """The constants that fit best beside some that are held at a multiple of what they are in the `best` fit."""
    priors, start = dict(form.priors), best
    for name in held.keys() & priors.keys():
        prior = priors[name]
        start = replace(start, **{name: float(np.clip(held[name] * getattr(best, name), prior.low, prior.high))})
        priors[name] = prior._replace(sigma=prior.sigma * PINNED)
    return fit_constants(replace(form, priors=priors), work, log_ns, roof, start)


def _by_kind(rows: pl.DataFrame) -> list[tuple[tuple[Any, ...], pl.DataFrame]]:
    """Workloads by dtype, launch, access and residency, resident ones first."""
    by = ["dtype", "launch", "access", "residency"]
    kinds = rows.group_by(by, maintain_order=True)
    return sorted(kinds, key=lambda one: (one[0][2] != RESIDENT, str(one[0])))


def _is_of(model: LatencyModel | None, dtype: str, launch: str | None) -> bool:
    return model is not None and model.dtype == dtype and model.evidence_.get("launch") == launch


def _prior(
    model: LatencyModel | None, form: Form, constants: dict[tuple[str, str | None], Any], dtype: str, launch: str | None
) -> Any:
    """The constants that are nearest to a kind of workload among those that are known."""
    others = [one for (of, _), one in constants.items() if of == dtype] + list(constants.values())
    own = None if model is None else model.constants_
    known = [constants.get((dtype, launch)), own if _is_of(model, dtype, launch) else None, *others, own]
    return next((one for one in known if isinstance(one, type(form.defaults))), form.defaults)


def _offload(
    model: LatencyModel | None, rows: pl.DataFrame, work: Work, offloaded: Mask, access: str, device: Device
) -> OffloadConstants:
    """The constants of an access mode: those of the model where it has them, else fitted to these workloads."""
    known = from_json((model.offload_ if model is not None else None) or {})
    constants, is_measured = known.constants_of(access, device.residency)
    if is_measured:
        return constants
    names = (*CONSTANTS_OF[access], *(("counts_ns",) if access != "zero-copy" else ()))
    solved = solve(
        names,
        PRIORS,
        constants,
        lambda at: np.log(work.mean(total(offload_parts(work, offloaded, access, replace(device, offload=at))[0]))),
        np.log(rows["time_ns"].to_numpy()),
        n_steps=N_STEPS,
    )
    return replace(constants, **solved.values)


def _offloaded(rows: pl.DataFrame, work: Work) -> Mask:
    """Which experts are not in device memory, `[batch, expert]`."""
    gone = np.zeros((work.n_items, work.rows.shape[1]), dtype=bool)
    for item, experts in enumerate(rows["offloaded"].to_list()):
        gone[item, experts or []] = True
    return np.asarray(gone[work.item_of])


def _times(work: Work, offloaded: Mask, device: Device, access: str, launch: str) -> Times:
    """The time of these workloads, ns `[workload]`, as a function of changes by cause."""
    prepared = device.form.prepare(work)

    def parts(at: Device) -> Parts:
        if access == RESIDENT:
            return at.form.parts(prepared, at.roof, at.constants)
        return offload_parts(work, offloaded, access, at)[0]

    return lambda changes: work.mean(total(parts(_changed(device, changes, launch))))


def _changed(device: Device, changes: dict[str, float], launch: str) -> Device:
    """The device whose parts take exp(change) times as long."""
    factor = {cause: float(np.exp(changes.get(cause, 0.0))) for cause in CAUSES}
    roof = replace(
        device.roof,
        flops_per_s=device.roof.flops_per_s / factor[COMPUTE],
        bytes_per_s=device.roof.bytes_per_s / factor[MEMORY],
    )
    calls = {
        field.name: getattr(device.constants, field.name) * factor[NOT_LAUNCH.get(field.name, launch)]
        for field in fields(device.constants)
        if field.name.endswith("_ns")
    }
    o = device.offload
    offload = replace(
        o,
        copy_ns=o.copy_ns * factor[launch],
        counts_ns=o.counts_ns * factor[launch],
        merge_ns=o.merge_ns * factor[launch],
        host_expert_ns=o.host_expert_ns * factor[HOST],
        copy_overlap_frac=o.copy_overlap_frac * (1 - changes.get(EXPOSURE, 0.0)),
    )
    return replace(
        device,
        profile=_slowed(device.profile, {"link_": factor[LINK], "host_": factor[HOST]}),
        roof=roof,
        constants=replace(device.constants, **calls),
        offload=offload,
    )


def _slowed(profile: HardwareProfile, factors: dict[str, float]) -> HardwareProfile:
    """The machine whose rates with these prefixes are lower by a factor."""
    if all(factor == 1 for factor in factors.values()):
        return profile
    slower = {
        key: replace(one, value=one.value / factor)
        for prefix, factor in factors.items()
        for key, one in profile.quantities.items()
        if key.startswith(prefix) and key.endswith("_per_s")
    }
    return replace(profile, quantities={**profile.quantities, **slower})


def _log_ns(groups: Sequence[Group], n: int, changes: dict[str, float]) -> Array:
    found = np.empty(n)
    for group in groups:
        found[group.places] = np.log(group.times(changes))
    return found


def _slopes(groups: Sequence[Group], n: int, causes: Sequence[str], changes: dict[str, float]) -> Array:
    found = np.zeros((n, len(causes)))
    for i, cause in enumerate(causes):
        ahead, behind = ({**changes, cause: changes.get(cause, 0.0) + step} for step in (STEP, -STEP))
        for group in groups:
            if cause in group.causes:
                found[group.places, i] = np.log(group.times(ahead) / group.times(behind)) / (2 * STEP)
    return found

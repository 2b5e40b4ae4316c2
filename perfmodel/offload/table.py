"""Many placements of the same layers: what each expert adds in each tier is computed once, a placement is a sum."""

from dataclasses import dataclass

import numpy as np

from perfmodel.errors import InputError
from perfmodel.physics import Array, Work, smooth_value, tiled, total
from perfmodel.placement import COPIED, IN_PLACE, NEAR_DATA, ON_HOST, RESIDENT, TIERS
from perfmodel.placement.costs import Block, Costs

from .beside import crossing_each_ns, host_each_ns, near_data_each_ns
from .device import Device, Mask, copy_each_ns, counts_ns, link_rate
from .in_place import link_ns


@dataclass(frozen=True)
class Resources:
    """Which loads there are, in their order: of each GEMM on the device computing and moving memory, of experts there
    alone and together with those read in place; then what is shared."""

    n_gemms: int
    has_in_place: bool

    @property
    def pooled(self) -> int:
        """Loads of one GEMM: computing and memory; with experts in place the same of all, and their link."""
        return 5 if self.has_in_place else 2

    @property
    def shared(self) -> int:
        """Where the shared loads begin: experts in place alone, copies, host, near-data modules."""
        return self.n_gemms * self.pooled

    @property
    def n(self) -> int:
        """How many loads there are."""
        return self.shared + 4


@dataclass(frozen=True)
class Composition:
    """How loads make the time of a layer (models 7.1 to 7.6), before what is fixed."""

    resources: Resources
    smooth_p: float
    link_overlap_frac: float
    copy_overlap_frac: float  # 0: copies come before everything else
    previous_ns: float

    def ns(self, loads: Array) -> Array:
        """The time of `loads[row, resource]`, ns `[row]`."""
        on_device, _ = self._on_device(loads, with_slopes=False)
        _, copies, host, modules = loads[:, self.resources.shared :].T
        return np.asarray(np.maximum(np.maximum(on_device + self._exposed(copies, on_device)[0], host), modules))

    def slopes(self, loads: Array) -> Array:
        """By how much the time grows with each load, `[row, resource]`."""
        on_device, found = self._on_device(loads, with_slopes=True)
        _, copies, host, modules = loads[:, self.resources.shared :].T
        exposed, hides = self._exposed(copies, on_device)
        f = self.copy_overlap_frac
        found *= np.where(hides, 1.0 - f, 1.0)[:, None]
        at = self.resources.shared
        found[:, at + 1] = np.where(hides, 1.0, 1.0 - f) * (copies > 0)
        sides = np.stack([on_device + exposed, host, modules])
        slowest = sides.argmax(axis=0)
        found[slowest > 0] = 0.0
        found[slowest == 1, at + 2] = 1.0
        found[slowest == 2, at + 3] = 1.0
        return found

    def _exposed(self, copies: Array, on_device: Array) -> tuple[Array, Mask]:
        """What of copies is seen, and where they outlast what they hide under."""
        f, room = self.copy_overlap_frac, self.previous_ns + on_device
        hides = copies > room
        return copies - f * np.minimum(copies, room), hides

    def _on_device(self, loads: Array, *, with_slopes: bool) -> tuple[Array, Array]:
        n, p, om = self.resources.pooled, self.smooth_p, self.link_overlap_frac
        found = np.zeros_like(loads) if with_slopes else loads
        time = np.zeros(len(loads))
        for g in range(self.resources.n_gemms):
            at = g * n
            kinds = [(at, at + 2, 1.0)] if n == 2 else [(at, at + 2, 1 - om), (at + 2, at + 5, om)]
            for first, last, share in kinds:
                norm = _norm(loads[:, first:last], p)
                time += share * norm
                if with_slopes:
                    found[:, first:last] = share * (loads[:, first:last] / np.maximum(norm, 1e-9)[:, None]) ** (p - 1)
        if self.resources.has_in_place:
            time = time + (1 - om) * loads[:, self.resources.shared]
            if with_slopes:
                found[:, self.resources.shared] = 1 - om
        return time, found


def _norm(loads: Array, p: float) -> Array:
    """(sum of loads^p)^(1/p) by row, the smooth maximum of model 3; of what rounding left just below zero too."""
    return smooth_value(list(np.maximum(loads, 0.0).T), p)


def placement_costs(
    work: Work, tiers: tuple[int, ...], device: Device, n_layers: int, *, serial: bool = False, contended: bool = False
) -> Costs:
    """The costs of all placements of the layers of `work` into some of placement.TIERS, steps outermost in its batch.

    The order of `tiers` numbers them; `serial` copies before computing (access mode copy). As `offload_parts` and
    `beside_parts` have it but for small things: the tile is that of all experts together, an overlapped copy has no
    last chunk, modules share their work evenly, host and link slow each other always (`contended`) or never, and
    launches by the host are left out. Raises InputError for a machine that lacks what a tier needs.
    """
    if len(set(tiers)) < len(tiers) or not set(tiers) <= set(range(len(TIERS))):
        raise InputError(f"tiers are {tiers}, expected different numbers of {', '.join(TIERS)}")
    if device.host is not None and ON_HOST in tiers:
        raise InputError("costs of placements have no place for a fitted model of the host's CPU")
    o, c = device.offload, device.constants
    resources = Resources(work.k.shape[1], IN_PLACE in tiers)
    composition = Composition(
        resources, c.smooth_p, o.link_overlap_frac, 0.0 if serial else o.copy_overlap_frac, device.previous_ns
    )
    awake = work.rows > 0
    charge = np.zeros((*work.rows.shape, len(tiers)))
    told, merge = counts_ns(work, awake, o)[:, None], o.merge_ns
    for number, tier in enumerate(tiers):
        if tier in (COPIED, ON_HOST, NEAR_DATA):
            charge[:, :, number] = np.where(awake, told + (0.0 if tier == COPIED else merge), 0.0)
    blocks = tuple(_block(work, tier, device, resources, tiers, contended) for tier in tiers)
    fixed = total(tiled.other_parts(work, device.roof, c))
    n_steps = len(work.k) // n_layers
    return Costs(blocks, resources.n, composition.ns, composition.slopes, fixed, charge, np.full(n_steps, 1 / n_steps))


def _block(
    work: Work, tier: int, device: Device, resources: Resources, tiers: tuple[int, ...], contended: bool
) -> Block:
    """What experts of one tier add to which loads."""
    at = resources.shared
    found: dict[int, Array] = {}
    modules = near_data_each_ns(work, device) if NEAR_DATA in tiers else None
    if tier in (RESIDENT, COPIED, IN_PLACE):
        own = np.zeros_like(work.rows)
        link = link_ns(work, device) if tier == IN_PLACE else [own] * resources.n_gemms
        for g, roofs in enumerate(tiled.expert_roofs(work, device.kernel, device.roof, device.constants)):
            loads = [roofs.compute, roofs.weights + roofs.activations]
            if tier == IN_PLACE:
                alone = [roofs.compute, roofs.activations, link[g]]
                own = own + smooth_value(alone, device.constants.smooth_p)
                found |= {g * resources.pooled + 2 + i: load for i, load in enumerate(alone)}
            else:
                repeated = [*loads, *loads] if resources.has_in_place else loads
                found |= {g * resources.pooled + i: load for i, load in enumerate(repeated)}
        if tier == IN_PLACE:
            found[at] = own
    if tier == COPIED:
        found[at + 1] = copy_each_ns(work, link_rate(device.profile, "copy", contended=contended)[0], device.offload)
    if tier in (ON_HOST, NEAR_DATA):
        crossing = crossing_each_ns(work, device)
        found[at + 2] = crossing * (ON_HOST in tiers)
        found[at + 3] = crossing * (modules is not None)
    if tier == ON_HOST:
        found[at + 2] = np.where(work.rows > 0, host_each_ns(work, device, contended=contended), 0.0) + found[at + 2]
    if modules is not None:
        computing, serving = modules
        n = device.profile["n_ndp_count"]
        adds = computing / n if tier == NEAR_DATA else serving if tier != RESIDENT else None
        if adds is not None:
            found[at + 3] = found.get(at + 3, 0.0) + adds
    return Block(tuple(found), np.stack(list(found.values()), axis=2))

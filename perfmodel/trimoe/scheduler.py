"""Who computes which expert: the cheapest for each, then moves off whoever is the bottleneck (TriMoE's scheduler).

arXiv 2603.01058. The batch rows of costs are independent: layers of one step, or of many.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfmodel.physics import Array
from perfmodel.placement import COPIED, NEAR_DATA, ON_HOST, RESIDENT, Tiers

from .costs import N_DOMAINS, Costs

UNITS = ("gpu", "cpu", "ndp")  # who can be the bottleneck
UNIT_OF = np.array([0, 0, 1, 2])  # of each domain: what is resident and what is copied are both computed by the GPU
LEAST_GAIN_FRAC = 1e-9  # a move that lowers the makespan by less than this is rounding
TIE_FRAC = 1e-6  # of moves that lower it equally the one with the least to do at its new place is made: by how much


@dataclass(frozen=True, eq=False)
class Busy:
    """How long each unit works on a schedule, ns: `gpu_ns[batch]`, `cpu_ns[batch]`, `dimm_ns[batch, dimm]`; the last is
    near-data work (`ndp_ns[batch, dimm]`) and serving the reads of the other two (TriMoE's T_cont)."""

    gpu_ns: Array
    cpu_ns: Array
    dimm_ns: Array
    ndp_ns: Array

    @property
    def by_unit_ns(self) -> Array:
        """The three terms of the makespan, `[batch, unit of UNITS]`."""
        return np.stack([self.gpu_ns, self.cpu_ns, self.dimm_ns.max(axis=1)], axis=1)

    @property
    def makespan_ns(self) -> Array:
        """How long the layer takes, `[batch]`: as long as the slowest of GPU, CPU and memory modules."""
        return np.asarray(self.by_unit_ns.max(axis=1))

    @property
    def bottleneck(self) -> NDArray[np.int64]:
        """Who is the slowest, `[batch]`, a number in UNITS."""
        return np.asarray(self.by_unit_ns.argmax(axis=1))

    @property
    def working_ns(self) -> Array:
        """How long each unit computes, `[batch, unit]`; of memory modules the mean, reads they serve left out."""
        return np.stack([self.gpu_ns, self.cpu_ns, self.ndp_ns.mean(axis=1)], axis=1)


def busy(costs: Costs, domain: Tiers) -> Busy:
    """How long each unit works when experts are computed where `domain[batch, expert]` says."""
    cost, every, home = (_chosen(part, domain) for part in (costs.cost_ns, costs.every_dimm_ns, costs.home_dimm_ns))
    unit = UNIT_OF[domain]
    gpu, cpu = (np.where(unit == number, cost, 0.0).sum(axis=1) for number in (0, 1))
    dimm = every.sum(axis=1, keepdims=True) + by_dimm(home, costs.home, costs.n_dimms)
    ndp = by_dimm(np.where(domain == NEAR_DATA, home, 0.0), costs.home, costs.n_dimms)
    return Busy(gpu, cpu, dimm, ndp)


def greedy(costs: Costs) -> Tiers:
    """The cheapest domain of each expert by itself, `[batch, expert]`; of equals the one nearest to the memory."""
    return np.asarray(N_DOMAINS - 1 - costs.cost_ns[..., ::-1].argmin(axis=2))


def refine(costs: Costs, domain: Tiers) -> Tiers:
    """A schedule after moves of single experts, each the one that lowers its layer's makespan most, until none does.

    Every move of every expert is tried, at once; of those that help as much, as many do where one unit alone is the
    bottleneck, the one that is cheapest where it goes. Sums are kept, so a move costs O(experts x domains). The
    makespan never rises, and no single move lowers it further by more than a millionth of an expert's time.
    """
    domain = domain.copy()
    active = np.arange(len(domain))
    part, now = costs, busy(costs, domain)
    sums = np.stack([now.gpu_ns, now.cpu_ns], axis=1)
    dimm, makespan = now.dimm_ns, now.makespan_ns
    while len(active):
        after = _makespans_after(part, domain[active], sums, dimm)
        flat = after.reshape(len(active), -1)
        best = (flat + TIE_FRAC * part.cost_ns.reshape(flat.shape)).argmin(axis=1)
        lowest = np.take_along_axis(flat, best[:, None], axis=1)[:, 0]
        better = lowest < makespan * (1 - LEAST_GAIN_FRAC)
        if not better.all():
            active, best, lowest, sums, dimm = active[better], best[better], lowest[better], sums[better], dimm[better]
            part = part.rows(better)
        expert, to = np.divmod(best, N_DOMAINS)
        row = np.arange(len(active))
        for sign, d in ((-1.0, domain[active, expert]), (1.0, to)):
            cost, unit = part.cost_ns[row, expert, d], UNIT_OF[d]
            sums += sign * np.where(unit[:, None] == np.arange(2), cost[:, None], 0.0)
            dimm += sign * part.every_dimm_ns[row, expert, d][:, None]
            dimm[row, part.home[row, expert]] += sign * part.home_dimm_ns[row, expert, d]
        domain[active, expert] = to
        makespan = lowest
    return domain


def _makespans_after(costs: Costs, domain: Tiers, sums: Array, dimm: Array) -> Array:
    """The makespan after each possible move, `[batch, expert, domain]`; infinite for an impossible one."""
    cost = _chosen(costs.cost_ns, domain)
    unit = UNIT_OF[domain]
    gpu = (sums[:, :1] - np.where(unit == 0, cost, 0.0))[..., None]
    cpu = (sums[:, 1:] - np.where(unit == 1, cost, 0.0))[..., None]
    device = gpu + costs.cost_ns[..., [RESIDENT, COPIED]]
    after = np.concatenate([device, np.broadcast_to(gpu, (*gpu.shape[:2], 2))], axis=2)
    np.maximum(after, cpu, out=after)
    after[..., ON_HOST] = np.maximum(gpu[..., 0], cpu[..., 0] + costs.cost_ns[..., ON_HOST])
    np.copyto(after[..., NEAR_DATA], np.inf, where=~np.isfinite(costs.cost_ns[..., NEAR_DATA]))
    order = np.sort(dimm, axis=1)
    first, second = order[:, -1:], order[:, -2:-1] if dimm.shape[1] > 1 else np.zeros((len(dimm), 1))
    at_home = np.take_along_axis(dimm, costs.home, axis=1)
    elsewhere = np.where(at_home == first, second, first)  # of two that are equally busy, either is the other's rival
    every = costs.every_dimm_ns - _chosen(costs.every_dimm_ns, domain)[..., None]
    own = costs.home_dimm_ns - _chosen(costs.home_dimm_ns, domain)[..., None]
    np.maximum(own, (elsewhere - at_home)[..., None], out=own)  # the busiest module relative to the expert's own
    return np.asarray(np.maximum(after, at_home[..., None] + every + own, out=after))


def schedule(costs: Costs, *, is_refined: bool = True, is_guarded: bool = True) -> Tiers:
    """Who computes each expert, `[batch, expert]`, as numbers of `placement.TIERS`.

    Greedy, then refined where `is_refined`. Refining from the cheapest domains may end in a worse minimum than without
    one domain at all; where `is_guarded` the schedules without the CPU, and without near-data units, are tried too, so
    that a further domain never makes a layer slower. `costs` are those of `Machine.costs`, or of times of your own
    (`costs_of`).
    """
    if not is_refined:
        return greedy(costs)
    found = refine(costs, greedy(costs))
    if not is_guarded:
        return found
    shortest = busy(costs, found).makespan_ns
    for domain in (ON_HOST, NEAR_DATA):
        part = costs.only(domain)
        if not np.isfinite(part.cost_ns.min(axis=2)).all():
            continue
        rival = refine(part, greedy(part))
        span = busy(part, rival).makespan_ns
        found = np.where((span < shortest)[:, None], rival, found)
        shortest = np.minimum(span, shortest)
    return found


def by_dimm(values: Array, home: NDArray[np.int64], n_dimms: int) -> Array:
    """Sums over the experts at home in each memory module, `[batch, dimm]`."""
    slot = home + n_dimms * np.arange(len(home))[:, None]
    sums = np.bincount(slot.ravel(), values.ravel(), minlength=n_dimms * len(home))
    return np.asarray(sums.reshape(len(home), n_dimms))


def _chosen(values: Array, domain: Tiers) -> Array:
    return np.asarray(np.take_along_axis(values, domain[..., None], axis=2)[..., 0])

"""What a layer pays once for having any expert of a kind: the placement that costs least under such charges."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .costs import Array, Costs
from .problem import Tiers

MAX_STEPS = 8  # up to which all sets of steps that are charged are tried
N_LEVELS = 16  # of charges that are told apart beyond that


@dataclass(frozen=True, eq=False)
class Charges:
    """The charges of `costs`, as a search for columns needs them: of a placement, and the best placement under them."""

    costs: Costs

    @cached_property
    def are_few(self) -> bool:
        """Whether all sets of steps can be tried, so that charges count in full."""
        return self.costs.n_steps <= MAX_STEPS

    def of(self, tier: Tiers) -> Array:
        """What a placement pays, ns `[layer]`: the mean over steps, or where steps are many what its expert with the
        largest mean pays alone, which is less."""
        if self.are_few:
            return self.costs.charges(tier)
        at = tier[:, :, None].astype(np.int64)
        return np.asarray(np.take_along_axis(self._means, at, axis=2)[:, :, 0].max(axis=1))

    def cheapest(self, reduced: Array) -> tuple[Tiers, Array]:
        """The placement of least `reduced[layer, expert, tier]` with charges, and what it takes at least, `[layer]`."""
        if not self.costs.charge_ns.any():
            return reduced.argmin(axis=2).astype(np.int8), reduced.min(axis=2).sum(axis=1)
        return self._by_sets(reduced) if self.are_few else self._by_levels(reduced)

    @cached_property
    def _means(self) -> Array:
        return self.costs.by_layer(self.costs.charge_ns)

    @cached_property
    def _sets(self) -> tuple[Array, NDArray[np.bool_], Array]:
        """Of all sets of steps: which experts are charged in none outside it, `[layer, set, expert]`; what each tier's
        charge comes to in it, `[layer, set, tier]`; and the least that a step comes to, `[layer, tier]`."""
        steps, layers = self.costs.n_steps, self.costs.n_layers
        by_step = self.costs.charge_ns.reshape(steps, layers, self.costs.n_experts, -1)
        in_set = (np.arange(2**steps)[:, None] >> np.arange(steps)) & 1
        is_charged = np.moveaxis(by_step.max(axis=3) > 0, 0, 2)  # [layer, expert, step]
        outside = (is_charged[:, None] * (1.0 - in_set)[:, None]).sum(axis=3)
        of_step = by_step.max(axis=2) * self.costs.weights[:, None, None]  # [step, layer, tier]
        least = np.where(of_step > 0, of_step, np.inf).min(axis=0)
        return (outside == 0).astype(np.float64), in_set.astype(bool), np.where(np.isfinite(least), least, 0.0)

    def _by_sets(self, reduced: Array) -> tuple[Tiers, Array]:
        """All sets of steps that may be charged, and in turn the tiers of the lowest charges."""
        allowed, in_set, least = self._sets
        rows = np.arange(self.costs.n_layers)
        steps, layers = self.costs.n_steps, self.costs.n_layers
        of_step = self.costs.charge_ns.max(axis=1).reshape(steps, layers, -1) * self.costs.weights[:, None, None]
        total = of_step.sum(axis=(0, 1))
        order = np.argsort(total, kind="stable")
        free = [int(t) for t in order if total[t] == 0]
        charged = [int(t) for t in order if total[t] > 0]
        base = reduced[:, :, free].min(axis=2)
        tier = np.array(free, dtype=np.int8)[reduced[:, :, free].argmin(axis=2)]
        best, found = base.sum(axis=1), tier
        for n in range(1, len(charged) + 1):
            away = reduced[:, :, charged[:n]]
            gain = np.minimum(away.min(axis=2) - base, 0.0)
            # Each step with a charged expert pays the lowest charge, and some step the dearest.
            paid = (in_set @ of_step[:, :, charged[0]]).T + (least[:, charged[n - 1]] - least[:, charged[0]])[:, None]
            value = base.sum(axis=1)[:, None] + paid + (allowed @ gain[:, :, None])[:, :, 0]
            sets, least_ns = value.argmin(axis=1), value.min(axis=1)
            better = least_ns < best
            moves = (allowed[rows, sets] > 0) & (gain < 0) & better[:, None]
            found = np.where(better[:, None], tier, found)
            found = np.where(moves, np.array(charged[:n], dtype=np.int8)[away.argmin(axis=2)], found)
            best = np.minimum(best, least_ns)
        return found.astype(np.int8), best

    def _by_levels(self, reduced: Array) -> tuple[Tiers, Array]:
        """Levels of mean charge in turn: experts that ask for no more than a level are free to go anywhere."""
        charge, n_layers = self._means, self.costs.n_layers
        flat = np.sort(charge.reshape(n_layers, -1), axis=1)
        best = np.full(n_layers, np.inf)
        tier = np.zeros(reduced.shape[:2], dtype=np.int8)
        lower = np.zeros(n_layers)  # the smallest charge that is above the level before
        for level in flat[:, np.unique(np.linspace(0, flat.shape[1] - 1, N_LEVELS).astype(int))].T:
            allowed = np.where(charge <= level[:, None, None], reduced, np.inf)
            cost = allowed.min(axis=2).sum(axis=1) + lower
            better = cost < best
            best = np.where(better, cost, best)
            tier[better] = allowed.argmin(axis=2)[better]
            above = np.where(charge > level[:, None, None], charge, np.inf).reshape(n_layers, -1).min(axis=1)
            lower = np.where(np.isfinite(above), above, lower)
        return tier, best

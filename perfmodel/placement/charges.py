"""What a layer pays once for having any expert of a kind: the placement that costs least under such charges."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .costs import Costs
from .problem import Array, Tiers

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
    def _order(self) -> tuple[list[int], list[int]]:
        """Tiers without charges (at least the one of the lowest, which is then taken to have none), and the others by
        their charges, the lowest first."""
        total = self._means.sum(axis=(0, 1))
        order = [int(tier) for tier in np.argsort(total, kind="stable")]
        n_free = max(1, int((total == 0).sum()))
        return order[:n_free], order[n_free:]

    @cached_property
    def _sets(self) -> tuple[Array, Array]:
        """Of all sets of steps, for each tier with charges: which experts it charges in no step outside the set,
        `[tier, layer, set, expert]`; and what the set is charged more than in the tier before, `[tier, layer, set]`.

        Where a tier does not charge all that one before it charges, that is left out of the one before.
        """
        steps, layers = self.costs.n_steps, self.costs.n_layers
        by_step = self.costs.charge_ns.reshape(steps, layers, self.costs.n_experts, -1)[..., self._order[1]]
        by_step = np.moveaxis(by_step, 3, 0)  # [tier, step, layer, expert]
        is_charged = np.minimum.accumulate((by_step > 0)[::-1], axis=0)[::-1]
        least = np.where(by_step > 0, by_step, np.inf).min(axis=3)
        least = np.minimum.accumulate(least[::-1], axis=0)[::-1]
        least = np.where(np.isfinite(least), least, 0.0) * self.costs.weights[:, None]
        in_set = (np.arange(2**steps)[:, None] >> np.arange(steps)) & 1
        outside = np.einsum("cs,tsle->tlce", 1.0 - in_set, is_charged.astype(np.float64), optimize=True)
        more = np.diff(least, axis=0, prepend=0.0)  # [tier, step, layer]
        return (outside == 0).astype(np.float64), np.einsum("cs,tsl->tlc", in_set, more)

    def _by_sets(self, reduced: Array) -> tuple[Tiers, Array]:
        """All sets of steps in which experts may be charged, for each tier one within that of the tier before.

        An expert may go to a tier whose set has all steps in which it is charged there; since sets lie within each
        other, what is gained over the tiers before adds up set by set.
        """
        free, charged = self._order
        allowed, more = self._sets
        rows = np.arange(self.costs.n_layers)
        tier = np.array(free, dtype=np.int8)[reduced[:, :, free].argmin(axis=2)]
        lowest = np.minimum.accumulate(
            np.concatenate([reduced[:, :, free].min(axis=2, keepdims=True), reduced[:, :, charged]], axis=2), axis=2
        )
        gain = np.moveaxis(np.diff(lowest, axis=2), 2, 0)  # [tier, layer, expert], at most 0
        value = more + (allowed @ gain[:, :, :, None])[..., 0]
        subset: list[NDArray[np.int64]] = []
        for number in range(len(charged) - 1, 0, -1):
            least, which = _least_of_subsets(value[number])
            value[number - 1] += least
            subset.insert(0, which)
        sets = value[0].argmin(axis=1)
        found = lowest[:, :, 0].sum(axis=1) + value[0].min(axis=1)
        for number, at in enumerate(charged):
            tier[(allowed[number, rows, sets] > 0) & (gain[number] < 0)] = at
            if number < len(subset):
                sets = subset[number][rows, sets]
        return tier, found

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


def _least_of_subsets(value: Array) -> tuple[Array, NDArray[np.int64]]:
    """The least of `value[row, set]` over all subsets of each set, sets being bits of their number, and which it is."""
    sets = np.arange(value.shape[1])
    which = np.broadcast_to(sets, value.shape)
    bit = 1
    while bit < len(sets):
        without = sets & ~bit
        is_less = value[:, without] < value
        value, which = np.where(is_less, value[:, without], value), np.where(is_less, which[:, without], which)
        bit *= 2
    return value, which

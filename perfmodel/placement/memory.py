"""Memory that experts share: budgets over tiers, whether a placement keeps them, and how to mend one that does not."""

from dataclasses import dataclass

import numpy as np

from perfmodel.errors import InputError

from .problem import Array, Mask, Tiers


@dataclass(frozen=True)
class Budget:
    """Memory that tiers share: `capacity_bytes` for the experts in `tiers`, of all layers or of each one alone."""

    tiers: tuple[int, ...]
    capacity_bytes: float
    of_each_layer: bool = False


@dataclass(frozen=True, eq=False)
class Memory:
    """Experts of `size_bytes[layer, expert]`, in tiers of which `budgets` limit some."""

    size_bytes: Array
    budgets: tuple[Budget, ...]
    n_tiers: int

    @property
    def slack_bytes(self) -> float:
        """What rounding errors of sums may come to."""
        return 1e-9 * float(self.size_bytes.sum())

    def holds(self, budget: Budget) -> Mask:
        """Which tiers a budget limits, `[tier]`."""
        return np.asarray(np.isin(np.arange(self.n_tiers), budget.tiers))

    def held_bytes(self, tier: Tiers, budget: Budget) -> Array:
        """What a placement has in the tiers that a budget limits, `[layer]`."""
        return np.asarray(np.where(self.holds(budget)[tier], self.size_bytes, 0.0).sum(axis=1))

    def room_bytes(self, tier: Tiers, budget: Budget) -> Array:
        """What a placement leaves of a budget, `[layer]`, or `[1]` of one that all layers share; negative: too much."""
        held = self.held_bytes(tier, budget)
        return np.asarray(budget.capacity_bytes - (held if budget.of_each_layer else held.sum(keepdims=True)))

    def fits(self, tier: Tiers) -> bool:
        """Whether a placement keeps all budgets."""
        return all((self.room_bytes(tier, budget) >= -self.slack_bytes).all() for budget in self.budgets)

    def mended(self, tier: Tiers, loss: Array) -> Tiers:
        """A placement that keeps the budgets: of tiers that hold too much, those experts leave that lose least by it
        per byte, `loss[layer, expert, tier]`. Raises InputError where they find no room."""
        tier = tier.copy()
        for _ in range(4 * len(self.budgets)):
            over = [b for b in self.budgets if (self.room_bytes(tier, b) < -self.slack_bytes).any()]
            if not over:
                return tier
            self._leave(tier, over[0], loss)
        if self.fits(tier):
            return tier
        raise InputError(self._no_room(over[0], tier))

    def _leave(self, tier: Tiers, budget: Budget, loss: Array) -> None:
        """Move as many experts out of what a budget limits as it holds too many."""
        open_to = ~np.any([self.holds(b) for b in self.budgets], axis=0)
        if not open_to.any():  # no tier is without limit
            full = [b for b in self.budgets if b is not budget and (self.room_bytes(tier, b) <= self.slack_bytes).all()]
            open_to = ~np.any([self.holds(b) for b in (budget, *full)], axis=0)
        if not open_to.any():
            raise InputError(self._no_room(budget, tier))
        options = np.where(open_to, loss, np.inf)
        to = options.argmin(axis=2).astype(np.int8)
        more_ns = options.min(axis=2) - np.take_along_axis(loss, tier[:, :, None].astype(np.int64), 2)[:, :, 0]
        loss_ns = np.where(self.holds(budget)[tier], more_ns, np.inf)
        leaves = self.first_to_leave(loss_ns, budget, -self.room_bytes(tier, budget) - self.slack_bytes)
        tier[leaves] = to[leaves]

    def first_to_leave(self, loss: Array, budget: Budget, need_bytes: Array) -> Mask:
        """Those experts, `[layer, expert]`, that lose least per byte by leaving what a budget limits, as many as make
        room for `need_bytes`, `[layer]`, or `[1]` of a budget that all layers share; an infinite loss stays."""
        size = self.size_bytes if budget.of_each_layer else self.size_bytes.reshape(1, -1)
        per_byte = loss.reshape(size.shape) / size
        order = np.argsort(per_byte, axis=1, kind="stable")
        in_order = np.take_along_axis(size, order, axis=1)
        before = np.cumsum(in_order, axis=1) - in_order
        leaves = np.zeros(size.shape, dtype=bool)
        np.put_along_axis(leaves, order, before < need_bytes[:, None], axis=1)
        return np.asarray((leaves & np.isfinite(per_byte)).reshape(loss.shape))

    def _no_room(self, budget: Budget, tier: Tiers) -> str:
        held = float(self.held_bytes(tier, budget).sum())
        each = " for each layer" if budget.of_each_layer else ""
        return (
            f"the experts take {float(self.size_bytes.sum()):,.0f} bytes and do not fit: {held:,.0f} bytes are left "
            f"for a budget of {budget.capacity_bytes:,.0f} bytes{each}, and no other memory has room"
        )

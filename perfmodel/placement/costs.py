"""What a layer costs by where its experts are: loads that experts add up to, and how loads make a time.

A row is one step of one layer, steps outermost. The time of a row is `compose` of its loads, convex and never falling,
and a charge where any expert asks for it. Placements may be relaxed: `[layer, expert, tier]`, each expert's parts
summing to 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .problem import Array, Tiers

Experts = NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)
Compose = Callable[[Array], Array]  # loads [row, resource] to ns [row], and to slopes [row, resource]
ROWS_AT_ONCE = 2**19  # of loads that are composed in one go
PLACEMENTS_AT_ONCE = 2**11  # of one row: few enough to stay in cache


@dataclass(frozen=True, eq=False)
class Block:
    """What experts of one tier add: `values[row, expert, k]` to the resource `resources[k]`, ns."""

    resources: tuple[int, ...]
    values: Array


@dataclass(frozen=True, eq=False)
class Costs:
    """The cost of all placements of some layers over some steps.

    `blocks[tier]` are loads by expert, `compose_slopes` is a subgradient of `compose`. Added are `fixed_ns[row]` and
    the largest `charge_ns[row, expert, tier]` among the experts of a row: what is paid once for having any such expert.
    A step counts `weights[step]` of all, which sum to 1.
    """

    blocks: tuple[Block, ...]
    n_resources: int
    compose: Compose
    compose_slopes: Compose
    fixed_ns: Array
    charge_ns: Array
    weights: Array

    @property
    def n_experts(self) -> int:
        """Experts of a layer."""
        return int(self.charge_ns.shape[1])

    @property
    def n_tiers(self) -> int:
        """Tiers an expert may be in."""
        return len(self.blocks)

    @property
    def n_steps(self) -> int:
        """Steps that costs are means over."""
        return len(self.weights)

    @property
    def n_layers(self) -> int:
        """Layers that are placed."""
        return len(self.fixed_ns) // self.n_steps

    def by_layer(self, of_rows: Array) -> Array:
        """Means over steps, `[layer, ...]`, of what is known of rows, `[row, ...]`."""
        return np.asarray(np.tensordot(self.weights, of_rows.reshape(self.n_steps, -1, *of_rows.shape[1:]), axes=1))

    def of_rows(self, of_layers: NDArray[Number]) -> NDArray[Number]:
        """What is said of layers, `[layer, ...]`, for each row, `[row, ...]`."""
        return np.tile(of_layers, (self.n_steps, *(1,) * (of_layers.ndim - 1)))

    def loads(self, parts: Array) -> Array:
        """Loads `[row, resource]` of a relaxed placement `parts[layer, expert, tier]`."""
        found = np.zeros((len(self.fixed_ns), self.n_resources))
        for tier, block in enumerate(self.blocks):
            share = self.of_rows(parts[:, :, tier])[:, None, :]
            found[:, block.resources] += (share @ block.values)[:, 0]
        return found

    def shift(self, expert: Experts, by: Array) -> Array:
        """How loads change, `[row, i, resource]`, when parts of `expert[layer, i]` change by `by[layer, i, tier]`."""
        found = np.zeros((len(self.fixed_ns), expert.shape[1], self.n_resources))
        rows, experts = np.arange(len(found))[:, None], self.of_rows(expert)
        for tier, block in enumerate(self.blocks):
            found[:, :, block.resources] += block.values[rows, experts] * self.of_rows(by[:, :, tier])[:, :, None]
        return found

    def compose_layers(self, loads: Array) -> Array:
        """Mean time over steps, ns `[layer, ...]`, of loads `[row, ..., resource]`, without fixed times and charges."""
        flat = loads.reshape(-1, self.n_resources)
        pieces = range(0, len(flat), ROWS_AT_ONCE)
        times = np.concatenate([self.compose(flat[start : start + ROWS_AT_ONCE]) for start in pieces])
        return self.by_layer(times.reshape(loads.shape[:-1]))

    def charges(self, tier: Tiers) -> Array:
        """Mean charge over steps, ns `[layer]`, of a placement."""
        chosen = np.take_along_axis(self.charge_ns, self.of_rows(tier)[:, :, None].astype(np.int64), axis=2)
        return self.by_layer(chosen[:, :, 0].max(axis=1))

    def layers_ns(self, tier: Tiers) -> Array:
        """Mean time over steps of each layer, ns `[layer]`, of a placement `tier[layer, expert]`."""
        composed = self.compose_layers(self.loads(one_hot(tier, self.n_tiers)))
        return composed + self.by_layer(self.fixed_ns) + self.charges(tier)

    def slopes(self, parts: Array) -> tuple[Array, Array]:
        """A tangent from below at a relaxed placement, charges left out: slopes `[layer, expert, tier]` and what stands
        beside them, `[layer]`, so that their sum over the experts of any placement is at most its time."""
        loads = self.loads(parts)
        by_resource = self.compose_slopes(loads)
        beside = self.by_layer(self.compose(loads) - (by_resource * loads).sum(axis=1))
        found = [
            self.by_layer((block.values @ by_resource[:, block.resources, None])[:, :, 0]) for block in self.blocks
        ]
        return np.stack(found, axis=2), beside

    def placements_ns(self, tier: Tiers, row: int = 0) -> Array:
        """Time of many placements of one row, ns `[placement]`, of `tier[placement, expert]`; to about 1e-6 of itself.

        All experts in tier 0 are the base, the others change it; whether a charge is asked for is one more column.
        """
        charges = np.unique(self.charge_ns[row])
        charges = charges[charges > 0]
        adds = np.zeros((self.n_tiers, self.n_experts, self.n_resources + len(charges)))
        for number, block in enumerate(self.blocks):
            adds[number][:, block.resources] = block.values[row]
            adds[number, :, self.n_resources :] = self.charge_ns[row, :, number, None] == charges
        base, change = adds[0].sum(axis=0), (adds[1:] - adds[0]).astype(np.float32)
        found = np.empty(len(tier))
        for start in range(0, len(tier), PLACEMENTS_AT_ONCE):
            some = tier[start : start + PLACEMENTS_AT_ONCE]
            sums = np.repeat(base[:, None], len(some), axis=1)  # by column: composing takes one after another
            for number, by_expert in enumerate(change):
                sums += by_expert.T @ (some == number + 1).astype(np.float32).T
            charge = np.where(sums[self.n_resources :] > 0.5, charges[:, None], 0.0).max(axis=0, initial=0.0)
            found[start : start + len(some)] = self.compose(sums[: self.n_resources].T) + charge
        return np.asarray(found + self.fixed_ns[row])


def one_hot(tier: Tiers, n_tiers: int) -> Array:
    """A placement `tier[layer, expert]` as parts `[layer, expert, tier]`."""
    return np.asarray(tier[:, :, None] == np.arange(n_tiers), dtype=np.float64)


def additive(cost_ns: Array) -> Costs:
    """Costs where experts go one after another: a layer takes the sum of `cost_ns[layer, expert, tier]`."""
    return _from_table(cost_ns, lambda loads: loads[:, 0], np.ones_like, [0] * cost_ns.shape[-1])


def parallel(cost_ns: Array) -> Costs:
    """Costs where tiers work side by side: a layer takes the longest tier's sum of `cost_ns[layer, expert, tier]`."""

    def of_slowest(loads: Array) -> Array:
        return np.asarray(loads.argmax(axis=1)[:, None] == np.arange(loads.shape[1]), dtype=np.float64)

    return _from_table(cost_ns, _slowest, of_slowest, list(range(cost_ns.shape[-1])))


def _slowest(loads: Array) -> Array:
    """The largest load; a handful of columns are compared faster one by one."""
    found = loads[:, 0]
    for column in range(1, loads.shape[1]):
        found = np.maximum(found, loads[:, column])
    return found


def _from_table(cost_ns: Array, compose: Compose, slopes: Compose, resource_of: list[int]) -> Costs:
    if cost_ns.ndim != 3 or not (np.isfinite(cost_ns) & (cost_ns >= 0)).all():
        raise InputError(
            f"costs of shape {cost_ns.shape}, expected [layer, expert, tier], each a time of at least 0 ns"
        )
    blocks = tuple(Block((r,), cost_ns[:, :, tier, None]) for tier, r in enumerate(resource_of))
    n, n_layers = max(resource_of) + 1, len(cost_ns)
    return Costs(blocks, n, compose, slopes, np.zeros(n_layers), np.zeros(cost_ns.shape), np.ones(1))


def joined(several: list[Costs], shares: list[float]) -> Costs:
    """The costs of the same layers over the steps of several, of which each counts its share of all time."""
    blocks = tuple(
        Block(same[0].resources, np.concatenate([block.values for block in same]))
        for same in zip(*(costs.blocks for costs in several), strict=True)
    )
    total = sum(shares)
    return replace(
        several[0],
        blocks=blocks,
        fixed_ns=np.concatenate([costs.fixed_ns for costs in several]),
        charge_ns=np.concatenate([costs.charge_ns for costs in several]),
        weights=np.concatenate([c.weights * share / total for c, share in zip(several, shares, strict=True)]),
    )


def condensed(costs: Costs, n_steps: int) -> Costs:
    """Fewer steps that stand for all: those spread evenly over them, the loads of each expert scaled so that its mean
    over steps stays what it is over all. An expert that none of them wakes has its mean in each."""
    if costs.n_steps <= n_steps:
        return costs
    kept = np.linspace(0, costs.n_steps - 1, n_steps).round().astype(int)
    weights = costs.weights[kept] / costs.weights[kept].sum()
    rows = (kept[:, None] * costs.n_layers + np.arange(costs.n_layers)).ravel()
    few = replace(costs, fixed_ns=costs.fixed_ns[rows], charge_ns=costs.charge_ns[rows], weights=weights)
    blocks = []
    for block in costs.blocks:
        values, mean = block.values[rows], costs.by_layer(block.values)
        here = few.by_layer(values)
        scale = few.of_rows(np.where(here > 0, mean / np.where(here > 0, here, 1.0), 1.0))
        blocks.append(Block(block.resources, values * scale + few.of_rows(np.where(here > 0, 0.0, mean))))
    return replace(few, blocks=tuple(blocks))

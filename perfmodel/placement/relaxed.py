"""The linear program over placements: a mixture of whole placements of each layer, and a bound on all.

Layers meet in their budgets only. So the program mixes whole placements of each layer (columns), its prices of memory
and of loads say which placement of a layer would help most, and that one joins it (Dantzig and Wolfe, Operations
Research 1960; tangents stand for what is not linear: Kelley, J. SIAM 1960). Any prices give a lower bound on all
placements (Lagrange; Fisher, Management Science 1981).
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from .charges import Charges
from .costs import Costs, one_hot
from .memory import Memory
from .problem import Array, Tiers

MAX_ROUNDS, RELAXED_GAP = 60, 1e-4
SLOW_ROUNDS, SLOW_FRAC = 12, 0.7  # rounds over which the distance is to fall to this part of itself
METHODS = ("highs-ds", "highs-ipm")  # the second where the first finds no end
IDLE_ROUNDS = 4  # after which a tangent that is not needed is left out
TRIFLE = 1e-7  # of all time that memory costs at least: what is as fast elsewhere leaves it free


@dataclass(frozen=True, eq=False)
class Relaxed:
    """What the linear program leaves: a mixture of placements `[layer, expert, tier]`, what experts cost at the last
    prices of loads and memory, `reduced[layer, expert, tier]`, the prices of a byte in each tier, `[layer, tier]`, and
    the best bound. `largest` takes of each layer the column of the largest share, whole, for charges' sake."""

    mixture: Array
    reduced: Array
    byte_prices: Array
    bound_ns: float
    largest: Tiers


def relax(costs: Costs, memory: Memory, starts: tuple[Tiers, ...]) -> Relaxed:
    """Columns and tangents are added until mixture and bound meet, or hardly come nearer any more."""
    program = _started(costs, memory, starts)
    fixed_ns = float(costs.by_layer(costs.fixed_ns).sum())
    bound_ns, reached_ns, apart_ns = -np.inf, np.inf, []
    for _ in range(MAX_ROUNDS):
        shares, weights, prices, program_ns = program.solved()
        mixture = program.mixture(shares)
        byte_prices, paid_ns = _paid(memory, prices, program_ns)
        slopes = np.einsum("jl,jlet->let", weights, np.stack(program.slopes))
        reduced = slopes + byte_prices[:, None, :] * memory.size_bytes[:, :, None]
        column, least_ns = program.charges.cheapest(reduced)
        beside_ns = float((weights * np.stack(program.beside)).sum())
        bound_ns = max(bound_ns, fixed_ns + beside_ns + float(least_ns.sum()) - paid_ns)
        composed_ns = float(costs.compose_layers(costs.loads(mixture)).sum())
        charges_ns = float((shares * np.stack(program.charge_ns, axis=1)).sum())
        reached_ns = min(reached_ns, fixed_ns + composed_ns + charges_ns)
        apart_ns.append(reached_ns - bound_ns)
        is_slow = len(apart_ns) > SLOW_ROUNDS and apart_ns[-1] > SLOW_FRAC * apart_ns[-1 - SLOW_ROUNDS]
        if apart_ns[-1] <= RELAXED_GAP * reached_ns or is_slow:
            break
        if composed_ns - program_ns > RELAXED_GAP / 4 * reached_ns:
            program.add_tangent(mixture)
        program.add_column(column)
    largest = np.stack(program.columns)[shares.argmax(axis=1), np.arange(costs.n_layers)]
    return Relaxed(mixture, reduced, byte_prices, bound_ns, memory.mended(largest, reduced))


def _started(costs: Costs, memory: Memory, starts: tuple[Tiers, ...]) -> "_Program":
    """The program over all experts in one tier, those of `starts`, and those that even weights choose."""
    program = _Program(costs, memory)
    shape = (costs.n_layers, costs.n_experts)
    for tier in range(costs.n_tiers):
        program.add_column(np.full(shape, tier, np.int8))
        program.add_tangent(one_hot(program.columns[tier], costs.n_tiers))
    program.add_tangent(np.full((*shape, costs.n_tiers), 1 / costs.n_tiers))
    even = np.mean(program.slopes, axis=0)
    for column in (*starts, memory.mended(even.argmin(axis=2).astype(np.int8), even)):
        program.add_column(column)
    return program


def _paid(memory: Memory, prices: list[Array], program_ns: float) -> tuple[Array, float]:
    """What a byte costs, ns `[layer, tier]`, and what all budgets do, where each costs its price, at least a trifle."""
    byte_prices = np.zeros((len(memory.size_bytes), memory.n_tiers))
    paid = 0.0
    for asked, budget in zip(prices, memory.budgets, strict=True):
        price = np.maximum(asked, TRIFLE * program_ns / max(budget.capacity_bytes, 1.0) / len(asked))
        byte_prices += price[:, None] * memory.holds(budget)
        paid += budget.capacity_bytes * float(price.sum() if budget.of_each_layer else price[0])
    return byte_prices, paid


class _Program:
    """The linear program that mixes columns, whole placements of each layer, under tangents of their time."""

    def __init__(self, costs: Costs, memory: Memory) -> None:
        self.costs, self.memory = costs, memory
        self.charges = Charges(costs)
        self.columns: list[Tiers] = []
        self.slopes: list[Array] = []  # [layer, expert, tier] of each tangent
        self.beside: list[Array] = []  # [layer]
        self.idle = np.zeros((0, costs.n_layers), np.int64)  # [tangent, layer] rounds since it touched the mixture
        self.charge_ns: list[Array] = []  # [layer] of each column
        self.held: list[list[Array]] = []  # bytes under each budget, [layer], of each column
        self.time: dict[tuple[int, int], Array] = {}  # ns of a column under a tangent, [layer]

    def add_column(self, tier: Tiers) -> None:
        """Let a placement be mixed in."""
        self.columns.append(tier)
        self.charge_ns.append(self.charges.of(tier))
        self.held.append([self.memory.held_bytes(tier, budget) for budget in self.memory.budgets])
        for number in range(len(self.slopes)):
            self._rate(number, len(self.columns) - 1)

    def add_tangent(self, parts: Array) -> None:
        """Bound the time from below by its tangent at a relaxed placement."""
        slopes, beside = self.costs.slopes(parts)
        self.slopes.append(slopes)
        self.beside.append(beside)
        self.idle = np.pad(self.idle, ((0, 1), (0, 0)))
        for number in range(len(self.columns)):
            self._rate(len(self.slopes) - 1, number)

    def _rate(self, tangent: int, column: int) -> None:
        at = self.columns[column][:, :, None].astype(np.int64)
        chosen = np.take_along_axis(self.slopes[tangent], at, axis=2)[:, :, 0]
        self.time[tangent, column] = chosen.sum(axis=1) + self.beside[tangent]

    def mixture(self, shares: Array) -> Array:
        """The relaxed placement, `[layer, expert, tier]`, of columns by their `shares[layer, column]`."""
        found = np.zeros((self.costs.n_layers, self.costs.n_experts, self.costs.n_tiers))
        for share, column in zip(shares.T, self.columns, strict=True):
            if share.any():
                found += share[:, None, None] * one_hot(column, self.costs.n_tiers)
        return found

    def solved(self) -> tuple[Array, Array, list[Array], float]:
        """The best mixture within the budgets: shares `[layer, column]`, weights of tangents `[tangent, layer]`, for
        each budget the price of a byte, ns `[layer]`, and the time without charges, ns."""
        n_layers, n, j = self.costs.n_layers, len(self.columns), len(self.slopes)
        unit_ns = float(np.mean([*self.time.values()])) or 1.0  # the solver's tolerances are for numbers near one
        goal, below, limits, whole, bounds = self._matrices(unit_ns)
        flat = np.concatenate(limits)
        counts = np.ones(len(flat), dtype=bool)
        counts[: j * n_layers] = self.idle.ravel() < IDLE_ROUNDS
        for method in METHODS:
            rows = below[counts], flat[counts], whole, np.ones(n_layers)
            done = linprog(goal, *rows, np.stack(bounds, axis=1), method=method)
            if not done.status:
                break
        else:
            raise RuntimeError(f"the linear program of a placement was not solved: {done.message}")
        duals = np.zeros(len(flat))
        duals[counts] = -done.ineqlin.marginals
        weights = np.maximum(duals[: j * n_layers].reshape(j, n_layers), 0.0)
        weights = weights / weights.sum(axis=0)  # but for rounding errors they sum to one
        self.idle = np.where(weights > 0, 0, self.idle + 1)
        prices, start = [], j * n_layers
        for budget, limit in zip(self.memory.budgets, limits[1:], strict=True):
            of_byte = unit_ns * duals[start : start + len(limit)] / max(budget.capacity_bytes, 1.0)
            prices.append(np.broadcast_to(of_byte, n_layers))
            start += len(limit)
        shares = done.x[: n_layers * n].reshape(n_layers, n)
        return shares, weights, prices, unit_ns * float(done.x[n_layers * n :].sum())

    def _matrices(self, unit_ns: float) -> tuple[Array, csr_matrix, list[Array], csr_matrix, tuple[Array, Array]]:
        """The goal over shares `[layer, column]` and times `[layer]`; rows that stay below limits, tangents first, then
        budgets; rows that sum to one; and bounds."""
        n_layers, n, j = self.costs.n_layers, len(self.columns), len(self.slopes)
        layer = np.arange(n_layers)
        at = (layer[:, None] * n + np.arange(n)).ravel()  # variables of a layer's columns; then one for its time
        rows, where, values, limits = [], [], [], [np.zeros(j * n_layers)]
        for tangent in range(j):
            time = np.stack([self.time[tangent, column] for column in range(n)], axis=1) / unit_ns
            rows += [tangent * n_layers + np.repeat(layer, n), tangent * n_layers + layer]
            where += [at, n_layers * n + layer]
            values += [time.ravel(), -np.ones(n_layers)]
        n_rows = j * n_layers
        for number, budget in enumerate(self.memory.budgets):
            scale = max(budget.capacity_bytes, 1.0)
            held = np.stack([of_column[number] for of_column in self.held], axis=1)
            rows.append(n_rows + (np.repeat(layer, n) if budget.of_each_layer else np.zeros(n_layers * n, np.int64)))
            where.append(at)
            values.append(held.ravel() / scale)
            limits.append(np.full(n_layers if budget.of_each_layer else 1, budget.capacity_bytes / scale))
            n_rows += len(limits[-1])
        size = n_layers * (n + 1)
        below = csr_matrix((np.concatenate(values), (np.concatenate(rows), np.concatenate(where))), (n_rows, size))
        whole = csr_matrix((np.ones(n_layers * n), (np.repeat(layer, n), at)), (n_layers, size))
        goal = np.concatenate([np.stack(self.charge_ns, axis=1).ravel() / unit_ns, np.ones(n_layers)])
        lower, upper = np.zeros(size), np.full(size, np.inf)
        lower[n_layers * n :], upper[: n_layers * n] = -np.inf, 1.0
        return goal, below, limits, whole, (lower, upper)

"""The linear program over placements: a mixture of whole placements of each layer, and a bound on all.

Layers meet in their budgets only. So the program mixes whole placements of each layer (columns), its prices of memory
and of loads say which placement of a layer would help most, and that one joins it (Dantzig and Wolfe, Operations
Research 1960; tangents stand for what is not linear: Kelley, J. SIAM 1960). Any prices give a lower bound on all
placements (Lagrange; Fisher, Management Science 1981).
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from .charges import Charges
from .costs import Array, Costs, one_hot
from .memory import Memory
from .problem import Tiers

MAX_ROUNDS, RELAXED_GAP = 60, 1e-4
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
    """Columns and tangents are added until mixture and bound meet."""
    program = _Program(costs, memory)
    shape = (costs.n_layers, costs.n_experts)
    for tier in range(costs.n_tiers):
        program.add_column(np.full(shape, tier, np.int8))
        program.add_tangent(one_hot(program.columns[tier], costs.n_tiers))
    program.add_tangent(np.full((*shape, costs.n_tiers), 1 / costs.n_tiers))
    even = np.mean(program.slopes, axis=0)
    for column in (*starts, memory.mended(even.argmin(axis=2).astype(np.int8), even)):
        program.add_column(column)
    fixed = float(costs.by_layer(costs.fixed_ns).sum())
    bound, found = -np.inf, None
    for _ in range(MAX_ROUNDS):
        shares, weights, prices, program_ns = program.solved()
        mixture = np.zeros((*shape, costs.n_tiers))
        for share, column in zip(shares.T, program.columns, strict=True):
            mixture += share[:, None, None] * one_hot(column, costs.n_tiers)
        byte_prices = np.zeros((costs.n_layers, costs.n_tiers))
        paid = 0.0
        for asked, budget in zip(prices, memory.budgets, strict=True):
            price = np.maximum(asked, TRIFLE * program_ns / max(budget.capacity_bytes, 1.0) / len(asked))
            byte_prices += price[:, None] * memory.holds(budget)
            paid += budget.capacity_bytes * float(price.sum() if budget.of_each_layer else price[0])
        slopes = np.einsum("jl,jlet->let", weights, np.stack(program.slopes))
        reduced = slopes + byte_prices[:, None, :] * memory.size_bytes[:, :, None]
        column, least = program.charge.cheapest(reduced)
        beside = float((weights * np.stack(program.beside)).sum())
        bound = max(bound, fixed + beside + float(least.sum()) - paid)
        found = Relaxed(mixture, reduced, byte_prices, bound, program.columns[0])
        underrated = float(costs.compose_layers(costs.loads(mixture)).sum()) - program_ns
        charges = float((shares * np.stack(program.charges, axis=1)).sum())
        reached = fixed + program_ns + underrated + charges
        if reached - bound <= RELAXED_GAP * reached:
            break
        if underrated > RELAXED_GAP / 4 * reached:
            program.add_tangent(mixture)
        program.add_column(column)
    assert found is not None
    largest = np.stack(program.columns)[shares.argmax(axis=1), np.arange(costs.n_layers)]
    return replace(found, largest=memory.mended(largest, found.reduced))


class _Program:
    """The linear program that mixes columns, whole placements of each layer, under tangents of their time."""

    def __init__(self, costs: Costs, memory: Memory) -> None:
        self.costs, self.memory = costs, memory
        self.charge = Charges(costs)
        self.columns: list[Tiers] = []
        self.slopes: list[Array] = []  # [layer, expert, tier] of each tangent
        self.beside: list[Array] = []  # [layer]
        self.charges: list[Array] = []  # [layer] of each column
        self.held: list[list[Array]] = []  # bytes under each budget, [layer], of each column
        self.time: dict[tuple[int, int], Array] = {}  # ns of a column under a tangent, [layer]

    def add_column(self, tier: Tiers) -> None:
        """Let a placement be mixed in."""
        self.columns.append(tier)
        self.charges.append(self.charge.of(tier))
        sizes = self.memory.size_bytes
        self.held.append([np.where(self.memory.holds(b)[tier], sizes, 0.0).sum(axis=1) for b in self.memory.budgets])
        for number in range(len(self.slopes)):
            self._rate(number, len(self.columns) - 1)

    def add_tangent(self, parts: Array) -> None:
        """Bound the time from below by its tangent at a relaxed placement."""
        slopes, beside = self.costs.slopes(parts)
        self.slopes.append(slopes)
        self.beside.append(beside)
        for number in range(len(self.columns)):
            self._rate(len(self.slopes) - 1, number)

    def _rate(self, tangent: int, column: int) -> None:
        at = self.columns[column][:, :, None].astype(np.int64)
        chosen = np.take_along_axis(self.slopes[tangent], at, axis=2)[:, :, 0]
        self.time[tangent, column] = chosen.sum(axis=1) + self.beside[tangent]

    def solved(self) -> tuple[Array, Array, list[Array], float]:
        """The best mixture within the budgets: shares `[layer, column]`, weights of tangents `[tangent, layer]`, for
        each budget the price of a byte, ns `[layer]`, and the time without charges, ns."""
        n_layers, n, j = self.costs.n_layers, len(self.columns), len(self.slopes)
        unit_ns = float(np.mean([*self.time.values()])) or 1.0  # the solver's tolerances are for numbers near one
        goal, below, limits, whole, bounds = self._matrices(unit_ns)
        flat = np.concatenate(limits)
        done = linprog(goal, below, flat, whole, np.ones(n_layers), np.stack(bounds, axis=1), method="highs-ds")
        if done.status:
            raise RuntimeError(f"the linear program of a placement was not solved: {done.message}")
        duals = -done.ineqlin.marginals
        prices, start = [], j * n_layers
        for budget, limit in zip(self.memory.budgets, limits[1:], strict=True):
            of_byte = unit_ns * duals[start : start + len(limit)] / max(budget.capacity_bytes, 1.0)
            prices.append(np.broadcast_to(of_byte, n_layers))
            start += len(limit)
        shares = done.x[: n_layers * n].reshape(n_layers, n)
        return shares, duals[: j * n_layers].reshape(j, n_layers), prices, unit_ns * float(done.x[n_layers * n :].sum())

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
        goal = np.concatenate([np.stack(self.charges, axis=1).ravel() / unit_ns, np.ones(n_layers)])
        lower, upper = np.zeros(size), np.full(size, np.inf)
        lower[n_layers * n :], upper[: n_layers * n] = -np.inf, 1.0
        return goal, below, limits, whole, (lower, upper)

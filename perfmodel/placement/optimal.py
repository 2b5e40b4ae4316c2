"""The placement that costs least under memory budgets, with a bound on how much better any other could be.

Layers meet in their budgets only. So a linear program mixes whole placements of each layer (columns), its prices of
memory and of loads say which placement of a layer would help most, and that one joins it (Dantzig and Wolfe, Operations
Research 1960; tangents stand for what is not linear: Kelley, J. SIAM 1960). Any prices give a lower bound on all
placements (Lagrange; Fisher, Management Science 1981). The mixture is rounded, and moves that prices hardly tell
apart are tried in pairs.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from .charges import Charges
from .costs import Array, Costs, one_hot
from .exact import exactly
from .memory import Budget, Memory
from .problem import Tiers

MAX_ROUNDS, RELAXED_GAP, ENOUGH = 60, 1e-4, 3e-4
N_MOVES, N_MOVES_OF_STEPS = 48, 20  # moves of a layer that are tried in pairs at a time
N_PRICED, PRICE_STEP, MAX_POLISH, PATIENCE = 10, 0.02, 24, 4


@dataclass(frozen=True, eq=False)
class Solution:
    """A placement `tier[layer, expert]`, its time, and the least that any placement within the budgets takes, ns summed
    over layers."""

    tier: Tiers
    time_ns: float
    bound_ns: float

    @property
    def gap_frac(self) -> float:
        """By how much the placement may be slower than the best one, of its own time."""
        return 1 - self.bound_ns / self.time_ns if self.time_ns else 0.0


def minimise(
    costs: Costs, size_bytes: Array, budgets: tuple[Budget, ...], starts: tuple[Tiers, ...] = (), seed: int = 0
) -> Solution:
    """The placement of least mean time over steps, summed over layers, within the budgets, of experts of
    `size_bytes[layer, expert]`.

    `starts` are placements that the result is never worse than, as far as they keep the budgets; few choices are solved
    exactly. Raises InputError where the experts do not fit into all tiers together.
    """
    memory = Memory(np.broadcast_to(size_bytes, (costs.n_layers, costs.n_experts)), budgets, costs.n_tiers)
    best = exactly(costs, memory)
    if best is not None:
        time_ns = float(costs.layers_ns(best).sum())
        return Solution(best, time_ns, time_ns)
    relaxed = _relax(costs, memory, starts)
    rng = np.random.default_rng(seed)
    candidates = [_balanced(costs, memory, relaxed, rng), _filled(costs, memory, relaxed.largest)]
    candidates += filter(memory.fits, starts)
    found = min(candidates, key=lambda tier: float(costs.layers_ns(tier).sum()))
    found = _polished(costs, memory, relaxed, found, rng)
    time_ns = float(costs.layers_ns(found).sum())
    return Solution(found, time_ns, min(relaxed.bound_ns, time_ns))


@dataclass(frozen=True, eq=False)
class _Relaxed:
    """What the linear program leaves: a mixture of placements `[layer, expert, tier]`, what experts cost at the last
    prices of loads and memory, `reduced[layer, expert, tier]`, the prices of a byte in each tier, `[layer, tier]`, and
    the best bound. `largest` takes of each layer the column of the largest share, whole, for charges' sake."""

    mixture: Array
    reduced: Array
    byte_prices: Array
    bound_ns: float
    largest: Tiers


def _relax(costs: Costs, memory: Memory, starts: tuple[Tiers, ...]) -> _Relaxed:
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
        for price, budget in zip(prices, memory.budgets, strict=True):
            byte_prices += price[:, None] * memory.holds(budget)
            paid += budget.capacity_bytes * float(price.sum() if budget.of_each_layer else price[0])
        slopes = np.einsum("jl,jlet->let", weights, np.stack(program.slopes))
        reduced = slopes + byte_prices[:, None, :] * memory.size_bytes[:, :, None]
        column, least = program.charge.cheapest(reduced)
        beside = float((weights * np.stack(program.beside)).sum())
        bound = max(bound, fixed + beside + float(least.sum()) - paid)
        found = _Relaxed(mixture, reduced, byte_prices, bound, program.columns[0])
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
        goal, below, limits, whole, bounds = self._matrices()
        flat = np.concatenate(limits)
        done = linprog(goal, below, flat, whole, np.ones(n_layers), np.stack(bounds, axis=1), method="highs-ds")
        if done.status:
            raise RuntimeError(f"the linear program of a placement was not solved: {done.message}")
        duals = -done.ineqlin.marginals
        prices, start = [], j * n_layers
        for budget, limit in zip(self.memory.budgets, limits[1:], strict=True):
            of_byte = duals[start : start + len(limit)] / max(budget.capacity_bytes, 1.0)
            prices.append(np.broadcast_to(of_byte, n_layers))
            start += len(limit)
        shares = done.x[: n_layers * n].reshape(n_layers, n)
        return shares, duals[: j * n_layers].reshape(j, n_layers), prices, float(done.x[n_layers * n :].sum())

    def _matrices(self) -> tuple[Array, csr_matrix, list[Array], csr_matrix, tuple[Array, Array]]:
        """The goal over shares `[layer, column]` and times `[layer]`; rows that stay below limits, tangents first, then
        budgets; rows that sum to one; and bounds."""
        n_layers, n, j = self.costs.n_layers, len(self.columns), len(self.slopes)
        layer = np.arange(n_layers)
        at = (layer[:, None] * n + np.arange(n)).ravel()  # variables of a layer's columns; then one for its time
        rows, where, values, limits = [], [], [], [np.zeros(j * n_layers)]
        for tangent in range(j):
            time = np.stack([self.time[tangent, column] for column in range(n)], axis=1)
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
        goal = np.concatenate([np.stack(self.charges, axis=1).ravel(), np.ones(n_layers)])
        lower, upper = np.zeros(size), np.full(size, np.inf)
        lower[n_layers * n :], upper[: n_layers * n] = -np.inf, 1.0
        return goal, below, limits, whole, (lower, upper)


def _rounded(costs: Costs, memory: Memory, relaxed: _Relaxed) -> Tiers:
    """A whole placement near the mixture: expert by expert goes where it costs least at the price of memory, those not
    yet decided staying mixed, so that loads stay balanced however many are mixed alike."""
    parts = relaxed.mixture.copy()
    is_mixed = parts.max(axis=2) < 1 - 1e-9
    order = np.argsort(-np.where(is_mixed, memory.size_bytes, -1.0), axis=1, kind="stable")
    loads = costs.loads(parts)
    layers = np.arange(costs.n_layers)
    whole = np.eye(costs.n_tiers)
    for expert in order[:, : int(is_mixed.sum(axis=1).max())].T:
        now = parts[layers, expert]
        change = whole[None, :, :] - now[:, None, :]  # [layer, to, tier]
        shift = costs.shift(np.repeat(expert[:, None], costs.n_tiers, axis=1), change)
        time = costs.compose_layers(loads[:, None, :] + shift)
        time = time + relaxed.byte_prices * memory.size_bytes[layers, expert][:, None]
        to = np.where(now > 1e-9, time, np.inf).argmin(axis=1)
        parts[layers, expert] = whole[to]
        loads = loads + shift[np.arange(len(loads)), costs.of_rows(to)]
    return np.asarray(parts.argmax(axis=2), dtype=np.int8)


def _balanced(costs: Costs, memory: Memory, relaxed: _Relaxed, rng: np.random.Generator) -> Tiers:
    """A placement within the budgets from the mixture. Where many experts are worth the price of memory alike, a little
    more or less of it decides; what is then left over leaves one expert of a layer at a time."""
    tier = _rounded(costs, memory, relaxed)
    factor = 1.0
    for number in range(N_PRICED):
        factor *= 1 + (-1 if memory.fits(tier) else 1) * PRICE_STEP / (number + 1)
        tier = _exchanged(costs, memory, relaxed, tier, rng, factor)
    return _filled(costs, memory, memory.mended(_emptied(costs, memory, tier), relaxed.reduced))


def _emptied(costs: Costs, memory: Memory, tier: Tiers) -> Tiers:
    """A placement that keeps its budgets, where it can: half of what is too much leaves at a time, the experts that
    lose least by it."""
    tier = tier.copy()
    for _ in range(MAX_POLISH):
        over = [b for b in memory.budgets if (memory.room_bytes(tier, b) < -memory.slack_bytes).any()]
        if not over:
            break
        held, size = memory.holds(over[0]), memory.size_bytes
        loss = np.where(held[tier][:, :, None] & ~held, _gains(costs, tier), np.inf)
        need = np.broadcast_to(np.maximum(-memory.room_bytes(tier, over[0]), 0.0), costs.n_layers)[:, None]
        order = np.argsort(loss.min(axis=2) / size, axis=None if not over[0].of_each_layer else 1, kind="stable")
        rank = size.ravel()[order] if order.ndim == 1 else np.take_along_axis(size, order, axis=1)
        before = np.cumsum(rank, axis=-1) - rank
        leaves = np.zeros(size.shape, dtype=bool)
        if order.ndim == 1:
            leaves.ravel()[order] = before < np.maximum(need[0] / 2, 1e-9)
        else:
            np.put_along_axis(leaves, order, (before < np.maximum(need / 2, 1e-9)) & (need > 0), axis=1)
        leaves &= np.isfinite(loss.min(axis=2))
        if not leaves.any():
            break
        tier[leaves] = loss.argmin(axis=2)[leaves]
    return tier


def _filled(costs: Costs, memory: Memory, tier: Tiers) -> Tiers:
    """A faster placement where budgets have room left: experts that gain most move, as many at a time as fit, half as
    many where that was too many at once."""
    now_ns, share = float(costs.layers_ns(tier).sum()), 1.0
    for _ in range(MAX_POLISH):
        gains = _gains(costs, tier)
        gain, to = gains.min(axis=2), gains.argmin(axis=2).astype(np.int8)
        tried = tier.copy()
        room = [memory.room_bytes(tier, b).copy() for b in memory.budgets]
        helps = [int(place) for place in np.argsort(gain, axis=None, kind="stable") if gain.ravel()[place] < 0]
        for place in helps[: max(1, int(share * len(helps)))]:
            layer, expert = divmod(place, costs.n_experts)
            fits = True
            for r, b in zip(room, memory.budgets, strict=True):
                held = memory.holds(b)
                more = memory.size_bytes[layer, expert] * (float(held[to[layer, expert]]) - held[tier[layer, expert]])
                fits = fits and r[layer if b.of_each_layer else 0] - more >= -memory.slack_bytes
            if not fits:
                continue
            for r, b in zip(room, memory.budgets, strict=True):
                held = memory.holds(b)
                more = memory.size_bytes[layer, expert] * (float(held[to[layer, expert]]) - held[tier[layer, expert]])
                r[layer if b.of_each_layer else 0] -= more
            tried[layer, expert] = to[layer, expert]
        tried_ns = float(costs.layers_ns(tried).sum())
        if tried_ns < now_ns * (1 - 1e-9):
            tier, now_ns = tried, tried_ns
        elif share > 0.02:
            share /= 4
        else:
            break
    return tier


def _exchanged(
    costs: Costs, memory: Memory, relaxed: _Relaxed, tier: Tiers, rng: np.random.Generator, price: float | None
) -> Tiers:
    """The same or a better placement by one or two moves in each layer: the best pair of those moves that prices hardly
    tell apart, where a gap counts a random part of itself. Memory counts so many times its price, or (null) no layer
    may take more of it."""
    n = min(N_MOVES if costs.n_steps == 1 else N_MOVES_OF_STEPS, costs.n_experts * (costs.n_tiers - 1))
    now = np.take_along_axis(relaxed.reduced, tier[:, :, None].astype(np.int64), axis=2)
    gap = np.abs(relaxed.reduced - now) * rng.random(relaxed.reduced.shape)
    gap[tier[:, :, None] == np.arange(costs.n_tiers)] = np.inf
    place = np.argpartition(gap.reshape(costs.n_layers, -1), n - 1, axis=1)[:, :n]
    expert, to = np.divmod(place, costs.n_tiers)
    one, other = np.triu_indices(n)  # the same move twice is that move alone
    second = np.where(one == other, 0.0, 1.0)
    whole = np.eye(costs.n_tiers)
    change = whole[to] - whole[np.take_along_axis(tier, expert, axis=1)]
    size = np.take_along_axis(memory.size_bytes, expert, axis=1)

    def of_pairs(of_moves: Array) -> Array:
        return np.asarray(of_moves[:, one] + of_moves[:, other] * second)

    shift = costs.shift(expert, change)
    loads = costs.loads(one_hot(tier, costs.n_tiers))[:, None, :] + shift[:, one] + shift[:, other] * second[:, None]
    time = costs.compose_layers(loads)
    if price is not None:
        time = time + price * of_pairs((change * relaxed.byte_prices[:, None, :]).sum(axis=2) * size)
    for budget in memory.budgets if price is None else ():
        growth = of_pairs((change @ memory.holds(budget)) * size)
        time = np.where(growth <= memory.slack_bytes / costs.n_layers, time, np.inf)
    time[(expert[:, one] == expert[:, other]) & (one != other)] = np.inf
    best = time.argmin(axis=1)
    layers = np.arange(costs.n_layers)
    found = tier.copy()
    for move in (one[best], other[best]):
        found[layers, expert[layers, move]] = to[layers, move]
    times = [costs.layers_ns(x) + (price or 0.0) * _price_of(memory, relaxed, x) for x in (tier, found)]
    return np.where((times[1] < times[0])[:, None], found, tier)


def _price_of(memory: Memory, relaxed: _Relaxed, tier: Tiers) -> Array:
    """What the memory that each layer takes costs at its price, ns `[layer]`."""
    return np.asarray(
        (np.take_along_axis(relaxed.byte_prices, tier.astype(np.int64), 1) * memory.size_bytes).sum(axis=1)
    )


def _polished(costs: Costs, memory: Memory, relaxed: _Relaxed, tier: Tiers, rng: np.random.Generator) -> Tiers:
    """The same or a faster placement: combinations within layers, then single experts and pairs of layers, in turn
    until nothing helps or the bound is near enough."""
    best_ns = float(costs.layers_ns(tier).sum())
    failures = 0
    for number in range(MAX_POLISH):
        if best_ns - relaxed.bound_ns <= ENOUGH * best_ns or failures == PATIENCE:
            break
        tried = _moved(costs, memory, tier) if number % 3 == 0 else None
        tried = _exchanged(costs, memory, relaxed, tier if tried is None else tried, rng, None)
        tried_ns = float(costs.layers_ns(tried).sum())
        failures = 0 if tried_ns < best_ns * (1 - 1e-6) else failures + 1
        if tried_ns < best_ns:
            tier, best_ns = tried, tried_ns
    return tier


def _moved(costs: Costs, memory: Memory, tier: Tiers) -> Tiers:
    """A placement with those single moves that help and fit, at most one a layer, and pairs of them in two layers, one
    that makes room and one that takes it."""
    gain = _gains(costs, tier)
    growth = [
        memory.size_bytes[:, :, None]
        * (memory.holds(b)[None, None, :].astype(np.float64) - memory.holds(b)[tier][:, :, None])
        for b in memory.budgets
    ]
    tier = tier.copy()
    room = [np.broadcast_to(memory.room_bytes(tier, b), costs.n_layers).copy() for b in memory.budgets]
    fits = np.all([g <= r[:, None, None] for g, r in zip(growth, room, strict=True)], axis=0)
    grows = np.any([g > 0 for g in growth], axis=0)
    best = {
        name: _best_of_layers(np.where(which, gain, np.inf))
        for name, which in {"fits": fits, "enters": grows, "leaves": ~grows}.items()
    }
    moved = np.zeros(costs.n_layers, dtype=bool)

    def try_moves(*moves: tuple[int, int, int]) -> None:
        after = [
            room_of - sum(_spread(b, layer, costs.n_layers) * g[layer, e, t] for layer, e, t in moves)
            for room_of, g, b in zip(room, growth, memory.budgets, strict=True)
        ]
        if all((r >= -memory.slack_bytes).all() for r in after):
            for layer, e, t in moves:
                tier[layer, e], moved[layer] = t, True
            room[:] = after

    for layer in np.argsort(best["fits"][0]):
        if best["fits"][0][layer] < 0:
            try_moves((layer, *_at(best["fits"][1][layer], costs.n_tiers)))
    enters, leaves = (np.argsort(best[name][0]) for name in ("enters", "leaves"))
    for into, out in zip(enters, leaves, strict=True):
        if best["enters"][0][into] + best["leaves"][0][out] >= 0:
            break
        if into != out and not moved[into] and not moved[out]:
            pair = (("enters", into), ("leaves", out))
            try_moves(*((layer, *_at(best[name][1][layer], costs.n_tiers)) for name, layer in pair))
    return tier


def _gains(costs: Costs, tier: Tiers) -> Array:
    """What each single move adds to the mean time of its layer, ns `[layer, expert, tier]`; negative helps."""
    parts = one_hot(tier, costs.n_tiers)
    loads = costs.loads(parts)
    before = costs.layers_ns(tier)[:, None] - costs.by_layer(costs.fixed_ns)[:, None]
    expert = np.broadcast_to(np.arange(costs.n_experts), tier.shape)
    gains = np.zeros((*tier.shape, costs.n_tiers))
    rows = costs.of_rows(tier.astype(np.int64))
    now = np.take_along_axis(costs.charge_ns, rows[:, :, None], axis=2)[:, :, 0]
    top = np.argmax(now, axis=1)[:, None]
    first = np.take_along_axis(now, top, axis=1)
    np.put_along_axis(now, top, -1.0, axis=1)
    rest = np.where(np.arange(costs.n_experts) == top, np.maximum(now.max(axis=1, keepdims=True), 0.0), first)
    for to in range(costs.n_tiers):
        change = one_hot(np.full_like(tier, to), costs.n_tiers) - parts
        after = costs.compose_layers(loads[:, None, :] + costs.shift(expert, change))
        charge = costs.by_layer(np.maximum(rest, costs.charge_ns[:, :, to]))
        gains[:, :, to] = np.where(tier == to, np.inf, after + charge - before)
    return gains


def _best_of_layers(gain: Array) -> tuple[Array, NDArray[np.int64]]:
    """The least of each layer and its place among experts and tiers."""
    flat = gain.reshape(len(gain), -1)
    return flat.min(axis=1), flat.argmin(axis=1)


def _at(place: np.int64, n_tiers: int) -> tuple[int, int]:
    expert, tier = divmod(int(place), n_tiers)
    return expert, tier


def _spread(budget: Budget, layer: int, n_layers: int) -> Array:
    """Which layers' room shrinks when a layer takes some: its own, or that of all who share it."""
    return np.ones(n_layers) if not budget.of_each_layer else np.asarray(np.arange(n_layers) == layer, dtype=np.float64)

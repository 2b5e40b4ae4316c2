"""Whole placements from a mixture, and better ones from whole ones: rounding, mending, filling, exchanging.

Moves that prices hardly tell apart are tried in pairs within a layer; single moves fill what room is left, and two
layers trade it.
"""

import numpy as np

from .costs import Costs, one_hot
from .memory import Memory
from .problem import Array, Tiers
from .relaxed import Relaxed

ENOUGH = 3e-4  # of a placement's time: nearer to the bound nothing is gained by going on
N_MOVES, N_MOVES_OF_STEPS = 32, 20  # moves of a layer that are tried in pairs at a time
N_PRICED, PRICE_STEP = 8, 0.02  # rounds in which a price of memory is looked for, and by how much it changes at first
MAX_POLISH, PATIENCE = 24, 4  # rounds of improvement at most, and how many may fail one after another


def _rounded(costs: Costs, memory: Memory, relaxed: Relaxed) -> Tiers:
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


def balanced(costs: Costs, memory: Memory, relaxed: Relaxed, rng: np.random.Generator) -> Tiers:
    """A placement within the budgets from the mixture. Where many experts are worth the price of memory alike, a little
    more or less of it decides; what is then left over leaves one expert of a layer at a time."""
    tier = _rounded(costs, memory, relaxed)
    factor = 1.0
    for number in range(N_PRICED):
        factor *= 1 + (-1 if memory.fits(tier) else 1) * PRICE_STEP / (number + 1)
        tier = _exchanged(costs, memory, relaxed, tier, rng, factor)
    return filled(costs, memory, memory.mended(_emptied(costs, memory, tier), relaxed.reduced))


def _emptied(costs: Costs, memory: Memory, tier: Tiers) -> Tiers:
    """A placement that keeps its budgets, where it can: half of what is too much leaves at a time, the experts that
    lose least by it."""
    tier = tier.copy()
    for _ in range(MAX_POLISH):
        over = [b for b in memory.budgets if (memory.room_bytes(tier, b) < -memory.slack_bytes).any()]
        if not over:
            break
        held = memory.holds(over[0])
        loss = np.where(held[tier][:, :, None] & ~held, _gains(costs, tier), np.inf)
        leaves = memory.first_to_leave(loss.min(axis=2), over[0], -memory.room_bytes(tier, over[0]) / 2)
        if not leaves.any():
            break
        tier[leaves] = loss.argmin(axis=2)[leaves]
    return tier


def filled(costs: Costs, memory: Memory, tier: Tiers) -> Tiers:
    """A faster placement where budgets have room left: experts that gain most move, as many at a time as fit, and fewer
    where that was too many at once."""
    now_ns, share = float(costs.layers_ns(tier).sum()), 1.0
    for _ in range(MAX_POLISH):
        gains = _gains(costs, tier)
        growth = _growth(memory, tier)
        room = [np.broadcast_to(memory.room_bytes(tier, b), costs.n_layers).copy() for b in memory.budgets]
        for grows, left in zip(growth, room, strict=True):
            gains = np.where(grows <= left[:, None, None] + memory.slack_bytes, gains, np.inf)
        best = gains.min(axis=2)
        helps = np.argsort(best, axis=None, kind="stable")[: int((best < 0).sum())]
        tried = tier.copy()
        for place in helps[: max(1, int(share * len(helps)))].tolist():
            layer, expert = divmod(place, costs.n_experts)
            to = int(gains[layer, expert].argmin())
            more = [grows[layer, expert, to] for grows in growth]
            if all(m <= left[layer] + memory.slack_bytes for m, left in zip(more, room, strict=True)):
                tried[layer, expert] = to
                for b, m, left in zip(memory.budgets, more, room, strict=True):
                    left[layer if b.of_each_layer else slice(None)] -= m
        tried_ns = float(costs.layers_ns(tried).sum())
        if tried_ns < now_ns * (1 - 1e-9):
            tier, now_ns = tried, tried_ns
        elif share > 0.02 and len(helps) > 1:
            share /= 4
        else:
            break
    return tier


def _growth(memory: Memory, tier: Tiers) -> list[Array]:
    """Bytes that each move adds under each budget, `[layer, expert, tier]`."""
    size = memory.size_bytes[:, :, None]
    return [size * (memory.holds(b).astype(np.float64) - memory.holds(b)[tier][:, :, None]) for b in memory.budgets]


def _exchanged(
    costs: Costs, memory: Memory, relaxed: Relaxed, tier: Tiers, rng: np.random.Generator, price: float | None
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
    helps = (times[1] < times[0]) & np.isfinite(time.min(axis=1))
    return np.where(helps[:, None], found, tier)


def _price_of(memory: Memory, relaxed: Relaxed, tier: Tiers) -> Array:
    """What the memory that each layer takes costs at its price, ns `[layer]`."""
    return np.asarray(
        (np.take_along_axis(relaxed.byte_prices, tier.astype(np.int64), 1) * memory.size_bytes).sum(axis=1)
    )


def polished(costs: Costs, memory: Memory, relaxed: Relaxed, tier: Tiers, rng: np.random.Generator) -> Tiers:
    """The same or a faster placement: combinations within layers, then single experts and pairs of layers, in turn
    until nothing helps or the bound is near enough."""
    best_ns = float(costs.layers_ns(tier).sum())
    failures = 0
    for number in range(MAX_POLISH):
        if best_ns - relaxed.bound_ns <= ENOUGH * best_ns or failures == PATIENCE:
            break
        tried = _traded(costs, memory, filled(costs, memory, tier)) if number % 3 == 0 else tier
        tried = _exchanged(costs, memory, relaxed, tried, rng, None)
        tried_ns = float(costs.layers_ns(tried).sum())
        failures = 0 if tried_ns < best_ns * (1 - 1e-6) else failures + 1
        if tried_ns < best_ns:
            tier, best_ns = tried, tried_ns
    return tier


def _traded(costs: Costs, memory: Memory, tier: Tiers) -> Tiers:
    """The same or a faster placement by pairs of moves in two layers, one that makes room and one that takes it; each
    layer takes part once."""
    gain, growth = _gains(costs, tier), _growth(memory, tier)
    grows = np.any([g > 0 for g in growth], axis=0) if growth else np.zeros(gain.shape, dtype=bool)
    enter, leave = (np.where(which, gain, np.inf).reshape(len(gain), -1) for which in (grows, ~grows))
    found = tier.copy()
    for into, out in zip(np.argsort(enter.min(axis=1)), np.argsort(leave.min(axis=1)), strict=True):
        if enter[into].min() + leave[out].min() >= 0:
            break
        tried = found.copy()
        for layer, place in ((into, enter[into].argmin()), (out, leave[out].argmin())):
            expert, to = divmod(int(place), costs.n_tiers)
            tried[layer, expert] = to
        is_free = bool((found[into] == tier[into]).all() and (found[out] == tier[out]).all())
        if into != out and is_free and memory.fits(tried):
            found = tried
    return found


def _gains(costs: Costs, tier: Tiers) -> Array:
    """What each single move adds to the mean time of its layer, ns `[layer, expert, tier]`; negative helps."""
    parts = one_hot(tier, costs.n_tiers)
    loads = costs.loads(parts)
    before = (costs.compose_layers(loads) + costs.charges(tier))[:, None]
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

"""Placements of few experts solved to the end: all placements of a layer, joined layer by layer."""

from itertools import product

import numpy as np

from .costs import Costs
from .memory import Memory
from .problem import Array, Tiers

MAX_OPTIONS = 2**13  # placements of one layer that are looked at
MAX_KEPT = 4000  # partial placements that none other beats; beyond that it takes too long


def exactly(costs: Costs, memory: Memory) -> Tiers | None:
    """The placement of least mean time within the budgets; null where there are too many to try, or none fits.

    Of the placements of the first layers only those are kept that no other beats in time and in bytes under each
    budget that layers share (Nemhauser and Ullmann, Management Science 1969), so nothing better is lost.
    """
    if costs.n_tiers**costs.n_experts > MAX_OPTIONS:
        return None
    options = np.array(list(product(range(costs.n_tiers), repeat=costs.n_experts)), dtype=np.int8)
    time = costs.by_layer(np.stack([costs.placements_ns(options, row) for row in range(len(costs.fixed_ns))]))
    kept_ns, kept_bytes = np.zeros(1), np.zeros((1, len(memory.budgets)))
    back: list[tuple[np.ndarray, np.ndarray]] = []  # of each layer: the partial placement before, and the option
    for layer in range(costs.n_layers):
        held = [memory.holds(b)[options] @ memory.size_bytes[layer] for b in memory.budgets]
        fits = np.ones(len(options), dtype=bool)
        for b, of_option in zip(memory.budgets, held, strict=True):
            fits &= of_option <= b.capacity_bytes + memory.slack_bytes
        shared = (
            np.stack([np.where(b.of_each_layer, 0.0, h) for b, h in zip(memory.budgets, held, strict=True)], axis=1)
            if held
            else np.zeros((len(options), 0))
        )
        usable = np.flatnonzero(fits)
        usable = usable[_unbeaten(time[layer, usable], shared[usable])]
        ns = (kept_ns[:, None] + time[layer, usable]).ravel()
        total = (kept_bytes[:, None, :] + shared[usable]).reshape(len(ns), -1)
        inside = np.ones(len(ns), dtype=bool)
        for number, b in enumerate(memory.budgets):
            inside &= total[:, number] <= b.capacity_bytes + memory.slack_bytes
        places = np.flatnonzero(inside)
        places = places[_unbeaten(ns[places], total[places])]
        if not 0 < len(places) <= MAX_KEPT:
            return None
        before, option = np.divmod(places, len(usable))
        back.append((before, usable[option]))
        kept_ns, kept_bytes = ns[places], total[places]
    at = int(kept_ns.argmin())
    tier = np.zeros(memory.size_bytes.shape, dtype=np.int8)
    for layer in range(costs.n_layers - 1, -1, -1):
        before, option = back[layer]
        tier[layer], at = options[option[at]], int(before[at])
    return tier


def _unbeaten(ns: Array, held: Array) -> np.ndarray:
    """Places of those that no other beats or equals in time and in all bytes, the fastest first."""
    order = np.lexsort((*held.T, ns))
    if held.shape[1] <= 1:
        least = np.minimum.accumulate(held[order, 0]) if held.shape[1] else np.zeros(len(order))
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = held[order, 0][1:] < least[:-1] - 1e-9 * np.abs(least[:-1]) if held.shape[1] else False
        return order[is_first]
    kept: list[int] = []
    best = np.zeros((0, held.shape[1]))
    for place in order:
        if not (best <= held[place] * (1 + 1e-12)).all(axis=1).any():
            kept.append(int(place))
            best = np.concatenate([best, held[place][None]])
            if len(kept) > MAX_KEPT:
                break
    return np.array(kept, dtype=np.int64)

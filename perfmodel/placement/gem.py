"""GEM: experts to GPUs of unequal speed so that no GPU is waited for (after arXiv 2605.19945). numpy only.

The paper gives its aims and results, not its score, start, neighbourhood or end: those are ours, and stated here.
"""

import math
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.routing import used_experts

from .balance import ExpertMap, Index, linear, map_of, require_even, token_balanced
from .problem import Array
from .staircase import Staircase

WINDOW_STEPS = 16  # steps that a map is made from (GEM)
# Ours: an expert is used in a step that gives it at least a quarter of an even share of the layer's assignments, and is
# consistent if used in at least half of the steps: between the 85 % and the 17 % that GEM reports as averages. Looser
# than `routing.Cutoffs`, because here every expert is of one kind or the other, and 16 steps are all there is.
USED_SHARE, CONSISTENT_STEPS_FRAC = 0.25, 0.5
MAX_MAPS = 10_000  # of a layer, that all may be tried
TINY = 1e-300  # of which infinitely much is still infinite
MAX_AT_ONCE = 2**15  # times of swaps, which then stay in the cache
LEAST_GAIN_FRAC = 1e-9  # of the score, that a swap must take away: rounding is no gain


def consistent_experts(
    loads: Array, used_share: float = USED_SHARE, steps_frac: float = CONSISTENT_STEPS_FRAC
) -> NDArray[np.bool_]:
    """Which experts are used in at least `steps_frac` of the steps, `[layer, expert]`; all others are temporal."""
    return np.asarray(used_experts(loads, used_share).mean(axis=0) >= steps_frac)


def usage(loads: Array) -> dict[str, float | None]:
    """What there is of both kinds: the share of experts that are consistent, and in which share of the steps experts of
    each kind are used, null where there are none."""
    frac, is_consistent = used_experts(loads, USED_SHARE).mean(axis=0), consistent_experts(loads)
    return {
        "consistent_experts_frac": float(is_consistent.mean()),
        "consistent_used_frac": float(frac[is_consistent].mean()) if is_consistent.any() else None,
        "temporal_used_frac": float(frac[~is_consistent].mean()) if not is_consistent.all() else None,
    }


def straggler_ns(tokens: Array, staircase: Staircase) -> Array:
    """The time of the GPU that all others wait for, ns `[step, layer]`, of assignments `[step, layer, gpu]`."""
    return np.asarray(staircase.of(tokens).max(axis=-1))


def score_ns(loads: Array, gpu_of: Index, staircase: Staircase) -> float:
    """What a map of one layer costs, ns: sum over steps of the slowest GPU's time; `loads[step, expert]`,
    `gpu_of[expert]`."""
    return float(straggler_ns(loads @ np.eye(staircase.n_gpus)[gpu_of], staircase).sum())


def gem(loads: Array, staircase: Staircase) -> ExpertMap:
    """The map of `loads[step, layer, expert]` with least time of stragglers that swaps find, equally many experts each.

    Each layer begins with the best of `spread_out`, the token-balanced and the linear map, and improves it by
    `swapped`; so on these loads it is never worse than any of them. Raises InputError where GPUs do not divide experts.
    """
    n_gpus = staircase.n_gpus
    _, n_layers, n_experts = loads.shape
    require_even(n_experts, n_gpus)
    simple = (token_balanced(loads.sum(axis=0), n_gpus), linear(n_layers, n_experts, n_gpus))
    starts = [spread_out(loads, staircase), *map(_gpu_of, simple)]
    found = np.empty((n_layers, n_experts), dtype=np.int64)
    for layer in range(n_layers):
        own = np.ascontiguousarray(loads[:, layer])
        best = min((start[layer] for start in starts), key=lambda gpu_of: score_ns(own, gpu_of, staircase))
        found[layer] = swapped(own, best, staircase)
    return map_of("gem", found, n_gpus)


def _gpu_of(made: ExpertMap) -> Index:
    gpu_of = np.empty_like(made.phy2log)
    np.put_along_axis(gpu_of, made.phy2log, made.gpu_of, axis=1)
    return gpu_of


def spread_out(loads: Array, staircase: Staircase) -> Index:
    """A first map, the GPU of each expert `[layer, expert]`: consistent experts first, each kind heaviest first.

    Each goes to the GPU with room where its tokens would wait least: the sum over steps of the expert's tokens times
    the GPU's time with them. So experts that are used at the same time come apart, and slow GPUs get fewer tokens.
    """
    n_steps, n_layers, n_experts = loads.shape
    n_gpus = staircase.n_gpus
    tokens, n_held = np.zeros((n_steps, n_layers, n_gpus)), np.zeros((n_layers, n_gpus), dtype=np.int64)
    gpu_of = np.empty((n_layers, n_experts), dtype=np.int64)
    layers = np.arange(n_layers)
    order = np.lexsort((-loads.sum(axis=0), ~consistent_experts(loads)), axis=1)
    for expert in order.T:
        own = loads[:, layers, expert]
        waits = np.maximum(own, TINY)[:, :, None] * staircase.of(tokens + own[:, :, None])
        waits = np.where(own[:, :, None] > 0, waits, 0.0).sum(axis=0)
        waits = np.minimum(waits, np.finfo(np.float64).max)  # beyond what was timed is still better than no room
        gpu = np.where(n_held < n_experts // n_gpus, waits, np.inf).argmin(axis=1)
        gpu_of[layers, expert] = gpu
        tokens[:, layers, gpu] += own
        n_held[layers, gpu] += 1
    return gpu_of


def swapped(loads: Array, gpu_of: Index, staircase: Staircase) -> Index:
    """A map of one layer, `gpu_of[expert]`, after the best swap of two experts was made again and again until none
    helps; `loads[step, expert]`.

    Only a swap with the GPU that is waited for can help. GPUs are tried from the one that is waited for longest; of the
    first where any swap lowers the score, the best one is made.
    """
    gpu_of = gpu_of.copy()
    onto = np.eye(staircase.n_gpus)
    while True:
        tokens = loads @ onto[gpu_of]
        ns = staircase.of(tokens)
        score = ns.max(axis=1).sum()
        waited = np.where(ns == ns.max(axis=1, keepdims=True), ns, 0.0).sum(axis=0)
        for gpu in np.argsort(-waited, kind="stable")[: int((waited > 0).sum())]:
            here, there, after = _swaps(loads, gpu_of, int(gpu), tokens, ns, staircase)
            if after.size and after.min() < score * (1 - LEAST_GAIN_FRAC):
                i, j = np.unravel_index(after.argmin(), after.shape)
                gpu_of[here[i]], gpu_of[there[j]] = gpu_of[there[j]], gpu
                break
        else:
            return gpu_of


def _swaps(
    loads: Array, gpu_of: Index, gpu: int, tokens: Array, ns: Array, staircase: Staircase
) -> tuple[Index, Index, Array]:
    """The experts of a GPU and of all others, and the score after each swap of one with one, `[own, other]`."""
    by_gpu = np.argsort(gpu_of, kind="stable")
    here, there = by_gpu[gpu_of[by_gpu] == gpu], by_gpu[gpu_of[by_gpu] != gpu]
    other = gpu_of[there]
    others_ns = ns.copy()
    others_ns[:, gpu] = 0.0
    slowest, first = others_ns.argmax(axis=1), others_ns.max(axis=1)
    others_ns[np.arange(len(ns)), slowest] = 0.0
    second = others_ns.max(axis=1)
    bystander = np.where(slowest[:, None] == other, second[:, None], first[:, None])  # the slowest that does not swap
    scores = np.empty((len(here), len(there)))
    n_at_once = max(MAX_AT_ONCE // max(len(loads) * len(here), 1), 1)
    for start in range(0, len(there), n_at_once):
        part = slice(start, start + n_at_once)
        moved = loads[:, here, None] - loads[:, None, there[part]]
        after = staircase.of_gpu(other[part], tokens[:, None, other[part]] + moved)
        np.maximum(after, staircase.of_gpu(gpu, tokens[:, gpu, None, None] - moved), out=after)
        scores[:, part] = np.maximum(after, bystander[:, None, part], out=after).sum(axis=0)
    return here, there, scores


def n_maps(n_experts: int, n_gpus: int) -> int:
    """How many maps of a layer there are with equally many experts on each GPU: E! / ((E / G)!)^G."""
    return math.factorial(n_experts) // int(math.factorial(n_experts // n_gpus) ** n_gpus)


def best_map(loads: Array, staircase: Staircase) -> ExpertMap:
    """The map of `loads[step, layer, expert]` with the least time of stragglers of all, by trying every one.

    Raises InputError where a layer has more than MAX_MAPS of them.
    """
    n_gpus = staircase.n_gpus
    n_experts = loads.shape[2]
    require_even(n_experts, n_gpus)
    if n_maps(n_experts, n_gpus) > MAX_MAPS:
        raise InputError(
            f"{n_experts} experts on {n_gpus} GPUs have {n_maps(n_experts, n_gpus):.3g} maps, more than the "
            f"{MAX_MAPS:,} that can be tried"
        )
    maps = np.array(_every_map(tuple(range(n_experts)), n_gpus), dtype=np.int64)
    onto = np.eye(n_gpus)[maps].transpose(1, 0, 2).reshape(n_experts, -1)
    found = []
    for layer in range(loads.shape[1]):
        tokens = (loads[:, layer] @ onto).reshape(len(loads), len(maps), n_gpus)
        found.append(maps[straggler_ns(tokens, staircase).sum(axis=0).argmin()])
    return map_of("best", np.stack(found), n_gpus)


def _every_map(experts: tuple[int, ...], n_gpus: int) -> list[list[int]]:
    """The GPU of each expert in every map: which experts go to the last GPU, times every map of the others."""
    if n_gpus == 1:
        return [[0] * len(experts)]
    places = range(len(experts))
    found = []
    for chosen in combinations(places, len(experts) // n_gpus):
        rest = [place for place in places if place not in chosen]
        for others in _every_map(tuple(experts[place] for place in rest), n_gpus - 1):
            gpu_of = [n_gpus - 1] * len(experts)
            for place, gpu in zip(rest, others, strict=True):
                gpu_of[place] = gpu
            found.append(gpu_of)
    return found

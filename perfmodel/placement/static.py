"""Policies that decide once which experts stay in device memory: each is an order in which experts are kept.

Memory is filled in that order; an expert that does not fit any more is passed over, so that what stays free is less
than any expert outside needs. Replicas are not for these. numpy only.
"""

import numpy as np
from numpy.typing import NDArray

from .problem import OFFLOADED, RESIDENT, Loads, Policy, Problem, Tiers

Order = NDArray[np.int64]  # experts of all layers, each as layer x number of experts + expert, those to keep first


def random(problem: Problem) -> Tiers:
    """Keep experts drawn at random from all layers (ktransformers' `random`, a baseline)."""
    draws = np.random.default_rng(problem.seed).random(problem.load.shape)
    return _kept(problem, np.argsort(-draws, axis=None))


def uniform(problem: Problem) -> Tiers:
    """Keep the first experts of each layer, whatever their use, as many in each; the first layers have one more where
    they do not divide (ktransformers' `uniform`)."""
    return _kept(problem, _ids(problem.load).T.ravel())


def front_loading(problem: Problem) -> Tiers:
    """Keep whole layers from the first on, and the first experts of the layer that fits in part (ktransformers'
    `front-loading`)."""
    return _kept(problem, _ids(problem.load).ravel())


def back_loading(problem: Problem) -> Tiers:
    """Keep whole layers from the last backwards, and the first experts of the layer that fits in part."""
    return _kept(problem, _ids(problem.load)[::-1].ravel())


def ascending(problem: Problem) -> Tiers:
    """Offload the least used experts of each layer first, as many in each, ties from the higher index on (ISC 2026
    poster: ascending routing probability); the first layers keep one more where they do not divide."""
    return _kept(problem, _most_used_first(problem.load).T.ravel())


def descending(problem: Problem) -> Tiers:
    """Offload the most used experts of each layer first: the worst an equal number can do, to compare with."""
    return _kept(problem, _most_used_first(problem.load)[:, ::-1].T.ravel())


def per_layer(problem: Problem) -> Tiers:
    """Keep the most used experts of each layer, as many in each; those layers have one more whose next expert is used
    most."""
    ranks = _most_used_first(problem.load).T
    by_use = np.argsort(-problem.load.ravel()[ranks], axis=1, kind="stable")
    return _kept(problem, np.take_along_axis(ranks, by_use, axis=1).ravel())


def frequency(problem: Problem) -> Tiers:
    """Keep the most used experts of all layers, however many of a layer these are, ties from the lower index on.

    ktransformers' `frequency` (generate_gpu_experts_masks: top-n of raw activation counts over all layers, which rank
    as shares do since every layer sees the same tokens), and Fiddler's popularity ranking (arXiv 2402.07033: pairs of
    layer and expert by popularity until memory is full).
    """
    return _kept(problem, np.argsort(-problem.load, axis=None, kind="stable"))


POLICIES: dict[str, Policy] = {
    "ascending": ascending,
    "descending": descending,
    "random": random,
    "uniform": uniform,
    "front-loading": front_loading,
    "back-loading": back_loading,
    "per-layer": per_layer,
    "frequency": frequency,
    "fiddler": frequency,
}


def _ids(load: Loads) -> Order:
    return np.arange(load.size, dtype=np.int64).reshape(load.shape)


def _most_used_first(load: Loads) -> Order:
    """The experts of each layer by use, `[layer, rank]`, ties from the lower index on."""
    return _ids(load)[:, :1] + np.argsort(-load, axis=1, kind="stable")


def _kept(problem: Problem, order: Order) -> Tiers:
    """The tiers when experts are kept in an order, as far as all layers together and each by itself have room."""
    n_layers, n_experts = problem.load.shape
    size = problem.size_bytes.astype(np.float64).ravel()
    tier = np.full(size.shape, OFFLOADED, dtype=np.int8)
    room = problem.capacity_bytes
    if problem.layer_capacity_bytes is None:
        tier[order[_fitting(size[order][None], np.array([room]))[0]]] = RESIDENT
        return tier.reshape(problem.load.shape)
    layer_room = np.full(n_layers, float(problem.layer_capacity_bytes))
    # What each layer has room for, then of that what all have room for; again while that leaves some layer room.
    while True:
        left = order[tier[order] != RESIDENT]
        left = left[size[left] <= np.minimum(room, layer_room[left // n_experts])]
        if not left.size:
            return tier.reshape(problem.load.shape)
        rank = np.full(size.shape, size.size)
        rank[left] = np.arange(left.size)
        by_layer = np.argsort(rank.reshape(n_layers, n_experts), axis=1) + _ids(problem.load)[:, :1]
        wanted = np.where(rank[by_layer] < size.size, size[by_layer], np.inf)
        chosen = by_layer[_fitting(wanted, layer_room)]
        chosen = chosen[np.argsort(rank[chosen])]
        chosen = chosen[_fitting(size[chosen][None], np.array([room]))[0]]
        tier[chosen] = RESIDENT
        room -= size[chosen].sum()
        layer_room -= np.bincount(chosen // n_experts, weights=size[chosen], minlength=n_layers)


def _fitting(size: NDArray[np.float64], room: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of `size[row, item]` fit in `room[row]` when items are taken in order and those too large passed over.

    What fits before the first item too large is taken at once; all items as large as that are then out of question, so
    there are at most as many rounds as sizes.
    """
    taken = np.zeros(size.shape, dtype=bool)
    while (open_ := ~taken & (size <= room[:, None])).any():
        wanted = np.where(open_, size, 0.0)
        now = open_ & (np.cumsum(wanted, axis=1) <= room[:, None])
        taken |= now
        room = room - np.where(now, size, 0.0).sum(axis=1)
    return taken

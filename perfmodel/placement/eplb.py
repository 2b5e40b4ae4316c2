"""EPLB: copies of busy experts, packed evenly onto GPUs (DeepSeek-AI, github.com/deepseek-ai/EPLB, MIT). numpy only.

Written from its published description and worked example; it balances tokens and knows neither tiles nor speeds.
"""

import numpy as np

from perfmodel.errors import InputError

from .balance import ExpertMap, Index, longest_first, map_of_slots
from .problem import Array


def rebalance(loads: Array, n_slots: int, n_groups: int, n_nodes: int, n_gpus: int) -> ExpertMap:
    """EPLB's placement of `loads[layer, expert]` in `n_slots` slots (its `num_replicas`) on GPUs of several nodes; its
    `phy2log`, `log2phy` and `logcnt` are those of the map.

    Where groups of experts divide over nodes: groups go to nodes, heaviest first; within each node the expert with the
    most load per copy gets the next copy until slots run out; copies go to the node's GPUs, heaviest first. Elsewhere
    all GPUs count as one node and groups as one. Raises InputError where experts, groups, slots, GPUs and nodes do not
    divide, slots are fewer than experts, and loads are negative or not finite.
    """
    _require(loads, n_slots, n_groups, n_nodes, n_gpus)
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    n_layers, n_experts = loads.shape
    group_size = n_experts // n_groups
    groups = packed(loads.reshape(n_layers, n_groups, group_size).sum(axis=2), n_nodes)
    # From here a row is one node of one layer, with its own experts.
    experts = (groups[:, :, None] * group_size + np.arange(group_size)).reshape(n_layers * n_nodes, -1)
    rows = np.repeat(np.arange(n_layers), n_nodes)[:, None]
    own = loads[rows, experts]
    copy_of, n_copies = replicated(own, n_slots // n_nodes)
    per_copy = np.take_along_axis(own / n_copies, copy_of, axis=1)
    order = packed(per_copy, n_gpus // n_nodes)

    def in_order(of_copies: Index) -> Index:
        return np.take_along_axis(of_copies, order, axis=1).reshape(n_layers, n_slots)

    phy2log = in_order(np.take_along_axis(experts, copy_of, axis=1))
    return map_of_slots("eplb", phy2log, in_order(numbers_among_equals(copy_of)), n_gpus)


def packed(weights: Array, n_packs: int) -> Index:
    """Items in the order of their packs, `[row, place]`, with equally many in each pack: heaviest first onto the
    lightest pack with room. Where every pack takes one item, items stay as they are."""
    n_rows, n_items = weights.shape
    n_each = n_items // n_packs
    if n_each == 1:
        return np.tile(np.arange(n_items), (n_rows, 1))
    pack_of, number = longest_first(weights, n_packs, n_each)
    order = np.empty((n_rows, n_items), dtype=np.int64)
    np.put_along_axis(order, pack_of * n_each + number, np.arange(n_items)[None, :], axis=1)
    return order


def replicated(loads: Array, n_slots: int) -> tuple[Index, Index]:
    """The expert of each copy, `[row, slot]`, and how many copies each expert has, `[row, expert]`.

    Every expert has one, in its own order; each further copy is of the expert with the most load per copy, of equal
    ones the first.
    """
    n_rows, n_experts = loads.shape
    copy_of = np.empty((n_rows, n_slots), dtype=np.int64)
    copy_of[:, :n_experts] = np.arange(n_experts)
    n_copies = np.ones((n_rows, n_experts), dtype=np.int64)
    for slot in range(n_experts, n_slots):
        busiest = (loads / n_copies).argmax(axis=1)
        copy_of[:, slot] = busiest
        n_copies[np.arange(n_rows), busiest] += 1
    return copy_of, n_copies


def numbers_among_equals(values: Index) -> Index:
    """How many equal values come before each one in its row, of the shape of `values`."""
    order = np.argsort(values, axis=1, kind="stable")
    ascending = np.take_along_axis(values, order, axis=1)
    places = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    is_first = np.diff(ascending, axis=1, prepend=-1) != 0
    numbers = np.empty_like(values)
    np.put_along_axis(numbers, order, places - np.maximum.accumulate(np.where(is_first, places, 0), axis=1), axis=1)
    return numbers


def _require(loads: Array, n_slots: int, n_groups: int, n_nodes: int, n_gpus: int) -> None:
    n_experts = loads.shape[1]
    if not (np.isfinite(loads) & (loads >= 0)).all():
        raise InputError("EPLB needs loads of experts that are finite and not negative")
    if n_nodes < 1 or n_gpus < 1 or n_gpus % n_nodes:
        raise InputError(f"{n_gpus} GPUs do not divide over {n_nodes} nodes")
    if n_slots % n_gpus:
        raise InputError(f"{n_slots} replicas do not divide over {n_gpus} GPUs")
    if n_groups < 1 or (n_groups % n_nodes == 0 and n_experts % n_groups):
        raise InputError(f"{n_experts} experts do not divide into {n_groups} groups")
    if n_slots < n_experts:
        raise InputError(f"{n_slots} replicas are fewer than the {n_experts} experts, of which each needs one")

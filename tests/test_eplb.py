"""EPLB: the published worked example, a slow copy by copy oracle, conservation, and refusals."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.placement.balance import NO_SLOT
from perfmodel.placement.eplb import rebalance, replicated

# README of github.com/deepseek-ai/EPLB: 2 layers of 12 experts, 16 replicas, 4 groups, 2 nodes, 8 GPUs.
README_LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    dtype=np.float64,
)
README_PHY2LOG = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_example_comes_out_exactly() -> None:
    found = rebalance(README_LOADS, 16, 4, 2, 8)
    assert found.phy2log.tolist() == README_PHY2LOG
    assert found.logcnt[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert found.log2phy.shape == (2, 12, 2)
    assert found.log2phy[0, 0].tolist() == [12, NO_SLOT] and found.log2phy[0, 5].tolist() == [0, 2]
    assert found.log2phy[0, 1].tolist() == [15, 13], "copies in the order in which they were made"


def slow_pack(weights: list[float], n_packs: int) -> list[list[int]]:
    """Items of each pack: heaviest first onto the lightest pack with room."""
    room = len(weights) // n_packs
    if room == 1:
        return [[item] for item in range(len(weights))]
    packs: list[list[int]] = [[] for _ in range(n_packs)]
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        open_packs = [pack for pack in packs if len(pack) < room]
        min(open_packs, key=lambda pack: sum(weights[i] for i in pack)).append(item)
    return packs


def slow_layer(loads: list[float], n_slots: int, n_groups: int, n_nodes: int, n_gpus: int) -> list[int]:
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    size = len(loads) // n_groups
    slots = []
    for groups in slow_pack([sum(loads[g * size : (g + 1) * size]) for g in range(n_groups)], n_nodes):
        experts = [g * size + i for g in groups for i in range(size)]
        copies = list(experts)
        while len(copies) < n_slots // n_nodes:
            copies.append(max(experts, key=lambda e: loads[e] / copies.count(e)))
        for gpu in slow_pack([loads[e] / copies.count(e) for e in copies], n_gpus // n_nodes):
            slots += [copies[i] for i in gpu]
    return slots


CASES = [(12, 16, 4, 2, 8), (12, 16, 3, 2, 8), (8, 8, 1, 1, 4), (16, 24, 8, 4, 8), (6, 12, 2, 2, 12), (9, 9, 3, 3, 9)]


@pytest.mark.parametrize("case", CASES)
@given(seed=st.integers(0, 10_000))
def test_all_layers_at_once_agree_with_one_copy_after_the_other(case: tuple[int, ...], seed: int) -> None:
    n_experts, n_slots, n_groups, n_nodes, n_gpus = case
    loads = np.random.default_rng(seed).integers(0, 200, (3, n_experts)).astype(np.float64) * 5040  # divides evenly
    found = rebalance(loads, n_slots, n_groups, n_nodes, n_gpus)
    assert found.phy2log.tolist() == [
        slow_layer(list(layer), n_slots, n_groups, n_nodes, n_gpus) for layer in loads.tolist()
    ]
    for layer in range(3):
        for expert in range(n_experts):
            slots = found.log2phy[layer, expert]
            held = slots[slots != NO_SLOT]
            assert len(held) == found.logcnt[layer, expert] >= 1
            assert (found.phy2log[layer, held] == expert).all() and (slots[len(held) :] == NO_SLOT).all()
    assert found.logcnt.sum(axis=1).tolist() == [n_slots] * 3


def test_tokens_are_conserved_over_gpus_and_copies_share_evenly() -> None:
    found = rebalance(README_LOADS, 16, 4, 2, 8)
    tokens = found.tokens(README_LOADS[None])
    assert tokens.sum(axis=2)[0] == pytest.approx(README_LOADS.sum(axis=1))
    assert tokens[0, 0, 0] == 165 / 2 + 39, "first GPU: half of expert 5, and expert 6"


def test_a_node_holds_whole_groups_only_where_groups_divide_over_nodes() -> None:
    def nodes_of_groups(n_groups: int) -> list[int]:
        slots = rebalance(README_LOADS, 16, n_groups, 2, 8).phy2log[0].reshape(2, 8)
        size = 12 // n_groups
        return [sum(bool((node // size == group).any()) for node in slots) for group in range(n_groups)]

    assert nodes_of_groups(4) == [1] * 4
    assert max(nodes_of_groups(3)) == 2, "three groups do not divide over two nodes: no grouping"


def test_more_copies_of_a_hot_expert_halve_the_busiest_slot() -> None:
    loads: NDArray[np.float64] = np.array([[8.0, 1.0, 1.0, 1.0]])
    copy_of, n_copies = replicated(loads, 7)
    assert copy_of.tolist() == [[0, 1, 2, 3, 0, 0, 0]]
    assert n_copies.tolist() == [[4, 1, 1, 1]]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ((12, 16, 5, 1, 8), "12 experts do not divide into 5 groups"),
        ((12, 16, 4, 3, 8), "8 GPUs do not divide over 3 nodes"),
        ((12, 15, 4, 2, 8), "15 replicas do not divide over 8 GPUs"),
        ((12, 8, 4, 2, 8), "8 replicas are fewer than the 12 experts"),
        ((12, 16, 0, 2, 8), "12 experts do not divide into 0 groups"),
    ],
)
def test_what_does_not_divide_is_refused_in_one_sentence(case: tuple[int, ...], words: str) -> None:
    n_experts, *rest = case
    with pytest.raises(InputError, match=words):
        rebalance(np.ones((1, n_experts)), *rest)


def test_loads_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match="finite and not negative"):
        rebalance(np.array([[1.0, -1.0]]), 2, 1, 1, 2)


def test_deepseek_v3_takes_well_under_a_second() -> None:
    loads = np.random.default_rng(0).pareto(1.2, (61, 256))
    began = time.perf_counter()
    rebalance(loads, 288, 8, 4, 32)
    assert time.perf_counter() - began < 1

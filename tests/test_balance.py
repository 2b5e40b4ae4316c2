"""Longest-first maps, linear and round-robin ones: hand-computed cases, bounds, conservation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.errors import InputError
from perfmodel.placement.balance import (
    imbalance,
    linear,
    longest_first,
    map_of,
    map_of_slots,
    round_robin,
    token_balanced,
)


def test_longest_first_by_hand_with_and_without_room() -> None:
    weights = np.array([[2.0, 7.0, 3.0, 3.0, 1.0, 8.0]])
    pack_of, number = longest_first(weights, 2)  # 8 | 7, then 3 to the lighter, 3 to the other, 2, 1
    assert pack_of.tolist() == [[1, 1, 1, 0, 0, 0]]
    assert number.tolist() == [[2, 0, 1, 1, 2, 0]]
    pack_of, _ = longest_first(np.array([[9.0, 1.0, 1.0, 1.0]]), 2, 2)
    assert pack_of.tolist() == [[0, 1, 1, 0]], "the last goes where there is room, though the pack is the heavier"


def test_a_pack_twice_as_fast_takes_twice_as_much() -> None:
    pack_of, _ = longest_first(np.ones((1, 6)), 2, speeds=np.array([1.0, 0.5]))
    assert np.bincount(pack_of[0]).tolist() == [4, 2]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9), st.integers(1, 4))
def test_longest_first_stays_within_grahams_bound_of_the_optimum(weights: list[int], n_packs: int) -> None:
    pack_of, _ = longest_first(np.array([weights], dtype=np.float64), n_packs)
    held = np.bincount(pack_of[0], weights, minlength=n_packs)
    assert held.sum() == sum(weights)
    states = {(0,) * n_packs}
    for weight in weights:
        states = {tuple(sorted((*s[:i], s[i] + weight, *s[i + 1 :]))) for s in states for i in range(n_packs)}
    optimum = min(max(state) for state in states)
    assert held.max() <= (4 / 3 - 1 / (3 * n_packs)) * optimum + 1e-9


def test_linear_and_round_robin_by_hand() -> None:
    assert linear(1, 6, 3).phy2log.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert round_robin(1, 6, 3).phy2log.tolist() == [[0, 3, 1, 4, 2, 5]]
    loads = np.array([[[5.0, 1, 1, 1, 1, 3]], [[0, 0, 2, 0, 0, 0]]])
    assert linear(1, 6, 3).tokens(loads).tolist() == [[[6, 2, 4]], [[0, 2, 0]]]
    assert round_robin(1, 6, 3).tokens(loads).tolist() == [[[6, 2, 4]], [[0, 0, 2]]]


def test_even_maps_hold_equally_many_experts_and_free_ones_as_many_as_balance_asks() -> None:
    loads = np.array([[10.0, 1, 1, 1, 1, 1, 1, 4]])
    even, free = token_balanced(loads, 2), token_balanced(loads, 2, is_even=False)
    assert even.is_even and not free.is_even
    assert even.tokens(loads[None])[0, 0].tolist() == [13, 7]
    assert free.tokens(loads[None])[0, 0].tolist() == [10, 10]


@given(st.integers(0, 10_000))
def test_tokens_are_conserved_and_balance_is_no_worse_than_the_even_linear_map_in_sum(seed: int) -> None:
    loads = np.random.default_rng(seed).pareto(1.5, (4, 3, 12))
    for made in (linear(3, 12, 4), round_robin(3, 12, 4), token_balanced(loads.sum(axis=0), 4)):
        assert made.tokens(loads).sum(axis=2) == pytest.approx(loads.sum(axis=2))
        assert made.shares.sum(axis=2) == pytest.approx(1)
        assert sorted(made.phy2log[0].tolist()) == list(range(12))


def test_slots_in_turn_and_experts_by_gpu_are_the_same_map() -> None:
    by_gpu = map_of("any", np.array([[1, 0, 1, 0]]), 2)
    by_slot = map_of_slots("any", np.array([[1, 3, 0, 2]]), np.zeros((1, 4), dtype=np.int64), 2)
    assert by_gpu.phy2log.tolist() == by_slot.phy2log.tolist()
    assert by_gpu.gpu_of.tolist() == by_slot.gpu_of.tolist() == [[0, 0, 1, 1]]


def test_imbalance_is_the_mean_of_max_over_mean_where_there_are_tokens() -> None:
    assert imbalance(np.array([[[3.0, 1.0]], [[2.0, 2.0]], [[0.0, 0.0]]])) == pytest.approx(1.25)


def test_gpus_that_do_not_divide_experts_are_refused() -> None:
    for make in (linear, round_robin):
        with pytest.raises(InputError, match="10 experts cannot be shared evenly by 4 GPUs"):
            make(1, 10, 4)
    with pytest.raises(InputError, match="10 experts cannot be shared evenly by 4 GPUs"):
        token_balanced(np.ones((1, 10)), 4)

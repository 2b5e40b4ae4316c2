"""GEM's staircase and search: hand-computed times, the optimum of all maps, and what slow and plain code finds."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.balance import compare
from perfmodel.errors import InputError
from perfmodel.placement import gem as search
from perfmodel.placement.balance import Array, linear, token_balanced
from perfmodel.placement.gem import (
    best_map,
    consistent_experts,
    gem,
    n_maps,
    score_ns,
    spread_out,
    straggler_ns,
    swapped,
    usage,
)
from perfmodel.placement.staircase import Staircase, saved_frac, spread_speeds, token_counts
from perfmodel.routing import synthetic_steps
from tests.balance_made import bursty, straight

TWO = Staircase(np.array([4, 8, 16]), np.array([[10.0, 20.0, 40.0], [30.0, 60.0, 120.0]]))


def test_a_staircase_holds_a_step_and_never_interpolates() -> None:
    tokens = np.array([[0, 0], [1, 1], [4, 4], [5, 4.5], [16, 8]])
    assert TWO.of(tokens).tolist() == [[0, 0], [10, 30], [10, 30], [20, 60], [40, 60]]
    assert TWO.of_gpu(1, np.array([8, 9])).tolist() == [60, 120]
    assert TWO.spreads.tolist() == [2, 2, 2]
    assert TWO.of(np.array([16.5, 16 + 1e-9])).tolist() == [np.inf, 120], "nothing was timed there; rounding is no more"


def test_what_was_not_timed_is_avoided_by_the_search_and_refused_where_no_map_avoids_it() -> None:
    loads = np.tile(np.array([6.0, 6, 2, 2]), (4, 1, 1))
    short = straight(8, np.ones(2))
    assert gem(loads, short).tokens(loads)[0, 0].tolist() == [8, 8]
    assert np.bincount(spread_out(loads, straight(3, np.ones(2)))[0]).tolist() == [2, 2], "though nothing fits"
    with pytest.raises(InputError, match="a GPU has 12 assignments in a step, more than the 8 that it was timed at"):
        compare(loads, short, ("linear",))


@pytest.mark.parametrize(
    ("boundaries", "ns", "words"),
    [
        ([4, 4], [[1.0, 2.0]], "do not ascend"),
        ([0, 4], [[1.0, 2.0]], "do not ascend from above zero"),
        ([4, 8], [[2.0, 1.0]], "fall with more tokens"),
        ([4, 8], [[0.0, 1.0]], "not positive"),
        ([4, 8], [[1.0]], "expected \\[gpus, boundaries\\]"),
    ],
)
def test_no_staircase_is_made_of_what_is_none(boundaries: list[int], ns: list[list[float]], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Staircase(np.array(boundaries), np.array(ns))


def test_counts_to_time_are_tile_boundaries_then_ever_wider_ones() -> None:
    assert token_counts(48, 16).tolist() == [1, 2, 4, 8, 16, 32, 48]
    assert token_counts(41, 16).tolist() == [1, 2, 4, 8, 16, 32, 48], "the last covers the most tokens"
    wide = token_counts(10_000, 100, n_tiles=4, tail_ratio=2)
    assert wide[-7:].tolist() == [300, 400, 800, 1600, 3200, 6400, 10_000]
    assert saved_frac(wide) == pytest.approx(1 - len(wide) / 10_000)
    counts = token_counts(65_536, 128)
    large = counts[counts >= 128 * 64]
    assert (large[1:] / large[:-1]).max() <= 1.02
    with pytest.raises(InputError, match="expected at least 1"):
        token_counts(0, 16)


def test_speeds_span_the_spread() -> None:
    speeds = spread_speeds(4, 0.277)
    assert speeds.max() / speeds.min() - 1 == pytest.approx(0.277)
    assert straight(8, speeds).spreads == pytest.approx(0.277)


def test_consistent_experts_are_used_in_most_steps() -> None:
    loads = np.array([[[6.0, 6, 0]], [[6, 0.5, 5]], [[6, 0.5, 0]], [[6, 0.4, 6]]])
    assert consistent_experts(loads).tolist() == [[True, False, True]], "used twice of four times is enough"
    assert consistent_experts(loads, used_share=0.1).tolist() == [[True, True, True]]
    assert consistent_experts(loads, steps_frac=0.9).tolist() == [[True, False, False]]


def test_experts_made_consistent_and_temporal_are_told_apart() -> None:
    loads = synthetic_steps("temporal:4", 400, 4, 32, seed=3)
    frac = consistent_experts(loads).mean(axis=1)
    assert frac == pytest.approx(0.5), "half are made temporal"
    found = usage(loads)
    assert found["consistent_used_frac"] == pytest.approx(0.85, abs=0.02), "as made"
    assert found["temporal_used_frac"] == pytest.approx(0.17, abs=0.03), "as made"
    assert usage(np.ones((2, 1, 4))) == {
        "consistent_experts_frac": 1,
        "consistent_used_frac": 1,
        "temporal_used_frac": None,
    }


def test_two_experts_that_are_busy_together_come_apart() -> None:
    loads = np.array([[[8.0, 8, 1, 1]], [[1, 1, 8, 8]]])
    stairs = straight(16, np.ones(2))
    gpu_of = spread_out(loads, stairs)[0]
    assert gpu_of[0] != gpu_of[1] and gpu_of[2] != gpu_of[3]
    assert straggler_ns(gem(loads, stairs).tokens(loads), stairs).tolist() == [[9], [9]]


def test_slow_gpus_get_fewer_tokens() -> None:
    loads = np.tile(np.array([4.0, 4, 2, 2]), (3, 1, 1))
    found = gem(loads, straight(16, np.array([1.0, 0.5])))
    assert found.tokens(loads)[0, 0].tolist() == [8, 4], "8 at full speed and 4 at half take 8 both"


def slow_swaps(loads: Array, gpu_of: list[int], stairs: Staircase) -> float:
    """The least score of any single swap, one after the other."""
    best = np.inf
    for a in range(len(gpu_of)):
        for b in range(a):
            other = list(gpu_of)
            other[a], other[b] = other[b], other[a]
            best = min(best, score_ns(loads, np.array(other), stairs))
    return best


@given(st.integers(0, 10_000))
@settings(max_examples=25)
def test_after_the_search_no_single_swap_helps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    loads = rng.integers(0, 40, (5, 9)).astype(np.float64)
    stairs = straight(400, np.array([1.0, 0.9, 0.6]), tile_rows=int(rng.integers(1, 6)))
    start = rng.permutation(np.repeat(np.arange(3), 3))
    found = swapped(loads, start, stairs)
    score = score_ns(loads, found, stairs)
    assert np.bincount(found).tolist() == [3, 3, 3]
    assert score <= score_ns(loads, start, stairs)
    assert slow_swaps(loads, found.tolist(), stairs) >= score * (1 - 1e-8)


@pytest.mark.parametrize("n_gpus", [1, 2, 3, 5])
def test_swaps_are_scored_at_once_as_one_by_one(n_gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "MAX_AT_ONCE", 12)
    rng = np.random.default_rng(n_gpus)
    loads, gpu_of = rng.integers(0, 40, (4, 10)).astype(np.float64), rng.integers(0, n_gpus, 10)
    stairs = straight(400, rng.uniform(0.5, 1, n_gpus))
    tokens = loads @ np.eye(n_gpus)[gpu_of]
    for gpu in range(n_gpus):
        here, there, after = search._swaps(loads, gpu_of, gpu, tokens, stairs.of(tokens), stairs)
        assert sorted([*here, *there]) == list(range(10)) and (gpu_of[here] == gpu).all()
        for i, own in enumerate(here):
            for j, other in enumerate(there):
                swapped_of = gpu_of.copy()
                swapped_of[own], swapped_of[other] = gpu_of[other], gpu
                assert after[i, j] == pytest.approx(score_ns(loads, swapped_of, stairs))


def test_the_search_comes_close_to_the_best_of_all_maps_of_eight_experts_on_four_gpus() -> None:
    assert n_maps(8, 4) == 2520
    loads = bursty(8, 16, 24, 2048, 2)
    stairs = straight(4096, spread_speeds(4, 0.277), tile_rows=64)
    best = straggler_ns(best_map(loads, stairs).tokens(loads), stairs).sum(axis=0)
    found = straggler_ns(gem(loads, stairs).tokens(loads), stairs).sum(axis=0)
    assert (found >= best - 1e-6).all()
    assert (found == pytest.approx(best, rel=0.01)) and (found <= best * (1 + 1e-9)).mean() >= 0.5
    with pytest.raises(InputError, match=r"32 experts on 4 GPUs have .* maps, more than the 10,000"):
        best_map(bursty(32, 2, 1, 64, 2), stairs)


def test_all_maps_are_tried_and_the_best_is_the_least() -> None:
    loads = np.random.default_rng(0).integers(1, 30, (3, 1, 6)).astype(np.float64)
    stairs = straight(200, np.array([1.0, 0.8, 0.5]))
    rng = np.random.default_rng(1)
    tried = [score_ns(loads[:, 0], rng.permutation(np.repeat(np.arange(3), 2)), stairs) for _ in range(2000)]
    assert straggler_ns(best_map(loads, stairs).tokens(loads), stairs).sum() == pytest.approx(min(tried))


@given(st.integers(0, 10_000))
@settings(max_examples=15)
def test_on_its_window_the_search_is_never_worse_than_linear_or_token_balanced(seed: int) -> None:
    rng = np.random.default_rng(seed)
    loads = rng.pareto(1.0, (6, 2, 12)) + rng.random((6, 2, 12))
    stairs = straight(int(loads.sum(axis=2).max()) + 2, rng.uniform(0.5, 1, 4))
    found = straggler_ns(gem(loads, stairs).tokens(loads), stairs).sum(axis=0)
    for other in (linear(2, 12, 4), token_balanced(loads.sum(axis=0), 4)):
        assert (found <= straggler_ns(other.tokens(loads), stairs).sum(axis=0) * (1 + 1e-9)).all()


@pytest.mark.parametrize(("n_experts", "n_layers", "n_gpus", "n_sample"), [(128, 48, 4, 8), (256, 58, 64, 4)])
def test_the_search_of_a_window_takes_seconds(n_experts: int, n_layers: int, n_gpus: int, n_sample: int) -> None:
    mean = 128 * np.random.default_rng(1).random((16, n_sample, n_experts))
    loads = np.random.default_rng(0).poisson(mean).astype(np.float64)
    stairs = straight(int(loads.sum(axis=2).max()), spread_speeds(n_gpus, 0.277), 64)
    began = time.process_time()
    gem(loads, stairs)
    assert n_layers / n_sample * (time.process_time() - began) < 30, "of all layers of Qwen3-30B-A3B, DeepSeek-V3"

"""Statistics of routing: figures by hand, slow counts beside fast ones, what is drawn against what is expected."""

import base64
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import routing as rt
from perfmodel.cli.main import app
from perfmodel.errors import InputError
from perfmodel.report import routing_page
from perfmodel.report.routing import load_bars
from perfmodel.routing import sampling
from perfmodel.routing.statistics import n_resident_of
from perfmodel.routing.verdict import HOT, MOVING, NONE, SLIGHT, UNCLEAR
from tests.conftest import ROOT
from tests.test_docs import keys_of

loads = st.lists(st.integers(0, 50), min_size=2, max_size=12).filter(any)


def recording(
    counts: object, top_k: int | None = None, n_tokens: object = None, is_ordered: bool = True
) -> rt.Recording:
    """A made-up recording of counts `[step, layer, expert]`, layers numbered from 0."""
    array = np.asarray(counts, dtype=np.float64)
    tokens = None if n_tokens is None else np.asarray(n_tokens)
    return rt.Recording("made", array, np.arange(array.shape[1]), top_k, tokens, is_ordered)


def drawn(
    name: str, n_steps: int, n_tokens: int, n_layers: int = 2, n_experts: int = 64, top_k: int = 8, seed: int = 0
) -> rt.Recording:
    """A recording drawn from a pattern or family."""
    shares = rt.synthetic_steps(name, n_steps, n_layers, n_experts, seed)
    counts = rt.synthetic_counts(shares, n_tokens, top_k, seed)
    return recording(counts, top_k, np.full(n_steps, n_tokens))


def held_out(counts: np.ndarray) -> np.ndarray:
    """The curves of counts `[layer, expert]` of one step."""
    found = rt.held_out_curves(counts[None])
    assert found is not None
    return found


# Layers.


def test_a_layer_by_hand() -> None:
    found = rt.layer_statistics(recording([[[6, 3, 1, 0]], [[2, 1, 3, 0]]]))  # sums 8, 4, 4, 0
    assert found.n_active.tolist() == [3] and found.n_assignments.tolist() == [16]
    assert found.hottest_frac.tolist() == [0.5] and found.max_over_mean.tolist() == [2]
    assert found.hottest_quarter_frac.tolist() == [0.5] and found.coldest_half_frac.tolist() == [0.25]
    assert found.hottest_tenth_frac[0] == pytest.approx(0.4 * 0.5)  # 0.4 of the first of four experts
    # 50 % by one expert, 80 to 99 % by three of four.
    assert found.covering_frac.tolist() == [[0.25, 0.75, 0.75, 0.75, 0.75]]
    assert found.gini[0] == pytest.approx((-3 * 0 - 1 * 4 + 1 * 4 + 3 * 8) / (4 * 16))
    assert found.n_effective[0] == pytest.approx(2**1.5)  # entropy of 1/2, 1/4, 1/4 is 1.5 bits
    assert found.entropy_frac[0] == pytest.approx(1.5 / 2)
    assert found.variation[0] == pytest.approx(np.std([8, 4, 4, 0]) / 4)


def test_even_routing_and_one_expert_are_the_ends_of_every_scale() -> None:
    found = rt.layer_statistics(recording([[[5, 5, 5, 5], [20, 0, 0, 0]]]))
    np.testing.assert_allclose(found.gini, [0, 0.75], atol=1e-12)
    np.testing.assert_allclose(found.n_effective, [4, 1])
    np.testing.assert_allclose(found.entropy_frac, [1, 0], atol=1e-12)
    np.testing.assert_allclose(found.max_over_mean, [1, 4])
    np.testing.assert_allclose(found.coldest_half_frac, [0.5, 0], atol=1e-12)


@given(loads)
def test_gini_is_the_mean_difference_of_all_pairs(row: list[int]) -> None:
    found = rt.layer_statistics(recording([[row]])).gini[0]
    differences = [abs(a - b) for a, b in itertools.product(row, row)]
    assert found == pytest.approx(np.mean(differences) / (2 * np.mean(row)), abs=1e-9)


@given(loads, st.randoms(use_true_random=False))
def test_the_numbering_of_experts_changes_no_statistic(row: list[int], random) -> None:
    other = random.sample(row, len(row))
    a, b = (rt.layer_statistics(recording([[each]])).to_dicts()[0] for each in (row, other))
    for name in a.keys() - {"covering_frac"}:
        assert a[name] == pytest.approx(b[name], abs=1e-9)
    assert a["covering_frac"] == b["covering_frac"]


@given(loads, st.sampled_from(rt.COVERED_FRACS))
def test_covering_experts_are_the_fewest_that_serve_so_much(row: list[int], part: float) -> None:
    n = round(float(rt.covering_fracs(np.array([row]), part)[0]) * len(row))
    ranked = sorted(row, reverse=True)
    assert sum(ranked[:n]) >= part * sum(row) - 1e-9
    assert sum(ranked[: n - 1]) < part * sum(row)


# Active experts.


def test_two_tokens_of_two_experts_by_hand() -> None:
    # Shares 3/4 and 1/4 with top-1: both tokens miss the first with 1/16, the second with 9/16.
    assert rt.expected_active(np.array([[0.75, 0.25]]), 1, [1, 2])[0].tolist() == pytest.approx([1, 22 / 16])
    # Top-2 of 3 with shares 2/3, 1/6, 1/6: the first is always selected, the others with 1/2 each.
    assert rt.expected_active(np.array([[4, 1, 1]]) / 6, 2, [1, 3])[0].tolist() == pytest.approx([2, 1 + 2 * 7 / 8])


@pytest.mark.parametrize(
    ("name", "top_k"), [("uniform", 8), ("power-law:1", 2), ("power-law:1.5", 8), ("mmlu-like", 4)]
)
def test_expected_active_experts_are_those_of_drawn_batches(name: str, top_k: int) -> None:
    """By the shares of many drawn tokens, as a recording has them: within 2 % of what fresh batches use."""
    shares = rt.pattern_shares(name, 64)
    seen = np.bincount(rt.sample_choices(shares, 60_000, top_k, 1).ravel(), minlength=64)
    sizes = [1, 8, 64, 256]
    expected = rt.expected_active((seen / seen.sum())[None], top_k, sizes)[0]
    for n_tokens, value in zip(sizes, expected, strict=True):
        batches = rt.sample_choices(shares, 100 * n_tokens, top_k, 2).reshape(100, -1)
        assert value == pytest.approx(np.mean([len(np.unique(batch)) for batch in batches]), rel=0.02)


def test_a_pattern_named_by_its_shares_uses_a_little_more_experts_when_drawn() -> None:
    """Drawing without replacement flattens shares: a steep law is up to a tenth off (docs/routing.md)."""
    shares = rt.pattern_shares("power-law:1.5", 64)
    batches = rt.sample_choices(shares, 16 * 200, 8, 3).reshape(200, -1)
    found = np.mean([len(np.unique(batch)) for batch in batches])
    assert 0.9 * found < rt.expected_active(shares, 8, [16])[0, 0] < 0.95 * found


@given(loads.filter(lambda row: len(row) > 2), st.integers(1, 2))
def test_active_experts_grow_with_the_batch_from_top_k_to_all_that_are_used(row: list[int], top_k: int) -> None:
    shares = np.array([row]) / sum(row)
    found = rt.expected_active(shares, top_k, [1, 2, 8, 10**9])[0]
    assert found[0] == pytest.approx(top_k)
    assert (np.diff(found) >= -1e-9).all()
    n_used = np.count_nonzero(row)
    assert found[-1] == pytest.approx(n_used if n_used >= top_k else len(row))  # too few: the others make up for them


@pytest.mark.parametrize("top_k", [0, 3])
def test_active_experts_of_an_impossible_top_k_are_refused(top_k: int) -> None:
    with pytest.raises(InputError, match=f"top-k {top_k} is outside 1 to the number of experts, 2"):
        rt.expected_active(np.array([[0.5, 0.5]]), top_k, [1])


# What chance does.


def test_uniform_counts_have_the_mean_and_covariance_of_drawing_without_replacement() -> None:
    rng = np.random.default_rng(0)
    for n_tokens in (40, 10**6):  # drawn token by token, and as normal numbers
        found = sampling.uniform_counts(n_tokens, 8, 3, 4000, rng)
        np.testing.assert_allclose(found.sum(axis=1), 3 * n_tokens)
        np.testing.assert_allclose(found.mean(axis=0), 3 / 8 * n_tokens, rtol=0.02)
        variance = n_tokens * 3 / 8 * 5 / 8
        np.testing.assert_allclose(found.var(axis=0), variance, rtol=0.15)
        assert np.cov(found[:, 0], found[:, 1])[0, 1] == pytest.approx(-variance / 7, rel=0.5)


def test_p_values_of_uniform_routing_are_spread_evenly_and_skew_has_none() -> None:
    layers = sampling.uniform_counts(200, 64, 8, 400, np.random.default_rng(5))
    p_value = rt.sampling_error(layers, 8).p_value
    np.testing.assert_allclose(np.quantile(p_value, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.08)
    skewed = drawn("power-law:1", 1, 200).loads[0]
    assert (rt.sampling_error(skewed, 8).p_value < 1e-6).all()
    # Without the factor for drawing without replacement, uniform routing would look too even to be true.
    assert np.median(rt.sampling_error(layers, None).p_value) > 0.6


def test_a_uniform_router_is_as_uneven_as_chance_says() -> None:
    found = drawn("power-law:0", 1, 200, n_layers=40).loads[0]
    error = rt.sampling_error(found, 8)
    of_layers = rt.layer_statistics(recording(found[None]))
    assert of_layers.max_over_mean.mean() == pytest.approx(error.uniform_max_over_mean[0], rel=0.05)
    assert of_layers.gini.mean() == pytest.approx(error.uniform_gini[0], rel=0.1)
    assert (of_layers.max_over_mean > error.uniform_max_over_mean_high).mean() < 0.25


def test_unseen_experts_by_hand() -> None:
    # 10 assignments; experts seen once: 3, twice: 1, never: 2. Good-Turing 3/10; Chao 3 x 2 / (2 x 2) = 1.5.
    error = rt.sampling_error(np.array([[5.0, 2, 1, 1, 1, 0, 0]]), 1)
    assert error.unseen_frac[0] == pytest.approx(0.3) and error.n_unseen[0] == pytest.approx(1.5)
    assert error.n_unused_by_chance[0] == pytest.approx(7 * (6 / 7) ** 10)
    assert rt.sampling_error(np.array([[5.0, 1]]), 1).unseen_frac[0] == 0  # nothing is left to see


def test_chao_finds_experts_that_a_small_sample_missed() -> None:
    few, many = (drawn("power-law:1", 1, n, n_layers=20, n_experts=128).loads[0] for n in (20, 5000))
    missed = ((few == 0) & (many > 0)).sum(axis=1).mean()
    assert 0.4 * missed < rt.sampling_error(few, 8).n_unseen.mean() <= missed


def test_a_hot_set_by_chance_serves_nothing_more_of_unseen_tokens() -> None:
    uniform = sampling.uniform_counts(50, 64, 8, 200, np.random.default_rng(1))
    assert rt.served_curves(uniform)[:, 32].mean() > 0.6  # of the sample it was chosen in
    # A token selects no expert twice, so that what one half has the other lacks: a little less than chance.
    assert 0.48 < held_out(uniform)[:, 32].mean() < 0.5
    repeated = sampling.uniform_counts(400, 64, 1, 200, np.random.default_rng(1))
    assert held_out(repeated)[:, 32].mean() == pytest.approx(0.5, abs=0.005)
    many = drawn("power-law:1", 4, 2000).loads.sum(axis=0)
    np.testing.assert_allclose(held_out(many)[:, 32], rt.served_curves(many)[:, 32], atol=0.01)


def test_alike_tokens_of_single_steps_make_no_hot_set() -> None:
    """Every step has a hot set of its own, as texts have: eight steps look skewed, and the others disagree."""
    rng = np.random.default_rng(3)
    steps = rng.permuted(np.tile([60.0] * 8 + [2] * 56, (12, 4, 1)), axis=2)
    assert held_out(steps.sum(axis=0))[:, 32].mean() > 0.6  # single assignments are taken for independent
    found = rt.judge(recording(steps, is_ordered=False))
    assert found.gains[1].served_frac > 0.65 and found.gains[1].held_out_frac == pytest.approx(0.5, abs=0.05)
    assert found.label == UNCLEAR
    assert rt.judge(recording(steps / 3, is_ordered=False)).label == UNCLEAR  # steps of weights can be held out too


def test_held_out_lies_between_chance_and_the_sample() -> None:
    truth = rt.pattern_shares("power-law:1", 64)
    sample = np.stack([rt.drawn_counts(truth[0], 30, 2, seed) for seed in range(50)])
    served = np.bincount(rt.sample_choices(truth, 50_000, 2, 9).ravel(), minlength=64) / 1e5
    hottest = np.argsort(-sample, axis=1)[:, :16]
    of_new = served[hottest].sum(axis=1).mean()
    assert held_out(sample)[:, 16].mean() <= of_new + 0.02 <= rt.served_curves(sample)[:, 16].mean() + 0.02


# Time.


def slow_overlap(steps: list[list[int]], window: int, n_hot: int) -> dict[str, float]:
    """Overlap of one layer without ties, with lists and sets alone."""
    n = len(steps) // window
    sums = [
        [sum(step[e] for step in steps[i * window : (i + 1) * window]) for e in range(len(steps[0]))] for i in range(n)
    ]
    hot = [set(sorted(range(len(row)), key=lambda e: -row[e])[:n_hot]) for row in sums]
    average = [float(x) for x in sums[0]]
    by_average = [hot[0]]
    for row in sums[1:]:
        average = [0.3 * new + 0.7 * old for new, old in zip(row, average, strict=True)]
        by_average.append(set(sorted(range(len(row)), key=lambda e: -average[e])[:n_hot]))
    half = n // 2
    first = [sum(row[e] for row in sums[:half]) for e in range(len(sums[0]))]
    static = set(sorted(range(len(first)), key=lambda e: -first[e])[:n_hot])
    total = sum(sum(row) for row in sums[half:])
    later = range(half, n)

    def served(chosen: list[set[int]]) -> float:
        return sum(sum(sums[i][e] for e in each) for i, each in zip(later, chosen, strict=True)) / total

    return {
        "jaccard": float(np.mean([len(hot[i] & hot[i - 1]) / len(hot[i] | hot[i - 1]) for i in later])),
        "last_frac": served([hot[i - 1] for i in later]),
        "average_frac": served([by_average[i - 1] for i in later]),
        "static_frac": served([static] * len(later)),
        "oracle_frac": served([hot[i] for i in later]),
    }


@pytest.mark.parametrize(("window", "n_hot"), [(1, 2), (2, 3), (3, 1)])
def test_overlap_of_hot_sets_against_sets_and_lists(window: int, n_hot: int) -> None:
    steps = np.random.default_rng(window).integers(1, 10**6, size=(13, 1, 7))  # the last may fill no window
    found = rt.hot_set_overlap(steps.astype(float), window, n_hot)
    assert found is not None and found.n_windows == 13 // window
    for name, value in slow_overlap(steps[:, 0].tolist(), window, n_hot).items():
        assert getattr(found, name) == pytest.approx(value), name


def test_a_fixed_hot_set_overlaps_wholly_and_a_new_one_in_every_window_by_chance() -> None:
    fixed = rt.hot_set_overlap(np.tile([9.0, 8, 1, 1], (8, 3, 1)), 2, 2)
    assert fixed is not None and fixed.jaccard == 1
    assert fixed.last_frac == fixed.static_frac == fixed.oracle_frac == pytest.approx(17 / 19)
    fresh = rt.hot_set_overlap(np.random.default_rng(0).random((200, 4, 64)), 1, 16)
    assert fresh is not None and fresh.jaccard == pytest.approx(1 / 7, abs=0.01)  # 4 of 16 + 16 in both on average
    assert fresh.last_frac == pytest.approx(fresh.random_frac, abs=0.01)
    assert fresh.oracle_frac > 0.4


@given(st.integers(1, 3), st.integers(4, 9), st.integers(1, 5), st.integers(0, 99))
def test_no_hot_set_serves_more_than_the_windows_own(window: int, n_windows: int, n_hot: int, seed: int) -> None:
    counts = np.random.default_rng(seed).poisson(0.7, size=(window * n_windows, 2, 6)).astype(float)
    found = rt.hot_set_overlap(counts, window, n_hot)
    assert found is not None
    for value in (found.last_frac, found.average_frac, found.static_frac):
        assert 0 <= value <= found.oracle_frac + 1e-12 <= 1 + 1e-9
    assert 0 <= found.jaccard <= 1


def test_few_windows_say_nothing_and_empty_steps_count_nothing() -> None:
    assert rt.hot_set_overlap(np.ones((7, 1, 4)), 2, 1) is None
    busy = np.random.default_rng(0).integers(1, 10**6, size=(8, 1, 6)).astype(float)
    empty = np.concatenate([busy, np.zeros((1, 1, 6))])
    a, b = rt.hot_set_overlap(busy, 1, 2), rt.hot_set_overlap(empty, 1, 2)
    assert a is not None and b is not None and (a.jaccard, a.last_frac) == (b.jaccard, b.last_frac)


def test_consistent_and_temporal_experts_by_hand() -> None:
    # 10 steps, uniform share 20 of 80: expert 0 always, 1 in two steps with 60, 2 in half of them, 3 hardly ever.
    steps = np.zeros((10, 1, 4))
    steps[:, 0, 0], steps[5:, 0, 2], steps[:, 0, 3] = 40, 30, 1
    steps[[2, 7], 0, 1] = 100
    found = rt.experts_in_time(steps, np.array([5]))
    assert found is not None and found.joined_steps == 1
    assert found.is_consistent.tolist() == [[True, False, False, False]]
    assert found.is_temporal.tolist() == [[False, True, False, False]]
    np.testing.assert_allclose(found.used_frac, [[1, 0.2, 0.5, 0]])
    assert found.temporal_weight[0] == pytest.approx(4 * (100 / 141 + 100 / 171) / 2)


def test_cutoffs_decide_what_is_consistent_and_temporal() -> None:
    steps = np.zeros((10, 1, 4))
    steps[:, 0, 0], steps[5:, 0, 1], steps[:, 0, 2] = 40, 40, 8
    found = rt.experts_in_time(steps, np.arange(1), rt.Cutoffs(0.3, 0.5, 0.5, 1.0))
    assert found is not None
    np.testing.assert_allclose(
        found.used_frac, [[1, 0.5, 1, 0]]
    )  # 8 of 88 and of 48 assignments, as 22 and 12 are even
    assert found.is_consistent.tolist() == [[True, True, True, False]]
    assert found.is_temporal.tolist() == [[False, True, False, False]]
    for wrong in ({"consistent_least_frac": 1.5}, {"temporal_most_frac": math.nan}, {"used_share": -1.0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} is .*, expected at least 0"):
            rt.Cutoffs(**wrong)


def test_temporal_experts_of_the_family_are_found_with_their_groups_of_four() -> None:
    found = rt.experts_in_time(drawn("temporal:4", 300, 256).loads, np.arange(2))
    assert found is not None
    np.testing.assert_allclose(found.is_temporal.sum(axis=1), 32, atol=5)
    for groups in found.groups:
        assert groups and all(len(group) == 4 for group in groups)
    assert (found.group_correlation > 0.9).all()
    assert found.pairs[0].correlation >= found.pairs[-1].correlation > 0.9


@pytest.mark.parametrize("n_tokens", [1, 4, 16, 64])
def test_chance_makes_no_temporal_experts_and_no_groups(n_tokens: int) -> None:
    found = rt.experts_in_time(drawn("uniform", 400, n_tokens).loads, np.arange(2))
    assert found is not None and found.joined_steps == math.ceil(8 / (n_tokens / 8))
    assert not found.is_temporal.any() and found.is_consistent.mean() > 0.75
    assert not any(found.groups)


def test_experts_that_meet_by_chance_in_few_steps_are_no_group() -> None:
    rng = np.random.default_rng(0)
    steps = np.full((12, 1, 60), 100.0)
    steps[:, 0, :40] = rng.permuted(np.tile([900.0] * 2 + [0] * 10, (40, 1)), axis=1).T
    found = rt.experts_in_time(steps, np.arange(1))
    assert found is not None and found.is_temporal.sum() > 30
    together = np.corrcoef(steps[:, 0, :40], rowvar=False)
    assert (together[np.triu_indices(40, 1)] > 0.99).sum() > 3  # some pairs share both of their steps
    assert found.groups == ((),) and found.pairs == ()


def test_few_tokens_say_nothing_of_consistent_experts() -> None:
    assert rt.experts_in_time(np.ones((8, 1, 4)), np.arange(1)) is None  # 8 steps of a uniform share make one
    weights = rt.experts_in_time(np.full((8, 1, 4), 0.25), np.arange(1))  # shares are taken for exact
    assert weights is not None and weights.is_consistent.all()


# Two recordings.


def test_a_comparison_by_hand() -> None:
    a, b = recording([[[4, 3, 2, 1]]]), recording([[[1, 2, 3, 4]]])
    same, turned = rt.compare(a, a, 0.5), rt.compare(a, b, 0.5)
    assert same.rank_correlation.tolist() == [1] and same.kept_frac == pytest.approx(1)
    assert turned.rank_correlation.tolist() == [-1]
    assert turned.served_frac.tolist() == pytest.approx([0.3]) and turned.own_frac.tolist() == pytest.approx([0.7])
    assert turned.kept_frac == pytest.approx((0.3 - 0.5) / (0.7 - 0.5))
    even = rt.compare(a, recording([[[1, 1, 1, 1]]]), 0.5)
    assert np.isnan(even.rank_correlation).all() and even.kept_frac is None


def test_recordings_are_compared_by_the_layers_both_have() -> None:
    a = rt.Recording("a", np.array([[[4.0, 1], [1, 4]]]), np.array([3, 7]))
    b = rt.Recording("b", np.array([[[1.0, 4], [5, 5]]]), np.array([7, 9]))
    assert rt.compare(a, b, 0.5).layers.tolist() == [7] and rt.compare(a, b, 0.5).served_frac[0] == 0.8
    with pytest.raises(InputError, match="made has 3 experts and a 2"):
        rt.compare(a, recording([[[1, 2, 3]]]), 0.5)
    with pytest.raises(InputError, match="c and b have no layer in common"):
        rt.compare(b, rt.Recording("c", np.ones((1, 1, 2)), np.array([3])), 0.5)


# The verdict.


def test_gains_by_hand() -> None:
    found = rt.judge(recording(np.array([[[40, 30, 20, 10]]]) * 10**6, top_k=1), [1, 10**6])
    half = found.gains[1]
    assert (half.n_resident, half.served_frac, half.by_size_frac) == (2, 0.7, 0.5)
    assert half.gain_frac == pytest.approx(1 - 0.3 / 0.5, abs=0.001)
    assert found.decode[0].n_active == pytest.approx(1) and found.decode[0].n_offloaded_active == pytest.approx(0.3)
    assert found.decode[0].gain_frac == pytest.approx(0.4)
    assert found.decode[1].n_active == pytest.approx(4) and found.decode[1].gain_frac == pytest.approx(0, abs=1e-9)


def test_the_largest_decode_batch_that_is_worth_it_is_found_among_all() -> None:
    made = drawn("power-law:1", 8, 512)
    found = rt.judge(made, range(1, 300))
    gains = [each.gain_frac for each in found.decode]
    assert gains == sorted(gains, reverse=True)
    assert found.n_decode_tokens == sum(gain >= 0.1 for gain in gains) > 1
    assert rt.judge(drawn("uniform", 8, 512)).n_decode_tokens == 0
    assert rt.judge(drawn("one-hot:8", 8, 512)).n_decode_tokens is None  # the others are never used


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("uniform", NONE),
        ("coverage:0.52/0.5", NONE),
        ("coverage:0.58/0.5", SLIGHT),
        ("power-law:1", HOT),
        ("layered", HOT),
    ],
)
def test_the_label_follows_the_skew_that_routing_has(name: str, label: str) -> None:
    assert rt.judge(drawn(name, 16, 1024)).label == label


@pytest.mark.parametrize("n_tokens", [5, 25, 200])
@pytest.mark.parametrize("seed", range(8))
def test_a_uniform_router_with_few_tokens_never_has_a_hot_set(n_tokens: int, seed: int) -> None:
    whole = drawn("uniform", 1, n_tokens, n_layers=1, seed=seed)
    assert rt.judge(whole).label in (UNCLEAR, NONE)
    steps = drawn("uniform", 8, n_tokens, n_layers=1, n_experts=16, top_k=2, seed=seed)
    assert rt.judge(steps).label in (UNCLEAR, NONE)


def test_uniform_routing_is_taken_for_a_hot_set_in_few_samples_of_a_hundred() -> None:
    labels = [rt.judge(drawn("uniform", 1, 12, n_layers=1, n_experts=8, top_k=1, seed=i)).label for i in range(150)]
    assert sum(label in (HOT, SLIGHT, MOVING) for label in labels) <= 5


def test_a_few_steps_that_disagree_are_too_few() -> None:
    rng = np.random.default_rng(3)
    steps = rng.permuted(np.tile([60.0] * 8 + [2] * 56, (6, 4, 1)), axis=2)  # a hot set of its own in every step
    found = rt.judge(recording(steps))
    assert found.gains[1].gain_frac > 0.1 and found.label == UNCLEAR and "Too few steps to say" in found.reason


def test_skew_in_one_layer_of_many_is_named_and_no_benefit_for_all() -> None:
    uniform, steep = drawn("uniform", 16, 512, n_layers=8), drawn("power-law:1.2", 16, 512, n_layers=1)
    steps = np.concatenate([uniform.loads[:, :7], steep.loads], axis=1)
    found = rt.judge(rt.Recording("made", steps, np.arange(8) + 3, 8, uniform.n_tokens))
    assert found.label == NONE and "too small" not in found.reason
    assert "Only 1 of 8 layers gains much (layer 10): there the hot set saves" in found.reason
    few = rt.judge(rt.Recording("made", steps[:, 4:], np.arange(4), 8, uniform.n_tokens))
    assert few.label == SLIGHT and "Only 1 of 4 layers gains much (layer 3)" in few.reason  # most layers are uniform


def test_a_hot_set_of_its_own_in_every_step_is_no_benefit_once_steps_are_many() -> None:
    rng = np.random.default_rng(3)
    steps = rng.permuted(np.tile([60.0] * 8 + [2] * 56, (128, 4, 1)), axis=2)
    found = rt.judge(recording(steps))
    assert found.label == NONE and "What is hot in one half is not in the other" in found.reason
    assert rt.judge(recording(steps[:12])).label == UNCLEAR


def test_steep_routing_is_seen_in_few_tokens_and_small_skew_is_not() -> None:
    assert rt.judge(drawn("power-law:1.5", 1, 100)).label == HOT
    slight = rt.judge(drawn("coverage:0.58/0.5", 1, 100))
    assert slight.label == UNCLEAR and "Record more tokens" in slight.reason


def moving_made(n_steps: int, n_experts: int = 16) -> rt.Recording:
    """A made-up recording whose hot quarter is another one in every quarter of the steps, and even over all."""
    counts = np.full((n_steps, 2, n_experts), 5)
    for step in range(n_steps):
        first = step * 4 // n_steps * n_experts // 4
        counts[step, :, first : first + n_experts // 4] = 300
    return recording(counts)


def test_a_hot_set_that_moves_is_for_a_cache() -> None:
    found = rt.judge(moving_made(64), resident_frac=0.25)
    assert found.label == MOVING and "a cache that follows may be" in found.reason
    unordered = rt.Recording("made", moving_made(64).loads, np.arange(2), is_ordered=False)
    assert rt.judge(unordered, resident_frac=0.25).label == NONE  # evenly used over all steps
    assert rt.summarise(unordered).overlaps == () and rt.summarise(unordered).experts is None


def test_a_hot_set_that_lasts_and_moves_says_both() -> None:
    found = rt.judge(drawn("temporal:16", 200, 256))
    assert found.label == HOT and "a cache may do better" in found.reason


@given(loads.filter(lambda row: len(row) > 3), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
def test_a_verdict_is_given_for_any_counts_and_is_json(row: list[int], resident_frac: float) -> None:
    summary = rt.summarise(recording([[row], [row[::-1]]], top_k=1), resident_frac=resident_frac)
    found = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    assert found["verdict"]["reason"] and found["layers"][0]["n_active"] == np.count_nonzero(np.add(row, row[::-1]))
    for gain in summary.verdict.gains:
        assert gain.gain_frac <= gain.most_gain_frac and gain.served_frac >= gain.by_size_frac - 1e-9
    for line in routing_page(summary, 120).splitlines():
        assert len(line) <= 120


def test_weights_are_taken_for_exact_and_say_so() -> None:
    summary = rt.summarise(recording([[[0.5, 0.25, 0.15, 0.1]]]))
    assert summary.verdict.label == HOT and summary.verdict.sampling is None
    assert summary.verdict.gains[1].held_out_frac is None
    assert summary.to_json()["layers"][0]["p_value"] is None
    assert summary.verdict.layer_gain_frac.tolist() == pytest.approx([0.5])
    page = routing_page(summary, 120)
    assert "no whole numbers" in page and "top-k is not known" in page


def test_counts_as_large_as_a_recording_allows_are_judged() -> None:
    assert rt.judge(recording(np.array([[[9e17, 1e17, 1e17, 1e17]] * 2] * 3))).label == HOT


def test_resident_experts_are_what_offloading_leaves() -> None:
    from perfmodel.placement import n_offloaded_of

    for n_experts in (1, 2, 5, 8, 60, 64):
        for frac in (0, 0.1, 0.25, 0.3125, 0.5, 0.75, 1):
            assert n_resident_of(1 - frac, n_experts) == n_experts - n_offloaded_of(1 - (1 - frac), n_experts)
    with pytest.raises(InputError, match=r"a fraction of experts is 1\.2, expected 0 to 1"):
        n_resident_of(1.2, 8)


def test_steps_of_alike_tokens_use_fewer_experts_than_independent_ones() -> None:
    independent = rt.summarise(drawn("power-law:1", 64, 32))
    assert independent.n_active_independent == pytest.approx(independent.n_active_per_step, rel=0.03)
    alike = rt.summarise(drawn("temporal:4", 64, 32))
    assert alike.n_active_independent is not None and alike.n_active_per_step < 0.95 * alike.n_active_independent


def test_real_routing_is_judged_as_it_is_known(shared: Path) -> None:
    with np.load(shared / "data" / "routing_olmoe_mixtral.npz") as arrays:
        of = {key: rt.judge(recording(arrays[key][None]), resident_frac=0.5) for key in arrays}
        there = [recording(arrays[f"olmoe-1b-7b__{domain}"][None], 8) for domain in ("wikipedia", "c4")]
    assert {found.label for key, found in of.items() if key.startswith("olmoe")} == {HOT}
    mixtral = {key.partition("__")[2]: found for key, found in of.items() if key.startswith("mixtral")}
    assert mixtral["c4"].label == mixtral["wikipedia"].label == NONE
    assert all(found.gains[1].gain_frac < 0.12 for found in mixtral.values())
    # A placement fitted to one domain is worth little on the other.
    kept = rt.compare(*there, 0.5).kept_frac
    assert kept is not None and kept < 0.2


# Pages and the command.


def test_the_nomenclature_knows_every_key_of_the_json() -> None:
    page = (ROOT / "docs" / "nomenclature.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([^`]+)`", page))
    made = drawn("temporal:4", 64, 256)
    summary = rt.summarise(made, against=[made])
    assert summary.experts is not None and summary.experts.pairs and summary.overlaps and summary.verdict.decode
    found = keys_of(summary.to_json()) - {f"{part:.0%}" for part in rt.COVERED_FRACS}
    assert found - named == set()


def test_bars_fall_from_hot_to_cold() -> None:
    assert load_bars(np.full(4, 0.25)) == "████"
    assert load_bars(np.array([0, 8, 4, 1]) / 13) == "█▄▁ "
    assert len(load_bars(rt.uniform_shares(128)[0])) == 12


@pytest.mark.parametrize("name", ["uniform", "power-law:1", "temporal:4"])
def test_no_line_is_longer_than_a_terminal_and_what_is_left_out_is_named(name: str) -> None:
    found = drawn(name, 64, 128)
    few = rt.Recording("few", drawn("uniform", 1, 9).loads, np.arange(2), 8)
    unknown = rt.Recording("unknown", found.loads, np.arange(2), is_ordered=False)
    assert all(len(line) <= 60 for made in (few, unknown) for line in routing_page(rt.summarise(made), 60).splitlines())
    summary = rt.summarise(found)
    for width in (60, 72, 80, 100, 200):
        page = routing_page(summary, width)
        assert max(map(len, page.splitlines())) <= width, width
        assert ("a wider page also has: CV" in page) == (width < 118)
        assert "hot to cold" in page and "of unseen tokens" in page and "last window" in page


def test_the_command_reads_a_file_and_prints_a_page_in_ascii_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = drawn("temporal:4", 16, 64, n_layers=30)
    path = str(tmp_path / "made.npz")
    rt.write_counts(path, made.loads.astype(np.int64), made.layers + 3, 8, np.full(16, 64))
    command = [sys.executable, "-m", "perfmodel", "routing", path, "--tokens", "1,8", "--against", f"{path}@2"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    page = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, env=env)
    assert page.returncode == 0, page.stderr
    words = page.stdout.decode("ascii")
    assert "?" not in words and "20 of 30 layers" in words and "#" in words and "against made.npz@2: " in words
    assert "made.npz: 16 steps, 30 layers (3 to 32), 64 experts, top-8, 1,024 tokens" in words
    app(
        [
            "routing",
            path,
            "--layers",
            "3,9",
            "--window",
            "2",
            "--hot",
            "0.5",
            "--tokens",
            "7",
            "--json",
            "--consistent",
            "40%",
            "--temporal-weight",
            "2.5",
        ],
        standalone_mode=False,
    )
    values = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in values["layers"]] == [3, 9]
    assert [(row["window_steps"], row["random_frac"]) for row in values["overlaps"]] == [(2, 0.5)]
    assert [row["n_tokens"] for row in values["verdict"]["decode"]] == [7]
    cutoffs = {
        "consistent_least_frac": 0.4,
        "temporal_least_weight": 2.5,
        "temporal_most_frac": 0.34,
        "used_share": 0.5,
    }
    assert cutoffs.items() <= values["experts_in_time"].items()


def test_a_shape_says_the_layers_of_ids_in_base64(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "torch_dtype": "bfloat16",
    }
    config |= {"n_routed_experts": 5, "num_experts_per_tok": 2, "hidden_size": 8, "moe_intermediate_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = np.array([[[0, 0], [1, 2], [3, 4]]] * 7, dtype="<i4")  # 7 tokens, layers, top-k; the first layer is dense
    (tmp_path / "made.json").write_text(json.dumps({"routed_experts": base64.b64encode(ids.tobytes()).decode()}))
    command = ["routing", str(tmp_path / "made.json"), "--shape", str(tmp_path / "config.json"), "--json"]
    app(command, standalone_mode=False)
    values = json.loads(capsys.readouterr().out)
    assert (values["n_experts"], values["top_k"], values["n_tokens"]) == (5, 2, 7)
    assert [(row["layer"], row["n_active"]) for row in values["layers"]] == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["temporal:4"], "is a pattern: give --shape"),
        (["none.npz"], "no routing file 'none.npz'"),
        (["uniform", "--shape", "olmoe", "--layers", "99"], "has no layer 99; its layers are 0, 1,"),
        (["uniform", "--shape", "olmoe", "--top-k", "3"], "--top-k is 3, but olmoe says 8"),
        (["uniform", "--shape", "olmoe", "--tokens", "1,x"], "--tokens is 'x', expected a whole number"),
        (["uniform", "--shape", "olmoe", "--resident", "2"], "a fraction of experts is 2, expected 0 to 1"),
    ],
)
def test_mistakes_get_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        app(["routing", *words], standalone_mode=False)
    assert sentence in str(error.value) and "\n" not in str(error.value)

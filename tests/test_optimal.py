"""The cheapest placement: exact on small cases, never worse than where it starts, its bound never above anything."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import OptimizeResult

from perfmodel.errors import InputError
from perfmodel.physics import Array
from perfmodel.placement import Tiers, relaxed
from perfmodel.placement.charges import Charges
from perfmodel.placement.costs import Block, Costs, additive, condensed, joined, parallel
from perfmodel.placement.memory import Budget, Memory
from perfmodel.placement.optimal import minimise


def made_up(n_layers: int, n_experts: int, n_tiers: int, seed: int) -> Array:
    """Costs of no machine, ns; the first tier is fast."""
    found = np.random.default_rng(seed).lognormal(8, 1, (n_layers, n_experts, n_tiers))
    found[:, :, 0] *= 0.1
    return found


def curved(seed: int, n_layers: int = 2, n_experts: int = 5, n_steps: int = 3) -> Costs:
    """Made-up costs of three tiers under a norm, over steps, with a charge for the last tier."""
    rng = np.random.default_rng(seed)
    rows = n_layers * n_steps
    blocks = tuple(Block((r, 2), rng.lognormal(8, 1, (rows, n_experts, 2))) for r in (0, 1, 1))

    def norm(loads: Array) -> Array:
        return np.asarray((loads**3).sum(axis=1) ** (1 / 3))

    def slopes(loads: Array) -> Array:
        return np.asarray((loads / np.maximum(norm(loads), 1e-9)[:, None]) ** 2)

    charge = np.zeros((rows, n_experts, 3))
    charge[:, :, 2] = rng.choice([0.0, 4000.0], (rows, n_experts))
    return Costs(blocks, 3, norm, slopes, rng.uniform(0, 1000, rows), charge, np.full(n_steps, 1 / n_steps))


def best_of_all(costs: Costs, size: Array, budgets: tuple[Budget, ...]) -> float:
    """Every placement tried."""
    shape = (costs.n_layers, costs.n_experts)
    memory = Memory(size, budgets, costs.n_tiers)
    every = itertools.product(range(costs.n_tiers), repeat=shape[0] * shape[1])
    tried = (np.array(tiers, dtype=np.int8).reshape(shape) for tiers in every)
    return min(float(costs.layers_ns(tier).sum()) for tier in tried if memory.fits(tier))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("make", [additive, parallel])
def test_small_placements_are_the_best_of_all(make, seed: int) -> None:  # type: ignore[no-untyped-def]
    costs = make(made_up(2, 4, 3, seed))
    size = np.random.default_rng(seed).uniform(1, 3, (2, 4))
    for budgets in [(Budget((0,), 7.0),), (Budget((0,), 5.0, True), Budget((1, 2), 13.0))]:
        found = minimise(costs, size, budgets)
        assert found.time_ns == pytest.approx(best_of_all(costs, size, budgets), rel=1e-9)
        assert found.gap_frac == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_small_placements_under_curved_costs_and_charges_are_the_best_of_all(seed: int) -> None:
    costs, size = curved(seed, n_experts=4), np.ones((2, 4))
    budgets = (Budget((0,), 3.0), Budget((1,), 3.0))
    found = minimise(costs, size, budgets)
    assert found.time_ns == pytest.approx(best_of_all(costs, size, budgets), rel=1e-7)


@pytest.mark.parametrize("make", [additive, parallel])
def test_large_placements_come_near_their_bound_and_keep_their_budgets(make) -> None:  # type: ignore[no-untyped-def]
    uneven, even = np.random.default_rng(1).uniform(1, 2, (12, 64)), np.ones((12, 64))
    costs = make(made_up(12, 64, 3, 1))
    for size, budgets in [
        (uneven, (Budget((0,), 350.0),)),
        (even, (Budget((0,), 20.0, True), Budget((1,), 200.0))),
    ]:
        found = minimise(costs, size, budgets)
        assert Memory(size, budgets, 3).fits(found.tier)
        assert 0 <= found.gap_frac < (0.003 if make is additive else 0.03)
        assert found.time_ns == pytest.approx(float(costs.layers_ns(found.tier).sum()))


@pytest.mark.parametrize("seed", range(3))
def test_the_search_for_large_placements_is_right_on_small_ones(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    costs, size = curved(seed, n_experts=4), np.ones((2, 4))
    budgets = (Budget((0,), 3.0),)
    best = best_of_all(costs, size, budgets)
    monkeypatch.setattr("perfmodel.placement.exact.MAX_OPTIONS", 0)
    found = minimise(costs, size, budgets)
    assert found.bound_ns <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= found.time_ns <= best * 1.03


def test_a_result_is_never_worse_than_its_starts() -> None:
    costs, size = curved(7, 6, 40, 4), np.ones((6, 40))
    budget = Budget((0,), 100.0)
    rng = np.random.default_rng(0)
    starts = [rng.permuted(np.repeat([0, 1, 2], [16, 12, 12])[None].repeat(6, 0), axis=1) for _ in range(5)]
    found = minimise(costs, size, (budget,), tuple(start.astype(np.int8) for start in starts))
    assert found.time_ns <= min(float(costs.layers_ns(start.astype(np.int8)).sum()) for start in starts)
    assert found.gap_frac < 0.05


@pytest.mark.parametrize("is_uniform", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_the_cheapest_placement_under_charges_is_that_of_all(seed: int, is_uniform: bool) -> None:
    """Exactly where all experts of a step and tier that are charged are charged alike; else nothing costs less."""
    rng = np.random.default_rng(seed)
    by_step = np.sort(rng.uniform(100, 1000, (3, 1, 1, 4)), axis=3) * [0, 1, 1, 1]
    awake = rng.random((3, 1, 6, 1)) < 0.6
    charge = (by_step * awake if is_uniform else rng.choice([0.0, 400.0, 900.0], (3, 1, 6, 4))).reshape(3, 6, 4)
    flat = additive(np.zeros((3, 6, 4)))
    charges = Charges(replace(flat, charge_ns=charge, weights=np.array([0.5, 0.3, 0.2])))
    reduced = rng.uniform(0, 400, (1, 6, 4))
    every = np.array(list(itertools.product(range(4), repeat=6)), dtype=np.int8)

    def cost(tier: Tiers) -> float:
        return float(charges.of(tier[None])[0] + reduced[0, np.arange(6), tier].sum())

    tier, least = charges.cheapest(reduced)
    best = min(cost(one) for one in every)
    assert least[0] <= best * (1 + 1e-12)
    if is_uniform:
        assert cost(tier[0]) == pytest.approx(best)
        assert least[0] == pytest.approx(best)


def test_experts_without_work_leave_memory_to_the_others() -> None:
    """Half of the experts of each layer idle; all others fit, and only few of them are better off beside the device."""
    cost = np.random.default_rng(0).uniform(1e6, 1.1e6, (20, 64, 3)) * [1.0, 5.0, 9.0]
    cost[:, ::2] = 0.0
    found = minimise(parallel(cost), np.ones((20, 64)), (Budget((0,), 0.6 * 20 * 64),))
    assert (found.tier[:, 1::2] == 0).sum(axis=1) == pytest.approx(np.full(20, 26), abs=2)
    assert found.gap_frac < 0.04


def test_the_unit_of_time_does_not_matter() -> None:
    first, *others = (
        minimise(parallel(unit * made_up(6, 40, 3, 2)), np.ones((6, 40)), (Budget((0,), 100.0),))
        for unit in (1.0, 1e-3, 1e9)
    )
    for other in others:
        assert other.gap_frac == pytest.approx(first.gap_frac, abs=1e-3)


def test_a_program_that_one_method_does_not_solve_is_given_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = (Budget((0,), 100.0),)
    first = minimise(parallel(made_up(6, 40, 3, 2)), np.ones((6, 40)), budget)
    solve, asked = relaxed.linprog, []

    def failing(*args: object, method: str) -> object:
        asked.append(method)
        return OptimizeResult(status=4, message="no end") if method == "highs-ds" else solve(*args, method=method)

    monkeypatch.setattr(relaxed, "linprog", failing)
    found = minimise(parallel(made_up(6, 40, 3, 2)), np.ones((6, 40)), budget)
    assert set(asked) == {"highs-ds", "highs-ipm"}
    assert found.bound_ns == pytest.approx(first.bound_ns, rel=1e-3)
    assert found.gap_frac < 0.03


def test_a_charge_that_a_layer_pays_once_makes_whole_layers_resident() -> None:
    """Four equal layers, half the memory: with a large charge two layers stay whole instead of four halves."""
    cost = np.ones((4, 8, 2)) * [1.0, 2.0]
    flat = additive(cost)
    charge = np.zeros((4, 8, 2))
    charge[:, :, 1] = 100.0
    charged = Costs(flat.blocks, 1, flat.compose, flat.compose_slopes, flat.fixed_ns, charge, flat.weights)
    found = minimise(charged, np.ones((4, 8)), (Budget((0,), 16.0),))
    assert sorted((found.tier == 0).sum(axis=1)) == [0, 0, 8, 8]
    assert found.time_ns == pytest.approx(2 * 8 * 1 + 2 * (8 * 2 + 100))


def test_costs_of_several_batches_are_weighted() -> None:
    one, other = additive(made_up(2, 8, 2, 0)), additive(made_up(2, 8, 2, 1))
    tier = np.random.default_rng(2).integers(0, 2, (2, 8)).astype(np.int8)
    both = joined([one, other], [3.0, 1.0])
    assert both.n_layers == 2
    assert both.layers_ns(tier) == pytest.approx(0.75 * one.layers_ns(tier) + 0.25 * other.layers_ns(tier))


def test_many_placements_at_once_take_what_each_takes_as_a_layer() -> None:
    """With charges in all tiers, of several heights."""
    costs = curved(3, n_layers=1, n_experts=9, n_steps=1)
    charge = np.random.default_rng(3).choice([0.0, 500.0, 900.0, 4000.0], (1, 9, 3), p=[0.7, 0.1, 0.1, 0.1])
    costs = replace(costs, charge_ns=charge)
    tier = np.random.default_rng(4).integers(0, 3, (3000, 9)).astype(np.int8)
    found = costs.placements_ns(tier)
    assert found == pytest.approx([float(costs.layers_ns(one[None])[0]) for one in tier], rel=1e-6)


def test_experts_that_do_not_fit_are_refused() -> None:
    costs = additive(made_up(2, 40, 2, 0))
    with pytest.raises(InputError, match="the experts take 80 bytes and do not fit"):
        minimise(costs, np.ones((2, 40)), (Budget((0,), 20.0), Budget((1,), 30.0)))
    with pytest.raises(InputError, match=r"expected \[layer, expert, tier\], each a time of at least 0 ns"):
        additive(np.full((2, 3, 2), -1.0))


def test_fewer_steps_stand_for_all_by_the_mean_loads_of_each_expert() -> None:
    costs = curved(3, n_layers=2, n_experts=6, n_steps=9)
    few = condensed(costs, 3)
    assert few.n_steps == 3 and few.n_layers == 2 and few.weights.sum() == pytest.approx(1)
    for all_steps, kept in zip(costs.blocks, few.blocks, strict=True):
        assert few.by_layer(kept.values) == pytest.approx(costs.by_layer(all_steps.values))
    assert condensed(costs, 9) is costs
    quiet = Costs(
        (Block((0,), np.zeros((4, 3, 1))),),
        1,
        lambda x: x[:, 0],
        np.ones_like,
        np.zeros(4),
        np.zeros((4, 3, 1)),
        np.full(4, 0.25),
    )
    quiet.blocks[0].values[1, 2] = 8.0  # awake in a step that is not kept
    assert condensed(quiet, 2).blocks[0].values[:, 2, 0].tolist() == [2.0, 2.0]

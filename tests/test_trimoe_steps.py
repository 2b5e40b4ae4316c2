"""What TriMoE does from step to step: routing, predicting, moving weights; and whole simulations of it and others."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import moe
from perfmodel.errors import InputError
from perfmodel.hardware import hardware
from perfmodel.placement import COPIED, NEAR_DATA, ON_HOST, RESIDENT
from perfmodel.routing import Recording, write_counts
from perfmodel.trimoe import (
    BASELINES,
    LADDER,
    TRIMOE,
    Bounds,
    Layout,
    Options,
    Table,
    Window,
    Workload,
    accuracy,
    busy,
    classify,
    compare,
    ema,
    made_workload,
    relayout,
    simulate,
    workload,
)
from perfmodel.trimoe.relayout import MOVES, dealt
from perfmodel.trimoe.simulate import first_layout
from perfmodel.trimoe.steps import steps_of, three_class_shares
from perfmodel.trimoe.systems import fitted_bounds, variant
from tests.test_trimoe import made_machine

MACHINE, GLM = hardware("trimoe"), moe.shape("glm-4.5-air")
SMALL = replace(GLM, name="small-made", n_experts=16, top_k=2, n_layers=3)


def small(source: str = "three-class", n_tokens: int = 64, n_steps: int = 6, **changes: object) -> Workload:
    return made_workload(MACHINE, SMALL, n_tokens, source=source, n_steps=n_steps, n_layers=3, **changes)  # type: ignore[arg-type]


def test_the_family_has_the_stated_classes_and_changes_as_stated() -> None:
    shares = three_class_shares(40, 2, 160, 0.05, 0)
    assert shares.sum(axis=2) == pytest.approx(1.0)
    ranked = -np.sort(-shares, axis=2)
    assert ranked[..., 45:].sum(axis=2) == pytest.approx(0.08, abs=0.005)  # the coldest 115, 72 %
    assert ranked[..., :5].sum(axis=2) == pytest.approx(0.22, abs=0.05)
    assert np.sort(shares, axis=2)[1:] == pytest.approx(np.sort(shares, axis=2)[:-1])  # places change, shares do not
    changed = (shares[1:] != shares[:-1]).mean()
    assert 0.03 < changed < 0.055
    still = three_class_shares(5, 1, 160, 0.0, 0)
    assert (still == still[0]).all()
    with pytest.raises(InputError, match="enough for a cold, a warm and a hot one"):
        three_class_shares(1, 1, 2, 0.0, 0)


def test_steps_are_batches_of_the_model_and_a_file_keeps_its_own_steps(tmp_path) -> None:
    made = steps_of("three-class:0.1", SMALL, 64, 5, 2)
    assert made.loads.shape == (5, 2, 16) and (made.loads.sum(axis=2) == 128).all()
    counts = np.zeros((4, 2, 16), dtype=np.int64)
    counts[:2, :, :2] = 64  # two steps for the first experts, then two for others
    counts[2:, :, 4:6] = 64
    path = tmp_path / "recorded.npz"
    write_counts(path, counts, np.arange(2), 2, np.full(4, 64))
    found = steps_of(str(path), SMALL, 32, 3, 8).loads
    assert found.shape == (3, 2, 16)
    assert found[0, 0].tolist() == [32, 32, *[0] * 14] and found[2, 1, 4:6].tolist() == [32, 32]
    np.save(tmp_path / "no_steps.npy", counts.sum(axis=0))
    flat = steps_of(str(tmp_path / "no_steps.npy"), SMALL, 32, 3, 8).loads
    assert flat.shape == (3, 2, 16) and flat[:, :, [0, 1, 4, 5]].sum() == flat.sum()
    with pytest.raises(InputError, match="found experts 16, expected 128"):
        steps_of(str(path), GLM, 32, 3, 8)
    with pytest.raises(InputError, match="no routing file 'nonsense'"):
        steps_of("nonsense", GLM, 32, 3, 8)


def test_the_steps_of_a_file_are_shares_whatever_they_sum_to_and_in_order_only_if_they_were(tmp_path) -> None:
    loads = np.random.default_rng(0).random((3, 1, 16))
    loads /= loads.sum(axis=2, keepdims=True)
    np.save(tmp_path / "made.npy", loads / 4)
    found = steps_of(str(tmp_path / "made.npy"), SMALL, 10**6, 9, 3)
    assert found.is_ordered and found.loads == pytest.approx(2 * 10**6 * loads, abs=1)
    passes = [{"forward_pass_id": step, "expert_counts": [[step] * 16]} for step in (5, 2, 9)]
    (tmp_path / "made.json").write_text(json.dumps(passes))
    assert not steps_of(str(tmp_path / "made.json"), SMALL, 64, 9, 3).is_ordered
    with pytest.raises(InputError, match="no order of time"):
        small(str(tmp_path / "made.json"))


def test_a_name_of_a_routing_is_drawn_though_a_folder_has_it(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporal").mkdir()
    monkeypatch.chdir(tmp_path)
    assert (steps_of("temporal", SMALL, 64, 3, 2).loads == steps_of("temporal:4", SMALL, 64, 3, 2).loads).all()


def test_the_average_takes_three_tenths_of_the_new_and_classes_count_in_mean_loads() -> None:
    loads = np.array([[[10.0, 0.0]], [[20.0, 0.0]]])
    assert ema(loads)[:, 0, 0].tolist() == pytest.approx([10.0, 10.0, 13.0])
    assert ema(loads, np.zeros((1, 2)), 0.5)[:, 0, 0].tolist() == pytest.approx([0.0, 5.0, 12.5])
    assert classify(np.array([4.99, 5.0, 30.01, 40.0, *[0.0] * 4])).tolist() == [0, 1, 1, 2, *[0] * 4]  # mean 10
    with pytest.raises(InputError, match="two ascending numbers"):
        Bounds(2.0, 1.0)


def test_accuracy_is_whole_where_nothing_changes_and_counts_the_changes_that_were_right() -> None:
    still = np.tile(np.array([[8.0, 1.0, 1.0, 1.0, 0.0, 1.0]]), (5, 1, 1))
    found = accuracy(still)
    assert (found.right_frac, found.repeated_frac, found.n_migrations, found.migration_frac) == (1.0, 1.0, 0, None)
    # One expert of two comes in for the other and stays: the average follows two steps later.
    loads = np.array([[[1.0, 0.0]]] * 3 + [[[0.0, 1.0]]] * 5)
    bounds = Bounds(1.0, 9.0)
    classes = classify(ema(loads), bounds)[:, 0, 0]
    assert classes.tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0]
    found = accuracy(loads, bounds)
    assert found.right_frac == pytest.approx(4 / 6) and found.repeated_frac == pytest.approx(5 / 6)
    assert found.n_migrations == 2 and found.migration_frac == 1.0
    assert found.recall_frac["cold"] == pytest.approx(4 / 6) and found.recall_frac["hot"] is None
    with pytest.raises(InputError, match="at least 3"):
        accuracy(loads[:2])


def test_experts_are_dealt_out_there_and_back() -> None:
    loads = np.array([[5.0, 9.0, 7.0, 1.0, 3.0]])
    nobody = np.zeros((1, 5), dtype=bool)
    assert dealt(loads, nobody, 2).tolist() == [[1, 0, 1, 0, 0]]
    first = np.array([[False, True, False, False, False]])
    assert dealt(loads, first, 2).tolist() == [[1, 0, 0, 0, 1]]  # the resident takes the last place


def window(machine_dimms: int, end_ns: float, free_ns: float) -> Window:
    one = np.array([end_ns])
    return Window(np.array([free_ns]), np.array([free_ns]), np.zeros((1, machine_dimms)), one)


# Near data one token takes 80 ns and 90 tokens 278, so that those are better copied in 200; the GPU takes 10.
STEEP = made_machine(cpu=None, ndp=Table(np.array([1.0, 100.0, 1000.0]), np.array([80.0, 300.0, 2300.0])))


def test_a_predicted_hot_expert_takes_the_place_of_a_cold_resident_where_there_is_time() -> None:
    machine = STEEP
    layout = Layout(np.array([[True, False, False]]), np.array([[False] * 3]), np.array([[0, 1, 2]]))
    predicted, classes = np.array([[1.0, 90.0, 1.0]]), np.array([[0, 2, 0]])
    done = relayout(machine, layout, predicted, classes, window(4, 1000.0, 1000.0))
    assert done.layout.resident.tolist() == [[False, True, False]]
    assert done.moved["prefetch"].tolist() == [[False, True, False]] and done.exposed_ns.tolist() == [0.0]
    late = relayout(machine, layout, predicted, classes, window(4, 1000.0, 199.0))
    assert late.layout.resident.tolist() == [[True, False, False]]  # no time for a copy of 200 ns
    same = relayout(machine, layout, np.array([[80.0, 90.0, 1.0]]), np.array([[2, 2, 0]]), window(4, 1000.0, 1000.0))
    assert not same.moved["prefetch"].any()  # equals are not swapped


def test_a_move_that_would_be_seen_for_longer_than_it_gains_is_not_made() -> None:
    machine = replace(STEEP, localised_ns=130.0)
    layout = Layout(np.array([[True, False]]), np.array([[False, False]]), np.array([[0, 1]]))
    predicted, classes = np.array([[1.0, 90.0]]), np.array([[0, 2]])
    # The module is busy until the end, and reading the expert out of it takes 130 ns for a gain of 190 less 70.
    full = Window(np.array([900.0]), np.array([0.0]), np.array([[0.0, 1000.0, 0.0, 0.0]]), np.array([1000.0]))
    assert not relayout(machine, layout, predicted, classes, full).moved["prefetch"].any()
    gaining = relayout(replace(machine, localised_ns=50.0), layout, predicted, classes, full)
    assert gaining.moved["prefetch"].any() and gaining.exposed_ns.tolist() == [50.0]


def test_warm_experts_are_striped_and_cold_ones_put_on_the_least_busy_module() -> None:
    machine = made_machine()
    layout = Layout(np.zeros((1, 4), dtype=bool), np.array([[False, True, False, False]]), np.array([[0, 0, 0, 1]]))
    predicted, classes = np.array([[50.0, 1.0, 1.0, 1.0]]), np.array([[1, 0, 0, 0]])
    done = relayout(machine, layout, predicted, classes, window(4, 1000.0, 1000.0))
    assert done.moved["stripe"].tolist() == [[True, False, False, False]]
    assert done.moved["localise"].tolist() == [[False, True, False, False]]
    assert done.layout.striped.tolist() == [[True, False, False, False]]
    assert done.layout.home[0, 1] in (2, 3)  # the other two have experts already
    one = relayout(machine, layout, predicted, classes, window(4, 1000.0, 599.0))
    assert sum(int(one.moved[kind].sum()) for kind in MOVES) == 1  # 300 ns each, one after another


def test_cold_experts_leave_the_busiest_module_for_the_least_busy() -> None:
    layout = Layout(np.zeros((1, 4), dtype=bool), np.zeros((1, 4), dtype=bool), np.array([[0, 0, 0, 1]]))
    done = relayout(made_machine(), layout, np.ones((1, 4)), np.zeros((1, 4), dtype=int), window(4, 1000.0, 1000.0))
    assert done.moved["rebalance"].sum() == 1
    assert sorted(np.bincount(done.layout.home[0], minlength=4).tolist()) == [0, 1, 1, 2]


@given(seed=st.integers(0, 10**6))
def test_moves_keep_the_room_in_device_memory_and_stay_within_the_window(seed: int) -> None:
    rng = np.random.default_rng(seed)
    machine, n = made_machine(), 12
    resident = np.argsort(rng.random((3, n)), axis=1) < 4
    layout = Layout(resident, rng.random((3, n)) < 0.5, rng.integers(0, 4, size=(3, n)))
    predicted = rng.pareto(1.0, size=(3, n)).clip(0, 900)
    end = rng.uniform(100, 3000, size=3)
    free = Window(end * rng.random(3), end * rng.random(3), end[:, None] * rng.random((3, 4)), end)
    done = relayout(machine, layout, predicted, classify(predicted), free)
    assert (done.layout.resident.sum(axis=1) == 4).all() and (done.exposed_ns >= 0).all()
    assert (done.moved["prefetch"].sum(axis=1) * machine.pcie_ns <= free.pcie_ns + 1e-9).all()
    between = sum(done.moved[kind].sum(axis=1) for kind in MOVES[1:])
    assert (between * machine.gather_ns <= free.link_ns + 1e-9).all()
    changed = (done.layout.striped != layout.striped) | (done.layout.home != layout.home)
    assert (changed == (done.moved["stripe"] | done.moved["localise"] | done.moved["rebalance"]))[
        ~done.moved["localise"]
    ].all()
    assert sum(done.moved[kind].astype(int) for kind in MOVES).max() <= 1


def test_a_static_system_is_its_layers_one_by_one() -> None:
    work = small(n_slots=3)
    system = LADDER[2]
    machine = work.machine(system)
    layout = first_layout(machine, work.before.mean(axis=0), 3, work.bounds)
    assert (layout.resident.sum(axis=1) == 3).all()
    spans = []
    for tokens in work.steps:
        costs = machine.costs(tokens, layout.resident, layout.striped, layout.home)
        spans.append(busy(costs, system.decide(costs, tokens)).makespan_ns)
    found = simulate(work, system)
    assert found.makespan_ns == pytest.approx(np.array(spans))
    assert found.step_ns == pytest.approx(np.mean(spans) * SMALL.n_layers)
    assert found.overhead_frac == 0.0 and found.migration_frac is None


def test_with_room_for_all_every_system_is_the_gpu_alone() -> None:
    work = small(n_slots=99)
    assert work.n_slots == 16
    machine = work.machine(TRIMOE)
    alone = machine.gpu.at(work.steps).sum(axis=2)
    for system in (*BASELINES, LADDER[0]):
        assert simulate(work, system).makespan_ns == pytest.approx(alone)


@pytest.mark.parametrize(("number", "elsewhere"), [(1, NEAR_DATA), (3, ON_HOST)])
def test_two_baselines_copy_as_many_of_the_hottest_as_make_each_layer_shortest(number: int, elsewhere: int) -> None:
    """Beside every number of copies; a prefix of the hottest may be best far beyond the first that does not help."""
    system, work = BASELINES[number], small("power-law", n_tokens=6000, n_slots=2)
    machine = work.machine(system)
    layout = first_layout(machine, work.before.mean(axis=0), 2, work.bounds)
    for tokens in work.steps:
        costs = machine.costs(tokens, layout.resident, layout.striped, layout.home)
        spans = busy(costs, system.decide(costs, tokens)).makespan_ns
        for layer, row in enumerate(tokens):
            others = [e for e in np.argsort(-row, kind="stable") if not layout.resident[layer, e]]
            tried = np.where(layout.resident, RESIDENT, elsewhere)
            every = [busy(costs, tried).makespan_ns[layer]]
            for expert in others:
                tried[layer, expert] = COPIED
                every.append(busy(costs, tried).makespan_ns[layer])
            assert spans[layer] == pytest.approx(min(every))


def test_a_baseline_does_not_depend_on_what_it_lacks_nor_on_the_classes_of_trimoe() -> None:
    work = small(n_slots=2)
    for cold in (0.0, 4.0):
        other = replace(work, bounds=Bounds(cold, 4.0), options=Options(ndp_computing_scale=0.1))
        for system in BASELINES:
            if not system.has_ndp:
                assert simulate(other, system).step_ns == simulate(work, system).step_ns


@pytest.mark.parametrize("system", [*BASELINES, *LADDER], ids=lambda s: s.name)
def test_shares_of_time_are_shares_and_the_units_are_those_a_system_uses(system) -> None:
    found = simulate(small("temporal", n_slots=2), system)
    assert all(0 <= value <= 1 + 1e-9 for value in found.utilisation.values())
    assert sum(found.bottleneck_frac.values()) == pytest.approx(1.0)
    assert found.units == tuple(
        u for u, there in zip(("gpu", "cpu", "ndp"), (1, system.has_cpu, system.has_ndp), strict=True) if there
    )
    assert (found.exposed_ns >= 0).all() and 0 <= found.dimm_busy_frac <= 1


def test_moves_that_must_be_hidden_add_nothing_and_attention_hides_more_of_them() -> None:
    work = replace(made_workload(MACHINE, GLM, 512, n_steps=12, n_layers=2), options=Options(ndp_computing_scale=0.25))
    seen = simulate(work, TRIMOE)
    hidden = simulate(replace(work, has_seen_moves=False), TRIMOE)
    beside = simulate(replace(work, attention_ns=1e6), TRIMOE)
    assert hidden.overhead_frac == 0 < beside.overhead_frac < seen.overhead_frac
    assert 0 < sum(hidden.n_moves.values()) < sum(seen.n_moves.values())


def test_a_relayout_helps_where_experts_change_and_does_nothing_where_they_do_not() -> None:
    options = Options(ndp_computing_scale=0.25)
    work = made_workload(MACHINE, GLM, 512, n_steps=24, n_layers=2)
    moving = replace(work, options=options)
    still = replace(moving, steps=np.repeat(moving.before[-1:], 24, axis=0), before=moving.before[-1:])
    without, with_it = (simulate(moving, one) for one in LADDER[2:])
    assert with_it.step_ns < 0.9 * without.step_ns and with_it.overhead_frac > 0
    assert with_it.migration_frac is not None and with_it.migration_frac > 0.6
    without, with_it = (simulate(still, one) for one in LADDER[2:])
    assert with_it.step_ns <= without.step_ns * 1.001


def test_two_thirds_of_the_paper_come_out_with_slow_modules_and_not_with_the_profile() -> None:
    work = made_workload(MACHINE, GLM, 512, n_steps=16, n_layers=2)
    assumed = compare(work, has_ladder=False)
    slow = compare(replace(work, options=Options(ndp_computing_scale=0.25)), has_ladder=False)
    assert assumed.best.system.name == "GPU-NDP" and 1.0 < assumed.speedup < 1.5
    assert slow.speedup > 1.8


@pytest.mark.parametrize("source", ["uniform", "power-law", "temporal"])
def test_with_bounds_that_suit_the_machine_trimoe_is_hardly_ever_slower_than_others(source: str) -> None:
    work = made_workload(MACHINE, GLM, 256, source=source, n_steps=8, n_layers=2)
    for scale in (0.25, 1.0):
        found = compare(replace(work, options=Options(ndp_reading_scale=scale)), has_ladder=False)
        assert found.speedup > 0.93
        assert found.work.bounds == fitted_bounds(replace(work, options=Options(ndp_reading_scale=scale)))


def test_parts_can_be_left_out_and_are_named() -> None:
    assert variant() is TRIMOE
    bare = variant(has_cpu=False, is_refined=False, has_relayout=False)
    assert bare.name == "TriMoE without CPU, refinement, relayout"
    work = small(n_slots=2)
    assert simulate(work, bare).step_ns == pytest.approx(simulate(work, LADDER[0]).step_ns)


def test_a_workload_is_refused_that_does_not_fit_its_shape() -> None:
    recording = steps_of("uniform", SMALL, 8, 3, 2)
    with pytest.raises(InputError, match=r"16 experts, glm-4\.5-air has 128"):
        workload(MACHINE, GLM, recording, 1)
    with pytest.raises(InputError, match="3 steps of which 3 come before"):
        workload(MACHINE, SMALL, recording, 3)
    assert workload(MACHINE, GLM, steps_of("uniform", GLM, 8, 2, 1), 1).n_slots == 25  # 40 GB of 45 layers' experts
    assert workload(MACHINE, SMALL, recording, 1, budget_bytes=0).n_slots == 0
    with pytest.raises(InputError, match="no order of time"):
        workload(MACHINE, SMALL, replace(recording, is_ordered=False), 1)
    with pytest.raises(InputError, match="more than 100,000,000 loads"):
        steps_of("uniform", SMALL, 8, 10**9, 2)
    assert isinstance(recording, Recording)

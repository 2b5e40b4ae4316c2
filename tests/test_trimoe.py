"""Experts on GPU, CPU and near-data modules: their costs, and the schedule against slow and obvious ways to find it."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import moe
from perfmodel.errors import InputError
from perfmodel.hardware import hardware
from perfmodel.offload.beside import near_data_ns
from perfmodel.placement import COPIED, NEAR_DATA, ON_HOST, RESIDENT, TIERS
from perfmodel.predict import basis_of, work_of
from perfmodel.routing import Routing
from perfmodel.trimoe import (
    Costs,
    Machine,
    Options,
    Table,
    busy,
    costs_of,
    greedy,
    machine_of,
    read_table,
    refine,
    schedule,
)
from perfmodel.trimoe.scheduler import UNIT_OF, _makespans_after

TRIMOE, V2 = hardware("trimoe"), moe.shape("deepseek-v2")


def flat(ns: float) -> Table:
    return Table(np.array([1.0, 1000.0]), np.array([ns, ns]))


def made_machine(**changes: object) -> Machine:
    """A machine of round numbers: GPU 10 ns an expert, CPU 40, a module 100; four modules of two channels."""
    found = Machine(
        gpu=flat(10.0),
        cpu=flat(40.0),
        ndp=flat(100.0),
        expert_bytes=1e6,
        pcie_ns=200.0,
        striped_ns=60.0,
        localised_ns=120.0,
        internal_ns=80.0,
        gather_ns=300.0,
        serving_ns=30.0,
        n_dimms=4,
    )
    return replace(found, **changes)  # type: ignore[arg-type]


def made_costs(rng: np.random.Generator, n_layers: int, n_experts: int, n_dimms: int = 3) -> Costs:
    """Costs of random experts, some resident, some striped, some without tokens, on a made machine."""
    tokens = rng.integers(0, 6, size=(n_layers, n_experts)).astype(float)
    times = [Table(np.arange(1.0, 7.0), np.cumsum(rng.uniform(1, 30, size=6))) for _ in range(3)]
    machine = made_machine(
        gpu=times[0],
        cpu=times[1],
        ndp=times[2],
        pcie_ns=float(rng.uniform(5, 120)),
        striped_ns=float(rng.uniform(5, 60)),
        localised_ns=float(rng.uniform(20, 120)),
        n_dimms=n_dimms,
    )
    resident, striped = rng.random((2, n_layers, n_experts)) < [[[0.2]], [[0.5]]]
    return machine.costs(tokens, resident, striped, rng.integers(0, n_dimms, size=tokens.shape))


def test_an_expert_costs_what_the_formulas_say_in_each_domain_and_layout() -> None:
    tokens = np.array([[5.0, 5.0, 5.0, 0.0]])
    resident = np.array([[True, False, False, False]])
    striped = np.array([[True, True, False, False]])
    costs = made_machine().costs(tokens, resident, striped, np.array([[0, 1, 2, 3]]))
    inf = np.inf
    assert costs.cost_ns[0].tolist() == [
        [10.0, inf, 60.0, 300.0],  # resident; on the CPU its weights are read; near data they are gathered first
        [inf, 200.0, 60.0, 300.0],  # the copy takes longer than reading and computing
        [inf, 200.0, 120.0, 100.0],  # one module is slow to read out, and computes longer than it reads
        [inf, 0.0, 0.0, 0.0],
    ]
    assert costs.every_dimm_ns[0].tolist() == [[0, 30, 30, 30], [0, 30, 30, 30], [0] * 4, [0] * 4]
    assert costs.home_dimm_ns[0].tolist() == [[0, 0, 0, 300], [0, 0, 0, 300], [0, 120, 120, 100], [0] * 4]


def test_the_makespan_is_the_slowest_of_three_with_reads_on_the_modules() -> None:
    tokens = np.full((1, 5), 5.0)
    resident = np.array([[True, False, False, False, False]])
    striped = np.array([[False, True, False, False, False]])
    costs = made_machine().costs(tokens, resident, striped, np.array([[0, 0, 2, 2, 3]]))
    found = busy(costs, np.array([[RESIDENT, ON_HOST, NEAR_DATA, NEAR_DATA, COPIED]]))
    assert found.gpu_ns.tolist() == [210.0] and found.cpu_ns.tolist() == [60.0]
    assert found.dimm_ns.tolist() == [[30.0, 30.0, 230.0, 150.0]]
    assert found.ndp_ns.tolist() == [[0.0, 0.0, 200.0, 0.0]]
    assert found.makespan_ns.tolist() == [230.0] and found.bottleneck.tolist() == [2]
    assert found.working_ns.tolist() == [[210.0, 60.0, 50.0]]


def test_the_profile_gives_the_times_of_its_rates() -> None:
    machine = machine_of(TRIMOE, V2, 512)
    n_bytes = 3 * 5120 * 1536 * 2
    assert machine.expert_bytes == n_bytes and machine.n_dimms == 16
    assert machine.pcie_ns == pytest.approx(n_bytes / 55.6 + 2000)
    assert machine.striped_ns == pytest.approx(n_bytes / (0.8 * 307.2))
    assert machine.localised_ns == pytest.approx(8 * machine.striped_ns)  # one module alone has its whole channel
    assert machine.serving_ns == pytest.approx(machine.striped_ns / 2)
    assert machine.internal_ns == pytest.approx(n_bytes / 76.8)
    assert machine.gather_ns == pytest.approx(n_bytes / 25)
    assert machine.cpu is not None and machine.ndp is not None
    flops = 2 * 3 * 5120 * 1536
    four, five = machine.cpu.at(np.array([4.0, 5.0])) - 2000
    assert five == pytest.approx(5 * flops / 21e3) and four == pytest.approx(8 * 4 * flops / 21e3)
    assert machine.ndp.at(np.array([45.0]))[0] == pytest.approx(45 * flops / 2e3)
    slow = machine_of(TRIMOE, V2, 512, options=Options(has_amx=False)).cpu
    assert slow is not None and slow.at(np.array([5.0]))[0] == pytest.approx(8 * five + 2000)


def test_near_data_experts_cost_what_the_access_mode_says() -> None:
    tokens = np.arange(V2.n_experts, dtype=np.int64)[None] % 40
    n_tokens = int(tokens.sum())
    device = replace(basis_of(TRIMOE, V2, None).device, spread="even")
    work = work_of(V2, Routing("made", tokens, n_tokens, 1), "grouped-gemm")
    machine = machine_of(TRIMOE, V2, 40)
    nobody = np.zeros(tokens.shape, dtype=bool)
    home = np.arange(V2.n_experts, dtype=np.int64)[None] % machine.n_dimms
    costs = machine.costs(tokens.astype(float), nobody, nobody, home)
    mine = busy(costs, np.full(tokens.shape, NEAR_DATA)).makespan_ns
    assert mine == pytest.approx(near_data_ns(work, ~nobody, nobody, device))


def test_a_table_joins_its_points_and_ends_at_the_last(tmp_path) -> None:
    path = tmp_path / "times.csv"
    path.write_text("tokens,ns\n10,100\n20,300\n")
    table = read_table(path)
    assert table.at(np.array([0.0, 1.0, 10.0, 15.0, 20.0])).tolist() == [0.0, 100.0, 100.0, 200.0, 300.0]
    with pytest.raises(InputError, match="ends at 20 tokens, an expert has 21"):
        table.at(np.array([21.0]))
    given = machine_of(TRIMOE, V2, 20, tables={"cpu": table})
    assert given.cpu is table and given.gpu is not table
    with pytest.raises(InputError, match="unknown table 'tpu'; known: gpu, cpu, ndp"):
        machine_of(TRIMOE, V2, 20, tables={"tpu": table})


def test_tables_of_large_batches_have_fewer_points_and_the_same_times() -> None:
    small, large = (machine_of(TRIMOE, V2, n).gpu for n in (4096, 10**9))
    tokens = np.arange(1.0, 4097.0)
    assert np.array_equal(small.at(tokens), large.at(tokens)) and len(large.tokens) < 10_000
    assert large.tokens[-1] == 10**9


@pytest.mark.parametrize(
    "content", ["", "tokens,ns\n", "a,b\n1,2\n", "tokens,ns\n1,x\n", "tokens,ns\n2,5\n1,5\n", "tokens,ns\n1,-5\n"]
)
def test_a_damaged_table_is_refused(tmp_path, content: str) -> None:
    path = tmp_path / "times.csv"
    path.write_text(content)
    with pytest.raises(InputError):
        read_table(path)


def test_a_machine_without_near_data_units_names_those_that_have_them() -> None:
    with pytest.raises(InputError, match=r"'h100-pcie' has no memory modules that compute.*trimoe"):
        machine_of(hardware("h100-pcie"), V2, 8)
    plain = machine_of(hardware("h100-pcie"), V2, 8, options=Options(has_ndp=False))
    assert plain.ndp is None and plain.localised_ns == plain.striped_ns == plain.serving_ns


@given(seed=st.integers(0, 10**6))
def test_every_move_is_judged_as_a_whole_schedule_would_be(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = made_costs(rng, 2, 5)
    domain = greedy(costs)
    now = busy(costs, domain)
    after = _makespans_after(costs, domain, np.stack([now.gpu_ns, now.cpu_ns], axis=1), now.dimm_ns)
    for layer, expert, d in np.ndindex(after.shape):
        if not np.isfinite(costs.cost_ns[layer, expert, d]):
            assert after[layer, expert, d] == np.inf
            continue
        moved = domain.copy()
        moved[layer, expert] = d
        assert after[layer, expert, d] == pytest.approx(busy(costs, moved).makespan_ns[layer])


@given(seed=st.integers(0, 10**6))
def test_refinement_never_raises_the_makespan_and_leaves_no_move_that_helps(seed: int) -> None:
    costs = made_costs(np.random.default_rng(seed), 3, 7)
    first, last = greedy(costs), refine(costs, greedy(costs))
    before, after = busy(costs, first).makespan_ns, busy(costs, last).makespan_ns
    assert (after <= before * (1 + 1e-12)).all()
    assert np.isfinite(np.take_along_axis(costs.cost_ns, last[..., None], axis=2)).all()
    assert np.array_equal(refine(costs, last), last)


def optimum_ns(costs: Costs, layer: int) -> float:
    """The shortest makespan of a layer, by trying all schedules."""
    choices = [np.flatnonzero(np.isfinite(row)) for row in costs.cost_ns[layer]]
    every = np.array(list(itertools.product(*choices)))
    same = np.full(len(every), layer)
    return float(busy(costs.rows(same), every).makespan_ns.min())


def test_schedules_are_seldom_far_from_the_best_of_all() -> None:
    costs = made_costs(np.random.default_rng(1), 60, 6)
    best = np.array([optimum_ns(costs, layer) for layer in range(60)])
    cheapest, refined = (busy(costs, d).makespan_ns for d in (greedy(costs), schedule(costs)))
    assert (refined >= best * (1 - 1e-9)).all()
    assert np.median(refined / best) < 1.01 and (refined / best).mean() < 1.05
    assert (cheapest / best).mean() > (refined / best).mean() + 0.05


@given(seed=st.integers(0, 10**6))
def test_a_further_domain_never_makes_a_layer_slower(seed: int) -> None:
    costs = made_costs(np.random.default_rng(seed), 3, 7)
    three = busy(costs, schedule(costs)).makespan_ns
    for domain in (ON_HOST, NEAR_DATA):
        part = costs.only(domain)
        assert (three <= busy(part, refine(part, greedy(part))).makespan_ns * (1 + 1e-12)).all()


def test_greedy_takes_the_cheapest_and_the_memory_for_idle_experts() -> None:
    costs = made_machine().costs(
        np.array([[5.0, 5.0, 5.0, 0.0]]),
        np.array([[True, False, False, False]]),
        np.array([[False, True, False, True]]),
        np.zeros((1, 4), dtype=np.int64),
    )
    assert [TIERS[d] for d in greedy(costs)[0]] == ["resident", "host", "near-data", "near-data"]
    assert np.array_equal(schedule(costs, is_refined=False), greedy(costs))
    assert UNIT_OF[[RESIDENT, COPIED]].tolist() == [0, 0]


def test_times_of_ones_own_are_scheduled_too() -> None:
    inf = np.inf
    times = np.array([[[inf, 9.0, 5.0, 4.0], [inf, 9.0, 5.0, 4.0], [1.0, inf, 5.0, 4.0]]])
    assert schedule(costs_of(times)).tolist() in ([[NEAR_DATA, ON_HOST, RESIDENT]], [[ON_HOST, NEAR_DATA, RESIDENT]])
    apart = costs_of(times, np.array([[0, 1, 0]]), 2)
    assert schedule(apart).tolist() == [[NEAR_DATA, NEAR_DATA, RESIDENT]]


def test_layers_are_scheduled_independently() -> None:
    costs = made_costs(np.random.default_rng(2), 5, 9)
    whole = schedule(costs)
    for layer in range(5):
        assert np.array_equal(schedule(costs.rows(np.array([layer])))[0], whole[layer])


def test_sixty_layers_of_160_experts_are_scheduled_in_less_than_a_second() -> None:
    rng = np.random.default_rng(3)
    machine = machine_of(TRIMOE, V2, 512, options=Options(ndp_computing_scale=0.25))
    tokens = np.minimum(rng.pareto(1.0, size=(60, 160)) * 5, 512).round()
    resident = tokens >= np.sort(tokens, axis=1)[:, -14:-13]
    home = np.broadcast_to(np.arange(160) % 16, tokens.shape)
    costs = machine.costs(tokens, resident, tokens > 20, home)
    began = time.monotonic()
    domain = schedule(costs, is_guarded=False)
    assert time.monotonic() - began < 1.0
    assert busy(costs, domain).makespan_ns.mean() < 0.9 * busy(costs, greedy(costs)).makespan_ns.mean()

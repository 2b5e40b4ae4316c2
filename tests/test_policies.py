"""Static placement policies fill memory in a stated order, and dispatches do what their sources say at each step.

All loads, sizes and costs here are made up for the tests.
"""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.placement import COPIED, ON_HOST, POLICIES, RESIDENT, Problem, place
from perfmodel.placement.dispatch import DISPATCHES, PUBLISHED_COSTS, Steps, makespan_ns

LOAD = np.array([[0.1, 0.5, 0.3, 0.1], [0.2, 0.4, 0.15, 0.25], [0.05, 0.8, 0.1, 0.05]])


def kept(policy: str, problem: Problem) -> list[tuple[int, int]]:
    found = POLICIES[policy](problem)
    assert found.dtype == np.int8 and found.shape == problem.load.shape
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(found == RESIDENT)]


def equal(n_kept: int, load: NDArray[np.float64] = LOAD, seed: int = 0) -> Problem:
    return Problem(load, np.full(load.shape, 7.0), 7.0 * n_kept, seed=seed)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("uniform", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]),  # the first layers have one more
        ("front-loading", [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]),
        ("back-loading", [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]),
        ("ascending", [(0, 1), (0, 2), (1, 1), (1, 3), (2, 1)]),
        ("per-layer", [(0, 1), (0, 2), (1, 1), (1, 3), (2, 1)]),
        ("descending", [(0, 0), (0, 3), (1, 0), (1, 2), (2, 3)]),
        ("frequency", [(0, 1), (0, 2), (1, 1), (1, 3), (2, 1)]),
        ("fiddler", [(0, 1), (0, 2), (1, 1), (1, 3), (2, 1)]),
    ],
)
def test_five_of_twelve_equal_experts_are_kept_as_the_policy_says(policy: str, expected: list[tuple[int, int]]) -> None:
    assert kept(policy, equal(5)) == expected


def test_a_remainder_goes_to_the_first_layers_or_to_those_that_use_their_next_expert_most() -> None:
    load = LOAD[::-1]
    assert kept("ascending", equal(4, load)) == [(0, 1), (0, 2), (1, 1), (2, 1)]
    assert kept("per-layer", equal(4, load)) == [(0, 1), (1, 1), (2, 1), (2, 2)]
    assert kept("frequency", equal(4, load)) == [(0, 1), (1, 1), (2, 1), (2, 2)]


def test_random_depends_on_its_seed_alone_and_draws_from_all_layers() -> None:
    load = np.full((20, 30), 1 / 30)
    first, again, other = (kept("random", equal(300, load, seed)) for seed in (1, 1, 2))
    assert first == again != other and len(first) == 300
    per_layer = np.bincount([layer for layer, _ in first], minlength=20)
    assert per_layer.min() < 15 < per_layer.max() and per_layer.min() > 5


def order_of(policy: str, problem: Problem) -> list[tuple[int, int]]:
    """The order in which a policy keeps experts, spelled out."""
    n_layers, n_experts = problem.load.shape
    pairs = [(layer, expert) for layer in range(n_layers) for expert in range(n_experts)]

    def rank(pair: tuple[int, int]) -> int:
        row = list(problem.load[pair[0]])
        return sorted(range(n_experts), key=lambda e: (-row[e], e)).index(pair[1])

    load = {pair: float(problem.load[pair]) for pair in pairs}
    keys = {
        "uniform": lambda p: (p[1], p[0]),
        "front-loading": lambda p: p,
        "back-loading": lambda p: (-p[0], p[1]),
        "ascending": lambda p: (rank(p), p[0]),
        "per-layer": lambda p: (rank(p), -load[p], p[0]),
        "descending": lambda p: (-rank(p), p[0]),
        "frequency": lambda p: (-load[p], p),
        "fiddler": lambda p: (-load[p], p),
    }
    return sorted(pairs, key=keys[policy])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    n_layers, n_experts = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    load = rng.integers(0, 5, (n_layers, n_experts)).astype(float)  # few values, so that ties are frequent
    size = rng.integers(1, draw(st.sampled_from([2, 4, 100])), load.shape).astype(float)
    capacity = float(draw(st.integers(0, int(size.sum()) + 1)))
    layer = draw(st.none() | st.integers(0, int(size.sum(axis=1).max()) + 1))
    return Problem(load, size, capacity, None if layer is None else float(layer), draw(st.integers(0, 99)))


@pytest.mark.parametrize("policy", POLICIES)
@given(problem=problems())
@settings(max_examples=60)
def test_memory_is_never_exceeded_and_what_is_free_is_too_small_for_any_expert_outside(
    policy: str, problem: Problem
) -> None:
    size, is_kept = problem.size_bytes, POLICIES[policy](problem) == RESIDENT
    layer_room = np.inf if problem.layer_capacity_bytes is None else problem.layer_capacity_bytes
    free = problem.capacity_bytes - size[is_kept].sum()
    layer_free = layer_room - np.where(is_kept, size, 0).sum(axis=1, keepdims=True)
    assert free >= 0 and (layer_free >= 0).all()
    assert (size[~is_kept] > np.broadcast_to(np.minimum(free, layer_free), size.shape)[~is_kept]).all()


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "random"])
@given(problem=problems())
@settings(max_examples=60)
def test_experts_are_kept_in_order_and_those_that_do_not_fit_passed_over(policy: str, problem: Problem) -> None:
    sizes_differ = len(set(problem.size_bytes.ravel().tolist())) > 1
    if problem.layer_capacity_bytes is not None and sizes_differ:
        return  # two limits and unequal sizes: only what the test above says
    free, expected = problem.capacity_bytes, []
    layer_free = dict.fromkeys(range(len(problem.load)), problem.layer_capacity_bytes or 0.0)
    for layer, expert in order_of(policy, problem):
        size = float(problem.size_bytes[layer, expert])
        if size <= free and (problem.layer_capacity_bytes is None or size <= layer_free[layer]):
            expected.append((layer, expert))
            free -= size
            layer_free[layer] -= size
    assert kept(policy, problem) == sorted(expected)


@given(problem=problems())
@settings(max_examples=60)
def test_frequency_covers_most_load_and_per_layer_orders_lie_between_worst_and_best(problem: Problem) -> None:
    n = int(np.random.default_rng(problem.seed).integers(0, problem.load.size + 1))
    same = equal(n, problem.load)
    covered = {name: float(problem.load[decide(same) == RESIDENT].sum()) for name, decide in POLICIES.items()}
    assert covered["frequency"] == pytest.approx(np.sort(problem.load, axis=None)[::-1][:n].sum())
    assert max(covered.values()) == pytest.approx(covered["frequency"])
    whole = equal(n // len(problem.load) * len(problem.load), problem.load)  # no remainder
    covered = {name: float(problem.load[decide(whole) == RESIDENT].sum()) for name, decide in POLICIES.items()}
    assert covered["descending"] <= covered["uniform"] <= covered["ascending"]
    assert covered["per-layer"] == pytest.approx(covered["ascending"])


@given(problem=problems(), frac=st.floats(0, 1))
@settings(max_examples=60)
def test_a_fraction_of_each_layer_leaves_each_layer_the_same_number(problem: Problem, frac: float) -> None:
    n_experts = problem.load.shape[1]
    for policy in POLICIES:
        gone = place(problem.load, frac, policy).offloaded.sum(axis=1)
        assert (gone == int(np.floor(frac * n_experts + 0.5))).all()
    least_first = n_experts - 1 - np.argsort(problem.load[:, ::-1], axis=1, kind="stable")
    for row, (tier, order) in enumerate(zip(place(problem.load, frac).tier, least_first, strict=True)):
        assert sorted(np.flatnonzero(tier)) == sorted(order[: gone[row]])


def test_a_large_model_is_placed_in_milliseconds() -> None:
    rng = np.random.default_rng(0)
    load = rng.dirichlet(np.ones(256), size=61)
    problem = Problem(load, rng.integers(1, 50, load.shape).astype(float), 1e5)
    for decide in POLICIES.values():
        start = time.perf_counter()
        for _ in range(5):
            decide(problem)
        assert (time.perf_counter() - start) / 5 < 0.05  # 1 ms on an idle core


def test_what_cannot_be_placed_is_refused_in_one_sentence() -> None:
    for load, size, capacity, words in [
        (LOAD, np.ones((3, 5)), 1.0, "both .layer, expert."),
        (LOAD[0], np.ones(4), 1.0, "both .layer, expert."),
        (-LOAD, np.ones((3, 4)), 1.0, "loads of at least 0"),
        (LOAD * np.nan, np.ones((3, 4)), 1.0, "loads of at least 0"),
        (LOAD, np.zeros((3, 4)), 1.0, "sizes above 0"),
        (LOAD, np.ones((3, 4)), -1.0, "capacity of at least 0"),
        (LOAD, np.ones((3, 4)), float("nan"), "capacity of at least 0"),
        (LOAD, np.ones((3, 4)), float("inf"), "finite capacity"),
    ]:
        with pytest.raises(InputError, match=words):
            Problem(load, size, capacity)
    with pytest.raises(InputError, match="layer of at least 0"):
        Problem(LOAD, np.ones((3, 4)), 1.0, -1.0)
    with pytest.raises(InputError, match="unknown placement policy 'best'; known: ascending, "):
        place(LOAD, 0.5, "best")


@st.composite
def made_steps(draw: st.DrawFn, most: int = 9) -> Steps:
    shape = draw(st.integers(1, 4)), draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = rng.integers(1, 40, shape) * (rng.random(shape) < draw(st.floats(0.2, 1)))
    gpu, fetch, host = 5 + 3 * rng.random(shape) + 0.3 * tokens, 20 + 20 * rng.random(shape), 8 + 2.0 * tokens
    return Steps(tokens, rng.random(shape) < draw(st.floats(0, 1)), gpu, fetch, host)


def makespan_of(s: Steps, row: int, tiers: list[int]) -> float:
    """The makespan of one row, item by item."""
    gpu = link = host = 0.0
    copied = []
    for expert, tier in enumerate(tiers):
        if s.tokens[row, expert] == 0:
            continue
        if tier == ON_HOST:
            host += s.host_ns[row, expert]
        else:
            gpu += s.gpu_ns[row, expert]
        if tier == COPIED:
            link += s.fetch_ns[row, expert]
            copied.append(s.gpu_ns[row, expert])
    return max(gpu, host, link + min(copied, default=0.0))


def hybrimoe_of(s: Steps, row: int) -> list[int]:
    """HybriMoE's schedule of one row with two pointers into a list."""
    awake = [e for e in range(s.tokens.shape[1]) if s.tokens[row, e]]
    todo = sorted(awake, key=lambda e: (not s.resident[row, e], -s.tokens[row, e], e))
    tiers = [RESIDENT] * s.tokens.shape[1]
    gpu = link = host = 0.0
    while todo:
        heavy, light = todo[0], todo[-1]
        arrived = link if s.resident[row, heavy] else link + s.fetch_ns[row, heavy]
        begin = gpu if s.resident[row, heavy] else max(gpu, arrived)
        by_gpu, by_host = begin + s.gpu_ns[row, heavy], host + s.host_ns[row, light]
        if by_host < by_gpu:
            todo.pop()
            tiers[light], host = ON_HOST, by_host
        else:
            todo.pop(0)
            tiers[heavy] = RESIDENT if s.resident[row, heavy] else COPIED
            gpu, link = by_gpu, arrived
    return tiers


def fiddler_of(s: Steps, row: int) -> list[int]:
    """The split of one row that minimises the sum of costs, out of all splits."""
    options = [
        tiers for tiers in splits_of(s, row) if all(not s.resident[row, e] or t == 0 for e, t in enumerate(tiers))
    ]

    def cost(tiers: list[int]) -> tuple[float, int]:
        each = {RESIDENT: s.gpu_ns, COPIED: s.fetch_ns + s.gpu_ns, ON_HOST: s.host_ns}
        return sum(each[t][row, e] for e, t in enumerate(tiers) if s.tokens[row, e]), tiers.count(ON_HOST)

    return min(options, key=cost)


def splits_of(s: Steps, row: int) -> list[list[int]]:
    """Every way to share the experts with tokens between device and host."""
    device = [RESIDENT if there else COPIED for there in s.resident[row]]
    each = [[d, ON_HOST] if n else [RESIDENT] for d, n in zip(device, s.tokens[row], strict=True)]
    return [list(one) for one in itertools.product(*each)]


@given(steps=made_steps())
@settings(max_examples=80)
def test_dispatches_agree_with_loops_over_experts(steps: Steps) -> None:
    for row in range(len(steps.tokens)):
        outside = [bool(n) and not there for n, there in zip(steps.tokens[row], steps.resident[row], strict=True)]
        expected = {
            "all-host": [ON_HOST if out else RESIDENT for out in outside],
            "all-copied": [COPIED if out else RESIDENT for out in outside],
            "hybrimoe": hybrimoe_of(steps, row),
        }
        if len(outside) <= 6:
            expected["fiddler"] = fiddler_of(steps, row)
        for name, tiers in expected.items():
            assert DISPATCHES[name](steps)[row].tolist() == tiers, name


@given(steps=made_steps())
@settings(max_examples=80)
def test_every_dispatch_says_who_computes_each_expert_with_tokens_and_nothing_of_others(steps: Steps) -> None:
    for dispatch in DISPATCHES.values():
        tiers = dispatch(steps)
        assert tiers.shape == steps.tokens.shape and tiers.dtype == np.int8
        assert (tiers[steps.tokens == 0] == RESIDENT).all()
        assert (tiers[steps.resident] != COPIED).all()
        assert (tiers[~steps.resident & (steps.tokens > 0)] != RESIDENT).all()
        one_by_one = [makespan_of(steps, row, list(tiers[row])) for row in range(len(tiers))]
        assert makespan_ns(steps, tiers) == pytest.approx(one_by_one)


@given(steps=made_steps(most=40))
@settings(max_examples=60)
def test_balanced_is_never_longer_than_any_other_and_no_single_move_makes_it_shorter(steps: Steps) -> None:
    found = DISPATCHES["balanced"](steps)
    spans = makespan_ns(steps, found)
    for dispatch in DISPATCHES.values():
        assert (spans <= makespan_ns(steps, dispatch(steps)) * (1 + 1e-9)).all()
    for expert in range(steps.tokens.shape[1]):
        moved = found == ON_HOST
        moved[:, expert] ^= True
        assert (makespan_ns(steps, steps.tiers(moved)) >= spans * (1 - 1e-8)).all()


def test_balanced_is_near_the_best_of_all_splits() -> None:
    rng = np.random.default_rng(1)
    gaps = []
    for _ in range(25):
        tokens = rng.integers(0, 30, (20, 8))
        resident = rng.random(tokens.shape) < rng.random()
        gpu, fetch = 5 + 3 * rng.random(tokens.shape), 40 * rng.random(tokens.shape)
        steps = Steps(tokens, resident, gpu, fetch, 4 + rng.uniform(0.3, 3) * tokens)
        halves = [np.broadcast_to(np.array(bits, bool), tokens.shape) for bits in itertools.product((0, 1), repeat=8)]
        best = np.min([makespan_ns(steps, steps.tiers(half)) for half in halves], axis=0)
        gaps.append(makespan_ns(steps, DISPATCHES["balanced"](steps)) / best - 1)
    gap = np.concatenate(gaps)
    assert gap.min() > -1e-9
    assert gap.mean() < 0.003 and gap.max() < 0.25 and (gap < 1e-9).mean() > 0.9


def test_fiddler_computes_fewer_than_ten_tokens_on_the_cpu_with_its_constants() -> None:
    tokens = np.arange(1, 31).reshape(1, -1)
    found = DISPATCHES["fiddler"](PUBLISHED_COSTS["fiddler"].steps(tokens, np.zeros(tokens.shape, dtype=bool)))
    assert found[0].tolist() == [ON_HOST] * 9 + [COPIED] * 21


def test_hybrimoe_with_its_constants_by_hand() -> None:
    # In order: expert 1 (resident, 4 tokens), 3 (9 tokens), 0 (5), 4 (1). Device: 0.5 for 1 beats the CPU's 1.79 for 4;
    # then 3 arrives at 0.418 and is done at 1.0; 0 arrives at 0.836, done at 1.5; 4 would be done at 2.0, the CPU is at
    # 1.79.
    tokens, resident = np.array([[5, 4, 0, 9, 1]]), np.array([[False, True, True, False, False]])
    found = DISPATCHES["hybrimoe"](PUBLISHED_COSTS["hybrimoe"].steps(tokens, resident))
    assert found.tolist() == [[COPIED, RESIDENT, RESIDENT, COPIED, ON_HOST]]


def test_hybrimoe_lets_the_cpu_take_the_lightest_resident_expert_when_the_device_is_slow() -> None:
    tokens, one = np.array([[8, 2, 1]]), np.ones((1, 3))
    steps = Steps(tokens, np.ones((1, 3), dtype=bool), 12 * one, 5 * one, 1.0 * tokens)
    assert DISPATCHES["hybrimoe"](steps).tolist() == [[ON_HOST, ON_HOST, ON_HOST]]
    faster = Steps(tokens, steps.resident, 10 * one, 5 * one, 1.0 * tokens)
    assert DISPATCHES["hybrimoe"](faster).tolist() == [[RESIDENT, ON_HOST, ON_HOST]]


def test_draws_go_to_the_device() -> None:
    one = np.ones((1, 1))
    for tokens, resident in ((3, True), (3, False)):
        draw = Steps(np.full((1, 1), tokens), np.full((1, 1), resident), 2 * one, 3 * one, (2 if resident else 5) * one)
        assert DISPATCHES["hybrimoe"](draw).tolist() == DISPATCHES["fiddler"](draw).tolist() == [[int(not resident)]]


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    one = np.ones((1, 3))
    for wrong in (-1.0, np.inf, np.nan):
        with pytest.raises(InputError, match="fetch_ns holds values"):
            Steps(np.ones((1, 3), dtype=np.int64), np.ones((1, 3), dtype=bool), one, wrong * one, one)
    with pytest.raises(InputError, match="expected all of one"):
        Steps(np.ones((1, 3), dtype=np.int64), np.ones((1, 4), dtype=bool), one, one, one)

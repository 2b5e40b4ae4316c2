"""What a campaign plans: every point conserves tokens x top-k, every beginning of the plan is a usable design."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest

from collectors import design, studies, words, workloads
from collectors.design import Point, point_s, resident_twin, spread_order
from collectors.facts import assumed_facts, facts_of
from collectors.plan import DTYPES
from collectors.timing import CUDA, STANDARD
from collectors.workloads import Workload, choices, offloaded_experts, scaled_shape
from perfmodel.errors import InputError
from perfmodel.routing import expected_counts, pattern_shares

CUDA_FACTS = assumed_facts("cuda", ("bfloat16", "float8_e4m3fn"))
CPU_FACTS = dataclasses.replace(
    assumed_facts("cpu", ("float32", "bfloat16")), pool_limit_bytes=6e9, memory_limit_bytes=10e9
)


@pytest.fixture(scope="module", params=["cuda", "cpu"])
def planned(request) -> list[Point]:
    return design.design(CUDA_FACTS if request.param == "cuda" else CPU_FACTS, "standard", 0, {})[0]


@pytest.fixture(scope="module")
def on_cuda() -> list[Point]:
    return design.design(CUDA_FACTS, "standard", 0, {})[0]


def test_plans_are_the_same_every_time_and_hold_no_point_twice(planned):
    device = planned[0].workload.device
    again, _ = design.design(CUDA_FACTS if device == "cuda" else CPU_FACTS, "standard", 0, {})
    assert again == planned
    assert len({p.workload.id for p in planned}) == len(planned)


def test_every_point_conserves_tokens_times_top_k_and_survives_the_file(planned):
    for p in planned:
        w = p.workload
        assert sum(w.tokens_per_expert) == w.n_tokens * w.top_k
        assert max(w.tokens_per_expert) <= w.n_tokens and len(w.tokens_per_expert) == w.n_experts
        line = w.to_line()
        assert Workload.from_line({**line, "study": p.study}) == w and line["workload"] == w.id


def test_offloaded_experts_are_named_and_follow_their_resident_twin(on_cuda):
    seen: set[str] = set()
    for w in (p.workload for p in on_cuda):
        if w.offloaded is None:
            assert (w.access, w.offload_frac, w.order, w.residency) == ("resident", 0.0, None, None)
        else:
            assert w.offload_frac == len(w.offloaded) / w.n_experts
            assert w.offloaded == tuple(sorted(set(w.offloaded))) and w.offloaded[-1] < w.n_experts
            assert (w.residency is not None) == (w.access == "zero-copy")
            assert resident_twin(w, "graph").id in seen
        seen.add(w.id)


def test_a_placement_is_measured_under_all_access_modes_in_one_go(on_cuda):
    ways = {("zero-copy", "mapped"), ("zero-copy", "split"), ("copy", None), ("copy-overlap", None), ("cpu", None)}
    found: dict[tuple[object, ...], set[tuple[str, str | None]]] = {}
    for w in (p.workload for p in on_cuda if p.study == "one-expert" and p.workload.offloaded):
        found.setdefault((w.shape, w.n_tokens), set()).add((w.access, w.residency))
    assert Counter(map(frozenset, found.values()))[frozenset(ways)] > 15


@pytest.mark.parametrize("n_first", [60, 150, 400])
def test_every_beginning_spans_the_design(on_cuda, n_first):
    first = [p.workload for p in on_cuda[:n_first]]
    assert {w.access for w in first} == set(workloads.ACCESS_MODES)
    assert {w.op for w in first} == set(workloads.OPS)
    assert len({w.shape for w in first}) >= 8 and len({w.routing for w in first}) >= 4
    assert max(w.n_tokens for w in first) / min(w.n_tokens for w in first) >= 4096
    assert {"graph", None} == {w.launch for w in first}
    assert len({p.study for p in on_cuda[:n_first]}) >= 12


def test_the_studies_ask_what_they_say(on_cuda):
    of = {}
    for p in on_cuda:
        of.setdefault(p.study, []).append(p.workload)
    per_expert = {max(w.tokens_per_expert) for w in of["rows"]}
    assert {1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 4096} <= per_expert
    assert all(sum(c > 0 for c in w.tokens_per_expert) == 1 for w in of["one-expert"])
    assert {w.n_experts for w in of["experts"]} == {8, 16, 32, 64, 128, 256}
    idle = [w for w in of["experts"] if w.routing.startswith("coverage")]
    assert {sum(c > 0 for c in w.tokens_per_expert) / w.n_experts for w in idle} == {1 / 4, 1 / 2}
    assert len({w.gemm_k * w.gemm_n * w.n_tokens * w.top_k for w in of["widths"] if w.n_tokens == 64}) == 1
    assert {w.dtype for w in of["second-dtypes"]} == {"fp8"}
    assert {(w.n_tokens, w.offload_frac) for w in of["published"] if w.offloaded} == {(65536, 5 / 16), (524288, 0.5)}
    assert {w.order for w in of["orders"] if w.offloaded} >= {"descending", "random"}
    assert all(w.routing.startswith("link-skew:60/") for w in of["link-skew"])
    assert {w.launch for w in of["eager"]} == {None}
    assert max(w.n_tokens for p in on_cuda for w in [p.workload]) == 524288


def test_a_cpu_host_offloads_nothing_and_measures_both_dtypes():
    points, _ = design.design(CPU_FACTS, "standard", 0, {})
    assert {p.workload.access for p in points} == {"resident"} and {p.workload.launch for p in points} == {None}
    assert {p.workload.dtype for p in points} == {"fp32", "bf16"}
    one = {max(p.workload.tokens_per_expert) for p in points if p.study == "one-expert"}
    assert {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024} <= one  # the table of latency against tokens per expert


def test_what_a_machine_cannot_do_is_not_planned():
    weak = dataclasses.replace(CUDA_FACTS, can=frozenset({"split"}), dtypes=("bf16",), host_limit_bytes=1e8)
    points, skipped = design.design(weak, "quick", 0, {})
    assert {p.workload.residency for p in points} <= {None, "split"} and {p.workload.launch for p in points} == {None}
    assert {p.workload.dtype for p in points} == {"bf16"}
    assert any("pinned in host memory" in sentence for sentence in skipped)


def test_what_is_left_out_is_counted(monkeypatch):
    tiny = dataclasses.replace(CPU_FACTS, memory_limit_bytes=50e6)
    n_all = len(design.design(CPU_FACTS, "standard", 0, {})[0])
    _, before = design.design(CPU_FACTS, "standard", 0, {})
    points, skipped = design.design(tiny, "standard", 0, {})

    def n_skipped(sentences):
        return sum(int(sentence.split()[0]) for sentence in sentences)

    assert len(points) + n_skipped(skipped) == n_all + n_skipped(before)
    assert any("activations do not fit" in sentence for sentence in skipped)


def test_routing_files_are_measured_on_shapes_of_as_many_experts():
    shares = np.arange(1.0, 65.0)[None, :] / np.arange(1.0, 65.0).sum()
    points, _ = design.design(CPU_FACTS, "standard", 0, {"file:seen.npy@1": shares})
    found = [p.workload for p in points if p.study == "measured-routing"]
    assert found and {w.n_experts for w in found} == {64} and {w.routing for w in found} == {"file:seen.npy@1"}


# --- the order ---


def slow_order(points: np.ndarray) -> list[int]:
    """Farthest-point order by plain loops."""
    low, high = points.min(axis=0), points.max(axis=0)
    x = [(row - low) / np.maximum(high - low, 1e-9) for row in points]
    middle = np.median(x, axis=0)
    order = [min(range(len(x)), key=lambda i: (float(((x[i] - middle) ** 2).sum()), i))]
    while len(order) < len(x):
        rest = [i for i in range(len(x)) if i not in order]
        order.append(max(rest, key=lambda i: (min(float(((x[i] - x[j]) ** 2).sum()) for j in order), -i)))
    return order


def test_the_order_is_that_of_the_slow_twin_and_covers_ever_closer():
    points = np.random.default_rng(0).random((40, 3))
    order = spread_order(points)
    assert order == slow_order(points) and sorted(order) == list(range(40))
    x = (points - points.min(axis=0)) / (points.max(axis=0) - points.min(axis=0))
    gaps = [min(((x[i] - x[j]) ** 2).sum() for j in order[:n]) for n, i in enumerate(order) if n]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(gaps))


def test_equal_points_are_all_kept():
    assert sorted(spread_order(np.ones((5, 2)))) == [0, 1, 2, 3, 4]
    assert spread_order(np.ones((1, 2))) == [0]


# --- batches and shapes ---


def test_large_batches_are_dealt_out_from_their_expected_counts():
    shape = scaled_shape("e64-k8-h64-i32", "bf16")
    w = workloads.workload(shape, "moe_layer", None, 65536, "power-law:1.2", "cuda", 0, {})
    chosen = choices(w)
    assert chosen.shape == (65536, 8)
    counts = np.bincount(chosen.ravel(), minlength=64)
    assert (counts == expected_counts(pattern_shares("power-law:1.2", 64), 65536, 8)[0]).all()
    assert (np.sort(chosen, axis=1)[:, 1:] != np.sort(chosen, axis=1)[:, :-1]).all()  # no token meets an expert twice


def test_operations_and_dtypes_of_one_batch_share_their_draw():
    counts = {
        workloads.workload(scaled_shape("olmoe/4", dtype), op, None, 64, "mmlu-like", "cpu", 0, {}).tokens_per_expert
        for dtype in ("fp32", "bf16")
        for op in workloads.OPS
    }
    assert len(counts) == 1


def test_orders_of_offload():
    shares = np.array([[0.4, 0.1, 0.3, 0.2]])
    assert offloaded_experts(shares, 0.5, "ascending", 0) == (1, 3)
    assert offloaded_experts(shares, 0.5, "descending", 0) == (0, 2)
    assert offloaded_experts(shares, 1.0, "random", 0) == (0, 1, 2, 3)
    drawn = {offloaded_experts(shares, 0.5, "random", seed) for seed in range(20)}
    assert len(drawn) > 3 and all(len(experts) == 2 for experts in drawn)


def test_shapes_of_ones_own():
    shape = scaled_shape("e64-k8-h2048-i1024", "bf16")
    assert (shape.n_experts, shape.top_k, shape.hidden, shape.inter, shape.n_gemms) == (64, 8, 2048, 1024, 3)
    with pytest.raises(InputError, match="multiples of 16"):
        scaled_shape("e64-k8-h2048-i1000", "bf16")
    with pytest.raises(InputError, match="top-k 9 exceeds"):
        scaled_shape("e8-k9-h64-i64", "bf16")


def test_the_offloaded_rotate_copies_only():
    shape = scaled_shape("e64-k8-h1024-i512", "bf16")
    w = workloads.workload(shape, "grouped_gemm", shape.gemms[0], 1, "uniform", "cuda", 0, {})
    assert workloads.rotation(w, 200e6, 100)[1] > 1
    far = dataclasses.replace(w, offloaded=(0, 1), access="copy")
    n_copies, n_shifts = workloads.rotation(far, 200e6, 100)
    assert n_shifts == 1 and (n_copies - 1) * far.touched_bytes >= 200e6


# --- facts and words ---


def test_facts_take_what_was_measured_before_what_is_assumed():
    capture = {
        "settings": {"device": "cuda", "dtypes": ["bfloat16", "float8_e4m3fn"]},
        "machine": {"memory_bytes": 10**11, "gpu_memory_bytes": 8 * 10**10, "gpu_l2_bytes": 5 * 10**7},
        "calibration": {
            "bf16_gemm_flops_per_s": {"value": 7e14},
            "memory_stream_bytes_per_s": {"value": 3e12},
            "link_kernel_read_bytes_per_s": {"value": 4.5e10},
        },
        "capabilities": {"mapped": "the driver is too old", "split": None, "graph": None, "fp8": "not this card"},
    }
    facts = facts_of(capture)
    assert facts.can == {"split", "graph"} and facts.dtypes == ("bf16",)
    assert (facts.flops_per_s, facts.bytes_per_s, facts.link_bytes_per_s) == (7e14, 3e12, 4.5e10)
    assert facts.skew_ratio == 70.0  # 66.7 to one digit
    assert facts.pool_limit_bytes == pytest.approx(4.8e10) and facts.host_limit_bytes == 2**33


def test_plan_words_say_what_time_buys(on_cuda):
    seconds = [point_s(p.workload, CUDA_FACTS, CUDA) for p in on_cuda]
    assert all(s > 0 for s in seconds)
    lines = words.plan_words(on_cuda, seconds, 8, 3, ["3 points of the study x: too large"])
    assert f"{len(on_cuda)} workloads are planned" in lines[0] and "8 minutes in 3 runs" in lines[0]
    assert sum(int(line.split()[1]) for line in lines[2:2 + len(studies.STUDIES)] if line[0] != " " and
               line.split()[0] in studies.STUDIES) == len(on_cuda)  # fmt: skip
    assert lines[-1] == "left out: 3 points of the study x: too large"


def test_one_copy_serves_a_layer_that_pushes_itself_out():
    (large,) = (w for w in (design_point("deepseek-v3", 4096),))
    cold_bytes = 4 * 50 * 2**20
    assert large.touched_bytes > 2 * cold_bytes
    assert workloads.rotation(large, cold_bytes, 9) == (1, 1)
    assert workloads.pool_bytes([large], cold_bytes, 48e9) == large.moe_shape.layer_bytes
    assert workloads.rotation(large, large.touched_bytes, 9) == (2, 1)


def design_point(name: str, n_tokens: int) -> Workload:
    """The gate-and-up GEMM of a shape, all experts awake."""
    shape = scaled_shape(name, "bf16")
    return workloads.workload(shape, "grouped_gemm", shape.gemms[0], n_tokens, "uniform", "cuda", 0, {})


def test_what_a_gpu_plans_leaves_room_for_activations(on_cuda):
    """80 GB hold the pools of both dtypes and the activations, in and out, of the largest point."""
    points = [point.workload for point in on_cuda]
    pools = [
        workloads.pool_bytes([w for w in points if w.dtype == dtype], 4 * 50 * 2**20, CUDA_FACTS.pool_limit_bytes)
        for dtype in ("bf16", "fp8")
    ]
    assert sum(pools) + max(w.activation_bytes for w in points) < 0.9 * 80e9


def test_host_rates_that_were_measured_guide_the_guesses(on_cuda):
    on_host = next(p.workload for p in on_cuda if p.workload.access == "cpu" and p.workload.n_tokens >= 256)
    slow = dataclasses.replace(CUDA_FACTS, host_flops_per_s=1e9)
    assert design.call_s(on_host, slow) > 10 * design.call_s(on_host, CUDA_FACTS)


def test_guesses_grow_with_the_work():
    shape = scaled_shape("olmoe/4", DTYPES["float32"])
    costs = [
        point_s(workloads.workload(shape, "moe_layer", None, n, "uniform", "cpu", 0, {}), CPU_FACTS, STANDARD)
        for n in (1, 256, 65536)
    ]
    assert costs[0] <= costs[1] < costs[2]

"""Expert-parallel layers: who sends what, what that costs, and that nothing is faster than the machine is."""

import csv
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile, Quantity, hardware
from perfmodel.latency import load_model
from perfmodel.moe import MoEShape, shape
from perfmodel.physics.blas import FP32_DEFAULTS
from perfmodel.physics.tiled import TiledConstants
from perfmodel.placement.balance import map_of_slots
from perfmodel.placement.eplb import rebalance
from perfmodel.predict import basis_of, predict
from perfmodel.routing import MAX_DRAWN, Routing, drawn_choices, expected_counts, pattern_shares
from perfmodel.schedule import (
    DEFAULTS,
    SCHEDULES,
    Fabric,
    Layer,
    Link,
    Overheads,
    Traffic,
    fabric_of,
    layer_timeline,
    measures,
    overheads_of,
    traffic_of,
)
from perfmodel.schedule.closed import all_to_all_ns, chunk_rows, sent_rows
from perfmodel.schedule.costs import EXPERTS, compute_ns, link_ns, operator_ns
from perfmodel.schedule.traffic import layer_shares_of, traffic_from_shares

SXM = hardware("h100-sxm")
SMALL = MoEShape("made-up", n_experts=4, top_k=1, hidden=256, inter=512)
CLOSED = ("bulk", "chunked")
N_MANY = 2**17  # tokens so many that of a batch of four experts rows are drawn, not choices
HALVES = np.array([[0.5, 0.25, 0.125, 0.125]])


def made_up(**values: float) -> HardwareProfile:
    known = {"bf16_gemm_flops_per_s": 1e14, "memory_stream_bytes_per_s": 1e12, **values}
    return HardwareProfile(
        "made-up", "made up", "gpu", {k: Quantity(v, "assumed", "made up") for k, v in known.items()}
    )


LINKED = made_up(
    peer_link_all_to_all_bytes_per_s=1e11,
    peer_link_alpha_ns=1000.0,
    net_link_all_to_all_bytes_per_s=1e10,
    net_link_alpha_ns=3000.0,
)


def traffic_by_hand(rows: list[list[float]], gpu_of: list[int], top_k: int = 1) -> Traffic:
    """Tokens of one row each, so that a token goes to a GPU as often as a row does."""
    n_gpus = len(rows)
    between = np.array([[sum(r for r, g in zip(own, gpu_of, strict=True) if g == gpu) for gpu in range(n_gpus)]
                        for own in rows], dtype=np.float64)  # fmt: skip
    n_tokens = np.array([sum(own) / top_k for own in rows]).astype(np.int64)
    experts = np.arange(len(gpu_of))
    return Traffic(np.array(rows, dtype=np.float64), between, np.array(gpu_of), experts, n_tokens, top_k)


def layer_of(traffic: Traffic, one: MoEShape = SMALL, profile: HardwareProfile = LINKED, **more: object) -> Layer:
    fabric = fabric_of(profile, traffic.n_gpus, more.pop("gpus_per_node", None))  # type: ignore[arg-type]
    return Layer(basis_of(profile, one, None), one, traffic, fabric, **more)  # type: ignore[arg-type]


def test_rows_go_where_the_experts_are() -> None:
    found = traffic_from_shares(HALVES, SMALL, map_of_slots("x", np.arange(4)[None], np.zeros((1, 4), int), 2), N_MANY)
    assert found.rows / N_MANY == pytest.approx(np.repeat(HALVES, 2, axis=0), abs=0.01)
    assert (found.rows[0] != found.rows[1]).any()
    assert found.rows_between.tolist() == [[own[:2].sum(), own[2:].sum()] for own in found.rows]
    assert found.received.tolist() == [found.rows.sum(axis=0)[:2].tolist(), found.rows.sum(axis=0)[2:].tolist()]
    assert found.tokens.tolist() == found.rows_between.tolist()  # top-1: a token has one row


def test_copies_of_an_expert_share_its_tokens_and_sources_begin_with_different_ones() -> None:
    phy2log, copy_of = np.array([[0, 1, 2, 0, 3, 1]]), np.array([[0, 0, 0, 1, 0, 1]])
    twice = map_of_slots("x", phy2log, copy_of, 2)
    for n_tokens in (5, N_MANY):
        found = traffic_from_shares(HALVES, SMALL, twice, n_tokens)
        assert found.rows.sum(axis=1).tolist() == [n_tokens, n_tokens]
        assert found.tokens == pytest.approx(found.rows_between)
        for expert, (first, second) in ((0, (0, 3)), (1, (1, 5))):
            odd = found.rows[:, [first, second]].sum(axis=1) % 2  # to the first copy of one source, the other's second
            assert (found.rows[:, first] - found.rows[:, second]).tolist() == (odd * [1, -1]).tolist(), expert


@pytest.mark.parametrize(("n_experts", "top_k"), [(64, 8), (8, 2), (16, 1)])
@pytest.mark.parametrize("pattern", ["uniform", "power-law:0.5", "one-hot:2"])
def test_few_and_many_tokens_are_drawn_alike_and_experts_keep_their_shares(
    n_experts: int, top_k: int, pattern: str
) -> None:
    one, n_tokens = MoEShape("made-up", n_experts, top_k, 64, 64), MAX_DRAWN // n_experts
    few, many = (traffic_of(pattern, one, 4, n, seed=n) for n in (n_tokens, n_tokens + 1))
    ideal = expected_counts(pattern_shares(pattern, n_experts), n_tokens, top_k)[0]
    for found in (few, many):
        spread = np.sqrt(ideal * np.maximum(1 - ideal / n_tokens, 0) / 4) + 0.01 * ideal + 1
        assert (np.abs(found.rows.mean(axis=0) - ideal) < 5 * spread).all()
    assert many.received.sum(axis=1) == pytest.approx(few.received.sum(axis=1), rel=0.03, abs=1)
    assert many.tokens.sum(axis=0) == pytest.approx(few.tokens.sum(axis=0), rel=0.03, abs=1)
    noise = [found.rows.var(axis=0).sum() for found in (few, many)]
    assert noise[1] < 4 * noise[0] + 1 and noise[0] < 4 * noise[1] + 1


@pytest.mark.parametrize(
    ("pattern", "n_experts", "top_k"), [("power-law:3", 8, 2), ("zipf:1.0", 32, 4), ("uniform", 4, 4)]
)
def test_tokens_select_different_experts_and_steep_shares_are_kept(pattern: str, n_experts: int, top_k: int) -> None:
    shares, n_tokens = pattern_shares(pattern, n_experts), 100_000
    found = drawn_choices(shares, n_tokens, top_k, 0)
    assert (np.diff(np.sort(found, axis=1), axis=1) > 0).all()
    ideal = expected_counts(shares, n_tokens, top_k)[0]
    spread = np.sqrt(ideal * np.maximum(1 - ideal / n_tokens, 0)) + 1
    assert (np.abs(np.bincount(found.ravel(), minlength=n_experts) - ideal) < 5 * spread).all()
    hand = drawn_choices(np.array([[0.5, 0.5, 0.0, 0.0]]), 50, 2, 0)  # two experts have all
    assert (np.sort(hand, axis=1) == [0, 1]).all()


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(8, 2), (12, 3), (16, 1)]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 3, 50, 40_000]),
    st.sampled_from(["uniform", "power-law:2", "one-hot:1", "mmlu-like"]),
    st.integers(0, 4),
)
def test_every_row_arrives_once_and_tokens_are_between_rows_over_top_k_and_rows(
    experts: tuple[int, int], n_gpus: int, n_tokens: int, pattern: str, n_copies: int
) -> None:
    one = MoEShape("made-up", n_experts=experts[0], top_k=experts[1], hidden=64, inter=64)
    n_slots = experts[0] + n_copies * n_gpus if n_copies * n_gpus <= experts[0] * (n_gpus - 1) else experts[0]
    chosen = rebalance(layer_shares_of(pattern, one), n_slots, 1, 1, n_gpus)
    found = traffic_of(pattern, one, n_gpus, n_tokens, chosen, seed=n_copies)
    assert found.rows.sum() == found.rows_between.sum() == found.received.sum() == n_gpus * n_tokens * experts[1]
    assert (found.rows == np.floor(found.rows)).all()
    assert (found.tokens <= found.rows_between + 1e-9).all()
    assert (found.tokens <= n_tokens).all()
    assert (found.tokens * experts[1] >= found.rows_between - 1e-6).all()


def test_a_collective_takes_its_start_the_latency_and_the_busiest_link() -> None:
    layer = layer_of(traffic_by_hand([[10, 0, 4, 2], [8, 8, 0, 0]], [0, 0, 1, 1]))
    # GPU 0 sends 6 rows and receives 16; 512 bytes a row at 100 bytes per ns.
    assert link_ns(layer, layer.traffic.rows_between).tolist() == pytest.approx([16 * 5.12, 16 * 5.12])
    one = Overheads(1, collective_ns=20_000.0)
    assert all_to_all_ns(layer, layer.traffic.rows_between, one) == pytest.approx(21_000 + 16 * 5.12)
    twice = replace(one, work_factor=2.0)  # of what moves, not of the start
    assert all_to_all_ns(layer, layer.traffic.rows_between, twice) == pytest.approx(20_000 + 2 * (1000 + 16 * 5.12))


def test_the_bound_of_a_link_counts_both_ways_at_once() -> None:
    layer = layer_of(traffic_by_hand([[10, 0, 4, 2], [8, 8, 0, 0]], [0, 0, 1, 1]))
    # Dispatch and combine together carry 6 + 16 rows each way of each GPU, not twice the 16 of the busier.
    assert layer.bounds_ns["link"].tolist() == pytest.approx([22 * 5.12, 22 * 5.12])


def test_between_nodes_rows_cross_the_network_and_inside_the_peer_link() -> None:
    rows = [[1.0, 2, 30, 4], [0, 0, 0, 37], [37, 0, 0, 0], [0, 0, 37, 0]]
    layer = layer_of(traffic_by_hand(rows, [0, 1, 2, 3]), gpus_per_node=2)
    assert layer.fabric == Fabric(
        4,
        2,
        Link(1000.0, 1e11, ("peer_link_all_to_all_bytes_per_s", "peer_link_alpha_ns")),
        Link(3000.0, 1e10, ("net_link_all_to_all_bytes_per_s", "net_link_alpha_ns")),
    )
    # Network: GPU 0 sends 34 and receives 37, GPU 1 sends 37, GPU 2 sends 37, receives 30, GPU 3 receives 41.
    assert link_ns(layer, layer.traffic.rows_between).tolist() == pytest.approx(
        [37 * 51.2, 37 * 51.2, 37 * 51.2, 41 * 51.2]
    )
    assert all_to_all_ns(layer, layer.traffic.rows_between, Overheads(1)) == pytest.approx(23_000 + 41 * 51.2)
    alone = fabric_of(LINKED, 2, 1)  # one GPU in each node: nobody inside to talk to
    assert alone.inside.ns_per_byte == 0 and alone.between is not None


def test_nominal_links_count_by_the_share_that_is_reached() -> None:
    nominal = made_up(peer_link_peak_bytes_per_s=1e11)
    assert fabric_of(nominal, 4).inside == Link(2000.0, 8e10, ("peer_link_peak_bytes_per_s",))
    assert fabric_of(hardware("h100-sxm"), 16, 8).between == Link(5000.0, 4e10, ("net_link_peak_bytes_per_s",))


def test_capacity_pads_and_drops_by_hand() -> None:
    layer = layer_of(traffic_by_hand([[10, 0, 4, 2], [8, 8, 0, 0]], [0, 0, 1, 1]))
    whole = sent_rows(layer, Overheads(1, capacity_factor=None))
    assert whole.between.tolist() == [[10, 6], [16, 0]] and whole.computed.tolist() == [[18, 8], [4, 2]]
    padded = sent_rows(layer, Overheads(1, capacity_factor=0.0))  # to the fullest, 10
    assert padded.between.tolist() == [[20, 20], [20, 20]] and padded.computed.tolist() == [[20, 20], [20, 20]]
    assert padded.kept.sum() == 32
    even = sent_rows(layer, Overheads(1, capacity_factor=1.0))  # 16 tokens over 4 experts
    assert even.between.tolist() == [[8, 8], [8, 8]] and even.kept.tolist() == [[4, 0, 4, 2], [4, 4, 0, 0]]
    found = layer_timeline(layer, "bulk", Overheads(1, capacity_factor=1.0))
    assert found.dropped_frac == pytest.approx(1 - 18 / 32)
    assert found.sent_bytes == 2 * 16 * 512 and found.payload_bytes == 2 * (6 + 8) * 512
    assert found.padding_frac == pytest.approx(2 / 16)
    assert found.computed_padding_frac == pytest.approx(1 - 18 / 32)  # room for 4 rows of each GPU at 4 experts


@pytest.mark.parametrize("schedule", CLOSED)
def test_a_token_sent_once_to_each_gpu_crosses_as_a_token_and_is_computed_as_rows(schedule: str) -> None:
    # Of the 8 tokens of GPU 0 one has both rows on GPU 1, six have one there: 8 rows of 7 tokens. GPU 1: 5 of 5.
    rows, tokens = [[4.0, 4, 4, 4], [5.0, 0, 5, 6]], np.array([[7.0, 7], [5, 8]])
    layer = layer_of(replace(traffic_by_hand(rows, [0, 0, 1, 1], 2), tokens=tokens))
    usual = Overheads(1, collective_ns=20_000.0, n_chunks=2)
    by_row, once = (layer_timeline(layer, schedule, replace(usual, once_per_gpu=x)) for x in (False, True))
    n_pieces = 2 if schedule == "chunked" else 1
    assert by_row.phases["dispatch"] == pytest.approx(n_pieces * 21_000 + 8 * 5.12)
    assert once.phases["dispatch"] == once.phases["combine"] == pytest.approx(n_pieces * 21_000 + 7 * 5.12)
    assert once.sent_bytes == once.payload_bytes == 2 * 12 * 512
    assert once.bounds["link"] == pytest.approx(12 * 5.12)
    assert once.busy_ns == by_row.busy_ns
    with pytest.raises(InputError, match=r"capacity_factor is 0\.0, and tokens that are sent once"):
        replace(usual, capacity_factor=0.0, once_per_gpu=True)


def test_whole_rows_of_chunks_make_up_all_rows_and_spread() -> None:
    rows = np.array([[0.0, 1, 1, 1, 1, 1, 1, 1], [7, 8, 9, 10, 1000, 3, 2, 5]])
    found = chunk_rows(rows, 4)
    assert (found.sum(axis=0) == rows).all() and (found >= 0).all()
    assert (np.abs(found - rows / 4) < 1).all()
    assert found[:, 0].sum(axis=1).max() <= 3  # seven single rows are not all in one chunk


def test_bulk_is_its_phases_one_after_the_other() -> None:
    layer = layer_of(traffic_by_hand([[10, 0, 4, 2], [8, 8, 0, 0]], [0, 0, 1, 1]))
    one = Overheads(3, host_launch_ns=1000.0, collective_ns=20_000.0)
    found = layer_timeline(layer, "bulk", one)
    expected = sum(layer.compute_ns[name].max() for name in ("gate", "permute", "reduce"))
    expected += np.sum([layer.compute_ns[name] for name in EXPERTS], axis=0).max()
    expected += 1000 + 2 * (21_000 + 16 * 5.12)
    assert found.latency_ns == pytest.approx(expected)
    assert found.phases["launch"] == 1000 and found.phases["dispatch"] == pytest.approx(21_000 + 16 * 5.12)
    faster = layer_timeline(layer, "bulk", replace(one, work_factor=0.5))  # an engine that beats the model
    assert faster.bound_ns <= faster.latency_ns and faster.bounds["link"] == found.bounds["link"] / 2
    slow = layer_timeline(layer, "bulk", replace(one, n_launches=500))
    assert slow.latency_ns == slow.bounds["host"] == slow.bound_ns == 500_000
    assert slow.bottleneck == "launch"


def test_the_bottleneck_is_the_phase_whose_shortening_helps_most() -> None:
    layer = layer_of(traffic_of("uniform", shape("olmoe"), 8, 4096), shape("olmoe"), SXM)
    kept = Overheads(1, collective_ns=0.0, n_chunks=4)
    fast = replace(layer, fabric=Fabric(8, 8, Link(0.0, 1e15)))
    assert layer_timeline(fast, "chunked", kept).bottleneck == "gemm1"
    slow = replace(layer, fabric=Fabric(8, 8, Link(0.0, 1e9)))
    assert layer_timeline(slow, "chunked", kept).bottleneck in ("dispatch", "combine")
    assert layer_timeline(slow, "chunked", kept).latency_ns < layer_timeline(slow, "bulk", kept).latency_ns * 1.2


def test_fixed_time_and_moving_of_rows_go_to_phases_by_what_a_layer_of_a_cpu_was_counted_to_do() -> None:
    known = {"fp32_gemm_flops_per_s": 1e11, "memory_stream_bytes_per_s": 2e10, "n_cores_count": 1.0}
    cpu = replace(LINKED, device="cpu", quantities={k: Quantity(v, "assumed", "made up") for k, v in known.items()})
    one = MoEShape("made-up", n_experts=64, top_k=8, hidden=256, inter=128, dtype="fp32")
    layer = layer_of(traffic_of("uniform", one, 1, 100), one, cpu)
    found = {name: float(ns[0]) for name, ns in layer.compute_ns.items()}
    fixed_ns, passes = FP32_DEFAULTS.layer_ns, FP32_DEFAULTS.row_passes
    row_ns = passes * 100 * 8 * 4 / 2e10 * 1e9  # of each value of a row: 800 rows, 4 bytes
    token_ns = 2 * 100 * one.hidden * 4 / 2e10 * 1e9
    assert operator_ns(layer) == pytest.approx(fixed_ns / 14)
    assert found["permute"] == pytest.approx(fixed_ns * 5 / 14 + row_ns * one.hidden * 2 / 5)
    assert found["activation"] == pytest.approx(fixed_ns * 2 / 14 + row_ns * one.inter)
    assert found["reduce"] == pytest.approx(fixed_ns * 4 / 14 + row_ns * one.hidden * 3 / 5 + token_ns)
    gate_ns = 2 * 100 * one.hidden * one.n_experts / 1e11 * 1e9 + FP32_DEFAULTS.score_ns * 100 * one.n_experts
    assert found["gate"] == pytest.approx(fixed_ns * 3 / 14 + gate_ns)
    gpu = layer_of(traffic_of("uniform", SMALL, 1, 100))
    assert operator_ns(gpu) == 0 and gpu.compute_ns["gate"][0] > TiledConstants().layer_ns


@pytest.mark.parametrize("name", ["olmoe", "mixtral-8x7b"])
@pytest.mark.parametrize("model", [None, "h100-sxm-vllm-triton-bf16"])
@pytest.mark.parametrize("offload_frac", [0.0, 0.5])
def test_on_one_gpu_the_phases_are_what_predict_says_of_the_layer(
    name: str, model: str | None, offload_frac: float
) -> None:
    one, fitted = shape(name), load_model(model) if model else None
    traffic = traffic_of("power-law", one, 1, 40_000)
    counts = Routing("drawn", traffic.rows.astype(np.int64), 40_000, one.top_k)
    tier = (np.arange(one.n_experts) >= one.n_experts * (1 - offload_frac)).astype(np.int8)  # least used first
    layer = Layer(basis_of(SXM, one, fitted), one, traffic, fabric_of(SXM, 1), tier, "zero-copy")
    said = predict(SXM, one, counts, offload_frac, "zero-copy", op="moe-layer", model=fitted, launch="graph")
    assert sum(layer.compute_ns.values())[0] == pytest.approx(said.latency_ns, rel=1e-9)
    for schedule in CLOSED:
        found = layer_timeline(layer, schedule)
        assert found.sent_bytes == 0 and "dispatch" not in found.phases
        assert found.latency_ns - found.phases["launch"] == pytest.approx(said.latency_ns)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["olmoe", "mixtral-8x7b", "deepseek-v3"]),
    st.sampled_from(["uniform", "power-law:1.2", "one-hot:2"]),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 11),
    st.sampled_from(SCHEDULES),
    st.sampled_from([None, 0.0, 1.0]),
    st.integers(1, 6),
)
def test_no_schedule_beats_the_machine_and_work_in_is_work_done(
    name: str, pattern: str, n_gpus: int, power: int, schedule: str, capacity: float | None, n_chunks: int
) -> None:
    one = shape(name)
    layer = layer_of(traffic_of(pattern, one, n_gpus, 2**power), one, SXM)
    once = capacity is None and n_chunks % 2 == 0
    overheads = replace(DEFAULTS[schedule], capacity_factor=capacity, n_chunks=n_chunks, once_per_gpu=once)
    found = layer_timeline(layer, schedule, overheads)
    assert found.latency_ns >= found.bound_ns * (1 - 1e-12)
    assert found.latency_ns == max(found.end_ns) == pytest.approx(max(s.start_ns + s.dur_ns for s in found.spans))
    assert found.payload_bytes <= found.sent_bytes and (found.dropped_frac == 0 or capacity == 1.0)
    if schedule == "fused":  # whose spans are what is under way, several phases at a time
        return
    sums = np.zeros(n_gpus)
    for span in found.spans:
        assert span.dur_ns > 0 and span.start_ns >= 0
        sums[span.gpu] += span.dur_ns if span.lane == "compute" else 0
    assert sums == pytest.approx(np.array(found.busy_ns))
    for gpu in range(n_gpus):
        for lane in ("compute", "send", "receive"):  # nothing does two things at once
            own = sorted((s.start_ns, s.start_ns + s.dur_ns) for s in found.spans if (s.gpu, s.lane) == (gpu, lane))
            assert all(a[1] <= b[0] * (1 + 1e-12) for a, b in itertools.pairwise(own))


def test_fitted_models_and_cpus_with_a_link_work_and_stay_above_the_bound() -> None:
    cpu = hardware("epyc-zen4-2c-fp32")
    cpu = replace(cpu, quantities={**cpu.quantities, "peer_link_peak_bytes_per_s": Quantity(1e9, "assumed", "made up")})
    fp32 = replace(shape("olmoe"), dtype="fp32")
    for profile, one, model in (
        (SXM, shape("olmoe"), "h100-sxm-sglang-triton-bf16"),
        (cpu, fp32, None),
        (cpu, fp32, "epyc-zen4-2c-fp32"),
    ):
        for pattern in ("uniform", "one-hot:3"):  # of the latter most GPUs have no row
            traffic = traffic_of(pattern, one, 4, 64)
            layer = Layer(
                basis_of(profile, one, load_model(model) if model else None), one, traffic, fabric_of(profile, 4)
            )
            for schedule in CLOSED:
                found = layer_timeline(layer, schedule)
                assert found.bound_ns <= found.latency_ns < 1e12


def test_chunks_read_weights_anew_and_rows_alike_cost_alike() -> None:
    one = shape("olmoe")
    layer = layer_of(traffic_of("uniform", one, 8, 32), one, SXM)
    whole, half = compute_ns(layer), compute_ns(layer, 0.5)
    assert (half["gemm1"] > 0.5 * whole["gemm1"]).all() and (half["gemm1"] <= whole["gemm1"]).all()
    again = compute_ns(layer, 1.0, layer.traffic.received)
    assert all((again[name] == whole[name]).all() for name in whole)


# Low-latency kernels of DeepEP (docs/legacy.md of its repository): H800, 8 in a node, a 400 Gb/s card each; 128 tokens
# of 7168 values, top-8, experts taken to be used evenly; GPUs, us of dispatch in fp8, us of combine in bf16.
DEEPEP = ((8, 77, 114), (16, 118, 195), (32, 155, 273), (64, 173, 314), (128, 192, 369), (256, 194, 360))


@pytest.mark.parametrize(("n_gpus", "dispatch_us", "combine_us"), DEEPEP)
def test_rates_and_latencies_that_nothing_was_fitted_to_give_what_deepep_measured(
    n_gpus: int, dispatch_us: float, combine_us: float
) -> None:
    h800 = made_up(peer_link_peak_bytes_per_s=200e9, net_link_peak_bytes_per_s=50e9)
    one = MoEShape("deepseek-v3", n_experts=256, top_k=8, hidden=7168, inter=2048)
    even = np.full((n_gpus, 256), 128 * 8 / 256)
    slots = np.arange(256)
    traffic = Traffic(even, np.ones((n_gpus, n_gpus)), slots * n_gpus // 256, slots, np.full(n_gpus, 128), 8)
    layer = Layer(basis_of(h800, one, None), one, traffic, fabric_of(h800, n_gpus, 8))
    fp8 = replace(layer, shape=replace(one, hidden=7168 // 2))  # bf16 rows of half as many values
    margin = 0.11 if n_gpus > 8 else 0.20
    for one_way, us in ((fp8, dispatch_us), (layer, combine_us)):
        assert all_to_all_ns(one_way, traffic.rows_between, DEFAULTS["chunked"]) == pytest.approx(us * 1e3, rel=margin)


def test_a_layer_of_a_file_is_counted_from_zero_and_a_file_of_one_layer_is_for_all(tmp_path: Path) -> None:
    counts = np.array([[1, 1, 1, 1], [5, 1, 1, 1], [1, 1, 1, 13]])
    for name, rows in (("three", counts), ("one", counts[1:2])):
        np.savez(tmp_path / f"{name}.npz", counts=rows)
    assert layer_shares_of(str(tmp_path / "three.npz"), SMALL, 2).tolist() == [[1 / 16, 1 / 16, 1 / 16, 13 / 16]]
    assert layer_shares_of(str(tmp_path / "one.npz"), SMALL, 2).tolist() == [[5 / 8, 1 / 8, 1 / 8, 1 / 8]]
    with pytest.raises(InputError, match="has 3 layers, none numbered 3; expected 0 to 2"):
        layer_shares_of(str(tmp_path / "three.npz"), SMALL, 3)
    with pytest.raises(InputError, match="is for 4 experts, the shape has 64"):
        layer_shares_of(str(tmp_path / "one.npz"), shape("olmoe"))


def test_published_identities(shared: Path) -> None:
    with (shared / "reference" / "flashmoe_latency.csv").open() as file:
        ms = {(r["system"], int(r["tokens_per_gpu"])): float(r["forward_ms"]) for r in csv.DictReader(file)}
    # 17.7 million tokens per second at 8 GPUs (Fig 10).
    assert measures.throughput_tokens_per_s(8192, 8, ms["flashmoe", 8192] * 1e6) == pytest.approx(17.7e6, rel=0.005)
    assert measures.overlap_efficiency(0.9, 1.0) == pytest.approx(0.9)


def test_symmetric_buffer_and_padding_by_hand() -> None:
    assert measures.symmetric_buffer_bytes(100.0, 8192, 32) == 400  # 256 tokens an expert fill a tile of 128
    assert measures.symmetric_buffer_bytes(100.0, 8192, 128) == 800  # 64 an expert fill half a tile
    assert measures.padding_saved_frac([128, 64, 0, 64], 128) == pytest.approx(0.5)
    with pytest.raises(InputError, match="more than the capacity"):
        measures.padding_saved_frac([129], 128)


def test_what_makes_no_sense_is_refused_in_one_sentence(tmp_path: Path) -> None:
    one = shape("olmoe")
    with pytest.raises(InputError, match=r"unknown schedule 'magic'; known: bulk, chunked, fused"):
        layer_timeline(layer_of(traffic_of("uniform", one, 2, 8), one, SXM), "magic")
    with pytest.raises(InputError, match="64 experts cannot be shared evenly by 5 GPUs"):
        traffic_of("uniform", one, 5, 64)
    with pytest.raises(InputError, match=r"'l40s' has no peer_link_peak_bytes_per_s, needed to reach other GPUs"):
        fabric_of(hardware("l40s"), 2)
    with pytest.raises(InputError, match=r"no net_link_peak_bytes_per_s"):
        fabric_of(made_up(peer_link_peak_bytes_per_s=1e9), 4, 2)
    with pytest.raises(InputError, match=r"12 GPUs in nodes of 8: expected whole nodes"):
        fabric_of(SXM, 12, 8)
    with pytest.raises(InputError, match="0 tokens on each GPU"):
        traffic_of("uniform", one, 2, 0)
    chosen = map_of_slots("x", np.arange(64)[None].repeat(3, axis=0), np.zeros((3, 64), int), 2)
    with pytest.raises(InputError, match="the map is for 2 GPUs, expected 4"):
        traffic_of("uniform", one, 4, 8, chosen)
    with pytest.raises(InputError, match="the map has 3 layers, none numbered 3; expected 0 to 2"):
        traffic_of("uniform", one, 2, 8, chosen, layer=3)
    with pytest.raises(InputError, match="the map does not hold each of the shape's 128 experts"):
        traffic_of("uniform", replace(one, n_experts=128), 2, 8, chosen)
    with pytest.raises(InputError, match="do not sum to its tokens x top-k"):
        Traffic(np.ones((1, 2)), np.ones((1, 1)), np.zeros(2, int), np.arange(2), np.array([3]), 1)
    for wrong in ({"n_launches": -1}, {"n_chunks": 0}, {"comm_sm_frac": 1.0}, {"work_factor": 0.0}):
        with pytest.raises(InputError):
            replace(overheads_of("bulk"), **wrong)  # type: ignore[arg-type]
    assert set(DEFAULTS) == set(SCHEDULES)

"""The fused schedule, tile by tile: by hand, against a simulation of one task after another, and conservation."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import InputError
from perfmodel.hardware import hardware
from perfmodel.moe import MoEShape
from perfmodel.placement import COPIED, NEAR_DATA
from perfmodel.predict import basis_of
from perfmodel.schedule import Fabric, Layer, Link, Overheads, Traffic, fabric_of, layer_timeline, traffic_of
from perfmodel.schedule.costs import EXPERTS
from perfmodel.schedule.events import GEMM1, GEMM2, REDUCE, Run, simulate
from perfmodel.schedule.fused import _shared
from perfmodel.schedule.tiles import Blocks, Plan, blocks_of, busy_ns, plan_of
from tests.fused_oracle import Oracle

SXM = hardware("h100-sxm")
SMALL = MoEShape("small-made", n_experts=8, top_k=2, hidden=512, inter=256)
ALONE = Overheads(n_launches=1, host_launch_ns=0.0, collective_ns=0.0)


def layer_made(shape: MoEShape, n_gpus: int, n_tokens: int, routing: str = "uniform") -> Layer:
    """A layer on H100s of one node."""
    traffic = traffic_of(routing, shape, n_gpus, n_tokens)
    return Layer(basis_of(SXM, shape, None), shape, traffic, fabric_of(SXM, n_gpus))


def plan_made(source: list[int], gpu: list[int], slot: list[int], rows: list[int], **more: object) -> Plan:
    """A plan with round durations: GEMM tasks of 10 and 20, 4 and 6 more with weights, sums of 1 per task."""
    columns = [np.array(column) for column in (source, gpu, slot, rows)]
    n_slots = int(max(slot)) + 1
    made = Plan(
        blocks=Blocks(*columns),
        n_processors=2,
        begin_ns=np.full(int(max(source + gpu)) + 1, 100.0),
        n_tiles=(2, 3, 1),
        gemm_ns=np.tile([[10.0, 14.0], [20.0, 26.0]], (n_slots, 1, 1)),
        reduce_ns=np.ones(len(rows)),
        hold_ns=np.zeros(n_slots),
        wire_ns=np.array(rows) * 1.0,
        lane=np.where(columns[0] == columns[1], -1, 0),
        alpha_ns=(5.0, 50.0),
    )
    return replace(made, **more)  # type: ignore[arg-type]


def test_one_block_on_one_gpu_by_hand() -> None:
    # 2 tasks on 2 processors: 100 to 114. Then 3 tasks: two rounds of 26, to 166. Then the sum.
    ran = simulate(plan_made([0], [0], [0], [128]))
    assert ran.tasks[0].tolist() == [[100, 114], [114, 166], [166, 167]]
    assert ran.end_ns.tolist() == [167]
    assert not ran.sends.any()


def test_a_second_block_of_an_expert_reads_no_weights_and_fills_the_free_processor() -> None:
    # Both blocks are ready at 100: first 100-114 and 100-114, second 114-124. At 114 the first's second GEMM is
    # ready, behind the second block's tasks: three tasks of 26 from 124, 124, and 150 on.
    ran = simulate(plan_made([0, 0], [0, 0], [0, 0], [128, 128]))
    assert ran.tasks[:, 0].tolist() == [[100, 114], [114, 124]]
    assert ran.tasks[0, 1].tolist() == [124, 176]
    assert ran.tasks[1, 1].tolist() == [150, 196]  # from 150, 170, and 176 on


def test_one_processor_runs_one_task_after_another() -> None:
    ran = simulate(plan_made([0, 0], [0, 0], [0, 0], [128, 1], n_processors=1))
    assert ran.end_ns[0] == 100 + 2 * 14 + 2 * 10 + 3 * 26 + 3 * 20 + 2 * 1


def test_a_block_travels_there_and_back_by_hand() -> None:
    # Sent 100-228 and received 105-233; computed to 233 + 14 + 52 = 299; sent back, received 304-432; summed.
    ran = simulate(plan_made([0], [1], [0], [128]))
    assert ran.sends[0].tolist() == [[100, 228], [299, 427]]
    assert ran.takes[0].tolist() == [[105, 233], [304, 432]]
    assert ran.end_ns.tolist() == [433, 100]


def test_a_receiver_takes_one_block_after_another() -> None:
    # Two GPUs send 128 and 64 rows to a third at once: the second comes in behind the first.
    ran = simulate(plan_made([0, 1], [2, 2], [0, 0], [128, 64]))
    assert ran.takes[:, 0].tolist() == [[105, 233], [233, 297]]


def test_links_inside_and_between_nodes_do_not_wait_for_each_other() -> None:
    ran = simulate(plan_made([0, 0], [1, 2], [0, 1], [128, 128], lane=np.array([0, 1])))
    assert ran.sends[:, 0].tolist() == [[100, 228], [100, 228]]
    assert ran.takes[:, 0].tolist() == [[105, 233], [150, 278]]


def test_blocks_go_to_all_gpus_in_turn_and_only_the_last_of_an_expert_is_short() -> None:
    rows = np.zeros((3, 3))
    rows[0] = [130, 300, 26]
    rows[1:, 0] = 456
    gpu = np.arange(3)
    traffic = Traffic(rows, np.minimum(rows, 228), gpu, gpu, np.full(3, 228), 2)
    layer = Layer(basis_of(SXM, SMALL, None), SMALL, traffic, fabric_of(SXM, 3))
    blocks = blocks_of(layer)
    mine = blocks.source == 0
    assert blocks.gpu[mine].tolist() == [0, 1, 2, 0, 1, 1]
    assert blocks.rows[mine].tolist() == [128, 128, 26, 2, 128, 44]
    assert np.array_equal(np.bincount(blocks.source * 3 + blocks.slot, blocks.rows, 9).reshape(3, 3), rows)


@st.composite
def plans_made(draw: st.DrawFn) -> Plan:
    """Plans of whole numbers, so that much happens at the same moment."""
    n_gpus, n_slots = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    gpu_of = draw(st.lists(st.integers(0, n_gpus - 1), min_size=n_slots, max_size=n_slots))

    def numbers(low: int, high: int, n: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=n, max_size=n))

    n_blocks = draw(st.integers(1, 9))
    source, slot = numbers(0, n_gpus - 1, n_blocks), numbers(0, n_slots - 1, n_blocks)
    gpu = [gpu_of[s] for s in slot]
    lane = [-1 if a == b else w for a, b, w in zip(source, gpu, numbers(0, 1, n_blocks), strict=True)]
    return plan_made(
        source,
        gpu,
        slot,
        numbers(1, 9, n_blocks),
        n_processors=draw(st.integers(1, 4)),
        begin_ns=np.array(numbers(0, 9, n_gpus), dtype=float),
        n_tiles=tuple(numbers(1, 5, 3)),
        gemm_ns=np.array(numbers(1, 9, max(slot) * 4 + 4), dtype=float).reshape(-1, 2, 2),
        reduce_ns=np.array(numbers(1, 5, n_blocks), dtype=float),
        hold_ns=np.array(numbers(0, 1, max(slot) + 1), dtype=float) * draw(st.integers(1, 20)),
        lane=np.array(lane),
        alpha_ns=tuple(map(float, numbers(0, 3, 2))),
    )


def assert_as_one_task_after_another(plan: Plan, ran: Run) -> None:
    slow = Oracle(plan)
    blocks = range(len(plan.blocks.rows))
    tasks = [[(slow.starts[s, b][0], slow.ends[s, b]) for s in (GEMM1, GEMM2, REDUCE)] for b in blocks]
    assert ran.tasks.tolist() == [[list(pair) for pair in of_block] for of_block in tasks]
    for mine, theirs in ((ran.sends, slow.sends), (ran.takes, slow.takes)):
        assert mine.tolist() == [[list(theirs.get((way, b), (0.0, 0.0))) for way in range(2)] for b in blocks]
    assert ran.end_ns.tolist() == slow.end_ns
    for g, n_tasks in zip((GEMM1, GEMM2, REDUCE), plan.n_tiles, strict=True):
        assert all(len(slow.starts[g, b]) == n_tasks for b in blocks)  # what came in was done
    worked = np.array([gpu.worked for gpu in slow.gpus]) / plan.n_processors
    assert sum(busy_ns(plan).values()) == pytest.approx(worked)
    idle = [np.diff(gaps).sum() / plan.n_processors for gaps in ran.idle]
    assert idle + worked == pytest.approx(ran.end_ns.max() - plan.begin_ns)


@settings(max_examples=150, deadline=None)
@given(plans_made())
def test_the_simulation_is_that_of_one_task_after_another(plan: Plan) -> None:
    assert_as_one_task_after_another(plan, simulate(plan))


@settings(max_examples=60, deadline=None)
@given(plans_made())
def test_what_moves_while_processors_are_idle_is_that_of_every_moment(plan: Plan) -> None:
    plan = replace(plan, hold_ns=np.zeros(len(plan.hold_ns)))
    ran, slow, blocks = simulate(plan), Oracle(plan), plan.blocks
    at = np.arange(ran.end_ns.max()) + 0.5  # all times are whole

    def n_on(spans: list[tuple[float, float]]) -> np.ndarray:
        return sum((np.where((start < at) & (at < end), 1.0, 0.0) for start, end in spans), np.zeros(len(at)))

    for gpu, begin in enumerate(plan.begin_ns):
        tasks = []
        for (stage, block), starts in slow.starts.items():
            if gpu == (blocks.source if stage == REDUCE else blocks.gpu)[block]:
                dur = slow.ends[stage, block] - max(starts)
                tasks += [(start, start + dur) for start in starts]
        idle = np.where(at < begin, 0.0, 1 - n_on(tasks) / plan.n_processors)
        moving = []
        for way, (sender, taker) in enumerate(((blocks.source, blocks.gpu), (blocks.gpu, blocks.source))):
            sends = [span for (w, block), span in slow.sends.items() if w == way and sender[block] == gpu]
            takes = [span for (w, block), span in slow.takes.items() if w == way and taker[block] == gpu]
            moving.append(n_on(sends + takes) > 0)
        both = np.maximum(np.sum(moving, axis=0), 1)
        found = _shared(plan, ran, {"gemm1": np.arange(9.0)}, gpu)
        assert found.work == {"gemm1": gpu}
        assert list(found.exposed_ns.values()) == pytest.approx([(idle * one / both).sum() for one in moving])
        assert found.hidden_ns == pytest.approx(((1 - idle) * np.any(moving, axis=0)).sum())


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.integers(1, 150), st.sampled_from(["uniform", "zipf:1.0"]))
def test_so_it_is_for_layers_of_a_machine(n_gpus: int, n_tokens: int, routing: str) -> None:
    shape = replace(SMALL, n_experts=6)
    plan = replace(plan_of(layer_made(shape, n_gpus, n_tokens, routing), 1.0), n_processors=11)
    assert_as_one_task_after_another(plan, simulate(plan))


@pytest.mark.parametrize("n_gpus", [1, 2, 8])
@pytest.mark.parametrize("n_tokens", [1, 100, 3000])
@pytest.mark.parametrize("routing", ["uniform", "zipf:1.2"])
def test_no_bound_is_beaten_and_nobody_computes_longer_than_the_run(n_gpus: int, n_tokens: int, routing: str) -> None:
    found = layer_timeline(layer_made(SMALL, n_gpus, n_tokens, routing), "fused")
    assert found.latency_ns >= max(found.bounds.values())
    assert max(found.busy_ns) + found.phases["launch"] <= found.latency_ns * (1 + 1e-12)
    assert found.latency_ns == max(found.end_ns)


def test_a_task_costs_its_tile_at_a_processors_share_of_the_gpu() -> None:
    shape = MoEShape("plain-made", n_experts=32, top_k=2, hidden=2048, inter=2048, n_gemms=2)
    layer = layer_made(shape, 8, 1024)
    plan = plan_of(layer, 1.0)
    assert (plan.n_processors, plan.n_tiles) == (2 * 132 - 1, (32, 32, 32))
    c = layer.basis.device.constants
    rows = (128 + c.tile_overhead_rows) / (1 + c.tile_overhead_rows / 256)
    cols = (64 + c.tile_overhead_cols) / (1 + c.tile_overhead_cols / 128)
    compute = 2 * rows * cols * (2048 + c.tile_overhead_terms) / (798e12 / 263) * 1e9
    # Of what a block of 128 rows reads and writes, and of an expert's weights, each of 32 tasks has its part.
    moved, weights = (n_values * 2 / 32 / (3e12 / 263) * 1e9 for n_values in (128 * (2048 + 2048), 2048 * 2048))
    p = c.smooth_p
    later = (compute**p + moved**p) ** (1 / p)
    first = (compute**p + (moved + weights) ** p) ** (1 / p)
    assert plan.gemm_ns[0] == pytest.approx(np.array([[later, first], [later, first]]))
    assert plan.wire_ns.sum() == pytest.approx(plan.blocks.rows[plan.lane >= 0].sum() * 2048 * 2 / (0.8 * 450))


def test_the_weighted_sum_takes_in_all_what_other_schedules_take() -> None:
    layer = layer_made(SMALL, 4, 300, "zipf:1.0")
    assert busy_ns(plan_of(layer, 1.0))["reduce"] == pytest.approx(layer.compute_ns["reduce"])


def test_a_block_of_one_row_costs_a_whole_row_of_tiles() -> None:
    short, full = (busy_ns(plan_of(one_expert(n_rows), 1.0)) for n_rows in (1, 128))
    assert short["gemm1"] == full["gemm1"]
    assert busy_ns(plan_of(one_expert(129), 1.0))["gemm1"] > 1.5 * full["gemm1"]
    padding = [layer_timeline(one_expert(n_rows), "fused").computed_padding_frac for n_rows in (1, 128, 129)]
    assert padding == pytest.approx([127 / 128, 0, 127 / 256])


def one_expert(n_rows: int) -> Layer:
    """One GPU with one expert."""
    rows, zero = np.array([[float(n_rows)]]), np.zeros(1, dtype=np.int64)
    shape = replace(SMALL, n_experts=1, top_k=1)
    traffic = Traffic(rows, rows, zero, zero, np.array([n_rows]), 1)
    return Layer(basis_of(SXM, shape, None), shape, traffic, fabric_of(SXM, 1))


@pytest.mark.parametrize("inside_gb_per_s", [25, 100, 450])
@pytest.mark.parametrize("routing", ["uniform", "zipf:1.0"])
def test_large_batches_take_as_long_as_the_busier_of_processors_and_links(inside_gb_per_s: int, routing: str) -> None:
    layer = layer_made(MoEShape("plain-made", 32, 2, 2048, 2048, 2), 8, 8192, routing)
    layer = replace(layer, fabric=Fabric(8, 8, Link(2000.0, inside_gb_per_s * 1e9)))
    found = layer_timeline(layer, "fused", ALONE)
    begin = found.phases["gate"] + found.phases["permute"]
    closed = max(*found.busy_ns, begin + found.bounds["link"])
    assert 0.99 * closed <= found.latency_ns < 1.04 * closed


def test_more_tokens_take_longer() -> None:
    latencies = [layer_timeline(layer_made(SMALL, 4, 2**i), "fused").latency_ns for i in range(13)]
    # Few tokens may take a little longer than some more: an expert that has only rows of others waits for the first of
    # them before it reads its weights.
    assert all(after >= 0.9 * before for before, after in itertools.pairwise(latencies))
    assert latencies[5:] == sorted(latencies[5:])
    assert latencies[-1] > 1.5 * latencies[0]


def test_turning_the_gpus_round_turns_the_results_round() -> None:
    layer = layer_made(SMALL, 4, 61, "zipf:1.0")
    found = layer_timeline(layer, "fused")
    old = layer.traffic
    turned = replace(
        old,
        rows=np.roll(old.rows, 1, axis=0),
        tokens=np.roll(old.tokens, (1, 1), axis=(0, 1)),
        gpu_of=(old.gpu_of + 1) % 4,
    )
    other = layer_timeline(replace(layer, traffic=turned), "fused")
    assert other.end_ns == pytest.approx(np.roll(found.end_ns, 1))
    assert other.busy_ns == pytest.approx(np.roll(found.busy_ns, 1))


def test_the_hottest_gpu_bounds_a_skewed_layer() -> None:
    even, skewed = (layer_timeline(layer_made(SMALL, 4, 4096, name), "fused") for name in ("uniform", "zipf:1.5"))
    hottest = max(skewed.busy_ns)
    assert skewed.latency_ns > 1.3 * even.latency_ns
    assert hottest <= skewed.latency_ns <= hottest + skewed.bounds["link"] + 20_000
    assert hottest == skewed.busy_ns[0] > 1.3 * skewed.busy_ns[3]


def test_experts_outside_device_memory_hold_their_gpu_up_by_what_they_add() -> None:
    layer = layer_made(SMALL, 2, 64)
    tier = np.array([COPIED, COPIED, 0, 0, 0, 0, 0, 0], dtype=np.int8)
    away = replace(layer, tier=tier, access="copy")
    found, resident = layer_timeline(away, "fused", ALONE), layer_timeline(layer, "fused", ALONE)
    added = away.compute_ns["offload"]
    assert added[0] > 0 == added[1]
    assert np.subtract(found.busy_ns, resident.busy_ns) == pytest.approx(added, abs=1e-6)
    assert found.phases["offload"] == pytest.approx(added[0])
    plan = plan_of(away, 1.0)
    assert plan.hold_ns[:3] == pytest.approx([added[0] / 2, added[0] / 2, 0])
    assert found.latency_ns == pytest.approx(resident.latency_ns + added[0], rel=0.2)


def test_misses_of_a_paged_memory_are_paid_whoever_has_the_rows() -> None:
    rows, index = np.zeros((1, 8)), np.zeros(8, dtype=np.int64)
    rows[0, :4] = 32
    traffic = Traffic(rows, np.array([[64.0]]), index, np.arange(8), np.array([64]), 2)
    basis = basis_of(SXM, SMALL, None)
    basis = replace(basis, device=replace(basis.device, n_slots=2))
    tier = np.array([0, 0, 0, 0, COPIED, COPIED, COPIED, COPIED], dtype=np.int8)
    layer = Layer(basis, SMALL, traffic, fabric_of(SXM, 1), tier, "paged")
    assert layer.compute_ns["offload"][0] > 0
    assert plan_of(layer, 1.0).hold_ns == pytest.approx(layer.compute_ns["offload"][0] / 4 * (np.arange(8) < 4))


def test_experts_whose_work_leaves_the_gpu_shorten_their_tasks_alone() -> None:
    machine = hardware("trimoe")
    shape = MoEShape("near-data-made", 128, 8, 2048, 768)
    traffic = traffic_of("uniform", shape, 1, 16)
    layer = Layer(basis_of(machine, shape, None), shape, traffic, fabric_of(machine, 1))
    tier = np.zeros(128, dtype=np.int8)
    tier[::2] = NEAR_DATA
    away = replace(layer, tier=tier, access="near-data")
    less = sum(away.compute_ns[name] - layer.compute_ns[name] for name in EXPERTS)[0]
    before, after = plan_of(layer, 1.0), plan_of(away, 1.0)
    assert less < 0
    assert np.array_equal(after.gemm_ns[1::2], before.gemm_ns[1::2])
    gone = sum(busy_ns(after)[name] - busy_ns(before)[name] for name in ("gemm1", "gemm2"))
    assert gone[0] == pytest.approx(less)


def test_the_work_factor_multiplies_all_but_the_launch() -> None:
    layer = layer_made(SMALL, 4, 300)
    once, twice = (layer_timeline(layer, "fused", Overheads(1, 7_000.0, work_factor=x)) for x in (1.0, 2.0))
    assert twice.latency_ns - 7_000 == pytest.approx(2 * (once.latency_ns - 7_000))
    assert twice.phases["dispatch"] == pytest.approx(2 * once.phases["dispatch"])
    assert twice.bounds == once.bounds
    fast = layer_timeline(layer, "fused", Overheads(1, 7_000.0, work_factor=0.1))  # an engine that beats the model
    assert fast.bounds["compute"] == pytest.approx(0.1 * once.bounds["compute"])
    assert fast.bound_ns <= fast.latency_ns


def test_spans_stay_few_and_lie_within_the_run() -> None:
    found = layer_timeline(layer_made(SMALL, 8, 4096, "zipf:1.0"), "fused")
    assert 8 * 9 <= len(found.spans) < 3000
    assert min(span.start_ns for span in found.spans) == found.phases["launch"]
    assert max(span.start_ns + span.dur_ns for span in found.spans) == pytest.approx(found.latency_ns)
    for gpu in range(8):  # spans of a phase do not overlap each other
        mine = sorted((s.start_ns, s.start_ns + s.dur_ns) for s in found.spans if s[:3] == (gpu, "compute", "gemm1"))
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(mine))


@pytest.mark.parametrize(("n_tokens", "gb_per_s"), [(4096, 25), (4096, 100), (4096, 450), (200, 450)])
@pytest.mark.parametrize("routing", ["uniform", "zipf:1.0"])
def test_shortening_the_bottleneck_shortens_the_layer_most(n_tokens: int, gb_per_s: int, routing: str) -> None:
    layer = layer_made(MoEShape("gated-made", 32, 4, 2048, 768), 8, n_tokens, routing)
    layer = replace(layer, fabric=Fabric(8, 8, Link(2000.0, gb_per_s * 1e9)))
    plan = plan_of(layer, 1.0)
    shorter = {
        "gate": replace(plan, begin_ns=plan.begin_ns - 0.1 * layer.compute_ns["gate"]),
        "permute": replace(plan, begin_ns=plan.begin_ns - 0.1 * layer.compute_ns["permute"]),
        "gemm1": replace(plan, gemm_ns=plan.gemm_ns * np.array([0.9, 1.0])[:, None]),
        "gemm2": replace(plan, gemm_ns=plan.gemm_ns * np.array([1.0, 0.9])[:, None]),
        "reduce": replace(plan, reduce_ns=plan.reduce_ns * 0.9),
        "dispatch": replace(plan, wire_ns=plan.wire_ns * 0.9),
    }
    latency = {name: simulate(other).end_ns.max() for name, other in shorter.items()}
    assert layer_timeline(layer, "fused").bottleneck == min(latency, key=lambda name: latency[name])


def test_two_nodes_keep_their_bounds_and_the_network_between_them_shows() -> None:
    layer = layer_made(SMALL, 4, 2048)
    slow = replace(layer, fabric=Fabric(4, 2, Link(2000.0, 360e9), Link(5000.0, 10e9)))
    one, two = (layer_timeline(each, "fused") for each in (layer, slow))
    assert two.latency_ns >= max(two.bounds.values())
    assert two.latency_ns > 2 * one.latency_ns
    assert two.bottleneck == "dispatch"


def test_a_gpu_without_tokens_only_serves_others() -> None:
    rows = np.array([[300.0, 300.0], [0.0, 0.0]])
    index = np.arange(2)
    traffic = Traffic(rows, rows, index, index, np.array([300, 0]), 2)
    layer = Layer(basis_of(SXM, SMALL, None), SMALL, traffic, fabric_of(SXM, 2))
    found = layer_timeline(layer, "fused", ALONE)
    assert found.end_ns[1] == layer.compute_ns["gate"][1] < found.end_ns[0]
    assert found.busy_ns[1] > found.end_ns[1]


def test_only_rows_that_were_asked_for_are_sent() -> None:
    layer = layer_made(SMALL, 4, 500, "zipf:1.0")
    found = layer_timeline(layer, "fused")
    remote = layer.traffic.rows_between.sum() - np.trace(layer.traffic.rows_between)
    assert found.sent_bytes == found.payload_bytes == 2 * remote * 512 * 2
    assert found.padding_frac == 0


def test_a_cpu_has_no_fused_kernel() -> None:
    cpu = hardware("xeon-spr")
    layer = Layer(basis_of(cpu, SMALL, None), SMALL, traffic_of("uniform", SMALL, 1, 64), Fabric(1, 1, Link(0.0, 1e9)))
    with pytest.raises(InputError, match="one kernel on a GPU"):
        layer_timeline(layer, "fused", ALONE)


def test_a_gpu_whose_sms_nobody_counted_is_refused() -> None:
    quantities = {key: value for key, value in SXM.quantities.items() if key != "n_cores_count"}
    layer = layer_made(SMALL, 2, 64)
    device = replace(layer.basis.device, profile=replace(SXM, quantities=quantities))
    with pytest.raises(InputError, match="no n_cores_count"):
        layer_timeline(replace(layer, basis=replace(layer.basis, device=device)), "fused")

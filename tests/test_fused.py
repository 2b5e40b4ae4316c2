"""The fused schedule, tile by tile: by hand, against a simulation of one task after another, and conservation."""

from dataclasses import replace

import numpy as np
import pytest

from perfmodel.errors import InputError
from perfmodel.hardware import hardware
from perfmodel.moe import MoEShape
from perfmodel.predict import basis_of
from perfmodel.schedule import Fabric, Layer, Link, Overheads, Traffic, fabric_of, layer_timeline, traffic_of
from perfmodel.schedule.events import simulate
from perfmodel.schedule.tiles import Blocks, Plan, blocks_of

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


@pytest.mark.parametrize("n_gpus", [1, 2, 8])
@pytest.mark.parametrize("n_tokens", [1, 100, 3000])
@pytest.mark.parametrize("routing", ["uniform", "zipf:1.2"])
def test_no_bound_is_beaten_and_nobody_computes_longer_than_the_run(n_gpus: int, n_tokens: int, routing: str) -> None:
    found = layer_timeline(layer_made(SMALL, n_gpus, n_tokens, routing), "fused")
    assert found.latency_ns >= max(found.bounds.values())
    assert max(found.busy_ns) + found.phases["launch"] <= found.latency_ns * (1 + 1e-12)
    assert found.latency_ns == max(found.end_ns)


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

"""The form of kernels on GPUs against numbers worked by hand, its conservation laws and its limits."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import physics
from perfmodel.physics import TILE_ROWS, Ceilings, Counts, Kernel, TiledConstants, Work, tiled

ROOF = Ceilings(1e12, 1e11, ())  # 1 TFLOP/s, 100 GB/s
PLAIN = TiledConstants(
    tile_overhead_rows=0.0,
    tile_overhead_cols=0.0,
    tile_overhead_terms=0.0,
    smooth_p=12.0,
    call_ns=0.0,
    expert_ns=0.0,
    layer_ns=0.0,
)
FORM = physics.form_of("gpu", "some kernel")
ANY = Kernel()


def work(
    rows: list[float],
    k: float = 1024,
    n: float = 512,
    layer: float = 0.0,
    eager: float = 0.0,
    tile: list[float] | None = None,
) -> Work:
    one, zero = np.ones(1), np.zeros(1, dtype=np.int64)
    return Work(
        counts=Counts(np.array([rows], dtype=float)),
        routing_of=zero,
        item_of=zero,
        k=np.array([[k, 0.0]]),
        n=np.array([[n, 0.0]]),
        layer=layer * one,
        router=layer * one,
        eager=eager * one,
        n_tokens=sum(rows) * one,
        hidden=k * one,
        inter=n * one,
        n_experts=len(rows) * one,
        weight_bytes=2.0,
        activation_bytes=2.0,
        tile=None if tile is None else np.array([tile]),
    )


def roofs(w: Work, c: TiledConstants, kernel: Kernel = ANY) -> tuple[float, float]:
    compute, memory = tiled.gemm_roofs(tiled.prepare(w, kernel), ROOF, c)[0]
    return float(compute[0]), float(memory[0])


def test_a_compute_bound_gemm_takes_flops_over_peak() -> None:
    compute, memory = roofs(work([10_240.0]), PLAIN)
    assert compute == pytest.approx(2 * 10_240 * 1024 * 512 / 1e12 * 1e9)
    assert memory == pytest.approx((1024 * 512 * 2 + 2 * 10_240 * (1024 + 512)) / 1e11 * 1e9)


def test_rows_and_columns_are_padded_to_tiles_and_idle_experts_read_nothing() -> None:
    compute, memory = roofs(work([1.0, 0.0], n=130), PLAIN)
    assert compute == pytest.approx(2 * 16 * 1024 * 256 / 1e12 * 1e9)  # one tile of 16 rows, two of 128 columns
    assert memory == pytest.approx((1024 * 130 * 2 + 2 * 1 * (1024 + 130)) / 1e11 * 1e9)


def test_the_cheapest_tile_is_chosen_for_all_experts_together() -> None:
    assert roofs(work([65.0]), PLAIN)[0] == pytest.approx(2 * 80 * 1024 * 512 / 1e12 * 1e9)  # five tiles of 16
    # 100 rows at 256 rows of overhead a tile, so that one of 256 costs 256: one tile of 128 costs (128 + 256) / 2.
    heavy = replace(PLAIN, tile_overhead_rows=256.0)
    assert roofs(work([100.0]), heavy)[0] == pytest.approx(2 * 192 * 1024 * 512 / 1e12 * 1e9)


def test_a_given_launch_configuration_decides_the_tile() -> None:
    given = [64.0, 256.0, 64.0, 1.0, 4.0, 3.0, 0.0]  # rows, cols, terms, group, warps, stages, is_tuned
    assert roofs(work([65.0], n=300, tile=given), PLAIN)[0] == pytest.approx(2 * 128 * 1024 * 512 / 1e12 * 1e9)
    # Twice the columns of a tile at an overhead of 128 columns: (256 + 128) / 2 for one of 256.
    wide = replace(PLAIN, tile_overhead_cols=128.0)
    assert roofs(work([64.0], n=256, tile=given), wide)[0] == pytest.approx(2 * 64 * 1024 * 192 / 1e12 * 1e9)


def test_pytorch_on_sm90_takes_its_tile_from_the_mean_rows_of_an_expert() -> None:
    rule = Kernel(sm90_rule=True)
    # 128 rows per expert on average: tiles of 64 x 128, also for the expert of 255 rows.
    few = roofs(work([255.0, 1.0]), PLAIN, rule)[0]
    assert few == pytest.approx(2 * (256 + 64) * 1024 * 512 / 1e12 * 1e9)
    # One row more: tiles of 128 x 256.
    many = roofs(work([256.0, 1.0]), PLAIN, rule)[0]
    assert many == pytest.approx(2 * (256 + 128) * 1024 * 512 / 1e12 * 1e9)
    # A narrow product keeps the small tile.
    assert roofs(work([1000.0], n=128), PLAIN, rule)[0] == pytest.approx(2 * 1024 * 1024 * 128 / 1e12 * 1e9)


def test_misaligned_rows_of_weights_slow_down_only_kernels_that_care() -> None:
    c = replace(PLAIN, misaligned_compute=4.0, misaligned_memory=1.5)
    odd, even = work([64.0], k=1000), work([64.0], k=1024)
    assert roofs(odd, c, Kernel(needs_alignment=True))[0] == pytest.approx(4 * roofs(odd, c)[0])
    assert roofs(even, c, Kernel(needs_alignment=True)) == roofs(even, c)
    with_it, without = roofs(odd, c, Kernel(needs_alignment=True))[1], roofs(odd, c)[1]
    assert with_it - without == pytest.approx(0.5 * 1000 * 512 * 2 / 100)


def test_overheads_of_a_layer_by_hand() -> None:
    c = replace(PLAIN, layer_ns=1000.0, expert_ns=10.0, call_ns=77.0, row_passes=3.0, token_passes=2.0)
    w = work([8.0, 8.0], layer=1.0)
    parts = tiled.other_parts(w, ROOF, c)
    assert parts["overhead"][0] == pytest.approx(1000 + 2 * 10)  # calls of a layer are part of its fixed time
    assert parts["permute"][0] == pytest.approx(2 * 3 * 16 * (1024 + 512) / 100)
    assert parts["combine"][0] == pytest.approx(2 * 2 * 16 * 1024 / 100)
    assert parts["router"][0] == pytest.approx(2 * 16 * 1024 * 2 / 1e12 * 1e9)
    bare = tiled.other_parts(work([8.0, 8.0]), ROOF, c)
    assert bare["overhead"][0] == pytest.approx(77 + 2 * 10)
    assert bare["permute"][0] == bare["combine"][0] == bare["router"][0] == 0


def test_a_launched_call_is_never_faster_than_its_host() -> None:
    c = replace(PLAIN, host_call_ns=5_000.0, host_layer_ns=90_000.0)
    small = FORM.resident_parts(work([1.0], eager=1.0), ROOF, c)
    device = physics.total(FORM.resident_parts(work([1.0]), ROOF, c))[0]
    assert device < 20_000
    assert physics.total(FORM.resident_parts(work([1.0], eager=1.0, layer=1.0), ROOF, c))[0] == pytest.approx(95_000)
    assert small["launch"][0] == max(5_000.0 - device, 0.0)
    large = FORM.resident_parts(work([1e6], eager=1.0), ROOF, c)
    assert large["launch"][0] == 0


ROWS = st.lists(st.integers(0, 3000), min_size=1, max_size=12).filter(any)


@given(rows=ROWS, layer=st.sampled_from([0.0, 1.0]), overhead=st.floats(0, 500), p=st.floats(1, 12))
def test_parts_sum_to_the_latency_which_no_roof_undercuts(
    rows: list[int], layer: float, overhead: float, p: float
) -> None:
    c = TiledConstants(tile_overhead_rows=overhead, smooth_p=p)
    w = work([float(r) for r in rows], layer=layer)
    parts = FORM.resident_parts(w, ROOF, c)
    latency = physics.total(parts)[0]
    assert latency == pytest.approx(sum(v[0] for v in parts.values()))
    assert all(v[0] >= 0 for v in parts.values())
    assert latency >= max(roofs(w, c)) * (1 - 1e-9)


@given(rows=ROWS, sm90=st.booleans(), k=st.sampled_from([100.0, 1024.0]))
def test_the_roofs_of_experts_sum_to_those_of_all_together(rows: list[int], sm90: bool, k: float) -> None:
    kernel = Kernel(sm90_rule=sm90, needs_alignment=True)
    w = work([float(r) for r in rows], k=k)
    one = tiled.expert_roofs(w, kernel, ROOF, TiledConstants())[0]
    compute, memory = roofs(w, TiledConstants(), kernel)
    assert one.compute.sum() == pytest.approx(compute)
    assert (one.weights + one.activations).sum() == pytest.approx(memory)


@given(rows=ROWS, more=st.integers(1, 2000))
def test_more_rows_never_take_less_time_with_the_cheapest_tile(rows: list[int], more: int) -> None:
    few = [float(r) for r in rows]
    many = [few[0] + more, *few[1:]]
    latency = [physics.total(FORM.resident_parts(work(r), ROOF, TiledConstants()))[0] for r in (few, many)]
    assert latency[0] <= latency[1] * (1 + 1e-12)


def test_constants_that_nothing_measured_informs_are_named() -> None:
    bare = FORM.identified(work([4.0]))
    assert "call_ns" in bare and "layer_ns" not in bare and "misaligned_compute" not in bare
    layer = FORM.identified(work([4.0], layer=1.0, eager=1.0))
    assert {"layer_ns", "row_passes", "host_layer_ns"} <= set(layer) and "call_ns" not in layer
    triton = physics.form_of("gpu", "vllm/1/some_triton_kernel/bf16")
    assert "misaligned_compute" in triton.identified(work([4.0], k=100))


def test_counts_are_summed_as_a_loop_would() -> None:
    rows = np.random.default_rng(1).integers(0, 300, (5, 9)).astype(float)
    counts = Counts(rows)
    for i in range(5):
        for j, m in enumerate(TILE_ROWS):
            assert counts.tiles[i, j] == sum(-(-int(r) // m) for r in rows[i])
    assert counts.n_active.tolist() == [(row > 0).sum() for row in rows]


def test_taking_items_keeps_their_draws_and_shares_the_counts() -> None:
    counts = Counts(np.array([[1.0, 2.0], [3.0, 0.0], [5.0, 5.0]]))
    column = np.array([10.0, 20.0, 20.0, 30.0])
    index = np.array([0, 1, 1, 2])
    w = replace(
        work([1.0, 2.0]),
        counts=counts,
        routing_of=np.array([0, 1, 2, 1]),
        item_of=index,
        **{name: column for name in ("layer", "router", "eager", "n_tokens", "hidden", "inter", "n_experts")},
        k=np.ones((4, 2)),
        n=np.ones((4, 2)),
    )
    assert w.mean(np.array([1.0, 2.0, 4.0, 8.0])).tolist() == [1.0, 3.0, 8.0]
    taken = w.take(np.array([1, 2]))
    assert taken.item_of.tolist() == [0, 0, 1]
    assert taken.hidden.tolist() == [20.0, 20.0, 30.0]
    assert taken.rows.tolist() == [[3.0, 0.0], [5.0, 5.0], [3.0, 0.0]]
    assert taken.counts is counts

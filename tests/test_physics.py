"""The physical model against numbers worked by hand, its conservation law, and its limits."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import physics
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile, Quantity, hardware
from perfmodel.physics import Ceilings, Constants, KernelForm, Work

ROOF = Ceilings(1e12, 1e11, ())  # 1 TFLOP/s, 100 GB/s
PLAIN = KernelForm(None, 1, False)
SHARP = Constants(tile_overhead_rows=0.0, smooth_p=12.0, overlap_frac=0.0, call_ns=0.0, expert_ns=0.0, layer_ns=0.0)


def work(rows: list[float], k: float = 1000, n: float = 500, layer: float = 0.0) -> Work:
    one = np.ones(1)
    return Work(
        rows=np.array([rows], dtype=float),
        k=np.array([[k, 0.0]]),
        n=np.array([[n, 0.0]]),
        layer=layer * one,
        n_tokens=sum(rows) * one,
        hidden=k * one,
        inter=n * one,
        n_experts=len(rows) * one,
        weight_bytes=2.0,
        activation_bytes=2.0,
    )


def test_a_compute_bound_gemm_takes_flops_over_peak() -> None:
    w = work([10_000.0])
    roofs = physics.gemm_roofs(w, 0, ROOF, SHARP, PLAIN)
    assert roofs.compute[0, 0] == pytest.approx(2 * 10_000 * 1000 * 500 / 1e12 * 1e9)  # 10 ms
    assert roofs.memory[0, 0] == pytest.approx((1000 * 500 * 2 + 2 * 10_000 * 1500) / 1e11 * 1e9)


def test_idle_experts_cost_nothing_and_active_ones_read_their_weights() -> None:
    roofs = physics.gemm_roofs(work([0.0, 1.0]), 0, ROOF, SHARP, PLAIN)
    assert roofs.compute[0, 0] == roofs.memory[0, 0] == 0
    assert roofs.memory[0, 1] == pytest.approx((1_000_000 + 2 * 1500) / 100)  # bytes over 100 bytes per ns


def test_tiles_pad_rows_and_the_cheapest_tile_is_chosen() -> None:
    form = KernelForm((64, 128), 1, False)
    assert physics.tile_cost_rows(np.array([[65.0]]), form, 0.0)[0, 0] == 128
    assert physics.tile_cost_rows(np.array([[129.0]]), form, 0.0)[0, 0] == 192  # three tiles of 64, not two of 128
    # With an overhead of 256 rows a tile, scaled by 1 / (1 + 256 / 256): one tile of 128 beats two of 64.
    assert physics.tile_cost_rows(np.array([[100.0]]), form, 256.0)[0, 0] == pytest.approx((128 + 256) / 2)


def test_packing_and_column_overhead_cost_what_they_say() -> None:
    c = replace(SHARP, pack_passes=1.0, column_overhead=100.0)
    one, several, none = physics.gemm_roofs(work([1.0, 4.0, 0.0]), 0, ROOF, c, KernelForm(None, 1, True)).weights[0]
    assert one == pytest.approx(1100 * 500 * 2 / 100)  # K + 100 terms, read once
    assert several == pytest.approx(2 * one)  # and moved once more when there are rows to pack for
    assert none == 0


def test_a_single_row_runs_as_a_matrix_vector_product_where_the_kernel_has_one() -> None:
    cost = physics.tile_cost_rows(np.array([[0.0, 1.0, 2.0]]), KernelForm(None, 1, True), 30.0)
    assert cost.tolist() == [[0.0, 1.0, 32.0]]


def test_smooth_maximum_lies_between_maximum_and_sum_and_its_shares_add_up() -> None:
    value, shares = physics.smooth_max([np.array([3.0]), np.array([4.0]), np.array([0.0])], 2.0)
    assert value[0] == pytest.approx(5.0)
    assert [s[0] for s in shares] == pytest.approx([5 * 9 / 25, 5 * 16 / 25, 0.0])


@given(
    rows=st.lists(st.integers(0, 5000), min_size=1, max_size=12).filter(any),
    overlap=st.floats(0, 1),
    p=st.floats(1, 12),
    layer=st.sampled_from([0.0, 1.0]),
)
def test_parts_sum_to_the_latency_which_no_roof_undercuts(
    rows: list[int], overlap: float, p: float, layer: float
) -> None:
    c = Constants(overlap_frac=overlap, smooth_p=p)
    w = work([float(r) for r in rows], layer=layer)
    form = physics.FORMS["gpu"]
    parts = physics.resident_parts(w, ROOF, c, form)
    latency = physics.total(parts)[0]
    assert latency == pytest.approx(sum(v[0] for v in parts.values()))
    roofs = physics.gemm_roofs(w, 0, ROOF, c, form)
    assert latency >= max(roofs.compute.sum(), roofs.memory.sum()) * (1 - 1e-9)


def test_a_layer_costs_more_than_its_grouped_gemm() -> None:
    bare, layer = (physics.resident_parts(work([8.0, 8.0], layer=x), ROOF, Constants(), PLAIN) for x in (0.0, 1.0))
    assert physics.total(layer)[0] - physics.total(bare)[0] == pytest.approx(
        Constants().layer_ns + layer["activations"][0] + layer["router"][0]
    )
    assert layer["router"][0] == pytest.approx(2 * 16 * 1000 * 2 / 1e12 * 1e9)


def test_ceilings_prefer_achieved_rates_and_discount_nominal_ones() -> None:
    sxm = physics.ceilings(hardware("h100-sxm"), "bf16")
    assert (sxm.flops_per_s, sxm.bytes_per_s) == (798e12, 3000e9)
    pcie = physics.ceilings(hardware("h100-pcie"), "bf16")
    assert pcie.flops_per_s == pytest.approx(756.5e12 * physics.PEAK_GEMM_FRAC)
    assert pcie.bytes_per_s == pytest.approx(2000e9 * physics.PEAK_STREAM_FRAC)


def test_weights_quantised_below_fp8_compute_in_bf16() -> None:
    assert physics.ceilings(hardware("gh200"), "mxfp4") == physics.ceilings(hardware("gh200"), "bf16")
    assert (
        physics.ceilings(hardware("gh200"), "fp8").flops_per_s > physics.ceilings(hardware("gh200"), "bf16").flops_per_s
    )


def test_fp32_never_computes_at_tensor_core_rates() -> None:
    assert physics.ceilings(hardware("gh200"), "fp32").flops_per_s == pytest.approx(67e12 * physics.PEAK_GEMM_FRAC)
    tensor_only = HardwareProfile("t", "t", "gpu", {"bf16_peak_flops_per_s": Quantity(1e15, "datasheet", "test")})
    with pytest.raises(InputError, match="no compute rate for fp32"):
        physics.ceilings(tensor_only, "fp32")


def test_a_machine_without_rates_is_refused_by_name() -> None:
    bare = HardwareProfile("bare", "bare", "gpu", {"l2_capacity_bytes": Quantity(1.0, "datasheet", "test")})
    with pytest.raises(InputError, match="'bare' has no compute rate for bf16"):
        physics.ceilings(bare, "bf16")

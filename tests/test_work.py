"""Batches of work, ceilings and smooth maxima, by hand: what all forms of the physical model share."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import physics
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile, Quantity, hardware
from perfmodel.moe import WEIGHT_BYTES
from perfmodel.physics import Counts, Work, ceilings, ideal_work, smooth_max, sum_parts, transferred_ceilings


def machine(name: str, **values: float) -> HardwareProfile:
    return HardwareProfile(name, name, "gpu", {k: Quantity(v, "datasheet", "made up") for k, v in values.items()})


def work(rows: list[list[float]], item_of: list[int], n_experts: int = 2) -> Work:
    """Bare GEMMs of 10 x 20 with bf16 weights, one batch row for each routing."""
    n_batch = len(rows)
    ones, index = np.ones(n_batch), np.arange(n_batch, dtype=np.int64)
    return Work(
        counts=Counts(np.array(rows, dtype=float)),
        routing_of=index,
        item_of=np.array(item_of, dtype=np.int64),
        k=10 * np.column_stack([ones, 0 * ones]),
        n=20 * np.column_stack([ones, 0 * ones]),
        layer=0 * ones,
        router=0 * ones,
        eager=0 * ones,
        n_tokens=np.array(rows).sum(axis=1),
        hidden=10 * ones,
        inter=20 * ones,
        n_experts=n_experts * ones,
        weight_bytes=2.0,
        activation_bytes=2.0,
    )


def test_smooth_maximum_lies_between_maximum_and_sum_and_its_shares_add_up() -> None:
    value, shares = smooth_max([np.array([3.0]), np.array([4.0]), np.array([0.0])], 2.0)
    assert value[0] == pytest.approx(5.0)
    assert [s[0] for s in shares] == pytest.approx([5 * 9 / 25, 5 * 16 / 25, 0.0])


@given(terms=st.lists(st.just(0.0) | st.floats(1e-6, 1e15), min_size=1, max_size=4), p=st.floats(1, 12))
def test_a_smooth_maximum_is_at_least_the_largest_term_and_at_most_their_sum(terms: list[float], p: float) -> None:
    value, shares = smooth_max([np.array([x]) for x in terms], p)
    assert max(terms) * (1 - 1e-9) <= value[0] <= sum(terms) * (1 + 1e-9) + 1e-11
    assert sum(float(s[0]) for s in shares) == pytest.approx(value[0], rel=1e-9, abs=1e-11)


def test_ceilings_prefer_achieved_rates_and_discount_nominal_ones() -> None:
    sxm = ceilings(hardware("h100-sxm"), "bf16")
    assert (sxm.flops_per_s, sxm.bytes_per_s) == (798e12, 3000e9)
    pcie = ceilings(hardware("h100-pcie"), "bf16")
    assert pcie.flops_per_s == pytest.approx(756.5e12 * physics.PEAK_GEMM_FRAC)
    assert pcie.bytes_per_s == pytest.approx(2000e9 * physics.PEAK_STREAM_FRAC)


def test_weights_quantised_below_fp8_compute_in_bf16() -> None:
    assert ceilings(hardware("gh200"), "mxfp4") == ceilings(hardware("gh200"), "bf16")
    assert ceilings(hardware("gh200"), "fp8").flops_per_s > ceilings(hardware("gh200"), "bf16").flops_per_s


def test_fp32_never_computes_at_tensor_core_rates() -> None:
    assert ceilings(hardware("gh200"), "fp32").flops_per_s == pytest.approx(67e12 * physics.PEAK_GEMM_FRAC)
    with pytest.raises(InputError, match="no compute rate for fp32"):
        ceilings(machine("tensor-only", bf16_peak_flops_per_s=1e15), "fp32")


def test_a_machine_without_rates_is_refused_by_name() -> None:
    bare = machine("bare", l2_capacity_bytes=1.0)
    with pytest.raises(InputError, match="'bare' has no compute rate for bf16"):
        ceilings(bare, "bf16")
    with pytest.raises(InputError, match="'no-memory' has no memory bandwidth"):
        ceilings(machine("no-memory", bf16_peak_flops_per_s=1e15), "bf16")


def test_efficiencies_are_carried_over_by_rates_of_one_kind() -> None:
    """The fit knew an achieved rate of its machine; where the other has a nominal peak alone, peaks are compared."""
    fitted = machine(
        "fitted",
        bf16_gemm_flops_per_s=8e14,
        bf16_peak_flops_per_s=1e15,
        memory_stream_bytes_per_s=3e12,
        memory_peak_bytes_per_s=4e12,
    )
    other = machine("other", bf16_peak_flops_per_s=2e15, memory_peak_bytes_per_s=8e12)
    roof = transferred_ceilings(other, "bf16", fitted)
    assert (roof.flops_per_s, roof.bytes_per_s) == (pytest.approx(16e14), pytest.approx(6e12))
    assert roof.from_keys == ("bf16_peak_flops_per_s", "memory_peak_bytes_per_s")
    assert transferred_ceilings(fitted, "bf16", fitted) == ceilings(fitted, "bf16")
    without = machine("without", bf16_gemm_flops_per_s=8e14, memory_stream_bytes_per_s=3e12)
    assert transferred_ceilings(other, "bf16", without) == ceilings(other, "bf16")


def test_every_dtype_has_bytes_of_weights_and_of_activations() -> None:
    assert physics.element_bytes("mxfp4") == (0.5 + 1 / 32, 2.0)
    assert physics.element_bytes("fp32") == (4.0, 4.0)
    for dtype in WEIGHT_BYTES:
        weight, activation = physics.element_bytes(dtype)
        assert 0 < weight <= activation <= 4


def test_what_is_needed_at_least_counts_active_experts_only() -> None:
    flops, weight_bytes = ideal_work(work([[3.0, 0.0], [2.0, 1.0]], [0, 1]))
    assert flops.tolist() == [2 * 3 * 200, 2 * 3 * 200]
    assert weight_bytes.tolist() == [200 * 2, 2 * 200 * 2]


def test_counts_and_means_over_draws_by_hand() -> None:
    w = work([[3.0, 0.0], [2.0, 1.0], [40.0, 0.0]], [0, 0, 1])
    assert (w.n_rows.tolist(), w.n_active.tolist(), w.n_items) == ([3, 3, 40], [1, 2, 1], 2)
    assert w.counts.tiles[:, :2].tolist() == [[1, 1], [2, 2], [3, 2]]  # tiles of 16, of 32 rows
    assert w.counts.max_rows.tolist() == [3, 2, 40]
    assert w.mean(np.array([1.0, 2.0, 5.0])).tolist() == [1.5, 5.0]


def test_taking_items_keeps_their_draws_and_numbers_them_anew() -> None:
    w = work([[3.0, 0.0], [2.0, 1.0], [40.0, 0.0], [7.0, 0.0]], [0, 0, 1, 2])
    taken = w.take(np.array([0, 2]))
    assert taken.item_of.tolist() == [0, 0, 1]
    assert taken.rows.tolist() == [[3, 0], [2, 1], [7, 0]]
    assert taken.n_items == 2 and taken.counts is w.counts
    nothing = dataclasses.replace(w, **{k: v[:0] for k, v in vars(w).items() if isinstance(v, np.ndarray)})
    assert nothing.n_items == 0


def test_parts_are_summed_by_name_and_absent_ones_stay_absent() -> None:
    a, b = {"compute": np.array([1.0]), "link": np.array([4.0])}, {"compute": np.array([2.0])}
    assert {k: v.tolist() for k, v in sum_parts(a, b).items()} == {"compute": [3.0], "link": [4.0]}
    assert physics.total(sum_parts(a, b)).tolist() == [7.0]


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_every_constant_has_a_prior_that_allows_its_default(device: str) -> None:
    for dtype in ("fp32", "bf16"):
        form = physics.form_of(device, "triton", dtype)
        values = dataclasses.asdict(form.defaults)
        assert set(values) == set(form.priors)
        assert form.constants(values) == form.defaults
        for name, value in values.items():
            prior = form.priors[name]
            assert prior.low <= value <= prior.high
            assert prior.unit is not None or prior.low > 0  # what is fitted as a logarithm is never zero
            with pytest.raises(ValueError, match=name):
                form.constants({**values, name: prior.high * 1.1})
        with pytest.raises(ValueError, match="eff_compute"):
            form.constants({k: v for k, v in values.items() if k != "eff_compute"})


def test_the_name_of_a_kernel_says_what_it_does_on_a_gpu() -> None:
    of = {name: physics.form_of("gpu", name).kernel for name in ("vllm/1/triton/bf16", physics.PYTORCH_KERNEL, "other")}
    assert [(k.sm90_rule, k.needs_alignment) for k in of.values() if k] == [
        (False, True),
        (True, False),
        (False, False),
    ]
    assert physics.form_for(hardware("xeon-spr"), "anything", "bf16").name == "blas"


@pytest.mark.parametrize(("device", "dtype"), [("gpu", "bf16"), ("cpu", "fp32"), ("cpu", "bf16")])
@pytest.mark.parametrize("n_rows", [1.0, 16.0, 4096.0])
def test_no_grouped_gemm_is_faster_than_either_of_its_roofs(device: str, dtype: str, n_rows: float) -> None:
    form = physics.form_of(device, "made up", dtype, 2)
    w = work([[n_rows, 1.0]], [0])
    roof = physics.Ceilings(1e12, 1e11, ())
    roofs = form.gemm_roofs(w, roof, form.defaults)
    parts = form.resident_parts(w, roof, form.defaults)
    assert len(roofs) == 2 and all(float(x[0]) == 0 for x in roofs[1])  # there is no second GEMM
    computing, moving = (float(x[0]) for x in roofs[0])
    gemm_ns = float(parts["compute"][0] + parts["memory"][0])
    assert max(computing, moving) * (1 - 1e-9) <= gemm_ns <= (computing + moving) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("machine", "dtype", "has_rule"),
    [
        *((machine, "bf16", True) for machine in ("h100-sxm", "h100-pcie", "h200-sxm", "gh200")),
        *((machine, "bf16", False) for machine in ("a100-sxm-80gb", "b200-sxm", "gb200")),
        ("h100-sxm", "fp8", False),
    ],
)
def test_pytorchs_tile_rule_is_known_of_bf16_on_sm90_alone(machine: str, dtype: str, has_rule: bool) -> None:
    kernel = physics.form_for(hardware(machine), physics.PYTORCH_KERNEL, dtype).kernel
    assert kernel is not None and kernel.sm90_rule == has_rule

"""Costs of placements by expert say of every placement what the formulas say."""

from dataclasses import replace

import numpy as np
import pytest

from perfmodel import moe, physics
from perfmodel.errors import InputError
from perfmodel.hardware import hardware
from perfmodel.offload import Device, OffloadConstants, beside_parts, offload_parts, placement_costs
from perfmodel.physics import PYTORCH_KERNEL, Work, form_of, total
from perfmodel.placement import COPIED, IN_PLACE, NEAR_DATA, ON_HOST, RESIDENT
from perfmodel.placement.costs import Array, Costs, one_hot
from perfmodel.predict import work_of
from perfmodel.routing import Routing, drawn_counts, pattern_shares

SHAPE = moe.shape("olmoe")
FORM = form_of("gpu", PYTORCH_KERNEL)
GH200, TRIMOE = hardware("gh200"), hardware("trimoe")
CONSTANTS = OffloadConstants(reread_frac=0.4, reread_rows=128.0, link_overlap_frac=0.3, link_eff=0.9, copy_eff=0.8)
TIERS = {"zero-copy": IN_PLACE, "copy": COPIED}
MIXES = [
    (RESIDENT, ON_HOST),
    (RESIDENT, COPIED),
    (RESIDENT, COPIED, ON_HOST),
    (RESIDENT, IN_PLACE, ON_HOST),
    (RESIDENT, COPIED, ON_HOST, NEAR_DATA),
]


def layers(n_tokens: int, op: str, n: int = 1) -> Work:
    shares = pattern_shares("power-law:1.2", SHAPE.n_experts)[0]
    counts = np.stack([drawn_counts(shares, n_tokens, SHAPE.top_k, seed) for seed in range(3, 3 + n)])
    return work_of(SHAPE, Routing("drawn", counts, n_tokens, SHAPE.top_k), op)


def device(machine: str = "gh200", o: OffloadConstants = CONSTANTS) -> Device:
    profile = hardware(machine)
    return Device(profile, physics.ceilings(profile, "bf16"), FORM, FORM.defaults, o)


@pytest.mark.parametrize("access", list(TIERS))
@pytest.mark.parametrize("op", ["grouped-gemm", "moe-layer"])
@pytest.mark.parametrize("n_tokens", [4, 512, 65_536])
def test_costs_agree_with_the_formulas(access: str, op: str, n_tokens: int) -> None:
    work = layers(n_tokens, op)
    gone = np.random.default_rng(1).random((12, SHAPE.n_experts)) < np.linspace(0, 1, 12)[:, None]
    costs = placement_costs(work, (RESIDENT, TIERS[access]), device(), 1, serial=True)
    found = costs.placements_ns(gone.astype(np.int8))
    for mask, ns in zip(gone, found, strict=True):
        right = float(total(offload_parts(work, mask[None], access, device())[0])[0])
        assert ns == pytest.approx(right, rel=1e-4)
        assert costs.layers_ns(mask[None].astype(np.int8))[0] == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize("tiers", MIXES)
@pytest.mark.parametrize("n_tokens", [4, 512, 8192])
def test_costs_of_several_tiers_are_near_the_formulas(tiers: tuple[int, ...], n_tokens: int) -> None:
    """What is left out is the last chunk of a copy, tiles of a part of the experts, and uneven modules."""
    work, on = layers(n_tokens, "moe-layer", 4), replace(device("trimoe"), layout="striped")
    tier = np.random.default_rng(2).integers(0, len(tiers), (4, SHAPE.n_experts)).astype(np.int8)
    found = placement_costs(work, tiers, on, 4).layers_ns(tier)
    right = total(beside_parts(work, np.array(tiers)[tier], on)[0])
    assert found == pytest.approx(right, rel=0.06)
    assert abs(found.sum() / right.sum() - 1) < 0.03


@pytest.mark.parametrize("tiers", [*MIXES, (RESIDENT, IN_PLACE)])
def test_tangents_touch_and_never_pass_the_cost(tiers: tuple[int, ...]) -> None:
    costs = placement_costs(layers(64, "moe-layer", 6), tiers, device("trimoe"), 3)
    rng = np.random.default_rng(3)

    def time(parts: Array) -> Array:
        return costs.compose_layers(costs.loads(parts))

    for _ in range(20):
        here, there = (rng.dirichlet(np.full(len(tiers), 0.3), (3, SHAPE.n_experts)) for _ in range(2))
        slopes, beside = costs.slopes(here)
        assert (slopes * here).sum(axis=(1, 2)) + beside == pytest.approx(time(here), rel=1e-9)
        assert ((slopes * there).sum(axis=(1, 2)) + beside <= time(there) * (1 + 1e-9)).all()


def test_a_step_is_a_row_and_layers_are_means_over_steps() -> None:
    costs = placement_costs(layers(64, "grouped-gemm", 6), (RESIDENT, IN_PLACE), device(), 2)
    tier = np.random.default_rng(4).integers(0, 2, (2, SHAPE.n_experts)).astype(np.int8)
    by_row = np.array([costs.placements_ns(tier[[row % 2]], row)[0] for row in range(6)])
    assert costs.layers_ns(tier) == pytest.approx([by_row[::2].mean(), by_row[1::2].mean()], rel=1e-5)


def test_moving_experts_shifts_loads_by_the_difference() -> None:
    costs: Costs = placement_costs(layers(64, "moe-layer", 4), (RESIDENT, COPIED, ON_HOST), device(), 2)
    old = np.random.default_rng(5).integers(0, 3, (2, SHAPE.n_experts)).astype(np.int8)
    new = old.copy()
    new[:, [3, 9]] = 2
    expert = np.array([[3, 9], [3, 9]])
    change = (one_hot(new, 3) - one_hot(old, 3))[:, [3, 9]]
    moved = costs.loads(one_hot(old, 3)) + costs.shift(expert, change).sum(axis=1)
    assert moved == pytest.approx(costs.loads(one_hot(new, 3)))


def test_what_no_tier_is_or_what_a_machine_lacks_is_refused() -> None:
    work = layers(4, "grouped-gemm")
    with pytest.raises(InputError, match=r"tiers are \(0, 7\), expected different numbers of resident, copied"):
        placement_costs(work, (0, 7), device(), 1)
    with pytest.raises(InputError, match="has no memory modules that compute"):
        placement_costs(work, (RESIDENT, NEAR_DATA), device(), 1)

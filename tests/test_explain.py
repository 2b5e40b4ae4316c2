"""Explanations: sensitivities of pure cases, the knee by hand, and the measurements that lie nearest."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from perfmodel.explain import explain
from perfmodel.fitting import fit_source
from perfmodel.hardware import hardware
from perfmodel.latency import LatencyModel
from perfmodel.moe import MoEShape
from perfmodel.offload import Device
from perfmodel.physics import BlasConstants, TiledConstants, ceilings, form_of
from perfmodel.predict import predict, work_of
from perfmodel.routing import routing
from perfmodel.sources import Source
from tests.made_up import MADE_UP_KERNEL, made_up_machine, made_up_observations

SHAPE = MoEShape("synthetic", n_experts=16, top_k=2, hidden=1024, inter=512)
NOTHING_ELSE = {"call_ns": 0.0, "expert_ns": 0.0, "layer_ns": 0.0, "smooth_p": 12.0}


def explained(n_tokens: int, op: str = "grouped-gemm", **constants: float) -> Any:
    profile = made_up_machine()
    device = Device(profile, ceilings(profile, "bf16"), form_of("gpu", "made up"), TiledConstants(**constants))
    work = work_of(SHAPE, routing("uniform", SHAPE.n_experts, SHAPE.top_k, n_tokens), op)
    return explain(work, np.zeros(work.rows.shape, dtype=bool), "zero-copy", device, None)


def test_what_memory_alone_binds_changes_with_its_efficiency_one_to_one() -> None:
    found = explained(8, **NOTHING_ELSE)
    assert found.sensitivity == {"eff_memory": pytest.approx(-1.0, abs=0.01)}
    assert all(roof.startswith("memory") for roof in found.roofs.values())


def test_what_computing_alone_binds_changes_with_its_efficiency_one_to_one() -> None:
    found = explained(2**20, **NOTHING_ELSE)
    assert found.sensitivity["eff_compute"] == pytest.approx(-1.0, abs=0.02)
    assert next(iter(found.sensitivity)) == "eff_compute" and "eff_memory" not in found.sensitivity
    assert set(found.roofs) == {"up", "down"} and all(roof.startswith("computing") for roof in found.roofs.values())


def test_a_fixed_cost_that_is_half_of_the_latency_counts_half() -> None:
    alone = explained(8, **NOTHING_ELSE)
    work = work_of(SHAPE, routing("uniform", 16, 2, 8), "grouped-gemm")
    profile = made_up_machine()
    form = form_of("gpu", "made up")
    parts = form.resident_parts(work, ceilings(profile, "bf16"), TiledConstants(**NOTHING_ELSE))
    latency_ns = float(sum(value.mean() for value in parts.values()))  # over the draws of the routing
    found = explained(8, **NOTHING_ELSE | {"call_ns": latency_ns / 2})  # of two calls
    assert found.sensitivity["call_ns"] == pytest.approx(0.5, abs=0.01)
    assert found.sensitivity["eff_memory"] == pytest.approx(-0.5, abs=0.01)
    assert alone.sensitivity.keys() < found.sensitivity.keys()


def test_the_knee_by_hand() -> None:
    found = explained(64, eff_compute=0.5, eff_memory=0.8)
    # Rows at which 2 n K N FLOP at half of 600 TFLOP/s take as long as 2 K N bytes at 0.8 of 2.5 TB/s.
    assert found.knee_rows == {"device memory": pytest.approx(0.5 * 6e14 / (0.8 * 2.5e12))}
    assert found.rows_per_active_expert == 64 * 2 / 16


def test_offloaded_experts_have_a_knee_of_their_own() -> None:
    result = predict(hardware("gh200"), SHAPE, routing("uniform", 16, 2, 64), 0.5, "zero-copy", explained=True)
    assert result.explanation is not None
    knees = result.explanation.knee_rows
    assert set(knees) == {"device memory", "the link"} and knees["the link"] > 5 * knees["device memory"]
    assert "from the link" in "\n".join(result.explanation.lines())
    on_host = predict(hardware("gh200"), SHAPE, routing("uniform", 16, 2, 64), 0.5, "cpu", explained=True)
    assert on_host.explanation is not None and set(on_host.explanation.knee_rows) == {"device memory"}


def test_a_cpu_is_explained_too() -> None:
    result = predict(hardware("xeon-spr"), SHAPE, routing("uniform", 16, 2, 64), op="moe-layer", explained=True)
    assert result.explanation is not None
    assert set(result.explanation.sensitivity) <= set(vars(BlasConstants()))
    assert 0 < len(result.explanation.sensitivity) <= 5


@pytest.fixture(scope="module")
def model() -> LatencyModel:
    observations = made_up_observations(tokens=(1, 8, 64, 512, 4096))
    every = observations["time_ns"] > 0
    return fit_source(
        Source("made up", MADE_UP_KERNEL, made_up_machine(), "bf16", observations, observations[:0], every)
    )


def test_the_nearest_measurement_is_the_very_one_where_it_was_measured(model: LatencyModel) -> None:
    batch = routing("uniform", SHAPE.n_experts, SHAPE.top_k, 64)
    result = predict(model.profile, SHAPE, batch, model=model, op="fused-moe", launch="graph", explained=True)
    assert result.explanation is not None
    first, *others = result.explanation.nearest
    assert (first.shape, first.n_tokens, first.routing, first.op) == ("h1024-i512-k2-e16", 64, "balanced", "fused_moe")
    assert first.octaves == pytest.approx(0, abs=0.01)
    at = model.points_["shape"].index("h1024-i512-k2-e16") + 2  # the third of its batch sizes
    assert first.measured_ns == model.points_["measured_ns"][at]
    assert [one.octaves for one in others] == sorted(one.octaves for one in others) and others[0].octaves > 0.1
    lines = result.explanation.lines()
    assert any(line.startswith("nearest       h1024-i512-k2-e16, 64 tokens, balanced, fused_moe: ") for line in lines)


def test_distances_are_factors_of_two_along_all_axes(model: LatencyModel) -> None:
    """Twice the tokens: one octave more tokens, one more rows an expert, one more compute over memory."""
    batch = routing("uniform", SHAPE.n_experts, SHAPE.top_k, 128)
    result = predict(model.profile, SHAPE, batch, model=model, op="fused-moe", launch="graph", explained=True)
    assert result.explanation is not None
    same = [one for one in result.explanation.nearest if one.routing == "balanced" and one.n_tokens == 64]
    assert same[0].octaves == pytest.approx(np.sqrt(3), abs=0.01)


def test_an_explanation_is_plain_values(model: LatencyModel) -> None:
    batch = routing("uniform", SHAPE.n_experts, SHAPE.top_k, 64)
    result = predict(model.profile, SHAPE, batch, model=model, op="fused-moe", explained=True)
    assert result.explanation is not None
    found = result.to_json()["explanation"]
    assert set(found) == {"reasons", "roofs", "rows_per_active_expert", "knee_rows", "sensitivity", "nearest"}
    assert len(found["nearest"]) == 3 and found["reasons"]
    assert replace(result, explanation=None).to_json().keys() == result.to_json().keys() - {"explanation"}

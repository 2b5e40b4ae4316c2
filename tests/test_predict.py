"""Predictions: limits, trends and composition rules of the access modes, evidence, and the GH200 study's two points."""

import csv
import math
from pathlib import Path

import pytest

from perfmodel.errors import InputError
from perfmodel.fitting import fit_source
from perfmodel.hardware import HardwareProfile, hardware
from perfmodel.hf_config import resolve
from perfmodel.moe import MoEShape
from perfmodel.offload import ACCESS_MODES, OffloadConstants, link_rate
from perfmodel.placement import POLICIES, place
from perfmodel.predict import Prediction, Settings, predict, slowdown_curve
from perfmodel.routing import routing
from perfmodel.sources import only_source, read_sources
from tests.captures_made import write_gpu_capture

GH200 = hardware("gh200")
SMALL = MoEShape("synthetic-small", n_experts=16, top_k=2, hidden=1024, inter=512)


def at(
    n_tokens: int,
    offload: float,
    access: str = "zero-copy",
    shape: MoEShape = SMALL,
    pattern: str = "uniform",
    machine: HardwareProfile = GH200,
    **more: str,
) -> Prediction:
    return predict(machine, shape, routing(pattern, shape.n_experts, shape.top_k, n_tokens), offload, access, **more)


@pytest.mark.parametrize("access", ACCESS_MODES)
@pytest.mark.parametrize("n_tokens", [1, 64, 4096, 262_144])
def test_nothing_offloaded_is_the_baseline(access: str, n_tokens: int) -> None:
    result = at(n_tokens, 0.0, access)
    assert result.slowdown == 1.0
    assert result.latency_ns == result.baseline_latency_ns


@pytest.mark.parametrize("access", ACCESS_MODES)
@pytest.mark.parametrize("op", ["grouped-gemm", "moe-layer"])
def test_parts_sum_to_the_latency(access: str, op: str) -> None:
    for n_tokens in (1, 512, 65_536):
        machine = hardware("trimoe") if access == "near-data" else GH200
        result = at(n_tokens, 0.5, access, machine=machine, op=op)
        assert math.fsum(result.parts.values()) == pytest.approx(result.latency_ns, rel=1e-12)


@pytest.mark.parametrize("access", ["zero-copy", "copy"])
@pytest.mark.parametrize("pattern", ["uniform", "power-law:1.2", "mmlu-like"])
def test_reading_more_experts_over_the_link_never_gets_cheaper(access: str, pattern: str) -> None:
    for n_tokens in (16, 1024, 131_072):
        batch = routing(pattern, 16, 2, n_tokens)
        slowdowns = [p.slowdown for p in slowdown_curve(GH200, SMALL, batch, access)]
        assert len(slowdowns) == 17
        assert slowdowns == sorted(slowdowns)


@pytest.mark.parametrize("access", ["zero-copy", "copy", "copy-overlap"])
def test_link_cost_fades_as_the_batch_grows(access: str) -> None:
    slowdowns = [at(4**i, 0.5, access).slowdown for i in range(6, 11)]
    assert slowdowns == sorted(slowdowns, reverse=True)


def test_serial_copy_adds_exactly_the_bytes_over_the_link_and_a_start_for_each_expert() -> None:
    result = at(4096, 0.5, "copy")
    rate, _ = link_rate(GH200, "copy")
    copying = 8 * (SMALL.expert_bytes / rate * 1e9 + OffloadConstants().copy_ns)
    assert result.latency_ns - result.baseline_latency_ns == pytest.approx(copying)
    assert result.parts["link"] == pytest.approx(copying)


def test_overlapped_copy_is_never_worse_than_serial_and_hides_under_enough_compute() -> None:
    for n_tokens in (16, 1024, 65_536, 1_048_576):
        assert at(n_tokens, 0.5, "copy-overlap").latency_ns <= at(n_tokens, 0.5, "copy").latency_ns * (1 + 1e-12)
    assert at(1_048_576, 0.5, "copy-overlap").slowdown == 1.0


def test_cpu_compute_is_bound_by_the_host_and_takes_its_memory_time_at_small_batch() -> None:
    result = at(1, 1.0, "cpu")  # one token, two experts, both read from host memory
    assert result.bottleneck == "host"
    reading = 2 * SMALL.expert_bytes / GH200["host_stream_bytes_per_s"] * 1e9
    crossing = 2 * 1024 * 2 * (1 / GH200["link_h2d_copy_bytes_per_s"] + 1 / GH200["link_d2h_copy_bytes_per_s"]) * 1e9
    beside = 2 * OffloadConstants().host_expert_ns + OffloadConstants().merge_ns
    assert result.parts["host"] == pytest.approx(reading + crossing + beside)
    overhead = 2 * (GH200["launch_overhead_ns"] + GH200["null_kernel_ns"] + 16 * 12)
    assert result.latency_ns == pytest.approx(reading + crossing + beside + overhead)


def test_link_is_no_faster_than_the_memory_behind_it() -> None:
    assert link_rate(GH200, "copy") == (375e9, "link_h2d_copy_bytes_per_s")
    assert link_rate(GH200, "zero-copy") == (333e9, "link_kernel_read_bytes_per_s")


def test_no_interval_and_basis_datasheet_without_a_model() -> None:
    result = at(64, 0.25)
    assert (result.basis, result.interval) == ("datasheet", None)
    assert set(result.to_json()) == {
        "latency_ns",
        "baseline_latency_ns",
        "slowdown",
        "parts",
        "bottleneck",
        "interval",
        "basis",
    }
    assert "datasheet" in str(result) and "4 of 16 experts" in str(result)


def test_a_machine_without_a_second_tier_cannot_offload_but_predicts_all_resident() -> None:
    batch = routing("uniform", 16, 2, 64)
    xeon = hardware("xeon-spr")
    assert predict(xeon, SMALL, batch).slowdown == 1.0
    with pytest.raises(InputError, match="no link to a second memory tier"):
        predict(xeon, SMALL, batch, 0.5)


def test_bad_settings_are_refused_in_one_sentence() -> None:
    batch = routing("uniform", 16, 2, 64)
    for offload, access, op, words in [
        (1.5, "copy", "grouped-gemm", "expected 0 to 1"),
        (float("nan"), "copy", "grouped-gemm", "expected 0 to 1"),
        (0.5, "teleport", "grouped-gemm", "known: zero-copy"),
        (0.0, "teleport", "grouped-gemm", "known: zero-copy"),
        (0.5, "copy", "attention", "known: grouped-gemm"),
    ]:
        with pytest.raises(InputError, match=words):
            predict(GH200, SMALL, batch, offload, access, op=op)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_offloads_the_asked_number(policy: str) -> None:
    loads = routing("power-law:1.0", 16, 2, 64).popularity
    assert place(loads, 0.25, policy).n_offloaded == 4 * len(loads)


def test_ascending_offloads_the_least_used_first() -> None:
    loads = routing("power-law:1.0", 8, 2, 100_000).counts
    assert place(loads, 0.25).offloaded[0].tolist() == [False] * 6 + [True] * 2
    assert place(loads, 0.25, "descending").offloaded[0].tolist() == [True] * 2 + [False] * 6


def test_hot_experts_cost_more_to_offload_than_cold_ones() -> None:
    from perfmodel.predict import basis_of, predict_placement

    batch = routing("power-law:1.2", 16, 2, 16)
    basis = basis_of(GH200, SMALL, None)
    cold, hot = (
        predict_placement(basis, SMALL, batch, place(batch.popularity, 0.25, policy), "copy")
        for policy in ("ascending", "descending")
    )
    assert cold.latency_ns < hot.latency_ns


def test_agrees_with_the_two_published_points_of_the_gh200_study(shared: Path) -> None:
    poster = resolve("poster")
    with (shared / "reference" / "offload_poster.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["slowdown"]]
    assert len(rows) == 2
    for row in rows:
        batch = routing("mmlu-like", poster.n_experts, poster.top_k, int(row["tokens"]))
        result = predict(GH200, poster, batch, float(row["offloaded_fraction"]))
        assert result.slowdown == pytest.approx(float(row["slowdown"]), rel=0.05)


def test_every_catalogue_shape_predicts_on_every_machine() -> None:
    from perfmodel import hardware as hw
    from perfmodel import moe

    for shape in (resolve(name) for name in moe.names()):
        for name in hw.names():
            result = predict(hardware(name), shape, routing("uniform", shape.n_experts, shape.top_k, 32))
            assert 0 < result.latency_ns < 60e9


@pytest.mark.parametrize("op", ["grouped-gemm", "moe-layer"])
def test_a_layer_is_no_faster_than_the_host_launches_it(op: str) -> None:
    from perfmodel.predict import Settings

    slow = predict(GH200, SMALL, routing("uniform", 16, 2, 4), op=op, settings=Settings(host_ns=3e6))
    assert slow.latency_ns == pytest.approx(3e6)
    assert slow.bottleneck == "launch"
    free = predict(GH200, SMALL, routing("uniform", 16, 2, 4), op=op)
    assert free.latency_ns < 1e6 and free.parts.get("launch", 0.0) == 0
    quick = predict(GH200, SMALL, routing("uniform", 16, 2, 4), op=op, settings=Settings(host_ns=1.0))
    assert quick.latency_ns == pytest.approx(free.latency_ns)
    assumed = predict(GH200, SMALL, routing("uniform", 16, 2, 4), op=op, launch="eager")
    assert assumed.latency_ns >= 0.999 * (16_000 if op == "grouped-gemm" else 150_000)


def test_a_model_of_a_capture_says_how_sure_each_way_to_offload_is(tmp_path: Path) -> None:
    # Times and constants of this capture are made up. Copies were measured nine times, mapped pages eighteen times.
    source = only_source(read_sources([str(write_gpu_capture(tmp_path / "made-up"))]))
    model = fit_source(source)
    shape = resolve("olmoe")
    batch = routing("power-law:1.2", shape.n_experts, shape.top_k, 64)

    def of(access: str, frac: float = 0.5, machine: HardwareProfile = model.profile, **more: str) -> Prediction:
        return predict(machine, shape, batch, frac, access, op="moe-layer", model=model, settings=Settings(**more))

    resident, mapped, copied = of("copy", 0.0), of("zero-copy"), of("copy")
    assert (resident.basis, mapped.basis, copied.basis) == ("fitted", "fitted", "extrapolated")
    assert resident.interval is not None and mapped.interval is not None and copied.interval is None
    assert mapped.interval[1] / mapped.latency_ns > resident.interval[1] / resident.latency_ns  # both errors act
    assert "constants of zero-copy fitted on 18 observations" in mapped.reasons
    assert copied.reasons[-2:] == (
        "constants of copy fitted on 9 observations",
        "too few of them could be held out, so nothing is known of their errors",
    )
    system = of("zero-copy", residency="system")
    words = "no expert offloaded by zero-copy/system was among the observations: its constants are assumed"
    assert system.interval is None and words in system.reasons

    there = hardware("h200-sxm")
    moved = of("copy", 0.0, there)
    assert moved.basis == "extrapolated" and moved.interval is not None
    assert moved.interval[1] / moved.latency_ns > 1.05 * resident.interval[1] / resident.latency_ns
    words = "fitted on made-up: the interval is wider by what its constants may be on another machine"
    assert words in moved.reasons
    offloaded = of("zero-copy", 0.5, there)
    assert offloaded.interval is None and "nothing is known of their errors on another machine" in offloaded.reasons


def test_the_hosts_time_does_not_change_what_a_residual_says_of_the_device() -> None:
    from perfmodel.latency import load_model
    from perfmodel.predict import Settings

    fitted, h100 = load_model("h100-sxm-vllm-triton-bf16"), hardware("h100-sxm")
    shape = resolve("qwen3-30b-a3b")
    batch = routing("uniform", shape.n_experts, shape.top_k, 4096)
    free, bound = (
        predict(h100, shape, batch, op="fused-moe", model=fitted, launch="eager", settings=Settings(host_ns=ns))
        for ns in (1.0, 30e6)
    )
    device = {part: ns for part, ns in free.parts.items() if part != "launch"}
    assert math.fsum(device.values()) < 10e6
    for part, ns in device.items():
        assert bound.parts[part] == pytest.approx(ns, rel=0.02), part
    assert bound.bottleneck == "launch"

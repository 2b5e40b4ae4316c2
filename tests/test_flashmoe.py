"""FlashMoE's published figures: parsed as published, calibrated on one row each, and the page says what comes out."""

import csv
from pathlib import Path

import pytest

from perfmodel.schedule import LayerTimeline, Span
from perfmodel.schedule.flashmoe.figures import late_gpu_ns, payload, straggler_ratio, symmetric, uneven_straggler_ratio
from perfmodel.schedule.flashmoe.page import page
from perfmodel.schedule.flashmoe.study import (
    BASELINE_HYPOTHESES,
    BASELINES,
    BULK,
    FITTED_ON,
    FUSED,
    LATENCY,
    NS_PER_MS,
    Setting,
    calibrated,
    error_frac,
    expert_flops_per_s,
    facts,
    hypotheses,
    needed,
    predicted,
    predicted_efficiency,
    published,
    systems,
    timeline,
    timeline_with_room,
)
from perfmodel.schedule.measures import overlap_efficiency, throughput_tokens_per_s
from tests.conftest import ROOT

NAMES = {"Megatron+DeepEP": "megatron-deepep", "DeepSpeedMoE": "deepspeed-moe", "DeepEP": "megatron-deepep"}
MACHINES = {"8xV100 cloud VM": "8 V100 in a cloud VM", "32xA100 supercomputer": "32 A100 of a supercomputer"}
CASES = [(system, name) for system in (FUSED, *BASELINES) for name in hypotheses(system)]
GROWING = [name for name in BASELINE_HYPOTHESES if name not in ("launch", "start")]


def test_the_shipped_figures_are_the_published_ones(shared: Path) -> None:
    with (shared / "reference" / "flashmoe_latency.csv").open() as file:
        for row in csv.DictReader(file):
            at = Setting(int(row["gpus"]), int(row["tokens_per_gpu"]))
            assert published()[row["system"]][at] == float(row["forward_ms"]) * NS_PER_MS
    n_seen = 0
    with (shared / "reference" / "flashmoe_facts.csv").open() as file:
        for row in csv.DictReader(file):
            if row["quantity"] != "setup":
                system = MACHINES.get(row["system"], NAMES.get(row["system"], row["system"].lower()))
                scale = 0.01 if row["unit"] == "%" else 1
                assert facts(row["quantity"])[system] == pytest.approx(float(row["value"]) * scale)
                n_seen += 1
    assert n_seen == 19


def test_every_published_row_names_its_source() -> None:
    for path in LATENCY.parent.glob("flashmoe_*.csv"):
        with path.open(encoding="utf-8") as file:
            assert all("2506.04667" in row["source"] or "FlashMoE" in row["source"] for row in csv.DictReader(file))


@pytest.mark.parametrize(("system", "hypothesis"), CASES)
def test_calibration_meets_its_own_row_and_looks_at_no_other(system: str, hypothesis: str, tmp_path: Path) -> None:
    at = systems()[system].fitted_on
    found = predicted(system, hypothesis, at)
    assert at.tokens_per_gpu == 4096 and found is not None
    assert found.latency_ns == pytest.approx(published()[system][at], rel=2e-3)  # tasks change order
    with LATENCY.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if (int(row["n_gpus"]), int(row["tokens_per_gpu"])) != at:
            row["forward_ms"] = str(3 * float(row["forward_ms"]))
    copy = tmp_path / "latency.csv"
    with copy.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    changed = published(copy)
    assert changed[system] != published()[system]
    assert calibrated(system, hypothesis, changed) == calibrated(system, hypothesis)
    slower = {system: {at: 1.5 * published()[system][at]}}
    assert calibrated(system, hypothesis, slower) != pytest.approx(calibrated(system, hypothesis), rel=0.1)


def test_a_latency_that_no_number_gives_calibrates_nothing() -> None:
    assert needed("fastermoe", "all-to-all", FITTED_ON, {"fastermoe": {FITTED_ON: 1.0}}) is None


def test_hypotheses_add_what_they_say_by_hand() -> None:
    plain = timeline("megatron-te", FITTED_ON)
    late = timeline("fastermoe", FITTED_ON, "start", 1_020_000.0)
    assert late.latency_ns - timeline("fastermoe", FITTED_ON).latency_ns == pytest.approx(2e6)
    # 261 launches of 100 us take longer than all else.
    assert timeline("megatron-te", FITTED_ON, "launch", 1e5).latency_ns == pytest.approx(26.1e6)
    # Start, alpha, and at 1 GB/s: 256 rows for each of 28 experts elsewhere; all 4096 tokens of 7 others.
    row_bytes = 2048 * 2
    for name, rows in (("all-to-all", 28 * 256), ("all-gather", 7 * 4096)):
        found = timeline("megatron-te", FITTED_ON, name, 1e9)
        assert found.phases["dispatch"] == pytest.approx(20_000 + 2_000 + rows * row_bytes)
        assert found.phases["gemm1"] == plain.phases["gemm1"]
    alone = timeline("megatron-te", FITTED_ON, "all rows", 1.0)
    assert len(alone.busy_ns) == 1 and "dispatch" not in alone.phases
    twice = timeline("megatron-cutlass", FITTED_ON, "work", 2.0)
    assert twice.phases["gemm1"] == pytest.approx(2 * plain.phases["gemm1"])


def test_a_fixed_time_is_refuted_by_tokens_and_what_grows_with_them_is_not() -> None:
    for system in BULK:
        for tokens in (8192, 16384):
            at = Setting(8, tokens)
            for name in ("launch", "start"):
                assert (error_frac(system, name, at) or 0) < -0.4
            for name in GROWING:
                assert abs(error_frac(system, name, at) or 1) < 0.15
    # No room for rows that an expert can have explains the latency either.
    assert timeline_with_room("megatron-cutlass", FITTED_ON, 16.0).latency_ns < 0.7 * 9.9 * NS_PER_MS


def test_more_gpus_refute_a_factor_and_an_all_to_all_in_megatron() -> None:
    for system in ("megatron-cutlass", "megatron-te"):
        measured = facts("overlap_efficiency_8gpu")[system]
        off = {name: abs((predicted_efficiency(system, name, 8) or 9) - measured) for name in GROWING}
        assert off["all rows"] < 0.06 and off["all-gather"] < 0.1
        assert off["work"] > 0.5 and off["all-to-all"] > 0.3


def test_one_rate_predicts_flashmoes_tokens_roughly_and_not_its_loss_with_gpus() -> None:
    for at in (Setting(8, 8192), Setting(8, 16384)):
        assert 0.05 < (error_frac(FUSED, "rate", at) or 0) < 0.2  # too slow: a part of the time is fixed
    assert 67e12 < (calibrated(FUSED, "rate") or 0) < 494.7e12  # beyond fp32 without tensor cores
    assert (predicted_efficiency(FUSED, "rate", 8) or 0) > 0.97 > facts("overlap_efficiency_8gpu")[FUSED] + 0.05
    assert (predicted_efficiency(FUSED, "link", 8) or 1) < 0.7
    assert (error_frac(FUSED, "launch", Setting(8, 16384)) or 0) < -0.3


def test_waiting_fits_the_utilisation_of_fastermoe_and_not_of_megatron() -> None:
    def computing(system: str, hypothesis: str) -> float:
        number = calibrated(system, hypothesis) or 0
        return timeline(system, Setting(2, 8192), hypothesis, number, "a100-sxm-80gb", 64).compute_busy_frac

    active = facts("sm_utilisation")
    for name in ("launch", "start", "all-to-all"):
        assert abs(computing("fastermoe", name) - active["fastermoe"]) < 0.1
        assert computing("megatron-te", name) < 0.3 * active["megatron"]
    assert computing("megatron-te", "all-gather") < active["megatron"] < computing("megatron-te", "work")


def test_published_identities_by_hand() -> None:
    own = published()[FUSED]
    assert throughput_tokens_per_s(8192, 8, own[Setting(8, 8192)]) == pytest.approx(17.7e6, rel=0.003)
    # 2 x 8192 x 2 rows x 2 GEMMs of 2048 x 2048 are 275 GFLOP; the added 4096 tokens took 1.6 ms: above fp32's 67.
    assert expert_flops_per_s(own[Setting(8, 8192)], 8192) == pytest.approx(274.88e9 / 3.7e-3, rel=1e-3)
    added = own[Setting(8, 8192)] - own[FITTED_ON]
    assert expert_flops_per_s(added, 4096) == pytest.approx(85.9e12, rel=1e-3)
    for system in (FUSED, *BULK):
        for n_gpus in (4, 8):
            two, more = (published()[system][Setting(n, 8192)] for n in (2, n_gpus))
            stated = facts(f"overlap_efficiency_{n_gpus}gpu")[system]
            assert overlap_efficiency(two, more) == pytest.approx(stated, abs=0.01)


def test_symmetric_tensors_by_hand() -> None:
    sizes = {row.model: row.size_bytes(row.padded_tokens) / 2**30 for row in symmetric()}
    assert sizes["Mixtral-8x7B"] == 4 * 32768 * 4096 * 4 / 2**30 == 2
    assert sizes["Snowflake Arctic"] == 4 * 128 * 128 * 7168 * 4 / 2**30 == 1.75  # 32 tokens an expert fill a tile
    assert sizes["Qwen3-235B-A22B"] == 3  # 320 tokens an expert fill three tiles
    wrong = [row.model for row in symmetric() if row.n_bytes / 2**30 != sizes[row.model]]
    assert wrong == ["DeepSeek-V3"]
    assert symmetric()[0].tokens_of_4kb == 16384


def test_stragglers_and_payload_by_hand() -> None:
    spans = [Span(g, "compute", "gemm2", 0.0, done) for g, done in enumerate((40.0, 100.0))]
    spans += [Span(g, "send", "combine", 100.0, 20.0) for g in (0, 1)]
    phases = {"launch": 5.0, "gemm2": 100.0, "dispatch": 20.0, "combine": 20.0}
    made = LayerTimeline(
        "bulk", 145.0, (145.0, 145.0), phases, (40.0, 100.0), {}, "gemm2", 1, 1.0, 1.0, spans=(*spans,)
    )
    assert straggler_ratio(made) == (120 - 40) / 20
    assert late_gpu_ns(made, 3.0) == 145 + 200
    assert 1 < uneven_straggler_ratio("uniform", FITTED_ON) < 1.3 < uneven_straggler_ratio("power-law", FITTED_ON)
    mixtral, olmoe = payload("mixtral-8x7b__c4"), payload("olmoe-1b-7b__c4")
    assert 0 < mixtral.dropped_frac < mixtral.padding_frac < olmoe.padding_frac < 1


def test_the_page_is_what_is_computed() -> None:
    found = (ROOT / "docs" / "flashmoe.md").read_text(encoding="utf-8")
    assert page() == found, "run `python docs/regenerate.py`"

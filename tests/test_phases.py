"""Measured phases beside predicted ones, on made-up captures whose times are known."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from perfmodel.cli.main import app
from perfmodel.ep_capture import load_ep_capture, shipped_ep_captures
from perfmodel.errors import InputError
from perfmodel.hardware import QUANTITIES
from perfmodel.latency import load_model
from perfmodel.physics.blas import FP32_DEFAULTS
from perfmodel.report.phases import efficiency_page, phases_page
from perfmodel.schedule import Fabric, Link, drawn
from perfmodel.schedule.captured import (
    LATENCY,
    SHARING,
    errors_of,
    last_at_combine,
    late_collectives,
    layer_of,
    noise_of,
    on_cores_ns,
    overlap_efficiencies,
    predict_step,
    set_beside,
    sharing_ns,
    summary,
    with_factors,
)
from perfmodel.schedule.probed import Crowd, crowds, profile_of
from tests.conftest import ROOT
from tests.ep_captures_made import (
    ALPHA_NS,
    CHUNKED,
    GEMM_FLOPS_PER_S,
    LINK_BYTES_PER_S,
    STREAM_BYTES_PER_S,
    write_by_hand_made,
    write_model_made,
)
from tests.test_docs import keys_of

SHAPES: tuple[dict[str, Any], ...] = (
    {"shape": "made-up-a", "n_experts": 8, "hidden": 512, "inter": 256, "tokens_per_gpu": 64},
    {"shape": "made-up-b", "n_experts": 16, "hidden": 256, "inter": 512, "tokens_per_gpu": 200},
    {"shape": "made-up-c", "n_experts": 4, "hidden": 1024, "inter": 256, "tokens_per_gpu": 16, "top_k": 1},
)


def test_the_machine_is_what_probes_of_all_ranks_together_say(tmp_path: Path) -> None:
    capture = load_ep_capture(write_by_hand_made(tmp_path / "made-up"))
    profile = profile_of(capture)
    assert profile["fp32_gemm_flops_per_s"] == GEMM_FLOPS_PER_S  # the large one, and not the one of a rank alone
    assert profile["memory_stream_bytes_per_s"] == STREAM_BYTES_PER_S
    assert profile["n_cores_count"] == 1
    assert profile["peer_link_alpha_ns"] == pytest.approx(ALPHA_NS, rel=1e-3)
    assert profile["peer_link_all_to_all_bytes_per_s"] == pytest.approx(LINK_BYTES_PER_S, rel=1e-3)
    assert all(one.kind == "measured" for one in profile.quantities.values())


def test_one_wild_all_to_all_hardly_moves_the_line(tmp_path: Path) -> None:
    path = write_by_hand_made(tmp_path / "made-up")
    lines = [json.loads(line) for line in (path / "probes.jsonl").read_text().splitlines()]
    wild = next(line for line in lines if line["probe"] == "all_to_all" and line["params"]["bytes"] == 100_000)
    wild["value"] *= 5
    (path / "probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    profile = profile_of(load_ep_capture(path))
    assert profile["peer_link_alpha_ns"] == pytest.approx(ALPHA_NS, rel=0.05)
    assert profile["peer_link_all_to_all_bytes_per_s"] == pytest.approx(LINK_BYTES_PER_S, rel=0.1)


@pytest.mark.parametrize("probe", ["gemm", "stream", "all_to_all"])
def test_a_capture_without_a_probe_is_refused_with_those_it_has(probe: str, tmp_path: Path) -> None:
    path = write_by_hand_made(tmp_path / "made-up")
    lines = [line for line in (path / "probes.jsonl").read_text().splitlines() if f'"{probe}"' not in line]
    (path / "probes.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=f"has no probe '{probe}' of all ranks together; it has"):
        profile_of(load_ep_capture(path))


def test_a_layer_has_the_recorded_rows_and_places(tmp_path: Path) -> None:
    capture = load_ep_capture(write_by_hand_made(tmp_path / "made-up"))
    traffic = layer_of(capture.measured[0], profile_of(capture)).traffic
    assert traffic.rows_between.tolist() == [[5, 15], [10, 10]]  # experts 0 and 1, 2 and 3
    assert traffic.received.tolist() == [[9, 6], [13, 12]]
    assert (traffic.tokens <= np.minimum(traffic.rows_between, 10)).all()


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_capture_of_the_models_own_times_is_predicted_to_the_nanosecond(factor: float, tmp_path: Path) -> None:
    beside = set_beside(write_model_made(tmp_path / "made-up", SHAPES, factor=factor))
    ratios = beside.table["measured_ns"] / beside.table["predicted_ns"]
    assert not beside.table["measured_ns"].null_count()
    assert ratios.to_numpy() == pytest.approx(factor, rel=2e-3)
    assert {"gate", "permute", "dispatch", "gemm1", "activation", "gemm2", "combine", "reduce", LATENCY} == set(
        beside.errors["phase"]
    )
    assert beside.errors["median_error_frac"].to_numpy() == pytest.approx(1 - 1 / factor, abs=2e-3)
    # What is wrong by the same factor everywhere is right once the factor is known from the other shapes.
    assert errors_of(with_factors(beside.table))["p90_error_frac"].max() < 3e-3  # type: ignore[operator]
    said = summary(beside)
    assert said["faster_than_bulk"].to_numpy() == pytest.approx(
        said["predicted_faster_than_bulk"].to_numpy(), 1e-3, nan_ok=True
    )
    found = last_at_combine(beside)
    assert found.height == len(SHAPES)


def test_a_factor_is_never_fitted_on_the_shape_that_it_is_judged_on() -> None:
    table = pl.DataFrame(
        {
            "workload": ["u", "v", "w"],
            "shape": ["a", "b", "b"],
            "phase": ["gate"] * 3,
            "rank": [0] * 3,
            "measured_ns": [10.0, 30.0, 50.0],
            "predicted_ns": [10.0, 10.0, 10.0],
        }
    )
    assert with_factors(table)["predicted_ns"].to_list() == [40.0, 10.0, 10.0]
    assert with_factors(table.head(1)).drop_nulls().is_empty()


def test_the_slow_rank_that_others_wait_for_is_named(tmp_path: Path) -> None:
    found = last_at_combine(set_beside(load_ep_capture(write_by_hand_made(tmp_path / "made-up"))))
    assert found.select("workload", "predicted_rank", "measured_rank", "last_frac", "measured_skew_ns").rows() == [
        ("b1", 1, 1, 1.0, 800.0)
    ]


def test_overlap_efficiency_needs_the_same_work_on_two_ranks(tmp_path: Path) -> None:
    two = write_model_made(tmp_path / "two", SHAPES[:1], n_ranks=2)
    four = write_model_made(tmp_path / "four", SHAPES[:1], n_ranks=4)
    found = overlap_efficiencies([four, two])
    page = run(str(four.path), str(two.path)).split("of how many\n")[1].splitlines()[:2]
    assert page[1].split()[:3] == ["four", "4", "64"] and "chunked x 2" in page[0]
    assert f"{found['overlap_efficiency'][0]:.2f} (" in page[1]
    assert found.select("workload", "capture", "way", "n_ranks").rows() == [
        ("w0", "four", "bulk", 4),
        ("w0c", "four", "chunked x 2", 4),
    ]
    took = [set_beside(one).predicted["w0"].latency_ns for one in (two, four)]
    assert found["overlap_efficiency"][0] == pytest.approx(took[0] / took[1], rel=1e-3)
    assert overlap_efficiencies([four]).is_empty()


def test_overlap_efficiency_is_told_by_what_a_workload_is_and_where_there_is_none_why(tmp_path: Path) -> None:
    two = write_model_made(tmp_path / "two", SHAPES[:2], n_ranks=2)
    four = write_model_made(tmp_path / "four", SHAPES[1::-1], n_ranks=4)
    lines = run(str(two.path), str(four.path)).split("T(2)")[-1].splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["made-up-a", "64"],
        ["chunked", "x"],
        ["made-up-b", "200"],
        ["chunked", "x"],
    ]
    other = write_model_made(tmp_path / "other", SHAPES[2:], n_ranks=4)
    assert "no overlap efficiency: it needs captures of 2" in run(str(two.path), str(other.path))
    crowded = write_model_made(tmp_path / "crowded", SHAPES[:1], n_ranks=4, n_cores=2)
    assert "crowded: 4 ranks share 2 cores" in run(str(two.path), str(crowded.path)) and "four: 4" not in lines


def test_a_workload_is_the_same_work_in_every_folder_whatever_its_id_there(tmp_path: Path) -> None:
    two = write_model_made(tmp_path / "two", SHAPES[:2], n_ranks=2)
    four = write_model_made(tmp_path / "four", SHAPES[1::-1], n_ranks=4)
    found = json.loads(run(str(two.path), str(four.path), "--workload", "2", "--json"))["captures"]
    assert [one["workloads"][0]["shape"] for one in found] == ["made-up-a", "made-up-a"]
    assert [one["workloads"][0]["workload"] for one in found] == ["w0c", "w1c"]
    page = run(str(two.path), str(four.path), "--workload", "2").split("T(2)")[-1]
    assert "made-up-a" in page and "made-up-b" not in page
    other = write_model_made(tmp_path / "other", SHAPES[2:], n_ranks=4)
    with pytest.raises(InputError, match="other has no workload like w0c of two: made-up-a, 64 tokens"):
        run(str(two.path), str(other.path), "--workload", "w0c")


def test_a_picture_shows_the_median_step_above_the_prediction(tmp_path: Path) -> None:
    path = write_by_hand_made(tmp_path / "made-up")
    lines = [json.loads(line) for line in (path / "steps.jsonl").read_text().splitlines()]
    for line in lines:  # 3.70, 3.80 and 3.75 us: the last is the median
        line["end_ns"] += {0: 0, 1: 100, 2: -50}[line["step"]]
    (path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    capture = load_ep_capture(path)
    one = capture.choose("c2")
    panel = drawn.measured(capture, one)
    own = [(s.phase, s.piece, s.start_ns, s.dur_ns) for s in panel.spans if s.gpu == 0]
    assert sorted(own) == sorted(CHUNKED[0][2]) and "step 2" in panel.title
    assert {s.phase for s in panel.spans if s.lane == drawn.MOVING} == {"dispatch", "combine"}
    beside = set_beside(capture)
    said = drawn.predicted(beside, one)
    busy = beside.predicted["c2"].timeline.busy_ns
    assert [said.busy_ns(rank) for rank in range(2)] == pytest.approx(busy)
    pytest.importorskip("plotly")
    run(str(path), "--workload", "c2", "--html", str(tmp_path / "step.html"))
    assert "made-up 2: made-up-a on 2 ranks" in (tmp_path / "step.html").read_text()
    with pytest.raises(InputError, match="give --workload"):
        run(str(path), "--html", str(tmp_path / "step.html"))
    with pytest.raises(InputError, match=r"expected an \.html file"):
        run(str(path), "--workload", "c2", "--html", "step.png")


def run(*words: str) -> str:
    done = CliRunner().invoke(app, ["phases", *words], catch_exceptions=False, standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.stdout


def test_the_page_says_what_is_covered_and_what_is_missed(tmp_path: Path) -> None:
    page = run(str(write_by_hand_made(tmp_path / "made-up")))
    assert page.startswith(
        "made-up: 2 ranks of 1 thread on 4 cores, gloo on cpu, fp32\ncovers     2 workloads of 1 shape"
    )
    assert "within 30.0 ns" in page and "3.70 µs" in page and "1.76/" in page
    assert "the rank that all wait for at combine is the predicted one in 1 of 1 workloads" in page
    one = run(str(tmp_path / "made-up"), "--workload", "1")
    assert "1.50 µs / " in one and one.startswith(
        "made-up 1: made-up-a on 2 ranks, 10 tokens on each, uniform, bulk; id b1"
    )


def test_json_holds_measured_and_predicted_of_each_phase(tmp_path: Path) -> None:
    path = write_by_hand_made(tmp_path / "made-up")
    found = json.loads(run(str(path), "--json"))["captures"][0]
    assert [one["workload"] for one in found["workloads"]] == ["b1", "c2"]
    gemm = [row for row in found["workloads"][0]["phases"] if row["phase"] == "gemm1"]
    assert [row["measured_ns"] for row in gemm] == [1000, 1500] and all(row["predicted_ns"] > 0 for row in gemm)
    chosen = json.loads(run(str(path), "--json", "--workload", "c2"))["captures"][0]
    assert [one["workload"] for one in chosen["workloads"]] == ["c2"]
    fitted = json.loads(run(str(path), "--json", "--model", "epyc-zen5-2c-fp32"))["captures"][0]
    assert fitted["workloads"][0]["predicted_ns"] != found["workloads"][0]["predicted_ns"]


def test_a_model_of_a_gpu_is_refused_for_ranks_on_cpus(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use a model of the same kind of device"):
        run(str(write_by_hand_made(tmp_path / "made-up")), "--model", "h100-sxm-vllm-triton-bf16")


@pytest.mark.parametrize("path", shipped_ep_captures(), ids=lambda path: path.name)
def test_shipped_captures_are_predicted_within_bounds_that_hold_today(path: Path) -> None:
    capture = load_ep_capture(path)
    beside = set_beside(capture, load_model(f"epyc-zen5-2c-{capture.dtype}"))
    assert set(beside.errors["phase"]) >= {
        "gate",
        "permute",
        "dispatch",
        "gemm1",
        "gemm2",
        "combine",
        "reduce",
        LATENCY,
    }
    timed = beside.table.filter(pl.col("phase") != SHARING)  # which takes off where links beat the busiest rank's bytes
    assert (timed["predicted_ns"] > 0).all()
    errors = {row["phase"]: row["median_error_frac"] for row in beside.errors.iter_rows(named=True)}
    noise = {row["phase"]: row["median_error_frac"] for row in beside.noise.iter_rows(named=True)}
    assert errors[LATENCY] < 0.15 and all(errors[name] < 0.6 for name in ("permute", "activation", "reduce", "regroup"))
    assert set(noise) == set(errors) and noise[LATENCY] < 0.1
    assert summary(beside).height == len(capture.measured)


def test_the_page_on_shipped_captures_is_what_the_command_says_today() -> None:
    found = (ROOT / "docs" / "expert-parallel.md").read_text(encoding="utf-8")
    captures = [load_ep_capture(path) for path in shipped_ep_captures()]
    for capture in captures:
        assert phases_page(set_beside(capture)) in found, "run `python docs/regenerate.py`"
    efficiency = efficiency_page(captures)
    assert efficiency is not None and efficiency in found


def test_ranks_share_the_processors_that_they_are_bound_to_and_no_others(tmp_path: Path) -> None:
    path = write_model_made(tmp_path / "made-up", SHAPES[:1], n_cores=2).path  # four ranks of one thread

    def found(cpus: list[list[int]] | None) -> list[tuple[tuple[int, ...], float]]:
        told = json.loads((path / "expert_parallel.json").read_text()) | {"cpus_of_ranks": cpus}
        (path / "expert_parallel.json").write_text(json.dumps(told))
        return [(one.ranks, one.at_once) for one in crowds(load_ep_capture(path))]

    assert found([[0], [1], [0], [1]]) == [((0, 2), 1.0), ((1, 3), 1.0)]
    assert found([[0], [1], [0], [0]]) == [((0, 2, 3), 1.0)]  # rank 1 has its own
    assert found([[0], [0, 1], [1], [1]]) == [((0, 1, 2, 3), 2.0)]
    assert found([[0], [1], [2], [3]]) == []
    assert found(None) == found([[], [], [], []]) == [((0, 1, 2, 3), 2.0)]


def test_of_ranks_on_one_core_only_those_with_work_wait_for_each_other(tmp_path: Path) -> None:
    capture = write_model_made(tmp_path / "made-up", SHAPES[:1])
    layer = layer_of(capture.measured[0], profile_of(capture))
    layer = replace(layer, fabric=Fabric(4, 4, Link(0.0, 1e30)))
    work = {"gate": np.array([100.0, 10, 30, 20]), "gemm1": np.zeros(4), "reduce": np.array([0.0, 40, 0, 40])}
    # Bound: ranks 0 and 2 are done after 130, 1 and 3 after 30, then these after 80 of summing.
    pairs = (Crowd((0, 2), 1.0), Crowd((1, 3), 1.0))
    assert sharing_ns(layer, work, pairs) == pytest.approx((130 - 100) + (80 - 40))
    # All on two cores: 20, 30 and 50 until all but rank 0 are done, and both that sum have a core.
    pooled = (Crowd((0, 1, 2, 3), 2.0),)
    assert sharing_ns(layer, work, pooled) == pytest.approx(10 * 2 + 10 * 1.5 + 10 + 70 - 100)


def test_what_an_engine_does_besides_has_its_small_operators(tmp_path: Path) -> None:
    capture = write_model_made(tmp_path / "made-up", SHAPES[:1])
    layer = layer_of(capture.measured[0], profile_of(capture))
    bare, both = (predict_step(layer, "chunked", 2, n, regroups=n > 0) for n in (0, 1))
    small_ns = FP32_DEFAULTS.layer_ns / 14
    assert bare.counts_ns == 0 and not bare.regroup_ns.any()
    assert both.counts_ns == pytest.approx(ALPHA_NS + (8 + 4) * small_ns, rel=1e-3)
    moved = 4 * layer.traffic.received.sum(axis=1) * 512 * 4 / STREAM_BYTES_PER_S * 1e9
    assert both.regroup_ns == pytest.approx(moved + 2 * 10 * small_ns)
    assert both.latency_ns == pytest.approx(bare.latency_ns + both.counts_ns + both.regroup_ns.max())


def test_half_of_the_steps_is_how_well_anybody_could_predict_the_other(tmp_path: Path) -> None:
    path = write_by_hand_made(tmp_path / "made-up")
    noise = noise_of(load_ep_capture(path))
    # Steps 0 and 2 of the bulk workload last 3700 and 3800, step 1 3700; the chunked ones 2100, 2200 and 2100.
    told = noise.row(by_predicate=pl.col("phase") == LATENCY, named=True)
    assert told["n"] == 2 and told["median_error_frac"] == pytest.approx((50 / 3700 + 50 / 2100) / 2)
    assert noise.filter(pl.col("phase") == "gemm1")["p90_error_frac"].to_list() == [0]
    lines = [json.loads(line) for line in (path / "steps.jsonl").read_text().splitlines()]
    (path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] == 0))
    assert noise_of(load_ep_capture(path)).is_empty()


def test_collectives_that_end_a_slice_late_are_counted_apart(tmp_path: Path) -> None:
    path = write_by_hand_made(tmp_path / "made-up")
    lines = [json.loads(line) for line in (path / "steps.jsonl").read_text().splitlines()]
    for line in lines:
        if line["workload"] == "b1" and line["step"] == 1:  # the second combine is over 4 ms later
            line["end_ns"] += 4_000_000
            for phase in line["phases"]:
                phase[3] += 4_000_000 * (phase[0] == "combine")
                phase[2] += 4_000_000 * (phase[0] == "reduce")
    (path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    beside = set_beside(load_ep_capture(path))
    found = late_collectives(beside)
    assert found.select("phase", "n").rows() == [("counts", 3), ("dispatch", 3), ("combine", 3)]
    assert found["late_frac"].to_list() == pytest.approx([0, 0, 1 / 3])
    said = beside.predicted["b1"].timeline.phases["combine"]
    assert found["prompt_ratio"][2] == pytest.approx(said / 200)  # which takes 200 ns in the two others


def test_ranks_that_share_cores_are_done_when_their_work_is() -> None:
    assert on_cores_ns(np.array([10.0, 10, 10, 10]), 2) == 20  # all the time two on each core
    assert on_cores_ns(np.array([10.0, 0, 0, 0]), 2) == 10  # alone on its core
    # Three share two cores until the first is done after 3 x 4 / 2; then each has its own for the 6 that are left.
    assert on_cores_ns(np.array([10.0, 4, 10]), 2) == 3 * 4 / 2 + 6
    assert on_cores_ns(np.array([7.0, 3]), 2) == 7


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.sampled_from([0.5, 1, 2, 3.5]))
def test_shared_cores_do_no_more_than_all_work_and_never_less_than_the_longest(
    work: list[float], at_once: float
) -> None:
    done = on_cores_ns(np.array(work), at_once)
    assert done >= max(sum(work) / at_once, max(work) / min(at_once, 1)) * (1 - 1e-9) - 1e-6
    assert done <= (sum(work) / at_once + max(work) * max(1, 1 / at_once)) * (1 + 1e-9)


@pytest.mark.parametrize(("n_cores", "crowd"), [(4, None), (2, 2.0), (None, None)])
def test_ranks_share_cores_where_there_are_fewer_than_they_use(
    n_cores: int | None, crowd: float, tmp_path: Path
) -> None:
    beside = set_beside(write_model_made(tmp_path / "made-up", SHAPES[:1], n_cores=n_cores))
    shared = [one.sharing_ns for one in beside.predicted.values()]
    if crowd is None:
        assert shared == [0.0, 0.0] and "sharing" not in set(beside.table["phase"])
        return
    bulk = beside.predicted["w0"]
    computing = sum(float(bulk.compute_ns[name].max()) for name in bulk.compute_ns)
    assert 0.5 * computing < bulk.sharing_ns < 1.2 * computing  # nearly even ranks, two on each core


def test_a_probe_longer_than_a_time_slice_saw_a_share_of_its_core(tmp_path: Path) -> None:
    path = write_model_made(tmp_path / "made-up", SHAPES[:1], n_cores=2).path  # for four ranks
    lines = [line for line in (path / "probes.jsonl").read_text().splitlines() if '"stream"' not in line]
    for n_bytes, rate in ((2e7, 9e9), (2e8, 1e10), (4e7, 3e10)):  # 2.2 ms, 20 ms; 1.3 ms says nothing against these
        lines += [
            json.dumps(
                {"probe": "stream", "rank": 0, "params": {"n_bytes": n_bytes}, "value": rate, "unit": "bytes_per_s"}
            )
        ]
    (path / "probes.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    profile = profile_of(load_ep_capture(path))
    assert profile["memory_stream_bytes_per_s"] == 2e10
    assert "x 2 for the cores they share" in profile.quantities["memory_stream_bytes_per_s"].source
    (path / "probes.jsonl").write_text("\n".join(lines) + "\n")
    assert profile_of(load_ep_capture(path))["memory_stream_bytes_per_s"] == 3e10


def test_captures_of_gpus_and_of_one_rank_are_read_too(tmp_path: Path) -> None:
    path = write_model_made(tmp_path / "gpus", SHAPES).path
    for name, old, new in (
        ("workloads.jsonl", '"dtype": "fp32"', '"dtype": "bf16"'),
        ("expert_parallel.json", '"device": "cpu", "dtype": "float32"', '"device": "cuda", "dtype": "bfloat16"'),
    ):
        content = (path / name).read_text()
        assert old in content
        (path / name).write_text(content.replace(old, new))
    beside = set_beside(load_ep_capture(path))
    assert beside.profile.device == "gpu" and "bf16_gemm_flops_per_s" in beside.profile.quantities
    assert (beside.table["predicted_ns"] > 0).all()
    alone = write_model_made(tmp_path / "alone", SHAPES[:1], n_ranks=1)
    assert "dispatch" not in set(set_beside(alone).table["phase"])
    assert run(str(alone.path)).startswith("alone: 1 rank of 1 thread")


def test_the_nomenclature_knows_the_keys_of_phases(tmp_path: Path) -> None:
    paths = [str(write_model_made(tmp_path / f"n{n}", SHAPES[:1], n_ranks=n).path) for n in (2, 4)]
    keys = keys_of(json.loads(run(*paths, "--json"))) - set(QUANTITIES)
    named = set(re.findall(r"`([^`]+)`", (ROOT / "docs" / "nomenclature.md").read_text(encoding="utf-8")))
    assert keys - named == set()
    assert {"faster_than_bulk", "last_frac", "overlap_efficiency", "hidden_frac"} <= keys

"""Ceilings per tier, where observations stand under them, and what is lost below: by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from perfmodel.capture import load_capture, per_workload, profile_of
from perfmodel.cli.main import app
from perfmodel.errors import InputError
from perfmodel.hardware import hardware
from perfmodel.latency import LatencyModel
from perfmodel.physics import attainable_flops_per_s, ceilings
from perfmodel.report import roofline_page
from perfmodel.roofline import (
    LOST_TO,
    POINTS,
    costliest,
    dtypes_by_time,
    dtypes_of,
    lost_frac,
    lost_to,
    nominal_roof,
    points,
    product_points,
    reached_roof,
    roofline,
    tiers,
)
from tests.captures_made import ROOF, TRUE_CONSTANTS, write_gpu_capture, write_synthetic_capture


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up capture of an H100 with every way to reach offloaded experts."""
    return write_gpu_capture(tmp_path_factory.mktemp("made") / "gpu")


def test_tiers_of_gh200_fastest_first_with_their_ridge_points() -> None:
    found = tiers(hardware("gh200"), "bf16")
    assert [t.name for t in found] == ["device memory", "host link, copy", "host memory", "host link, read in place"]
    assert found[0].ridge_flops_per_byte == pytest.approx(0.79 * 989e12 / 3728e9)
    assert [t.bytes_per_s for t in found] == sorted((t.bytes_per_s for t in found), reverse=True)


def test_the_roof_is_the_lower_of_its_two_sides() -> None:
    assert attainable_flops_per_s(2.0, 100.0, 10.0) == 20
    assert attainable_flops_per_s(50.0, 100.0, 10.0) == 100


def test_points_by_hand(tmp_path: Path) -> None:
    capture = load_capture(write_synthetic_capture(tmp_path / "made", n_runs=1))
    observations = per_workload(capture.observations)
    table = points(observations, profile_of(capture))
    # One token, two of eight experts of 512 x 1024, fp32: three matrices each, rows of hidden and inter in and out.
    row = table.row(0, named=True)
    flops = 2 * 2 * 3 * 512 * 1024
    moved = 2 * 3 * 512 * 1024 * 4 + 4 * 2 * ((512 + 2048) + (1024 + 512))
    assert row["flops_per_byte"] == pytest.approx(flops / moved)
    assert row["flops_per_s"] == pytest.approx(flops / row["time_ns"] * 1e9)
    assert row["bound"] == "memory"
    assert row["roof_frac"] == pytest.approx(row["flops_per_s"] / (flops / moved * ROOF.bytes_per_s))
    assert table["roof_frac"].max() <= 1
    assert set(table["bound"]) == {"memory", "compute"}


def test_both_sorts_of_ceilings_say_what_they_rest_on() -> None:
    reached, nominal = reached_roof(hardware("gh200"), "bf16"), nominal_roof(hardware("gh200"), "bf16")
    assert reached.kind == "assumed: 79% of datasheet" and reached.flops_per_s == pytest.approx(0.79 * 989e12)
    assert nominal is not None and (nominal.flops_per_s, nominal.kind) == (989e12, "datasheet")
    assert {tier.name: tier.bytes_per_s for tier in nominal.tiers} == {
        "device memory": 4e12,
        "host link, copy": 450e9,
        "host memory": 384e9,
    }
    assert nominal.tiers[0].ridge_flops_per_byte == pytest.approx(989 / 4)


def test_nominal_peaks_of_a_capture_are_those_of_the_gpu_it_names_and_of_none_for_a_slice_or_a_cpu(gpu: Path) -> None:
    profile = profile_of(load_capture(gpu))
    shipped = nominal_roof(hardware("h100-sxm"), "bf16")
    assert profile.title.startswith("NVIDIA H100 80GB HBM3") and shipped is not None
    own = tuple(tier for tier in shipped.tiers if tier.name != "host memory")  # the host may be any
    assert nominal_roof(profile, "bf16") == replace(shipped, tiers=own) and len(own) == 2
    assert nominal_roof(replace(profile, title="NVIDIA H100 80GB HBM3 MIG 1g.10gb"), "bf16") is None
    assert nominal_roof(hardware("epyc-zen5-2c-bf16"), "bf16") is None
    assert dtypes_of(hardware("epyc-zen5-2c-bf16")) == ["bf16", "fp32"]


def test_offloaded_weights_count_on_the_link_that_they_cross(gpu: Path) -> None:
    capture = load_capture(gpu)
    rows = per_workload(capture.observations).filter(pl.col("dtype") == "bf16", pl.col("shape") == "mixtral-8x7b")
    one = rows.filter(pl.col("n_tokens") == 4096, pl.col("op").cast(pl.String) == "moe_layer")
    found = points(one, profile_of(capture))
    assert "cpu" in set(one["access"]) and set(found["access"]) == {"resident", "zero-copy", "copy", "copy-overlap"}
    # All 8 experts are active, 4 of them in host memory: 3 matrices of 4096 x 14336 each, in bf16.
    flops, expert_bytes = 2 * 4096 * 2 * 3 * 4096 * 14336, 3 * 4096 * 14336 * 2
    for row in found.iter_rows(named=True):
        if row["access"] == "resident":
            assert row["tier"] == "device memory"
            continue
        assert row["tier"] == ("host link, read in place" if row["access"] == "zero-copy" else "host link, copy")
        link = 50e9 if row["access"] == "zero-copy" else 55e9
        assert row["flops_per_byte"] == pytest.approx(flops / (4 * expert_bytes))
        assert row["bound"] == "memory"
        assert row["roof_frac"] == pytest.approx(4 * expert_bytes / link * 1e9 / row["time_ns"])


def test_reading_in_place_falls_back_to_the_rate_of_copies_and_without_a_link_has_no_roof(gpu: Path) -> None:
    capture = load_capture(gpu)
    rows = per_workload(capture.observations).filter(pl.col("dtype") == "bf16", pl.col("access") == "zero-copy")
    known = profile_of(capture)
    rates = dict(known.quantities)
    del rates["link_kernel_read_bytes_per_s"]
    assert "host link, copy" in set(points(rows, replace(known, quantities=rates))["tier"])
    del rates["link_h2d_copy_bytes_per_s"]
    found = roofline(replace(known, quantities=rates), "bf16", observations=rows)
    assert found.points.is_empty() and found.n_left_out == rows.height and found.points.schema == POINTS


def test_lost_time_is_what_the_roof_does_not_explain(tmp_path: Path) -> None:
    capture = load_capture(write_synthetic_capture(tmp_path / "made", n_runs=1))
    rows = per_workload(capture.observations)
    found = points(rows, profile_of(capture))
    least_ns = found["time_ns"] * found["roof_frac"]
    assert (found["time_ns"] - found["lost_ns"]).to_numpy() == pytest.approx(least_ns.to_numpy())
    assert found["time_frac"].sum() == pytest.approx(1.0)
    assert lost_frac(found) == pytest.approx(found["lost_ns"].sum() / found["time_ns"].sum())
    assert costliest(found)["lost_ns"].is_sorted(descending=True) and lost_to(found) == {}
    assert found["why"].null_count() == found.height
    assert lost_frac(found.head(0)) is None


def test_the_parts_of_a_model_that_is_right_explain_all_that_is_lost(tmp_path: Path) -> None:
    capture = load_capture(write_synthetic_capture(tmp_path / "made", n_runs=1))
    rows = per_workload(capture.observations)
    model = LatencyModel(profile_of(capture), "fp32", "synthetic")
    model.constants_, model.tiles_ = TRUE_CONSTANTS, None
    found = points(rows, profile_of(capture), model)
    parts = found.select(list(LOST_TO)).to_numpy()
    assert parts.sum(axis=1) == pytest.approx(found["lost_ns"].to_numpy(), rel=1e-3, abs=2)
    assert found["unexplained_ns"].max() < 1.0  # times are rounded to whole ns
    assert [list(LOST_TO)[i] for i in parts.argmax(axis=1)] == found["why"].to_list()
    assert sum(lost_to(found).values()) == pytest.approx(1.0)
    # One token, 2 of 8 experts, two GEMMs: 2 (call + 8 expert + 2 active) + layer.
    first = rows["shape"][0], rows["n_tokens"][0], found["fixed_ns"][0]
    assert first == ("synthetic-a", 1, pytest.approx(2 * (15_000 + 8 * 1_500 + 2 * 3_000) + 120_000))
    slower = points(rows.with_columns(pl.col("time_ns") * 10), profile_of(capture), model)
    assert set(slower["why"]) == {"unexplained_ns"}
    # A model that expects more than was measured, or more than the roof leaves at all, explains no more than was lost.
    for share in (0.9, 0.3, 0.01):
        faster = points(rows.with_columns(pl.col("time_ns") * share), profile_of(capture), model)
        assert faster.select(list(LOST_TO)).to_numpy().sum(axis=1) == pytest.approx(faster["lost_ns"].to_numpy())
    assert faster["lost_ns"].to_list() == [0.0] * faster.height == faster["unexplained_ns"].to_list()


def product(**columns: object) -> pl.DataFrame:
    base = {"op": "aten::mm", "m": 64, "n": 32, "k": 16, "batch": 1, "n_experts": None, "dtype": "bf16"}
    rates = {"flops": 2.0 * 64 * 32 * 16, "bytes": 4096, "time_ns": 100, "flops_per_s": 6.5e11, "flops_per_byte": 16.0}
    schema = {"n_experts": pl.Int64, "bytes": pl.Int64, "flops_per_byte": pl.Float64, "dtype": pl.String}
    return pl.DataFrame([base | rates | columns], schema_overrides=schema)


def test_products_of_a_trace_stand_under_the_roof_of_the_machine_that_is_named() -> None:
    gh200 = hardware("gh200")
    rows = pl.concat(
        [
            product(),
            product(op="aten::bmm", batch=3),
            product(op="aten::_grouped_mm", n_experts=8, time_ns=800),
            product(bytes=None, flops_per_byte=None),
        ]
    )
    found = product_points(rows, gh200)
    assert found["shape"].to_list() == ["64 x 32 x 16", "3 x (64 x 32 x 16)", "64 x 32 x 16, 8 experts"]
    assert found["roof_frac"][0] == pytest.approx(6.5e11 / (16 * ceilings(gh200, "bf16").bytes_per_s))
    assert found["time_frac"].to_list() == pytest.approx([0.1, 0.1, 0.8])
    assert roofline(gh200, "bf16", products=rows).n_left_out == 1
    assert roofline(gh200, "fp8", products=rows).n_left_out == 4
    assert dtypes_by_time(pl.concat([rows, product(dtype="fp32", time_ns=5000)])) == ["fp32", "bf16"]
    with pytest.raises(InputError, match="record_shapes"):
        dtypes_by_time(rows.head(0))
    assert product_points(product(flops=0.0, flops_per_s=0.0, flops_per_byte=0.0), gh200).is_empty()


def test_a_type_without_a_roof_is_refused_and_one_that_computes_in_another_says_so() -> None:
    with pytest.raises(InputError, match=r"no roof is known for 'fp64'; known types: .*bf16"):
        reached_roof(hardware("gh200"), "fp64")
    assert reached_roof(hardware("epyc-zen4-2c-fp32"), "bf16").kind == "measured, computing in fp32"


def test_the_page_names_both_sorts_of_ceilings_and_the_costliest_point_first(gpu: Path) -> None:
    capture = load_capture(gpu)
    rows = per_workload(capture.observations).filter(pl.col("dtype") == "bf16")
    found = roofline(profile_of(capture), "bf16", observations=rows)
    page = roofline_page(found, 3)
    assert re.search(r"bf16 compute +700 TFLOP/s +measured +989 TFLOP/s +datasheet", page)
    assert re.search(r"host link, read in place +50.0 GB/s +measured +14,000.0 FLOP/B +n/a", page)
    n_cpu = rows.filter(pl.col("access") == "cpu").height
    assert f"{found.points.height} points; {n_cpu} have no roof here" in page
    assert page.splitlines()[-3].startswith(f"{costliest(found.points)['lost_ns'][0] / 1e6:.1f} ms")
    assert "no datasheet peaks" in roofline_page(roofline(hardware("epyc-zen4-2c-fp32"), "fp32"))


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False, standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.stdout


def test_the_command_gives_the_numbers_of_the_library_and_a_report_with_the_figure(gpu: Path, tmp_path: Path) -> None:
    target = tmp_path / "roof.html"
    found = json.loads(run("roofline", gpu, "--shape", "mixtral-8x7b", "--json", "--html", target, "--top", "4"))
    assert found["dtype"] == "bf16" and len(found["points"]) == 4
    assert {point["shape"] for point in found["points"]} == {"mixtral-8x7b"}
    lost = [point["lost_ns"] for point in found["points"]]
    assert lost == sorted(lost, reverse=True) and 0 < found["lost_frac"] < 1
    assert found["nominal"]["flops_per_s"] == 989e12 and found["reached"]["tiers"][0]["bytes_per_s"] == 3e12
    page = target.read_text(encoding="utf-8")
    assert "plotly" in page and "mixtral-8x7b" in page
    assert json.loads(run("roofline", "gh200", "--json"))["points"] == []


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--shape", "olmo"), "nothing was measured of shape 'olmo'; there are mixtral-8x7b, olmoe, qwen3-30b-a3b"),
        (("--op", "gemm"), "there are grouped_gemm, moe_layer"),
        (("--dtype", "fp32"), "there are bf16, fp8"),
        (("--model", "epyc-zen5-2c-bf16"), "the model was fitted on a cpu"),
        (("--html", "roof.txt"), "expected an .html file"),
    ],
)
def test_what_the_command_cannot_show_is_one_sentence(gpu: Path, words: tuple[str, ...], match: str) -> None:
    with pytest.raises(InputError, match=match):
        run("roofline", gpu, *words)


def test_a_trace_is_shown_under_the_ceilings_of_the_machine_named(tmp_path: Path) -> None:
    folder = Path(__file__).parent.parent / "traces" / "epyc-zen5-2c-bf16"
    trace = next((folder / "profiles").glob("*olmoe-4-1-uniform*"))
    found = json.loads(run("roofline", "epyc-zen5-2c-bf16", "--trace", trace, "--json"))
    assert {point["op"] for point in found["points"]} >= {"aten::_grouped_mm"}
    shape = found["points"][0]["shape"]
    [one] = json.loads(run("roofline", "epyc-zen5-2c-bf16", "--trace", trace, "--json", "--shape", shape))["points"]
    assert one == found["points"][0] | {"time_frac": 1.0}
    assert np.sum([point["time_frac"] for point in found["points"]]) == pytest.approx(1.0)
    with pytest.raises(InputError, match="--model says why workloads of a capture"):
        run("roofline", "epyc-zen5-2c-bf16", "--trace", trace, "--model", "epyc-zen5-2c-bf16")

"""Reading captures: columns of offloading, calibration lines, damage; and what fits, checks and pages make of it."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from perfmodel import roofline
from perfmodel.capture import (
    CALIBRATIONS,
    LEFT_OUT_TABLE,
    OBSERVATIONS,
    fitted_rows,
    load_capture,
    per_workload,
    profile_of,
    shipped_captures,
)
from perfmodel.errors import InputError
from perfmodel.fitting import fit_source
from perfmodel.regression import check, of_capture
from perfmodel.sources import only_source, read_sources
from tests.captures_made import GPU_CALIBRATION, GPU_MODES, write_gpu_capture, write_synthetic_capture
from tests.commands import run
from tests.conftest import ROOT

LATER = ("offloaded", "order", "residency", "launch", "study")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpu_capture(tmp_path_factory.mktemp("made") / "gpu")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "gpu"))


def append(folder: Path, name: str, line: object) -> None:
    with (folder / name).open("a") as file:
        file.write((line if isinstance(line, str) else json.dumps(line)) + "\n")


def captures(*words: str) -> subprocess.CompletedProcess[str]:
    return run("captures", *words)


def test_captures_from_before_offloading_have_null_columns_and_empty_tables() -> None:
    capture = load_capture(shipped_captures()[0])
    assert capture.observations.schema == OBSERVATIONS
    assert all(capture.observations[column].is_null().all() for column in LATER)
    assert capture.calibrations.is_empty() and capture.calibrations.schema == CALIBRATIONS
    assert capture.left_out.is_empty() and capture.left_out.schema == LEFT_OUT_TABLE
    assert capture.capabilities == {} and capture.dtype == "fp32"


def test_offloading_is_read_and_survives_pooling_over_runs(made: Path) -> None:
    capture = load_capture(made)
    pooled = per_workload(capture.observations)
    assert pooled.height == 120 and set(pooled["n_runs"]) == {2}
    kinds = pooled.filter(pl.col("op") == "moe_layer").select("access", "residency", "launch").unique()
    assert kinds.height == len(GPU_MODES)
    row = pooled.filter(access="zero-copy", residency="mapped", launch="graph", shape="mixtral-8x7b").to_dicts()[0]
    assert (row["offloaded"], row["order"], row["offload_frac"]) == ([4, 5, 6, 7], "ascending", 0.5)
    assert row["study"] == "offload" and capture.capabilities["mapped"] is None


def test_calibration_lines_are_a_table(made: Path) -> None:
    table = load_capture(made).calibrations
    assert table.height == 2 * len(GPU_CALIBRATION)
    row = table.filter(quantity="link_h2d_copy_bytes_per_s", run=1).to_dicts()[0]
    assert row["value"] == pytest.approx(55e9 * 1.01) and row["unit"] == "bytes_per_s"
    assert json.loads(row["params"]) == {"n_bytes": 1 << 30} and row["capture"] == "gpu"


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("calibration.jsonl", {"probe": "x"}, "calibration.jsonl is damaged: line 33: .*params"),
        ("calibration.jsonl", "{", "calibration.jsonl is damaged: line 33"),
        ("left_out.jsonl", {"workload": "x"}, "left_out.jsonl is damaged: line 2: .*reason"),
        ("workloads.jsonl", {"workload": "x"}, "workloads.jsonl is damaged: line 121"),
        (
            "observations.jsonl",
            {"workload": "x", "run": 0, "times_ns": ["y"]},
            "observations.jsonl is damaged: line 241",
        ),
    ],
)
def test_a_damaged_line_is_named(folder: Path, file: str, line: object, message: str) -> None:
    append(folder, file, line)
    with pytest.raises(InputError, match=message):
        load_capture(folder)


def test_a_line_that_a_kill_cut_short_does_not_count(folder: Path) -> None:
    for file in ("calibration.jsonl", "left_out.jsonl", "observations.jsonl"):
        with (folder / file).open("a") as opened:
            opened.write('{"half')
    capture = load_capture(folder)
    assert (capture.observations.height, capture.calibrations.height, capture.left_out.height) == (240, 32, 1)


def test_an_unknown_access_is_refused(folder: Path) -> None:
    lines = (folder / "workloads.jsonl").read_text().replace('"access": "copy"', '"access": "telepathy"')
    (folder / "workloads.jsonl").write_text(lines)
    with pytest.raises(InputError, match="has access 'telepathy'; known: resident, zero-copy"):
        load_capture(folder)


def test_a_fit_takes_resident_launched_rows_of_the_settings_dtype_and_counts_the_others(
    folder: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    source = only_source(read_sources([str(folder)], progress=said.append))
    model = fit_source(source)
    # By hand: 3 batch sizes of 4 shape-and-dtype pairs (one of them fp8), 8 modes of a layer and 2 bare GEMMs of each.
    assert said[:3] == [
        "left out: 30 measurements of a dtype other than bf16",
        "left out: 54 measurements with offloaded experts",
        "left out: 9 measurements replayed from a CUDA graph",
    ]
    assert said[3] == "27 workloads of 3 shapes" and model.n_observations_ == 27
    assert source.offloaded.height == 54 and set(source.offloaded["dtype"]) == {"bf16"}
    kept = [
        json.loads(line)
        for line in (folder / "workloads.jsonl").read_text().splitlines()
        if '"resident"' in line and "graph" not in line and '"bf16"' in line
    ]
    alone = Path(shutil.copytree(folder, tmp_path / "alone"))
    ids = {line["workload"] for line in kept}
    for name in ("workloads.jsonl", "observations.jsonl"):
        rows = [r for r in (folder / name).read_text().splitlines() if json.loads(r)["workload"] in ids]
        (alone / name).write_text("\n".join(rows) + "\n")
    assert vars(fit_source(only_source(read_sources([str(alone)]))).constants_) == vars(model.constants_)


def test_where_most_calls_are_replayed_those_are_fitted_and_never_with_the_others(made: Path) -> None:
    pooled = per_workload(load_capture(made).observations)
    layers = pooled.filter(pl.col("op") == "moe_layer", pl.col("access") == "resident", pl.col("dtype") == "bf16")
    kept, n_left_out = fitted_rows(layers, "bf16")
    assert (kept.height, n_left_out) == (9, {"replayed from a CUDA graph": 9})  # as many: those of the host
    fewer = layers.filter(~(pl.col("launch").is_null() & (pl.col("shape") == "olmoe")))
    kept, n_left_out = fitted_rows(fewer, "bf16")
    assert (kept.height, n_left_out) == (9, {"launched by the host, not replayed": 6})
    assert set(kept["launch"]) == {"graph"}


def test_a_capture_of_offloaded_rows_alone_is_nothing_to_fit(folder: Path) -> None:
    rows = (folder / "workloads.jsonl").read_text().splitlines()
    gone = {json.loads(r)["workload"] for r in rows if '"resident"' in r}
    points = (folder / "observations.jsonl").read_text().splitlines()
    kept = [p for p in points if json.loads(p)["workload"] not in gone]
    (folder / "observations.jsonl").write_text("\n".join(kept) + "\n")
    with pytest.raises(InputError, match="gpu: no resident bf16 workload to fit a model on"):
        read_sources([str(folder)])


def test_captures_of_several_access_modes_are_compared_workload_by_workload(made: Path, folder: Path) -> None:
    """Twice the time under one access mode is found there, and nowhere else."""
    slow = {
        json.loads(line)["workload"]
        for line in (folder / "workloads.jsonl").read_text().splitlines()
        if json.loads(line)["access"] == "copy"
    }
    points: list[dict[str, Any]] = [json.loads(p) for p in (folder / "observations.jsonl").read_text().splitlines()]
    for point in points:
        point["times_ns"] = [t * (2 if point["workload"] in slow else 1) for t in point["times_ns"]]
    (folder / "observations.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    _, *each = check(of_capture(load_capture(made)), of_capture(load_capture(folder)))
    assert len(each) == 120
    doubled = {v.workload for v in each if v.ratio > 1.5}
    assert doubled == slow
    labels = [v.label for v in each]
    assert len(set(labels)) == len(labels)
    assert any(label.endswith("power-law:1.2, 50 % zero-copy, mapped, graph, fp8") for label in labels)


def test_clocks_seen_while_measuring_do_not_make_another_machine(made: Path, folder: Path) -> None:
    manifest = json.loads((folder / "capture.json").read_text())
    manifest["machine"]["under_load"] = {"sm_clock_mhz": 1400, "power_watts": 500.0}
    (folder / "capture.json").write_text(json.dumps(manifest))
    assert check(of_capture(load_capture(made)), of_capture(load_capture(folder)))[0].verdict == "ok"


def test_the_roofline_of_a_mixed_capture_shows_its_resident_rows(made: Path) -> None:
    capture = load_capture(made)
    measured, n_left_out = fitted_rows(per_workload(capture.observations), capture.dtype)
    assert measured.height == 27 and sum(n_left_out.values()) == 93
    points = roofline.points(measured, profile_of(capture))
    assert points.height == 27 and points["roof_frac"].max() < 1.0


def test_check_says_sound_broken_or_no_capture_by_its_exit_code(folder: Path, tmp_path: Path) -> None:
    sound = captures("check", str(folder))
    assert (sound.returncode, sound.stdout, sound.stderr) == (0, "gpu is sound\n", "")
    (folder / "capture.json").write_text(
        (folder / "capture.json").read_text().replace("NVIDIA H100", "/home/bob/x H100")
    )
    broken = captures("check", str(folder))
    assert broken.returncode == 1 and "\ngpu is not sound: 2 errors" in broken.stdout
    assert "error: capture.json: a home folder: /home/bob" in broken.stdout
    none = captures("check", str(folder), str(tmp_path), "--json")
    assert none.returncode == 2 and "Traceback" not in none.stderr
    first, second = json.loads(none.stdout)
    assert not first["sound"] and {f["group"] for f in first["findings"]} >= {"identity"}
    assert "is not a capture folder" in second["verdict"]


def test_many_findings_of_one_kind_are_summed_up(tmp_path: Path) -> None:
    path = write_synthetic_capture(tmp_path / "synthetic")  # its ids are not of the rule, and its repeats are equal
    done = captures("check", str(path))
    assert done.returncode == 1
    assert "  ... and 27 more errors of this kind (id)" in done.stdout
    assert done.stdout.count("is not the hash of its line") == 5
    assert len(done.stdout.splitlines()) < 60
    assert len(json.loads(captures("check", "--json", str(path)).stdout)[0]["findings"]) > 32


def test_show_and_list_tell_what_is_there(made: Path) -> None:
    page = captures("show", str(made)).stdout
    for words in (
        "NVIDIA H100 80GB HBM3, PCIe 5.0 x16",
        "under load: SM clock 1,700 MHz, 690 W, power cap",
        "  mapped  yes\n  system  the machine is not coherent\n",
        "link_h2d_copy_bytes_per_s           55.0 GB/s   1.0 %  5",
        "offload, zero-copy mapped, graph   bf16          9       3         1  1 to 4,096     2",
        "1x the machine is not coherent",
        "moe_layer-made-up.trace.json.gz",
    ):
        assert words in page, page
    found = json.loads(captures("show", str(made), "--json").stdout)
    assert found["capture"] == "gpu" and len(found["studies"]) == 16
    shipped = json.loads(captures("list", "--json").stdout)
    assert {row["path"] for row in shipped} == {str(p.relative_to(ROOT)) for p in shipped_captures()}
    refused = captures("show", str(ROOT))
    assert refused.returncode == 2 and not refused.stdout and "Traceback" not in refused.stderr

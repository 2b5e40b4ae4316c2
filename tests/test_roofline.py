"""Ceilings per tier and where observations stand under them, by hand."""

from pathlib import Path

import pytest

from perfmodel.capture import load_capture, per_workload, profile_of
from perfmodel.hardware import hardware
from perfmodel.physics import attainable_flops_per_s
from perfmodel.roofline import points, tiers
from tests.captures_made import ROOF, write_synthetic_capture


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
    assert row["achieved_flops_per_s"] == pytest.approx(flops / row["time_ns"] * 1e9)
    assert row["bound"] == "memory"
    assert row["roof_frac"] == pytest.approx(row["achieved_flops_per_s"] / (flops / moved * ROOF.bytes_per_s))
    assert table["roof_frac"].max() <= 1
    assert set(table["bound"]) == {"memory", "compute"}

"""The GH200 study: one setting agrees with both published slowdowns, rivals do not, and trends are as stated."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from perfmodel import moe
from perfmodel.hardware import hardware
from perfmodel.offload import study
from perfmodel.offload.constants import ASSUMED
from perfmodel.offload.study import (
    COPY,
    MECHANISMS,
    PUBLISHED,
    REREAD,
    REUSE,
    Point,
    agrees,
    best_rate,
    one_expert,
    predicted,
    slope_ns_per_row,
    slowdowns,
    slowdowns_by_batch,
)
from perfmodel.offload.study_page import page
from perfmodel.predict import predict
from perfmodel.routing import routing
from tests.conftest import ROOT

OLMOE = ROOT / "docs" / "gh200-study-olmoe.csv"


def test_the_published_points_are_those_of_the_study(shared: Path) -> None:
    with (shared / "reference" / "offload_poster.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["slowdown"]]
    read = [Point(float(r["offloaded_fraction"]), int(r["tokens"]), float(r["slowdown"])) for r in rows]
    assert tuple(read) == PUBLISHED


def test_the_defaults_agree_with_both_points_as_the_command_predicts_them() -> None:
    shape = moe.shape("poster")
    for point, n_gone in zip(PUBLISHED, (20, 32), strict=True):
        batch = routing("mmlu-like", shape.n_experts, shape.top_k, point.n_tokens)
        result = predict(hardware("gh200"), shape, batch, point.offload_frac, "zero-copy")
        assert result.n_offloaded == n_gone
        assert result.slowdown == pytest.approx(point.slowdown, rel=0.05)
        assert result.slowdown == pytest.approx(predicted(point).slowdown)


@pytest.mark.parametrize("mechanism", [m for m in MECHANISMS if m.constants != ASSUMED or m.access != "zero-copy"])
def test_rival_mechanisms_fail_whatever_their_rate(mechanism: study.Mechanism) -> None:
    found = slowdowns(mechanism)
    assert not agrees(found)
    freed = best_rate(mechanism)
    if freed is not None:
        assert abs(freed[1] / PUBLISHED[1].slowdown - 1) > 0.15  # far from agreeing, not just outside


def test_a_freed_rate_meets_the_first_point() -> None:
    freed = best_rate(COPY)
    assert freed is not None
    at = replace(COPY, constants=replace(ASSUMED, copy_eff=freed[0]))
    assert slowdowns(at) == pytest.approx((1.5, freed[1]), rel=1e-6)


def test_two_points_do_not_identify_the_constants() -> None:
    far_apart = (
        replace(ASSUMED, reread_frac=0.15, reread_rows=128.0),
        replace(ASSUMED, reread_frac=0.3, link_overlap_frac=0.0),
        replace(ASSUMED, reread_frac=0.3, link_overlap_frac=0.2),
    )
    assert all(agrees(slowdowns(replace(REREAD, constants=one))) for one in far_apart)


@pytest.mark.parametrize("mechanism", [REREAD, REUSE, COPY])
@pytest.mark.parametrize("point", PUBLISHED)
def test_slowdown_falls_as_the_batch_grows(mechanism: study.Mechanism, point: Point) -> None:
    found = slowdowns_by_batch(mechanism, point.offload_frac)
    assert found == sorted(found, reverse=True) and found[0] > 1.5 * found[-1]


def test_a_very_large_batch_tells_reads_once_from_re_reads() -> None:
    assert slowdowns_by_batch(REUSE, 0.5)[-1] < 1.02
    assert slowdowns_by_batch(REREAD, 0.5)[-1] > 1.2


def test_an_offloaded_expert_is_flat_in_tokens_then_about_linear() -> None:
    few, more, many, twice = one_expert(REREAD, (1, 256, 32_768, 65_536))
    assert more == pytest.approx(few, rel=0.02)
    assert twice == pytest.approx(2 * many, rel=0.05)
    times = one_expert(REREAD, (2**i for i in range(17)))
    assert times == sorted(times)
    assert slope_ns_per_row(REREAD) > 2 * slope_ns_per_row(REUSE)
    assert slope_ns_per_row(REUSE) == pytest.approx(slope_ns_per_row(None), rel=0.01)


@pytest.mark.parametrize("point", PUBLISHED)
def test_least_used_first_is_the_cheapest_order(point: Point) -> None:
    cold, some, hot = (predicted(point, policy=policy).slowdown for policy in ("ascending", "random", "descending"))
    assert cold < some < hot


def test_measured_routing_gives_what_the_page_says(shared: Path) -> None:
    counts = shared / "data" / "routing_olmoe_mixtral.npz"
    if not counts.exists():
        pytest.skip("the routing counts of OLMoE are not here")
    rows = study.measured_routing(counts)
    assert study.to_csv(rows) == OLMOE.read_text(encoding="utf-8")
    assert len(rows) == 18
    # Real routing brackets both points: some layers are slower, some faster, and some agree with both.
    for number, point in enumerate(PUBLISHED, 1):
        found = [float(str(row[f"slowdown_{number}"])) for row in rows]
        assert min(found) < point.slowdown < max(found)
    assert 1 < sum(agrees((float(str(r["slowdown_1"])), float(str(r["slowdown_2"])))) for r in rows) < len(rows)


def test_the_page_is_what_is_computed() -> None:
    made = page(OLMOE.read_text(encoding="utf-8"))
    assert made == (ROOT / "docs" / "gh200-study.md").read_text(encoding="utf-8"), "run `python docs/regenerate.py`"
    assert "Measured routing" not in page() and "consistent with" in made

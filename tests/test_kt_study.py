"""ktransformers' published table: strategies are ranked as measured, for the stated reason, and the page says so."""

import csv
from pathlib import Path

import numpy as np
import pytest

from perfmodel.offload import kt_study
from perfmodel.offload.kt_page import page
from perfmodel.offload.kt_study import (
    BASE,
    SETTINGS,
    SHAPE,
    STRATEGIES,
    Setting,
    agreement,
    cells,
    cpu_part,
    fractions,
    is_ordered,
    moe_ns,
    on_cpu,
    other_ns,
    predicted,
    published,
)
from tests.conftest import ROOT


def test_the_shipped_table_is_the_published_one(shared: Path) -> None:
    with (shared / "reference" / "ktransformers_policy.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in (*STRATEGIES, "dynamic"):
        key = f"{name.replace('-', '_')}_tok_s"
        assert published()[name][: len(rows)].tolist() == [float(row[key]) for row in rows]
    assert fractions().tolist() == pytest.approx([int(row["gpu_expert_percent"]) / 100 for row in rows])
    assert published()["gpu_experts_frac"][-1] == 1.0  # the row that the reference leaves out


def test_strategies_are_in_the_measured_order_from_60_percent_on() -> None:
    for frac, made, measured in zip(fractions(), predicted(), cells(), strict=True):
        if frac >= 0.6:
            assert is_ordered(made) and is_ordered(measured), frac


def test_rank_correlations_over_all_cells_and_within_fractions_are_high() -> None:
    at = agreement()
    assert at.spearman > 0.85 and at.kendall > 0.7
    assert at.kendall_within > 0.5
    assert at.error_frac < 0.2


def test_the_fitted_cell_comes_out_and_nothing_else_is_fitted() -> None:
    frac, strategy = kt_study.FITTED_ON
    assert 1e9 / (moe_ns(on_cpu(strategy, frac)) + other_ns()) == pytest.approx(112.32)
    assert frac not in fractions()
    assert other_ns(Setting("", n_sockets=2)) == pytest.approx(other_ns())  # the CPU has no part in that cell


def test_front_loading_wins_by_layers_that_do_not_wait() -> None:
    (random_layers, random_experts), (front_layers, front_experts) = (
        cpu_part(name, 0.9) for name in ("random", "front-loading")
    )
    assert front_experts == pytest.approx(random_experts, rel=0.15)
    assert front_layers == pytest.approx(5) and random_layers > 25
    free = predicted(SETTINGS[-1])
    assert SETTINGS[-1].waiting_factor == 0
    assert all(row[2] < row[0] for row in free[5:])  # the order turns round


def test_frequency_needs_uneven_routing_to_win() -> None:
    even = predicted(Setting("", "uniform"))
    assert not any(is_ordered(row) for row in even)
    assert agreement(Setting("", "power-law:0.3")).ordered[-1] < 0.9 == agreement(BASE).ordered[-1]


def test_strategies_leave_as_many_experts_to_the_cpu_as_ktransformers_would() -> None:
    for frac, n_kept in ((0.0, 0), (0.1, 2457), (0.7, 17203), (1.0, 24576)):  # int(48 x 512 x fraction)
        for strategy in STRATEGIES:
            assert SHAPE.n_layers * SHAPE.n_experts - on_cpu(strategy, frac).sum() == n_kept
    assert np.array_equal(np.flatnonzero(on_cpu("front-loading", 0.5).any(axis=1)), np.arange(24, 48))


def test_the_page_is_what_is_computed() -> None:
    found = (ROOT / "docs" / "ktransformers.md").read_text(encoding="utf-8")
    assert page() == found, "run `python docs/regenerate.py`"

"""What is held out stays unseen, and the numbers that count are those that can be worked out by hand."""

import json
from dataclasses import asdict

import numpy as np
import polars as pl
import pytest

from perfmodel import evaluation
from perfmodel.errors import InputError
from perfmodel.evaluation import (
    N_RANDOM,
    PEER_RATIO,
    TOKEN_RATIO,
    Evaluation,
    coverage_by_level,
    errors_by_shape,
    errors_of,
    evaluate,
    held_out_points,
    ratios_by_tokens,
    report_of,
    slower_than_peers,
    summary,
)
from perfmodel.report import evaluation_page
from tests.made_up import made_up_machine, made_up_model, made_up_observations, new_model, spoiled

BASELINES = ("constant", "roofline_only", "interpolation", "gradient_boosting")
FEW = (1, 8, 64, 512, 4096)
PROMISED = {"n", "median_ape", "mape", "p90_ape", "spearman_within_tokens", "coverage90", "half_width"}


def table(**columns: list[object]) -> pl.DataFrame:
    """Rows of an evaluation: all measured at 100 ns, predicted as said."""
    n = len(columns["predicted_ns"])
    return pl.DataFrame(
        {
            "op": ["fused_moe"] * n,
            "shape": ["made-up"] * n,
            "n_tokens": [1] * n,
            "routing": ["balanced"] * n,
            "measured_ns": [100.0] * n,
            "log_half_width": [0.1] * n,
            "is_screened": [True] * n,
        }
        | columns
    )


@pytest.fixture(autouse=True)
def _few_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held out within a fold's own training decides on its residual and interval; twice is enough here."""
    monkeypatch.setattr(evaluation, "INNER_FOLDS", 2)


@pytest.mark.parametrize(
    ("split", "is_held_out"),
    [
        ("shape", pl.col("shape") == "h1024-i512-k2-e16"),
        ("routing", pl.col("routing") != "balanced"),
        ("tokens", pl.col("n_tokens") > 4096 / TOKEN_RATIO),
    ],
)
def test_spoiling_what_is_held_out_changes_none_of_its_predictions(split: str, is_held_out: pl.Expr) -> None:
    observations = made_up_observations(tokens=FEW)
    before = evaluate(new_model(), observations, split).table
    after = evaluate(new_model(), spoiled(observations, is_held_out), split).table
    rows = before.select(keep=is_held_out)["keep"]
    assert rows.any()
    for column in ("predicted_ns", "log_half_width", *(f"{name}_ns" for name in BASELINES)):
        assert after[column].filter(rows).equals(before[column].filter(rows)), column
    assert not after["measured_ns"].equals(before["measured_ns"])
    if split == "shape":  # and those of other shapes, which were fitted to the spoiled ones, did change
        assert not after["predicted_ns"].filter(~rows).equals(before["predicted_ns"].filter(~rows))


@pytest.mark.parametrize(
    ("split", "n_tested"),
    [("shape", 75), ("random", 75), ("routing", 50), ("tokens", 30), ("none", 75)],
)
def test_each_row_that_is_held_out_is_predicted_once(split: str, n_tested: int) -> None:
    observations = made_up_observations(tokens=FEW)
    model = made_up_model() if split == "none" else new_model()
    found = evaluate(model, observations, split)
    assert found.table.height == n_tested
    assert found.table.select(pl.struct("shape", "n_tokens", "routing").is_unique().all()).item()
    assert found.table["predicted_ns"].is_finite().all()
    assert found.baselines == (() if split == "none" else BASELINES)
    assert summary(found.table)["median_ape"] < (0.2 if split == "tokens" else 0.1)


def test_parts_are_what_the_splits_say() -> None:
    observations = made_up_observations(tokens=FEW)
    shapes, n_tokens = observations["shape"].to_numpy(), observations["n_tokens"].to_numpy()
    for train, test in evaluation._folds(observations, "shape"):
        assert len(set(shapes[test])) == 1 and not set(shapes[test]) & set(shapes[train])
    ((train, test),) = evaluation._folds(observations, "tokens")
    assert (n_tokens[train].max(), n_tokens[test].min()) == (64, 512)
    ((train, test),) = evaluation._folds(observations, "routing")
    assert set(observations["routing"][train]) == {"balanced"} and "balanced" not in set(observations["routing"][test])
    parts = [test for _, test in evaluation._folds(observations, "random")]
    assert len(parts) == N_RANDOM and sorted(np.concatenate(parts)) == list(range(75))


@pytest.mark.parametrize(
    ("split", "observations", "words"),
    [
        ("shape", made_up_observations(sizes=((512, 512, 8, 2), (512, 256, 8, 2))), "at least 3, found 2"),
        ("routing", made_up_observations(routings=("balanced",)), "an even routing .balanced or uniform. and another"),
        ("routing", made_up_observations(routings=("power_law_1.2",)), "an even routing"),
        ("tokens", made_up_observations(tokens=(8,)), "differ more than 16 times in tokens"),
        ("random", made_up_observations(tokens=(8,), routings=("balanced",))[:4], "at least 5 measurements, found 4"),
        ("moon", made_up_observations(tokens=(8,)), "unknown split 'moon'; known: shape, routing"),
    ],
)
def test_a_split_that_is_not_possible_is_refused(split: str, observations: pl.DataFrame, words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluate(new_model(), observations, split)


def test_numbers_of_errors_by_hand() -> None:
    errors = errors_of(np.array([1.1, 0.8, 1.0, 2.0]), np.ones(4))
    assert errors.median_ape_frac == pytest.approx(0.15)
    assert errors.mape_frac == pytest.approx((0.1 + 0.2 + 0 + 1) / 4)
    assert errors.p90_ape_frac == pytest.approx(0.2 + 0.7 * 0.8)  # 0.9 x 3 steps along 0, 0.1, 0.2, 1
    assert (errors.n, errors.worst_ape_frac) == (4, pytest.approx(1.0))


def test_a_summary_by_hand() -> None:
    found = summary(table(predicted_ns=[105.0, 120.0, 50.0], log_half_width=[0.1, 0.1, None]))
    assert found["n"] == 3 and found["n_refused"] == 1
    assert (found["median_ape"], found["mape"]) == (pytest.approx(0.2), pytest.approx(0.25))
    assert found["coverage90"] == 0.5  # log 1.05 lies within 0.1, log 1.2 does not, the third has no interval
    assert found["half_width"] == pytest.approx(np.expm1(0.1))
    assert found["spearman_within_tokens"] is None
    none = summary(table(predicted_ns=[105.0], log_half_width=[None]).cast({"log_half_width": pl.Float64}))
    assert (none["coverage90"], none["half_width"], none["n_refused"]) == (None, None, 1)
    assert summary(table(predicted_ns=[1.0])[:0]) == {"n": 0}


def test_rank_correlation_is_taken_within_batch_sizes_and_weighed_by_rows() -> None:
    """Six rows of one token in order, five of two tokens in reverse, four of three tokens, too few to say anything."""
    measured = [*range(1, 7), *range(1, 6), *range(1, 5)]
    predicted = [*range(1, 7), *range(5, 0, -1), *range(1, 5)]
    rows = table(
        predicted_ns=[1000.0 * x for x in predicted],
        measured_ns=[float(x) for x in measured],
        n_tokens=[1] * 6 + [2] * 5 + [3] * 4,
    )
    assert summary(rows)["spearman_within_tokens"] == pytest.approx((6 * 1 + 5 * -1) / 11)
    alike = table(predicted_ns=[5.0] * 6, measured_ns=[float(x) for x in range(1, 7)])
    assert summary(alike)["spearman_within_tokens"] is None  # of equal predictions there is no order


def test_failed_configurations_are_found_by_their_peers() -> None:
    rows = made_up_observations(sizes=((512, 512, 8, 2),), tokens=(1, 8), routings=("balanced",)).drop("time_ns")
    rows = rows.with_columns(machine=pl.lit("made-up"))
    fast, slow, alone = (rows.with_columns(time_ns=pl.lit(t)) for t in (100.0, 100.0 * PEER_RATIO + 1, 1e9))
    both = pl.concat([fast, slow[:1], fast[:1], alone.with_columns(machine=pl.lit("another"))])
    assert slower_than_peers(both).to_list() == [False, False, True, False, False, False]
    bare = both.with_columns(gemm_k=pl.lit(None, dtype=pl.Int64))
    assert slower_than_peers(bare).null_count() == 0


def test_a_report_has_the_promised_keys_and_is_json() -> None:
    observations = made_up_observations(tokens=FEW)
    screened = observations["n_tokens"] < 4096
    found = [
        evaluate(new_model(kernel=name), observations, "routing", is_screened=screened)
        for name in ("synthetic/1/made_up/bf16", "synthetic/1/another/bf16")
    ]
    result = json.loads(json.dumps(report_of(found), allow_nan=False))
    assert [one["kernel"] for one in result["kernels"]] == ["synthetic/1/made_up/bf16", "synthetic/1/another/bf16"]
    for one in (*result["kernels"], result["overall"]):
        assert set(one) >= PROMISED | {"worst_ape", "n_refused", "screened"}
        assert set(one["screened"]) >= PROMISED
    first = result["kernels"][0]
    assert (first["n"], first["screened"]["n"], result["overall"]["n"]) == (50, 40, 100)
    assert result["overall"]["median_ape"] == pytest.approx(first["median_ape"])  # the same rows twice
    assert set(first["baselines"]) == set(BASELINES)
    assert set(first["shapes"]) == set(observations["shape"])
    assert sum(shape["n"] for shape in first["shapes"].values()) == 50
    page = evaluation_page(result)
    assert "synthetic/1/another/bf16, held out by routing" in page and "gradient boosting" in page
    assert "without failed configurations" in page and "nan" not in page.lower().split()


def test_reports_of_models_without_an_interval_are_json_too() -> None:
    observations = made_up_observations(sizes=((512, 512, 8, 2),), tokens=FEW)
    result = report_of([evaluate(new_model(), observations, "random")])
    json.dumps(result, allow_nan=False)
    overall = result["overall"]
    assert (overall["coverage90"], overall["half_width"], overall["n_refused"]) == (None, None, 15)
    assert "n/a" in evaluation_page(result)


def test_errors_by_shape_are_what_a_model_keeps() -> None:
    rows = table(predicted_ns=[105.0, 120.0], shape=["a", "b"], constant_ns=[50.0, 100.0])
    found = errors_by_shape(Evaluation("made-up", "shape", rows, ("constant",)))
    assert set(found) == {"model", "constant"} and list(found["model"]) == ["all", "a", "b"]
    assert found["model"]["a"] == asdict(errors_of(np.array([105.0]), np.array([100.0])))
    assert found["constant"]["all"]["median_ape_frac"] == pytest.approx(0.25)


def test_a_model_is_judged_on_another_machine_by_that_machines_ceilings() -> None:
    """Everything twice as fast elsewhere: times that are made of rates alone halve, and the model says so."""
    model = made_up_model()
    twice = made_up_machine("synthetic-twice", bf16_gemm_flops_per_s=1.2e15, memory_stream_bytes_per_s=5e12)
    observations = made_up_observations(tokens=(8192,))
    here, there = (evaluate(model, observations, "none", machine=m).table for m in (model.profile, twice))
    ratio = here["predicted_ns"] / there["predicted_ns"]
    assert ratio.min() > 1.3 and ratio.max() < 2.0
    cpu = made_up_machine("synthetic-cpu", device="cpu", memory_stream_bytes_per_s=1e11)
    with pytest.raises(InputError, match="'synthetic-cpu' is a cpu"):
        evaluate(model, observations, "none", machine=cpu)


def test_a_prior_given_with_the_model_is_where_fits_begin() -> None:
    observations = made_up_observations(tokens=FEW)
    plain = evaluate(new_model(), observations, "routing", with_baselines=False).table
    model = new_model()
    model.prior = made_up_model().constants_
    informed = evaluate(model, observations, "routing", with_baselines=False).table
    assert not plain["predicted_ns"].equals(informed["predicted_ns"])
    assert summary(informed)["median_ape"] < summary(plain)["median_ape"] + 0.01


def test_ratios_by_tokens_are_medians_and_the_range_of_eight_points_in_ten() -> None:
    rows = table(predicted_ns=[80.0, 100.0, 130.0, 200.0], n_tokens=[4, 4, 4, 1])
    assert ratios_by_tokens(rows).rows() == [
        (1, 1, 2.0, 2.0, 2.0),
        (4, 3, 1.0, pytest.approx(0.84), pytest.approx(1.24)),  # 0.2 of the way from 0.8 to 1.0, 0.8 of 1.0 to 1.3
    ]


def three_shapes(**columns: list[object]) -> pl.DataFrame:
    """Ten predictions of each of three shapes: a is off by 1 to 10 %, b by 2 to 20 %, c by 30 %."""
    off = [*(0.01 * i for i in range(1, 11)), *(0.02 * i for i in range(1, 11)), *([0.3] * 10)]
    rows = table(predicted_ns=[100 * float(np.exp(one)) for one in off], shape=[s for s in "abc" for _ in range(10)])
    return rows.with_columns(**{name: pl.Series(values) for name, values in columns.items()})


def test_intervals_are_tried_on_each_shape_with_the_errors_of_the_others_alone() -> None:
    found = coverage_by_level(three_shapes(log_half_width=[None] * 30).cast({"log_half_width": pl.Float64}), (0.5,))
    # Of 20 errors of the others the 11th counts ((20 + 1) / 2, up). For a that is the first of c; for b too; for c it
    # is the 11th of 0.01, 0.02, 0.02, 0.03, 0.04, 0.04, 0.05, 0.06, 0.06, 0.07, 0.08 ..., far below 0.3.
    assert found.rows() == [("a", 0.5, 10, 10), ("b", 0.5, 10, 10), ("c", 0.5, 10, 0)]


def test_intervals_are_wide_where_the_models_are_and_rows_without_one_are_left_out() -> None:
    widths = [0.105] * 10 + [0.2] * 10 + [0.6] * 9 + [None]
    # Over their widths errors are 0.095 to 0.952 (a), 0.1 to 1 (b) and 0.5 (c). Of 19 of the others the 18th counts:
    # for a that is 0.9 of b, for b 0.857 of a; of the 20 of a and b the 19th for c, 0.952.
    found = coverage_by_level(three_shapes(log_half_width=widths), (0.9,))
    assert found.rows() == [("a", 0.9, 10, 9), ("b", 0.9, 10, 8), ("c", 0.9, 9, 9)]


def test_anomalies_make_no_interval_but_count_and_two_shapes_are_too_few() -> None:
    rows = three_shapes(log_half_width=[0.1] * 30)
    off = rows.with_columns(predicted_ns=pl.when(pl.col("shape") == "c").then(300.0).otherwise("predicted_ns"))
    found = {shape: n for shape, _, _, n in coverage_by_level(off, (0.9,)).rows()}
    assert found == {"a": 10, "b": 5, "c": 0}  # a by b's errors up to 0.2, b by a's up to 0.1
    assert coverage_by_level(rows.filter(pl.col("shape") != "c")).is_empty()


def test_a_model_gives_its_held_out_points_with_widths_where_its_measurements_are_at_hand() -> None:
    model, observations = made_up_model(), made_up_observations()
    model.points_ = observations.select("op", "shape", "n_tokens", "routing", measured_ns=pl.col("time_ns").round(0))
    model.points_ = model.points_.with_columns(predicted_ns=pl.Series(model.held_out_)).to_dict(as_series=False)
    plain, wide = held_out_points(model), held_out_points(model, observations)
    assert plain["log_half_width"].null_count() == plain.height == observations.height
    inside = model.forecast(model.work(observations)).log_half_width
    assert wide["log_half_width"].to_numpy() == pytest.approx(inside)
    assert held_out_points(model, observations.head(5))["log_half_width"].null_count() == plain.height

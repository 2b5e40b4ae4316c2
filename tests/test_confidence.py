"""Intervals: quantiles, ladders and distances by hand, coverage of errors that are exchangeable, and limits."""

from typing import Any

import numpy as np
import pytest

from perfmodel.latency import HULL, Confidence, conformal_quantile
from perfmodel.latency.confidence import (
    DIRECTIONS,
    LEAST_FOR_SCALE,
    LEAST_IN_STEP,
    SLACK_OCTAVES,
    Ladder,
    confidence_from_json,
    ladder_of,
    octaves_outside,
    ranges_of,
    width_of,
)
from tests.made_up import made_up_model, made_up_observations

RANGES = {name: (1.0, 1024.0) for name in HULL}
NONE = {direction: Ladder() for direction in DIRECTIONS}


def hull(**values: float) -> dict[str, np.ndarray]:
    """One item, 32 along every axis that is not given."""
    return {name: np.array([values.get(name, 32.0)]) for name in HULL}


def confidence(**changes: Any) -> Confidence:
    values = {"quantile": 0.1, "scale": None, "ranges": RANGES, "ladders": NONE}
    return Confidence(**values | {"n_scores": 100, "n_groups": 5, "n_anomalies": 0} | changes)


def test_a_conformal_quantile_by_hand() -> None:
    assert conformal_quantile(np.arange(1.0, 20.0), 0.9) == 18  # the 18th of 19: 20 x 0.9
    assert conformal_quantile(np.arange(20.0, 0.0, -1.0), 0.9) == 19  # the 19th of 20: 21 x 0.9 rounded up
    # Too few: the root of their mean square, 5, times Student's 2.920 for two of them.
    assert conformal_quantile(np.array([3.0, 1.0]), 0.9) == pytest.approx(np.sqrt(5) * 2.919986)


@pytest.mark.parametrize("n_scores", [1, 3, 8])
def test_a_quantile_of_too_few_scores_still_covers_nine_in_ten_normal_errors(n_scores: int) -> None:
    rng = np.random.default_rng(1)
    few, new = np.abs(rng.normal(size=(4000, n_scores))), np.abs(rng.normal(size=4000))
    covered = np.mean([score <= conformal_quantile(scores) for scores, score in zip(few, new, strict=True)])
    assert 0.885 < covered < 0.95
    assert np.mean(new <= few.max(axis=1)) < 0.9, "the largest of them alone does not"


@pytest.mark.parametrize("n_scores", [30, 100, 1000])
def test_a_conformal_quantile_covers_nine_in_ten_new_scores(n_scores: int) -> None:
    rng = np.random.default_rng(0)
    covered = [
        np.mean(rng.exponential(size=200) <= conformal_quantile(rng.exponential(size=n_scores))) for _ in range(400)
    ]
    assert np.mean(covered) == pytest.approx(0.9, abs=0.02)


def test_a_ladder_is_one_inside_and_says_nothing_beyond_its_last_step() -> None:
    steps = Ladder((1.0, 2.0), (1.5, 3.0))
    at = steps.at(np.array([0.0, 0.5, 1.0, 1.01, 2.0, 2.01]))
    assert at[:5].tolist() == [1.0, 1.5, 1.5, 3.0, 3.0] and np.isnan(at[5])
    none = Ladder().at(np.array([0.0, 0.2]))
    assert none[0] == 1.0 and np.isnan(none[1])


def test_a_ladder_by_hand_joins_steps_of_too_few_errors_and_never_falls() -> None:
    n = LEAST_IN_STEP
    octaves = np.concatenate([np.zeros(50), np.full(n, 0.4), np.full(n - 1, 0.8), np.full(1, 1.5), np.full(3, 3.5)])
    relative = np.concatenate(
        [np.full(50, 9.0), np.full(n, 2.0), np.full(n - 1, 5.0), np.full(1, 7.0), np.full(3, 99.0)]
    )
    found = ladder_of(octaves, relative, (0.5, 1.0, 2.0, 4.0))
    # Up to 0.5: 2. One too few lie up to 1, so that step joins the next: of 19 fives and one seven the 19th is a five.
    # Beyond 2 lie three, and no step offers them.
    assert found == Ladder((0.5, 2.0), (2.0, 5.0))
    falling = ladder_of(np.repeat([0.4, 0.8, 1.6], n), np.repeat([2.0, 0.5, 3.0], n), (0.5, 1.0, 2.0))
    assert falling == Ladder((0.5, 1.0, 2.0), (2.0, 2.0, 3.0))
    assert ladder_of(np.repeat([0.4], n), np.repeat([0.3], n), (0.5,)) == Ladder((0.5,), (1.0,))
    assert ladder_of(np.zeros(50), np.ones(50), (0.5, 1.0)) == Ladder()


@pytest.mark.parametrize(
    ("values", "tokens", "load", "shape"),
    [
        ({}, 0, 0, 0),
        ({"n_tokens": 1024 * 2**0.1}, 0, 0, 0),  # as good as inside
        ({"n_tokens": 4096.0}, 2, 0, 0),
        # More tokens than fitted: what grows with them is no other distance, and loads even out.
        ({"n_tokens": 4096.0, "rows_per_active_expert": 8192.0, "max_over_mean_load": 1 / 8}, 2, 0, 0),
        ({"n_tokens": 4096.0, "hidden": 8192.0}, 2, 0, 3),
        # Fewer tokens than fitted are another shape of work, as are more rows without more tokens.
        ({"n_tokens": 0.25}, 0, 0, 2),
        ({"rows_per_active_expert": 8192.0}, 0, 0, 3),
        ({"compute_over_memory": 0.5, "inter": 1 / 8}, 0, 0, 3),
        ({"active_frac": 0.5}, 0, 1, 0),
        ({"max_over_mean_load": 4096.0, "active_frac": 0.5}, 0, 2, 0),
        ({"n_experts": 2048.0, "max_over_mean_load": 4096.0}, 0, 2, 1),
    ],
)
def test_how_far_outside_by_hand(values: dict[str, float], tokens: float, load: float, shape: float) -> None:
    found = {name: float(octaves[0]) for name, octaves in octaves_outside(RANGES, hull(**values)).items()}
    assert found == {"tokens": tokens, "load": load, "shape": shape}


def test_a_half_width_grows_outside_and_is_null_beyond_the_last_step() -> None:
    sure = confidence(
        ladders={"tokens": Ladder((1.0, 4.0), (2.0, 3.0)), "load": Ladder((1.0,), (5.0,)), "shape": Ladder()}
    )
    features = np.zeros((1, 1))
    for values, width in (
        ({}, 0.1),
        ({"n_tokens": 2048.0}, 0.2),
        ({"n_tokens": 8192.0}, 0.3),
        ({"active_frac": 0.5}, 0.5),
        ({"n_tokens": 1024 * 32.0}, np.nan),
        ({"hidden": 4096.0}, np.nan),
    ):
        assert sure.half_width(features, hull(**values))[0] == pytest.approx(width, nan_ok=True)


def test_what_lies_outside_is_named_with_its_distance() -> None:
    sure = confidence()
    assert sure.outside(hull()) == []
    assert sure.outside(hull(inter=1024 * 2 ** (SLACK_OCTAVES / 2))) == []
    assert sure.outside(hull(inter=4096.0, n_tokens=0.25)) == [
        "n_tokens 0.25 outside the fitted 1 to 1024",
        "inter 4096 outside the fitted 1 to 1024",
    ]


def test_one_width_serves_few_errors() -> None:
    error = np.arange(1.0, 20.0)
    assert width_of(np.zeros((19, 2)), error, np.arange(19)) == (18.0, None)
    many = np.resize(error, LEAST_FOR_SCALE)
    assert width_of(np.zeros((len(many), 2)), many, np.arange(len(many)) % 3)[1] is None  # of too few groups


def made_up_errors(rng: np.random.Generator, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors of groups that are alike, three times as large where the only feature is above 0."""
    features = rng.normal(size=(n_rows, 1))
    return features, np.abs(rng.normal(size=n_rows)) * np.where(features[:, 0] > 0, 0.15, 0.05)


def test_intervals_cover_new_groups_nine_times_in_ten_and_are_wider_where_errors_are() -> None:
    rng = np.random.default_rng(1)
    features, error = made_up_errors(rng, 1200)
    quantile, scale = width_of(features, error, np.arange(1200) // 60)
    sure = confidence(quantile=quantile, scale=scale)
    unseen, new = made_up_errors(rng, 4000)
    width = sure.base_half_width(unseen)
    assert np.mean(new <= width) == pytest.approx(0.9, abs=0.03)
    for side in (unseen[:, 0] > 0.1, unseen[:, 0] < -0.1):
        assert np.mean(new[side] <= width[side]) == pytest.approx(0.9, abs=0.05)
    assert np.median(width[unseen[:, 0] > 0.1]) > 2 * np.median(width[unseen[:, 0] < -0.1])


def test_a_fitted_model_covers_new_measurements_of_new_shapes() -> None:
    model = made_up_model()
    others = made_up_observations(sizes=((1280, 640, 32, 4), (3072, 1024, 16, 2)), seed=7)
    forecast = model.forecast(model.work(others))
    off = np.abs(np.log(forecast.ns / others["time_ns"].to_numpy()))
    offered = ~np.isnan(forecast.log_half_width)
    assert offered.mean() > 0.9
    assert (off[offered] <= forecast.log_half_width[offered]).mean() >= 0.85


def test_ranges_are_the_limits_of_what_was_seen() -> None:
    assert ranges_of({"n_tokens": np.array([4.0, 1.0, 2.0])}) == {"n_tokens": (1.0, 4.0)}


def test_confidence_comes_back_from_plain_values() -> None:
    features, error = made_up_errors(np.random.default_rng(2), 600)
    quantile, scale = width_of(features, error, np.arange(600) // 60)
    sure = confidence(quantile=quantile, scale=scale, ladders={**NONE, "load": Ladder((1.0, 2.0), (1.5, 2.0))})
    back = confidence_from_json(sure.to_json())
    assert back.base_half_width(features).tolist() == sure.base_half_width(features).tolist()
    assert (back.ranges, back.ladders) == (sure.ranges, sure.ladders)
    assert (back.n_scores, back.n_groups, back.n_anomalies) == (100, 5, 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantile", -0.1),
        ("quantile", float("nan")),
        ("quantile", "x"),
        ("ranges", {}),
        ("ranges", {name: [2.0, 1.0] for name in HULL}),
        ("ranges", {name: [0.0, 1.0] for name in HULL}),  # of which there is no logarithm
        ("ranges", {name: ["a", "b"] for name in HULL}),
        ("ladders", {}),
        ("ladders", {name: [[1.0], []] for name in DIRECTIONS}),
        ("ladders", {name: [[2.0, 1.0], [1.0, 2.0]] for name in DIRECTIONS}),
        ("ladders", {name: [[1.0, 2.0], [2.0, 1.0]] for name in DIRECTIONS}),
        ("ladders", {name: [[1.0], [0.5]] for name in DIRECTIONS}),
        ("ladders", {name: [[1.0], [float("nan")]] for name in DIRECTIONS}),
        ("n_scores", -1),
        ("n_groups", None),
        ("n_anomalies", "x"),
        ("scale", {}),
    ],
)
def test_what_no_errors_could_have_said_is_refused(key: str, value: object) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        confidence_from_json({**confidence().to_json(), key: value})

"""Fitting: recovers constants it should, holds out by shape, saves and loads, and knows where it was never fitted."""

import copy
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.base import clone

from perfmodel.capture import load_capture, per_workload, profile_of
from perfmodel.errors import InputError, NotComparableError
from perfmodel.fitting import fit_captures
from perfmodel.latency import LatencyModel, conformal_quantile, errors_of, evaluate_by_shape, load_model
from perfmodel.predict import predict
from perfmodel.routing import routing
from tests.captures_made import SHAPES, TRUE_CONSTANTS, log_error, write_synthetic_capture


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> LatencyModel:
    path = write_synthetic_capture(tmp_path_factory.mktemp("made") / "synthetic")
    model, _ = fit_captures([str(path)])
    return model


def test_a_fit_on_the_models_own_times_predicts_unseen_shapes(fitted: LatencyModel) -> None:
    overall = fitted.errors_["model"]["all"]
    assert overall["median_ape_frac"] < 0.05
    assert overall["n"] == len(SHAPES) * 8
    assert fitted.errors_["constant"]["all"]["median_ape_frac"] > 0.5
    assert fitted.errors_["roofline_only"]["all"]["median_ape_frac"] > overall["median_ape_frac"]


def test_constants_that_the_data_identify_are_recovered(fitted: LatencyModel) -> None:
    for name in ("eff_compute", "eff_memory"):
        assert log_error(fitted.constants_, TRUE_CONSTANTS, name) < 0.15


def test_constructor_only_stores_and_fit_changes_no_parameter(fitted: LatencyModel) -> None:
    fresh = clone(fitted, safe=False)
    assert not hasattr(fresh, "constants_")
    assert fresh.get_params().keys() == {"profile", "dtype", "kernel", "prior"}


def test_saved_and_loaded_predicts_the_same(fitted: LatencyModel, tmp_path: Path) -> None:
    path = write_synthetic_capture(tmp_path / "again")
    observations = per_workload(load_capture(path).observations)
    fitted.save(tmp_path / "model.json")
    loaded = load_model(tmp_path / "model.json")
    assert loaded.predict(observations).tolist() == fitted.predict(observations).tolist()
    assert loaded.log_half_width_ == fitted.log_half_width_
    assert not list(tmp_path.glob("*.part"))


def test_predictions_carry_an_interval_inside_and_say_extrapolated_outside(fitted: LatencyModel) -> None:
    shape = SHAPES[1]
    inside = predict(
        fitted.profile, shape, routing("uniform", shape.n_experts, shape.top_k, 64), model=fitted, op="moe-layer"
    )
    assert inside.basis == "fitted"
    assert inside.interval is not None
    assert inside.interval[0] < inside.latency_ns < inside.interval[1]
    far = predict(fitted.profile, shape, routing("uniform", shape.n_experts, shape.top_k, 100_000), model=fitted)
    assert (far.basis, far.interval) == ("extrapolated", None)
    assert any(reason.startswith("n_tokens 1e+05 outside") for reason in far.reasons)


def test_a_model_of_bare_gemms_does_not_vouch_for_whole_layers(fitted: LatencyModel) -> None:
    shape = SHAPES[1]
    batch = routing("uniform", shape.n_experts, shape.top_k, 64)
    bare = copy.copy(fitted)
    bare.ops_ = ["grouped_gemm"]
    result = predict(fitted.profile, shape, batch, model=bare, op="moe-layer")
    assert (result.basis, result.interval) == ("extrapolated", None)
    assert "no whole layer was among the observations" in result.reasons


def test_what_must_not_be_pooled_is_refused(tmp_path: Path) -> None:
    observations = per_workload(load_capture(write_synthetic_capture(tmp_path / "made")).observations)
    model = LatencyModel(profile_of(load_capture(tmp_path / "made")), "fp32", "synthetic")
    with pytest.raises(InputError, match="offloaded experts"):
        model.fit(observations.with_columns(access=pl.lit("zero-copy")))
    with pytest.raises(InputError, match="cannot fit a model of fp32"):
        model.fit(observations.with_columns(dtype=pl.lit("bf16")))
    with pytest.raises(InputError, match="the same measurements twice"):
        fit_captures([str(tmp_path / "made")] * 2)


def test_a_cpu_model_does_not_predict_a_gpu(fitted: LatencyModel) -> None:
    from perfmodel.hardware import hardware

    with pytest.raises(InputError, match="fitted on a cpu"):
        predict(hardware("gh200"), SHAPES[0], routing("uniform", 8, 2, 64), model=fitted)


def test_too_few_shapes_to_hold_out_are_refused(tmp_path: Path) -> None:
    path = write_synthetic_capture(tmp_path / "two", shapes=SHAPES[:2])
    with pytest.raises(InputError, match="at least 3 shapes, found 2"):
        fit_captures([str(path)])


def test_captures_of_different_machines_are_never_pooled(tmp_path: Path) -> None:
    a = write_synthetic_capture(tmp_path / "a")
    b = write_synthetic_capture(tmp_path / "b", machine={"cpu_model": "another synthetic CPU"})
    with pytest.raises(NotComparableError, match="cannot share a model"):
        fit_captures([str(a), str(b)])


def test_holding_out_uses_no_row_of_the_held_out_shape(tmp_path: Path) -> None:
    capture = load_capture(write_synthetic_capture(tmp_path / "made"))
    observations = per_workload(capture.observations)
    model = LatencyModel(profile_of(capture), "fp32", "synthetic")
    evaluate_by_shape(model, observations)
    before = np.array(model.held_out_["predicted_ns"])
    spoiled = observations.with_columns(
        time_ns=pl.when(pl.col("shape") == "synthetic-a").then(pl.col("time_ns") * 100).otherwise(pl.col("time_ns"))
    )
    evaluate_by_shape(model, spoiled)
    is_a = observations["shape"].to_numpy() == "synthetic-a"
    assert np.array(model.held_out_["predicted_ns"])[is_a].tolist() == before[is_a].tolist()


def test_errors_and_quantile_by_hand() -> None:
    errors = errors_of(np.array([1.1, 0.8, 1.0, 2.0]), np.ones(4))
    assert errors.median_ape_frac == pytest.approx(0.15)
    assert errors.mape_frac == pytest.approx((0.1 + 0.2 + 0 + 1) / 4)
    assert errors.worst_ape_frac == pytest.approx(1.0)
    assert conformal_quantile(np.arange(1.0, 20.0), 0.9) == 18  # the 18th of 19: ceil(20 x 0.9)
    assert conformal_quantile(np.array([3.0, 1.0]), 0.9) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json", "not a model written by"),
        ("[]", "not a model written by"),
        ('{"kind": "something else"}', "not a model written by"),
        ('{"kind": "perfmodel latency model", "schema": 99}', "schema 99"),
    ],
)
def test_files_that_are_not_models_are_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(InputError, match=words):
        load_model(tmp_path / "m.json")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("constants", "eff_compute"), "x"),
        (("constants", "eff_compute"), None),
        (("constants", "eff_memory"), 0),
        (("constants", "eff_compute"), -1),
        (("constants", "eff_compute"), float("nan")),
        (("ranges", "n_tokens"), ["a", "b"]),
        (("ranges",), {}),
        (("log_half_width",), "x"),
        (("hardware", "device"), "tpu"),
    ],
)
def test_a_model_that_no_fit_could_have_written_is_refused(
    fitted: LatencyModel, tmp_path: Path, where: tuple[str, ...], value: object
) -> None:
    fitted.save(tmp_path / "m.json")
    content = json.loads((tmp_path / "m.json").read_text())
    target = content
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = value
    (tmp_path / "m.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="not a model written by"):
        load_model(tmp_path / "m.json")


def test_a_missing_model_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="perfmodel fit"):
        load_model(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("capture.json", "{}", "not a capture manifest"),
        ("capture.json", json.dumps({"schema": 9}), "schema 9"),
        ("capture.json", json.dumps({"schema": 1}), "lacks"),
        ("capture.json", "DAMAGED settings", "capture.json is damaged"),
        ("capture.json", "DAMAGED machine", "capture.json is damaged"),
        ("observations.jsonl", "", "no observation yet"),
        ("observations.jsonl", '{"workload": "zz", "run": 0, "times_ns": [1]}\n', "not planned"),
        ("observations.jsonl", '{"workload": 1}\n', "damaged"),
    ],
)
def test_damaged_captures_are_refused(tmp_path: Path, file: str, change: str, words: str) -> None:
    path = write_synthetic_capture(tmp_path / "made")
    if change.startswith("DAMAGED"):
        change = json.dumps({**json.loads((path / file).read_text()), change.split()[1]: []})
    (path / file).write_text(change)
    with pytest.raises(InputError, match=words):
        load_capture(path)


def test_a_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = write_synthetic_capture(tmp_path / "made", n_runs=1)
    whole = load_capture(path).observations.height
    with (path / "observations.jsonl").open("a") as file:
        file.write('{"workload": "abc", "ru')
    assert load_capture(path).observations.height == whole

"""Fitting: recovers constants it should, holds out by shape, refuses what it must, knows where it was never fitted."""

import copy
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.base import clone

from perfmodel.capture import load_capture, per_workload, profile_of
from perfmodel.errors import InputError
from perfmodel.fitting import MAX_POINTS, fit_source
from perfmodel.latency import HULL, LatencyModel, fit_constants, work_of
from perfmodel.latency.model import Tried
from perfmodel.moe import MoEShape
from perfmodel.physics import form_for
from perfmodel.predict import predict
from perfmodel.routing import routing
from perfmodel.sources import only_source, read_sources
from tests.captures_made import SHAPES, TRUE_CONSTANTS, log_error, write_synthetic_capture
from tests.made_up import TRUE, made_up_machine, made_up_model, made_up_observations, new_model, spoiled


def fit(path: Path) -> LatencyModel:
    return fit_source(only_source(read_sources([str(path)])))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> LatencyModel:
    return fit(write_synthetic_capture(tmp_path_factory.mktemp("made") / "synthetic"))


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


def test_a_model_keeps_the_points_it_was_fitted_on(fitted: LatencyModel) -> None:
    points = fitted.points_
    assert {len(column) for column in points.values()} == {32} and MAX_POINTS > 32
    assert {f"at_{name}" for name in HULL} < set(points)
    # One token of two of eight experts: two rows in all, one each of two experts.
    first = {name: column[points["shape"].index("synthetic-a")] for name, column in points.items()}
    assert (first["n_tokens"], first["at_rows_per_active_expert"], first["at_active_frac"]) == (1, 1.0, 0.25)
    off = abs(first["predicted_ns"] / first["measured_ns"] - 1)
    assert off <= fitted.errors_["model"]["synthetic-a"]["worst_ape_frac"] + 1e-3


def test_predictions_carry_an_interval_inside_and_say_extrapolated_outside(fitted: LatencyModel) -> None:
    shape = SHAPES[1]
    inside = predict(
        fitted.profile, shape, routing("uniform", shape.n_experts, shape.top_k, 64), model=fitted, op="moe-layer"
    )
    assert inside.basis == "fitted"
    assert inside.interval is not None
    assert inside.interval[0] < inside.latency_ns < inside.interval[1]
    far = predict(
        fitted.profile,
        shape,
        routing("uniform", shape.n_experts, shape.top_k, 100_000),
        model=fitted,
        op="moe-layer",
    )
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


def test_a_model_of_whole_layers_does_not_vouch_for_bare_gemms() -> None:
    model, observations = made_up_model(), made_up_observations(tokens=(64,))
    bare = observations.with_columns(op=pl.lit("grouped_gemm"), gemm_k="hidden", gemm_n="inter")
    assert np.isnan(model.forecast(model.work(bare)).log_half_width).all()
    assert model.outside(model.work(bare))[0] == "no bare grouped GEMM was among the observations"
    assert np.isfinite(model.forecast(model.work(observations)).log_half_width).all()


def test_a_model_of_replayed_calls_does_not_vouch_for_launched_ones() -> None:
    """Nothing is known of the host's time where graphs alone were measured, nor of the device's beneath the host's."""
    shape = MoEShape("synthetic", n_experts=16, top_k=2, hidden=1024, inter=512)
    batch = routing("uniform", 16, 2, 64)
    replayed = made_up_model()
    launched = new_model().fit(made_up_observations(launch=None))
    for model, own, other, words in (
        (replayed, "graph", "eager", "no call launched by the host was among the observations"),
        (launched, "eager", "graph", "no call replayed from a graph was among the observations"),
    ):
        by_default, same, another = (
            predict(model.profile, shape, batch, model=model, op="fused-moe", launch=x) for x in (None, own, other)
        )
        assert by_default == same and same.interval is not None
        assert (another.basis, another.interval) == ("extrapolated", None) and words in another.reasons


def test_what_must_not_be_pooled_is_refused(tmp_path: Path) -> None:
    observations = per_workload(load_capture(write_synthetic_capture(tmp_path / "made")).observations)
    model = LatencyModel(profile_of(load_capture(tmp_path / "made")), "fp32", "synthetic")
    with pytest.raises(InputError, match="offloaded experts"):
        model.fit(observations.with_columns(access=pl.lit("zero-copy")))
    with pytest.raises(InputError, match="cannot fit a model of fp32"):
        model.fit(observations.with_columns(dtype=pl.lit("bf16")))
    with pytest.raises(InputError, match="2 dtypes"):
        work_of(pl.concat([observations, observations.with_columns(dtype=pl.lit("bf16"))]))


def test_a_cpu_model_does_not_predict_a_gpu(fitted: LatencyModel) -> None:
    from perfmodel.hardware import hardware

    with pytest.raises(InputError, match="fitted on a cpu"):
        predict(hardware("gh200"), SHAPES[0], routing("uniform", 8, 2, 64), model=fitted)


def test_too_few_shapes_to_hold_out_are_refused(tmp_path: Path) -> None:
    path = write_synthetic_capture(tmp_path / "two", shapes=SHAPES[:2])
    with pytest.raises(InputError, match="at least 3 shapes, found 2"):
        fit(path)


def test_constants_that_a_table_identifies_are_recovered() -> None:
    observations = made_up_observations(noise_frac=0.001)
    work, form = work_of(observations), form_for(made_up_machine(), "synthetic", "bf16")
    measured = np.log(observations["time_ns"].to_numpy())
    model = new_model()
    found = fit_constants(form, work, measured, model.roof, form.defaults)
    assert found.layer_ns == pytest.approx(TRUE.layer_ns, rel=0.05)
    assert found.eff_memory == pytest.approx(TRUE.eff_memory, rel=0.1)
    # What nothing informs stays where it was: no bare call, no eager launch, no misaligned row of weights.
    for name in ("call_ns", "host_call_ns", "host_layer_ns", "misaligned_compute", "tile_overhead_cols"):
        assert getattr(found, name) == getattr(form.defaults, name)
        assert name not in form.identified(work)


def test_held_out_predictions_use_no_row_of_the_held_out_shape() -> None:
    observations = made_up_observations(tokens=(1, 8, 64, 512, 4096))
    shape = observations["shape"][0]
    before = new_model().fit(observations).held_out_
    after = new_model().fit(spoiled(observations, pl.col("shape") == shape)).held_out_
    is_spoiled = observations["shape"].to_numpy() == shape
    assert after[is_spoiled].tolist() == before[is_spoiled].tolist()
    assert not np.allclose(after[~is_spoiled], before[~is_spoiled], rtol=0.05)


def test_times_may_stand_beside_the_observations() -> None:
    observations = made_up_observations(tokens=(1, 64, 4096))
    twice = 2 * observations["time_ns"].to_numpy()
    model = new_model().fit(observations, twice)
    assert np.median(model.predict(observations) / twice) == pytest.approx(1.0, rel=0.1)
    assert model.anomalies_ == []


def test_measurements_that_no_physics_explains_are_named() -> None:
    observations = made_up_observations()
    shape = observations["shape"][0]
    odd = spoiled(observations, (pl.col("shape") == shape) & (pl.col("n_tokens") == 64))
    model = new_model().fit(odd)
    assert model.confidence_.n_anomalies == 3
    assert len(model.anomalies_) == 3
    assert f"{shape} (1024x512), balanced: 1 of 14 batch sizes (64 tokens) take " in "".join(model.anomalies_)
    assert model.typical_half_width_ < 0.2  # and intervals are not as wide as they are


def test_a_residual_is_learned_where_it_helps_and_moves_predictions_no_further_than_it_may() -> None:
    observations = made_up_observations(tokens=tuple(sorted({round(1.35**i) for i in range(33)})))
    wave = 1 + 0.2 * np.sign(np.sin(np.log(observations["n_tokens"].to_numpy())))
    odd = observations.with_columns(time_ns=pl.col("time_ns") * wave)
    model = new_model().fit(odd)
    assert model.residual_ is not None
    without = copy.copy(model)
    without.residual_ = None
    moved = np.abs(np.log(model.predict(odd) / without.predict(odd)))
    assert 0.05 < moved.max() <= 0.25 + 1e-9
    error, physical = (np.abs(np.log(m.predict(odd) / odd["time_ns"].to_numpy())).mean() for m in (model, without))
    assert error < physical


def test_a_residual_that_does_not_help_beyond_anomalies_is_not_used() -> None:
    far, none = np.full(4, 3.0), {}
    assert not Tried(far, far, none, 3).helps(np.zeros(4))  # no measurement that physics nearly predicts
    assert not Tried(np.zeros(4), np.zeros(4), none, 3).helps(np.zeros(4))  # nothing is left to take away
    assert Tried(np.full(4, 0.2), np.full(4, 0.1), none, 3).helps(np.zeros(4))
    assert not Tried(np.full(4, 0.2), np.array([0.0, 0.0, 0.0, 0.4]), none, 3).helps(np.zeros(4))  # a worse tail


@pytest.mark.parametrize(
    "observations",
    [
        made_up_observations(tokens=(1,)),
        made_up_observations(tokens=(64,), routings=("balanced",)),
        made_up_observations(sizes=((1024, 512, 16, 2),)),
        made_up_observations(sizes=((1024, 512, 16, 1),), tokens=(1,), routings=("balanced",)),
        made_up_observations(sizes=((1024, 512, 1, 1), (512, 512, 1, 1), (512, 256, 1, 1)), tokens=(1, 4)),
    ],
    ids=["one token", "one batch size", "one shape", "one row", "one expert"],
)
def test_few_measurements_fit_and_promise_no_more_than_they_hold(observations: pl.DataFrame) -> None:
    model = new_model().fit(observations)
    assert np.isfinite(model.predict(observations)).all()
    if model.confidence_ is None:
        assert np.isnan(model.forecast(model.work(observations)).log_half_width).all()
        assert model.outside(model.work(observations)) != []
    else:
        assert (model.forecast(model.work(observations)).log_half_width > 0).all()


@pytest.mark.parametrize("time_ns", [0.0, -1.0, float("nan"), float("inf"), None])
def test_times_that_no_clock_gives_are_refused(time_ns: float | None) -> None:
    observations = made_up_observations(tokens=(1, 64))
    wrong = observations.with_columns(time_ns=pl.when(pl.col("n_tokens") == 1).then(time_ns).otherwise("time_ns"))
    with pytest.raises(InputError, match=r"found 15 times such as .*, expected numbers above zero"):
        new_model().fit(wrong)
    with pytest.raises(InputError, match="found 30 times"):
        new_model().fit(observations, np.full(30, -1.0))


def test_times_of_two_kinds_far_apart_leave_no_residual_to_learn() -> None:
    """The median of the residuals lies between the two kinds, near none of them."""
    observations = made_up_observations(tokens=tuple(range(1, 41)))
    factor = np.where(np.arange(observations.height) % 2, 50.0, 0.02)
    model = new_model().fit(observations.with_columns(time_ns=pl.col("time_ns") * factor))
    assert model.residual_ is None and np.isfinite(model.predict(observations)).all()


def test_no_observations_are_refused() -> None:
    observations = made_up_observations(tokens=(1,))[:0]
    with pytest.raises(InputError, match="no observations to fit"):
        new_model().fit(observations)
    with pytest.raises(InputError, match="no observations to predict"):
        made_up_model().predict(observations)


def test_times_that_are_all_far_from_physics_fit_without_an_interval() -> None:
    observations = made_up_observations(tokens=(1, 64, 4096))
    noise = np.exp(np.random.default_rng(0).choice([-4.0, 4.0], observations.height))
    model = new_model().fit(observations.with_columns(time_ns=pl.col("time_ns") * noise))
    assert np.isfinite(model.predict(observations)).all()
    assert model.held_out_ is not None and len(model.anomalies_) > 0
    assert model.confidence_ is None  # what few came near by chance promise nothing of the others


@pytest.mark.parametrize(("dtype", "key"), [("fp8", "fp8_gemm_flops_per_s"), ("mxfp4", "bf16_gemm_flops_per_s")])
def test_models_of_quantised_weights_compute_at_the_rate_of_their_dtype(dtype: str, key: str) -> None:
    machine = made_up_machine(fp8_gemm_flops_per_s=1.2e15)
    model = new_model(profile=machine, dtype=dtype, kernel=f"synthetic/1/made_up/{dtype}")
    model.fit(made_up_observations(dtype=dtype, tokens=(1, 64, 4096)))
    assert model.roof.from_keys == (key, "memory_stream_bytes_per_s")
    assert np.isfinite(model.constants_.eff_memory)


def test_a_model_fitted_in_memory_predicts_and_explains() -> None:
    model = made_up_model()
    shape = MoEShape("synthetic", n_experts=16, top_k=2, hidden=1024, inter=512)
    result = predict(model.profile, shape, routing("uniform", 16, 2, 64), model=model, op="fused-moe", explained=True)
    assert result.explanation is not None and result.explanation.nearest == ()
    assert result.interval is not None


def test_a_model_says_which_machine_and_dtype_it_does_not_know() -> None:
    model, observations = made_up_model(), made_up_observations(tokens=(1,))
    with pytest.raises(InputError, match=r"fitted on a gpu \(synthetic-gpu\), 'other' is a cpu"):
        model.work(observations, made_up_machine("other", device="cpu"))
    with pytest.raises(InputError, match="the model is of bf16, these observations of fp8"):
        model.predict(observations.with_columns(dtype=pl.lit("fp8")))


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

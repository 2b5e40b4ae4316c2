"""Calibration by few points: it finds what they identify, leaves the rest, and never spoils a model that was right."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from perfmodel.adapt import Points, calibrate, most_likely
from perfmodel.capture import shipped_captures
from perfmodel.design import design
from perfmodel.errors import InputError
from perfmodel.evaluation import errors_of, evaluate, summary
from perfmodel.hardware import hardware
from perfmodel.latency import LatencyModel, load_model, save_model, work_of
from perfmodel.sources import read_sources
from perfmodel.tile_rules import TileRule
from perfmodel.transfer import SHAPE_FRAC, SIGMAS_90, SPREADS, covariance, spread_of, transferred, zero_shot_half_width
from tests.adapt_made import SYNTHETIC_CONSTANTS, synthetic_candidates, synthetic_model, synthetic_times

SHARED = Path(__file__).parents[2] / "shared" / "data" / "moe_perf_h100_sxm.parquet"
TRT, VLLM = (
    "trtllm/1.3.0rc20/moe_torch_flow_cutlass/bf16",
    "vllm/0.24.0/vllm_unquantizedfusedmoe_triton_tritonexperts/bf16",
)


@pytest.fixture(scope="module")
def model() -> LatencyModel:
    return synthetic_model()


@pytest.fixture(scope="module")
def candidates(model: LatencyModel) -> pl.DataFrame:
    return synthetic_candidates(model)


def drawn(rows: pl.DataFrame, k: int, seed: int) -> pl.DataFrame:
    return rows[np.random.default_rng(seed).choice(rows.height, k, replace=False)]


def median_error(model: LatencyModel, rows: pl.DataFrame) -> float:
    return errors_of(model.predict(rows), rows["time_ns"].to_numpy()).median_ape_frac


class Straight:
    """One constant whose coordinate is the log latency itself: slope 1 everywhere."""

    def __init__(self) -> None:
        self.z = np.array([2.0])
        self.at = type("Limits", (), {"limits": (np.array([-10.0]), np.array([10.0]))})

    def log_ns(self, z: np.ndarray) -> np.ndarray:
        return np.array([z[0]])

    def slopes(self, z: np.ndarray) -> np.ndarray:
        return np.array([[1.0]])


def test_one_point_and_one_constant_by_hand() -> None:
    # Prior 2.0 +- 0.3, a point that says 2.5 +- 0.1: the mean weighted by 1/0.09 and 1/0.01.
    points = Points(Straight(), np.array([2.5]), np.array([0.1]), np.array([0.3]), np.array([0]))
    z = most_likely(points, np.ones(1), np.array([True]), 1.0, 1.0)
    assert z[0] == pytest.approx((2.0 / 0.09 + 2.5 / 0.01) / (1 / 0.09 + 1 / 0.01))
    spread = covariance(np.array([[1.0]]), np.array([0.3]), np.array([0.1]), np.array([0]))
    assert spread[0, 0] == pytest.approx(1 / (1 / 0.09 + 1 / 0.01))


def test_a_second_point_of_a_shape_says_less_than_one_of_another() -> None:
    slopes, sigma, prior = np.ones((2, 1)), np.full(2, 0.1), np.array([0.3])
    same = covariance(slopes, prior, sigma, np.array([0, 0]))[0, 0]
    other = covariance(slopes, prior, sigma, np.array([0, 1]))[0, 0]
    # Two errors with correlation r have a mean of variance sigma^2 (1 + r) / 2.
    assert same == pytest.approx(1 / (1 / 0.09 + 2 / (0.01 * (1 + SHAPE_FRAC))))
    assert other == pytest.approx(1 / (1 / 0.09 + 2 / 0.01))


def test_a_constant_that_nothing_was_measured_about_keeps_the_prior_of_its_form(model: LatencyModel) -> None:
    from perfmodel.transfer import coordinates

    at = coordinates(model.form, ["layer_ns", "misaligned_compute"])
    spread = spread_of(model, at)
    assert spread[0] == 0.5
    assert spread[1] == model.form.priors["misaligned_compute"].sigma


@pytest.mark.parametrize("machine", ["h200-sxm", "a100-sxm-80gb", "b200-sxm", "h100-sxm"])
def test_transferred_predicts_what_the_model_says_of_that_machine(
    model: LatencyModel, candidates: pl.DataFrame, machine: str
) -> None:
    profile, work = hardware(machine), work_of(candidates)
    moved = transferred(model, profile)
    assert moved.forecast(work).ns == pytest.approx(model.forecast(work, profile).ns, rel=1e-9)
    assert moved.profile is profile
    assert model.constants_ == SYNTHETIC_CONSTANTS


def test_launch_configurations_are_those_of_the_new_machine(model: LatencyModel) -> None:
    triton = synthetic_model()
    triton.kernel, triton.tiles_ = "vllm/1/triton/bf16", TileRule("vllm", "h100-sxm", "bf16")
    assert transferred(triton, hardware("h200-sxm")).tiles_ == TileRule("vllm", "h200-sxm", "bf16")
    assert transferred(
        triton, hardware("h200-sxm"), dtype="fp8", kernel="sglang/1/triton/fp8_block"
    ).tiles_ == TileRule("sglang", "h200-sxm", "fp8_block")
    assert transferred(model, hardware("h200-sxm")).tiles_ is None


def test_constants_of_a_synthetic_machine_are_found_by_designed_points(
    model: LatencyModel, candidates: pl.DataFrame
) -> None:
    moved = {"layer_ns": 2.0, "eff_memory": 0.75, "eff_compute": 0.8}
    every = synthetic_times(model, candidates, **moved)
    noisy = synthetic_times(model, candidates, noise=0.02, **moved)
    found = calibrate(model, noisy[design(model, 20, candidates)["candidate"].to_list()])
    for name, factor in moved.items():
        assert getattr(found.constants_, name) == pytest.approx(getattr(model.constants_, name) * factor, rel=0.12)
    assert median_error(found, every) < 0.2 * median_error(model, every)
    said = found.evidence_["calibrated"]
    assert said["left_out"]["median_ape_frac"] < said["zero_shot"]["median_ape_frac"]
    assert said["from"]["hardware"] == "h100-sxm"
    assert (said["n_points"], found.n_observations_) == (20, 20)


@pytest.mark.parametrize("k", [5, 10, 20])
@pytest.mark.parametrize("seed", range(2))
def test_a_model_that_is_right_stays_as_it_is(model: LatencyModel, candidates: pl.DataFrame, k: int, seed: int) -> None:
    rows = synthetic_times(model, candidates, noise=0.05, seed=seed)
    found = calibrate(model, drawn(rows, k, seed))
    assert found.constants_ == model.constants_
    assert abs(found.evidence_["calibrated"]["scalar_log"]) < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_one_failed_point_bends_nothing(model: LatencyModel, candidates: pl.DataFrame, seed: int) -> None:
    rows = synthetic_times(model, candidates, noise=0.03, seed=seed)
    points = drawn(rows, 10, seed)
    broken = points.with_columns(
        time_ns=pl.when(pl.int_range(pl.len()) == 3).then(4 * pl.col("time_ns")).otherwise(pl.col("time_ns"))
    )
    found = calibrate(model, broken)
    clean = synthetic_times(model, candidates)
    assert median_error(found, clean) < 0.03
    assert found.evidence_["calibrated"]["n_anomalies"] == 1


def test_what_the_points_cannot_tell_stays_exactly(model: LatencyModel, candidates: pl.DataFrame) -> None:
    few = candidates.filter(pl.col("n_tokens") == 1, pl.col("op") == "moe_layer")
    found = calibrate(model, synthetic_times(model, few, noise=0.01, layer_ns=2.5))
    assert found.constants_.layer_ns > 1.5 * model.constants_.layer_ns
    for name in ("eff_compute", "tile_overhead_terms", "call_ns", "host_layer_ns", "row_passes"):
        assert getattr(found.constants_, name) == getattr(model.constants_, name)
    why = {row["name"]: row["why"] for row in found.evidence_["calibrated"]["constants"]}
    assert set(why) == set(asdict(model.constants_))
    assert why["call_ns"] == "no point depends on it"
    assert why["layer_ns"] is None


def test_intervals_widen_by_what_points_show_and_never_narrow(model: LatencyModel, candidates: pl.DataFrame) -> None:
    assert model.confidence_ is not None
    exact = calibrate(model, drawn(synthetic_times(model, candidates, noise=0.005), 20, 1))
    wild = calibrate(model, drawn(synthetic_times(model, candidates, noise=0.15), 20, 1))
    assert exact.confidence_ is not None
    assert wild.confidence_ is not None
    assert exact.confidence_.quantile >= model.confidence_.quantile
    assert wild.confidence_.quantile > 1.5 * model.confidence_.quantile
    rows = synthetic_times(model, candidates, noise=0.15, seed=9)
    inside = []
    for seed in range(8):
        forecast = calibrate(model, drawn(rows, 10, seed)).forecast(work_of(rows))
        inside.append((np.abs(np.log(forecast.ns / rows["time_ns"].to_numpy())) <= forecast.log_half_width).mean())
    assert np.mean(inside) > 0.82


def test_a_factor_on_everything_survives_the_file(
    model: LatencyModel, candidates: pl.DataFrame, tmp_path: Path
) -> None:
    from perfmodel.adapt import _shifted

    model = synthetic_model()
    before = model.predict(candidates)
    model.residual_ = _shifted(None, 0.1)
    model.errors_, model.points_ = None, None
    save_model(model, tmp_path / "shifted.json")
    again = load_model(tmp_path / "shifted.json").predict(candidates)
    assert again == pytest.approx(before * math.exp(0.1))


def test_points_that_say_nothing_are_refused(model: LatencyModel, candidates: pl.DataFrame) -> None:
    rows = drawn(synthetic_times(model, candidates), 5, 0)
    with pytest.raises(InputError, match="found 2 points, expected at least 3"):
        calibrate(model, rows[:2])
    with pytest.raises(InputError, match="offloaded experts"):
        calibrate(model, rows.with_columns(access=pl.lit("copy")))
    with pytest.raises(InputError, match="2 dtypes"):
        calibrate(model, rows.with_columns(dtype=pl.Series(["fp8", *["bf16"] * 4])))
    with pytest.raises(InputError, match="says nothing of a cpu"):
        calibrate(model, rows, hardware("xeon-spr"))
    with pytest.raises(InputError, match=r"points of moe_layer.*fitted on grouped_gemm alone"):
        calibrate(synthetic_model(("grouped_gemm",)), rows.with_columns(op=pl.lit("moe_layer")))


@pytest.mark.skipif(not SHARED.exists(), reason="the public table is not here")
def test_on_public_measurements_of_other_kernels() -> None:
    sources = {one.kernel: one for one in read_sources([str(SHARED)])}
    source, other = sources[TRT], sources[VLLM]
    rows = source.observations.filter(source.is_screened)
    model = LatencyModel(source.profile, source.dtype, source.kernel).fit(rows, n_folds=4)
    zero_shot = median_error(model, rows)
    for seed in range(3):  # its own kernel: nothing to learn
        assert median_error(calibrate(model, drawn(rows, 5, seed)), rows) < 1.1 * zero_shot
    theirs = other.observations.filter(other.is_screened)
    start = transferred(model, other.profile, kernel=other.kernel)
    before = median_error(start, theirs)
    after = [
        median_error(calibrate(model, drawn(theirs, 20, i), other.profile, other.kernel), theirs) for i in range(3)
    ]
    assert np.mean(after) < before
    assert max(after) < 1.25 * before


def test_an_interval_on_an_unseen_machine_is_wider_by_what_constants_may_be_there(
    model: LatencyModel, candidates: pl.DataFrame
) -> None:
    machine, work = hardware("h200-sxm"), work_of(candidates)
    own = model.forecast(work, machine).log_half_width
    wide = zero_shot_half_width(model, work, machine)
    assert (wide > own).all()
    # A call that computes alone: eff_compute and the overheads of tiles are what moves it; a latency is as 1 / eff.
    one = candidates.filter(pl.col("op") == "grouped_gemm").sort("n_tokens")[-1:]
    least = math.hypot(model.typical_half_width_ or 0, SIGMAS_90 * SPREADS["eff_compute"] * 0.9)
    assert least < zero_shot_half_width(model, work_of(one), machine)[0] < 1.5 * least
    truth = {"eff_compute": 0.85, "eff_memory": 0.9, "tile_overhead_rows": 1.2, "layer_ns": 1.4, "row_passes": 0.8}
    times = synthetic_times(transferred(model, machine), candidates, **truth)["time_ns"].to_numpy()
    off = np.abs(np.log(model.forecast(work, machine).ns / times))
    assert (off <= own).mean() < 0.7 and (off <= wide).mean() > 0.9
    model_without = model.__class__(model.profile, model.dtype, model.kernel)
    vars(model_without).update(vars(model) | {"confidence_": None})
    assert np.isnan(zero_shot_half_width(model_without, work, machine)).all()


@pytest.mark.parametrize(
    ("source", "target"), [("epyc-zen4-2c-fp32", "epyc-zen5-2c-fp32"), ("epyc-zen5-2c-fp32", "epyc-zen4-2c-fp32")]
)
def test_intervals_on_the_other_real_cpu_hold_what_they_promise(source: str, target: str) -> None:
    paths = {path.name: path for path in shipped_captures()}
    (found,) = read_sources([str(paths[target])])
    result = summary(evaluate(load_model(source), found.observations, "none", machine=found.profile).table)
    assert result["coverage90"] >= 0.9 and result["half_width"] < 0.5


def test_what_was_learned_of_offloading_stays_on_its_machine(model: LatencyModel) -> None:
    vars(model_with := model.__class__(model.profile, model.dtype, model.kernel)).update(vars(model) | {"offload_": {}})
    same_name = replace(hardware("h200-sxm"), name=model.profile.name)
    assert transferred(model_with, model.profile).offload_ == {}
    assert transferred(model_with, same_name).offload_ is None

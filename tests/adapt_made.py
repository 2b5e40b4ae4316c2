"""A made-up machine for tests: a model with stated constants, and times that follow others. Nothing was measured."""

from dataclasses import replace

import numpy as np
import polars as pl

from perfmodel.design import grid
from perfmodel.hardware import hardware
from perfmodel.latency import Confidence, LatencyModel, hull_features, work_of
from perfmodel.latency.confidence import DIRECTIONS, Ladder, ranges_of
from perfmodel.physics import TiledConstants
from perfmodel.transfer import SIGMAS_90

SYNTHETIC_CONSTANTS = TiledConstants(
    eff_compute=0.9,
    eff_memory=0.95,
    tile_overhead_rows=100.0,
    tile_overhead_cols=31.0,
    tile_overhead_terms=160.0,
    smooth_p=2.9,
    call_ns=3000.0,
    expert_ns=10.0,
    layer_ns=25_000.0,
    row_passes=3.0,
    token_passes=3.0,
)
UNINFORMED = ("misaligned_compute", "misaligned_memory", "host_call_ns", "host_layer_ns")
SYNTHETIC_SIGMA = 0.05  # of held-out errors, log units
SYNTHETIC_KERNEL = "synthetic/cutlass/bf16"


def synthetic_model(ops: tuple[str, ...] = ("grouped_gemm", "moe_layer")) -> LatencyModel:
    """A model of an H100 as if fitted, without a residual; its held-out errors are said to be SYNTHETIC_SIGMA."""
    model = LatencyModel(hardware("h100-sxm"), "bf16", SYNTHETIC_KERNEL)
    model.constants_, model.tiles_, model.residual_, model.confidence_ = SYNTHETIC_CONSTANTS, None, None, None
    model.informed_ = [name for name in vars(SYNTHETIC_CONSTANTS) if name not in UNINFORMED]
    model.anomalies_, model.typical_half_width_, model.offload_ = [], None, None
    model.ops_, model.n_observations_, model.evidence_ = list(ops), 1000, {"launch": "graph"}
    hull = hull_features(work_of(synthetic_candidates(model)), model.roof)
    ladders = {direction: Ladder() for direction in DIRECTIONS}
    quantile = SIGMAS_90 * SYNTHETIC_SIGMA
    model.confidence_ = Confidence(quantile, None, ranges_of(hull), ladders, 1000, 8, 0)
    model.typical_half_width_ = quantile
    return model


def synthetic_candidates(model: LatencyModel) -> pl.DataFrame:
    """The grid that a design chooses from, in the columns that a calibration needs."""
    return grid(model).with_columns(access=pl.lit("resident"), offload_frac=pl.lit(0.0))


def synthetic_times(
    model: LatencyModel, rows: pl.DataFrame, noise: float = 0.0, seed: int = 0, **factors: float
) -> pl.DataFrame:
    """The rows with `time_ns` of a machine whose constants are the model's times `factors`, and noise in logs."""
    truth = synthetic_model(tuple(model.ops_))
    truth.profile = model.profile
    moved = {name: getattr(model.constants_, name) * factor for name, factor in factors.items()}
    truth.constants_ = replace(model.constants_, **moved)
    times = truth.forecast(work_of(rows)).ns
    errors = np.random.default_rng(seed).normal(0.0, noise, rows.height) if noise else np.zeros(rows.height)
    return rows.with_columns(time_ns=pl.Series(times * np.exp(errors)))

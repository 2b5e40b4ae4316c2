"""Observations in, `LatencyModel` out: fitting the constants of `physics`, a screened residual, intervals, JSON."""

from .confidence import ANOMALY_LOG, COVERAGE, Confidence, conformal_quantile
from .constants import fit_constants
from .model import Forecast, LatencyModel, base_half_width, hull_of
from .store import FITTED_DIR, load_model, save_model, shipped_models
from .work import HULL, hull_features, residual_features, work_of

__all__ = [
    "ANOMALY_LOG",
    "COVERAGE",
    "FITTED_DIR",
    "HULL",
    "Confidence",
    "Forecast",
    "LatencyModel",
    "base_half_width",
    "conformal_quantile",
    "fit_constants",
    "hull_features",
    "hull_of",
    "load_model",
    "residual_features",
    "save_model",
    "shipped_models",
    "work_of",
]

"""Observations in, `LatencyModel` out: fitting the constants of `physics`, a screened residual, intervals, JSON."""

from .confidence import COVERAGE, Confidence, conformal_quantile
from .model import Forecast, LatencyModel
from .work import HULL, work_of

__all__ = ["COVERAGE", "HULL", "Confidence", "Forecast", "LatencyModel", "conformal_quantile", "work_of"]

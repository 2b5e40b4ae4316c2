"""Is a machine slower than the model says it should be: measured intervals beside the model's, workload by workload."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from perfmodel.capture import Capture, fitted_rows, per_workload, profile_of
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile, hardware, profile_name
from perfmodel.latency import LatencyModel, load_model, shipped_models
from perfmodel.physics import Array, Work
from perfmodel.transfer import zero_shot_half_width

from .evidence import Evidence, labels_of, of_capture
from .spread import OVERALL, Mean, means_of

AS_EXPECTED, SLOWER_THAN_MODEL, FASTER_THAN_MODEL = "as-expected", "slower-than-model", "faster-than-model"
OUTSIDE_MODEL = "outside-model"
MOST_FITTED = 5_000  # workloads, of which each takes about 10 ms; a day of measuring makes some thousands
LEAST_SHAPES = 3  # fewer cannot be held out, and a model fitted to them knows no interval


@dataclass(frozen=True)
class Expectation:
    """One workload, or all of them together, beside what a model expects of its machine; times in ns.

    `measured_low_ns` to `measured_high_ns` is the 90 % interval of the runs' mean (of logarithms), `model_low_ns` to
    `model_high_ns` the range that the model says holds 90 % of measurements. Both ends are null where the verdict is
    `outside-model`, and then `reason` says which range was left.
    """

    workload: str
    label: str
    measured_ns: float
    measured_low_ns: float
    measured_high_ns: float
    model_ns: float
    model_low_ns: float | None
    model_high_ns: float | None
    verdict: str
    reason: str | None = None

    @property
    def ratio(self) -> float:
        """Measured time over what the model expects."""
        return self.measured_ns / self.model_ns


def datasheet_of(capture: Capture) -> HardwareProfile | None:
    """The shipped profile of the GPU of a capture; null for CPUs, GPUs without one, and slices of a GPU (MIG)."""
    machine = capture.manifest["machine"]
    gpu_name = str(machine.get("gpu_name") or "")
    name = profile_name(gpu_name)
    is_slice = "MIG" in gpu_name or str(machine.get("mig")) == "Enabled"
    return None if name is None or is_slice or profile_of(capture).device != "gpu" else hardware(name)


def fitted_on(model: LatencyModel) -> list[Any]:
    """The digests of the captures that a model was fitted on."""
    return [one.get("digest") for one in model.evidence_.get("captures", ())]


def model_for(capture: Capture) -> LatencyModel:
    """A model of the machine of a capture: the shipped one that was fitted on these very measurements, else one that is
    fitted now, which takes seconds.

    Raises InputError with fewer than three shapes of resident experts, for a model of them would know no interval, and
    with more than MOST_FITTED workloads.
    """
    if capture.name in shipped_models():
        model = load_model(capture.name)
        if fitted_on(model) == [capture.digest]:
            return model
    rows, _ = fitted_rows(per_workload(capture.observations), capture.dtype)
    if rows["shape"].n_unique() < LEAST_SHAPES:
        raise InputError(
            f"capture {capture.name!r} measured {rows['shape'].n_unique()} shapes with resident experts in "
            f"{capture.dtype}, expected at least {LEAST_SHAPES} to fit a model to"
        )
    if rows.height > MOST_FITTED:
        raise InputError(
            f"capture {capture.name!r} measured {rows.height} workloads, and a model is fitted on the spot to at most "
            f"{MOST_FITTED}; give one with --model"
        )
    return LatencyModel(profile_of(capture), capture.dtype, str(capture.manifest["kernel"])).fit(rows)


def judged_rows(capture: Capture, model: LatencyModel, only: Collection[str] | None = None) -> pl.DataFrame:
    """The workloads of a capture that a model can say something of, one row each; of these alone where `only` is given.

    Left out are other dtypes, offloaded experts and the rarer kind of launch. Raises InputError where none is left.
    """
    rows, _ = fitted_rows(per_workload(capture.observations), model.dtype)
    if only is not None:
        rows = rows.filter(pl.col("workload").is_in(list(only)))
    if rows.is_empty():
        measured = ", ".join(capture.observations["dtype"].unique().sort())
        raise InputError(
            f"the model is of resident experts in {model.dtype}, and none of the compared workloads of capture "
            f"{capture.name!r} is ({measured})"
        )
    return rows


def against_model(
    capture: Capture,
    model: LatencyModel,
    profile: HardwareProfile | None = None,
    only: Collection[str] | None = None,
) -> list[Expectation]:
    """A capture against a model on its machine: first all workloads together, then each, slowest for its model first.

    `profile` holds the ceilings, null for those that the capture calibrated; a datasheet's say what the silicon should
    reach. On ceilings other than its own, or for another kernel, the model's intervals are wider by what its constants
    may be there. Errors of workloads are taken as shared, so that the interval of all is the mean of theirs. Raises
    InputError for a model of another kind of device, and where the model knows none of the workloads (`only` of these).
    """
    profile = profile or profile_of(capture)
    rows = judged_rows(capture, model, only)
    kernel = str(capture.manifest["kernel"])
    elsewhere = None if profile.own_quantities == model.profile.own_quantities else profile
    work = model.work(rows, elsewhere)
    forecast = model.forecast(work, elsewhere)
    width = forecast.log_half_width
    if elsewhere is not None or kernel != model.kernel:
        width = zero_shot_half_width(model, work, profile, kernel)
    labels, keys = labels_of(capture), rows["workload"].to_list()
    expected = np.log(forecast.ns)
    side = of_capture(capture)
    sides = means_of(side, keys)
    each = [
        _expectation(key, labels[key], sides[key], expected[i], width[i], _reason(model, work, i, width))
        for i, key in enumerate(keys)
    ]
    return [_overall(side, keys, expected, width, sides), *sorted(each, key=lambda one: -one.ratio)]


def expected_ratio(
    model: LatencyModel, rows: pl.DataFrame, baseline: HardwareProfile, candidate: HardwareProfile
) -> Array:
    """How many times longer the model expects each workload to take on one machine than on another, `[row]`.

    Errors of the model on a workload are in both and cancel; what is left follows from the calibrated rates alone.
    """
    slow, fast = (model.forecast(model.work(rows, one), one).ns for one in (candidate, baseline))
    return np.asarray(slow / fast)


def _overall(side: Evidence, keys: Sequence[str], expected: Array, width: Array, sides: dict[str, Mean]) -> Expectation:
    """All workloads that have an interval, together: geometric means; of all of them where none has."""
    inside = ~np.isnan(width)
    if inside.any() and not inside.all():
        sides = means_of(side, [key for key, is_in in zip(keys, inside, strict=True) if is_in])
    kept = inside if inside.any() else ~inside
    reason = None if inside.any() else "no workload lies inside what the model was fitted on"
    log_ns, half = float(expected[kept].mean()), float(width[kept].mean())
    return _expectation(OVERALL, OVERALL, sides[OVERALL], log_ns, half, reason)


def _expectation(
    workload: str, label: str, side: Mean, expected: float, width: float, reason: str | None
) -> Expectation:
    mean, low, high = side.interval
    if math.isnan(width):
        verdict = OUTSIDE_MODEL
    elif low > expected + width:
        verdict = SLOWER_THAN_MODEL
    elif high < expected - width:
        verdict = FASTER_THAN_MODEL
    else:
        verdict = AS_EXPECTED
    is_open = math.isnan(width)
    return Expectation(
        workload=workload,
        label=label,
        measured_ns=math.exp(mean),
        measured_low_ns=math.exp(low),
        measured_high_ns=math.exp(high),
        model_ns=math.exp(expected),
        model_low_ns=None if is_open else math.exp(expected - width),
        model_high_ns=None if is_open else math.exp(expected + width),
        verdict=verdict,
        reason=reason,
    )


def _reason(model: LatencyModel, work: Work, item: int, width: Array) -> str | None:
    """Which range of the fit an item without an interval leaves, null for one that has an interval."""
    if not math.isnan(width[item]):
        return None
    return "; ".join(model.outside(work.take(np.array([item])))) or "outside what the model was fitted on"

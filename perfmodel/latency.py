"""Observations in, `LatencyModel` out: fitting the constants of `physics`, held-out error, intervals, JSON."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.optimize import least_squares
from sklearn.base import BaseEstimator

from perfmodel import physics
from perfmodel.errors import InputError
from perfmodel.hardware import DEVICES, HardwareProfile, Quantity
from perfmodel.physics import Array, Ceilings, Constants, Work
from perfmodel.text import NS_PER_S

MODEL_SCHEMA = 1
FITTED_DIR = Path(__file__).parent / "data" / "fitted"
COVERAGE = 0.90

# How far a fit may move each constant from its default (natural log units, one sigma) and where it must stay. The prior
# weighs as much as PRIOR_ROWS observations, so it decides only what the data leave open.
PRIORS: dict[str, tuple[float, float, float]] = {
    "eff_compute": (0.3, 0.05, 3.0),
    "eff_memory": (0.3, 0.05, 3.0),
    "tile_overhead_rows": (1.0, 1.0, 1000.0),
    "column_overhead": (1.0, 0.0, 1000.0),
    "pack_passes": (1.0, 0.0, 10.0),
    "smooth_p": (0.7, 1.0, 12.0),
    "overlap_frac": (0.5, 0.0, 1.0),
    "call_ns": (1.5, 100.0, 1e7),
    "expert_ns": (1.5, 1.0, 1e6),
    "layer_ns": (1.5, 100.0, 1e8),
    "row_passes": (1.0, 0.05, 200.0),
    "token_passes": (1.0, 0.05, 200.0),
}
PRIOR_ROWS = 2.0
# Constants that may be zero are fitted in these units, all others through their logarithm.
LINEAR = {"overlap_frac": 1.0, "column_overhead": 50.0, "pack_passes": 1.0}


def _require_resident(observations: pl.DataFrame, dtype: str) -> None:
    """Refuse what this version's fit would pool although it differs: offloaded experts, another dtype."""
    found = set(observations["access"].unique()) - {"resident"}
    if found or observations["offload_frac"].max():
        raise InputError(f"observations with offloaded experts ({', '.join(sorted(found))}) cannot be fitted yet")
    if set(observations["dtype"].unique()) != {dtype}:
        raise InputError(f"observations of {', '.join(observations['dtype'].unique())} cannot fit a model of {dtype}")


def work_of(observations: pl.DataFrame) -> Work:
    """The workloads of an OBSERVATIONS table as arrays; a whole layer has two grouped GEMMs, a single call one."""
    dtypes = observations["dtype"].unique().to_list()
    if len(dtypes) != 1:
        raise InputError(f"observations of {len(dtypes)} dtypes ({', '.join(sorted(dtypes))}) cannot share one model")
    lists = observations["tokens_per_expert"].to_list()
    rows = np.zeros((len(lists), max(map(len, lists))))
    for i, counts in enumerate(lists):
        rows[i, : len(counts)] = counts

    def column(name: str) -> Array:
        return observations[name].cast(pl.Float64).fill_null(0.0).to_numpy()

    layer = (observations["op"].cast(pl.String) == "moe_layer").to_numpy().astype(np.float64)
    hidden, inter, up = column("hidden"), column("inter"), column("n_gemms") - 1
    weight, activation = physics.element_bytes(dtypes[0])
    is_layer = layer > 0
    return Work(
        rows=rows,
        k=np.column_stack([np.where(is_layer, hidden, column("gemm_k")), np.where(is_layer, inter, 0.0)]),
        n=np.column_stack([np.where(is_layer, up * inter, column("gemm_n")), np.where(is_layer, hidden, 0.0)]),
        layer=layer,
        n_tokens=column("n_tokens"),
        hidden=hidden,
        inter=inter,
        n_experts=column("n_experts"),
        weight_bytes=weight,
        activation_bytes=activation,
    )


FEATURES = (
    "n_tokens",
    "rows_per_active_expert",
    "active_frac",
    "expert_bytes",
    "compute_over_memory",
    "max_over_mean_load",
)


def features(work: Work, roof: Ceilings) -> dict[str, Array]:
    """What tells one workload from another to the model, `[batch]` each: the axes along which it may extrapolate."""
    active = (work.rows > 0).sum(axis=1)
    routed = work.rows.sum(axis=1)
    weights = (work.k * work.n).sum(axis=1)
    flops, weight_bytes = physics.ideal_work(work)
    values = (
        work.n_tokens,
        routed / active,
        active / work.n_experts,
        weights * work.weight_bytes,
        (flops / roof.flops_per_s) / (weight_bytes / roof.bytes_per_s),
        work.rows.max(axis=1) * work.n_experts / routed,
    )
    return dict(zip(FEATURES, values, strict=True))


class LatencyModel(BaseEstimator):  # type: ignore[misc]
    """Predicts latency in ns of workloads on one machine and kernel from fitted physical constants.

    `fit(observations)` learns `constants_`, `ranges_` (the fitted range of each feature) and `n_observations_`;
    `predict(observations)` returns ns, one a row. `evaluate_by_shape` adds `held_out_`, `errors_` and
    `log_half_width_`, without which there is no interval. Nothing is pooled across kernels, dtypes or machines.
    """

    def __init__(self, profile: HardwareProfile, dtype: str, kernel: str, prior: Constants | None = None) -> None:
        self.profile = profile
        self.dtype = dtype
        self.kernel = kernel
        self.prior = prior

    @property
    def roof(self) -> Ceilings:
        """The ceilings the efficiencies are relative to."""
        return physics.ceilings(self.profile, self.dtype)

    @property
    def form(self) -> physics.KernelForm:
        """What is known of the kernel beforehand."""
        return physics.FORMS[self.profile.device]

    def fit(self, observations: pl.DataFrame, y: Array | None = None) -> Self:
        """Fit the constants to `time_ns` (or `y`): least squares on log(predicted / measured) with soft-L1 loss."""
        _require_resident(observations, self.dtype)
        work = work_of(observations)
        measured = np.log(observations["time_ns"].to_numpy() if y is None else np.asarray(y))
        prior = self.prior or physics.DEFAULTS[self.profile.device]
        self.constants_ = _fit_constants(work, measured, self.roof, prior, self.form)
        self.ranges_ = {k: (float(v.min()), float(v.max())) for k, v in features(work, self.roof).items()}
        self.ops_ = sorted(observations["op"].cast(pl.String).unique())
        self.n_observations_ = len(measured)
        return self

    def predict(self, observations: pl.DataFrame) -> Array:
        """Predicted latency of each row, ns `[row]`."""
        return self.predict_work(work_of(observations))

    def predict_work(self, work: Work) -> Array:
        """Predicted latency of workloads given as arrays, ns `[batch]`."""
        return physics.total(physics.resident_parts(work, self.roof, self.constants_, self.form))

    def outside(self, work: Work) -> list[str]:
        """The features in which any workload lies outside the fitted range, each as a phrase; empty when inside."""
        found = (
            ["no whole layer was among the observations"] if work.layer.any() and "moe_layer" not in self.ops_ else []
        )
        for name, values in features(work, self.roof).items():
            low, high = self.ranges_[name]
            if values.max() > high * (1 + 1e-9) or values.min() < low * (1 - 1e-9):
                worst = values.max() if values.max() > high else values.min()
                found.append(f"{name} {worst:.4g} outside the fitted {low:.4g} to {high:.4g}")
        return found

    def save(self, path: str | Path) -> None:
        """Write the model as JSON, beside and then renamed; `evidence_`, where set, says what it was fitted on."""
        content = {
            "schema": MODEL_SCHEMA,
            "kind": "perfmodel latency model",
            "dtype": self.dtype,
            "kernel": self.kernel,
            "hardware": _profile_json(self.profile),
            "constants": asdict(self.constants_),
            "ops": self.ops_,
            "ranges": {name: list(limits) for name, limits in self.ranges_.items()},
            "n_observations": self.n_observations_,
            "log_half_width": getattr(self, "log_half_width_", None),
            "errors": getattr(self, "errors_", None),
            "held_out": getattr(self, "held_out_", None),
            "evidence": getattr(self, "evidence_", {}),
        }
        beside = Path(path).with_name(Path(path).name + ".part")
        try:
            beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            raise InputError(f"cannot write the model to {str(path)!r}: {error.strerror}") from None


def _fit_constants(
    work: Work, log_measured: Array, roof: Ceilings, prior: Constants, form: physics.KernelForm
) -> Constants:
    names = [n for n in physics.constant_names() if work.layer.any() or n not in _LAYER_ONLY]
    sigma, low, high = (np.array([PRIORS[n][i] for n in names]) for i in range(3))
    start = np.array([getattr(prior, n) for n in names])

    def encode(x: Array) -> Array:
        return np.array([v / LINEAR[n] if n in LINEAR else np.log(v) for n, v in zip(names, x, strict=True)])

    def decode(z: Array) -> Constants:
        values = (v * LINEAR[n] if n in LINEAR else np.exp(v) for n, v in zip(names, z, strict=True))
        return replace(prior, **{n: float(v) for n, v in zip(names, values, strict=True)})

    centre = encode(start)
    prior_weight = np.sqrt(PRIOR_ROWS) * _PRIOR_SCALE / sigma

    pieces = _by_n_experts(work)
    measured = np.concatenate([log_measured[index] for index, _ in pieces])

    def residuals(z: Array) -> Array:
        c = decode(z)
        predicted = [physics.total(physics.resident_parts(piece, roof, c, form)) for _, piece in pieces]
        return np.concatenate([np.log(np.concatenate(predicted)) - measured, (z - centre) * prior_weight])

    lower, upper = encode(low), encode(high)
    start_z = np.clip(centre, lower + 1e-6, upper - 1e-6)
    solved = least_squares(residuals, start_z, bounds=(lower, upper), loss="soft_l1", f_scale=0.1, max_nfev=60)
    return decode(solved.x)


def _by_n_experts(work: Work) -> list[tuple[NDArray[np.intp], Work]]:
    """The workloads in pieces of equally many experts, with their row numbers: no time goes into padding."""
    pieces = []
    for n_experts in np.unique(work.n_experts):
        index = np.flatnonzero(work.n_experts == n_experts)
        columns: dict[str, Any] = {
            name: value[index] for name, value in vars(work).items() if isinstance(value, np.ndarray)
        }
        columns["rows"] = columns["rows"][:, : int(n_experts)]
        pieces.append((index, replace(work, **columns)))
    return pieces


_LAYER_ONLY = ("layer_ns", "row_passes", "token_passes")
_PRIOR_SCALE = 0.1  # a one-sigma move of a constant weighs like a 10 % residual of one observation


def _profile_json(profile: HardwareProfile) -> dict[str, Any]:
    return {**asdict(profile), "quantities": {k: asdict(q) for k, q in profile.quantities.items()}}


def _within_priors(constants: dict[str, float]) -> dict[str, float]:
    """The constants of a model file; raises ValueError or TypeError for one that no fit could have given."""
    for name, value in constants.items():
        low, high = PRIORS[name][1:]
        if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
            raise ValueError(name)
    return constants


def _pair(low: float, high: float) -> tuple[float, float]:
    if not -math.inf < low <= high < math.inf:
        raise ValueError
    return low, high


def shipped_models() -> dict[str, Path]:
    """The models fitted on the shipped captures, by the name of the capture."""
    return {path.stem: path for path in sorted(FITTED_DIR.glob("*.json"))}


def load_model(source: str | Path) -> LatencyModel:
    """Read a model written by `save`, by path or by the name of a shipped one.

    Raises InputError when the file is missing, not a model, or of another schema.
    """
    path = shipped_models().get(str(source), Path(source))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["kind"] != "perfmodel latency model":
            raise KeyError
        if content["schema"] != MODEL_SCHEMA:
            raise InputError(f"model {path.name} has schema {content['schema']}, this version reads {MODEL_SCHEMA}")
        stored = content["hardware"]
        profile = HardwareProfile(
            **{**stored, "quantities": {k: Quantity(**q) for k, q in stored["quantities"].items()}}
        )
        model = LatencyModel(profile, content["dtype"], content["kernel"])
        model.constants_ = Constants(**_within_priors(content["constants"]))
        model.ranges_ = {name: _pair(*content["ranges"][name]) for name in FEATURES}
        model.ops_, model.n_observations_ = content["ops"], content["n_observations"]
        half_width = content["log_half_width"]
        model.log_half_width_ = None if half_width is None else _pair(0.0, half_width)[1]
        model.errors_ = content["errors"]
        if profile.device not in DEVICES:
            raise ValueError
        model.held_out_, model.evidence_ = content["held_out"], content["evidence"]
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(
            f"no model file {str(path)!r}; make one with `perfmodel fit CAPTURE --out MODEL.json`, or name a shipped "
            f"one: {', '.join(shipped_models()) or 'none'}"
        ) from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise InputError(f"{path.name} is not a model written by `perfmodel fit`") from None
    return model


@dataclass(frozen=True)
class Errors:
    """Absolute percentage errors as fractions: median, mean, 90th percentile, largest; over `n` predictions."""

    n: int
    median_ape_frac: float
    mape_frac: float
    p90_ape_frac: float
    worst_ape_frac: float


def errors_of(predicted: Array, measured: Array) -> Errors:
    """How far predictions are from measurements, relative to the measurement."""
    ape = np.abs(predicted / measured - 1)
    return Errors(len(ape), *(float(x) for x in (np.median(ape), ape.mean(), np.quantile(ape, 0.9), ape.max())))


def conformal_quantile(scores: Array, coverage: float) -> float:
    """The score that a new one stays below with at least this probability, were it exchangeable with these."""
    rank = min(int(np.ceil((len(scores) + 1) * coverage)), len(scores))
    return float(np.sort(scores)[rank - 1])


def _baseline_predictions(model: LatencyModel, train: pl.DataFrame, test: pl.DataFrame) -> dict[str, Array]:
    """What the two baselines say of the test rows: the median training time, and the sharp roofline scaled by one
    fitted factor."""
    roof = model.roof

    def roofline(table: pl.DataFrame) -> Array:
        flops, weight_bytes = physics.ideal_work(work_of(table))
        return np.asarray(np.maximum(flops / roof.flops_per_s, weight_bytes / roof.bytes_per_s) * NS_PER_S)

    measured = train["time_ns"].to_numpy()
    factor = np.exp(np.median(np.log(measured / roofline(train))))
    return {"constant": np.full(test.height, np.median(measured)), "roofline_only": factor * roofline(test)}


def evaluate_by_shape(
    model: LatencyModel, observations: pl.DataFrame, progress: Callable[[str], None] = lambda _: None
) -> dict[str, dict[str, Errors]]:
    """Held-out error by shape: each shape predicted by a model fitted on all others, beside the two baselines.

    Returns `{model|constant|roofline_only: {shape or "all": Errors}}` and leaves on the model `held_out_` (a table of
    columns), `errors_` and the conformal 90 % half-width in log units. Raises InputError with fewer than three shapes.
    """
    shapes = observations["shape"].unique(maintain_order=True).to_list()
    if len(shapes) < 3:
        raise InputError(f"held-out error by shape needs at least 3 shapes, found {len(shapes)}: {', '.join(shapes)}")
    held: dict[str, NDArray[np.float64]] = {}
    names = observations["shape"].to_numpy()
    for i, shape in enumerate(shapes, 1):
        progress(f"holding out {shape} ({i} of {len(shapes)})")
        train, test = observations.filter(pl.col("shape") != shape), observations.filter(pl.col("shape") == shape)
        fitted = LatencyModel(model.profile, model.dtype, model.kernel, model.prior).fit(train)
        for who, values in {"model": fitted.predict(test), **_baseline_predictions(model, train, test)}.items():
            held.setdefault(who, np.empty(len(names)))[names == shape] = values
    measured = observations["time_ns"].to_numpy()
    errors = {
        who: {
            "all": errors_of(values, measured),
            **{s: errors_of(values[names == s], measured[names == s]) for s in shapes},
        }
        for who, values in held.items()
    }
    model.log_half_width_ = conformal_quantile(np.abs(np.log(held["model"] / measured)), COVERAGE)
    model.errors_ = {who: {s: asdict(e) for s, e in table.items()} for who, table in errors.items()}
    columns = observations.select("op", "shape", "n_tokens", "routing", "time_ns").rename({"time_ns": "measured_ns"})
    model.held_out_ = columns.with_columns(
        pl.col("op").cast(pl.String),
        pl.col("measured_ns").round(0),
        predicted_ns=pl.Series(held["model"]).round(0),
        roofline_only_ns=pl.Series(held["roofline_only"]).round(0),
    ).to_dict(as_series=False)
    return errors

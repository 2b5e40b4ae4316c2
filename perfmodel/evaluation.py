"""How well a model predicts what it has not seen: splits, errors beside baselines, coverage of intervals."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import spearmanr

from perfmodel.baselines import Baselines
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.latency import ANOMALY_LOG, COVERAGE, LatencyModel, base_half_width, conformal_quantile
from perfmodel.physics import Array
from perfmodel.transfer import zero_shot_half_width

SPLITS = ("shape", "routing", "tokens", "random", "none")
EVEN = ("balanced", "uniform")
TOKEN_RATIO = 16  # the tokens split trains on batches of up to the largest divided by this
N_RANDOM = 5
INNER_FOLDS = 6  # into how many a fold's own training shapes are held out in turn, for residual and intervals
PEER_RATIO = 2.2  # slower than the fastest kernel for the same workload by more is taken for a failed configuration
LEVELS = (0.5, 0.6, 0.7, 0.8, COVERAGE, 0.95)  # for which intervals are tried on shapes that they were not made from
LEAST_SHAPES = 3
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Errors:
    """Absolute percentage errors as fractions: median, mean, 90th percentile, largest; over `n` predictions."""

    n: int
    median_ape_frac: float
    mape_frac: float
    p90_ape_frac: float
    worst_ape_frac: float


def errors_of(predicted_ns: Array, measured_ns: Array) -> Errors:
    """How far predictions are from measurements, relative to the measurement."""
    ape = np.abs(predicted_ns / measured_ns - 1)
    return Errors(len(ape), *(float(x) for x in (np.median(ape), ape.mean(), np.quantile(ape, 0.9), ape.max())))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Held-out predictions of one kernel, one row each of `table`: op, shape, n_tokens, routing, measured_ns,
    predicted_ns, log_half_width (null: no interval was offered), a column per baseline, and is_screened (false where
    other kernels show the measurement to be a failed configuration)."""

    kernel: str
    split: str
    table: pl.DataFrame
    baselines: tuple[str, ...]


def evaluate(
    model: LatencyModel,
    observations: pl.DataFrame,
    split: str,
    progress: Callable[[str], None] = lambda _: None,
    *,
    is_screened: Sequence[bool] | pl.Series | None = None,
    machine: HardwareProfile | None = None,
    kernel: str | None = None,
    with_baselines: bool = True,
) -> Evaluation:
    """Predictions of rows by models that saw nothing of their shape, routing, size or (none) by `model` as it is.

    For all splits but none, models of the kind of `model` (its machine, dtype, kernel, prior) are fitted to parts of
    `observations`, their residual and intervals decided within that part. `machine` is where the observations were
    made when it is not the model's own: then (none) efficiencies are transferred to it. `kernel` is what was measured,
    the model's when null. On another machine or kernel intervals are wider by what its constants may be there. Raises
    InputError where a split is not possible, and for a model of another kind of device or dtype.
    """
    folds = _folds(observations, split)
    predicted, width = np.full(observations.height, np.nan), np.full(observations.height, np.nan)
    simple = Baselines(model, observations) if with_baselines and split != "none" else None
    beside = {name: np.full(observations.height, np.nan) for name in (simple.methods if simple else ())}
    for i, (train, test) in enumerate(folds, 1):
        progress(f"{model.kernel}: {split} {i} of {len(folds)}")
        fitted = model
        if split != "none":
            fitted = LatencyModel(model.profile, model.dtype, model.kernel, model.prior)
            fitted.fit(observations[train], n_folds=INNER_FOLDS)
        elsewhere = None if machine is None or machine.own_quantities == model.profile.own_quantities else machine
        work = fitted.work(observations[test], elsewhere)
        forecast = fitted.forecast(work, elsewhere)
        predicted[test], width[test] = forecast.ns, forecast.log_half_width
        if elsewhere is not None or kernel not in (None, model.kernel):
            width[test] = zero_shot_half_width(fitted, work, elsewhere or model.profile, kernel)
        for name, values in beside.items():
            values[test] = simple.methods[name](train, test) if simple else np.nan
    tested = np.sort(np.concatenate([test for _, test in folds]))
    screened = np.ones(observations.height, dtype=bool) if is_screened is None else np.asarray(is_screened)
    columns = observations.select("op", "shape", "n_tokens", "routing", measured_ns="time_ns")
    table = columns.with_columns(
        pl.col("op").cast(pl.String),
        predicted_ns=pl.Series(predicted),
        log_half_width=pl.Series(width).fill_nan(None),
        is_screened=pl.Series(screened),
        **{f"{name}_ns": pl.Series(values) for name, values in beside.items()},
    )
    return Evaluation(kernel or model.kernel, split, table[tested], tuple(beside))


def _folds(observations: pl.DataFrame, split: str) -> list[tuple[Rows, Rows]]:
    rows = np.arange(observations.height)
    shapes = observations["shape"].to_numpy()
    if split == "none":
        return [(rows[:0], rows)]
    if split == "shape":
        names = observations["shape"].unique(maintain_order=True).to_list()
        if len(names) < 3:
            raise InputError(f"holding out shapes needs at least 3, found {len(names)}: {', '.join(names)}")
        return [(np.flatnonzero(shapes != name), np.flatnonzero(shapes == name)) for name in names]
    if split == "random":
        if len(rows) < N_RANDOM:
            raise InputError(f"holding out at random needs at least {N_RANDOM} measurements, found {len(rows)}")
        parts = np.array_split(np.random.default_rng(0).permutation(rows), N_RANDOM)
        return [(np.setdiff1d(rows, part), np.sort(part)) for part in parts]
    if split == "routing":
        known = observations["routing"].is_in(EVEN).to_numpy()
        what = f"an even routing ({' or '.join(EVEN)}) and another"
    elif split == "tokens":
        n_tokens = observations["n_tokens"].to_numpy()
        known = n_tokens <= n_tokens.max() / TOKEN_RATIO
        what = f"batches that differ more than {TOKEN_RATIO} times in tokens"
    else:
        raise InputError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if not known.any() or known.all():
        raise InputError(f"the {split} split needs {what}, which these measurements do not have")
    return [(np.flatnonzero(known), np.flatnonzero(~known))]


def slower_than_peers(observations: pl.DataFrame) -> pl.Series:
    """Which rows of a table of several kernels are slower than PEER_RATIO times the fastest kernel for the same
    workload on the same machine and dtype: failed tuning, not physics. `[row]`, never null."""
    key = ["machine", "op", "shape", "hidden", "inter", "dtype", "n_tokens", "routing"]
    return observations.select(pl.col("time_ns") > PEER_RATIO * pl.col("time_ns").min().over(key)).to_series()


def summary(table: pl.DataFrame, column: str = "predicted_ns") -> dict[str, Any]:
    """The numbers that count, of a table of `Evaluation`: n, median_ape, mape, p90_ape, worst_ape (fractions),
    spearman_within_tokens (mean over batch sizes of the rank correlation, null where no size has five rows),
    coverage90 and half_width (median, relative) of the intervals offered, n_refused without one."""
    if table.is_empty():
        return {"n": 0}
    errors = errors_of(table[column].to_numpy(), table["measured_ns"].to_numpy())
    found = {
        "n": errors.n,
        "median_ape": errors.median_ape_frac,
        "mape": errors.mape_frac,
        "p90_ape": errors.p90_ape_frac,
        "worst_ape": errors.worst_ape_frac,
        "spearman_within_tokens": _spearman(table, column),
    }
    if column != "predicted_ns":
        return found
    sure = table.filter(pl.col("log_half_width").is_not_null())
    off = (sure["predicted_ns"] / sure["measured_ns"]).log().abs()
    return found | {
        "coverage90": float((off <= sure["log_half_width"]).mean()) if sure.height else None,  # type: ignore[arg-type]
        "half_width": float(np.expm1(np.median(sure["log_half_width"].to_numpy()))) if sure.height else None,
        "n_refused": table.height - sure.height,
    }


def _spearman(table: pl.DataFrame, column: str) -> float | None:
    found = []
    for _, rows in table.group_by("n_tokens", maintain_order=True):
        if rows.height >= 5 and rows["measured_ns"].n_unique() > 1 and rows[column].n_unique() > 1:
            found.append((rows.height, float(spearmanr(rows["measured_ns"], rows[column]).statistic)))
    return float(np.average([r for _, r in found], weights=[n for n, _ in found])) if found else None


def report_of(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """What `perfmodel evaluate --json` prints: per kernel and overall, the model's summary, the same over screened
    rows alone, each baseline's, and the model's by shape."""
    rows = []
    for one in evaluations:
        screened = one.table.filter(pl.col("is_screened"))
        rows.append(
            {"kernel": one.kernel, "split": one.split}
            | summary(one.table)
            | {
                "screened": summary(screened),
                "baselines": {name: summary(one.table, f"{name}_ns") for name in one.baselines},
                "shapes": {name: summary(part) for (name,), part in one.table.group_by("shape", maintain_order=True)},
            }
        )
    shared = [c for c in evaluations[0].table.columns if all(c in one.table.columns for one in evaluations)]
    pooled = pl.concat([one.table.select(shared) for one in evaluations])
    overall = summary(pooled) | {"screened": summary(pooled.filter(pl.col("is_screened")))}
    return {"kernels": rows, "overall": overall}


def held_out_points(model: LatencyModel, observations: pl.DataFrame | None = None) -> pl.DataFrame:
    """The held-out points that a model keeps (op, shape, n_tokens, routing, measured_ns, predicted_ns ...), none where
    nothing could be held out; with the `observations` it was fitted to also `log_half_width`, else null."""
    table = pl.DataFrame(dict(model.points_ or {}))
    width = None
    times_ns = [] if observations is None else observations["time_ns"].round(0).to_list()
    if observations is not None and times_ns == table["measured_ns"].to_list():  # a large table keeps but a sample
        width = base_half_width(model, model.work(observations))
    return table.with_columns(log_half_width=pl.lit(None, pl.Float64) if width is None else pl.Series(width))


def ratios_by_tokens(table: pl.DataFrame) -> pl.DataFrame:
    """How predicted over measured depends on the batch: `n_tokens` rising, `n`, `median_ratio`, `p10_ratio`,
    `p90_ratio`."""
    ratio = pl.col("predicted_ns") / pl.col("measured_ns")
    return (
        table.group_by("n_tokens")
        .agg(
            n=pl.len(),
            median_ratio=ratio.median(),
            **{f"p{100 * q:.0f}_ratio": ratio.quantile(q, "linear") for q in (0.1, 0.9)},
        )
        .sort("n_tokens")
    )


def coverage_by_level(table: pl.DataFrame, levels: Sequence[float] = LEVELS) -> pl.DataFrame:
    """How many points of each shape lie in an interval made from the held-out errors of all other shapes: `shape`,
    `stated_frac`, `n`, `n_covered`; empty with fewer than LEAST_SHAPES shapes.

    Errors are taken over `log_half_width`, so that intervals are wide where the model's are, rows without one left out;
    where all rows lack it one width serves all. A model's own widths were learned from the errors of all shapes; what
    they are multiplied by was not. Anomalies make no interval, but count where they are not covered.
    """
    schema = {"shape": pl.String, "stated_frac": pl.Float64, "n": pl.Int64, "n_covered": pl.Int64}
    if table["log_half_width"].is_not_null().any():
        table = table.drop_nulls("log_half_width")
    error = (table["predicted_ns"] / table["measured_ns"]).log().abs().to_numpy()
    score = error / table["log_half_width"].fill_null(1.0).to_numpy()
    shapes = table["shape"].to_numpy()
    found = []
    for name in table["shape"].unique(maintain_order=True):
        others = score[(shapes != name) & (error < ANOMALY_LOG)]
        for level in levels:
            if len(others):
                own = score[shapes == name]
                found.append((name, level, len(own), int((own <= conformal_quantile(others, level)).sum())))
    is_enough = table["shape"].n_unique() >= LEAST_SHAPES
    return pl.DataFrame(found if is_enough else [], schema, orient="row")


def errors_by_shape(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """`{model or baseline: {shape or "all": errors}}` as plain values, what a model file keeps."""
    columns = {"model": "predicted_ns"} | {name: f"{name}_ns" for name in evaluation.baselines}
    return {
        who: {
            name: asdict(errors_of(part[column].to_numpy(), part["measured_ns"].to_numpy()))
            for name, part in [
                ("all", evaluation.table),
                *((str(key[0]), part) for key, part in evaluation.table.group_by("shape", maintain_order=True)),
            ]
        }
        for who, column in columns.items()
    }

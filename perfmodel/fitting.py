"""From measurements to a fitted model with its held-out errors: what `perfmodel fit` runs."""

from collections.abc import Callable

import numpy as np
import polars as pl

from perfmodel.baselines import Baselines
from perfmodel.errors import InputError
from perfmodel.evaluation import Evaluation, errors_by_shape
from perfmodel.latency import LatencyModel, hull_of
from perfmodel.offload.fit import fit_offload, rows_of_other_ways, without_rates
from perfmodel.sources import Source

MAX_POINTS = 1000  # measured points that a model keeps, to show and to name the nearest
SIGNIFICANT = 6  # digits of where a kept point lies


def fit_source(source: Source, progress: Callable[[str], None] = lambda _: None) -> LatencyModel:
    """A model of one kernel, with `errors_` (held out by shape, beside two baselines), `points_` (measurements with
    their held-out predictions and where they lie) and `evidence_`.

    Raises InputError with fewer than three shapes to hold out.
    """
    shapes = source.observations["shape"].unique(maintain_order=True).to_list()
    if len(shapes) < 3:
        raise InputError(
            f"{source.name}: held-out error by shape needs at least 3 shapes, found {len(shapes)}: {', '.join(shapes)}"
        )
    model = LatencyModel(source.profile, source.dtype, source.kernel)
    model.fit(source.observations, progress=progress)
    held_out = _held_out(model, source)
    model.errors_ = errors_by_shape(held_out)
    model.points_ = _points(model, source, held_out)
    model.evidence_ = model.evidence_ | source.evidence
    if source.offloaded.height:
        progress("fitting what offloaded experts cost")
        missing = without_rates(source.profile, source.offloaded)
        rows = rows_of_other_ways(source.every, missing)
        if (rows["access"] != "resident").any():
            model.offload_ = fit_offload(model, rows, progress=progress).to_json()
        if missing:
            model.evidence_["offload_left_out"] = {str(way): why for way, why in missing.items()}
    return model


def _held_out(model: LatencyModel, source: Source) -> Evaluation:
    """The model's own held-out predictions beside those of a constant and the roofline, held out in the same way."""
    observations = source.observations
    simple = Baselines(model, observations)
    shapes = observations["shape"].to_numpy()
    beside = {name: np.empty(observations.height) for name in ("roofline_only", "constant")}
    for name in np.unique(shapes):
        train, test = np.flatnonzero(shapes != name), np.flatnonzero(shapes == name)
        for who, values in beside.items():
            values[test] = simple.methods[who](train, test)
    table = observations.select("op", "shape", "n_tokens", "routing", measured_ns="time_ns").with_columns(
        pl.col("op").cast(pl.String),
        predicted_ns=pl.Series(model.held_out_),
        is_screened=source.is_screened,
        **{f"{who}_ns": pl.Series(values) for who, values in beside.items()},
    )
    return Evaluation(model.kernel, "shape", table, tuple(beside))


def _points(model: LatencyModel, source: Source, held_out: Evaluation) -> dict[str, list[object]]:
    """At most MAX_POINTS measurements with their held-out predictions and their place along the axes of the hull."""
    table = held_out.table.select(
        "op", "shape", "n_tokens", "routing", "measured_ns", "predicted_ns", "roofline_only_ns"
    )
    table = table.with_columns(pl.col("^.*_ns$").round(0))
    hull = hull_of(model, source.observations)
    table = table.with_columns(**{f"at_{k}": pl.Series(v).round_sig_figs(SIGNIFICANT) for k, v in hull.items()})
    if table.height > MAX_POINTS:
        chosen = np.random.default_rng(0).choice(table.height, MAX_POINTS, replace=False)
        table = table[np.sort(chosen)]
    return table.to_dict(as_series=False)

"""What a capture says in three sentences: whether its model can be believed, what binds, what skewed routing costs."""

import math
from typing import TYPE_CHECKING

import polars as pl

from perfmodel import text

if TYPE_CHECKING:
    from perfmodel.capture import Capture
    from perfmodel.latency import LatencyModel

EVEN = "uniform"
SAME = ("op", "shape", "n_tokens", "gemm_k", "gemm_n")  # what workloads share that differ in routing alone


def capture_headlines(capture: "Capture", model: "LatencyModel") -> list[str]:
    """Three facts of a capture in words, or two where its routing does not vary: error, roofs, skew."""
    from perfmodel.capture import fitted_rows, per_workload

    measured, _ = fitted_rows(per_workload(capture.observations), model.dtype)
    return [_error(model), _roofs(measured, model), *_skew(measured)]


def _error(model: "LatencyModel") -> str:
    errors, roof, constant = (model.errors_[who]["all"] for who in ("model", "roofline_only", "constant"))
    return (
        f"Of shapes it has never seen the model errs {text.frac(errors['median_ape_frac'])} in the median and "
        f"{text.frac(errors['p90_ape_frac'])} at the 90th percentile; the roofline alone errs "
        f"{text.frac(roof['median_ape_frac'])}, one constant rate {text.frac(constant['median_ape_frac'])}."
    )


def _roofs(measured: pl.DataFrame, model: "LatencyModel") -> str:
    from perfmodel.roofline import points

    by_bound = points(measured, model.profile).group_by("bound").agg(pl.len(), pl.col("roof_frac").median())
    found = {bound: (n, frac) for bound, n, frac in by_bound.iter_rows()}
    parts = [
        f"{text.count(found[bound][0])} stand under the {bound} roof ({text.frac(found[bound][1])} of it reached)"
        for bound in ("memory", "compute")
        if bound in found
    ]
    return f"Of {text.counted(measured.height, 'workload')} {' and '.join(parts)}, in the median."


def _skew(measured: pl.DataFrame) -> list[str]:
    """What the routing that was measured most beside even routing costs, over pairs that differ in routing alone."""
    even = measured.filter(pl.col("routing") == EVEN).select(*SAME, even_ns="time_ns")
    pairs = measured.filter(pl.col("routing") != EVEN).join(even, on=SAME, nulls_equal=True)
    if pairs.is_empty():
        return []
    ratio = (pl.col("time_ns") / pl.col("even_ns")).log()
    by_routing = pairs.group_by("routing").agg(pl.len(), ratio.median().alias("log"), ratio.max().alias("most"))
    routing, n, log, most = by_routing.sort("len", "routing", descending=[True, False]).row(0)
    more = math.expm1(log)
    return [
        f"{routing} routing takes {text.frac(abs(more))} {'more' if more > 0 else 'less'} time than even routing in "
        f"the median of {text.counted(n, 'pair')} that differ in nothing else, and at most {math.exp(most):.2f} times "
        "as long."
    ]

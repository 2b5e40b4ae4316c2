"""What the steps of an expert-parallel capture add up to: latency, phases, hidden communication, who waits for whom."""

import numpy as np
import polars as pl

from perfmodel.ep_capture import COMMUNICATION, EpCapture
from perfmodel.intervals import busy_ns, merged, overlap_ns
from perfmodel.physics import Array

RANK_STEP = ("workload", "step", "rank")
COMPUTE = "compute"  # all phases of a rank that are no communication, together
_BY = ("number", "step", "rank")
_IS_MOVING = pl.col("phase").is_in(list(COMMUNICATION))


def step_latencies(capture: EpCapture) -> pl.DataFrame:
    """How long each step takes, from the first rank's start to the last rank's end: `workload`, `step`, `latency_ns`,
    sorted by both."""
    latency = pl.col("end_ns").max() - pl.col("start_ns").min()
    return capture.ends.group_by("workload", "step").agg(latency_ns=latency).sort("workload", "step")


def latencies(capture: EpCapture) -> pl.DataFrame:
    """How long a step of each workload takes: `n_steps`, the median `latency_ns`, and `p10_ns` and `p90_ns`."""
    latency = pl.col("latency_ns")
    return (
        step_latencies(capture)
        .group_by("workload", maintain_order=True)
        .agg(
            n_steps=pl.len(),
            latency_ns=latency.median(),
            p10_ns=latency.quantile(0.1, "linear"),
            p90_ns=latency.quantile(0.9, "linear"),
        )
    )


def phase_times(capture: EpCapture) -> pl.DataFrame:
    """For how long each rank is in each phase: `workload`, `phase`, `rank`, `time_ns`, the median over steps.

    Chunks of a step count together and where they overlap once; steps without the phase count as none.
    """
    steps = _numbered(capture).with_columns(code=pl.col("phase").to_physical().cast(pl.Int64))
    found = busy_ns(steps, (*_BY, "code"))
    codes = steps.select("workload", "number", "phase", "code").unique()
    each = capture.ends.select(RANK_STEP).join(codes, on="workload").join(found, on=(*_BY, "code"), how="left")
    return (
        each.group_by("workload", "phase", "rank")
        .agg(time_ns=pl.col("busy_ns").fill_null(0).median())
        .sort("workload", "phase", "rank")
    )


def overlaps(capture: EpCapture) -> pl.DataFrame:
    """What each rank does in each step: one row for each, RANK_STEP with `span_ns` (its start to its end),
    `compute_ns`, `communication_ns` (in a collective, others may not be there yet), of that `hidden_ns` under its own
    compute and `exposed_ns` not, and `idle_ns` in no phase.

    Hidden + exposed = communication; compute + exposed + idle = span.
    """
    steps = _numbered(capture)
    moving, computing = steps.filter(_IS_MOVING), steps.filter(~_IS_MOVING)
    union = merged(moving, _BY)
    hidden = (
        union.with_columns(hidden_ns=overlap_ns(union, computing, _BY))
        .group_by(_BY)
        .agg(communication_ns=pl.col("dur_ns").sum(), hidden_ns=pl.col("hidden_ns").sum())
    )
    compute = busy_ns(computing, _BY).select(*_BY, compute_ns="busy_ns")
    table = capture.ends.join(_numbers(capture), on="workload").with_columns(
        span_ns=pl.col("end_ns") - pl.col("start_ns")
    )
    for part in (compute, hidden):
        table = table.join(part, on=_BY, how="left", maintain_order="left")
    exposed = pl.col("communication_ns") - pl.col("hidden_ns")
    return (
        table.with_columns(pl.col("compute_ns", "communication_ns", "hidden_ns").fill_null(0))
        .with_columns(exposed_ns=exposed)
        .with_columns(idle_ns=pl.col("span_ns") - pl.col("compute_ns") - pl.col("exposed_ns"))
        .select(*RANK_STEP, "span_ns", "compute_ns", "communication_ns", "hidden_ns", "exposed_ns", "idle_ns")
    )


def ranks_computing(capture: EpCapture) -> pl.DataFrame:
    """How many ranks compute at the same time, on the mean over the time in which any does: `workload`, `n_computing`.

    Ranks that were interrupted within a phase are counted as computing, so that this is the most it can have been.
    """
    computing = _numbered(capture).filter(~_IS_MOVING)
    by = ("number", "step")
    any_ns, each_ns = (busy_ns(computing, keys).group_by("number").agg(pl.col("busy_ns").sum()) for keys in (by, _BY))
    found = each_ns.join(any_ns, on="number", suffix="_any").join(_numbers(capture), on="number")
    return found.select("workload", n_computing=pl.col("busy_ns") / pl.col("busy_ns_any")).sort("workload")


def collectives(capture: EpCapture) -> pl.DataFrame:
    """When ranks come to each collective: one row for each `workload`, `step`, `phase`, `chunk`, with `last_rank`, by
    how much it comes after the first (`skew_ns`), how long the collective takes once all are there and the one before
    it is done (`transfer_ns`), and the longest and shortest time that a rank is in it (`slowest_ns`, `fastest_ns`).

    Ranks closer together than the error of their clocks come at the same time as far as can be told.
    """
    start, dur = pl.col("start_ns"), pl.col("dur_ns")
    before = pl.col("end_ns").cum_max().shift(1).over("workload", "step")
    return (
        capture.steps.filter(_IS_MOVING)
        .group_by("workload", "step", "phase", "chunk")
        .agg(
            last_rank=pl.col("rank").sort_by("start_ns", "rank").last(),
            skew_ns=start.max() - start.min(),
            here_ns=start.max(),
            end_ns=(start + dur).max(),
            slowest_ns=dur.max(),
            fastest_ns=dur.min(),
        )
        .sort("workload", "step", "here_ns", "phase", "chunk")
        .with_columns(transfer_ns=(pl.col("end_ns") - pl.max_horizontal("here_ns", before)).clip(0))
        .drop("here_ns", "end_ns")
    )


def waits(capture: EpCapture) -> pl.DataFrame:
    """Who waits for whom: for each `workload`, `phase` of communication and `rank` the share of collectives to which
    the rank comes last (`last_frac`), and how long it waits there for the last one in a step (`wait_ns`, median).

    Nobody is last where the first and the last come no further apart than clocks tell.
    """
    by = ["workload", "step", "phase", "chunk"]
    late = collectives(capture).filter(pl.col("skew_ns") > capture.clock_error_ns).select(*by, "last_rank")
    moving = capture.steps.filter(_IS_MOVING).join(late, on=by, how="left")
    wait = pl.col("start_ns").max().over(by) - pl.col("start_ns")
    is_last = (pl.col("rank") == pl.col("last_rank")).fill_null(value=False)
    each = moving.with_columns(wait_ns=wait, is_last=is_last)
    in_step = each.group_by("workload", "phase", "rank", "step").agg(
        pl.col("wait_ns").sum(), pl.col("is_last").sum(), n=pl.len()
    )
    return (
        in_step.group_by("workload", "phase", "rank")
        .agg(last_frac=pl.col("is_last").sum() / pl.col("n").sum(), wait_ns=pl.col("wait_ns").median())
        .sort("workload", "phase", "rank")
    )


def straggler_ratios(slowest_ns: Array, fastest_ns: Array) -> tuple[float, float] | None:
    """By how much the slowest member outlasts the fastest: median and 95th percentile of t / t_a (arXiv 2506.04667
    Table 2) over occurrences; null where there is none. One whose fastest took no time has no ratio."""
    ratios = slowest_ns[fastest_ns > 0] / fastest_ns[fastest_ns > 0]
    if not ratios.size:
        return None
    median, high = np.quantile(ratios, (0.5, 0.95))
    return float(median), float(high)


def stragglers(capture: EpCapture) -> pl.DataFrame:
    """How unequal ranks are: for each `workload` and `phase` (of communication, or `compute`: all else together) the
    slowest time over the fastest, `median_ratio` and `p95_ratio` over steps and chunks; null where one never took time.

    In a collective the rank that comes first is the slowest, for it waits for all others.
    """
    done = collectives(capture).select("workload", pl.col("phase").cast(pl.String), "slowest_ns", "fastest_ns")
    compute = pl.col("compute_ns")
    computing = overlaps(capture).group_by("workload", "step").agg(slowest_ns=compute.max(), fastest_ns=compute.min())
    both = pl.concat([done, computing.select("workload", pl.lit(COMPUTE).alias("phase"), "slowest_ns", "fastest_ns")])
    rows = []
    for (workload, phase), group in both.group_by("workload", "phase", maintain_order=True):
        found = straggler_ratios(*group.select("slowest_ns", "fastest_ns").to_numpy().astype(np.float64).T)
        rows.append((workload, phase, *(found or (None, None))))
    schema = {"workload": pl.String, "phase": pl.String, "median_ratio": pl.Float64, "p95_ratio": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row").sort("workload", "phase")


def against_bulk(capture: EpCapture) -> dict[str, float]:
    """How many times shorter a step of each chunked workload is than that of the same work in bulk, by workload."""
    took = dict(latencies(capture).select("workload", "latency_ns").iter_rows())
    bulk = {one.twin: took[one.workload] for one in capture.measured if one.schedule == "bulk"}
    return {
        one.workload: bulk[one.twin] / took[one.workload]
        for one in capture.measured
        if one.schedule != "bulk" and one.twin in bulk
    }


def _numbers(capture: EpCapture) -> pl.DataFrame:
    """A whole number for each workload: what intervals are kept apart by."""
    ids = [one.workload for one in capture.workloads]
    return pl.DataFrame({"workload": ids, "number": range(len(ids))}, {"workload": pl.String, "number": pl.Int64})


def _numbered(capture: EpCapture) -> pl.DataFrame:
    return capture.steps.join(_numbers(capture), on="workload")

"""Which operator launched each kernel: by nesting in time on the launching thread."""

import polars as pl

from perfmodel.intervals import THREAD, holders, parents
from perfmodel.launch import call_starts, joined_work
from perfmodel.trace import COPY_KINDS

FOUND_BY = pl.Enum(("nesting", "external id"))
# The rows of `by_operator` that are no operators, so that no device work is dropped.
PARTS = pl.Enum(("operator", "graph", "no operator", "orphan"))
PART_NAMES = {"graph": "(graph kernels)", "no operator": "(no operator)", "orphan": "(orphans)"}


def attributed(events: pl.DataFrame, work: pl.DataFrame | None = None) -> pl.DataFrame:
    """Which operator launched each piece of device work: `joined_work` (or the part of it given) with its operator.

    Adds `operator` (the innermost operator of the launching thread in which the launch call began, SKIP, arXiv
    2504.11750, section IV-A), `operator_row` (its row in EVENTS), `outermost_operator` and `found_by`: `nesting`, or
    `external id` where no operator encloses the call and the id that the profiler left belongs to exactly one operator
    of the rank, which began no later; all null where neither tells. Graph kernels have the operator that replayed the
    graph; `is_graph` tells them, as it tells orphans (null).
    """
    work = joined_work(events) if work is None else work
    ops = events.select("kind", "name", *THREAD, "start_ns", "dur_ns", "external", row=pl.int_range(pl.len()))
    ops = ops.filter(pl.col("kind") == "op")
    launched = call_starts(work)
    is_launched = launched["at_ns"].is_not_null()
    around = holders(ops, launched.filter(is_launched))
    place = is_launched.cum_sum().cast(pl.Int64) - 1  # of a launched row among the launched ones
    place = pl.select(pl.when(is_launched).then(place)).to_series()
    inner, outer = (around[column].gather(place) for column in ("innermost", "outermost"))
    by_id = _by_external_id(ops, work, inner.is_null())
    found_by = (
        pl.when(inner.is_not_null()).then(pl.lit("nesting", FOUND_BY))
        .when(by_id.is_not_null()).then(pl.lit("external id", FOUND_BY))
    )  # fmt: skip
    op = pl.select(pl.coalesce(inner, by_id)).to_series()
    return work.with_columns(
        operator=ops["name"].gather(op),
        operator_row=ops["row"].gather(op),
        outermost_operator=ops["name"].gather(outer),
        found_by=found_by,
    )


def _by_external_id(ops: pl.DataFrame, work: pl.DataFrame, is_wanted: pl.Series) -> pl.Series:
    """The operator (row of `ops`) whose id each wanted row of device work carries; null where none or several do.

    Profilers before torch 2.6 wrote the correlation id in the place of the operator's: then all ids of a rank lie
    equally far from its links, and say nothing.
    """
    offset = pl.col("link") - pl.col("external")
    repeating = (
        work.select("rank", "link", "external")
        .drop_nulls(["link", "external"])
        .group_by("rank")
        .agg(is_one=offset.n_unique() == 1, is_zero=(offset == 0).all(), n_ids=pl.col("external").n_unique())
        .filter(pl.col("is_one") & (pl.col("is_zero") | (pl.col("n_ids") > 1)))
    )
    wanted = (
        work.select("rank", "external", "start_ns", at=pl.int_range(pl.len()))
        .filter(is_wanted & pl.col("external").is_not_null())
        .join(repeating, on="rank", how="anti", nulls_equal=True)
    )
    owners = (
        ops.select("rank", "external", op_start_ns="start_ns", op=pl.int_range(pl.len()))
        .join(wanted, on=["rank", "external"], how="semi", nulls_equal=True)
        .filter(pl.len().over("rank", "external") == 1)
    )
    found = wanted.join(owners, on=["rank", "external"], nulls_equal=True).filter(
        pl.col("op_start_ns") <= pl.col("start_ns")
    )
    return pl.repeat(None, work.height, dtype=pl.Int64, eager=True).scatter(found["at"], found["op"])


def by_operator(events: pl.DataFrame, work: pl.DataFrame | None = None) -> pl.DataFrame:
    """Which operators cost most on the device: one row for each name, and one each for what belongs to no operator.

    Columns `name`, `part` (`operator`; or `graph`, `no operator`, `orphan` for the rows of kernels replayed by graphs,
    launched outside operators, and launched before the window), `n_calls`, `self_ns` (host time outside inner
    operators), `n_kernels`, `kernel_time_ns`, `tklqt_ns` (null where no launch is known), `n_copies` and `copy_time_ns`
    (copies and sets). Device work counts once, for its innermost operator: every column sums to the trace's total.
    `work` may be given as `attributed` made it. Longest kernel time first, then longest self time.
    """
    work = attributed(events) if work is None else work
    is_kernel, is_copy = pl.col("kind") == "kernel", pl.col("kind").is_in(COPY_KINDS)
    delay = pl.col("delay_ns").filter(is_kernel)
    part = (
        pl.when(pl.col("is_graph")).then(pl.lit("graph", PARTS))
        .when(pl.col("operator").is_not_null()).then(pl.lit("operator", PARTS))
        .when(pl.col("delay_ns").is_not_null()).then(pl.lit("no operator", PARTS))
        .otherwise(pl.lit("orphan", PARTS))
    )  # fmt: skip
    device = (
        work.select("kind", "dur_ns", "delay_ns", "operator", part=part)
        .group_by("part", pl.when(pl.col("part") == "operator").then("operator").alias("name"))
        .agg(
            n_kernels=is_kernel.sum().cast(pl.Int64),
            kernel_time_ns=pl.col("dur_ns").filter(is_kernel).sum(),
            tklqt_ns=pl.when(delay.count() > 0).then(delay.sum()),
            n_copies=is_copy.sum().cast(pl.Int64),
            copy_time_ns=pl.col("dur_ns").filter(is_copy).sum(),
        )
    )
    names = pl.col("name").cast(pl.String).fill_null(pl.col("part").cast(pl.String).replace(PART_NAMES))
    return (
        _host_time(events)
        .with_columns(part=pl.lit("operator", PARTS))
        .join(device, on=["part", "name"], how="full", nulls_equal=True, coalesce=True)
        .with_columns(pl.col("n_kernels", "kernel_time_ns", "n_copies", "copy_time_ns").fill_null(0))
        .select(names, "part", "n_calls", "self_ns", *device.columns[2:])
        .sort(["kernel_time_ns", "self_ns", "name"], descending=[True, True, False], nulls_last=True)
    )


def _host_time(events: pl.DataFrame) -> pl.DataFrame:
    """Calls of each operator and the host time spent in them but not in operators they called."""
    ops = events.select("kind", "name", *THREAD, "start_ns", "dur_ns").filter(pl.col("kind") == "op")
    called = ops.select(row=parents(ops), dur_ns="dur_ns").drop_nulls().group_by("row").agg(inner_ns=pl.sum("dur_ns"))
    inner = pl.repeat(0, ops.height, dtype=pl.Int64, eager=True).scatter(called["row"], called["inner_ns"])
    return (
        ops.select("name", self_ns=(pl.col("dur_ns") - inner).clip(lower_bound=0))
        .group_by("name")
        .agg(n_calls=pl.len().cast(pl.Int64), self_ns=pl.sum("self_ns"))
    )

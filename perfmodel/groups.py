"""What are the launch metrics of each rank, device, stream, process, thread, named range or step of a trace."""

from collections.abc import Callable, Sequence

import polars as pl

from perfmodel.errors import InputError
from perfmodel.intervals import DEVICE, PROCESS, STREAM, THREAD, earliest_held, held, holders, numbered, parents
from perfmodel.launch import call_starts, figures, joined_work
from perfmodel.trace import BACKEND_PREFIX, MODULE_PREFIX, plain_name

KEYS = {"rank": ("rank",), "device": DEVICE, "stream": STREAM, "process": PROCESS, "thread": THREAD}
GROUPINGS = (*KEYS, "range", "step")

LEAST_STEP_FRAC = 0.5  # of the time of all outermost ranges
STEP_PREFIX = "ProfilerStep#"  # how torch.profiler names the steps of its schedule


def launch_metrics_by(events: pl.DataFrame, by: str, work: pl.DataFrame | None = None) -> pl.DataFrame:
    """What are the launch metrics of each group of a trace: one row a group, its key columns, then `launch.FIGURES`.

    `by` is one of GROUPINGS; keys: `rank`; `device` and `stream` with their ranks and devices; `process` and `thread`,
    those of the launch call; for `range` the columns `rank`, `name` and `n_calls`; for `step` those of `steps`. The row
    whose last key is null holds the work of unknown place, orphans mostly: nothing is dropped. Figures mean what they
    mean for a trace (`launch.figures`), but: a device or stream counts the launch calls whose work it ran, and has no
    inference latency, operators being on the host. Work belongs to a range if its launch call began in it, to all
    nested ones, and once to a name; spans, busy times and latencies of a range are sums over its calls. A step also has
    what other threads of its process launched in its time, unless they have a step of their own then. `work` is
    `joined_work` of the events, if it is known already. Raises InputError on another `by`.
    """
    if by not in GROUPINGS:
        raise InputError(f"launch metrics cannot be grouped by {by!r}; expected one of {', '.join(GROUPINGS)}")
    work = joined_work(events) if work is None else work
    if by == "range":
        return _by_range(events, work)
    if by == "step":
        return _by_step(events, work)
    return _by_place(events, work, KEYS[by])


def steps(events: pl.DataFrame) -> pl.DataFrame:
    """Which are the steps of a trace: columns `rank`, `process`, `thread`, `name`, `start_ns`, `dur_ns`, in time order.

    All ranges named ProfilerStep#N, the last one too; without any, the range that lies in no other range, occurs more
    than once and takes most time in all, if that is at least half of the time of all such outermost ranges: what takes
    less is no step of the work, nor are modules and collectives steps. Names without what follows `|`.
    """
    ranges = _ranges(events)
    found = ranges.filter(pl.col("name").str.starts_with(STEP_PREFIX))
    if found.is_empty():
        # A layer is no step, nor is a collective, in which a rank that waits may spend most of its time.
        ranges = ranges.filter(
            ~pl.col("name").str.starts_with(MODULE_PREFIX) & ~pl.col("name").str.contains(BACKEND_PREFIX)
        )
        top = ranges.filter(parents(ranges).is_null())
        by_name = (
            top.group_by("name").agg(n=pl.len(), time_ns=pl.sum("dur_ns")).sort("time_ns", "name", descending=True)
        )
        is_step = (pl.col("n") > 1) & (pl.col("time_ns") >= pl.sum("time_ns") * LEAST_STEP_FRAC)
        found = top.join(by_name.filter(is_step).head(1), on="name", how="semi")
    return found.select(*THREAD, "name", "start_ns", "dur_ns").sort("rank", "process", "start_ns")


def step_at(events: pl.DataFrame, points: pl.DataFrame) -> pl.Series:
    """In which step of its process was each moment: the N of ProfilerStep#N, else the steps of a rank counted from 0.

    `points` has `rank`, `process` and `at_ns`, null for what has no place in time; null too outside of all steps.
    """
    found = steps(events)
    counted = pl.int_range(pl.len()).over("rank").cast(pl.Int64)
    said = pl.col("name").str.extract(rf"^{STEP_PREFIX}(\d+)").cast(pl.Int64, strict=False)
    number = found.select(pl.coalesce(said, counted)).to_series()
    is_known = points["at_ns"].is_not_null()
    inside = holders(found, points.filter(is_known), PROCESS)["innermost"]
    at = pl.repeat(None, points.height, dtype=pl.Int64, eager=True).scatter(is_known.arg_true(), inside)
    return number.gather(at).alias("step")


def profiler_steps(events: pl.DataFrame) -> pl.Series:
    """Which steps did the profiler mark (`ProfilerStep#N`): their names, each once, whatever thread or rank has it."""
    names = events.filter(pl.col("kind") == "range")["name"].unique()
    return names.filter(names.cast(pl.String).str.starts_with(STEP_PREFIX))


def _ranges(events: pl.DataFrame) -> pl.DataFrame:
    """The ranges of EVENTS under their plain names, outer ones before those within."""
    ranges = events.select("kind", "name", *THREAD, "start_ns", "dur_ns").filter(pl.col("kind") == "range")
    return ranges.with_columns(plain_name()).sort("start_ns", "dur_ns", descending=[False, True])


def _by_place(events: pl.DataFrame, work: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """The table of ranks, devices, streams, processes or threads, which all are columns of the work or its launch."""
    work = work.with_columns(process=pl.coalesce("launch_process", "process"), thread="launch_thread")
    if "device" in keys:
        launched = work.filter(pl.col("launch_row").is_not_null()).unique([*keys, "launch_row"])
        calls = launched.select(*keys, dur_ns="launch_dur_ns")
        first_ops = work.clear().select(*keys, first_op_ns="start_ns")
    else:
        calls = _of_kind(events, "launch").select(*keys, "dur_ns")
        first_ops = _of_kind(events, "op").group_by(keys).agg(first_op_ns=pl.min("at_ns"))
    ids, groups = numbered([work, calls, first_ops], keys)
    work, calls, first_ops = (
        table.with_columns(group=pl.Series(group, dtype=pl.Int64), part=pl.lit(0, pl.Int64))
        for table, group in zip((work, calls, first_ops), ids, strict=True)
    )
    return (
        groups.with_columns(group=pl.int_range(pl.len()))
        .join(figures(work, calls, first_ops), on="group")
        .drop("group")
    )


def _by_range(events: pl.DataFrame, work: pl.DataFrame) -> pl.DataFrame:
    """The table of range names; a part is one call of a range."""
    ranges = _ranges(events)
    names = ranges.group_by("rank", "name").agg(n_calls=pl.len().cast(pl.Int64)).sort("rank", "name")
    groups = _with_nowhere(names, events)
    group = groups.select("rank", "name", "group")
    ranges = ranges.join(group, on=["rank", "name"], how="left", nulls_equal=True, maintain_order="left")

    def place(points: pl.DataFrame) -> pl.DataFrame:
        known = points.filter(pl.col("at_ns").is_not_null())
        pairs = held(ranges, known)
        of_call = pairs.select(
            point=known["point"].gather(pairs["point"]),
            group=ranges["group"].gather(pairs["interval"]),
            part="interval",
        )
        return of_call.group_by("point", "group").agg(pl.min("part"))  # the outermost of several of the same name

    first = _of_kind(events, "op")["at_ns"].gather(earliest_held(ranges, _of_kind(events, "op")))
    first_ops = ranges.select("group", part=pl.int_range(pl.len()), first_op_ns=first).drop_nulls()
    return _placed(events, work, groups, place, first_ops)


def _by_step(events: pl.DataFrame, work: pl.DataFrame) -> pl.DataFrame:
    """The table of steps."""
    found = steps(events)
    groups = _with_nowhere(found, events)

    def place(points: pl.DataFrame) -> pl.DataFrame:
        known = points.filter(pl.col("at_ns").is_not_null())
        own, other = (holders(found, known, by)["innermost"] for by in (THREAD, PROCESS))
        return known.select("point", group=pl.coalesce(own, other), part=0).drop_nulls()

    first = _of_kind(events, "op")["at_ns"].gather(earliest_held(found, _of_kind(events, "op"), PROCESS))
    first_ops = pl.DataFrame({"group": pl.int_range(found.height, eager=True), "first_op_ns": first})
    return _placed(events, work, groups, place, first_ops.with_columns(part=pl.lit(0, pl.Int64)).drop_nulls())


def _of_kind(events: pl.DataFrame, kind: str) -> pl.DataFrame:
    """Host events of one kind: their threads, starts and durations."""
    columns = events.select("kind", *THREAD, "dur_ns", at_ns="start_ns")
    return columns.filter(pl.col("kind") == kind).drop("kind")


def _with_nowhere(groups: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """Groups with their number, and one more for each rank, whose other columns are null: what is in no group."""
    ranks = events.select("rank").unique().sort("rank")
    return pl.concat([groups, ranks], how="diagonal").with_columns(group=pl.int_range(pl.len()))


def _placed(
    events: pl.DataFrame,
    work: pl.DataFrame,
    groups: pl.DataFrame,
    place: Callable[[pl.DataFrame], pl.DataFrame],
    first_ops: pl.DataFrame,
) -> pl.DataFrame:
    """The table of groups that `place` finds (`point`, `group`, `part`) for moments: the starts of launch calls."""
    nowhere = groups.group_by("rank").agg(pl.last("group"))
    calls = _of_kind(events, "launch")

    def in_groups(table: pl.DataFrame, starts: pl.DataFrame) -> pl.DataFrame:
        points = starts.select(*THREAD, "at_ns", point=pl.int_range(pl.len()))
        inside = place(points).select(pl.col("point", "group", "part").cast(pl.Int64))
        outside = points.join(inside, on="point", how="anti").join(nowhere, on="rank", nulls_equal=True)
        pairs = pl.concat([inside, outside.select("point", "group", part=pl.lit(-1, pl.Int64))])
        return table[pairs["point"]].with_columns(pairs["group"], pairs["part"])

    table = figures(in_groups(work, call_starts(work)), in_groups(calls, calls), first_ops)
    return groups.join(table, on="group", maintain_order="left").drop("group")

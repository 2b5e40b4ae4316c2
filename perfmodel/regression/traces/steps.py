"""When did each step of a trace run, on the clock on the wall, and which events belong to it."""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.groups import LEAST_STEP_FRAC, steps
from perfmodel.intervals import PROCESS, THREAD, busy_ns, holders
from perfmodel.launch import call_starts, joined_work
from perfmodel.passes import find_passes
from perfmodel.trace import API_KINDS, DEVICE_KINDS

STEP, PASS, WINDOW = "step", "MoE layer pass", "whole trace"  # what a trace is judged by, best first


@dataclass(frozen=True)
class Steps:
    """The steps of the slowest thread that has any, of one trace.

    `how` is STEP, PASS or WINDOW, `n_threads` how many threads had steps, `rank` that of the judged one (null: not
    said). `windows` has a row a step: `start_ns`, `dur_ns`. `events` are those of the judged process alone, `at` the
    row of `windows` that each belongs to, null for none; device work belongs where its launch call began.
    """

    how: str
    rank: int | None
    n_threads: int
    windows: pl.DataFrame
    events: pl.DataFrame
    at: pl.Series

    @property
    def dur_ns(self) -> NDArray[np.float64]:
        """How long each step took, `[step]`."""
        return self.windows["dur_ns"].to_numpy().astype(np.float64)

    @property
    def middle(self) -> NDArray[np.int64]:
        """The third of the steps around the median, by their time: what is told of a typical step is told of these."""
        order = np.argsort(self.dur_ns, kind="stable")
        return np.sort(order[len(order) // 3 : len(order) - len(order) // 3])

    def of(self, rows: NDArray[np.int64]) -> pl.DataFrame:
        """The events of these steps; device work without a known call is where its own start lies."""
        chosen = pl.Series(rows)
        is_in = self.at.is_in(chosen.implode()).fill_null(value=False)
        is_orphan = self.events["kind"].is_in(DEVICE_KINDS) & self.at.is_null()
        if is_orphan.any():
            line = pl.lit(0, pl.Int64).alias("line")
            points = self.events.filter(is_orphan).select(line, at_ns="start_ns")
            inside = holders(self.windows[rows].with_columns(line), points, ("line",))["innermost"].is_not_null()
            is_in = is_in.scatter(is_orphan.arg_true(), inside)
        return self.events.filter(is_in)


def judged_steps(events: pl.DataFrame) -> Steps:
    """Which are the steps of a trace, and when did each run: `groups.steps`, else MoE layer passes, else all as one.

    A step begins on the host and is done when its range has ended and all device work that was launched in it has; its
    time counts from its own start, or from when the step before was done where that is later. So a host that runs ahead
    of its device, whose ranges end early, is judged by the device, one that waits by its ranges, and windows never
    overlap. What was launched before the recording belongs to the step before the first. Time between ranges is in no
    step. Passes count where they take at least half of the time, as steps must.
    Where nothing marks a step the one window is from the first to the last device work, without any from the first to
    the last event. Of several threads with steps (ranks, processes) the one with the longest median step is judged.
    Raises InputError for a trace that took no time.
    """
    how, spans = _spans(events)
    if how == WINDOW:
        return _whole(events)
    points = _moments(events)
    at = _placed(spans, points)
    windows = _windows(spans, at, events)
    if windows.is_empty():
        return _whole(events)
    threads = windows.group_by(THREAD, maintain_order=True).agg(pl.median("dur_ns")).sort("dur_ns", descending=True)
    judged = pl.all_horizontal(pl.col(name).eq_missing(threads[name][0]) for name in THREAD)
    of_process = pl.all_horizontal(pl.col(name).eq_missing(threads[name][0]) for name in PROCESS)
    is_mine = points.select(of_process | (pl.col("is_device") & pl.col("process").is_null())).to_series()
    own = events.filter(is_mine)
    mine = _begun_after(windows.filter(judged), _earlier_until_ns(own))
    if mine.is_empty():
        return _whole(events)
    number = pl.repeat(None, spans.height, dtype=pl.Int64, eager=True).scatter(mine["span"], range(mine.height))
    windows = mine.select("start_ns", "dur_ns")
    return Steps(how, threads["rank"][0], threads.height, windows, own, number.gather(at).filter(is_mine))


def _moments(events: pl.DataFrame) -> pl.DataFrame:
    """When and where each event was begun by the host: THREAD, `at_ns` and `is_device`; null for orphans."""
    is_device = events["kind"].is_in(DEVICE_KINDS)
    work = joined_work(events)
    called = call_starts(work).with_columns(process=pl.coalesce("process", work["process"]))
    rows = pl.concat(
        [
            events.filter(~is_device).select(*THREAD, at_ns="start_ns", is_device=False),
            called.with_columns(is_device=True).select(*THREAD, "at_ns", "is_device"),
        ]
    )
    order = pl.concat([(~is_device).arg_true(), is_device.arg_true()])
    return rows[order.arg_sort()]


def _spans(events: pl.DataFrame) -> tuple[str, pl.DataFrame]:
    """What marks the steps of a trace, and its ranges on the host: THREAD, `start_ns`, `dur_ns`."""
    columns = [*THREAD, "start_ns", "dur_ns"]
    found = steps(events)
    if not found.is_empty():
        return STEP, found.select(columns)
    try:
        passes = find_passes(events)
    except InputError:
        return WINDOW, found.select(columns)
    whole = _whole(events)
    took_ns = int(busy_ns(passes.spans.select("rank", "start_ns", "dur_ns"), ("rank",))["busy_ns"].sum())
    if passes.how == "kernels" or took_ns < LEAST_STEP_FRAC * whole.dur_ns.sum():
        return WINDOW, found.select(columns)
    return PASS, passes.spans.select(columns)


def _placed(spans: pl.DataFrame, points: pl.DataFrame) -> pl.Series:
    """In which range was each event begun: on its own thread, else on another of its process; null for none."""
    is_known = points["at_ns"].is_not_null()
    known = points.filter(is_known)
    own, other = (holders(spans, known, by)["innermost"] for by in (THREAD, PROCESS))
    inside = pl.select(pl.coalesce(own, other)).to_series()
    return pl.repeat(None, points.height, dtype=pl.Int64, eager=True).scatter(is_known.arg_true(), inside)


def _windows(spans: pl.DataFrame, at: pl.Series, events: pl.DataFrame) -> pl.DataFrame:
    """When each step ran: THREAD, `span` (its row), `start_ns`, `dur_ns`; without those that took no time."""
    is_device = events["kind"].is_in(DEVICE_KINDS)
    work = events.select(span=at, end_ns=pl.col("start_ns") + pl.col("dur_ns")).filter(is_device)
    last = work.drop_nulls("span").group_by("span").agg(pl.max("end_ns"))
    done = pl.max_horizontal(pl.col("start_ns") + pl.col("dur_ns"), "end_ns").cum_max()
    return (
        spans.with_columns(span=pl.int_range(pl.len(), dtype=pl.Int64))
        .join(last, on="span", how="left", maintain_order="left")
        .sort(*THREAD, "start_ns")
        .with_columns(done_ns=done.over(THREAD))
        .with_columns(start_ns=pl.max_horizontal("start_ns", pl.col("done_ns").shift(1).over(THREAD)))
        .with_columns(dur_ns=pl.col("done_ns") - pl.col("start_ns"))
        .filter(pl.col("dur_ns") > 0)
        .select(*THREAD, "span", "start_ns", "dur_ns")
    )


def _earlier_until_ns(events: pl.DataFrame) -> int | None:
    """Until when did devices work on what a process launched before the recording, null where on nothing of it.

    Profilers number calls as they come, so that such work has a smaller link than any recorded call; work whose call
    is missing for another reason (a sampled or cut trace) has not.
    """
    first = pl.col("link").filter(pl.col("kind").is_in(API_KINDS)).min()  # null without calls, which keeps nothing
    is_earlier = pl.col("kind").is_in(DEVICE_KINDS) & (pl.col("link") < first)
    found: int | None = events.select((pl.col("start_ns") + pl.col("dur_ns")).filter(is_earlier).max()).item()
    return found


def _begun_after(windows: pl.DataFrame, at_ns: int | None) -> pl.DataFrame:
    """Windows without what lies before a moment."""
    later = pl.max_horizontal("start_ns", pl.lit(at_ns, pl.Int64))
    cut = windows.with_columns(start_ns=later, dur_ns=pl.col("start_ns") + pl.col("dur_ns") - later)
    return cut.filter(pl.col("dur_ns") > 0)


def _whole(events: pl.DataFrame) -> Steps:
    """The whole trace as one window."""
    work = events.filter(pl.col("kind").is_in(DEVICE_KINDS))
    timed = events if work.is_empty() else work
    first, last = timed.select(pl.min("start_ns"), end=(pl.col("start_ns") + pl.col("dur_ns")).max()).row(0)
    if first is None or last <= first:
        raise InputError("its events took no time, so that nothing can be compared")
    window = pl.DataFrame({"start_ns": [first], "dur_ns": [last - first]})
    ranks = events["rank"].unique()
    at = pl.repeat(0, events.height, dtype=pl.Int64, eager=True)
    return Steps(WINDOW, ranks[0] if len(ranks) == 1 else None, 1, window, events, at)

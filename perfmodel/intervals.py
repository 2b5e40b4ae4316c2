"""Intervals of time as columns: their unions, gaps and overlaps, and which of them hold a moment.

Tables hold `start_ns`, `dur_ns` and the whole-number columns `by` that keep groups apart (the devices or threads of a
trace); null is a value like another. The times of all groups are laid on one line, group after group, so that one sort
and one search serve every group at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from perfmodel.errors import InputError

DEVICE = ("rank", "device")  # what tells one device of a trace from another
STREAM = (*DEVICE, "stream")
PROCESS = ("rank", "process")
THREAD = (*PROCESS, "thread")

MAX_LINE_NS = 2**62  # what a line of 64-bit times holds with room to spare: 146 years

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Line:
    """Tables on one line of time: for each its starts and ends (`shift` moved them there) and the groups of its rows.

    `groups` has a row for each group, in the order of the line, `spans` its length. Different groups never meet on it,
    not even with a closed end.
    """

    starts: list[Ints]
    ends: list[Ints]
    shifts: list[Ints]
    group: list[Ints]
    groups: pl.DataFrame
    spans: Ints


def busy_ns(work: pl.DataFrame, by: Sequence[str] = DEVICE) -> pl.DataFrame:
    """For how long was each device doing something: one row a device, with `busy_ns`, the length of the union.

    Columns `by`, `n_intervals`, `time_ns` (the sum of durations), `busy_ns` (overlaps, of streams for example, count
    once) and `span_ns` (first start to last end). Sorted by `by`, which may name other groups than devices.
    """
    line = _line([work], by)
    order = np.argsort(line.starts[0], kind="stable")
    start, end = line.starts[0][order], line.ends[0][order]
    fresh = np.maximum(end - np.maximum(start, _covered_until(start, end)), 0)
    first = np.searchsorted(line.group[0][order], np.arange(line.groups.height))
    sums = {
        "n_intervals": np.diff(np.append(first, len(start))),
        "time_ns": np.add.reduceat(end - start, first) if len(first) else start,
        "busy_ns": np.add.reduceat(fresh, first) if len(first) else start,
        "span_ns": line.spans,
    }
    return line.groups.with_columns(**{name: pl.Series(total, dtype=pl.Int64) for name, total in sums.items()})


def merged(intervals: pl.DataFrame, by: Sequence[str] = DEVICE) -> pl.DataFrame:
    """When was anything going on: the union of intervals as intervals that neither overlap nor touch, in order.

    Columns `by`, `start_ns`, `dur_ns`.
    """
    line = _line([intervals], by)
    start, end, at = _merged(line, 0)
    return _placed(line, start, end, line.group[0][at], line.shifts[0][at])


def gaps(intervals: pl.DataFrame, by: Sequence[str] = DEVICE) -> pl.DataFrame:
    """When was nothing going on between the first start and the last end of a group: the intervals left over, in order.

    Columns `by`, `start_ns`, `dur_ns`. Gaps and the union of intervals add up to the span of the group.
    """
    line = _line([intervals], by)
    start, end, at = _merged(line, 0)
    group, shift = line.group[0][at], line.shifts[0][at]
    inner = np.flatnonzero(group[1:] == group[:-1])
    return _placed(line, end[inner], start[inner + 1], group[inner], shift[inner])


def overlap_ns(intervals: pl.DataFrame, others: pl.DataFrame, by: Sequence[str] = DEVICE) -> pl.Series:
    """How much of each interval lies inside the union of the `others` of its group; what is left lies outside."""
    line = _line([intervals, others], by)
    start, end, _ = _merged(line, 1)
    done = np.concatenate([[0], np.cumsum(end - start)])  # covered before the n-th interval of the union

    def covered_before(at: Ints) -> Ints:
        n = np.searchsorted(start, at, side="right")
        inside = np.minimum(at, end[n - 1]) - start[n - 1] if len(end) else at
        return np.where(n > 0, done[n - 1] + inside, 0)

    return pl.Series("overlap_ns", covered_before(line.ends[0]) - covered_before(line.starts[0]), dtype=pl.Int64)


def holders(intervals: pl.DataFrame, points: pl.DataFrame, by: Sequence[str] = THREAD) -> pl.DataFrame:
    """Which intervals hold each moment: columns `innermost` and `outermost`, row numbers of `intervals`, null for none.

    `points` has `by` and `at_ns`. An interval holds its first and its last moment, as in SKIP (arXiv 2504.11750,
    section IV-A). The innermost began last (of those that began together, it ends first; of equal ones, it stands
    last), the outermost first. Intervals may overlap without being nested.
    """
    line = _line([intervals, points.select(*by, start_ns="at_ns", dur_ns=pl.lit(0, pl.Int64))], by)
    order = _outer_first(line.starts[0], line.ends[0])
    start, end, at = line.starts[0][order], line.ends[0][order], line.starts[1]
    upto = np.searchsorted(start, at, side="right") - 1
    inner = _last_reaching(end, upto, at)
    outer = np.searchsorted(np.maximum.accumulate(end), at) if len(end) else inner
    return pl.DataFrame(
        {"innermost": _rows(order, inner), "outermost": _rows(order, np.where(inner >= 0, outer, -1))},
    )


def parents(intervals: pl.DataFrame, by: Sequence[str] = THREAD) -> pl.Series:
    """Which interval directly contains each one: row numbers, null for none.

    Of those that contain an interval wholly the one that began last; of equal intervals each contains the next.
    """
    line = _line([intervals], by)
    order = _outer_first(line.starts[0], line.ends[0])
    end = line.ends[0][order]
    found = _last_reaching(end, np.arange(len(end)) - 1, end)
    place = np.empty(len(end), np.int64)
    place[order] = np.arange(len(end))
    return _rows(order, found[place]).alias("parent")


def held(intervals: pl.DataFrame, points: pl.DataFrame, by: Sequence[str] = THREAD) -> pl.DataFrame:
    """Which moments lie in each interval: one row for each pair, columns `interval` and `point`, row numbers.

    `points` has `by` and `at_ns`. Here an interval does not hold its last moment, so intervals that follow each other
    share nothing. Pairs come in the order of intervals.
    """
    order, first, beyond = _held(intervals, points, by)
    count = beyond - first
    interval = np.repeat(np.arange(len(count)), count)
    nth = np.arange(len(interval)) - np.repeat(np.cumsum(count) - count, count)
    return pl.DataFrame({"interval": interval, "point": order[first[interval] + nth]})


def earliest_held(intervals: pl.DataFrame, points: pl.DataFrame, by: Sequence[str] = THREAD) -> pl.Series:
    """Which is the first moment that lies in each interval: rows of `points`, null for none; ends as in `held`."""
    order, first, beyond = _held(intervals, points, by)
    return _rows(order, np.where(first < beyond, first, -1)).alias("point")


def _held(intervals: pl.DataFrame, points: pl.DataFrame, by: Sequence[str]) -> tuple[Ints, Ints, Ints]:
    """The order of points in time, and for each interval the place of its first and beyond its last one in it."""
    line = _line([intervals, points.select(*by, start_ns="at_ns", dur_ns=pl.lit(0, pl.Int64))], by)
    order = np.argsort(line.starts[1], kind="stable")
    at = line.starts[1][order]
    return order, np.searchsorted(at, line.starts[0]), np.searchsorted(at, line.ends[0])


def numbered(tables: Sequence[pl.DataFrame], by: Sequence[str]) -> tuple[list[Ints], pl.DataFrame]:
    """Which group is each row in: for each table the number of its rows' groups, and the groups in that order.

    `by` are whole-number columns, null a value like another. Columns that never vary, most of them in most traces, take
    no part in the search for groups.
    """
    rows = pl.concat([table.select(by) for table in tables])
    varying = [c for c in by if rows[c].null_count() not in (0, rows.height) or rows[c].min() != rows[c].max()]
    constant = rows.select(pl.exclude(varying)).head(1)
    if not varying:
        return [np.zeros(table.height, np.int64) for table in tables], constant
    groups = rows.select(varying).unique().sort(varying).with_row_index("_number")
    found = rows.join(groups, on=varying, how="left", nulls_equal=True, maintain_order="left")["_number"].cast(pl.Int64)
    ids = np.split(found.to_numpy(), np.cumsum([table.height for table in tables])[:-1])
    return ids, groups.join(constant, how="cross").select(by) if constant.width else groups.select(by)


def _line(tables: Sequence[pl.DataFrame], by: Sequence[str]) -> _Line:
    """Tables on one line of time; refuses times that span more than MAX_LINE_NS."""
    ids, groups = numbered(tables, by)
    starts = [table["start_ns"].to_numpy() for table in tables]
    ends = [start + table["dur_ns"].to_numpy() for start, table in zip(starts, tables, strict=True)]
    low, high = np.full(groups.height, MAX_LINE_NS), np.full(groups.height, -MAX_LINE_NS)
    for group, start, end in zip(ids, starts, ends, strict=True):
        if groups.height == 1 and len(start):
            low, high = np.minimum(low, start.min()), np.maximum(high, end.max())
        else:
            np.minimum.at(low, group, start)
            np.maximum.at(high, group, end)
    total_ns = sum(int(h) - int(w) + 1 for h, w in zip(high, low, strict=True))
    if total_ns > MAX_LINE_NS:
        raise InputError(
            f"the times of {groups.height} devices or threads span {total_ns} ns in all; expected at most "
            f"{MAX_LINE_NS}: some timestamps are damaged"
        )
    length = high - low + 1
    shift = np.cumsum(length) - length - low
    if len(shift) == 1:
        return _Line(starts, ends, ids, ids, groups, high - low)  # on its own line already: moved by 0
    shifts = [shift[group] for group in ids]
    moved = [[t + s for t, s in zip(side, shifts, strict=True)] for side in (starts, ends)]
    return _Line(moved[0], moved[1], shifts, ids, groups, high - low)


def _covered_until(start: Ints, end: Ints) -> Ints:
    """Up to where the line is covered by the intervals before each one, in order of their starts."""
    return np.concatenate([start[:1], np.maximum.accumulate(end)[:-1]])


def _merged(line: _Line, table: int) -> tuple[Ints, Ints, Ints]:
    """Starts and ends of the union of one table's intervals, and the row at which each of its intervals begins."""
    order = np.argsort(line.starts[table], kind="stable")
    start, end = line.starts[table][order], line.ends[table][order]
    is_new = start > _covered_until(start, end)
    is_new[:1] = True
    first = np.flatnonzero(is_new)
    return start[first], np.maximum.reduceat(end, first) if len(first) else end, order[first]


def _placed(line: _Line, start: Ints, end: Ints, group: Ints, shift: Ints) -> pl.DataFrame:
    """Intervals of the line as a table of groups and times."""
    times = {"start_ns": start - shift, "dur_ns": end - start}
    return line.groups[group].with_columns(**{name: pl.Series(t, dtype=pl.Int64) for name, t in times.items()})


def _outer_first(start: Ints, end: Ints) -> Ints:
    """The order of intervals by start, of those that begin together the longest first."""
    later, same = start[1:] > start[:-1], start[1:] == start[:-1]
    if (later | (same & (end[1:] <= end[:-1]))).all():  # traces are often written so, and sorting is dear
        return np.arange(len(start))
    return np.lexsort((-end, start))


def _rows(order: Ints, place: Ints) -> pl.Series:
    """The rows at places of an order, null at place -1."""
    rows = pl.Series(np.append(order, -1)[place], dtype=pl.Int64)
    return rows.set(rows < 0, None)


def _last_reaching(values: Ints, upto: Ints, wanted: Ints) -> Ints:
    """For each query the greatest index not above `upto` whose value is at least `wanted`; -1 where there is none.

    A tree of maxima over pairs of pairs: climb from `upto` until a maximum reaches, then descend to its last such leaf.
    """
    levels = [values]
    while len(levels[-1]) > 1:
        padded = np.append(levels[-1], [-MAX_LINE_NS] * (len(levels[-1]) % 2))
        levels.append(np.maximum(padded[::2], padded[1::2]))
    node, height = np.full(len(upto), -1), np.zeros(len(upto), np.int64)
    who, beyond, want = np.arange(len(upto)), upto + 1, wanted
    for depth, level in enumerate(levels):
        open_ = beyond > 0
        who, beyond, want = who[open_], beyond[open_], want[open_]
        hit = (beyond % 2 == 1) & (level[beyond - 1] >= want)
        node[who[hit]], height[who[hit]] = beyond[hit] - 1, depth
        who, beyond, want = who[~hit], beyond[~hit] // 2, want[~hit]
    for depth in range(len(levels) - 1, 0, -1):
        below = np.flatnonzero(height == depth)
        right = np.minimum(2 * node[below] + 1, len(levels[depth - 1]) - 1)
        node[below] = np.where(levels[depth - 1][right] >= wanted[below], right, 2 * node[below])
        height[below] -= 1
    return node

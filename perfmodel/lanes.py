"""On which line of a drawing goes each interval: lines on which intervals either nest or lie apart, and never cross.

Viewers of traces draw a thread as a stack of slices. A slice that begins inside another and ends behind it cannot be
drawn there, and they drop it without a word.
"""

from bisect import bisect_left, insort
from heapq import heappop, heappush

import numpy as np
import polars as pl
from numpy.typing import NDArray

MAX_DEPTH = 500  # Perfetto drops what nests deeper than 512

Ints = NDArray[np.int64]


def lanes(intervals: pl.DataFrame) -> pl.Series:
    """On which lane of its track lies each interval: 0 where it nests with all others, further lanes as needed.

    `intervals` holds `track`, `start_ns` and `dur_ns`, in any order; the lanes come in that order. On one lane of a
    track, two intervals lie apart, touch, or one holds the other; no more than MAX_DEPTH lie in each other. An interval
    goes where the smallest open one that can hold it lies, else to the first lane on which nothing is open.
    """
    rows = intervals.select("track", "start_ns", "dur_ns").with_row_index("row")
    ordered = rows.sort("track", "start_ns", pl.col("dur_ns").neg(), "row")
    track, start = ordered["track"].rle_id().to_numpy().astype(np.int64), ordered["start_ns"].to_numpy()
    end = start + ordered["dur_ns"].to_numpy()
    cluster = _clusters(track, start, end)
    crossed = _has_crossing(cluster, start, end)
    found = np.zeros(len(start), np.int64)
    for begin, stop in _runs(cluster):
        if crossed[begin]:
            found[begin:stop] = _coloured(start[begin:stop].tolist(), end[begin:stop].tolist())
    in_order = np.empty_like(found)
    in_order[ordered["row"].to_numpy()] = found
    return pl.Series("lane", in_order)


def _clusters(track: Ints, start: Ints, end: Ints) -> Ints:
    """A number for each run of intervals of one track that overlap each other directly or through others."""
    table = pl.DataFrame({"track": track, "start": start, "end": end})
    covered_until = pl.col("end").cum_max().shift(1).over("track")
    begins = (pl.col("start") >= covered_until).fill_null(True)
    return table.select(begins.cum_sum().cast(pl.Int64)).to_series().to_numpy()


def _has_crossing(cluster: Ints, start: Ints, end: Ints) -> NDArray[np.bool_]:
    """For each interval, whether any two of its cluster cross, or more than MAX_DEPTH lie in each other.

    Starts and ends are opening and closing brackets. None cross exactly where each is closed at the depth at which it
    was opened: the first that is not is closed while another, opened later, is still open. At one moment what ends is
    closed first, the innermost before the others, and what has no duration is opened and closed last.
    """
    n = len(start)
    position = np.arange(n)
    phase = np.concatenate([np.ones(n, np.int8), np.where(end > start, 0, 2).astype(np.int8)])
    moment = np.concatenate([start, end])
    order = np.lexsort((np.concatenate([position, -position]), phase, moment, np.tile(cluster, 2)))
    is_open = order < n
    depth = np.cumsum(np.where(is_open, 1, -1))
    depth_of = np.empty(2 * n, np.int64)
    depth_of[order] = np.where(is_open, depth, depth + 1)
    is_bad = (depth_of[:n] != depth_of[n:]) | (depth_of[:n] > MAX_DEPTH)
    bad_clusters = np.unique(cluster[is_bad])
    return np.isin(cluster, bad_clusters)


def _runs(cluster: Ints) -> list[tuple[int, int]]:
    """Begin and end of each run of equal numbers."""
    cuts = np.flatnonzero(np.diff(cluster)) + 1
    return list(zip([0, *cuts.tolist()], [*cuts.tolist(), len(cluster)], strict=True)) if len(cluster) else []


def _coloured(starts: list[int], ends: list[int]) -> list[int]:
    """Lanes of intervals ordered by start, the longest first: in the smallest open one that holds it, else a free lane.

    `tops` are the innermost open intervals of all lanes by their end; a heap says which of them ends next.
    """
    stacks: list[list[int]] = []
    free: list[int] = []
    tops: list[tuple[int, int]] = []
    found = []
    for start, end in zip(starts, ends, strict=True):
        while tops and tops[0][0] <= start:
            _, lane = tops.pop(0)
            stack = stacks[lane]
            while stack and stack[-1] <= start:
                stack.pop()
            if stack:
                insort(tops, (stack[-1], lane))
            else:
                heappush(free, lane)
        at = bisect_left(tops, (end, -1))
        while at < len(tops) and len(stacks[tops[at][1]]) >= MAX_DEPTH:
            at += 1
        if at < len(tops):
            _, lane = tops.pop(at)
        elif free:
            lane = heappop(free)
        else:
            lane = len(stacks)
            stacks.append([])
        stacks[lane].append(end)
        insort(tops, (end, lane))
        found.append(lane)
    return found

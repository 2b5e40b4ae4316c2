"""On which line of a drawing goes each interval: lines on which intervals either nest or lie apart, and never cross.

Viewers of traces draw a thread as a stack of slices. A slice that begins inside another and ends behind it cannot be
drawn there, and they drop it without a word.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heappop, heappush

import numpy as np
import polars as pl
from numpy.typing import NDArray

MAX_DEPTH = 500  # Perfetto drops what nests deeper than 512
PIECE_ROWS = 2**16

Ints = NDArray[np.int64]


def lanes(intervals: pl.DataFrame) -> pl.DataFrame:
    """On which lane of its track lies each interval: 0 where it nests with all others, further lanes as needed.

    `intervals` holds `track`, `start_ns` and `dur_ns`, in any order. The result has `row`, the place of the interval
    there, and `lane`, in the order of tracks, lanes and starts, the longer of two that begin together first. On
    one lane of a track, two intervals lie apart, touch, or one holds the other; no more than MAX_DEPTH lie in each
    other. An interval goes where the smallest open one that can hold it lies, else to the first lane on which nothing
    is open.
    """
    track, start, dur = (intervals[name].to_numpy() for name in ("track", "start_ns", "dur_ns"))
    order = np.lexsort((-dur, start, track))
    track, start = track[order], start[order]
    end = start + dur[order]
    lane = np.zeros(len(order), np.uint32)
    for begin, stop in _runs(np.flatnonzero(np.diff(track)) + 1, len(order)):
        for first, last in _crossing(start[begin:stop], end[begin:stop]):
            here = slice(begin + first, begin + last)
            lane[here] = _coloured(start[here].tolist(), end[here].tolist())
    if lane.any():
        by_lane = np.lexsort((lane, track))
        order, lane = order[by_lane], lane[by_lane]
    return pl.DataFrame({"row": order.astype(np.uint32), "lane": lane})


def _crossing(start: Ints, end: Ints) -> Iterator[tuple[int, int]]:
    """Begin and end of each cluster of one track, in which intervals overlap directly or through others, that needs
    several lanes; clusters are looked at PIECE_ROWS at a time, which bounds the memory this takes."""
    cuts = np.flatnonzero(start[1:] >= np.maximum.accumulate(end)[:-1]) + 1
    begins = np.concatenate([[0], cuts])
    pieces = begins[1:][np.diff(begins // PIECE_ROWS) > 0]
    for first, last in _runs(pieces, len(start)):
        bad = first + np.flatnonzero(_is_bad(start[first:last], end[first:last]))
        for cluster in np.unique(np.searchsorted(begins, bad, side="right") - 1).tolist():
            yield int(begins[cluster]), int(begins[cluster + 1]) if cluster + 1 < len(begins) else len(start)


def _is_bad(start: Ints, end: Ints) -> NDArray[np.bool_]:
    """Which intervals lie deeper than MAX_DEPTH, or are closed at another depth than they were opened at.

    Starts and ends are opening and closing brackets. None cross exactly where each is closed at the depth at which it
    was opened: the first that is not is closed while another, opened later, is still open. At one moment what ends is
    closed first, the innermost before the others; what has no duration crosses nothing.
    """
    lasts = end > start
    opening, closing = start[lasts], end[lasts]
    n = len(closing)
    order = n - 1 - np.argsort(closing[::-1], kind="stable")
    closing = closing[order]
    depth = np.cumsum(lasts) + ~lasts - np.searchsorted(closing, start, side="right")
    is_bad = depth > MAX_DEPTH
    depth_closed = np.empty(n, np.int64)
    depth_closed[order] = np.searchsorted(opening, closing, side="left") - np.arange(n)
    is_bad[lasts] |= depth[lasts] != depth_closed
    return is_bad


def _runs(cuts: Ints, n: int) -> list[tuple[int, int]]:
    """Begin and end of each part of `n` that is cut so."""
    return list(zip([0, *cuts.tolist()], [*cuts.tolist(), n], strict=True)) if n else []


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

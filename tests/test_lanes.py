from collections.abc import Sequence

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import lanes as lanes_module
from perfmodel.lanes import lanes

Interval = tuple[int, int, int]  # track, start, duration


def found(rows: Sequence[Interval]) -> list[int]:
    table = pl.DataFrame(rows, schema={c: pl.Int64 for c in ("track", "start_ns", "dur_ns")}, orient="row")
    placed = lanes(table)
    keys = [(rows[row][0], lane, rows[row][1], -rows[row][2], row) for row, lane in placed.rows()]
    assert keys == sorted(keys)
    return placed.sort("row")["lane"].to_list()


def crosses(a: Interval, b: Interval) -> bool:
    """Neither apart nor one in the other."""
    (a0, a1), (b0, b1) = (a[1], a[1] + a[2]), (b[1], b[1] + b[2])
    return a0 < b0 < a1 < b1 or b0 < a0 < b1 < a1


def by_brute_force(rows: Sequence[Interval]) -> list[int]:
    """The same rule, said with lists: every interval looks at all earlier ones of its track."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i][0], rows[i][1], -rows[i][2], i))
    lane = [0] * len(rows)
    for at, i in enumerate(order):
        track, start, dur = rows[i]
        before = [j for j in order[:at] if rows[j][0] == track]
        is_open = [j for j in before if rows[j][1] + rows[j][2] > start]
        innermost = {lane[j]: j for j in is_open}  # later ones replace those that hold them
        holders = [(rows[j][1] + rows[j][2], n) for n, j in innermost.items() if rows[j][1] + rows[j][2] >= start + dur]
        lane[i] = min(holders)[1] if holders else min(set(range(len(rows))) - set(innermost))
    return lane


def test_intervals_that_nest_stay_together_and_those_that_cross_do_not() -> None:
    assert found([(1, 0, 10), (1, 2, 3), (1, 5, 5), (1, 10, 4), (1, 3, 0)]) == [0] * 5
    assert found([(1, 0, 10), (1, 5, 10), (2, 5, 10), (1, 12, 1), (1, 20, 1)]) == [0, 1, 0, 1, 0]
    assert found([(1, 4, 4), (1, 0, 6), (1, 7, 5)]) == [1, 0, 0]
    assert found([]) == []


INTERVALS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 14), st.integers(0, 8)), max_size=14)


@given(INTERVALS, st.integers(1, 20))
def test_lanes_are_those_of_the_slow_rule(rows: list[Interval], piece_rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes_module, "PIECE_ROWS", piece_rows)
        assert found(rows) == by_brute_force(rows)


@given(INTERVALS)
def test_nothing_crosses_on_a_lane_and_no_lane_is_used_without_need(rows: list[Interval]) -> None:
    lane = found(rows)
    pairs = [(i, j) for i in range(len(rows)) for j in range(i) if rows[i][0] == rows[j][0]]
    assert not any(crosses(rows[i], rows[j]) for i, j in pairs if lane[i] == lane[j])
    for track in {row[0] for row in rows}:
        crossing = any(crosses(rows[i], rows[j]) for i, j in pairs if rows[i][0] == track)
        assert (max(n for n, row in zip(lane, rows, strict=True) if row[0] == track) > 0) == crossing


def test_what_nests_too_deeply_gets_another_lane(monkeypatch) -> None:
    monkeypatch.setattr(lanes_module, "MAX_DEPTH", 2)
    assert found([(1, 0, 10), (1, 0, 9), (1, 0, 8), (1, 0, 7), (1, 20, 5)]) == [0, 0, 1, 1, 0]

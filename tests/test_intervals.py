from collections.abc import Sequence

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.errors import InputError
from perfmodel.intervals import THREAD, busy_ns, earliest_held, gaps, held, holders, merged, overlap_ns, parents

BY = ("rank", "device")
Row = tuple[int | None, int, int, int]  # rank, device, start, duration

ROWS = st.lists(
    st.tuples(st.sampled_from([None, 0, 1]), st.integers(0, 1), st.integers(-30, 30), st.integers(0, 12)), max_size=25
)


def table(rows: Sequence[Row]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={c: pl.Int64 for c in (*BY, "start_ns", "dur_ns")}, orient="row")


def points(rows: Sequence[Row]) -> pl.DataFrame:
    return table(rows).select(*BY, at_ns="start_ns")


def moments(rows: Sequence[Row]) -> dict[tuple[int | None, int], set[int]]:
    """The nanoseconds that are covered in each group, one by one."""
    covered: dict[tuple[int | None, int], set[int]] = {}
    for rank, device, start, dur in rows:
        covered.setdefault((rank, device), set()).update(range(start, start + dur))
    return covered


def test_worked_out_by_hand() -> None:
    """Device 0: 0-10, 5-12, 12-15 touch, then 20-21; device 1 of another rank apart."""
    rows = [(None, 0, 5, 7), (None, 0, 0, 10), (None, 0, 12, 3), (None, 0, 20, 1), (1, 0, 3, 4)]
    assert busy_ns(table(rows)).rows() == [(None, 0, 4, 21, 16, 21), (1, 0, 1, 4, 4, 4)]
    assert merged(table(rows)).rows() == [(None, 0, 0, 15), (None, 0, 20, 1), (1, 0, 3, 4)]
    assert gaps(table(rows)).rows() == [(None, 0, 15, 5)]
    assert overlap_ns(table([(None, 0, 14, 7), (1, 0, 0, 99)]), table(rows)).to_list() == [2, 4]


@given(ROWS)
def test_busy_time_is_the_union_of_intervals(rows: list[Row]) -> None:
    expected = {key: len(at) for key, at in moments(rows).items()}
    assert {row[:2]: row[4] for row in busy_ns(table(rows)).iter_rows()} == expected


@given(ROWS)
def test_union_and_gaps_fill_the_span(rows: list[Row]) -> None:
    union, idle = merged(table(rows)), gaps(table(rows))
    covered = moments(rows)
    assert {k: v for k, v in moments(union.rows()).items() if v} == {k: v for k, v in covered.items() if v}
    assert (idle["dur_ns"] > 0).all()
    for key, found in moments(idle.rows()).items():
        assert not found & covered[key]
    span = {
        key: max(s + d for r, v, s, d in rows if (r, v) == key) - min(s for r, v, s, _ in rows if (r, v) == key)
        for key in covered
    }
    both = pl.concat([union, idle]).group_by(BY).agg(pl.sum("dur_ns"))
    assert {(rank, device): total for rank, device, total in both.iter_rows()} == span
    assert {row[:2]: row[5] for row in busy_ns(table(rows)).iter_rows()} == span


@given(ROWS, ROWS)
def test_overlap_counts_covered_moments(rows: list[Row], others: list[Row]) -> None:
    covered = moments(others)
    expected = [len(set(range(s, s + d)) & covered.get((r, v), set())) for r, v, s, d in rows]
    assert overlap_ns(table(rows), table(others)).to_list() == expected


@given(ROWS, ROWS)
def test_holders_are_those_a_look_at_every_interval_finds(rows: list[Row], at: list[Row]) -> None:
    """Nested, touching and partly overlapping alike."""
    inner, outer = [], []
    for rank, device, moment, _ in at:
        around = [
            (start, -dur, i)
            for i, (r, d, start, dur) in enumerate(rows)
            if (r, d) == (rank, device) and start <= moment <= start + dur
        ]
        inner.append(max(around)[2] if around else None)
        outer.append(min(around)[2] if around else None)
    found = holders(table(rows), points(at), BY)
    assert found["innermost"].to_list() == inner
    assert found["outermost"].to_list() == outer


@given(ROWS)
def test_parents_are_those_a_look_at_every_interval_finds(rows: list[Row]) -> None:
    """The parent contains the whole interval and comes last of those before it, by start, then length, then row."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i][2], -rows[i][3], i))
    expected: list[int | None] = []
    for i, (rank, device, start, dur) in enumerate(rows):
        before = [j for j in order[: order.index(i)] if rows[j][:2] == (rank, device)]
        around = [j for j in before if rows[j][2] + rows[j][3] >= start + dur]
        expected.append(around[-1] if around else None)
    assert parents(table(rows), BY).to_list() == expected


@given(ROWS, ROWS)
def test_held_pairs_are_those_a_look_at_every_pair_finds(rows: list[Row], at: list[Row]) -> None:
    expected = {
        (i, j)
        for i, (r, d, start, dur) in enumerate(rows)
        for j, (rank, device, moment, _) in enumerate(at)
        if (r, d) == (rank, device) and start <= moment < start + dur
    }
    found = held(table(rows), points(at), BY)
    assert len(found) == len(expected)
    assert set(found.iter_rows()) == expected
    first = [min((at[j][2] for i, j in expected if i == n), default=None) for n in range(len(rows))]
    moment = points(at)["at_ns"].gather(earliest_held(table(rows), points(at), BY))
    assert moment.to_list() == first


def test_touching_operators_share_no_launch() -> None:
    """At the moment where one ends and the next begins, the next counts; at the very end, the one that ends."""
    rows = table([(None, 0, 0, 20), (None, 0, 0, 10), (None, 0, 10, 10)])
    assert holders(rows, points([(None, 0, 10, 0), (None, 0, 20, 0), (None, 0, 21, 0)]), BY)["innermost"].to_list() == [
        2, 2, None,
    ]  # fmt: skip


def test_any_column_may_name_the_groups() -> None:
    named = table([(None, 0, 0, 5), (None, 1, 1, 5)]).rename({"rank": "part", "device": "group"})
    assert busy_ns(named, ("part", "group")).rows() == [(None, 0, 1, 5, 5, 5), (None, 1, 1, 5, 5, 5)]


def test_nothing_in_nothing_out() -> None:
    nothing = table([])
    assert busy_ns(nothing).schema == dict.fromkeys((*BY, "n_intervals", "time_ns", "busy_ns", "span_ns"), pl.Int64)
    assert merged(nothing).is_empty() and gaps(nothing).is_empty()
    assert overlap_ns(table([(None, 0, 1, 2)]), nothing).to_list() == [0]
    assert holders(nothing, points([(None, 0, 1, 2)]), BY).rows() == [(None, None)]
    assert held(nothing, nothing.rename({"start_ns": "at_ns"}), BY).is_empty()


def test_times_of_many_clocks_fit_and_absurd_ones_are_refused() -> None:
    now = 1_790_000_000 * 10**9
    rows = [(rank, device, now * device, 5) for rank in range(50) for device in (0, 1)]
    assert busy_ns(table(rows))["busy_ns"].to_list() == [5] * 100
    with pytest.raises(InputError, match="damaged"):
        busy_ns(table([(rank, 0, start, 5) for rank in range(3) for start in (0, now)]))


def test_threads_of_different_processes_and_ranks_are_kept_apart() -> None:
    schema = {"rank": pl.Int32, "process": pl.Int64, "thread": pl.Int64, "start_ns": pl.Int64, "dur_ns": pl.Int64}
    ops = pl.DataFrame([(0, 1, 1, 0, 9), (1, 1, 1, 0, 9), (0, 2, 1, 0, 9)], schema=schema, orient="row")
    at = ops.select(*THREAD, at_ns="start_ns")
    assert holders(ops, at[::-1])["innermost"].to_list() == [2, 1, 0]

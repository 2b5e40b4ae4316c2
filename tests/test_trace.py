"""EVENTS and its checks, and cutting a trace to a window."""

import polars as pl
import pytest

from perfmodel.errors import InputError
from perfmodel.trace import EVENTS, Trace, check_events, cut
from tests.traces_made import events


def test_device_work_goes_with_the_call_that_launched_it() -> None:
    trace = Trace(
        events(
            {"kind": "launch", "name": "inside", "start_ns": 100, "link": 1},
            {"kind": "launch", "name": "after", "start_ns": 300, "link": 2},
            {"kind": "kernel", "name": "late, launched inside", "start_ns": 900, "link": 1},
            {"kind": "kernel", "name": "launched after", "start_ns": 150, "link": 2},
            {"kind": "kernel", "name": "orphan inside", "start_ns": 120, "link": 9},
            {"kind": "copy", "name": "no link, outside", "start_ns": 5},
        ),
        "kineto",
        n_events=6,
    )
    kept = cut(trace, 100, 200).events["name"].cast(pl.String).to_list()
    assert kept == ["inside", "late, launched inside", "orphan inside"]
    assert trace.events.height == 6


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(InputError, match="empty window"):
        cut(Trace(EVENTS.to_frame(), "kineto", 0), 5, 5)


@pytest.mark.parametrize(
    "change",
    [{"dur_ns": -1}, {"start_ns": None}, {"kind": "kernel", "device": None}],
    ids=["negative duration", "no start", "kernel without a device"],
)
def test_impossible_events_are_refused(change: dict) -> None:
    with pytest.raises(InputError, match="1 events have no time"):
        check_events(events({"kind": "kernel", "start_ns": 1, **change}))


def test_another_table_is_refused() -> None:
    with pytest.raises(InputError, match="not an EVENTS table"):
        check_events(pl.DataFrame({"name": ["x"]}))

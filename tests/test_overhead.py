import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.analysis import analyse
from perfmodel.launch import joined_work
from perfmodel.overhead import idle_beside_overhead_ns, profiler_overhead
from perfmodel.readers import read_trace
from perfmodel.report import trace_page
from perfmodel.trace import Trace
from tests.test_nsys import R, call, export
from tests.traces_made import complete, events, kernel, launch, pid, write_json

US = 1000


def overhead(start_ns: int, dur_ns: int, name: str = "Buffer Flush", **more: object) -> dict[str, object]:
    return {"kind": "overhead", "name": name, "start_ns": start_ns, "dur_ns": dur_ns, "process": None, **more}


# Two devices, driven by processes 1 and 2: device 0 is idle in [20, 50), device 1 in [20, 100).
TWO = [
    *(launch(at, link, process=process) for at, link, process in ((0, 1, 1), (1, 2, 1), (2, 3, 2), (3, 4, 2))),
    *(
        kernel(at, 10, link=link, device=device)
        for at, link, device in ((10, 1, 0), (50, 2, 0), (10, 3, 1), (100, 4, 1))
    ),
]


def test_overhead_by_name_with_the_idle_time_beside_it() -> None:
    table = profiler_overhead(
        events(
            *TWO,
            overhead(15, 10),  # beside both devices, each idle for the last 5
            overhead(20, 10, process=1),  # [20, 25) again; 5 more on device 0
            overhead(40, 70, "Lazy Function Loading", process=2),  # device 1 until 100
            overhead(0, 5, "Instrumentation"),
        )
    )
    assert table.rows() == [
        ("Lazy Function Loading", 1, 70, 60, True),
        ("Buffer Flush", 2, 20, 10 + 5, False),
        ("Instrumentation", 1, 5, 0, False),
    ]
    assert profiler_overhead(events(*TWO)).is_empty()
    assert profiler_overhead(events(overhead(0, 5))).rows() == [("Buffer Flush", 1, 5, 0, False)]


def test_idle_beside_overhead_counts_once_and_a_full_queue_not_at_all() -> None:
    table = events(*TWO, overhead(20, 10), overhead(25, 10, "Resource"), overhead(0, 200, "Command Buffer Full"))
    assert idle_beside_overhead_ns(table, joined_work(table)) == 2 * 15


INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=6)


@given(INTERVALS, INTERVALS)
def test_idle_beside_overhead_is_that_of_a_count_of_moments(
    busy: list[tuple[int, int]], spent: list[tuple[int, int]]
) -> None:
    table = events(*(kernel(*one) for one in busy), *(overhead(*one) for one in spent), launch(99, 1))
    working = {at for start, dur in busy for at in range(start, start + dur)}
    span = range(min((start for start, _ in busy), default=0), max((sum(one) for one in busy), default=0))
    idle = {at for at in span if at not in working}
    expected = len(idle & {at for start, dur in spent for at in range(start, start + dur)})
    assert idle_beside_overhead_ns(table, joined_work(table)) == expected
    assert profiler_overhead(table)["idle_ns"].sum() == expected


def test_kineto_overhead_is_read_without_a_process(tmp_path: Path) -> None:
    document = {
        "traceEvents": [
            complete("overhead", "Activity Buffer Request", 1, 2, -1, 0),
            complete("overhead", "Instrumentation", 5, 1, 7, 9),
            complete("cpu_op", "aten::mm", 3, 4, 7, 8),
        ]
    }
    trace = read_trace(write_json(tmp_path / "a.json", document))
    assert trace.events.select("kind", "name", "start_ns", "dur_ns", "process", "thread").rows() == [
        ("overhead", "Activity Buffer Request", 1000, 2000, None, None),
        ("overhead", "Instrumentation", 5000, 1000, 7, 9),
        ("op", "aten::mm", 3000, 4000, 7, 8),
    ]


def test_both_tables_of_nsight_systems_are_read_and_are_no_events_of_the_application(tmp_path: Path) -> None:
    def spent(start: int, end: int | None, name: int) -> dict[str, object]:
        return {"start": start, "end": end, "globalTid": pid(1, 11), "correlationId": 1, "nameId": name}

    tables = {
        R: [call(1, 2)],
        "CUPTI_ACTIVITY_KIND_OVERHEAD": [spent(3, 5, 1)],
        "PROFILER_OVERHEAD": [spent(4, 9, 2), spent(6, None, 2)],
        "NVTX_EVENTS": [
            {"start": 0, "end": None, "eventType": 59, "text": "open", "textId": 0, "globalTid": pid(1, 11)}
        ],
        "StringIds": [{"id": 1, "value": "Lazy Function Loading"}, {"id": 2, "value": "CUPTI Buffer flush"}],
    }
    trace = read_trace(export(tmp_path / "a.sqlite", tables))
    assert trace.of_kind("overhead").select("name", "start_ns", "dur_ns", "process", "thread", "link").rows() == [
        ("CUPTI Buffer flush", 4, 5, 1, 11, None),
        ("Lazy Function Loading", 3, 2, 1, 11, None),
    ]
    assert (trace.n_events, trace.n_dropped) == (2, 1)
    assert trace.of_kind("range")["dur_ns"].to_list() == [2]  # until the last event, not the last overhead


def test_page_json_and_finding() -> None:
    made = [
        event for i in range(60) for event in (launch(i * 100 * US, i), kernel(i * 100 * US + 5 * US, 20 * US, link=i))
    ]
    found = analyse(Trace(events(*made, overhead(30 * US, 3000 * US)), "kineto", 121))
    finding = next(finding for finding in found.findings if finding.name == "overhead")
    assert finding.explained_ns == (75 + 29 * 80 + 5) * US  # the end of the first gap, 29, and the start of one
    assert "of the profiler: Buffer Flush" in finding.words
    assert "overhead that the profiler recorded (3.00 ms)" in trace_page(found, "a")
    told = json.loads(json.dumps(found.to_json()))
    assert told["profiler_overhead_ns"] == 3000 * US
    assert told["profiler_overhead"] == [
        {
            "name": "Buffer Flush",
            "n_calls": 1,
            "time_ns": 3000 * US,
            "idle_ns": finding.explained_ns,
            "is_driver": False,
        }
    ]
    none = analyse(Trace(events(*made), "kineto", 120))
    assert "overhead" not in {finding.name for finding in none.findings} and "overhead" not in trace_page(none, "a")


@pytest.mark.parametrize(
    ("file", "figures"),
    [
        (
            "tracelens__b200__eager_trace.json.gz",
            {"Activity Buffer Request": (1, 1_526_826), "Lazy Function Loading": (8, 440_887)},
        ),
        ("nsysai__h100_2gpu_1s.sqlite", {"Command Buffer Full": (198, 911_969_806)}),
    ],
)
def test_overhead_of_real_traces(shared: Path, file: str, figures: dict[str, tuple[int, int]]) -> None:
    table = profiler_overhead(read_trace(shared / "traces" / file).events)
    assert {name: (n, time_ns) for name, n, time_ns in table.select("name", "n_calls", "time_ns").rows()} == figures
    assert (table["idle_ns"] <= pl.Series([10**9])).all()

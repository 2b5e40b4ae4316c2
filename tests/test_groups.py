from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import InputError
from perfmodel.groups import GROUPINGS, KEYS, launch_metrics_by, steps
from perfmodel.launch import FIGURES, joined_work, launch_metrics
from perfmodel.readers import read_trace
from perfmodel.trace import Trace
from tests.traces_made import events, golden_rows, kernel, launch


def range_(start_ns: int, dur_ns: int, name: str, **more: object) -> dict:
    return {"kind": "range", "name": name, "start_ns": start_ns, "dur_ns": dur_ns, **more}


# Two steps that touch; thread 2 launches in the first (backward); device 1 gets a copy; a graph, an orphan.
BY_HAND = events(
    range_(0, 100, "ProfilerStep#4"),
    range_(100, 100, "ProfilerStep#5"),
    range_(0, 60, "layer|tokens=4"),
    range_(10, 20, "layer|tokens=8"),
    range_(20, 30, "mlp"),
    {"kind": "op", "start_ns": 12},
    {"kind": "op", "start_ns": 40, "thread": 2},
    {"kind": "op", "start_ns": 130},
    launch(15, link=1, dur_ns=2),
    launch(25, link=2, dur_ns=3),
    launch(50, link=3, dur_ns=4, thread=2),
    launch(100, link=4, dur_ns=5, name="cudaGraphLaunch"),
    launch(150, link=5, dur_ns=6, name="cudaMemcpyAsync"),
    launch(500, link=6, dur_ns=7),
    kernel(20, 10, link=1),  # delay 5, queue 3
    kernel(40, 20, link=2, stream=8),  # delay 15, queue 12
    kernel(55, 30, link=3),  # delay 5, queue 1, overlaps 5
    kernel(110, 10, link=4),  # delay 10, queue 5
    kernel(130, 10, link=4),  # delay 30, queue 25
    {"kind": "copy", "start_ns": 170, "dur_ns": 5, "link": 5, "device": 1},
    kernel(3, 4, link=99),
)  # fmt: skip


def rows(by: str, *columns: str) -> list[tuple]:
    return launch_metrics_by(BY_HAND, by).select(columns).rows()


def test_steps_own_what_any_thread_launches_in_their_time() -> None:
    figures = ("n_launches", "n_kernels", "n_kernels_graph", "n_kernels_orphan", "tklqt_ns", "tklqt_first_kernel_ns")
    assert rows("step", "name", "start_ns", *figures) == [
        ("ProfilerStep#4", 0, 3, 3, 0, 0, 25, 25),
        ("ProfilerStep#5", 100, 2, 2, 2, 0, 40, 10),
        (None, None, 1, 1, 0, 1, 0, 0),
    ]
    times = ("launch_call_ns", "kernel_launch_call_ns", "n_queued", "queue_ns", "kernel_busy_ns", "gpu_busy_ns")
    assert rows("step", *times, "gpu_span_ns", "gpu_idle_ns", "gpu_idle_eq5_ns", "inference_latency_ns") == [
        (9, 9, 3, 16, 55, 55, 65, 10, 73 - 60, 73),
        (11, 5, 2, 30, 20, 25, 35, 10, 10 - 20, 10),
        (7, 0, 0, 0, 4, 4, 4, 0, None, None),
    ]


def test_nested_ranges_all_count_and_a_name_counts_once() -> None:
    figures = ("name", "n_calls", "n_launches", "n_kernels", "tklqt_ns", "kernel_busy_ns", "gpu_span_ns")
    assert rows("range", *figures, "inference_latency_ns") == [
        ("ProfilerStep#4", 1, 2, 2, 20, 30, 40, 48),
        ("ProfilerStep#5", 1, 2, 2, 40, 20, 35, 10),
        ("layer", 2, 2, 2, 20, 30, 40, 48),
        ("mlp", 1, 1, 1, 15, 20, 20, None),
        (None, None, 2, 2, 5, 34, 82, None),
    ]


def test_work_in_nested_ranges_of_one_name_counts_with_the_outermost() -> None:
    trace = events(
        *(range_(0, 60, "layer"), range_(10, 20, "layer"), launch(5, link=1), launch(15, link=2)),
        *(kernel(10, 10, link=1), kernel(30, 10, link=2)),
    )
    found = launch_metrics_by(trace, "range").select("name", "n_kernels", "gpu_busy_ns", "gpu_span_ns")
    assert found.rows() == [("layer", 2, 20, 30)]


def test_an_orphan_belongs_to_the_process_that_its_record_names() -> None:
    found = launch_metrics_by(events(kernel(0, 10, link=9, process=5), kernel(20, 10, link=8)), "process")
    assert found.select("process", "n_kernels").rows() == [(None, 1), (5, 1)]


def test_places_of_launch_and_work() -> None:
    assert rows("thread", "process", "thread", "n_launches", "n_kernels", "inference_latency_ns") == [
        (None, None, 0, 1, None),
        (1, 1, 5, 4, 128),
        (1, 2, 1, 1, 45),
    ]
    assert rows("process", "process", "n_launches", "n_kernels") == [(None, 0, 1), (1, 6, 6 - 1)]
    assert rows("rank", "rank", "n_launches", "n_kernels", "inference_latency_ns") == [(None, 6, 6, 128)]
    assert rows("device", "device", "n_launches", "launch_call_ns", "n_kernels", "gpu_busy_ns", "akd_ns") == [
        (0, 4, 14, 6, 79, 14.0),
        (1, 1, 6, 0, 5, None),
    ]
    assert rows("stream", "device", "stream", "n_launches", "n_kernels", "inference_latency_ns") == [
        (0, 7, 3, 5, None),
        (0, 8, 1, 1, None),
        (1, 7, 1, 0, None),
    ]


def test_steps_without_profiler_steps_are_the_outer_range_that_repeats_and_takes_most_time() -> None:
    trace = events(
        range_(0, 10, "iteration|batch=1"), range_(20, 10, "iteration|batch=2"),
        range_(1, 2, "layer"), range_(4, 2, "layer"), range_(21, 2, "layer"),
        range_(40, 5, "save"), range_(50, 1, "rare"), range_(60, 1, "rare"),
    )  # fmt: skip
    assert steps(trace).select("name", "start_ns", "dur_ns").rows() == [("iteration", 0, 10), ("iteration", 20, 10)]
    assert steps(events(range_(0, 10, "once"))).is_empty()
    rare = [range_(30, 1, "twice"), range_(32, 1, "twice")]
    assert steps(events(range_(0, 10, "once"), *rare)).is_empty()
    assert steps(events(range_(0, 2, "once"), *rare))["name"].to_list() == ["twice", "twice"]
    assert launch_metrics_by(events(launch(0, link=1)), "step").select("name", "n_launches").rows() == [(None, 1)]


def test_calls_of_a_layer_are_no_steps() -> None:
    layers = [range_(i * 100, 90, "nn.Module: Qwen3MoeSparseMoeBlock_0") for i in range(3)]
    assert steps(events(*layers)).is_empty()
    assert steps(events(*layers, range_(0, 40, "step"), range_(200, 40, "step")))["name"].to_list() == ["step"] * 2


def test_collectives_of_a_backend_are_no_steps_however_long_a_rank_waits() -> None:
    talks = [range_(i * 100, 90, "gloo:all_to_all", thread=9) for i in range(3)]
    assert steps(events(*talks)).is_empty()
    assert steps(events(*talks, range_(0, 40, "layer"), range_(200, 40, "layer")))["name"].to_list() == ["layer"] * 2


def test_a_thread_with_a_step_of_its_own_keeps_its_launches() -> None:
    places = {1: "ProfilerStep#1", 2: "ProfilerStep#2"}
    ranges = [range_(thread, 50, name, thread=thread) for thread, name in places.items()]
    trace = events(*ranges, *(launch(10, link=t, thread=t) for t in (1, 2, 3)), launch(10, link=4, process=2))
    found = launch_metrics_by(trace, "step").select("name", "n_launches").rows()
    assert found == [("ProfilerStep#1", 1), ("ProfilerStep#2", 2), (None, 1)]


def test_ranks_keep_their_steps_and_ranges() -> None:
    rows = [
        {**row, "rank": rank}
        for rank in (0, 1)
        for row in (range_(0, 50, "ProfilerStep#0"), launch(10, link=rank), kernel(20 + rank, link=rank))
    ]
    for by in ("step", "range", "rank", "device", "stream", "process", "thread"):
        found = launch_metrics_by(events(*rows), by)
        assert found.select("rank", "n_kernels", "tklqt_ns").rows() == [(0, 1, 10), (1, 1, 11)], by


def test_an_unknown_grouping_is_refused() -> None:
    with pytest.raises(InputError, match="expected one of rank, device"):
        launch_metrics_by(BY_HAND, "kernel")


ADDITIVE = ("n_kernels", "n_kernels_joined", "n_kernels_orphan", "n_kernels_graph", "tklqt_ns", "tklqt_graph_ns")
ADDITIVE += ("queue_ns", "n_queued", "n_negative_delays", "kernel_time_ns")
OF_CALLS = ("n_launches", "launch_call_ns", "tklqt_first_kernel_ns", "kernel_launch_call_ns")

PLACE = st.fixed_dictionaries(
    {"rank": st.sampled_from([None, 0]), "process": st.sampled_from([1, 2]), "thread": st.sampled_from([1, 2])}
)
RANGES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 25), st.sampled_from(["a", "b", "ProfilerStep#1"]), PLACE), max_size=6
)
CALLS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 5), st.booleans(), PLACE), max_size=6)
WORK = st.lists(
    st.tuples(st.sampled_from(["kernel", "set"]), st.integers(0, 60), st.integers(0, 9), st.integers(0, 5)), max_size=9
)


def made(ranges: list, calls: list, work: list) -> pl.DataFrame:
    """A trace whose i-th call has link i, so that every piece of work has the rank of its call."""
    rows = [range_(start, dur, name, **place) for start, dur, name, place in ranges]
    names = {True: "cudaGraphLaunch", False: "cudaLaunchKernel"}
    rows += [launch(at, i, dur, name=names[graph], **place) for i, (at, dur, graph, place) in enumerate(calls)]
    for kind, start, dur, link in work:
        rank = calls[link][3]["rank"] if link < len(calls) else None
        rows.append({"kind": kind, "start_ns": start, "dur_ns": dur, "link": link, "rank": rank})
    return events(*rows)


@settings(max_examples=50)
@given(RANGES, CALLS, WORK)
def test_groups_add_up_to_the_trace(ranges: list, calls: list, work: list) -> None:
    trace = made(ranges, calls, work)
    total = launch_metrics(Trace(trace, "kineto", trace.height))
    joined = joined_work(trace)
    for by in (*KEYS, "step"):
        table = launch_metrics_by(trace, by, joined)
        for name in ADDITIVE + (OF_CALLS if by not in ("device", "stream") else ()):
            assert table[name].sum() == getattr(total, name), (by, name)
        assert (table["gpu_busy_ns"] + table["gpu_idle_ns"].fill_null(0) == table["gpu_span_ns"].fill_null(0)).all()
        assert table.columns[-len(FIGURES) :] == list(FIGURES)


@settings(max_examples=50)
@given(RANGES, CALLS, WORK)
def test_ranges_hold_the_launches_a_look_at_every_pair_finds(ranges: list, calls: list, work: list) -> None:
    """Kernels by (rank, name) of all ranges around their call, and by the step that began last around it."""
    trace = made(ranges, calls, work)
    in_range: dict[tuple, int] = {}
    in_step: dict[tuple, int] = {}
    n_steps = sum(name == "ProfilerStep#1" for _, _, name, _ in ranges)
    for kind, _, _, link in work:
        if kind != "kernel":
            continue
        at, place = (calls[link][0], calls[link][3]) if link < len(calls) else (None, {"rank": None})
        names = {n for s, d, n, p in ranges if at is not None and p == place and s <= at < s + d} or {None}
        for name in names:
            in_range[place["rank"], name] = in_range.get((place["rank"], name), 0) + 1
        around = [
            (p["thread"] == place["thread"], s, -d)
            for s, d, n, p in ranges
            if n == "ProfilerStep#1" and at is not None and s <= at <= s + d
            and (p["rank"], p["process"]) == (place["rank"], place["process"])
        ]  # fmt: skip
        step = (max(around)[1], -max(around)[2]) if around else (None, None)
        in_step[place["rank"], *step] = in_step.get((place["rank"], *step), 0) + 1
    found = launch_metrics_by(trace, "range").filter(pl.col("n_kernels") > 0)
    assert {(rank, name): n for rank, name, n in found.select("rank", "name", "n_kernels").iter_rows()} == in_range
    if n_steps:
        found = launch_metrics_by(trace, "step").filter(pl.col("n_kernels") > 0)
        by_step = found.group_by("rank", "start_ns", "dur_ns").agg(pl.sum("n_kernels"))
        assert {(rank, start, dur): n for rank, start, dur, n in by_step.iter_rows()} == in_step


@pytest.mark.parametrize("row", golden_rows("kineto_golden.csv"), ids=lambda row: row["file"])
def test_groups_of_real_traces_add_up(shared: Path, row: dict[str, str]) -> None:
    trace = read_trace(shared / "traces" / row["file"])
    total, joined = launch_metrics(trace), joined_work(trace.events)
    for by in GROUPINGS:
        table = launch_metrics_by(trace.events, by, joined)
        for name in ADDITIVE if by != "range" else ():
            assert table[name].sum() == getattr(total, name), (by, name)
    n_steps = trace.events.filter(pl.col("name").cast(pl.String).str.starts_with("ProfilerStep#")).height
    assert steps(trace.events).height >= n_steps


def test_two_ranks_in_one_trace_are_what_they_are_apart(shared: Path) -> None:
    """Same process, device and stream numbers; links of the second rank moved, as where ranks are read together."""
    paths = sorted((shared / "traces").glob("hta__trace_filter__sampled_rank-*"))
    apart = [read_trace(path).events for path in paths]
    both = pl.concat([e.with_columns(pl.col("link") + i * 2**32) for i, e in enumerate(apart)])
    for by in GROUPINGS:
        expected = pl.concat([launch_metrics_by(e, by) for e in apart])
        found = launch_metrics_by(both, by).sort("rank", maintain_order=True)
        assert found.equals(expected), by
    assert launch_metrics_by(both, "device")["rank"].to_list() == [0, 1]

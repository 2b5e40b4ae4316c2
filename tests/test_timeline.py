"""A window of a trace as lines and bars: nothing is lost, nothing is counted twice, never too many."""

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import InputError
from perfmodel.intervals import busy_ns
from perfmodel.readers import read_trace
from perfmodel.timeline import MAX_BARS, MAX_DEPTH, step_windows, timeline, typical_step, whole_window
from tests.traces_made import events, kernel, launch

HOSTILE = "<b onclick=x>gemm<bf16></b> [x](javascript:y)"
LEAST = 48  # one for each line that can be


def op(start_ns: int, dur_ns: int, name: str = "aten::mm", kind: str = "op", **more) -> dict:
    return {"kind": kind, "name": name, "start_ns": start_ns, "dur_ns": dur_ns, **more}


def test_a_few_events_are_bars_of_their_own_on_lines_from_the_host_down_to_the_streams() -> None:
    table = events(
        op(0, 100, "ProfilerStep#1", "range"),
        op(10, 30),
        launch(20, 7, 5),
        kernel(50, 20, link=7, name="ampere_sgemm_128"),
        {"kind": "copy", "name": "Memcpy HtoD", "start_ns": 90, "dur_ns": 5, "stream": 8, "device": 0},
    )
    found = timeline(table, 0, 100)
    assert found.lines.select("family", "line", "lane").rows() == [
        ("host", 1, 0), ("host", 1, 1), ("calls", 1, 0), ("stream", 7, 0), ("stream", 8, 0),
    ]  # fmt: skip
    assert found.bars.select("row", "start_ns", "end_ns", "what", "name", "n_events", "busy_ns").rows() == [
        (0, 0, 100, "range", "ProfilerStep#1", 1, 100),
        (1, 10, 40, "operator", "aten::mm", 1, 30),
        (2, 20, 25, "launch call", "cudaLaunchKernel", 1, 5),
        (3, 50, 70, "gemm", "ampere_sgemm_128", 1, 20),
        (4, 90, 95, "copy or set", "Memcpy HtoD", 1, 5),
    ]
    assert found.delays.select("from_row", "from_ns", "to_row", "to_ns", "delay_ns").rows() == [(2, 20, 3, 50, 30)]
    assert (found.grain_ns, found.notes) == (0, ())


def test_what_began_before_the_window_or_ends_behind_it_is_cut_there() -> None:
    table = events(kernel(0, 50), kernel(60, 100), kernel(200, 5), kernel(10, 10, stream=9))
    found = timeline(table, 40, 100)
    assert found.bars.select("start_ns", "end_ns", "busy_ns").rows() == [(40, 50, 10), (60, 100, 40)]


def test_short_neighbours_become_one_bar_named_by_what_takes_most_time_and_a_long_one_stays_alone() -> None:
    short = [kernel(10 * i, 4 if i % 2 else 6, name="sgemm" if i % 2 else "softmax_fwd") for i in range(100)]
    found = timeline(events(*short, kernel(2000, 1000, name="flash_fwd")), 0, 3000, max_bars=LEAST)
    assert found.bars.height <= LEAST
    assert found.bars["n_events"].sum() == 101
    assert found.bars["busy_ns"].sum() == 50 * 4 + 50 * 6 + 1000
    assert found.bars.row(-1, named=True)["name"] == "flash_fwd"
    merged = found.bars.filter(pl.col("n_events") > 1)
    assert merged["name"].null_count() == merged.height > 0
    assert "101 events are drawn as" in found.notes[0]


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 10_000), st.integers(0, 400), st.integers(0, 3), st.sampled_from(["kernel", "op"])),
        min_size=1,
        max_size=400,
    ),
    st.integers(0, 6000),
    st.integers(1, 6000),
)
def test_the_busy_time_of_every_line_is_kept_and_there_are_never_too_many_bars(rows, start_ns, length_ns) -> None:
    made = [
        kernel(at, dur, stream=line) if kind == "kernel" else op(at, dur, thread=line) for at, dur, line, kind in rows
    ]
    end_ns = start_ns + length_ns
    found = timeline(events(*made), start_ns, end_ns, max_bars=LEAST)
    every = timeline(events(*made), start_ns, end_ns, max_bars=10**6)
    assert found.bars.height <= LEAST
    assert every.grain_ns == 0
    assert found.bars["n_events"].sum() == every.bars["n_events"].sum()
    assert (found.bars["start_ns"] >= start_ns).all() and (found.bars["end_ns"] <= end_ns).all()
    drawn = every.bars.select("row", "start_ns", dur_ns=pl.col("end_ns") - pl.col("start_ns")).cast(pl.Int64)
    union = busy_ns(drawn, ["row"]).select("row", "busy_ns").rows()
    for bars in (found.bars, every.bars):
        assert bars.group_by("row").agg(pl.sum("busy_ns")).sort("row").cast(pl.Int64).rows() == union


def test_the_deepest_ranges_the_idlest_threads_and_streams_are_left_out_and_it_is_said() -> None:
    nested = [op(i, 100 - 2 * i, f"r{i}", "range") for i in range(MAX_DEPTH + 2)]
    threads = [op(0, 10 + i, thread=10 + i) for i in range(8)]
    streams = [kernel(0, 10 + i, stream=i) for i in range(20)]
    found = timeline(events(*nested, *threads, *streams), 0, 100)
    assert found.notes == (
        f"not drawn: 2 of the ranges and operators, in more than {MAX_DEPTH} others",
        "6 of 9 threads are drawn: those that launch or do most",
        "12 of 20 streams are drawn: those that are busiest",
    )
    assert set(found.lines.filter(pl.col("family") == "stream")["line"]) == set(range(8, 20))
    assert set(found.lines.filter(pl.col("family") == "host")["line"]) == {1, 13, 14, 15, 16, 17}


def test_a_window_of_a_step_reaches_to_the_end_of_the_work_that_it_launched() -> None:
    table = events(
        op(0, 10, "ProfilerStep#0", "range"),
        op(10, 30, "ProfilerStep#1", "range"),
        op(40, 10, "ProfilerStep#2", "range"),
        launch(12, 1),
        kernel(60, 20, link=1),
        launch(41, 2),
        kernel(42, 2, link=2),
    )
    windows = step_windows(table)
    assert windows.select("name", "start_ns", "end_ns").rows() == [
        ("ProfilerStep#0", 0, 10), ("ProfilerStep#1", 10, 80), ("ProfilerStep#2", 40, 50),
    ]  # fmt: skip
    assert typical_step(windows) in (0, 2)  # of length 10, 70, 10 the median
    assert step_windows(events(kernel(0))).is_empty()


def test_the_delays_drawn_are_the_longest_of_each_part_of_the_window_and_of_the_first_kernel_of_a_launch() -> None:
    calls = [launch(10 * i, i) for i in range(120)]
    work = [kernel(10 * i + 1 + 7 * i % 10, link=i) for i in range(120)] + [kernel(1190, link=0)]
    found = timeline(events(*calls, *work), 0, 1200)
    assert found.delays["delay_ns"].to_list() == [10] * 12
    assert found.delays["from_ns"].to_list() == [10 * i for i in range(7, 120, 10)]


def test_names_from_files_stay_as_they_are() -> None:
    found = timeline(events(kernel(0, 10, name=HOSTILE), op(0, 10, HOSTILE)), 0, 10)
    assert found.bars["name"].to_list() == [HOSTILE, HOSTILE]


def test_communication_of_the_host_is_told_apart() -> None:
    found = timeline(events(op(0, 10, "gloo:all_to_all", "range")), 0, 10)
    assert found.bars["what"].to_list() == ["communication of the host"]


def test_windows_and_limits_that_make_no_sense_are_refused() -> None:
    table = events(kernel(0))
    with pytest.raises(InputError, match="an empty window"):
        timeline(table, 5, 5)
    with pytest.raises(InputError, match="at least 48"):
        timeline(table, 0, 5, max_bars=3)
    with pytest.raises(InputError, match="no events"):
        whole_window(table.clear())
    assert whole_window(table) == (0, 1)


@pytest.mark.parametrize(
    "name",
    [
        "tracelens__vllm_decode_full__graph_execution.json.gz",
        "tracelens__h100__google_owlv2-large-patch14-ensemble__1016001.json.gz",
        "tracelens__b200__eager_trace.json.gz",
        "hta__amd_trace__mi250_minitoy_train_ROCm6_2_kineto.json.gz",
        "hta__cpu_only__rank-34.Jul_15_10_52_41.1074.pt.trace.json.gz",
        "nsysai__h100_2gpu_1s.sqlite",
    ],
)
def test_real_traces_keep_the_busy_time_of_their_streams(shared, name: str) -> None:
    table = read_trace(shared / "traces" / name).events
    found = timeline(table, *whole_window(table))
    assert 0 < found.bars.height <= MAX_BARS
    work = table.filter(pl.col("kind").is_in(["kernel", "copy", "set", "replay"]))
    union = busy_ns(work, ["rank", "device", "stream"])["busy_ns"].sum()
    streams = found.lines.with_row_index("row").filter(pl.col("family") == "stream").select("row")
    assert found.bars.join(streams, on="row")["busy_ns"].sum() == union


def test_a_graph_whose_first_kernel_began_before_its_call_has_no_delay_to_draw() -> None:
    table = events(
        launch(100, 1), kernel(90, 5, link=1), kernel(400, 5, link=1), launch(150, 2), kernel(160, 5, link=2)
    )
    assert timeline(table, 0, 1000).delays.select("from_ns", "delay_ns").rows() == [(150, 10)]

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.classify import classify
from perfmodel.copies import copies
from perfmodel.findings import MANY_KERNELS, SIGNIFICANT_FRAC, Finding, findings, gap_causes
from perfmodel.hardware import hardware
from perfmodel.launch import joined_work, launch_metrics
from perfmodel.overlap import exposed_time
from perfmodel.readers import read_trace
from perfmodel.trace import Trace
from tests.traces_made import events, golden_rows, kernel, launch

MS = 1_000_000


def found(table: pl.DataFrame, machine: str | None = None, n_most: int = 9) -> dict[str, Finding]:
    trace, work = Trace(table, "kineto", table.height), joined_work(table)
    work = work.with_columns(pl.when(pl.col("kind") == "kernel").then(classify(work["name"])).alias("class"))
    profile = hardware(machine) if machine else None
    tables = copies(table), exposed_time(table)
    return {f.name: f for f in findings(table, work, launch_metrics(trace), *tables, profile, n_most)}


def test_gaps_are_split_by_what_the_host_did_worked_out_by_hand() -> None:
    table = events(
        {"kind": "range", "name": "ProfilerStep#1", "start_ns": 0, "dur_ns": 1000},
        {"kind": "op", "name": "aten::item", "start_ns": 100, "dur_ns": 200},
        launch(0, link=1),
        launch(350, link=2),
        launch(20, link=3),
        kernel(10, 90, link=1),  # 10-100
        kernel(400, 100, link=2),  # called at 350: 250 late, 50 launching; the host is in aten::item in the middle
        kernel(600, 100, link=3),  # called long ago: waited 100 for something else
        kernel(750, 50, link=99),  # nobody's
        {"kind": "set", "start_ns": 900, "dur_ns": 100, "device": 1},  # alone on its device: no gap
    )
    rows = gap_causes(table, joined_work(table)).sort("start_ns")
    assert rows.drop("rank", "device", "ended_by").rows() == [
        (100, 300, 250, 50, 0, "aten::item"),
        (500, 100, 0, 0, 100, None),
        (700, 50, None, None, None, None),
    ]


LINK = st.none() | st.integers(0, 5)
CALLS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 5)), max_size=6)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 60), st.integers(0, 9), LINK), max_size=12), CALLS)
def test_idle_parts_add_up(work: list[tuple], calls: list[tuple[int, int]]) -> None:
    rows = [kernel(start, dur, device=device, link=link) for device, start, dur, link in work]
    table = events(*rows, *(launch(at, link=link) for at, link in calls), {"kind": "op", "start_ns": 0})
    gaps, metrics = gap_causes(table, joined_work(table)), launch_metrics(Trace(table, "kineto", 1))
    assert gaps["dur_ns"].sum() == (metrics.gpu_span_ns or 0) - metrics.gpu_busy_ns
    known = gaps.drop_nulls("late_ns")
    assert (known["late_ns"] + known["launching_ns"] + known["waiting_ns"]).equals(known["dur_ns"], check_names=False)
    assert known.filter(pl.any_horizontal(pl.col("late_ns", "launching_ns", "waiting_ns") < 0)).is_empty()


def test_a_host_that_synchronises_is_told_to_stop_waiting() -> None:
    step = [
        row
        for i in range(10)
        for row in (
            {"kind": "sync", "name": "cudaStreamSynchronize", "start_ns": i * MS + 110_000, "dur_ns": 800_000},
            launch(i * MS, link=i),
            kernel(i * MS + 5000, 100_000, link=i, name="gemm"),
        )
    ]
    idle = found(events(*step))["host_bound"]
    assert idle.explained_ns == 9 * 900_000
    assert idle.explained_frac == pytest.approx(9 * 900_000 / (9 * MS + 100_000))
    assert "cudaStreamSynchronize" in idle.words and "synchronisations out of the loop" in idle.advice


def test_a_host_that_is_late_in_many_places_is_not_blamed_for_one() -> None:
    """Nine gaps, each in an operator of its own; a step that holds them all says nothing."""
    rows = [{"kind": "range", "name": "ProfilerStep#3", "start_ns": 0, "dur_ns": 10 * MS}]
    for i in range(10):
        rows.append({"kind": "op", "name": f"aten::op{i}", "start_ns": i * MS + 1000, "dur_ns": MS - 2000})
        rows += [launch(i * MS, link=i), kernel(i * MS + 5000, 100_000, link=i, name="gemm")]
    words = found(events(*rows))["host_bound"].words
    assert words.endswith("of that the host had not launched the next work")
    only_steps = events(*(row for row in rows if row["kind"] != "op"))
    assert ", longest between recorded calls (" in found(only_steps)["host_bound"].words


def test_work_that_was_launched_and_waited_is_not_the_hosts_fault() -> None:
    rows = [row for i in range(10) for row in (launch(i, link=i), kernel(i * MS, MS // 2, link=i, name="gemm"))]
    told = found(events(*rows))
    assert "host_bound" not in told and told["launched_but_waiting"].explained_ns == 9 * MS // 2
    assert "for 100.0 % of that the next work had been launched and waited" in told["launched_but_waiting"].words


def test_a_queue_makes_the_device_the_bound_and_graph_kernels_do_not_count() -> None:
    rows = [row for i in range(10) for row in (launch(i * 1000, link=i), kernel(i * MS, MS, link=i, name="gemm"))]
    told = found(events(*rows))
    assert list(told) == ["dominant_class", "device_bound"]
    assert told["device_bound"].explained_ns == 9 * MS - 10_000 - 1000  # from 10 us behind the second call on
    assert "gemm kernels filled 100.0 %" in told["dominant_class"].words
    replay = [launch(0, link=1, name="cudaGraphLaunch"), *(kernel(i * MS, MS, link=1) for i in range(10))]
    told = found(events(*replay))
    assert "device_bound" not in told
    assert told["graphs"].explained_ns == 10 * MS and "1 graph launch call:" in told["graphs"].words


def test_kernels_that_queue_behind_copies_are_not_what_to_make_faster() -> None:
    copy = {"kind": "copy", "name": "Memcpy HtoD (Pinned -> Device)", "start_ns": 0, "dur_ns": 9 * MS}
    told = found(events(copy, launch(0, link=1), kernel(9 * MS, MS, link=1, name="gemm")))
    assert list(told) == ["exposed_copies", "link_bound"]
    assert "queued behind copies and sets (90.0 % of busy time)" in told["link_bound"].words


def test_graph_replays_recorded_as_a_whole_hide_kernels() -> None:
    table = events({"kind": "replay", "start_ns": 0, "dur_ns": 3 * MS, "device": 0}, kernel(3 * MS, MS, name="gemm"))
    told = found(table)["hidden_graphs"]
    assert told.explained_ns == 3 * MS
    assert "1 CUDA graph replay filled 75.0 % of the devices' time" in told.words and "node" in told.advice


def test_copies_that_nothing_hides_are_compared_with_the_link() -> None:
    copy = {"kind": "copy", "start_ns": 0, "dur_ns": 4 * MS, "bytes": 8_000_000}
    hidden = kernel(0, 1 * MS, stream=8, name="gemm")
    table = events({**copy, "name": "Memcpy HtoD (Pageable -> Device)"}, hidden, kernel(4 * MS, MS, name="gemm"))
    told = found(table, "h100-pcie")["exposed_copies"]
    assert told.explained_ns == 3 * MS
    assert "1 of 8.00 MB in all at 2.00 GB/s, where the link of h100-pcie does 55.6 GB/s" in told.words
    assert "pin the host memory" in told.advice
    assert "link" not in found(table)["exposed_copies"].words
    pinned = events({**copy, "name": "Memcpy HtoD (Pinned -> Device)"}, kernel(4 * MS, MS))
    assert "stream of its own" in found(pinned)["exposed_copies"].advice


def test_communication_counts_where_no_computation_hides_it() -> None:
    table = events(
        kernel(0, 4 * MS, name="ncclDevKernel_AllReduce"),
        kernel(3 * MS, 3 * MS, stream=8, name="gemm"),
        kernel(6 * MS, MS, name="gemm"),
    )
    told = found(table)
    assert told["exposed_communication"].explained_ns == 3 * MS
    assert (
        "took 4.00 ms, of which 3.00 ms lay beside no computation (25.0 % hidden)"
        in told["exposed_communication"].words
    )


def test_many_small_kernels_are_worth_what_fusing_them_saves_of_idle_time() -> None:
    rows = [
        row
        for i in range(MANY_KERNELS)
        for row in (launch(i * 10_000, link=i), kernel(i * 10_000 + 1000, 1000, link=i, name="ab"[i % 2]))
    ]
    told = found(events(*rows))["small_kernels"]
    assert "fusing chains of 2 that always repeat would leave 25 launches, 2.00x" in told.words
    assert told.explained_ns == 49 * 9000 // 2  # half of the idle time, as half of the launches


def test_a_few_small_kernels_or_a_few_of_graphs_are_not_worth_a_sentence() -> None:
    rows = []
    for i in range(MANY_KERNELS):
        name = "cudaGraphLaunch" if i % 5 == 0 else "cudaLaunchKernel"
        dur_ns, start = 1000 if i % 5 == 1 else 10_000, i * 20_000
        rows += [launch(start, link=i, name=name), kernel(start + 1000, dur_ns, link=i, name="ab"[i % 2])]
    told = found(events(*rows))
    assert "host_bound" in told and not {"small_kernels", "graphs"} & set(told)


def test_there_are_as_many_findings_as_are_true() -> None:
    assert found(events({"kind": "op", "start_ns": 1})) == {}
    quiet = events(*(kernel(i * MS, MS, name=name) for i, name in enumerate(("gemm", "flash", "softmax", "relu"))))
    assert found(quiet) == {}
    assert len(found(events(kernel(0, MS, name="gemm"), kernel(3 * MS, MS, name="gemm")), n_most=1)) == 1


ANY_WORK = st.tuples(st.sampled_from(["kernel", "copy", "set"]), st.integers(0, 60), st.integers(0, 9), LINK)


@given(st.lists(ANY_WORK, max_size=12), CALLS)
def test_no_trace_is_too_odd(work: list[tuple], calls: list[tuple[int, int]]) -> None:
    rows = [
        {"kind": kind, "start_ns": start, "dur_ns": dur, "device": 0, "link": link} for kind, start, dur, link in work
    ]
    told = found(events(*rows, *(launch(at, link=link) for at, link in calls), {"kind": "op", "start_ns": 0}))
    assert all(SIGNIFICANT_FRAC <= finding.explained_frac <= 1 for finding in told.values())


@pytest.mark.parametrize("row", golden_rows("kineto_golden.csv"), ids=lambda row: row["file"])
def test_on_real_traces_findings_are_ordered_true_parts(row: dict[str, str], shared: Path) -> None:
    trace = read_trace(shared / "traces" / row["file"])
    told = list(found(trace.events).values())
    fractions = [finding.explained_frac for finding in told]
    assert fractions == sorted(fractions, reverse=True)
    assert all(SIGNIFICANT_FRAC <= part <= 1 for part in fractions)
    assert all("None" not in finding.words and len(finding.words) < 400 for finding in told)

import json
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.errors import InputError
from perfmodel.launch import (
    FIGURES,
    by_host_name,
    by_kernel,
    by_launch_call,
    joined_kernels,
    joined_work,
    launch_metrics,
)
from perfmodel.readers import read_trace
from perfmodel.trace import DEVICE_KINDS, Trace
from tests.traces_made import events, golden_rows, kernel, launch

# Synthetic, worked out by hand: two devices, a plain launch, a graph of two kernels, an orphan, a copy and a set.
BY_HAND = events(
    {"kind": "op", "start_ns": 0, "dur_ns": 50},
    launch(10, link=1),
    launch(20, link=2, name="cudaGraphLaunch"),
    kernel(15, 10, link=1),  # 15-25, delay 5
    kernel(40, 20, link=2),  # 40-60, delay 20, first of its graph
    kernel(50, 30, link=2, stream=8),  # 50-80, delay 30, overlaps 10
    kernel(5, 5, link=99, device=1),  # 5-10, orphan
    {"kind": "copy", "start_ns": 70, "dur_ns": 20},  # 70-90, overlaps 10
    {"kind": "set", "start_ns": 30, "dur_ns": 5, "device": 1},
)


def test_metrics_worked_out_by_hand() -> None:
    found = launch_metrics(Trace(BY_HAND, "kineto", 12)).to_json()
    assert found == {
        "source": "kineto", "n_events": 12, "n_launches": 2,
        "n_kernels": 4, "n_kernels_joined": 3, "n_kernels_orphan": 1, "n_kernels_graph": 2,
        "tklqt_ns": 55, "tklqt_non_graph_ns": 5, "tklqt_graph_ns": 50, "tklqt_first_kernel_ns": 25,
        "delay_min_ns": 5, "delay_median_ns": 20, "delay_p99_ns": 29.8, "delay_max_ns": 30, "n_negative_delays": 0,
        "n_queued": 3, "queue_ns": 52, "launch_call_ns": 2, "kernel_launch_call_ns": 2,
        "akd_ns": 16.25, "kernel_time_ns": 65, "kernel_busy_ns": 55,
        "gpu_busy_ns": 70, "gpu_span_ns": 105, "gpu_idle_ns": 35, "gpu_idle_frac": 35 / 105, "gpu_idle_eq5_ns": 15,
        "inference_latency_ns": 80,
        "devices": [
            {"rank": None, "device": 0, "n_kernels": 3, "kernel_time_ns": 60, "kernel_busy_ns": 50, "gpu_busy_ns": 60,
             "gpu_span_ns": 75, "gpu_idle_frac": 1 - 60 / 75},
            {"rank": None, "device": 1, "n_kernels": 1, "kernel_time_ns": 5, "kernel_busy_ns": 5, "gpu_busy_ns": 10,
             "gpu_span_ns": 30, "gpu_idle_frac": 1 - 10 / 30},
        ],
    }  # fmt: skip
    assert list(found) == ["source", "n_events", *FIGURES, "devices"]
    assert json.loads(json.dumps(found)) == found


def test_queueing_begins_when_the_call_returns() -> None:
    """Delays 1, 5 and 9 after calls of 5: the first began before its call returned and did not queue."""
    trace = events(*(launch(i * 100, link=i, dur_ns=5) for i in range(3)), launch(400, link=3, dur_ns=7),
                   kernel(1, 20, link=0), kernel(105, 20, link=1), kernel(209, 20, link=2))  # fmt: skip
    found = launch_metrics(Trace(trace, "kineto", 7))
    assert (found.n_queued, found.queue_ns) == (2, 4)
    assert (found.launch_call_ns, found.kernel_launch_call_ns, found.n_launches) == (22, 15, 4)


def test_overlapping_streams_make_the_papers_idle_time_negative() -> None:
    work = [kernel(0, 100, stream=s) for s in range(3)]
    found = launch_metrics(Trace(events({"kind": "op", "start_ns": 0}, *work), "kineto", 4))
    assert (found.inference_latency_ns, found.gpu_idle_eq5_ns, found.gpu_idle_ns) == (100, -200, 0)


def test_what_is_not_defined_is_null() -> None:
    none = launch_metrics(Trace(events({"kind": "op", "start_ns": 0}), "kineto", 1)).to_json()
    null = ("delay_min_ns", "delay_median_ns", "delay_p99_ns", "delay_max_ns", "akd_ns", "gpu_span_ns", "gpu_idle_ns")
    null += ("gpu_idle_frac", "gpu_idle_eq5_ns", "inference_latency_ns")
    assert {key: none[key] for key in FIGURES} == {key: None if key in null else 0 for key in FIGURES}
    assert none["devices"] == []
    no_op = launch_metrics(Trace(events(kernel(5, 5)), "nsys", 1))
    assert (no_op.inference_latency_ns, no_op.gpu_idle_frac) == (None, 0.0)
    assert launch_metrics(Trace(events(kernel(5, 0)), "nsys", 1)).gpu_idle_frac is None
    copies = launch_metrics(Trace(events({"kind": "copy", "start_ns": 1}), "nsys", 1))
    assert (copies.kernel_busy_ns, copies.gpu_busy_ns, copies.akd_ns) == (0, 1, None)


def test_joined_kernels_name_their_call() -> None:
    joined = joined_kernels(BY_HAND)
    assert joined["delay_ns"].to_list() == [5, 20, 30, None]
    assert joined["launch_name"].to_list() == ["cudaLaunchKernel", "cudaGraphLaunch", "cudaGraphLaunch", None]
    assert joined["is_graph"].to_list() == [False, True, True, None]
    assert joined["launch_dur_ns"].to_list() == [1, 1, 1, None]


def test_a_link_used_twice_means_the_latest_call_before_the_kernel() -> None:
    merged = events(
        launch(10, link=1, process=1),
        launch(100, link=1, process=2),
        kernel(30, link=1),
        kernel(120, link=1),
        kernel(100, link=1),
        kernel(5, link=1),  # before both: clocks disagree, so the earliest
    )
    joined = joined_kernels(merged)
    assert joined["start_ns"].to_list() == [30, 120, 100, 5]
    assert joined["launch_start_ns"].to_list() == [10, 100, 100, 10]
    assert joined["delay_ns"].to_list() == [20, 20, 0, -5]
    found = launch_metrics(Trace(merged, "kineto", 6))
    assert (found.n_negative_delays, found.tklqt_ns, found.tklqt_first_kernel_ns) == (1, 35, -5)


def test_costliest_kernels_first() -> None:
    trace = events(
        launch(0, link=1),
        launch(1, link=2),
        kernel(8, 10, link=1, name="short"),
        kernel(25, 30, link=2, name="long"),
        kernel(60, 1, link=9, name="long"),
        kernel(70, 10, link=9, name="orphan"),
    )
    long, orphan, short = (
        ("long", 2, 31, 24, 24, 0.75),
        ("orphan", 1, 10, None, None, None),
        ("short", 1, 10, 8, 8, 0.25),
    )
    assert by_kernel(trace).rows() == [long, orphan, short]
    assert by_kernel(trace, joined_work(trace), "tklqt_frac").rows() == [long, short, orphan]
    with pytest.raises(InputError, match="expected one of n_kernels, time_ns"):
        by_kernel(trace, sort_by="name")


def test_launch_calls_by_name() -> None:
    trace = events(
        launch(0, link=1, dur_ns=4),
        launch(10, link=2, dur_ns=8),
        launch(20, link=3, dur_ns=30, name="cudaGraphLaunch"),
        launch(60, link=4, dur_ns=2, name="cudaMemcpyAsync"),
        {"kind": "sync", "name": "cudaStreamSynchronize", "start_ns": 70, "link": 5},
        kernel(30, link=1),
        *(kernel(50 + i, link=3) for i in range(3)),
        {"kind": "copy", "start_ns": 70, "link": 4},
    )
    assert by_launch_call(trace).rows() == [
        ("cudaGraphLaunch", 1, 30, 30.0, 3, 3.0, 0, 0),
        ("cudaLaunchKernel", 2, 12, 6.0, 1, 0.5, 0, 1),
        ("cudaMemcpyAsync", 1, 2, 2.0, 0, 0.0, 1, 0),
    ]


def test_devices_of_different_ranks_are_different_devices() -> None:
    trace = events(kernel(0, 10, rank=1), kernel(5, 10, rank=0), kernel(7, 10, rank=0), kernel(0, 3, device=1, rank=0))
    found = [(d.rank, d.device, d.gpu_busy_ns) for d in launch_metrics(Trace(trace, "kineto", 4)).devices]
    assert found == [(0, 0, 12), (0, 1, 3), (1, 0, 10)]


SHARED = st.tuples(st.sampled_from([None, 0, 1]), st.integers(0, 9))


@given(st.lists(SHARED, max_size=8), st.lists(SHARED, max_size=8))
def test_the_launch_is_the_latest_call_of_the_link_that_began_before(calls: list[tuple], work: list[tuple]) -> None:
    joined = joined_work(
        events(
            *(launch(at, link=link) for link, at in calls),
            *({"kind": "copy", "start_ns": at, "link": link} for link, at in work),
        )
    )
    expected = []
    for link, start in work:
        starts = [at for other, at in calls if other == link and link is not None]
        before = [at for at in starts if at <= start]
        expected.append(max(before) if before else min(starts, default=None))
    assert joined["launch_start_ns"].to_list() == expected
    assert joined.filter(pl.col("launch_row").is_not_null() != pl.col("delay_ns").is_not_null()).is_empty()


def test_calls_without_a_link_join_nothing() -> None:
    joined = joined_kernels(events(launch(10, link=None), kernel(30, link=None)))
    assert joined["delay_ns"].to_list() == [None]


# --- properties ------------------------------------------------------------------------------------------------------

ANY_WORK = st.tuples(
    st.sampled_from(DEVICE_KINDS),
    st.integers(0, 1),
    st.integers(0, 60),
    st.integers(0, 9),
    st.none() | st.integers(0, 5),
)
CALL = st.tuples(st.integers(0, 60), st.integers(0, 5))


@given(st.lists(ANY_WORK, min_size=1, max_size=20), st.lists(CALL, max_size=8))
def test_parts_add_up(work: list[tuple], calls: list[tuple[int, int]]) -> None:
    """Busy + idle = span, joined + orphan = kernels, devices sum to the total, and each kernel is counted once."""
    rows = [{"kind": k, "device": d, "start_ns": s, "dur_ns": n, "link": link} for k, d, s, n, link in work]
    trace = Trace(events(*rows, *(launch(at, link=link) for at, link in calls)), "kineto", 99)
    found = launch_metrics(trace)
    assert (
        found.n_kernels_joined + found.n_kernels_orphan == found.n_kernels == sum(r["kind"] == "kernel" for r in rows)
    )
    assert found.gpu_busy_ns <= (found.gpu_span_ns or 0)
    assert found.kernel_busy_ns <= min(found.kernel_time_ns, found.gpu_busy_ns)
    if found.gpu_span_ns:
        assert found.gpu_idle_frac is not None
        assert found.gpu_busy_ns + found.gpu_idle_frac * found.gpu_span_ns == pytest.approx(found.gpu_span_ns)
    for key in ("n_kernels", "kernel_time_ns", "kernel_busy_ns", "gpu_busy_ns"):
        assert sum(getattr(device, key) for device in found.devices) == getattr(found, key)


# --- real traces -----------------------------------------------------------------------------------------------------

KINETO_COUNTS = {
    "n_events": "events",
    "n_kernels": "kernels",
    "n_kernels_joined": "kernels_joined",
    "n_kernels_orphan": "kernels_unlinked",
    "n_kernels_graph": "kernels_joined_via_graph",
    "n_negative_delays": "launch_delay_negative",
}
KINETO_TIMES = {
    "tklqt_ns": "TKLQT_us",
    "tklqt_graph_ns": "TKLQT_graph_us",
    "tklqt_first_kernel_ns": "TKLQT_first_kernel_per_launch_us",
    "kernel_time_ns": "kernel_dur_sum_us",
    "kernel_busy_ns": "kernel_busy_union_us",
    "gpu_busy_ns": "gpu_busy_union_us",
    "gpu_span_ns": "gpu_span_us",
    "gpu_idle_ns": "gpu_idle_in_span_us",
    "tklqt_non_graph_ns": "TKLQT_nongraph_us",
    "kernel_launch_call_ns": "launch_api_dur_sum_us",
    "queue_ns": "queue_after_api_end_sum_us",
    "delay_min_ns": "launch_delay_min_us",
    "delay_max_ns": "launch_delay_max_us",
}


def exact_ns(us: str) -> int | None:
    return int(Decimal(us) * 1000) if us else None


@pytest.mark.parametrize("row", golden_rows("kineto_golden.csv"), ids=lambda row: row["file"])
def test_kineto_golden(shared: Path, row: dict[str, str]) -> None:
    trace = read_trace(shared / "traces" / row["file"])
    found = launch_metrics(trace).to_json()
    expected = {key: int(row[column]) for key, column in KINETO_COUNTS.items()}
    expected |= {key: exact_ns(row[column]) for key, column in KINETO_TIMES.items()}
    assert {key: found[key] for key in expected} == expected
    for key in ("median", "p99"):
        expected_us = float(row[f"launch_delay_{key}_us"]) if row[f"launch_delay_{key}_us"] else None
        found_ns = found[f"delay_{key}_ns"]
        assert expected_us == (None if found_ns is None else pytest.approx(found_ns / 1000, abs=6e-4))
    assert (trace.n_dropped, trace.n_repaired) == (0, 0)
    assert len(found["devices"]) == int(row["devices"])
    assert trace.of_kind("copy").height == int(row["memcpy"])
    assert trace.of_kind("set").height == int(row["memset"])
    assert trace.of_kind("launch", "sync", "call").height == int(row["runtime_events"]) + int(row["driver_events"])
    first = joined_kernels(trace.events).filter(pl.col("delay_ns").is_not_null()).unique("link")
    assert first.height == int(row["distinct_launches_joined"])
    assert set(first["launch_name"]) == {part.split(":")[0] for part in row["launch_api_names"].split(";") if part}


@pytest.mark.parametrize("row", golden_rows("nsys_golden.csv"), ids=lambda row: row["file"])
def test_nsys_golden(shared: Path, row: dict[str, str]) -> None:
    trace = read_trace(shared / "traces" / row["file"])
    found = launch_metrics(trace)
    assert found.n_events == sum(int(row[table]) for table in ("kernels", "runtime", "memcpy", "memset", "nvtx"))
    assert (found.n_kernels, found.n_kernels_joined) == (int(row["kernels"]), int(row["kernels_joined"]))
    assert (found.n_kernels_orphan, found.n_kernels_graph) == (int(row["kernels_unlinked"]), 0)
    assert (found.tklqt_ns, found.kernel_time_ns) == (int(row["TKLQT_ns"]), int(row["kernel_dur_sum_ns"]))
    assert found.akd_ns == pytest.approx(float(row["AKD_ns"]), abs=1e-3)
    for key in ("kernel_busy", "gpu_busy", "gpu_span"):
        column = f"{key}_union_ns_per_device" if key != "gpu_span" else "gpu_span_ns_per_device"
        per_device = {int(part.split(":")[0]): int(part.split(":")[1]) for part in row[column].split(";")}
        assert {device.device: getattr(device, f"{key}_ns") for device in found.devices} == per_device
        assert getattr(found, f"{key}_ns") == sum(per_device.values())
    assert (found.delay_min_ns, found.delay_max_ns) == (
        int(row["launch_delay_min_ns"]),
        int(row["launch_delay_max_ns"]),
    )
    delays = joined_kernels(trace.events)["delay_ns"].drop_nulls().sort()
    assert delays[len(delays) // 2] == float(row["launch_delay_median_ns"])  # there the upper of two in the middle
    assert found.delay_median_ns == (delays[len(delays) // 2] + delays[(len(delays) - 1) // 2]) / 2
    assert (found.n_queued, found.queue_ns) == (int(row["QCount"]), int(row["queue_dur_sum_ns"]))
    assert found.kernel_launch_call_ns == int(row["api_dur_sum_ns"])
    assert found.n_negative_delays == int(row["launch_delay_negative"])
    assert (found.inference_latency_ns, found.gpu_idle_eq5_ns) == (None, None)


def test_host_time_by_name_counts_ranges_without_their_circumstances() -> None:
    table = by_host_name(
        events(
            {"kind": "range", "name": "layer|tokens=4", "start_ns": 0, "dur_ns": 5},
            {"kind": "range", "name": "layer|tokens=8", "start_ns": 9, "dur_ns": 7},
            {"kind": "op", "name": "aten::mm", "start_ns": 1, "dur_ns": 50},
        ),
        "range",
    )
    assert table.rows() == [("layer", 2, 12)]

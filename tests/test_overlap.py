from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.analysis import analyse
from perfmodel.classify import read_rules
from perfmodel.launch import joined_work, launch_metrics
from perfmodel.overlap import device_doing, exposed_time, idle_gaps, launch_gaps
from perfmodel.readers import read_trace
from perfmodel.trace import Trace
from tests.traces_made import events, golden_rows, kernel, launch

DISPATCH = "void dpsk::ep::internode::dispatch<false, 1, false, 5120>(...)"
NAMES = {"compute": "volta_sgemm_64x64_nt", "communication": DISPATCH, "copy": "Memcpy HtoD (Pinned -> Device)"}


def copy(start_ns: int, dur_ns: int, **more: object) -> dict:
    return {"kind": "copy", "name": NAMES["copy"], "start_ns": start_ns, "dur_ns": dur_ns, **more}


def test_hidden_and_exposed_by_hand() -> None:
    """Compute 0-100; a copy 90-130 on another stream and one 10-20; communication 50-60 and 200-220."""
    trace = events(
        kernel(0, 100, name=NAMES["compute"]),
        copy(90, 40, stream=8),
        copy(10, 10, stream=8),
        kernel(50, 10, name=DISPATCH, stream=9),
        kernel(200, 20, name="ncclDevKernel_SendRecv(...)", stream=9),
        {"kind": "set", "start_ns": 120, "dur_ns": 50},
        {"kind": "op", "name": "volta_sgemm_op", "start_ns": 0, "dur_ns": 999},
        {"kind": "sync", "name": "cudaStreamSynchronize", "start_ns": 0, "dur_ns": 999},
    )
    assert exposed_time(trace).row(0, named=True) == {
        "rank": None, "device": 0, "compute_busy_ns": 100,
        "copy_busy_ns": 50, "copy_exposed_ns": 30, "copy_hidden_ns": 20,
        "communication_busy_ns": 30, "communication_exposed_ns": 20, "communication_hidden_ns": 10,
    }  # fmt: skip


def test_kernels_with_which_a_runtime_copies_and_fills_compute_nothing() -> None:
    """Compute 0-100; the runtime copies 90-130 and 140-150 and fills 150-190; a framework's copy 200-210 computes."""
    made = events(
        kernel(0, 100, name="Cijk_gemm"),
        kernel(90, 40, name="__amd_rocclr_copyBuffer.kd", stream=8),
        kernel(140, 10, name="__amd_rocclr_copyBufferRectAligned", stream=8),
        kernel(150, 40, name="__amd_rocclr_fillBufferAligned", stream=8),
        kernel(200, 10, name="direct_copy_kernel_cuda"),
    )
    found = exposed_time(made).row(0, named=True)
    assert (found["compute_busy_ns"], found["copy_busy_ns"], found["copy_exposed_ns"]) == (110, 50, 40)
    table = analyse(Trace(made, "kineto", 5))
    assert table.metrics.n_kernels == 5 and table.copies.is_empty()
    assert [f.explained_ns for f in table.findings if f.name == "exposed_copies"] == [40]


def test_all_to_all_kernels_communicate() -> None:
    """As in DeepSeek's published trace: 36 all-to-all kernels on a stream of their own, 96.31 % under compute.

    Communication 113,440 us, compute 124,310 us, together 128,500 us: 4,190 us exposed.
    """
    us = 1000
    compute = [kernel(0, 124_310 * us, name="fp8_gemm", stream=7)]
    durations = [3_151 * us] * 35 + [3_155 * us]
    starts = [128_500 * us - sum(durations[i:]) for i in range(36)]
    comm = [kernel(s, d, name=DISPATCH, stream=27) for s, d in zip(starts, durations, strict=True)]
    found = exposed_time(events(*compute, *comm)).row(0, named=True)
    assert (found["communication_busy_ns"], found["compute_busy_ns"]) == (113_440 * us, 124_310 * us)
    assert (found["communication_hidden_ns"], found["communication_exposed_ns"]) == (109_250 * us, 4_190 * us)
    other = read_rules('[[rule]]\nclass = "gemm"\npattern = "dispatch"')
    assert exposed_time(events(*compute, *comm), other)["communication_busy_ns"].to_list() == [0]


def test_devices_of_ranks_hide_nothing_of_each_other() -> None:
    trace = events(kernel(0, 100, name="gemm", rank=0), copy(0, 100, rank=1), copy(0, 100, rank=0, device=1))
    assert exposed_time(trace).select("rank", "device", "copy_exposed_ns").rows() == [
        (0, 0, 0),
        (0, 1, 100),
        (1, 0, 100),
    ]
    assert exposed_time(events({"kind": "op", "start_ns": 0})).is_empty()


WORK = st.lists(
    st.tuples(st.sampled_from(list(NAMES)), st.integers(0, 1), st.integers(0, 40), st.integers(0, 12)), max_size=14
)
CALLS = st.lists(
    st.tuples(st.sampled_from(["launch", "sync"]), st.integers(0, 60), st.integers(0, 15), st.integers(1, 2)),
    max_size=6,
)


@given(WORK)
def test_exposed_time_is_counted_moment_by_moment(work: list[tuple[str, int, int, int]]) -> None:
    rows = [
        {"kind": "copy" if doing == "copy" else "kernel", "name": NAMES[doing], "device": v, "start_ns": s, "dur_ns": d}
        for doing, v, s, d in work
    ]
    table = exposed_time(events(*rows))
    assert table.height == len({v for _, v, _, _ in work})
    for row in table.iter_rows(named=True):
        at = {
            what: {t for doing, v, s, d in work if (doing, v) == (what, row["device"]) for t in range(s, s + d)}
            for what in NAMES
        }
        assert row["compute_busy_ns"] == len(at["compute"])
        for what in ("copy", "communication"):
            assert row[f"{what}_exposed_ns"] == len(at[what] - at["compute"])
            assert row[f"{what}_hidden_ns"] == len(at[what] & at["compute"])
            assert row[f"{what}_busy_ns"] == len(at[what])


def test_gaps_say_what_the_host_did() -> None:
    """Gaps 10-50 (launch 15-35, of it 5 while another thread syncs), 60-100 (sync 70-95) and 110-150 (nothing)."""
    trace = events(
        *(kernel(s, 10, link=i) for i, s in enumerate((0, 50, 100, 150))),
        launch(15, 1, dur_ns=20),
        {"kind": "sync", "start_ns": 30, "dur_ns": 10, "thread": 2},
        {"kind": "sync", "start_ns": 70, "dur_ns": 25},
        {"kind": "sync", "start_ns": 110, "dur_ns": 40, "process": 9},
    )
    assert idle_gaps(trace).rows() == [
        (None, 0, 10, 40, 20, 5, 15, "launch"),
        (None, 0, 60, 40, 0, 25, 15, "sync"),
        (None, 0, 110, 40, 0, 0, 40, "neither"),
    ]
    assert launch_gaps(trace).row(0, named=True) == {
        "rank": None, "device": 0, "n_gaps": 3, "gap_ns": 120, "longest_gap_ns": 40,
        "n_launch_gaps": 1, "launch_ns": 20, "n_sync_gaps": 1, "sync_ns": 30, "n_neither_gaps": 1, "neither_ns": 70,
    }  # fmt: skip


def test_a_device_whose_launches_are_unknown_says_nothing_of_its_host() -> None:
    trace = events(kernel(0, 10), kernel(30, 10), kernel(0, 5, device=1), launch(0, link=5))
    assert idle_gaps(trace).rows() == [(None, 0, 10, 20, None, None, None, None)]
    assert launch_gaps(trace).select(
        "device", "n_gaps", "gap_ns", "longest_gap_ns", "n_sync_gaps", "sync_ns"
    ).rows() == [
        (0, 1, 20, 20, None, None),
        (1, 0, 0, None, None, None),
    ]


@given(WORK, CALLS)
def test_gaps_are_counted_moment_by_moment(work: list, calls: list) -> None:
    rows = [{"kind": "kernel", "device": v, "start_ns": s, "dur_ns": d, "link": v} for _, v, s, d in work]
    rows += [launch(0, link=v, dur_ns=0, process=v + 1) for v in (0, 1)]
    rows += [{"kind": kind, "start_ns": s, "dur_ns": d, "process": p} for kind, s, d, p in calls]
    found, total = idle_gaps(events(*rows)), launch_metrics(Trace(events(*rows), "kineto", 1))
    assert found["dur_ns"].sum() == (total.gpu_idle_ns or 0)
    for gap in found.iter_rows(named=True):
        moments = set(range(gap["start_ns"], gap["start_ns"] + gap["dur_ns"]))
        at = {
            kind: {t for k, s, d, p in calls if (k, p) == (kind, gap["device"] + 1) for t in range(s, s + d)} & moments
            for kind in ("launch", "sync")
        }
        parts = [len(at["launch"]), len(at["sync"] - at["launch"]), len(moments - at["launch"] - at["sync"])]
        assert [gap["launch_ns"], gap["sync_ns"], gap["neither_ns"]] == parts
        assert gap["host"] == ("launch", "sync", "neither")[parts.index(max(parts))]


@pytest.mark.parametrize("row", golden_rows("kineto_golden.csv"), ids=lambda row: row["file"])
def test_real_traces_are_covered(shared: Path, row: dict[str, str]) -> None:
    trace = read_trace(shared / "traces" / row["file"])
    work, total = joined_work(trace.events), launch_metrics(trace)
    table = launch_gaps(trace.events, work)
    assert table["gap_ns"].sum() == (total.gpu_idle_ns or 0)
    assert table.height == len(total.devices)
    known = table.filter(pl.col("n_sync_gaps").is_not_null())
    assert (known["launch_ns"] + known["sync_ns"] + known["neither_ns"] == known["gap_ns"]).all()
    doing = device_doing(trace.events)
    exposed = exposed_time(trace.events, doing=doing)
    assert doing.height == int(row["kernels"]) + int(row["memcpy"])
    assert (exposed["compute_busy_ns"] + exposed["communication_exposed_ns"]).sum() == total.kernel_busy_ns

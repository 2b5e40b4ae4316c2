import json
from pathlib import Path

import polars as pl
import pytest

from perfmodel.bound import (
    HIGHEST_LAUNCH_NS,
    IDLE_FRAC,
    LOWEST_LAUNCH_NS,
    PLATEAU_FLOOR_NS,
    batch_in_name,
    bound,
    sweep,
    transition_batch,
)
from perfmodel.errors import InputError
from perfmodel.launch import launch_metrics
from perfmodel.readers import read_trace
from perfmodel.readers.sweeps import read_sweeps
from perfmodel.trace import Trace
from tests.traces_made import events, kernel, launch


def run(n: int, every_ns: int, dur_ns: int, first_delay_ns: int = 5000) -> pl.DataFrame:
    """`n` launches in steady time, kernels of one stream one after another."""
    rows, free_at = [], 0
    for i in range(n):
        start = max(i * every_ns + first_delay_ns, free_at)
        free_at = start + dur_ns
        rows += [launch(i * every_ns, link=i, dur_ns=2000), kernel(start, dur_ns, link=i)]
    return events(*rows)


def test_slow_launches_leave_the_device_idle() -> None:
    found = bound(run(100, every_ns=20_000, dur_ns=5_000))
    assert (found.label, found.n_launches, found.queued_frac, found.delay_median_ns) == ("host-bound", 100, 0.0, 5000)
    assert found.gpu_idle_frac == pytest.approx(0.75, abs=0.01)
    assert (found.copies_frac, found.graph_frac) == (0.0, 0.0)
    assert found.queue_limit_ns == 3 * HIGHEST_LAUNCH_NS
    assert json.loads(json.dumps(found.to_json()))["label"] == "host-bound"


def test_long_kernels_queue() -> None:
    found = bound(run(100, every_ns=10_000, dur_ns=50_000))
    assert (found.label, found.gpu_idle_frac) == ("device-bound", 0.0)
    assert found.queued_frac == 0.99
    assert "99.0 % of 100 launches waited more than 8.31 µs" in found.reason


def test_two_sides_that_keep_pace_and_two_phases_are_mixed() -> None:
    assert bound(run(100, every_ns=10_000, dur_ns=9_900)).label == "mixed"
    second = run(50, 10_000, 50_000).with_columns(pl.col("start_ns") + 10**9, pl.col("link") + 100)
    phases = bound(pl.concat([run(50, 10_000, 50_000), second]))
    assert (phases.label, phases.queued_frac) == ("mixed", 0.98)


def test_thresholds_are_the_callers() -> None:
    trace = run(100, every_ns=10_000, dur_ns=9_900)
    assert bound(trace, idle_frac=0.001).label == "host-bound"
    assert bound(trace, launch_floor_ns=500, queue_factor=2).label == "device-bound"
    assert bound(trace, min_launches=101).label is None


def test_kernels_of_a_graph_are_one_launch() -> None:
    """Ten replays of 100 kernels, host-bound: all kernels but the first of each wait long, and say nothing."""
    rows = []
    for i in range(10):
        at = i * 1_000_000
        rows.append(launch(at, link=i, dur_ns=2000, name="cudaGraphLaunch"))
        rows += [kernel(at + 5000 + 5000 * j, 5000, link=i) for j in range(100)]
    found = bound(events(*rows))
    assert (found.label, found.n_launches, found.queued_frac, found.graph_frac) == ("host-bound", 10, 0.0, 1.0)


def test_a_few_waits_of_seconds_decide_nothing() -> None:
    trace = run(100, every_ns=20_000, dur_ns=5_000)
    late = pl.concat([trace, events(launch(0, link=999, dur_ns=1), kernel(3 * 10**9, 5000, link=999))])
    assert launch_metrics(Trace(late, "kineto", 1)).tklqt_ns > 1000 * launch_metrics(Trace(trace, "kineto", 1)).tklqt_ns
    assert bound(late).label == "host-bound"


def test_nothing_to_tell_is_null_with_a_reason() -> None:
    assert bound(events({"kind": "op", "start_ns": 0})).reason.startswith("0 launches of kernels are too few")
    orphans = bound(events(*(kernel(i * 10, 10, link=i) for i in range(50))))
    assert (orphans.label, orphans.queued_frac, orphans.graph_frac, orphans.gpu_idle_frac) == (None, None, None, 0.0)
    assert bound(run(20, 0, 0, 0)).reason == "device work took no time"


def test_copies_are_not_taken_for_kernels() -> None:
    """A copy of 1 s behind which everything queues: the link is the bound, not the device."""
    copy = events({"kind": "copy", "start_ns": 0, "dur_ns": 10**9}, launch(0, link=500, name="cudaMemcpyAsync"))
    behind = run(50, 10_000, 100, first_delay_ns=10**9)
    found = bound(pl.concat([copy, behind]))
    assert (found.label, found.n_launches) == (None, 50)
    assert "the link is the bound" in found.reason


LABELS = {
    "hta__amd_trace": "host-bound",
    "hta__nccl_parser": "host-bound",
    "hta__ns_resolution": "device-bound",
    "hta__trace_filter__sampled_rank-0": "mixed",
    "hta__base": None,
    "nsysai__healthy": "mixed",
    "nsysai__h100_2gpu": None,
    "nsysai__mfu_2gpu": "device-bound",
    "tracelens__b200": "host-bound",
    "tracelens__h100__Falconsai": "host-bound",
    "tracelens__h100__gaunernst": "host-bound",
    "tracelens__h100__Qwen": "device-bound",
    "tracelens__mi300__Qwen": "device-bound",
    "tracelens__vllm_decode": None,
}


@pytest.mark.parametrize(("name", "label"), LABELS.items())
def test_real_traces(shared: Path, name: str, label: str | None) -> None:
    (path,) = (shared / "traces").glob(f"{name}*")
    assert bound(read_trace(path).events).label == label


# --- sweeps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("platform", "batch"), [("A100", 8), ("H100", 8), ("GH200", 32)])
def test_published_transitions(shared: Path, platform: str, batch: int) -> None:
    published = pl.read_csv(shared / "reference" / "skip_batch_sweep.csv").filter(model="bert", platform=platform)
    batches, tklqt = published["batch"].to_list(), (published["tklqt_us"] * 1000).to_list()
    for factor in (1.5, 3.0, 30.0):
        assert transition_batch(batches, tklqt, factor) == batch
    assert transition_batch(batches, tklqt) == batch
    assert transition_batch(batches[::-1], tklqt[::-1]) == batch
    found = sweep(batches, tklqt)
    assert found.transition_batch == batch
    assert found.table["label"].to_list() == ["device-bound" if b >= batch else "host-bound" for b in batches]
    # The idle time that tells one trace's bound tells the same batch sizes apart.
    idle_frac = published["gpu_idle_ms"] / published["ttft_ms"]
    assert (idle_frac >= IDLE_FRAC).to_list() == [b < batch for b in batches]


def test_null_kernels_are_those_published(shared: Path) -> None:
    published = pl.read_csv(shared / "reference" / "skip_null_kernel.csv")["launch_ns"]
    assert (published.min(), published.max()) == (LOWEST_LAUNCH_NS, HIGHEST_LAUNCH_NS)


def test_transition_needs_a_rise_above_the_floor() -> None:
    assert transition_batch([1, 2, 4], [0, 0, 2 * PLATEAU_FLOOR_NS]) is None
    assert transition_batch([1, 2, 4], [0, 0, 4 * PLATEAU_FLOOR_NS]) == 4
    high = 10 * PLATEAU_FLOOR_NS
    assert transition_batch([1, 2, 4], [high, 2 * high, 3.1 * high]) == 4
    for batches, tklqt in (([], []), ([1], [1.0, 2.0])):
        with pytest.raises(InputError):
            transition_batch(batches, tklqt)


def test_a_sweep_of_traces() -> None:
    traces = {1: run(100, 20_000, 5_000), 4: run(100, 20_000, 50_000), 2: run(100, 20_000, 9_000)}
    metrics = [launch_metrics(Trace(trace, "kineto", 1)) for trace in traces.values()]
    found = sweep(list(traces), metrics)
    assert found.table["batch"].to_list() == [1, 2, 4]
    assert found.table["tklqt_ns"].to_list()[:2] == [500_000, 500_000]
    assert found.table["label"].to_list() == ["host-bound", "host-bound", "device-bound"]
    assert (found.transition_batch, found.plateau_ns) == (4, 500_000)


@pytest.mark.parametrize(
    ("batches", "tklqt_ns", "words"),
    [
        ([1, 8, 8], [1.0, 2.0, 9e9], "the batch size 8 more than once"),
        ([1, 2], [1.0, float("nan")], "no number"),
        ([1, 2], [1.0, float("inf")], "no number"),
        ([0, 2], [1.0, 1.0], "below 1"),
    ],
)
def test_a_sweep_that_says_nothing_is_refused(batches: list[int], tklqt_ns: list[float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        sweep(batches, tklqt_ns)


def test_batches_may_come_in_any_order() -> None:
    assert transition_batch([32, 1, 8], [9e9, 1.0, 2.0]) == 32


def test_tables_of_sweeps(tmp_path: Path) -> None:
    table = tmp_path / "sweep.csv"
    table.write_text("batch,tklqt_ms\n8,2.5\n1,1\n")
    assert read_sweeps(table) == {"": ([8, 1], [2.5e6, 1e6])}
    table.write_text("model,gpu,batch,tklqt_us,note_us\na,X,1,3,9\na,Y,1,4,9\na,X,2,5,9\nb,X,1,,9\n")
    assert read_sweeps(table) == {"a, X": ([1, 2], [3000, 5000]), "a, Y": ([1], [4000])}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("batch,time\n1,2\n", "the columns batch, time; expected the columns batch and tklqt_ns"),
        ("batch,tklqt_parsecs\n1,2\n", "the columns batch, tklqt_parsecs"),
        ("tklqt_ns\n1\n", "the columns tklqt_ns"),
        ("batch,tklqt_ns\n1,\n", "no batch size with a TKLQT"),
        ("batch,tklqt_ns\n1,\n2,3\n", "empty cells"),
        ("batch,tklqt_ns\na,2\n", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_tables_that_hold_no_sweep_are_refused(content: str, said: str, tmp_path: Path) -> None:
    table = tmp_path / "sweep.csv"
    table.write_text(content)
    with pytest.raises(InputError, match=said) as refused:
        read_sweeps(table)
    assert str(refused.value).startswith(f"{table}: ")


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("bert-b8.json.gz", 8),
        ("BS_16.sqlite", 16),
        ("run.batch=32.json", 32),
        ("batch_size-64-seq512.json", 64),
        ("b1-b2.json", None),
        ("b200.eager.json", None),  # a GPU
        ("B200-b8.json", 8),
        ("bert-b-200.json", 200),
        ("b2000.json", 2000),
        ("web8.json", None),
        ("mb8.json", None),
        ("b8x7.json", None),
        ("b0.json", None),
        ("trace.json", None),
    ],
)
def test_a_name_tells_the_batch_size_where_it_tells_one(name: str, batch: int | None) -> None:
    assert batch_in_name(name) == batch

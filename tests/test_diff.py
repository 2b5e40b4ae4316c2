from pathlib import Path

import polars as pl
import pytest

from perfmodel.diff import diff
from perfmodel.launch import launch_metrics
from perfmodel.readers import read_trace
from perfmodel.trace import Trace
from tests.traces_made import events, kernel, launch


def trace(*rows: dict) -> Trace:
    return Trace(events(*rows), "kineto", len(rows))


BEFORE = trace(
    {"kind": "op", "name": "aten::mm", "start_ns": 0, "dur_ns": 20},
    {"kind": "op", "name": "aten::relu", "start_ns": 20, "dur_ns": 20},
    launch(5, link=1),
    launch(25, link=2),
    kernel(10, 100, link=1, name="cutlass_gemm"),
    kernel(200, 40, link=2, name="relu_kernel"),
    kernel(300, 7, link=99, name="softmax"),
)
AFTER = trace(
    {"kind": "op", "name": "aten::mm", "start_ns": 0, "dur_ns": 20},
    {"kind": "op", "name": "aten::sum", "start_ns": 20, "dur_ns": 20},
    launch(5, link=1),
    launch(25, link=2),
    kernel(10, 50, link=1, name="nvjet_gemm"),  # another kernel does the work of the same operator
    kernel(200, 30, link=2, name="reduce_kernel"),
)


def test_classes_and_operators_side_by_side_worked_out_by_hand() -> None:
    found = diff(BEFORE, AFTER)
    assert found.classes.rows() == [
        ("gemm", 1, 1, 100, 50, -50, 0.5),
        ("elementwise", 1, None, 40, None, -40, None),
        ("reduction", 1, 1, 7, 30, 23, 30 / 7),
    ]
    times = found.operators.select("name", "kernel_time_ns_a", "kernel_time_ns_b", "change_ns", "ratio")
    assert times.rows() == [
        ("aten::mm", 100, 50, -50, 0.5),
        ("aten::relu", 40, None, -40, None),
        ("aten::sum", None, 30, 30, None),
        ("(orphans)", 7, None, -7, None),
    ]
    metrics = {row["metric"]: row for row in found.metrics.to_dicts()}
    assert metrics["kernel_time_ns"] == {
        "metric": "kernel_time_ns", "a": 147, "b": 80, "change": -67, "ratio": 80 / 147
    }  # fmt: skip
    assert metrics["tklqt_graph_ns"]["ratio"] is None


def test_steps_make_traces_of_different_length_comparable() -> None:
    def with_steps(n: int) -> Trace:
        steps = [{"kind": "range", "name": f"ProfilerStep#{i}", "start_ns": 100 * i, "dur_ns": 100} for i in range(n)]
        return trace(*steps, *(kernel(100 * i, 10, name="gemm") for i in range(n)))

    found = diff(with_steps(2), with_steps(6))
    assert (found.n_steps_a, found.n_steps_b, found.per_step) == (2, 6, True)
    assert found.classes.select("time_ns_a", "time_ns_b", "change_ns", "ratio").rows() == [(20, 60, 0, 1)]
    metrics = {row["metric"]: (row["change"], row["ratio"]) for row in found.metrics.to_dicts()}
    assert (metrics["n_kernels"], metrics["akd_ns"]) == ((0, 1), (0, 1))
    raw = diff(with_steps(2), trace(kernel(0, 10, name="gemm")))
    assert not raw.per_step and raw.classes["change_ns"].to_list() == [-10]
    two_ranks = trace(*({"kind": "range", "name": "ProfilerStep#1", "start_ns": 0, "rank": r} for r in (0, 1)))
    assert diff(two_ranks, two_ranks).n_steps_a == 1  # that several ranks recorded


PAIRS = [
    (
        "tracelens__h100__Qwen_Qwen1.5-0.5B-Chat__1016005.json.gz",
        "tracelens__mi300__Qwen_Qwen1.5-0.5B-Chat__1016005.json.gz",
    ),
    ("hta__trace_filter__sampled_rank-0.json.gz", "hta__trace_filter__sampled_rank-1.json.gz"),
    ("tracelens__vllm_decode_full__graph_execution.json.gz", "nsysai__mfu_2gpu_before.sqlite"),
]


@pytest.mark.parametrize("names", PAIRS)
def test_sides_sum_to_their_traces(names: tuple[str, str], shared: Path) -> None:
    sides = [read_trace(shared / "traces" / name) for name in names]
    found = diff(*sides)
    for side, one in zip("ab", sides, strict=True):
        metrics = launch_metrics(one)
        assert found.classes[f"time_ns_{side}"].sum() == metrics.kernel_time_ns
        assert found.operators[f"kernel_time_ns_{side}"].sum() == metrics.kernel_time_ns
        assert found.operators[f"n_kernels_{side}"].sum() == metrics.n_kernels
        assert found.operators[f"tklqt_ns_{side}"].sum() == metrics.tklqt_ns
        assert found.operators[f"n_calls_{side}"].sum() == one.of_kind("op").height
    same = diff(sides[0], sides[0])
    assert set(same.metrics["ratio"].drop_nulls()) == {1.0}
    assert same.operators["change_ns"].abs().sum() == 0
    assert same.classes.filter(pl.col("ratio") != 1).is_empty()


def test_json_holds_as_many_rows_as_are_asked_for() -> None:
    ops = [{"kind": "op", "name": name, "start_ns": 0, "dur_ns": 1} for name in "abc"]
    trace = Trace(events(*ops, kernel(10, 5, name="gemm"), kernel(20, 5, name="flash")), "kineto", 5)
    found = diff(trace, trace)
    whole, first = found.to_json(), found.to_json(1)
    assert first == {**whole, "classes": whole["classes"][:1], "operators": whole["operators"][:1]}
    assert (len(whole["classes"]), len(whole["operators"])) == (2, 4)

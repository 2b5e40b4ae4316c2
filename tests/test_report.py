from pathlib import Path

import polars as pl
import pytest

from perfmodel import report
from perfmodel.analysis import analyse
from perfmodel.diff import diff
from perfmodel.hardware import hardware
from perfmodel.readers import read_trace
from perfmodel.trace import Trace
from tests.traces_made import events, golden_rows, kernel, launch

LONG = "void at::native::vectorized_elementwise_kernel<4, " + "x" * 5000 + ", AddFunctor<float>>"


def test_names_lose_their_middle_and_numbers_stay_whole() -> None:
    shown = report.table([[LONG, "1,000"]], ["kernels", "time"], width=60).split("\n")
    assert [len(line) for line in shown] == [60, 60]
    assert shown[1].startswith("void at::native") and shown[1].endswith("Functor<float>>  1,000") and "…" in shown[1]
    assert report.table([["a", "b"]], ["c", "d"]) == "c  d\na  b"


def test_what_belongs_to_no_group_is_a_row_that_says_so() -> None:
    table = events(
        {"kind": "range", "name": "ProfilerStep#1", "start_ns": 0, "dur_ns": 10},
        {"kind": "range", "name": "ProfilerStep#2", "start_ns": 10, "dur_ns": 10},
        launch(1, link=1),
        kernel(5, 5, link=1),
        kernel(50, 5, link=9),
    )
    page = report.trace_page(analyse(Trace(table, "kineto", 5), by="step"), "made")
    assert "ProfilerStep#1" in page and "(elsewhere)" in page


def test_findings_are_numbered_sentences_with_advice() -> None:
    table = events(kernel(0, 10, name="gemm"), kernel(90, 10, name="gemm"))
    page = report.findings_text(analyse(Trace(table, "kineto", 2)).findings)
    assert page.split("\n")[0].startswith("1. Devices stood idle for 80.0 % of their time") and "\n   > " in page


@pytest.mark.parametrize(
    "row", [*golden_rows("kineto_golden.csv"), *golden_rows("nsys_golden.csv")], ids=lambda r: r["file"]
)
def test_pages_of_real_traces_keep_their_width_and_their_totals(row: dict[str, str], shared: Path) -> None:
    trace = read_trace(shared / "traces" / row["file"])
    found = analyse(trace, hardware=hardware("h100-sxm"), by="stream")
    page = report.trace_page(found, row["file"], 5, 120)
    assert max(map(len, page.split("\n"))) <= 120 and "None" not in page and "nan" not in page.lower().split()
    asserted = found.groups.select(pl.sum("n_kernels", "tklqt_ns")).row(0) if found.groups is not None else ()
    assert asserted == (found.metrics.n_kernels, found.metrics.tklqt_ns)
    assert found.operators["kernel_time_ns"].sum() == found.metrics.kernel_time_ns == found.kernels["time_ns"].sum()
    assert found.exposed["compute_busy_ns"].sum() <= found.metrics.kernel_busy_ns
    assert found.gaps["gap_ns"].sum() == (found.metrics.gpu_idle_ns or 0)
    sides = report.diff_page(diff(trace, trace), (row["file"], row["file"]), 5, 120)
    assert max(map(len, sides.split("\n"))) <= 120

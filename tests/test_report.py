from pathlib import Path

import polars as pl
import pytest

from perfmodel import report
from perfmodel.analysis import analyse
from perfmodel.diff import diff
from perfmodel.evaluation import evaluate, report_of
from perfmodel.fitting import fit_source
from perfmodel.hardware import hardware
from perfmodel.latency import LatencyModel
from perfmodel.offload.fit import fit_offload, judge_offload
from perfmodel.ranks import CLASSES_OF_RANKS, RANKS, RankSummary
from perfmodel.readers import read_trace
from perfmodel.sources import Source, only_source, read_sources
from perfmodel.trace import Trace
from tests.captures_made import write_gpu_capture
from tests.made_up import MADE_UP_KERNEL, made_up_machine, made_up_observations
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


def made(*rows: dict) -> Trace:
    return Trace(events(*rows), "kineto", len(rows))


def test_steps_stand_on_the_page_where_there_are_several() -> None:
    steps = [{"kind": "range", "name": f"ProfilerStep#{i}", "start_ns": 10 * i, "dur_ns": 10} for i in range(2)]
    rows = (launch(1, link=1), kernel(5, link=1), launch(12, link=2), kernel(15, link=2), kernel(30, link=9))
    found = analyse(made(*steps, *rows))
    assert found.steps.select("name", "n_kernels").rows() == [("ProfilerStep#0", 1), ("ProfilerStep#1", 1)]
    assert "\nsteps           launches" in report.trace_page(found, "made")
    assert "\nsteps " not in report.trace_page(analyse(made(steps[0], *rows)), "made")


def test_clocks_that_disagree_are_said() -> None:
    page = report.trace_page(analyse(made(launch(10, link=1), kernel(5, link=1))), "made")
    assert "note: 1 kernel started before the launch call: host and device clocks disagree" in page


def test_products_that_took_no_known_time_are_not_listed() -> None:
    product = {"kind": "op", "name": "aten::mm", "start_ns": 0, "dur_ns": 9, "inputs": '[[[4, 8], [8, 2]], ["float"]]'}
    assert analyse(made(product, kernel(50, 5, link=9, name="gemm"))).products.is_empty()
    timed = analyse(made(product, launch(1, link=1), kernel(50, 5, link=1, name="gemm")))
    assert timed.products["time_ns"].to_list() == [5]


def test_what_a_page_of_two_traces_leaves_out_is_summed() -> None:
    a = made(*(kernel(10 * i, 2**i, name=name) for i, name in enumerate(("gemm", "relu", "softmax", "nccl"))))
    page = report.diff_page(diff(a, made(kernel(0, 1, name="gemm"))), ("a", "b"), 2)
    (rest,) = (line.split() for line in page.split("\n") if line.startswith("(2 more)"))
    assert rest == ["(2", "more)", "2", "1", "3.00", "ns", "1.00", "ns", "-2.00", "ns", "-"]


def test_ranks_that_compute_equally_long_hold_up_nobody() -> None:
    def page(*compute_ns: int) -> str:
        rows = [{"rank": i, "file": str(i), "compute_time_ns": ns} for i, ns in enumerate(compute_ns)]
        counts = dict.fromkeys(("n_events", "n_dropped", "n_repaired", "n_kernels", "n_kernels_joined"), 1)
        ranks = pl.DataFrame([row | counts for row in rows], RANKS)
        return report.ranks_page(RankSummary("run", ranks, pl.DataFrame(schema=CLASSES_OF_RANKS), (), {}, (), (), None))

    assert "Ranks compute equally long: the longest, rank 2, is 4.0 % above the median of 100 ns." in page(98, 100, 104)
    assert "Rank 2 holds up the others" in page(98, 100, 106)


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


def fitted_page(tokens: tuple[int, ...], routings: tuple[str, ...]) -> tuple[LatencyModel, str]:
    observations = made_up_observations(tokens=tokens, routings=routings)
    screened = observations["time_ns"] > 0
    source = Source(
        "made up",
        MADE_UP_KERNEL,
        made_up_machine(),
        "bf16",
        observations,
        observations[:0],
        screened,
        {"launch": "graph"},
    )
    model = fit_source(source)
    return model, report.fit_page(model)


def test_the_page_of_a_fit_says_what_was_fitted_how_well_and_how_surely() -> None:
    model, page = fitted_page((1, 8, 64, 512, 4096), ("balanced", "power_law_1.2"))
    assert "fitted on 50 workloads of synthetic-gpu, bf16, synthetic/1.0/made_up_kernel/bf16" in page
    assert all(shape in page for shape in model.errors_["model"]) and "roofline only" in page
    (line,) = (line for line in page.split("\n") if line.startswith("call_ns"))
    assert line.split() == ["call_ns", "4000", "not", "measured,", "the", "default"]
    assert "not measured" not in next(line for line in page.split("\n") if line.startswith("layer_ns"))
    assert "interval      90 %, typically +" in page and "of 5 shapes" in page


def test_the_page_of_a_fit_to_few_measurements_promises_no_interval() -> None:
    model, page = fitted_page((64,), ("balanced",))
    assert model.confidence_ is None
    assert "interval      none: too few measurements could be held out" in page
    assert "residual      not used" in page and "nan" not in page.lower().split()


def test_what_offloaded_experts_taught_stands_on_the_page_of_a_fit(tmp_path: Path) -> None:
    source = only_source(read_sources([str(write_gpu_capture(tmp_path / "made-up"))]))
    model = fit_source(source)
    page = report.fit_page(model)
    # Offloaded calls replayed from a graph are held against resident ones replayed from a graph.
    assert source.other_launch is not None
    every = pl.concat([source.observations, source.other_launch, source.offloaded])
    assert source.every.equals(every)
    found = fit_offload(model, every)
    assert model.offload_ == found.to_json()
    lines = page.split("\n")
    for way, one in found.ways.items():
        row = next(line for line in lines if line.split()[:2] == [str(way), str(one.n_observations)])
        assert one.by_shape is not None and one.by_frac is None  # one fraction was measured
        assert f"{100 * one.by_shape.median_frac:.1f} %" in row and " none " in row
        for name, constant in one.constants.items():
            row = next(line for line in lines if line.split()[:2] == [str(way), name])
            assert f"{constant.value:.4g}" in row and f"{constant.low:.4g} to {constant.high:.4g}" in row
            assert ("loosely" in row) != constant.is_known
    assert page.index("offloaded experts, predicted without data of their shape") > page.index("interval      90 %")
    result = report_of([evaluate(model, source.observations, "none")])
    assert "offloaded experts" not in report.evaluation_page(result)
    judged = judge_offload(model, source.every)
    result["kernels"][0]["offload"] = judged
    rows = report.evaluation_page(result).split("\n")
    for way, errors in judged.items():
        row = next(line for line in rows if line.split()[:2] == [way, str(errors["n"])])
        assert f"{100 * errors['median_ape']:.1f} %" in row and row.endswith("fitted")
    model.offload_ = None
    assert report.fit_page(model) == page[: page.index("\n\nabsolute error of latencies with offloaded experts")]


def test_a_fit_to_times_of_another_unit_or_a_busy_machine_is_not_to_be_trusted() -> None:
    observations = made_up_observations(tokens=(1, 64, 4096))
    screened = pl.Series([True] * observations.height)

    def page(factor: pl.Expr) -> str:
        made = observations.with_columns(time_ns=pl.col("time_ns") * factor)
        source = Source("made up", MADE_UP_KERNEL, made_up_machine(), "bf16", made, made[:0], screened)
        return report.fit_page(fit_source(source))

    assert "NOT TO BE TRUSTED" not in page(pl.lit(1.0))
    of_microseconds = page(pl.lit(1000.0))
    assert "NOT TO BE TRUSTED" in of_microseconds and "interval      none" in of_microseconds
    third_failed = page(pl.when(pl.int_range(pl.len()) % 3 == 0).then(6.0).otherwise(1.0))
    assert "NOT TO BE TRUSTED" in third_failed and "interval      90 %" in third_failed

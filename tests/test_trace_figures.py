"""Figures of traces hold the numbers of the tables they were given, and show names letter by letter."""

import pytest

pytest.importorskip("plotly", reason="plotly is not installed")

import math
from pathlib import Path

import polars as pl
from typer.testing import CliRunner

from perfmodel import bound, figures, fusion
from perfmodel.analysis import analyse
from perfmodel.cli.main import app
from perfmodel.diff import diff
from perfmodel.errors import InputError
from perfmodel.groups import launch_metrics_by
from perfmodel.launch import delay_counts, joined_kernels
from perfmodel.overlap import exposed_time, launch_gaps
from perfmodel.passes import moe_passes
from perfmodel.ranks import RANKS
from perfmodel.timeline import MAX_BARS, timeline
from perfmodel.trace import Trace
from perfmodel.waits import waits_of_steps
from tests.traces_made import complete, events, kernel, launch, write_json

HOSTILE = "<b onclick=x>gemm<bf16></b> & co"
SHOWN = "&lt;b onclick=x&gt;gemm&lt;bf16&gt;&lt;/b&gt; &amp; co"


def made(*rows) -> Trace:
    return Trace(events(*rows), "kineto", len(rows))


def stacks(figure) -> dict[str, list[float]]:
    return {bar.name: list(bar.x) for bar in figure.data}


def test_every_bar_of_a_window_is_drawn_where_it_lies_and_a_delay_ends_in_an_arrow() -> None:
    table = events(
        {"kind": "range", "name": HOSTILE, "start_ns": 100, "dur_ns": 100},
        launch(110, 7, 5),
        kernel(150, 20, link=7, name="sgemm"),
    )
    figure = figures.lines_and_bars(timeline(table, 100, 200), HOSTILE)
    drawn = {bar.name: list(zip(bar.y, bar.base, bar.x, strict=True)) for bar in figure.data if bar.type == "bar"}
    assert drawn == {"range": [(0, 0, 100)], "launch call": [(1, 10, 5)], "gemm": [(2, 50, 20)]}
    arrow = figure.data[-1]
    assert (list(arrow.x), list(arrow.y)) == ([10, 50, None], [1, 2, None])
    assert "launch delay 40.0 ns" in arrow.hovertext[0]
    assert SHOWN in figure.data[0].text[0] and "<b " not in figure.data[0].hovertext[0]
    assert figure.layout.title.text == SHOWN
    assert figure.layout.yaxis.ticktext == ("thread 1", "its launches and waits", "device 0 stream 7")


def test_a_long_trace_is_drawn_with_no_more_bars_than_a_browser_shows_at_once() -> None:
    table = events(*(kernel(10 * i, 9, name=f"k{i % 7}") for i in range(5000)))
    figure = figures.lines_and_bars(timeline(table, 0, 50_000), "long")
    assert 100 < sum(len(bar.x) for bar in figure.data) <= MAX_BARS
    assert "short events" in figure.data[0].hovertext[0]


def test_delays_are_counted_once_each_prompt_or_queued() -> None:
    calls = [launch(0, i, 50) for i in range(4)]
    table = events(*calls, *(kernel(at, link=i) for i, at in enumerate((20, 40, 900, 90_000))), kernel(5))
    counts = delay_counts(joined_kernels(table))
    assert counts.select(pl.sum("n_prompt", "n_queued")).row(0) == (2, 2)
    for row in counts.filter(pl.col("n_prompt") + pl.col("n_queued") > 0).iter_rows(named=True):
        assert any(row["from_ns"] <= delay < row["to_ns"] for delay in (20, 40, 900, 90_000))
    assert (counts["from_ns"][1:] / counts["to_ns"][:-1] - 1).abs().max() < 1e-9  # without holes
    figure = figures.delays(counts)
    assert [sum(bar.y) for bar in figure.data] == [2, 2]
    assert figure.layout.xaxis.type == "log"
    assert delay_counts(joined_kernels(events(kernel(0)))).is_empty()


def test_a_delay_at_the_edge_of_a_part_counts_in_the_part_that_begins_there() -> None:
    powers = [10**power for power in range(9)]
    table = events(*(launch(0, i) for i in range(9)), *(kernel(at, link=i) for i, at in enumerate(powers)))
    counts = delay_counts(joined_kernels(table)).filter(pl.col("n_prompt") + pl.col("n_queued") > 0)
    assert counts["from_ns"].to_list() == pytest.approx(powers)


def test_exposed_and_hidden_time_are_those_of_the_table() -> None:
    table = events(
        kernel(0, 100, name="sgemm"),
        {"kind": "copy", "name": "Memcpy HtoD", "start_ns": 60, "dur_ns": 100, "device": 0, "stream": 8},
        kernel(300, 40, name="ncclDevKernel_AllReduce", stream=9),
    )
    figure = figures.exposed(exposed_time(table))
    assert stacks(figure) == {"hidden under compute": [40, 0], "exposed: no compute meanwhile": [60, 40]}
    assert figure.layout.yaxis.ticktext == ("device 0: copies", "device 0: communication")


def test_idle_gaps_are_shared_out_by_what_the_host_did() -> None:
    table = events(launch(0, 1, 5), kernel(10, 10, link=1), launch(40, 2, 30), kernel(80, 10, link=2))
    assert stacks(figures.idle_reasons(launch_gaps(table))) == {
        "in a launch call": [30], "waiting for the device": [0], "neither, such as Python and dispatch": [30],
    }  # fmt: skip


@pytest.mark.parametrize("by", ["rank", "device", "stream", "process", "thread", "range", "step"])
def test_groups_of_every_kind_are_named_and_ranked(by: str) -> None:
    table = events(
        {"kind": "range", "name": HOSTILE, "start_ns": 0, "dur_ns": 30},
        {"kind": "range", "name": HOSTILE, "start_ns": 30, "dur_ns": 30},
        launch(1, 1), launch(31, 2), kernel(5, 3, link=1), kernel(50, 3, link=2),
    )  # fmt: skip
    grouped = launch_metrics_by(table, by)
    bars = figures.groups(grouped, by, "tklqt_ns", "TKLQT").data[0]
    assert list(bars.x) == sorted(grouped["tklqt_ns"], reverse=True)
    assert sum(bars.x) == 4 + 19
    assert not any("<b " in words for words in bars.hovertext)


def test_a_sweep_shows_its_transition_and_a_log_axis_only_where_no_time_is_0() -> None:
    published = bound.sweep([1, 8, 32], [0, 0, 54.2e6])
    figure = figures.sweep(published)
    assert "device-bound from batch 32 on" in figure.layout.title.text
    assert figure.layout.yaxis.type is None
    points = {trace.name: list(trace.x) for trace in figure.data if trace.mode == "markers"}
    assert points == {"host-bound": [1, 8], "device-bound": [32]}
    assert any(shape.x0 == 32 for shape in figure.layout.shapes)
    flat = figures.sweep(bound.sweep([1, 8], [1e6, 1.1e6]), HOSTILE)
    assert flat.layout.yaxis.type == "log"
    limit_ns = 3 * 1e6
    assert flat.layout.shapes[0].y0 == limit_ns and flat.layout.annotations[0].y == pytest.approx(math.log10(limit_ns))
    assert figure.layout.annotations[0].y == figure.layout.shapes[0].y0
    assert flat.layout.title.text == f"{SHOWN}: no batch size is device-bound"


def test_fusion_shows_the_ideal_speed_up_of_every_length() -> None:
    names = ["a", "b"] * 8
    table = fusion.fusion_table(events(*(kernel(10 * i, name=n) for i, n in enumerate(names))), (2, 4))
    line = figures.fusion(table).data[0]
    assert list(line.x) == [2, 4]
    assert list(line.y) == [2.0, 1.0]  # a-b always follows, a-b-a-b not behind the last a but one


def test_changes_have_their_sign_and_the_greatest_comes_first() -> None:
    a = made(kernel(0, 100, name="sgemm"), kernel(200, 10, name="softmax_fwd"))
    b = made(kernel(0, 40, name="sgemm"), kernel(200, 30, name="softmax_fwd"))
    drawn = figures.diff_figures(diff(a, b))
    bars = drawn[0][0].data[0]
    assert list(bars.x) == [-60, 20]
    assert bars.text == ("-60.0 ns", "+20.0 ns")


def test_the_rank_that_computes_longest_is_named() -> None:
    rows = [
        {"rank": rank, "file": f"{rank}.json", "n_kernels": 1, "compute_time_ns": ns, "communication_time_ns": 5}
        for rank, ns in enumerate((100, 110, 150))
    ]
    table = pl.DataFrame(rows, schema_overrides=dict(RANKS)).match_to_schema(RANKS, missing_columns="insert")
    figure = figures.ranks(table)
    assert "rank 2 computes longest" in figure.layout.title.text
    assert stacks(figure) == {"computation": [100, 110, 150], "communication, with waiting in it": [5, 5, 5]}
    assert figure.layout.yaxis.ticktext == ("rank 0", "rank 1", "rank 2 (longest)")


def test_parts_of_a_pass_on_a_host_keep_their_names_and_add_up() -> None:
    layer = [{"kind": "range", "name": "moe_layer", "start_ns": 100 * i, "dur_ns": 90} for i in range(2)]
    gemms = [
        {"kind": "range", "name": f"gemm{n}", "start_ns": 100 * i + 10 * n, "dur_ns": n}
        for i in range(2)
        for n in (1, 2)
    ]
    figure = figures.pass_parts(moe_passes(made(*layer, *gemms)))
    assert stacks(figure) == {"gemm2": [2, 2], "gemm1": [1, 1]}


def test_waits_are_summed_over_steps() -> None:
    schema = {"step": pl.Int64, "rank": pl.Int32, "device": pl.Int64, "wait_ns": pl.Int64, "caused_ns": pl.Int64}
    table = pl.DataFrame([(0, 0, None, 1, 9), (1, 0, None, 2, 0), (0, 1, None, 9, 1)], schema=schema, orient="row")
    assert set(schema) <= set(waits_of_steps.__doc__.replace("`", " ").replace(",", " ").split()) | {"rank", "device"}
    assert stacks(figures.waits(table)) == {"waits for others": [3, 9], "others wait for it": [9, 1]}


def test_a_report_has_the_figures_that_its_trace_can_fill() -> None:
    on_device = made(
        {"kind": "range", "name": "ProfilerStep#1", "start_ns": 0, "dur_ns": 90},
        launch(1, 1), kernel(10, 10, link=1), launch(30, 2), kernel(60, 10, link=2),
    )  # fmt: skip
    titles = [figure.layout.title.text for figure, _ in figures.trace_figures(analyse(on_device, by="stream"))]
    assert titles == [
        "Where device time goes", "Kernel time by class", "One step: ProfilerStep#1",
        "How long kernels waited for their launch", "Launch tax: TKLQT by kernel", "What the host did in idle gaps",
        "TKLQT by stream",
    ]  # fmt: skip
    on_host = made({"kind": "op", "name": "aten::mm", "start_ns": 0, "dur_ns": 9})
    titles = [figure.layout.title.text for figure, _ in figures.trace_figures(analyse(on_host))]
    assert titles == ["Host time by operator, without what it calls", "The whole trace"]
    assert len(figures.trace_figures(analyse(on_host.__class__(on_host.events.clear(), "kineto", 0)))) == 1


def run(*words: str) -> str:
    done = CliRunner().invoke(app, words, catch_exceptions=False, standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.stdout


def test_the_four_commands_write_the_page_that_they_print_with_its_figures(tmp_path: Path) -> None:
    rows = [complete("cuda_runtime", "cudaLaunchKernel", 10 * i, 2, correlation=i) for i in range(1, 9)]
    place = {"device": 0, "stream": 7}
    rows += [complete("kernel", HOSTILE, 10 * i + 4, 5, 0, 7, correlation=i, **place) for i in range(1, 9)]
    trace = str(write_json(tmp_path / "one.json", {"traceEvents": rows}))
    table = tmp_path / "sweep.csv"
    table.write_text("batch,tklqt_us\n1,900\n64,90000\n")
    page = str(tmp_path / "page.html")
    for words, said in (
        (("analyze", trace, "--by", "stream"), "How long kernels waited for their launch"),
        (("diff", trace, trace), "Operators, kernel time: b minus a"),
        (("fusion", trace), "Ideal speed-up of fusing chains of kernels"),
        (("sweep", str(table)), "device-bound from batch 64 on"),
    ):
        printed = run(*words, "--html", page)
        written = Path(page).read_text(encoding="utf-8")
        assert said in written and "Plotly.newPlot" in written
        assert "<b onclick" not in written.replace("\\u003cb onclick", "")
        assert figures.literal(printed.strip().splitlines()[-1].strip()) in written
        with pytest.raises(InputError, match=r"expected an \.html file"):
            run(*words, "--html", str(tmp_path / "page.pdf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "page.html", "sweep.csv"]

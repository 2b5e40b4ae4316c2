"""Figures hold the numbers they were given, say so in words, and interpret no name from a file."""

from dataclasses import replace

import pytest

pytest.importorskip("plotly", reason="plotly is not installed")

import polars as pl
from typer.testing import CliRunner

from perfmodel import figures, launch
from perfmodel.cli.main import app
from perfmodel.hardware import hardware
from perfmodel.hf_config import resolve
from perfmodel.predict import slowdown_curve
from perfmodel.roofline import POINTS, roofline
from perfmodel.routing import routing
from perfmodel.schedule import Span
from perfmodel.schedule.drawn import DRAWN_PHASES, Panel
from perfmodel.trace import Trace
from tests.captures_made import write_synthetic_capture
from tests.traces_made import events

HOSTILE = "<b onclick=x>gemm<bf16></b> & co"
ERRORS = {"median_ape_frac": 0.05, "p90_ape_frac": 0.2}


def curve(n_tokens: int, access: str = "zero-copy") -> list:
    shape = resolve("poster")
    return slowdown_curve(hardware("gh200"), shape, routing("mmlu-like", shape.n_experts, 1, n_tokens), access)


def test_parity_draws_every_point_on_log_axes_with_names_escaped() -> None:
    held_out = {
        "op": ["moe_layer"] * 3,
        "shape": [HOSTILE, HOSTILE, "other"],
        "n_tokens": [1, 2, 3],
        "routing": ["uniform"] * 3,
        "measured_ns": [1e4, 1e5, 1e6],
        "predicted_ns": [1.1e4, 1e5, 9e5],
    }
    figure = figures.parity(held_out, ERRORS)
    points = [trace for trace in figure.data if trace.mode == "markers"]
    assert sorted(x for trace in points for x in trace.x) == [1e4, 1e5, 1e6]
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert "5.0 %" in figure.layout.title.text
    assert points[0].name == "&lt;b onclick=x&gt;gemm&lt;bf16&gt;&lt;/b&gt; &amp; co"


def test_slowdown_starts_at_one_and_switches_to_a_log_axis_when_it_spans_much() -> None:
    mild, steep = figures.slowdown({"a": curve(524_288)}), figures.slowdown({"a": curve(524_288, "cpu")})
    assert mild.data[0].y[0] == 1.0
    assert len(mild.data[0].x) == 65
    assert mild.layout.yaxis.type != "log"
    assert steep.layout.yaxis.type == "log"


def test_stacked_parts_add_up_to_the_latency() -> None:
    prediction = curve(65_536)[20]
    figure = figures.parts({"offloaded": prediction})
    assert sum(bar.x[0] for bar in figure.data) == pytest.approx(prediction.latency_ns)


def test_roofline_has_one_solid_ceiling_per_tier_that_ends_at_the_roof_and_its_ridge_points() -> None:
    found = roofline(hardware("gh200"), "bf16")
    figure = figures.roofline(found)
    lines = [line for line in figure.data if line.x[0] is not None]
    solid = [line for line in lines if line.line.dash == "solid" and not line.name.startswith("compute")]
    assert [line.name for line in solid] == [f"{tier.name}, reached" for tier in found.reached.tiers]
    assert all(line.y[-1] == found.reached.flops_per_s for line in solid)
    assert [line.x[-1] for line in solid] == [tier.ridge_flops_per_byte for tier in found.reached.tiers]
    assert sum(line.line.dash == "dash" for line in lines) == 4  # three tiers and the compute rate of the datasheet
    labels = [one.text for one in figure.layout.annotations]
    assert "device memory 3.73 TB/s (paper)" in labels and "ridge 2,083.5 to 2,346.3 FLOP/B" in labels
    [(_, alt)] = figures.roofline_figures(found)
    assert alt == "Roofline of NVIDIA GH200, 96 GB HBM3, Grace with 480 GB LPDDR5X, bf16, with 0 points"


def roofline_points() -> pl.DataFrame:
    """Three batches of one shape, out of order, and one of another, whose name is hostile."""
    table = pl.DataFrame(
        {
            "op": ["moe_layer"] * 4,
            "shape": ["made-up", "made-up", "made-up", HOSTILE],
            "n_tokens": [64, 1, 4096, 8],
            "routing": ["uniform"] * 4,
            "access": ["resident"] * 4,
            "flops_per_byte": [8.0, 1.0, 300.0, 4.0],
            "flops_per_s": [1e13, 1e12, 4e14, 2e12],
            "time_frac": [0.2, 0.1, 0.6, 0.1],
            "lost_ns": [3.0, 2.0, 1.0, 4.0],
        }
    )
    return table.match_to_schema(POINTS, missing_columns="insert")


def test_points_of_a_roofline_have_the_area_of_their_time_and_batches_of_one_shape_are_joined_by_size() -> None:
    found = replace(roofline(hardware("gh200"), "bf16"), points=roofline_points())
    every = [trace for trace in figures.roofline(found).data if trace.mode == "markers"]
    assert sorted(every[0].marker.size) == [0.1, 0.1, 0.2, 0.6] and every[0].marker.sizemode == "area"
    assert "&lt;b onclick=x&gt;" in every[0].text[0] and "<b " not in every[0].text[0]
    chosen = figures.roofline(found, "made-up")
    [line] = [trace for trace in chosen.data if trace.mode == "lines+text"]
    assert list(line.x) == [1.0, 8.0, 300.0]
    assert [words.strip() for words in line.text] == ["2<sup>0</sup> tokens", "", "2<sup>12</sup> tokens"]
    faint, own = (trace for trace in chosen.data if trace.mode == "markers")
    assert (len(faint.x), len(own.x)) == (1, 3) and faint.marker.opacity < own.marker.opacity
    assert not faint.showlegend and own.showlegend
    two = pl.concat([roofline_points().with_columns(gemm=pl.lit(size)) for size in ("64 x 32", "16 x 64")])
    lines = [t for t in figures.roofline(replace(found, points=two), "made-up").data if t.name and " x " in t.name]
    assert [list(line.x) for line in lines] == [[1.0, 8.0, 300.0]] * 2  # never from one GEMM to the other


def test_residuals_have_the_median_of_each_batch_size_and_coverage_the_share_of_each_level() -> None:
    held_out = {
        "op": ["moe_layer"] * 5,
        "shape": [HOSTILE] * 5,
        "n_tokens": [1, 1, 1, 64, 64],
        "routing": ["uniform"] * 5,
        "measured_ns": [100.0] * 5,
        "predicted_ns": [90.0, 100.0, 150.0, 80.0, 100.0],
    }
    figure = figures.residuals(held_out)
    [median] = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert list(median.x) == [1, 64] and list(median.y) == pytest.approx([1.0, 0.9])
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert all("<b " not in words for trace in figure.data if trace.mode == "markers" for words in trace.text)
    levels = pl.DataFrame(
        {
            "shape": ["a", "b", "a", "b"],
            "stated_frac": [0.5, 0.5, 0.9, 0.9],
            "n": [4, 6, 4, 6],
            "n_covered": [1, 5, 4, 5],
        }
    )
    pooled = figures.held_coverage(levels).data[-1]
    assert list(zip(pooled.x, pooled.y, strict=True)) == [(0.5, 0.6), (0.9, 0.9)]


@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_reports_of_fits_and_evaluations_hold_the_figures_of_their_held_out_points(command: str, tmp_path) -> None:
    capture = write_synthetic_capture(tmp_path / "made", n_runs=1, noise=lambda: 1.03)
    page, out = tmp_path / "report.html", ["--out", str(tmp_path / "m.json")] if command == "fit" else []
    done = CliRunner().invoke(app, [command, str(capture), *out, "--html", str(page)], standalone_mode=False)
    assert done.exception is None and done.stdout
    written = page.read_text(encoding="utf-8")
    for alt in ("Predicted against measured latency", "by tokens in the batch", "achieved coverage of intervals"):
        assert written.count(f'aria-label="{alt}') + written.count(f"{alt}</figcaption>") >= 1, alt
    assert done.stdout.splitlines()[0] in written


def test_busy_and_idle_make_up_the_span() -> None:
    trace = Trace(
        events(
            {"kind": "kernel", "start_ns": 0, "dur_ns": 40},
            {"kind": "copy", "start_ns": 30, "dur_ns": 30},
            {"kind": "kernel", "start_ns": 90, "dur_ns": 10},
        ),
        "kineto",
        3,
    )
    figure = figures.busy(launch.launch_metrics(trace))
    assert [bar.x[0] for bar in figure.data] == [50, 20, 30]


def test_shares_are_ranked_with_short_labels_and_names_escaped() -> None:
    table = pl.DataFrame({"name": [HOSTILE, "x" * 99], "time_ns": [5, 9]})
    figure = figures.shares(table, "name", "time_ns", "Time")
    assert list(figure.data[0].x) == [9, 5]
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # the first is on top
    labels = figure.layout.yaxis.ticktext
    assert "<" not in "".join(labels)
    assert len(labels[0]) <= 48


def test_coverage_runs_from_nothing_to_all() -> None:
    line = figures.coverage(routing("power-law", 8, 2, 100_000).popularity).data[0]
    assert (line.x[0], line.y[0]) == (0, 0)
    assert (line.x[-1], line.y[-1]) == (1, pytest.approx(1))


def panel(title: str, latency_ns: float, spans: tuple[Span, ...], n_gpus: int = 2) -> Panel:
    return Panel(title, latency_ns, n_gpus, spans)


def test_the_gantt_draws_every_span_in_a_panel_for_each_schedule_on_one_time_axis() -> None:
    spans = (
        Span(0, "compute", "gate", 5.0, 10.0),
        Span(0, "send", "dispatch", 15.0, 20.0),
        Span(1, "receive", "dispatch", 15.0, 20.0),
        Span(1, "compute", "gemm1", 35.0, 50.0, 3),
    )
    figure = figures.gantt([panel(HOSTILE, 90.0, spans), panel("other, 180 ns", 180.0, spans[:1])], HOSTILE)
    drawn = [(t.name, y, base, x) for t in figure.data for y, base, x in zip(t.y, t.base, t.x, strict=True)]
    assert sorted(drawn) == sorted(
        [(s.phase, f"GPU {s.gpu} {s.lane}", s.start_ns, s.dur_ns) for s in (*spans, spans[0])]
    )
    assert [t.name for t in figure.data if t.showlegend] == ["gate", "dispatch", "gemm1"]  # each once
    titles = [one.text for one in figure.layout.annotations]
    assert titles[0].startswith("&lt;b onclick=x&gt;gemm") and titles[1] == "other, 180 ns"
    assert figure.layout.title.text.startswith("&lt;b onclick=x&gt;gemm")
    assert figure.layout.xaxis.range == figure.layout.xaxis2.range and figure.layout.xaxis.range[1] > 180
    assert figure.layout.yaxis.categoryarray == ("GPU 1 receive", "GPU 1 compute", "GPU 0 send", "GPU 0 compute")
    assert figure.data[2].hovertext == ("gemm1, piece 3, GPU 1 compute<br>50.0 ns, from 35.0 ns to 85.0 ns",)
    looks = {(t.marker.color, t.marker.pattern.shape) for t in figures.gantt([everything()]).data}
    assert len(looks) == len(DRAWN_PHASES)  # no two phases look alike


def test_of_many_gpus_the_gantt_draws_those_that_compute_most_and_least_and_says_so() -> None:
    work = [(7 * gpu) % 40 + 1.0 for gpu in range(40)]
    figure = figures.gantt(
        [panel("made up", 99.0, tuple(Span(g, "compute", "gemm1", 0, work[g]) for g in range(40)), 40)]
    )
    chosen = {int(label.split()[1]) for label in figure.data[0].y}
    assert sorted(work[gpu] for gpu in chosen) == [*range(1, 9), *range(33, 41)]
    assert "Of 40 GPUs" in figure.layout.title.text
    assert figure.layout.height < 800


def everything() -> Panel:
    spans = tuple(Span(0, "compute", phase, 10.0 * i, 10.0) for i, phase in enumerate(DRAWN_PHASES))
    return panel("all", 120.0, spans, 1)

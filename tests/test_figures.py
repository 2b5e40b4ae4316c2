"""Figures hold the numbers they were given, say so in words, and interpret no name from a file."""

import pytest

pytest.importorskip("plotly", reason="plotly is not installed")

import polars as pl

from perfmodel import figures, launch
from perfmodel.hardware import hardware
from perfmodel.hf_config import resolve
from perfmodel.predict import slowdown_curve
from perfmodel.routing import routing
from perfmodel.schedule import Span
from perfmodel.schedule.drawn import DRAWN_PHASES, Panel
from perfmodel.trace import Trace
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


def test_roofline_has_one_ceiling_per_tier() -> None:
    figure = figures.roofline(hardware("gh200"), "bf16")
    assert len(figure.data) == 4
    peak = figure.data[0].y[1]
    assert all(line.y[-1] == peak for line in figure.data)


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
    assert list(figure.data[0].x) == [5, 9]
    labels = figure.layout.yaxis.ticktext
    assert "<" not in "".join(labels)
    assert len(labels[1]) <= 48


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

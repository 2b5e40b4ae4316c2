"""Where a layer's time goes by schedule, speed-up along batch and skew, in numbers, words, figures and the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from perfmodel import report
from perfmodel.cli.main import app
from perfmodel.errors import InputError
from perfmodel.hardware import hardware
from perfmodel.model_memory import model_memory
from perfmodel.schedule import SCHEDULES, LayerTimeline, Span
from perfmodel.schedule.asked import memory_notes, possible_schedules, question_of
from perfmodel.schedule.curves import BATCHES, EXPONENT, EXPONENTS, TOKENS, Curve, Stretch, curve_of, curves, point
from perfmodel.schedule.pictured import breakdown, picture
from perfmodel.schedule.timeline import PHASES, TRANSFERS, Shared
from perfmodel.schedule.what_if import skewed

H100 = hardware("h100-sxm")


def asked(n_gpus: int = 4, n_tokens: int = 64, routing: str = "power-law:0.5", **changes):
    return replace(question_of(H100, "olmoe", routing, n_gpus, n_tokens), **changes)


def made(spans: tuple[Span, ...], busy_ns: tuple[float, ...], latency_ns: float, phases: dict[str, float]):
    return LayerTimeline(
        "made_up", latency_ns, (latency_ns,) * len(busy_ns), phases, busy_ns, {"host": 0.0}, "gate", 1, 0.0, 0.0,
        spans=spans,
    )  # fmt: skip


def test_what_computing_hides_is_no_exposed_communication_and_the_parts_sum_to_the_latency() -> None:
    spans = (
        Span(0, "compute", "gate", 5.0, 10.0),
        Span(0, "send", "dispatch", 10.0, 20.0),  # 5 under the gate, 10 by itself, 5 under gemm1
        Span(0, "receive", "dispatch", 10.0, 20.0),  # the same time, counted once
        Span(0, "compute", "gemm1", 25.0, 30.0),
        Span(0, "receive", "combine", 70.0, 20.0),  # after 15 of nothing
        Span(1, "compute", "gate", 5.0, 1.0),
    )
    found = breakdown(made(spans, (40.0, 1.0), 100.0, {"launch": 5.0, "gate": 10.0, "gemm1": 30.0}))
    assert found.gpu == 0
    assert found.parts == {
        "launch": 5.0, "gate": 10.0, "dispatch": 10.0, "gemm1": 30.0, "combine": 20.0, "waiting": 25.0,
    }  # fmt: skip
    assert (found.exposed_ns, found.hidden_ns, found.hidden_frac) == (30.0, 10.0, 0.25)
    other = breakdown(made(spans, (40.0, 1.0), 100.0, {}), 1)
    assert other.parts == {"launch": 5.0, "gate": 1.0, "waiting": 94.0} and other.hidden_frac is None


def test_phases_that_share_processors_count_for_their_work() -> None:
    spans = (Span(0, "compute", "gemm1", 0.0, 80.0), Span(0, "compute", "gemm2", 20.0, 80.0))
    one = made(spans, (90.0,), 100.0, {"launch": 0.0, "gemm1": 60.0, "gemm2": 30.0, "dispatch": 7.0})
    shared = Shared({"gemm1": 55.0, "gemm2": 25.0}, {"dispatch": 2.0, "combine": 6.0}, 32.0)
    found = breakdown(replace(one, shared=(shared,)))
    assert found.parts == pytest.approx(
        {"gemm1": 55.0, "gemm2": 25.0, "dispatch": 2.0, "combine": 6.0, "waiting": 12.0}
    )
    assert (found.hidden_ns, found.hidden_frac) == (32.0, 0.8)


def test_of_a_fused_kernel_each_gpu_has_its_own_phases() -> None:
    one = asked(4, 256, "power-law:1").timeline("fused")
    for gpu, busy_ns in enumerate(one.busy_ns):
        parts = breakdown(one, gpu).parts
        assert sum(ns for name, ns in parts.items() if name in PHASES and name not in TRANSFERS) == (
            pytest.approx(busy_ns)
        )
        assert sum(parts.values()) == pytest.approx(one.latency_ns)
    assert breakdown(one, 0).parts["gemm1"] > breakdown(one, 3).parts["gemm1"]


@pytest.mark.parametrize("routing", ["uniform", "power-law"])
@pytest.mark.parametrize("offload_frac", [0.0, 0.25])
@pytest.mark.parametrize("n_gpus", [1, 2, 8])
def test_of_every_schedule_the_parts_sum_to_the_latency_and_none_is_negative(routing, offload_frac, n_gpus) -> None:
    question = asked(n_gpus, 96, routing, offload_frac=offload_frac)
    found = picture(question, routing, SCHEDULES)
    for one, parts in zip(found.timelines, found.breakdowns, strict=True):
        assert sum(parts.parts.values()) == pytest.approx(one.latency_ns)
        assert min(parts.parts.values()) > 0
        computing = sum(
            ns for name, ns in parts.parts.items() if name not in ("launch", "waiting", "dispatch", "combine")
        )
        assert computing == pytest.approx(max(one.busy_ns))
        assert ("offload" in parts.parts) == bool(offload_frac)
        assert (parts.hidden_frac is None) == (n_gpus == 1)
        assert (found.overlap_efficiency[one.schedule] is None) == (n_gpus == 1)
    if n_gpus > 1:
        assert (
            found.breakdowns[0].hidden_ns == pytest.approx(0, abs=1e-6) and found.breakdowns[2].hidden_frac > 0.3
        )  # bulk never overlaps
    two = replace(question, n_gpus=2)
    if n_gpus == 8:
        expected = two.latency_ns("chunked") / question.latency_ns("chunked")
        assert found.overlap_efficiency["chunked"] == expected


def test_levers_are_what_the_changed_question_takes() -> None:
    question = asked(n_tokens=2048)
    found = picture(question, "power-law:0.5", SCHEDULES)
    levers = found.levers("bulk")
    latency_ns = question.latency_ns("bulk")
    assert list(levers.values()) == sorted(levers.values(), reverse=True)
    assert levers["skew"] == 1 - asked(n_tokens=2048, routing="uniform").latency_ns("bulk") / latency_ns
    free = {**question.overheads, "bulk": replace(question.overheads["bulk"], capacity_factor=None)}
    assert levers["padding"] == 1 - replace(question, overheads=free).latency_ns("bulk") / latency_ns
    assert "padding" not in found.levers("fused")
    words = f"{report.fastest_words(found)} {report.why_words(found)}"
    assert words.startswith("fused is fastest: ") and "even routing" in words


def test_a_schedule_that_is_as_fast_is_not_said_to_be_slower() -> None:
    alone = picture(asked(1, 8192, "uniform"), "uniform", ("bulk", "chunked"))  # launches are hidden
    assert "no faster than" in report.fastest_words(alone) and "1.00x" not in report.fastest_words(alone)


def test_a_curve_says_where_the_fastest_changes() -> None:
    # From half to twice as fast over a factor of 16 in tokens: as fast in the middle on logarithmic axes.
    curve = Curve(TOKENS, (16.0, 256.0), {"bulk": (100.0, 400.0), "fused": (200.0, 200.0)})
    assert curve.speedups == {"bulk": [1.0, 1.0], "fused": [0.5, 2.0]}
    assert curve.stretches == [Stretch("bulk", None, pytest.approx(64.0)), Stretch("fused", pytest.approx(64.0), None)]
    assert report.stretch_words(curve) == "bulk is fastest up to about 64, fused beyond (tokens on each GPU)."
    plain = Curve(EXPONENT, (0.0, 1.0, 2.0), {"bulk": (1.0, 2.0, 1.0), "fused": (2.0, 1.0, 2.0)})
    assert [one.high for one in plain.stretches] == [pytest.approx(0.5), pytest.approx(1.5), None]
    assert "fused from there to about 1.50, bulk beyond" in report.stretch_words(plain)
    alone = Curve(EXPONENT, (0.0, 2.0), {"fused": (2.0, 1.0)})
    assert alone.base == "fused"
    assert report.stretch_words(alone) == "fused is fastest from 0 to 2 (the exponent of the power law)."


def test_points_of_curves_are_the_questions_with_that_batch_and_skew() -> None:
    question = asked()
    names = ("bulk", "chunked")
    batch, skew = curves(question, names)
    assert batch.at == BATCHES and skew.at == EXPONENTS
    for name in names:
        assert batch.latency_ns[name][3] == asked(n_tokens=BATCHES[3]).latency_ns(name)
        assert skew.latency_ns[name][4] == asked(routing="power-law:1").latency_ns(name)
    assert skew.latency_ns["bulk"][2] == skewed(question, 0.5).latency_ns("bulk") == question.latency_ns("bulk")
    again = curve_of(TOKENS, BATCHES[:2], lambda value: point(question, TOKENS, value, names))
    assert again.latency_ns["chunked"] == batch.latency_ns["chunked"][:2]


def test_what_does_not_fit_is_said_with_its_remedy_and_what_fits_is_not() -> None:
    large = question_of(hardware("gh200"), "deepseek-v3", "uniform", 4, 64)
    (note,) = memory_notes(large, model_memory("deepseek-v3"), "give it more")
    assert note.startswith("hypothetical: ") and note.endswith("of the model; give it more")
    assert memory_notes(asked(), model_memory("olmoe"), "give it more") == []
    assert possible_schedules(H100) == SCHEDULES
    with pytest.raises(InputError, match="unknown"):
        question_of(H100, "no-such-model", "uniform", 4, 64)


SMALL = ("--shape", "olmoe", "--hardware", "h100-sxm", "--gpus", "4", "--tokens", "64")


def run(*words: str) -> str:
    done = CliRunner().invoke(app, words, catch_exceptions=False, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_the_command_gives_curves_and_where_the_time_goes() -> None:
    words = ("schedule", *SMALL, "--schedule", "bulk,chunked", "--curves")
    found = json.loads(run(*words, "--json"))
    question = asked(routing="uniform")
    assert found["pictured"]["bulk"]["parts"] == {
        f"{name}_ns": ns for name, ns in picture(question, "uniform", ("bulk",)).breakdowns[0].parts.items()
    }
    points = found["curves"][TOKENS]["points"]
    assert [row[TOKENS] for row in points] == list(BATCHES)
    assert points[2]["chunked_ns"] == question.latency_ns("chunked")
    page = run(*words)
    assert "O_e = T(2) / T(N)" in page and "tokens on each GPU" in page and "exponent of power law" in page
    assert max(map(len, page.split("\n"))) <= 120


def test_figures_hold_what_the_picture_says(tmp_path: Path) -> None:
    figures = pytest.importorskip("perfmodel.figures", reason="plotly is not installed")
    found = picture(asked(8), "power-law:0.5", SCHEDULES)
    both = curves(found.question, ("bulk", "chunked"))
    bars, gantt, *lines = [figure for figure, _ in figures.schedule_figures(found, both, n_most=4)]
    latency_ns = {one.schedule: one.latency_ns for one in found.timelines}
    for i, name in enumerate(bars.data[0].y):
        assert sum(bar.x[i] for bar in bars.data) == pytest.approx(latency_ns[name])
    assert bars.data[0].y[-1] == found.ranked[0].schedule  # fastest on top
    assert {"dispatch, exposed", "combine, exposed"} <= {bar.name for bar in bars.data}
    assert len({label.split()[1] for bar in gantt.data for label in bar.y}) == 4
    assert "Of 8 GPUs those 2 are drawn" in gantt.layout.title.text
    assert list(lines[0].data[1].y) == both[0].speedups["chunked"]
    assert lines[0].layout.xaxis.type == "log" and lines[1].layout.xaxis.type != "log"
    path = tmp_path / "layer.html"
    run("schedule", *SMALL, "--schedule", "bulk,chunked", "--html", str(path))
    assert path.read_text().count("<figcaption>") == 4


def test_bars_of_a_measured_workload_are_its_longest_ranks_beside_the_prediction() -> None:
    figures = pytest.importorskip("perfmodel.figures", reason="plotly is not installed")
    from perfmodel.ep_capture import load_ep_capture, shipped_ep_captures
    from perfmodel.schedule.captured import set_beside

    found = set_beside(load_ep_capture(shipped_ep_captures()[-1]))
    one = found.capture.measured[2]
    (gantt, _), (bars, alt) = figures.phase_figures([(found, one)])
    of_it = found.table.filter(workload=one.workload)
    seen, said = (dict(zip(bar.x, bar.y, strict=True)) for bar in bars.data)
    assert [bar.name for bar in bars.data] == ["measured", "predicted"]
    assert seen["gemm1"] == of_it.filter(phase="gemm1")["measured_ns"].max()
    assert said["latency"] == found.predicted[one.workload].latency_ns and seen["sharing"] is None
    assert one.shape in alt and one.shape in gantt.layout.title.text

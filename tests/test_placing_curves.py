"""What is read off curves, words about predictions and placements, and reports of commands with figures."""

import io
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

pytest.importorskip("plotly", reason="plotly is not installed")

from perfmodel import figures, report
from perfmodel.capture import load_capture, per_workload
from perfmodel.cli.main import app
from perfmodel.errors import InputError
from perfmodel.hardware import hardware
from perfmodel.hf_config import resolve
from perfmodel.model_memory import model_memory
from perfmodel.moe import MoEShape
from perfmodel.placement import RESIDENT, TIERS, Placement
from perfmodel.placement.export import FORMATS, archive, export
from perfmodel.placement.files import PlacedModel, placement_csv, read_placement_csv
from perfmodel.placing.ask import ask, handed_over, option_of, passes_in_words, sizes_of
from perfmodel.placing.compare import evaluated
from perfmodel.placing.curves import curve_rows, frontier, knee, measured_slowdowns, most_free, n_free
from perfmodel.placing.room import Engine
from perfmodel.predict import Prediction, predict, slowdown_curve
from perfmodel.routing import batch_of, pattern_shares, routing
from perfmodel.routing.named import Hints, recording_of
from tests.captures_made import write_gpu_capture

SHAPE = MoEShape("made_up", 4, 1, 64, 32, 3, 2, 0, "bf16", "made up")


def curve_of(*slowdowns: float) -> list[Prediction]:
    """A curve of these slowdowns, made up, one expert more away at each."""
    n = len(slowdowns) - 1
    return [
        Prediction(100.0 * slow, 100.0, {"compute": 100.0 * slow}, "compute", None, "datasheet", (), i, n, float(i))
        for i, slow in enumerate(slowdowns)
    ]


def test_experts_are_free_up_to_the_first_that_costs_more_than_is_allowed() -> None:
    assert n_free(curve_of(1.0, 1.01, 1.02, 1.2, 1.0)) == 2
    assert n_free(curve_of(1.0, 1.01, 1.02, 1.2), within_frac=0.005) == 0
    assert n_free(curve_of(1.0, 0.9, 0.9)) == 2
    assert most_free({"a": curve_of(1.0, 1.5, 2.0), "b": curve_of(1.0, 1.0, 1.1)}) == ("b", 1, 2)


def test_curves_become_one_table() -> None:
    table = curve_rows({"a": curve_of(1.0, 1.5), "b": curve_of(1.0, 1.1)})
    assert table["line"].to_list() == ["a", "a", "b", "b"]
    assert table["n_offloaded"].to_list() == [0, 1, 0, 1]
    assert table["slowdown"].to_list() == [1.0, 1.5, 1.0, 1.1]


def test_the_frontier_holds_what_no_other_point_beats_in_both() -> None:
    points = [(4.0, 1.0), (1.0, 3.0), (2.0, 3.5), (2.0, 2.0), (3.0, 2.0)]
    assert frontier(points) == [1, 3, 0]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_the_frontier_is_what_comparing_all_pairs_leaves(points: list[tuple[int, int]]) -> None:
    def beaten(p: tuple[int, int]) -> bool:
        return any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)

    assert {points[i] for i in frontier(points)} == {p for p in points if not beaten(p)}


def test_the_knee_is_where_the_curve_bends() -> None:
    assert knee([(0.0, 10.0), (1.0, 2.0), (5.0, 1.5), (10.0, 1.0)]) == 1
    assert knee([(0.0, 3.0), (1.0, 2.0), (2.0, 1.0)]) is None  # straight
    assert knee([(0.0, 3.0), (1.0, 1.0)]) is None


def test_a_prediction_is_told_in_sentences_with_its_own_numbers() -> None:
    shape = resolve("poster")
    found = predict(hardware("gh200"), shape, routing("mmlu-like", 64, 1, 65_536), 0.3125)
    facts = dict(report.prediction_facts(found))
    assert (
        facts["costs"] == "20 of 64 experts off the GPU cost 750 µs a layer; the time is compute 58.0 % and link 40.3 %"
    )
    assert facts["binds"] == "computing"
    assert "no interval without a fitted model" in facts["rests on"]


def test_what_a_capture_measured_of_offloading_stands_over_the_curve(tmp_path: Path) -> None:
    capture = load_capture(write_gpu_capture(tmp_path / "made_up"))
    found = measured_slowdowns(capture, resolve("olmoe"), 64, "power-law:1.2", "zero-copy")
    assert sorted(found) == [
        "measured, mapped, graph",
        "measured, mapped, launched by the host",
        "measured, split, launched by the host",
    ]
    times = per_workload(capture.observations).filter(
        pl.col("op") == "moe_layer",
        pl.col("shape") == "olmoe",
        pl.col("dtype") == "bf16",
        pl.col("n_tokens") == 64,
        pl.col("launch").is_null(),
    )
    away, here = (times.filter(pl.col("access") == a)["time_ns"][0] for a in ("zero-copy", "resident"))
    assert found["measured, mapped, launched by the host"] == [(0.5, away / here)]
    assert measured_slowdowns(capture, resolve("olmoe"), 64, "uniform", "zero-copy") == {}
    words = ["predict", "--hardware", str(tmp_path / "made_up"), "--shape", "olmoe", "--tokens", "64"]
    more = ["--routing", "power-law:1.2", "--offload", "0.5", "--op", "moe-layer", "--html", str(tmp_path / "r.html")]
    CliRunner().invoke(app, [*words, *more], catch_exceptions=False)
    assert "measured, mapped, graph" in (tmp_path / "r.html").read_text()


def test_lines_of_a_page_become_pairs_and_what_goes_on_joins_them() -> None:
    assert report.labelled(["best          ours", "              and more", "next          theirs"]) == [
        ("best", "ours\nand more"),
        ("next", "theirs"),
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("64", [{64: 1.0}]),
        ("64, 4096", [{64: 1.0}, {4096: 1.0}]),
        ("200x64,1x4096", [{64: 200.0, 4096: 1.0}]),
        ("512+128", [{512: 1.0, 1: 127.0}]),
    ],
)
def test_words_about_passes_say_by_themselves_what_they_are(words: str, expected: list[dict[int, float]]) -> None:
    given_as = {"tokens": None, "mix": None, "requests": None, option_of(words): words}
    assert sizes_of(given_as["tokens"], given_as["mix"], given_as["requests"])[0] == expected


def test_passes_are_named_with_how_often_they_are_made() -> None:
    assert passes_in_words({64: 200.0, 4096: 1.0}) == "200 x 64 tokens, 4,096 tokens"


def test_a_batch_by_shares_is_that_of_the_pattern_they_come_from() -> None:
    by_name, by_shares = routing("power-law", 16, 2, 64), batch_of("x", pattern_shares("power-law", 16), 64, 2)
    assert np.array_equal(by_name.counts, by_shares.counts)


def case_of(frac: float = 0.5):  # type: ignore[no-untyped-def]
    shape, memory = resolve("olmoe"), model_memory("olmoe")
    drawn = recording_of("layered", Hints(shape, n_steps=4, step_tokens=64))
    return ask(hardware("gh200"), shape, memory, drawn, Engine(expert_frac=frac), access="zero-copy")


def test_a_changed_expert_is_named_with_its_layer_and_what_it_costs() -> None:
    case = case_of()
    question, _ = case.question({64: 1.0})
    tier = np.where(question.popularity > np.median(question.popularity), RESIDENT, question.tiers[1]).astype(np.int8)
    busiest = int(question.popularity[3].argmax())
    changed = tier.copy()
    changed[3, busiest] = question.tiers[1]
    before, after = (evaluated(question, "x", each, None) for each in (tier, changed))
    lines = report.change_lines(question, before, after, list(range(16)))
    assert "slower" in lines[0] and f"{before.slowdown:.3f}x" in lines[0]
    assert lines[1] == f"layer 3: expert {busiest} resident -> in-place"
    assert lines[2] == "12.6 MB of GPU memory less"
    assert report.change_lines(question, before, before, list(range(16))) == ["nothing was changed"]


def placed_of(tier: list[list[int]]) -> PlacedModel:
    return PlacedModel(Placement("made_up", np.array(tier, dtype=np.int8)), SHAPE, tuple(range(1, len(tier) + 1)))


@given(st.lists(st.lists(st.integers(0, len(TIERS) - 1), min_size=4, max_size=4), min_size=1, max_size=4))
def test_a_placement_survives_csv(tier: list[list[int]]) -> None:
    placed, none = placed_of(tier), placed_of([[0] * 4] * len(tier))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "placement.csv"
        path.write_text(placement_csv(placed))
        assert read_placement_csv(path, none).placement.tier.tolist() == tier


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "does not begin with the header"),
        ("layer,expert,tier\n1,0,hbm\n", "line 2: found '1,0,hbm'"),
        ("layer,expert,tier\n1,4,resident\n", "there is no expert 4 of layer 1"),
        ("layer,expert,tier\n0,0,resident\n", "there is no expert 0 of layer 0"),
        ("layer,expert,tier\n1,0,host\n\n1,0,host\n", "line 4: expert 0 of layer 1 stands twice"),
        ("layer,expert,tier\n" + "9" * 5000 + ",0,host\n", "line 2: found"),
        ("layer,expert,tier\n1,²,host\n", "line 2: found"),
    ],
)
def test_a_csv_that_is_no_placement_is_refused_in_one_sentence(tmp_path: Path, words: str, message: str) -> None:
    (tmp_path / "p.csv").write_text(words)
    with pytest.raises(InputError, match=r"^p\.csv") as error:
        read_placement_csv(tmp_path / "p.csv", placed_of([[0, 0, 0, 0]]))
    assert message in str(error.value)


def test_every_export_is_one_file_or_a_zip_that_says_how_to_use_it() -> None:
    case = case_of()
    question, windows = case.question({64: 1.0})
    tier = np.where(question.popularity > np.median(question.popularity), RESIDENT, question.tiers[1]).astype(np.int8)
    outcome = evaluated(question, "x", tier, None)
    placed = handed_over(question, case.recording, case.memory, tier, "x", outcome=outcome, windows=windows)
    for form in FORMATS:
        made = export(form, placed, question.popularity)
        name, content = archive(made, "placement")
        if len(made.files) == 1:
            assert (name, content) == next(iter(made.files.items()))
            continue
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            assert set(file.namelist()) == {*made.files, "README.txt"}
            assert all(file.read(one) == made.files[one] for one in made.files)
            assert all(flag in file.read("README.txt").decode() for flag in made.flags)


def test_lines_that_leave_the_axis_say_how_far_they_go_and_the_free_part_is_named() -> None:
    shape = resolve("poster")
    batch = routing("mmlu-like", 64, 1, 65_536)
    curves = {
        mode: slowdown_curve(hardware("gh200"), shape, batch, mode) for mode in ("zero-copy", "cpu", "copy-overlap")
    }
    figure = figures.slowdown(curves, measured={"published <b>": [(0.3125, 1.5)]})
    assert [line.name for line in figure.data] == [
        "zero-copy",
        "cpu (to 77x)",
        "copy-overlap",
        "published &lt;b&gt;",
    ]
    assert figure.layout.yaxis.range[1] == pytest.approx(1.15 * curves["zero-copy"][-1].slowdown)
    slower = figures.slowdown(curves, measured={"published": [(0.5, 1.4 * curves["zero-copy"][-1].slowdown)]})
    assert slower.layout.yaxis.range[1] > 1.4 * curves["zero-copy"][-1].slowdown
    assert figure.layout.annotations[0].text == "free with copy-overlap: 42 experts"
    assert figure.layout.shapes[-1].x1 == n_free(curves["copy-overlap"]) / 64


def test_a_map_of_many_experts_has_the_means_of_neighbours() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(256), 61)
    figure = figures.routing_map(shares, list(range(3, 64)), is_ranked=False)
    cells = np.array(figure.data[0].z)
    assert cells.size <= figures.MAX_POINTS and cells.shape[0] == 61
    few = figures.routing_map(shares[:2], [0, 1], is_ranked=False)
    assert np.allclose(np.array(few.data[0].z), shares[:2] * 256, rtol=1e-6)
    assert np.average(cells[0], weights=np.diff(np.linspace(0, 256, cells.shape[1] + 1).round())) == pytest.approx(1)
    ranked = np.array(figures.routing_map(shares, range(61)).data[0].z)
    assert (np.diff(ranked, axis=1) <= 1e-6).all()


def test_figures_of_an_answer_hold_its_policies_and_its_trade_off() -> None:
    case = case_of()
    answer = case.answer({64: 1.0}, "ascending", is_pareto=True)
    bars, parts, memory, _ = (figure for figure, _ in figures.placing_figures(answer))
    drawn = {label: x + 1 for bar in bars.data for label, x in zip(bar.y, bar.x, strict=True)}
    assert drawn["ascending (taken)"] == pytest.approx(answer.best.slowdown)
    assert sum(bar.x[0] for bar in parts.data) == pytest.approx(answer.predictions["ascending"].latency_ns)
    line = next(one for one in memory.data if one.name == "least slowdown for its memory")
    assert list(line.y) == sorted(line.y, reverse=True) and line.y[-1] == pytest.approx(1)


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "--hardware", "gh200", "--shape", "poster", "--tokens", "64", "--offload", "0.25"],
        ["routing", "layered", "--shape", "olmoe", "--steps", "4", "--step-tokens", "64"],
        ["place", "--shape", "poster", "--routing", "uniform", "--hardware", "gh200", "--hbm-budget", "50%"],
    ],
)
def test_commands_write_reports_with_figures(tmp_path: Path, words: list[str]) -> None:
    more = ["--policy", "uniform", "--access", "zero-copy", "--steps", "4"] if words[0] == "place" else []
    path = tmp_path / "report.html"
    done = CliRunner().invoke(app, [*words, *more, "--html", str(path)], catch_exceptions=False)
    assert done.exit_code == 0
    page = path.read_text()
    assert page.count('<figure role="img"') >= 2 and "<script src" not in page
    assert done.stdout.splitlines()[0].split(",")[0] in page


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    words = ["predict", "--hardware", "none", "--shape", "poster", "--tokens", "64", "--html", str(tmp_path / "x.txt")]
    with pytest.raises(InputError, match=r"expected an \.html file"):
        CliRunner().invoke(app, words, catch_exceptions=False, standalone_mode=False)


def test_a_case_counts_slots_for_copies_where_experts_are_copied() -> None:
    case = case_of()
    assert case.engine.n_staging == 0
    other = ask(hardware("gh200"), case.shape, case.memory, case.recording, replace(case.engine), access="auto")
    assert other.engine.n_staging == 2

"""Figures of passes, policies and systems hold the numbers of their pages; commands write them into reports."""

from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

pytest.importorskip("plotly", reason="plotly is not installed")

from perfmodel import figures
from perfmodel.balance import Comparison, Outcome
from perfmodel.cli.main import app
from perfmodel.ep_capture import load_ep_capture, shipped_ep_captures
from perfmodel.passes.ranks import LayerRanks

PROFILE = load_ep_capture(shipped_ep_captures()[0]).traces[0]
HOSTILE = "<b>lpt</b>"


def made(n_members: int) -> LayerRanks:
    members = pl.DataFrame(
        {
            "rank": range(n_members),
            "device": [None] * n_members,
            "dur_ns": [100.0 * (i + 1) for i in range(n_members)],
            "idle_frac": [0.25] * n_members,
            "communication_exposed_ns": [None, *[10.0] * (n_members - 1)],
        },
        schema_overrides={"device": pl.Int64},
    )
    waits = pl.DataFrame(
        {"step": [0, 0, 1, 1], "rank": [0, 1, 0, 1], "device": [None] * 4, "wait_ns": [1.0, 2.0, 0.0, 70.0],
         "caused_ns": [2.0, 1.0, 70.0, 0.0]},
        schema_overrides={"device": pl.Int64},
    )  # fmt: skip
    late = pl.DataFrame({"step": [0, 1], "wait_ns": [3.0, 70.0]})
    return LayerRanks("made_up", members, waits, late, {}, 100.0, {}, ())


def test_the_median_pass_of_each_rank_is_divided_without_remainder_slowest_first() -> None:
    (bars, _), (waits, alt) = figures.rank_figures(made(3))
    assert list(bars.data[0].x) == ["rank 2", "rank 1", "rank 0"]
    assert [list(part.y) for part in bars.data] == [[215.0, 140.0, 75.0], [10.0, 10.0, 0.0], [75.0, 50.0, 25.0]]
    assert "step 1" in alt and list(waits.data[0].x) == ["rank 0", "rank 1"]
    assert [list(part.y) for part in waits.data] == [[0.0, 70.0], [70.0, 0.0]]
    assert "step 0" in figures.rank_figures(made(3), 0)[1][1]


def test_of_many_ranks_the_slowest_are_drawn() -> None:
    (bars, _), _ = figures.rank_figures(made(90))
    assert len(bars.data[0].x) == 60 and bars.data[0].x[0] == "rank 89"


def test_runs_are_drawn_by_their_overlap_efficiency() -> None:
    rows = [{"n_gpus": n, "latency_ns": ns, "overlap_efficiency_frac": 80.0 / ns} for n, ns in ((2, 80.0), (8, 100.0))]
    ((line, _),) = figures.scaling_figures(rows)
    assert list(line.data[0].x) == ["2", "8"] and list(line.data[0].y) == [1.0, 0.8]


def outcome(policy: str, layer_ns: float, by_rows_ns: float | None) -> Outcome:
    return Outcome(policy, layer_ns, {"mean": layer_ns}, {}, 1.5, (0.75, 0.25), (0.1, 0.4), by_rows_ns)


def test_policies_are_drawn_by_rows_where_all_know_them_and_names_are_escaped() -> None:
    both = (outcome("linear", 20.0, 30.0), outcome(HOSTILE, 10.0, 25.0))
    (times, alt), (loads, _) = figures.balance_figures(Comparison(both, (), 1, 1))
    assert list(times.data[0].x) == [30.0, 25.0] and times.data[0].y[1] == "&lt;b&gt;lpt&lt;/b&gt;"
    assert list(loads.data[0].y) == [0.9, 0.6] and loads.data[1].name == "&lt;b&gt;lpt&lt;/b&gt;"
    assert HOSTILE in alt  # alternative text is escaped where it is written
    one = (both[0], outcome("lpt", 10.0, None))
    assert list(figures.balance_figures(Comparison(one, (), 1, 1))[0][0].data[0].x) == [20.0, 10.0]


@pytest.mark.parametrize(
    ("words", "n_figures"),
    [
        (f"layers {PROFILE}", 2),
        (f"layers {PROFILE / 'rank-0.trace.json.gz'}", 1),
        (f"layers 2={PROFILE}", 1),
        ("balance --routing layered --shape olmoe --gpus 4 --steps 4 --window 2 --policy linear", 2),
        ("trimoe --shape deepseek-v2-lite --steps 4 --layers 1", 2),
    ],
)
def test_a_command_writes_its_figures_and_its_page_into_a_report(words: str, n_figures: int, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    arguments = [*words.split(), "--html", str(path)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False, standalone_mode=False)
    assert done.exception is None, done.exception
    page = path.read_text(encoding="utf-8")
    assert page.count("<figcaption>") == n_figures
    assert done.stdout.splitlines()[0].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in page

"""Regression checks: verdicts on captures made for the test, the comparability gate, and the statistics behind them."""

import json
from pathlib import Path

import numpy as np
import pytest

from perfmodel.capture import Capture, load_capture
from perfmodel.errors import InputError, NotComparableError
from perfmodel.regression import check, is_slower
from tests.captures_made import write_synthetic_capture


def verdict(tmp_path: Path, factor: float, n_runs: int = 5, sd: float = 0.01, margin: float = 0.03) -> list[str]:
    rng = np.random.default_rng(7)
    a = write_synthetic_capture(tmp_path / "baseline", n_runs=n_runs, noise=lambda: float(np.exp(rng.normal(0, sd))))
    b = write_synthetic_capture(
        tmp_path / "candidate", n_runs=n_runs, noise=lambda: factor * float(np.exp(rng.normal(0, sd)))
    )
    return [v.verdict for v in check(load_capture(a), load_capture(b), margin)]


def test_the_same_speed_is_ok(tmp_path: Path) -> None:
    overall, *each = verdict(tmp_path, 1.0)
    assert overall == "ok"
    assert "regressed" not in each


def test_thirty_per_cent_slower_is_found_everywhere(tmp_path: Path) -> None:
    assert set(verdict(tmp_path, 1.3)) == {"regressed"}


def test_faster_is_improved_and_not_slower(tmp_path: Path) -> None:
    assert verdict(tmp_path, 0.8)[0] == "improved"


def test_a_wide_margin_forgives(tmp_path: Path) -> None:
    assert verdict(tmp_path, 1.05, margin=0.2)[0] == "ok"


def test_noise_that_hides_the_answer_is_inconclusive(tmp_path: Path) -> None:
    assert "inconclusive" in verdict(tmp_path, 1.03, n_runs=3, sd=0.15)[1:]


def test_a_single_run_is_at_most_suspect(tmp_path: Path) -> None:
    verdicts = set(verdict(tmp_path, 1.5, n_runs=1))
    assert "suspect" in verdicts
    assert "regressed" not in verdicts


def test_the_interval_holds_the_true_ratio_as_often_as_it_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    inside = 0
    for trial in range(20):
        a = write_synthetic_capture(tmp_path / f"a{trial}", n_runs=5, noise=lambda: float(np.exp(rng.normal(0, 0.03))))
        b = write_synthetic_capture(
            tmp_path / f"b{trial}", n_runs=5, noise=lambda: 1.1 * float(np.exp(rng.normal(0, 0.03)))
        )
        each = check(load_capture(a), load_capture(b))[1:]
        inside += sum(v.ratio_low <= 1.1 <= v.ratio_high for v in each) / len(each)
    assert 0.8 < inside / 20 <= 1.0


def test_short_captures_of_a_virtual_machine_must_differ_by_more(tmp_path: Path) -> None:
    """Its neighbours slow it for minutes: 10 % between two quick captures says nothing there, 40 % does."""

    def capture(name: str, factor: float, span_s: int) -> Capture:
        path = write_synthetic_capture(tmp_path / name, noise=lambda: factor, machine={"hypervisor": True})
        manifest = json.loads((path / "capture.json").read_text())
        manifest["runs"] = [{"run": 0, "started": 1000, "finished": 1000 + span_s}]
        (path / "capture.json").write_text(json.dumps(manifest))
        return load_capture(path)

    quick = capture("quick", 1.0, 30)
    overall = check(quick, capture("quick10", 1.1, 30))[0]
    assert (overall.verdict, overall.n_more_runs) == ("inconclusive", None)
    assert check(quick, capture("quick40", 1.4, 30))[0].verdict == "regressed"
    assert check(capture("long", 1.0, 600), capture("long10", 1.1, 600))[0].verdict == "regressed"


def test_another_machine_is_not_comparable_unless_declared(tmp_path: Path) -> None:
    a = load_capture(write_synthetic_capture(tmp_path / "a"))
    b = load_capture(write_synthetic_capture(tmp_path / "b", machine={"cpu_model": "another synthetic CPU"}))
    with pytest.raises(NotComparableError, match=r"machine\.cpu_model") as caught:
        check(a, b)
    assert caught.value.exit_code == 3
    assert not is_slower(check(a, b, axes=["machine"]))
    with pytest.raises(InputError, match="unknown axis 'weather'"):
        check(a, b, axes=["weather"])


def test_runs_are_matched_by_their_number(tmp_path: Path) -> None:
    """A workload that run 0 left out must not lend its run 1 to the others' run 0."""
    a = write_synthetic_capture(tmp_path / "a", n_runs=3)
    b = write_synthetic_capture(tmp_path / "b", n_runs=3)
    rows = [json.loads(line) for line in (b / "observations.jsonl").read_text().splitlines()]
    first = rows[0]["workload"]
    slow_run = [{**row, "times_ns": [t * 50 for t in row["times_ns"]]} if row["run"] == 0 else row for row in rows]
    kept = [row for row in slow_run if not (row["run"] == 0 and row["workload"] == first)]
    (b / "observations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    overall = check(load_capture(a), load_capture(b))[0]
    assert (overall.n_runs_candidate, overall.verdict) == (2, "ok")


def test_captures_without_a_common_workload_are_not_comparable(tmp_path: Path) -> None:
    a = write_synthetic_capture(tmp_path / "a")
    b = write_synthetic_capture(tmp_path / "b")
    for name in ("workloads.jsonl", "observations.jsonl"):
        rows = [json.loads(line) for line in (b / name).read_text().splitlines()]
        (b / name).write_text("".join(json.dumps({**row, "workload": "x" + row["workload"]}) + "\n" for row in rows))
    with pytest.raises(NotComparableError, match="share no workload"):
        check(load_capture(a), load_capture(b))


def test_a_margin_that_is_none_is_refused(tmp_path: Path) -> None:
    a = load_capture(write_synthetic_capture(tmp_path / "a"))
    with pytest.raises(InputError, match="margin"):
        check(a, a, 0.0)

"""Regression checks: verdicts on captures made for the test, the comparability gate, and the statistics behind them."""

import json
import re
import xml.etree.ElementTree as ET
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats
from typer.testing import CliRunner

from perfmodel import regression, report
from perfmodel.capture import Capture, fitted_rows, load_capture, per_workload, profile_of, shipped_captures
from perfmodel.cli.main import app
from perfmodel.errors import InputError, NotComparableError
from perfmodel.figures import check_figures
from perfmodel.hardware import hardware
from perfmodel.latency import LatencyModel, load_model
from perfmodel.physics import Ceilings
from perfmodel.regression import (
    CHASE,
    DEFAULT_FAILURES,
    EXPLAINED,
    FINE,
    NOT_JUDGED,
    ON_THE_TABLE,
    OUTSIDE_MODEL,
    SLOWER,
    SLOWER_THAN_MODEL,
    UNDECIDED,
    Comparison,
    Evidence,
    Measured,
    Run,
    Verdict,
    against_model,
    model_for,
    of_capture,
    unpack_sides,
)
from perfmodel.regression.against import AS_EXPECTED, FASTER_THAN_MODEL
from perfmodel.regression.evidence import is_declared
from perfmodel.regression.spread import Mean, Variance
from tests import captures_made
from tests.captures_made import SHAPES, noise, write_gpu_capture, write_synthetic_capture
from tests.conftest import ROOT


def check(a: Capture, b: Capture, *arguments: Any, **options: Any) -> list[Verdict]:
    return regression.check(of_capture(a), of_capture(b), *arguments, **options)


def compare(a: Capture, b: Capture, *arguments: Any, **options: Any) -> Comparison:
    return regression.compare(of_capture(a), of_capture(b), *arguments, **options)


def made_up(name: str, run_ns: dict[str, list[float]], **options: Any) -> Evidence:
    """A side of made-up workloads, each with its time in each run."""
    measured = {key: Measured(key, key, dict(enumerate(times))) for key, times in run_ns.items()}
    runs = tuple(Run(run) for run in range(max(map(len, run_ns.values()))))
    return Evidence(
        **{"name": name, "kind": "capture", "fingerprint": {}, "workloads": measured, "runs": runs} | options
    )


def verdict(tmp_path: Path, factor: float, n_runs: int = 5, sd: float = 0.01, margin: float = 0.03) -> list[str]:
    rng = np.random.default_rng(7)
    a = write_synthetic_capture(tmp_path / "baseline", n_runs=n_runs, noise=noise(rng, sd))
    b = write_synthetic_capture(tmp_path / "candidate", n_runs=n_runs, noise=noise(rng, sd, factor))
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


def test_two_runs_beside_a_single_one_have_the_degrees_of_freedom_of_the_two() -> None:
    two = made_up("two", {"workload": np.exp([0.0, 0.2]).tolist()})
    one = made_up("one", {"workload": np.exp([0.5]).tolist()})
    # The mean of two has a variance of 0.02 / 2 on one degree of freedom, the single run 0.05 squared as assumed.
    degrees = (0.01 + 0.0025) ** 2 / 0.01**2
    half = stats.t.ppf(0.95, degrees) * np.sqrt(0.0125)
    found = regression.check(two, one, 0.03)[1]
    assert np.log([found.ratio_low, found.ratio_high]) == pytest.approx([0.4 - half, 0.4 + half])
    assert found.verdict == "inconclusive"


def test_a_single_run_is_at_most_suspect(tmp_path: Path) -> None:
    verdicts = set(verdict(tmp_path, 1.5, n_runs=1))
    assert "suspect" in verdicts
    assert "regressed" not in verdicts


def test_the_interval_holds_the_true_ratio_as_often_as_it_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    inside = 0
    for trial in range(20):
        a = write_synthetic_capture(tmp_path / f"a{trial}", n_runs=5, noise=noise(rng, 0.03))
        b = write_synthetic_capture(tmp_path / f"b{trial}", n_runs=5, noise=noise(rng, 0.03, 1.1))
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
    with pytest.raises(NotComparableError, match=r"machine\.cpu_model.* would be --axis machine$") as caught:
        check(a, b)
    assert caught.value.exit_code == 3
    assert not any(one.verdict in SLOWER for one in check(a, b, axes=["machine"]))
    with pytest.raises(InputError, match="unknown axis 'weather'"):
        check(a, b, axes=["weather"])


def test_what_is_no_side_is_named_for_what_it_is(tmp_path: Path) -> None:
    a = str(write_synthetic_capture(tmp_path / "a"))
    (tmp_path / "empty").mkdir()
    for path, words in (
        (tmp_path / "nowhere", "found nothing"),
        (tmp_path / "empty", "found a folder without any"),
        (tmp_path, r"found a folder of captures \(a\), of which one is a side"),
        (ROOT / "traces" / "epyc-zen5-2p-expert-parallel", "is a capture of expert parallelism"),
    ):
        with pytest.raises(InputError, match=words):
            regression.sides(a, path)


def test_a_margin_without_its_percent_sign_is_refused(tmp_path: Path) -> None:
    a = str(write_synthetic_capture(tmp_path / "a"))
    done = CliRunner().invoke(app, ["check", a, a, "--margin", "3"])
    assert isinstance(done.exception, InputError) and "write 3% or 0.03" in str(done.exception)


def test_axes_may_be_given_with_commas(tmp_path: Path) -> None:
    a = write_synthetic_capture(tmp_path / "a")
    b = write_synthetic_capture(tmp_path / "b", machine={"cpu_model": "another synthetic CPU"})
    done = CliRunner().invoke(app, ["check", str(a), str(b), "--axis", "hardware, os", "--model", "none", "--json"])
    assert json.loads(done.stdout)["axes"] == ["hardware", "os"]


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


def compared(tmp_path: Path, factor: float = 1.0, axes: tuple[str, ...] = (), **options: Any) -> Comparison:
    """A made-up candidate that takes `factor` times the baseline's time, against the baseline and its own model."""
    rng = np.random.default_rng(11)
    a = write_synthetic_capture(tmp_path / "base", noise=noise(rng, 0.01))
    b = write_synthetic_capture(tmp_path / "cand", noise=noise(rng, 0.01, factor))
    return compare(load_capture(a), load_capture(b), axes=axes, **options)


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A candidate that is as fast as its baseline."""
    return compared(tmp_path_factory.mktemp("steady"))


def test_the_interval_of_one_side_is_students() -> None:
    """Log medians 0, 0.1, 0.2: mean 0.1, standard deviation 0.1, t(0.95, 2) = 2.919986, half-width 2.92 * 0.1 / 3^0.5;
    with a known drift of variance v beside it, degrees of freedom grow by ((s2 / 3 + v) / (s2 / 3))^2."""
    of_runs = Variance(0.01, 2)
    mean = Mean(0.1, 3, 3, (of_runs,))
    assert mean.interval == pytest.approx((0.1, 0.1 - 0.168586, 0.1 + 0.168586), abs=1e-6)
    half = stats.t.ppf(0.95, 2 * 4) * (2 * 0.01 / 3) ** 0.5
    drifting = Mean(0.1, 3, 3, (of_runs,), (Variance(0.01 / 3),))
    assert drifting.interval[2] - 0.1 == pytest.approx(half)


def test_slower_with_the_same_rates_is_a_regression_to_chase(tmp_path: Path) -> None:
    found = compared(tmp_path, 1.4, axes=("machine",))
    assert found.overall.cell == CHASE
    assert found.overall.expected_ratio == 1.0
    assert found.overall.expectation is not None and found.overall.expectation.verdict == SLOWER_THAN_MODEL
    assert found.cells()[CHASE] == len(found.each) == 32
    table = found.table()
    assert table["workload"].to_list() == [case.verdict.label for case in found.each]
    assert table["ratio"].is_sorted(descending=True) and set(table["cell"]) == {CHASE}
    assert (found.failures(), found.exit_code()) == (["regressed", SLOWER_THAN_MODEL], 1)


def test_a_slowdown_too_small_for_the_models_interval_is_not_explained_by_it(tmp_path: Path) -> None:
    """20 % lie inside what an unsure model vouches for, but no rate has moved: the model is no excuse."""
    compared(tmp_path, 1.2)
    a, b = (load_capture(tmp_path / name) for name in ("base", "cand"))
    model = model_for(a)
    assert model.confidence_ is not None
    model.confidence_ = replace(model.confidence_, quantile=20 * model.confidence_.quantile)
    found = compare(a, b, axes=("machine",), model=model)
    regressed = [case for case in found.each if case.verdict.verdict == "regressed"]
    assert len(regressed) > 20 and {case.cell for case in regressed} == {CHASE}
    assert {case.expectation.verdict for case in regressed if case.expectation} == {"as-expected"}
    assert found.exit_code() == 1


def test_a_machine_of_half_the_rates_is_slower_as_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = load_capture(write_synthetic_capture(tmp_path / "a"))
    roof = Ceilings(captures_made.ROOF.flops_per_s / 2, captures_made.ROOF.bytes_per_s / 2, ())
    monkeypatch.setattr(captures_made, "ROOF", roof)
    b = load_capture(
        write_synthetic_capture(tmp_path / "b", machine={"cpu_model": "a synthetic CPU of half the rates"})
    )
    found = compare(a, b, axes=("machine",))
    assert found.cells()[EXPLAINED] == len(found.slower()) - 1 > 20
    assert (found.overall.cell, found.failures(), found.exit_code()) == (EXPLAINED, [], 0)
    assert found.exit_code(["explained"]) == 1
    for case in found.each:  # what the model makes of the rates is what the made-up machine does
        assert case.expected_ratio == pytest.approx(case.verdict.ratio, rel=0.03)
    assert [(q.ratio, q.moved) for q in found.quantities if q.ratio != 1] == [(0.5, "slower"), (0.5, "slower")]


def test_rates_that_fell_on_the_same_machine_are_no_excuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = load_capture(write_synthetic_capture(tmp_path / "a"))
    roof = Ceilings(captures_made.ROOF.flops_per_s / 2, captures_made.ROOF.bytes_per_s / 2, ())
    monkeypatch.setattr(captures_made, "ROOF", roof)
    found = compare(a, load_capture(write_synthetic_capture(tmp_path / "b")))
    assert found.overall.cell == EXPLAINED
    assert (found.failures(), found.exit_code()) == (["regressed"], 1)


def test_as_fast_as_a_slow_baseline_leaves_something_on_the_table(tmp_path: Path) -> None:
    model = model_for(load_capture(write_synthetic_capture(tmp_path / "as-it-should-be")))
    a, b = (load_capture(write_synthetic_capture(tmp_path / name, noise=lambda: 1.5)) for name in "ab")
    found = compare(a, b, model=model)
    assert found.cells()[ON_THE_TABLE] == len(found.each)
    assert found.failures() == [SLOWER_THAN_MODEL]
    assert found.exit_code(["regressed"]) == 0


def test_the_runs_that_cannot_tell_are_undecided_and_fail_where_asked(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    a, b = (write_synthetic_capture(tmp_path / name, n_runs=2, noise=noise(rng, 0.5)) for name in "ab")
    found = compare(load_capture(a), load_capture(b), with_model=False)
    assert found.overall.verdict.verdict == "inconclusive"
    assert (found.exit_code(), found.exit_code(must_conclude=True)) == (0, 4)
    assert found.cells()[NOT_JUDGED] == len(found.each)
    judged = compare(load_capture(a), load_capture(b), model=model_for(load_capture(a)))
    assert judged.cells()[UNDECIDED] == sum(case.verdict.verdict == "inconclusive" for case in judged.each) > 0


def test_too_few_shapes_leave_the_second_question_open(tmp_path: Path) -> None:
    a, b = (load_capture(write_synthetic_capture(tmp_path / name, shapes=SHAPES[:2])) for name in "ab")
    found = compare(a, b)
    assert found.model is None and "expected at least 3" in (found.no_model or "")
    assert found.overall.expectation is None and found.exit_code() == 0
    assert "no model: capture 'a' measured 2 shapes" in report.check_page(found)


def test_what_lies_outside_the_fit_is_said_with_its_range(tmp_path: Path) -> None:
    capture = load_capture(write_synthetic_capture(tmp_path / "a"))
    rows, _ = fitted_rows(per_workload(capture.observations), "fp32")
    model = LatencyModel(profile_of(capture), "fp32", "synthetic").fit(rows.filter(pl.col("n_tokens") <= 8))
    overall, *each = against_model(capture, model)
    outside = [one for one in each if one.verdict == OUTSIDE_MODEL]
    assert {one.model_high_ns for one in outside} == {None}
    assert outside and all("outside the fitted" in (one.reason or "") for one in outside)
    inside = [one for one in each if one.verdict != OUTSIDE_MODEL]
    assert inside and overall.verdict == "as-expected"
    assert overall.measured_ns == pytest.approx(np.exp(np.mean([np.log(one.measured_ns) for one in inside])))


def test_a_model_that_judges_a_minority_says_nothing_of_the_whole(tmp_path: Path) -> None:
    """A GPU's capture of many access modes, dtypes and launches, of which one model knows one kind of each."""
    a = load_capture(write_gpu_capture(tmp_path / "a"))
    b = write_gpu_capture(tmp_path / "b")
    rows = [json.loads(line) for line in (b / "observations.jsonl").read_text().splitlines()]
    slow = [json.dumps({**row, "times_ns": [round(1.3 * t) for t in row["times_ns"]]}) for row in rows]
    (b / "observations.jsonl").write_text("\n".join(slow) + "\n")
    found = compare(a, load_capture(b))
    assert 0 < 2 * found.n_judged < len(found.each)
    assert found.datasheet == "h100-sxm"  # by the name of the GPU, unasked
    assert found.overall.cell == NOT_JUDGED and found.cells()[NOT_JUDGED] == len(found.each) - found.n_judged
    assert f"over the {found.n_judged} of {len(found.each)} workloads that it can judge" in report.check_page(found)
    assert found.exit_code() == 1


def test_a_datasheets_ceilings_are_asked_about_too(tmp_path: Path) -> None:
    """With twice the rates as nominal ceilings, a machine that reaches its calibrated ones is slow for its silicon."""
    a = load_capture(write_synthetic_capture(tmp_path / "a"))
    own = profile_of(a)
    twice = {
        key: replace(one, value=2 * one.value) if key.endswith("_per_s") else one for key, one in own.quantities.items()
    }
    found = compare(a, a, datasheet=replace(own, name="twice", quantities=twice))
    assert found.overall.expectation is not None and found.overall.datasheet is not None
    assert found.overall.datasheet.ratio > 1.4 * found.overall.expectation.ratio
    assert "with the ceilings of twice" in report.check_page(found)
    with pytest.raises(InputError, match="cpu"):
        compare(a, a, datasheet=hardware("h100-sxm"))


def test_a_model_of_another_dtype_is_refused(tmp_path: Path) -> None:
    a = load_capture(write_synthetic_capture(tmp_path / "a"))
    with pytest.raises(InputError, match="the model is of resident experts in bf16"):
        compare(a, a, model=load_model("epyc-zen5-2c-bf16"))


def test_the_shipped_model_is_taken_for_its_own_capture_alone(tmp_path: Path) -> None:
    shipped = next(path for path in shipped_captures() if path.name == "epyc-zen4-2c-fp32")
    assert model_for(load_capture(shipped)).n_observations_ == load_model(shipped.name).n_observations_
    namesake = load_capture(write_synthetic_capture(tmp_path / shipped.name))
    assert model_for(namesake).kernel == "synthetic"


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    first = compared(tmp_path, 1.2)
    again = compare(*(load_capture(tmp_path / name) for name in ("base", "cand")))
    for page in (lambda one: json.dumps(one.to_json()), report.check_page, lambda one: report.check_junit(one, [])):
        assert page(first) == page(again)
    assert first.to_json()["schema_version"] == 1


HOSTILE = "a|b`c`\x00\x1b[31m\ud800<img src=x>&[x](javascript:1)\n# head"


def renamed(found: Comparison, n: int | None = None) -> Comparison:
    """The comparison with hostile names, its workloads repeated up to `n`."""
    cases = (found.each * (1 + (n or 0) // len(found.each)))[:n]
    each = [replace(case, verdict=replace(case.verdict, label=HOSTILE * 9)) for case in cases]
    return replace(found, cases=(found.overall, *each), baseline=HOSTILE, candidate=HOSTILE)


def test_junit_holds_each_workload_with_its_numbers(tmp_path: Path) -> None:
    found = compared(tmp_path, 1.4)
    suite = ET.fromstring(report.check_junit(found, DEFAULT_FAILURES))[0]
    cases = suite.findall("testcase")
    assert int(suite.attrib["tests"]) == len(cases) == 33
    assert int(suite.attrib["failures"]) == sum(case.find("failure") is not None for case in cases) == 33
    failure = cases[1].find("failure")
    worst = found.each[0].verdict
    assert failure is not None and f"{worst.ratio:.3f}x the baseline's time" in (failure.text or "")
    assert f"{worst.ratio_low:.3f} to {worst.ratio_high:.3f}" in failure.attrib["message"]
    passed = ET.fromstring(report.check_junit(found, []))[0]
    assert passed.attrib["failures"] == "0"


def test_junit_skips_what_is_open_and_survives_any_name(tmp_path: Path) -> None:
    found = compared(tmp_path)
    open_case = replace(found.each[0], verdict=replace(found.each[0].verdict, verdict="inconclusive", n_more_runs=4))
    suite = ET.fromstring(report.check_junit(replace(found, cases=(found.overall, open_case)), DEFAULT_FAILURES))[0]
    skipped = suite.find("testcase/skipped")
    assert skipped is not None and "4 more runs wanted" in skipped.attrib["message"]
    assert (suite.attrib["skipped"], suite.attrib["failures"]) == ("1", "0")
    whole = replace(found, cases=(replace(found.overall, verdict=open_case.verdict),))
    failed = ET.fromstring(report.check_junit(whole, [], must_conclude=True))[0]
    assert failed.attrib["failures"] == "1"
    failure = failed.find("testcase/failure")
    assert failure is not None and "4 more runs wanted" in (failure.text or "")
    name = ET.fromstring(report.check_junit(renamed(found), []))[0].findall("testcase")[1].attrib["name"]
    assert "<img src=x>&" in name and not set(name) & {"\x00", "\x1b", "\ud800"}


def test_markdown_is_one_line_a_short_table_and_folds(tmp_path: Path) -> None:
    page = report.check_markdown(renamed(compared(tmp_path, 1.4), 5000), DEFAULT_FAILURES)
    assert len(page.encode()) < 1_000_000
    slower = compared(tmp_path / "again", 1.4)
    assert report.check_markdown(slower, []).startswith("⚠️ **regressed: ")  # nothing fails by it, yet it is no tick
    head, _, folded = page.partition("<details>")
    assert head.splitlines()[0].startswith("❌ **regressed: candidate takes 1.")
    assert sum(line.startswith("| `") for line in head.splitlines()) == 20
    assert re.search(r"and [\d,]+ more", folded) and page.count("<details>") == page.count("</details>")
    for line in page.splitlines():
        assert line.count("`") % 2 == 0
        if line.startswith("| ---"):
            n_bars = line.count("|")
        if line.startswith("| `"):  # no bar of a name ends a cell: as many columns as the head has
            assert line.count("|") == n_bars
        outside = re.sub(r"`[^`]*`", "", line)
        assert "<img" not in outside and "javascript" not in outside


@pytest.mark.parametrize(
    ("verdict", "cell", "against", "kind", "words"),
    [
        ("regressed", EXPLAINED, AS_EXPECTED, "bad", "the rates that fell are the regression"),
        ("regressed", CHASE, AS_EXPECTED, "bad", "no calibrated rate accounts for it"),
        ("regressed", CHASE, FASTER_THAN_MODEL, "bad", "by less than the calibrated rates"),
        ("suspect", NOT_JUDGED, AS_EXPECTED, "bad", "no model says"),
        ("inconclusive", UNDECIDED, AS_EXPECTED, "open", "cannot tell"),
        ("inconclusive", UNDECIDED, SLOWER_THAN_MODEL, "mixed", "Slower than the model expects"),
        ("ok", ON_THE_TABLE, SLOWER_THAN_MODEL, "mixed", "left on the table"),
        ("improved", FINE, AS_EXPECTED, "good", "Faster"),
        ("ok", FINE, AS_EXPECTED, "good", "As fast"),
    ],
)
def test_the_conclusion_in_words(
    steady: Comparison, verdict: str, cell: str, against: str, kind: str, words: str
) -> None:
    overall = steady.overall
    assert overall.expectation is not None
    expectation = replace(overall.expectation, verdict=against)
    case = replace(overall, verdict=replace(overall.verdict, verdict=verdict), cell=cell, expectation=expectation)
    found = replace(steady, cases=(case, *steady.each))
    assert report.conclusion(found)[0] == kind and words in report.conclusion(found)[1]
    if cell == EXPLAINED:
        assert report.conclusion(replace(found, axes=("machine",)))[0] == "mixed"
    assert (SLOWER_THAN_MODEL in found.failures()) == (against == SLOWER_THAN_MODEL)
    one = replace(steady.each[0], verdict=replace(steady.each[0].verdict, verdict="regressed"), cell=CHASE)
    mixed = report.conclusion(replace(found, cases=(case, one)))[1]
    if cell == EXPLAINED:
        assert "some are regressions to chase" in mixed
    if verdict in ("ok", "improved"):
        assert mixed.startswith("Single workloads are slower")


@pytest.mark.parametrize(
    ("keys", "axes"),
    [
        (["machine.n_threads", "settings.threads"], ["threads"]),
        (["machine.cpu_family", "machine.driver", "software.kernel_release"], ["os", "machine"]),
        (["machine.driver_api", "kernel"], ["driver", "kernel"]),
        (["software.torch", "kernel", "software.python"], ["torch", "software"]),
        ([], []),
    ],
)
def test_the_axes_of_facts_declare_them_and_little_else(keys: list[str], axes: list[str]) -> None:
    assert regression.axes_of(keys) == axes
    assert all(is_declared(key, axes) for key in keys)


def test_what_may_be_much_faster_is_not_said_to_be_as_fast(steady: Comparison) -> None:
    assert report.conclusion(steady)[1] == "As fast as the baseline, within the margin."
    wide = replace(steady.overall.verdict, ratio=0.9, ratio_low=0.8, ratio_high=1.02)
    found = replace(steady, cases=(replace(steady.overall, verdict=wide), *steady.each))
    assert report.conclusion(found) == ("good", "Not slower than the baseline by more than the margin.")


def test_options_of_the_command_and_what_it_ends_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = write_synthetic_capture(tmp_path / "a")
    slow = write_synthetic_capture(tmp_path / "slow", noise=lambda: 1.4)

    def ends(*words: str) -> int:
        return CliRunner().invoke(app, ["check", str(a), str(slow), *words]).exit_code

    files = {kind: tmp_path / f"out.{kind}" for kind in ("xml", "md", "html")}
    summary = tmp_path / "summary"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert ends("--junit", str(files["xml"]), "--markdown", str(files["md"]), "--html", str(files["html"])) == 1
    assert ET.parse(files["xml"]).getroot().attrib["failures"] == "33"
    assert "❌" in files["md"].read_text() and "Both questions crossed" in files["html"].read_text()
    assert summary.read_text().startswith("before\n❌")
    assert ends("--fail-on", "none") == 0
    assert "\n⚠️" in summary.read_text()
    assert ends("--fail-on", "explained", "--model", "none") == 0
    assert ends("--model", "none", "--margin", "60%", "--inconclusive", "fail") == 0
    for wrong in (("--fail-on", "weather"), ("--inconclusive", "maybe"), ("--junit", "x.txt"), ("--model", "nowhere")):
        done = CliRunner().invoke(app, ["check", str(a), str(slow), *wrong])
        assert isinstance(done.exception, InputError) and done.exception.exit_code == 2, wrong


def test_a_zip_of_captures_is_unpacked_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = write_synthetic_capture(tmp_path / "a")
    archive = tmp_path / "handed-over.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in a.iterdir():
            packed.write(file, f"../../{a.name}/{file.name}")
            packed.write(file, file.name)
        packed.writestr("../../evil.txt", "x")
    (tmp_path / "into").mkdir()
    folders = unpack_sides(archive, tmp_path / "into")
    assert [folder.name for folder in folders] == ["a", "handed-over"]
    assert all(load_capture(folder).observations.height == 160 for folder in folders)
    assert not list(tmp_path.rglob("evil.txt"))
    monkeypatch.setattr(regression.packed, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(InputError, match="unpacks to more than"):
        unpack_sides(archive, tmp_path / "more")
    for content in (b"", b"PK\x03\x04 no zip", archive.read_bytes()[:900]):
        (tmp_path / "broken.zip").write_bytes(content)
        with pytest.raises(InputError, match="no zip archive"):
            unpack_sides(tmp_path / "broken.zip", tmp_path / "none")


def test_the_figures_show_every_workload_and_all_cells(tmp_path: Path) -> None:
    found = compared(tmp_path, 1.4)
    (forest, words), (crossed, _), *_ = check_figures(found)
    assert sum(len(trace.x) for trace in forest.data) == len(found.each) and "1.40 over all" in words
    assert "32" in " ".join(one.text for one in crossed.layout.annotations)
    few = replace(found, cases=found.cases[:6])
    named = check_figures(few)[0][0]
    shared = [part for part in few.each[0].verdict.label.split(", ") if all(part in c.verdict.label for c in few.each)]
    assert f"(all: {', '.join(shared)})" in named.layout.xaxis.title.text if shared else True
    parts = [set(name.split(", ")) | set(shared) for name in named.layout.yaxis.ticktext]
    assert parts == [set(case.verdict.label.split(", ")) for case in few.each]
    assert len(check_figures(replace(found, model=None, parts=()))) == 1

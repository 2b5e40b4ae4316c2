"""The statistics of regression checks: variances against sums done by hand, and rates of error by simulation."""

import math
import runpy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import special, stats

from perfmodel.capture import load_capture
from perfmodel.errors import NotComparableError
from perfmodel.regression import OVERALL, Evidence, Measured, Run, Verdict, check, of_capture
from perfmodel.regression.evidence import alternate
from perfmodel.regression.spread import Mean, Variance, both_means, combined, means_of, moderated
from tests.conftest import ROOT

SIMULATION = runpy.run_path(str(ROOT / "benchmarks" / "regression_made_up.py"))
NOISES = {noise.name: noise for noise in SIMULATION["NOISES"]}


def made_up(logs: Any, occasions: list[int] | None = None, starts: list[float] | None = None, **facts: Any) -> Evidence:
    """A side of made-up log times `[workload, run]`, NaN where not measured."""
    table = np.atleast_2d(np.asarray(logs, dtype=float))
    workloads = {
        str(w): Measured(str(w), str(w), {run: math.exp(one) for run, one in enumerate(row) if not math.isnan(one)})
        for w, row in enumerate(table)
    }
    runs = tuple(
        Run(run, occasions[run] if occasions else 0, *((starts[run], starts[run] + 9) if starts else ()))
        for run in range(table.shape[1])
    )
    return Evidence("made up", "capture", {}, workloads, runs, **facts)


def by_workload(verdicts: list[Verdict]) -> dict[str, Verdict]:
    return {one.workload: one for one in verdicts}


def trigamma_inverse(value: float) -> float:
    """Newton's iteration of Smyth 2004, appendix."""
    y = 0.5 + 1 / value
    for _ in range(50):
        y += special.polygamma(1, y) * (1 - special.polygamma(1, y) / value) / special.polygamma(2, y)
    return float(y)


def test_moderated_variances_are_those_of_smyth() -> None:
    variances = np.array([1.0, 2.0, 0.5, 6.0, 3.0, 0.2, 1.5, 8.0]) * 1e-4
    df = np.full(8, 4.0)
    e = np.log(variances) - special.digamma(2.0) + math.log(2.0)  # his section 6.2, d = 4
    d0 = 2 * trigamma_inverse(float(e.var(ddof=1)) - float(special.polygamma(1, 2.0)))
    typical = math.exp(e.mean() + special.digamma(d0 / 2) - math.log(d0 / 2))
    assert 1 < d0 < 20
    for found, own in zip(moderated(variances, df), variances, strict=True):
        assert found.value == pytest.approx((d0 * typical + 4 * own) / (d0 + 4), rel=1e-6)
        assert found.df == pytest.approx(d0 + 4, rel=1e-6)


def test_variances_that_are_all_alike_are_one_and_known_no_better_than_all_of_them_tell() -> None:
    """Eight of 4 degrees of freedom each: exp(log 2 - digamma 2) = 1.31044 times the variance, on 32 degrees."""
    for found in moderated(np.full(8, 1e-4), np.full(8, 4.0)):
        assert found.value == pytest.approx(1.31044e-4, rel=1e-5)
        assert found.df == 32


def test_a_workload_far_noisier_than_all_others_stands_for_itself() -> None:
    *others, loud = moderated(np.array([1e-4] * 20 + [1e-2]), np.full(21, 4.0))
    assert (loud.value, loud.df) == (1e-2, 4)
    assert max(one.value for one in others) < 1e-3


def test_what_runs_share_is_told_from_what_workloads_have_of_their_own() -> None:
    """Run offsets -0.1, 0, 0.1 (variance 0.01) and own residuals of +-0.01, 0 that cancel over the workloads."""
    own = np.array([[0.01, 0.0, -0.01], [-0.01, 0.0, 0.01]] * 4)
    found = means_of(made_up(np.arange(8)[:, None] + np.array([-0.1, 0.0, 0.1]) + own), [str(w) for w in range(8)])
    each = 2e-4 / (2 * (1 - 1 / 8))  # squares over two runs' degrees of freedom, less what offsets took
    shared, mine = found["0"].of_units
    assert (shared.value, shared.df) == (pytest.approx(0.01 - each / 8), 2)
    assert mine.value == pytest.approx(each * math.exp(math.log(0.875) - special.digamma(0.875)))
    assert mine.df == pytest.approx(8 * 1.75)
    assert found[OVERALL].of_units == (Variance(pytest.approx(0.01), 2),)
    assert found[OVERALL].log_ns == pytest.approx(3.5)


def test_occasions_are_units_where_there_are_three() -> None:
    """Occasion means 0.1, 0.2, 0.6: mean 0.3, variance 0.07, whatever the runs within them do."""
    side = made_up([0.0, 0.2, 0.2, 0.2, 0.7, 0.5], [0, 0, 1, 1, 2, 2])
    mean = means_of(side, ["0"])["0"]
    assert (mean.log_ns, mean.n_units, mean.n_runs) == (pytest.approx(0.3), 3, 6)
    assert mean.of_units == (Variance(pytest.approx(0.07), 2),)
    two = replace(side, runs=tuple(replace(one, occasion=one.run // 3) for one in side.runs))
    assert means_of(two, ["0"])["0"].n_units == 6


def test_a_drift_seen_on_one_side_is_one_estimate_for_both() -> None:
    """Three occasions, variance 0.01 on 2 degrees of freedom, are the baseline's mean (a third) and the candidate's
    drift (once); two further runs of the candidate have a variance of 0.0002 on one."""
    baseline = made_up([0.0, 0.1, 0.2], [0, 1, 2])
    candidate = made_up([0.0, 0.02], may_drift=True)
    a, b = both_means(baseline, candidate, ["0"])
    both = combined([*a["0"].parts, *b["0"].parts])
    assert both.value == pytest.approx(0.01 * 4 / 3 + 0.0001)
    assert both.df == pytest.approx(both.value**2 / ((0.01 * 4 / 3) ** 2 / 2 + 0.0001**2))
    assert (a["0"].lasting, b["0"].lasting) == ([Variance(pytest.approx(0.01), 2)], [])
    mirrored = both_means(candidate, baseline, ["0"])
    assert combined([*mirrored[0]["0"].parts, *mirrored[1]["0"].parts]) == both


def test_short_captures_of_a_virtual_machine_drift_unless_they_took_turns() -> None:
    logs = [0.0, 0.01, -0.01]
    apart = made_up(logs, starts=[0, 10, 20], may_drift=True), made_up(logs, starts=[30, 40, 50], may_drift=True)
    turns = made_up(logs, starts=[0, 20, 40], may_drift=True), made_up(logs, starts=[10, 30, 50], may_drift=True)
    assert [found.verdict for found in check(*apart)] == ["inconclusive", "inconclusive"]
    assert [found.verdict for found in check(*turns)] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("baseline", "candidate", "expected"),
    [
        ([0, 20, 40], [10, 30, 50], True),
        ([0, 30, 40], [10, 20, 50], True),  # there and back
        ([0, 10, 20], [30, 40, 50], False),
        ([0, 10, 20, 40], [30, 50, 60], False),  # three of a side in a row
        ([0, 20], [10, 30], False),  # too few
        ([0, 20, 40], [5, 25, 45], False),  # at the same time, so that it is another machine, or each slowed the other
        (None, [10, 30, 50], False),
    ],
)
def test_turns_are_seen_by_when_runs_began(
    baseline: list[float] | None, candidate: list[float], expected: bool
) -> None:
    a, b = (made_up([0.0] * len(starts or [0] * 3), starts=starts) for starts in (baseline, candidate))
    assert alternate(a, b) is expected and alternate(b, a) is expected


def test_another_machine_takes_no_turns_with_this_one_but_another_driver_does() -> None:
    a, b = made_up([0.0] * 3, starts=[0, 20, 40]), made_up([0.0] * 3, starts=[10, 30, 50])
    for fact, expected in (("machine.cpu_model", False), ("machine.driver_version", True), ("machine.n_threads", True)):
        assert alternate(replace(a, fingerprint={fact: "one"}), replace(b, fingerprint={fact: "other"})) is expected


def test_slower_is_said_where_neither_the_margin_nor_no_change_explains_it() -> None:
    """Two runs a side, 0.02 apart: a standard error of 0.0002^0.5 on two degrees of freedom, of which t is 2.92 at 5 %
    and 14.09 at 0.25 % (8.07 at 0.75 %, for all together). A gap of 0.1 is 4.98 of them beyond the margin and 7.07
    beyond nothing; one of 0.2 is 14.14."""
    baseline = made_up([0.0, 0.02])
    unsure, sure = (check(baseline, made_up([gap, gap + 0.02]))[1] for gap in (0.1, 0.2))
    assert unsure.ratio_low > 1.03 and unsure.verdict == "inconclusive"
    assert sure.verdict == "regressed"
    # A third run has t of 5.60 at 0.25 % and 0.94 at 80 %, and a standard error of (0.0004 / 3)^0.5: 0.076 is told.
    assert unsure.n_more_runs == 1


def test_who_asks_for_runs_that_cannot_help_is_told_so() -> None:
    drifting = made_up([0.0, 0.01], may_drift=True)
    assert check(drifting, drifting)[0].n_more_runs is None
    noisy = made_up([-0.1, 0.0, 0.05, 0.1, 0.2])
    assert (check(noisy, noisy)[0].n_more_runs or 0) > 5


@pytest.mark.parametrize("name", ["runs 1.5 %, own 3 %", "own 0.5 to 5 %", "5 % of points missing"])
def test_sides_exchanged_exchange_slower_and_faster(name: str) -> None:
    rng = np.random.default_rng(1)
    words = {"regressed": "improved", "improved": "regressed"}
    seen = set()
    for factor in (0.8, 1.0, 1.1, 1.3):
        logs = SIMULATION["slower"](SIMULATION["draw"](rng, NOISES[name], 27, 5), factor)
        a, b = SIMULATION["sides"](NOISES[name], logs, 5)
        there, back = by_workload(check(a, b)), by_workload(check(b, a))
        for key, found in there.items():
            assert found.ratio * back[key].ratio == pytest.approx(1)
            assert found.ratio_low * back[key].ratio_high == pytest.approx(1)
            assert (found.verdict in words) <= (back[key].verdict == words.get(found.verdict))
            seen.add(found.verdict)
    assert {"regressed", "improved"} <= seen


def test_workloads_that_some_runs_lack_are_filled_in_by_what_other_workloads_say_of_the_run() -> None:
    """Exact levels and offsets with a hole in every run: the mean of all is that without holes."""
    logs = np.arange(6.0)[:, None] + np.array([0.0, 0.1, 0.3, 0.4])
    holes = logs.copy()
    holes[np.arange(4), np.arange(4)] = np.nan
    keys = [str(w) for w in range(6)]
    found, whole = (means_of(made_up(one), keys)[OVERALL] for one in (holes, logs))
    assert found.log_ns == pytest.approx(whole.log_ns, abs=1e-6)
    assert found.of_units[0].value == pytest.approx(whole.of_units[0].value, rel=1e-4)
    assert found.n_runs == 4


def test_runs_that_measured_little_of_both_are_not_compared() -> None:
    logs = np.full((6, 3), np.nan)
    logs[[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2]] = 0.0
    with pytest.raises(NotComparableError, match="no runs that measured most"):
        check(made_up(logs), made_up(logs))


def test_a_run_that_measured_one_workload_alone_takes_no_part_in_what_runs_share() -> None:
    logs = np.random.default_rng(2).normal(0, 0.01, (10, 4))
    logs[:9, 3], logs[9, :3] = np.nan, np.nan
    logs[9, 2] = 0.0
    assert {one.verdict for one in check(made_up(logs[:9]), made_up(logs))} <= {"ok", "inconclusive"}


def test_the_interval_of_a_normal_mean_is_normal() -> None:
    half = Mean(0.0, 1, 1, (Variance(0.01),)).interval[2]
    assert half == pytest.approx(stats.norm.ppf(0.95) * 0.1)


@pytest.mark.parametrize(
    "name",
    ["runs 1.5 %, own 1.5 %", "runs 7 %, own 7 %", "own 0.5 to 5 %", "tails of t3", "step 7 %, virtual, in turns"],
)
def test_one_comparison_in_a_hundred_at_most_is_a_false_alarm(name: str) -> None:
    """Of 150 with nothing changed more than five have a chance of 0.4 % at a rate of 1 %."""
    rng = np.random.default_rng(3)
    draw, judged, is_alarm = (SIMULATION[word] for word in ("draw", "judged", "is_alarm"))
    assert sum(is_alarm(judged(NOISES[name], draw(rng, NOISES[name], 27, 5), 5)) for _ in range(150)) <= 5


@pytest.mark.parametrize("name", ["runs 0.5 %, own 0.5 %", "runs 1.5 %, own 1.5 %", "runs 1.5 %, own 3 %"])
def test_ten_per_cent_are_found_with_five_runs(name: str) -> None:
    rng = np.random.default_rng(4)
    draw, judged, slower = (SIMULATION[word] for word in ("draw", "judged", "slower"))
    found = [judged(NOISES[name], slower(draw(rng, NOISES[name], 27, 5), 1.1), 5)[0].verdict for _ in range(100)]
    assert found.count("regressed") >= 95


def test_the_runs_that_are_asked_for_tell_in_four_cases_of_five() -> None:
    rng = np.random.default_rng(5)
    draw, judged, slower = (SIMULATION[word] for word in ("draw", "judged", "slower"))
    noise, done = NOISES["runs 3 %, own 3 %"], []
    for _ in range(150):
        logs = slower(draw(rng, noise, 9, 45), 1.1)
        n = judged(noise, [side[:, :3] for side in logs], 3)[0].n_more_runs
        if n is not None and n <= 42:
            done.append(judged(noise, [side[:, : 3 + n] for side in logs], 3 + n)[0].verdict != "inconclusive")
    assert len(done) > 50 and 0.65 < np.mean(done) < 0.97


def test_a_single_run_is_judged_with_what_single_workloads_were_seen_to_scatter_by() -> None:
    """0.05 squared of the run and, among eight workloads or more, 0.07 squared of its own on 2.5 degrees of freedom."""
    few, many = (means_of(made_up(np.zeros((n, 1))), [str(w) for w in range(n)]) for n in (7, 8))
    assert few["0"].of_units == (Variance(pytest.approx(0.0025)),)
    assert many["0"].of_units == (Variance(pytest.approx(0.0074), 2.5),)
    assert few[OVERALL].of_units == many[OVERALL].of_units == (Variance(pytest.approx(0.0025)),)


@pytest.mark.parametrize("name", ["epyc-zen4-2c-fp32", "epyc-zen5-2c-bf16", "epyc-zen5-2c-fp32"])
def test_the_runs_of_a_shipped_capture_are_no_regressions_of_each_other(name: str) -> None:
    whole = of_capture(load_capture(ROOT / "traces" / name))

    def single(run: int, factor: float = 1.0) -> Evidence:
        measured = {
            key: replace(one, run_ns={run: factor * one.run_ns[run]})
            for key, one in whole.workloads.items()
            if run in one.run_ns
        }
        return replace(whole, workloads=measured, runs=tuple(one for one in whole.runs if one.run == run))

    numbers = [one.run for one in whole.runs]
    for a, b in [(a, b) for a in numbers for b in numbers if a != b]:
        assert {one.verdict for one in check(single(a), single(b))} <= {"ok", "inconclusive"}
    assert check(single(0), single(1, 1.5))[0].verdict == "suspect"

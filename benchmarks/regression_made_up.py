"""Made-up noise of runs, and how often a rule cries wolf or finds 10 % under it: what `regression.py` prints."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from perfmodel import regression
from perfmodel.regression import OVERALL, SLOWER, Evidence, Measured, Run, Verdict

Array = NDArray[np.float64]

N_WORKLOADS, N_RUNS, SLOWDOWN = 27, 5, 1.1
N_MORE = 9  # workloads where further runs are asked for
N_STEPS, STEP_SD = 20, 0.02  # of a run, for the rules that pool steps


@dataclass(frozen=True)
class Noise:
    """How times of runs scatter, all in log units: what a run adds to all workloads, and to each of its own.

    `decades`: own deviations of workloads are log-uniform over so many decades, with `own_sd` in the middle.
    `loading_sd`: how unlike workloads feel what they share. `slow_runs`, `slow_cells`: a share of runs, of single
    workloads in a run, and their factor. `tails`: degrees of freedom of Student's t, scaled to the same deviation.
    `walk_sd`: a step of a random walk from one run to the next; `rho`: autocorrelation of what runs share. `step_sd`:
    what lies between two captures, and between occasions. `in_turns`: runs of both sides alternate. `missing`: share of
    workloads that a run left out. `grain`: of the timer, as a share of the time. `occasions`: of both sides.
    """

    name: str
    shared_sd: float = 0.015
    own_sd: float = 0.015
    decades: float = 0.0
    loading_sd: float = 0.0
    slow_runs: tuple[float, float] = (0.0, 1.0)
    slow_cells: tuple[float, float] = (0.0, 1.0)
    tails: float = math.inf
    walk_sd: float = 0.0
    rho: float = 0.0
    step_sd: float = 0.0
    in_turns: bool = False
    is_virtual: bool = False
    missing: float = 0.0
    grain: float = 0.0
    occasions: tuple[int, int] = (1, 1)


NOISES = (
    Noise("runs 0.5 %, own 0.5 %", 0.005, 0.005),
    Noise("runs 1.5 %, own 1.5 %"),
    Noise("runs 1.5 %, own 3 %", 0.015, 0.03),
    Noise("runs 3 %, own 1.5 %", 0.03, 0.015),
    Noise("runs 3 %, own 3 %", 0.03, 0.03),
    Noise("runs 7 %, own 7 %", 0.07, 0.07),
    Noise("own 0.5 to 5 %", decades=1.0),
    Noise("half of them feel a run more", loading_sd=0.5),
    Noise("5 % of runs 1.3x", slow_runs=(0.05, 1.3)),
    Noise("1 % of points 1.5x", slow_cells=(0.01, 1.5)),
    Noise("tails of t3", tails=3.0),
    Noise("5 % of points missing", missing=0.05),
    Noise("timer of 2 %", own_sd=0.002, grain=0.02),
    Noise("AR(1), 0.5", rho=0.5),
    Noise("walk 1 % a run, apart", walk_sd=0.01),
    Noise("walk 1 % a run, in turns", walk_sd=0.01, in_turns=True),
    Noise("step 7 %, metal, apart", step_sd=0.07),
    Noise("step 7 %, metal, in turns", step_sd=0.07, in_turns=True),
    Noise("step 7 %, virtual, apart", step_sd=0.07, is_virtual=True),
    Noise("step 7 %, virtual, in turns", step_sd=0.07, is_virtual=True, in_turns=True),
    Noise("step 7 %, 2 occasions, 1", step_sd=0.07, occasions=(2, 1)),
    Noise("step 7 %, 3 occasions, 1", step_sd=0.07, occasions=(3, 1)),
    Noise("step 7 %, 5 occasions, 1", step_sd=0.07, occasions=(5, 1)),
    Noise("step 7 %, 5 occasions, 5", step_sd=0.07, occasions=(5, 5)),
)


def sides_in_time(noise: Noise, n_runs: int) -> NDArray[np.int64]:
    """Which side each run is of, 0 or 1, in the order of time."""
    if noise.in_turns:
        return np.tile([0, 1], n_runs)
    return np.repeat([0, 1], [n_runs * n for n in noise.occasions])


def draw(rng: np.random.Generator, noise: Noise, n_workloads: int, n_runs: int) -> tuple[Array, Array]:
    """Log times of both sides `[workload, run]`, NaN where missing; `n_runs` for each occasion of a side."""
    sides = sides_in_time(noise, n_runs)
    n = len(sides)

    def scatter(*size: int) -> Array:
        if math.isinf(noise.tails):
            return rng.standard_normal(size)
        return rng.standard_t(noise.tails, size) * math.sqrt((noise.tails - 2) / noise.tails)

    shared = noise.shared_sd * scatter(n)
    for i in range(1, n) if noise.rho else ():
        shared[i] = noise.rho * shared[i - 1] + math.sqrt(1 - noise.rho**2) * shared[i]
    shared += noise.walk_sd * rng.standard_normal(n).cumsum()
    if noise.step_sd and noise.in_turns:
        shared[rng.integers(n) :] += noise.step_sd * rng.standard_normal()
    elif noise.step_sd:
        shared += np.repeat(noise.step_sd * rng.standard_normal(n // n_runs), n_runs)
    shared += np.where(rng.random(n) < noise.slow_runs[0], math.log(noise.slow_runs[1]), 0.0)
    loading = 1 + noise.loading_sd * np.where(np.arange(n_workloads) % 2, 1.0, -1.0)
    own_sd = noise.own_sd * 10 ** (noise.decades * (rng.random(n_workloads) - 0.5))
    logs = math.log(1e6) + loading[:, None] * shared + own_sd[:, None] * scatter(n_workloads, n)
    logs += np.where(rng.random(logs.shape) < noise.slow_cells[0], math.log(noise.slow_cells[1]), 0.0)
    if noise.grain:
        logs = np.log(np.round(np.exp(logs) / (1e6 * noise.grain)) * 1e6 * noise.grain)
    logs[rng.random(logs.shape) < noise.missing] = np.nan
    return logs[:, sides == 0], logs[:, sides == 1]


def sides(noise: Noise, logs: Sequence[Array], n_runs: int) -> tuple[Evidence, Evidence]:
    """Both sides as what `check` compares; a run takes 10 s, and its occasions follow each other."""
    starts = np.flatnonzero(sides_in_time(noise, n_runs) == 0), np.flatnonzero(sides_in_time(noise, n_runs) == 1)
    found = []
    for name, times, places in zip(("baseline", "candidate"), logs, starts, strict=True):
        runs = tuple(Run(i, i // n_runs, 10.0 * at, 10.0 * at + 9) for i, at in enumerate(places.tolist()))
        workloads = {}
        for w, row in enumerate(np.exp(times).tolist()):
            measured = {i: value for i, value in enumerate(row) if not math.isnan(value)}
            if measured:
                workloads[str(w)] = Measured(str(w), str(w), measured)
        found.append(Evidence(name, "capture", {}, workloads, runs, may_drift=noise.is_virtual))
    return found[0], found[1]


def judged(noise: Noise, logs: Sequence[Array], n_runs: int) -> list[Verdict]:
    """What `check` says of both sides."""
    return regression.check(*sides(noise, logs, n_runs))


def slower(logs: tuple[Array, Array], factor: float, n_slower: int | None = None) -> tuple[Array, Array]:
    """The same with the candidate's first workloads (null: all) slower by a factor."""
    a, b = logs
    which = np.arange(len(b)) < (len(b) if n_slower is None else n_slower)
    return a, b + np.where(which, math.log(factor), 0.0)[:, None]


def is_alarm(verdicts: Iterable[Verdict]) -> bool:
    """Whether a command would end with 1."""
    return any(v.verdict in SLOWER for v in verdicts)


def percent(values: Sequence[object] | Array) -> str:
    """The share of true values in words."""
    return f"{100 * float(np.mean(np.asarray(values, dtype=float))):.1f}" if len(values) else "-"


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table, a row as soon as it is there."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


# -- other rules: one-sided p-values by workload from logs [workload, run] and steps [workload, run x step]


def welch(a: Array, b: Array, margin_frac: float = 0.0) -> Array:
    """Welch's t of rows."""
    found = stats.ttest_ind(b - math.log1p(margin_frac), a, axis=1, equal_var=False, alternative="greater")
    return np.asarray(found.pvalue)


def trimmed(a: Array, b: Array) -> Array:
    """Yuen's t of rows, the fastest and the slowest run of a side left out, against the margin."""
    b = b - math.log1p(regression.DEFAULT_MARGIN_FRAC)
    found = stats.ttest_ind(b, a, axis=1, equal_var=False, alternative="greater", trim=0.2)
    return np.asarray(found.pvalue)


def mann_whitney(a: Array, b: Array) -> Array:
    """The rank test of rows."""
    return np.asarray(stats.mannwhitneyu(b, a, axis=1, alternative="greater").pvalue)


def holm_alarm(of_each: Array, of_all: float) -> bool:
    """An alarm at 5 % for all together, or for any workload under Holm's correction."""
    return bool(of_all < 0.05 or of_each.min() < 0.05 / len(of_each))


RULES: dict[str, tuple[bool, Callable[[Array, Array], Array]]] = {  # whether of steps
    "Mann-Whitney, all steps": (True, mann_whitney),
    "Welch, all steps": (True, welch),
    "Mann-Whitney, runs": (False, mann_whitney),
    "Welch, runs": (False, welch),
    "Yuen, runs, margin": (False, trimmed),
    "Welch, runs, margin": (False, lambda a, b: welch(a, b, regression.DEFAULT_MARGIN_FRAC)),
}


def rules(rng: np.random.Generator, n_trials: int) -> None:
    """Other rules beside ours: false alarms, and all workloads 10 % slower found."""
    noises = [one for one in NOISES if not one.missing and one.occasions == (1, 1)]

    def rows() -> Iterable[Sequence[object]]:
        for noise in noises:
            counts: dict[str, list[tuple[bool, bool]]] = {name: [] for name in (*RULES, "check")}
            for _ in range(n_trials):
                logs = draw(rng, noise, N_WORKLOADS, N_RUNS)
                both = [logs, slower(logs, SLOWDOWN)]
                jitter = [STEP_SD * rng.standard_normal((*one.shape, N_STEPS)) for one in logs]
                for name, (of_steps, rule) in RULES.items():
                    found = []
                    for pair in both:
                        a, b = (
                            (one[:, :, None] + step).reshape(len(one), -1) if of_steps else one
                            for one, step in zip(pair, jitter, strict=True)
                        )
                        together = rule(a.mean(axis=0)[None], b.mean(axis=0)[None])
                        found.append(holm_alarm(rule(a, b), float(together[0])))
                    counts[name].append((found[0], found[1]))
                counts["check"].append(
                    (is_alarm(judged(noise, logs, N_RUNS)), is_alarm(judged(noise, both[1], N_RUNS)))
                )
            yield [
                noise.name,
                *(" / ".join(percent([pair[i] for pair in found]) for i in (0, 1)) for found in counts.values()),
            ]

    title = (
        f"False alarms / all workloads 10 % slower found, %: {N_WORKLOADS} workloads, {N_RUNS} runs, {n_trials} trials"
    )
    table(title, ["noise", *RULES, "perfmodel"], rows())


def models(rng: np.random.Generator, n_trials: int, n_runs: int = N_RUNS) -> None:
    """Ours by noise: false alarms, what is found, and whether intervals hold the truth."""

    def rows() -> Iterable[Sequence[object]]:
        for noise in NOISES:
            alarms, improved, held, held_all, oks = [], [], [], [], []
            found: dict[str, list[bool]] = {"all": [], "quarter": [], "one": []}
            for _ in range(n_trials):
                logs = draw(rng, noise, N_WORKLOADS, n_runs)
                overall, *each = judged(noise, logs, n_runs)
                alarms.append(is_alarm([overall, *each]))
                improved.append(any(v.verdict == "improved" for v in [overall, *each]))
                oks.append(overall.verdict == "ok")
                held_all.append(overall.ratio_low <= 1 <= overall.ratio_high)
                held.append(np.mean([v.ratio_low <= 1 <= v.ratio_high for v in each]))
                for name, n_slower in (("all", None), ("quarter", N_WORKLOADS // 4), ("one", 1)):
                    found[name].append(is_alarm(judged(noise, slower(logs, SLOWDOWN, n_slower), n_runs)))
            yield (
                noise.name,
                *(percent(one) for one in (alarms, improved, oks, found["all"], found["quarter"], found["one"])),
                percent(held_all),
                percent(held),
            )

    head = [
        "noise",
        "false alarms",
        "false gains",
        "all is ok",
        "all +10 %",
        "a quarter",
        "one",
        "holds, all",
        "holds, each",
    ]
    table(f"check, {N_WORKLOADS} workloads, {n_runs} runs a side, {n_trials} trials, %", head, rows())


def families(rng: np.random.Generator, n_trials: int) -> None:
    """False alarms by number of workloads and of runs."""
    noises = [
        one
        for one in NOISES
        if one.name in ("runs 1.5 %, own 3 %", "own 0.5 to 5 %", "runs 7 %, own 7 %", "tails of t3")
    ]

    def rows() -> Iterable[Sequence[object]]:
        for noise in noises:
            for n_runs in (3, 5, 10):
                cells = []
                for n_workloads in (1, 5, 27, 120, 500):
                    n = n_trials if n_workloads <= 27 else max(n_trials // 4, 20)
                    cells.append(
                        percent(
                            [is_alarm(judged(noise, draw(rng, noise, n_workloads, n_runs), n_runs)) for _ in range(n)]
                        )
                    )
                yield noise.name, n_runs, *cells

    table(
        f"False alarms by workloads, %, {n_trials} trials (a quarter above 27)",
        ["noise", "runs", "1", "5", "27", "120", "500"],
        rows(),
    )


def margin(rng: np.random.Generator, n_trials: int) -> None:
    """At exactly the margin: called slower (any; one; all together), and ok (one; all together)."""

    def rows() -> Iterable[Sequence[object]]:
        for noise in NOISES:
            any_slower, of_each, of_all, ok_each, ok_all = [], [], [], [], []
            for _ in range(n_trials):
                logs = slower(draw(rng, noise, N_WORKLOADS, N_RUNS), 1 + regression.DEFAULT_MARGIN_FRAC)
                overall, *each = judged(noise, logs, N_RUNS)
                any_slower.append(is_alarm(each))
                of_all.append(is_alarm([overall]))
                of_each.append(np.mean([is_alarm([v]) for v in each]))
                ok_all.append(overall.verdict in ("ok", "improved"))
                ok_each.append(np.mean([v.verdict in ("ok", "improved") for v in each]))
            yield noise.name, *map(percent, (any_slower, of_each, of_all, ok_each, ok_all))

    head = ["noise", "slower: any", "each", "all together", "ok: each", "all together"]
    table(f"At exactly the margin, %, {N_WORKLOADS} workloads, {N_RUNS} runs, {n_trials} trials", head, rows())


def more(rng: np.random.Generator, n_trials: int, most: int = 395) -> None:
    """Of those that were inconclusive: how many runs they asked for, and how many conclude with them."""

    def rows() -> Iterable[Sequence[object]]:
        for noise in NOISES[1:6]:
            for n_runs, factor in ((5, 1.0), (5, 1.05), (5, 1.1), (3, 1.1)):
                asked: dict[bool, list[int]] = {True: [], False: []}
                done: dict[bool, list[bool]] = {True: [], False: []}
                for _ in range(n_trials):
                    logs = slower(draw(rng, noise, N_MORE, n_runs + most), factor)
                    first = judged(noise, [one[:, :n_runs] for one in logs], n_runs)
                    later: dict[int, dict[str, str]] = {}
                    for v in first:
                        if v.workload not in (OVERALL, "0"):
                            continue
                        n = v.n_more_runs
                        if v.verdict != "inconclusive" or n is None:
                            continue
                        asked[v.workload == OVERALL].append(n)
                        if n > most:
                            continue
                        if n not in later:
                            found = judged(noise, [one[:, : n_runs + n] for one in logs], n_runs + n)
                            later[n] = {one.workload: one.verdict for one in found}
                        done[v.workload == OVERALL].append(later[n][v.workload] != "inconclusive")
                cells = [
                    (f"{len(asked[of]) or 0}", f"{np.median(asked[of]):.0f}" if asked[of] else "-", percent(done[of]))
                    for of in (True, False)
                ]
                yield noise.name, n_runs, f"{100 * (factor - 1):+.0f} %", *cells[0], *cells[1]

    head = [
        "noise",
        "runs",
        "truth",
        "all: inconclusive",
        "asked",
        "conclude, %",
        "one of them: inconclusive",
        "asked",
        "conclude, %",
    ]
    table(f"Further runs, {N_MORE} workloads, {n_trials} trials (of answers of at most {most} runs)", head, rows())


def reach(rng: np.random.Generator, n_trials: int) -> None:
    """The largest deviation between runs at which a slowdown is found in 95 % of cases, by runs of a side."""

    def largest(n_runs: int, factor: float) -> float:
        drawn = rng.standard_normal((2 * n_trials, 2, 1, n_runs))
        low, high = 0.0, 0.3
        for _ in range(8):
            sd = (low + high) / 2
            found = [is_alarm(judged(NOISES[0], slower(tuple(sd * one), factor), n_runs)[:1]) for one in drawn]
            low, high = (sd, high) if np.mean(found) >= 0.95 else (low, sd)
        return low

    factors = (1.05, 1.1, 1.2, 1.3)
    rows = ([n, *(f"{100 * largest(n, factor):.1f} %" for factor in factors)] for n in (3, 5, 7, 10, 20))
    head = ["runs a side", *(f"{100 * (factor - 1):+.0f} %" for factor in factors)]
    table("Largest deviation between runs at which this much is found in 95 % of cases, all together", head, rows)


def timed(rng: np.random.Generator, n_trials: int) -> None:
    """One check of 500 workloads in 10 runs."""
    both = sides(NOISES[1], draw(rng, NOISES[1], 500, 10), 10)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        regression.check(*both)
        took.append(time.perf_counter() - start)
    print(f"\n500 workloads, 10 runs a side: {1e3 * float(np.median(took)):.0f} ms")


PARTS: dict[str, Callable[[np.random.Generator, int], None]] = {
    "rules": rules,
    "models": models,
    "families": families,
    "margin": margin,
    "more": more,
    "reach": reach,
    "time": timed,
}

"""How often does `perfmodel check` cry wolf, and how often does it find 10 %? On made-up noise, and on real captures.

    python benchmarks/regression.py [--trials 300] [--seed 0] [--only rules models families margin more time]
    python benchmarks/regression.py --pairs DIR
    python benchmarks/regression.py --purpose DIR

Without a folder, times are drawn (`Noise` says how) and judged by `perfmodel.regression.check` on records in memory:

    rules     other rules beside it: false alarms where nothing changed, and how many find all workloads 10 % slower
    models    by noise: false alarms, what of 10 % is found (all, a quarter, one), intervals that hold the truth
    families  false alarms by number of workloads and of runs
    margin    at exactly the margin: how often it is called slower, and how often ok
    more      how many conclude after as many further runs as they asked for
    time      one check of 500 workloads in 10 runs

`--pairs` reads captures NNa, NNb that were measured in turns with nothing changed, and counts verdicts; `--purpose`
reads NAME-base beside NAME-slow (or NAME-one) and prints what is said of each.
"""

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from perfmodel import regression
from perfmodel.regression import OVERALL, SLOWER, Evidence, Measured, Run, Verdict

Array = NDArray[np.float64]

N_WORKLOADS, N_RUNS, SLOWDOWN = 27, 5, 1.1
N_STEPS, STEP_SD = 20, 0.02  # of a run, for the rules that pool steps
FACTORS = (1.05, 1.1, 1.2, 1.3, 1.5)


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


def models(rng: np.random.Generator, n_trials: int) -> None:
    """Ours by noise: false alarms, what is found, and whether intervals hold the truth."""
    print_models(rng, n_trials, N_RUNS)


def print_models(rng: np.random.Generator, n_trials: int, n_runs: int) -> None:
    """The same with so many runs a side."""

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
                    n = max(n_trials * 27 // max(n_workloads, 27), 20)
                    cells.append(
                        percent(
                            [is_alarm(judged(noise, draw(rng, noise, n_workloads, n_runs), n_runs)) for _ in range(n)]
                        )
                    )
                yield noise.name, n_runs, *cells

    table(
        f"False alarms by workloads, %, {n_trials} trials (fewer above 27)",
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


def more(rng: np.random.Generator, n_trials: int, most: int = 95) -> None:
    """Of those that were inconclusive: how many runs they asked for, and how many conclude with them."""

    def rows() -> Iterable[Sequence[object]]:
        for noise in NOISES[1:6]:
            for n_runs, factor in ((5, 1.0), (5, 1.05), (5, 1.1), (3, 1.1)):
                asked: dict[bool, list[int]] = {True: [], False: []}
                done: dict[bool, list[bool]] = {True: [], False: []}
                for _ in range(n_trials):
                    logs = slower(draw(rng, noise, N_WORKLOADS, n_runs + most), factor)
                    first = judged(noise, [one[:, :n_runs] for one in logs], n_runs)
                    later: dict[int, dict[str, str]] = {}
                    for v in [first[0], *first[1:4]]:
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
        "slowest three: inconclusive",
        "asked",
        "conclude, %",
    ]
    table(f"Further runs, {n_trials} trials (of answers of at most {most} runs)", head, rows())


def timed(rng: np.random.Generator, n_trials: int) -> None:
    """One check of 500 workloads in 10 runs."""
    both = sides(NOISES[1], draw(rng, NOISES[1], 500, 10), 10)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        regression.check(*both)
        took.append(time.perf_counter() - start)
    print(f"\n500 workloads, 10 runs a side: {1e3 * float(np.median(took)):.0f} ms")


# -- real captures


def scaled(side: Evidence, factor: float, only: str | None = None) -> Evidence:
    """The same side with all workloads (or one) slower by a factor."""
    workloads = {
        key: replace(one, run_ns={run: factor * t for run, t in one.run_ns.items()}) if only in (None, key) else one
        for key, one in side.workloads.items()
    }
    return replace(side, workloads=workloads)


def joined(parts: Sequence[Evidence]) -> Evidence:
    """Several captures as occasions of one side."""
    n = max(one.run for part in parts for one in part.runs) + 1
    keys = [key for key in parts[0].workloads if all(key in part.workloads for part in parts)]
    workloads = {
        key: replace(
            parts[0].workloads[key],
            run_ns={i * n + run: t for i, part in enumerate(parts) for run, t in part.workloads[key].run_ns.items()},
        )
        for key in keys
    }
    runs = tuple(replace(one, run=i * n + one.run, occasion=i) for i, part in enumerate(parts) for one in part.runs)
    return replace(parts[0], workloads=workloads, runs=runs)


def pairs(folder: Path) -> None:
    """Verdicts on captures between which nothing changed, in turns and apart; what of a made-up slowdown is found."""
    names = sorted({path.name[:-1] for path in folder.iterdir() if path.is_dir()})
    found = {name + side: regression.evidence(str(folder / (name + side))) for name in names for side in "ab"}
    in_turns = [(found[name + "a"], found[name + "b"]) for name in names]
    apart = [(found[x + s], found[y + s]) for x, y in combinations(names, 2) for s in "ab"]
    disjoint = [(found[x + s], found[y + s]) for x, y in zip(names[::2], names[1::2], strict=False) for s in "ab"]
    known = [
        (joined([found[name + "a"] for name in names[i : i + n]]), found[names[i + n + 1] + "b"])
        for n in (3, 5)
        for i in range(len(names) - n - 1)
    ]
    groups = {
        "in turns": in_turns,
        "apart, each capture once": disjoint,
        "apart, all": apart,
        "apart, taken for bare metal": [
            (replace(a, may_drift=False), replace(b, may_drift=False)) for a, b in disjoint
        ],
        "against 3 to 5 occasions": known,
    }

    def rows() -> Iterable[Sequence[object]]:
        for name, several in groups.items():
            verdicts = [regression.check(a, b) for a, b in several]
            overall = Counter(found[0].verdict for found in verdicts)
            each = Counter(v.verdict for found in verdicts for v in found[1:])
            off = [math.log(found[0].ratio) for found in verdicts]
            n = len(several)
            yield (
                name,
                n,
                sum(map(is_alarm, verdicts)),
                *(f"{overall[word]} / {100 * each[word] / each.total():.1f} %" for word in WORDS),
                f"{100 * float(np.std(off)):.1f} %",
                percent([found[0].ratio_low <= 1 <= found[0].ratio_high for found in verdicts]),
                percent([v.ratio_low <= 1 <= v.ratio_high for found in verdicts for v in found[1:]]),
            )

    head = ["captures", "comparisons", "false alarms", *WORDS, "sd between", "holds, all", "holds, each"]
    table(f"Nothing changed: {len(names)} pairs; all together / each workload", head, rows())

    def powers() -> Iterable[Sequence[object]]:
        for name, several in groups.items():
            if name == "apart, all":
                continue
            for factor in FACTORS:
                of_all = [regression.check(a, scaled(b, factor)) for a, b in several]
                each = [v.verdict in SLOWER for verdicts in of_all for v in verdicts[1:]]
                of_one = [
                    next(v.verdict in SLOWER for v in regression.check(a, scaled(b, factor, key)) if v.workload == key)
                    for a, b in several
                    for key in list(a.workloads)[::3]
                ]
                cells = percent([is_alarm(verdicts[:1]) for verdicts in of_all]), percent(each), percent(of_one)
                yield name, f"{100 * (factor - 1):+.0f} %", *cells

    head = ["captures", "slower by", "all together", "each of all", "one alone"]
    table("Made slower, found, %", head, powers())


WORDS = ("ok", "inconclusive", "improved", "regressed", "suspect")


def purpose(folder: Path) -> None:
    """What is said of captures that were slowed on purpose."""

    def rows() -> Iterable[Sequence[object]]:
        for base in sorted(folder.glob("*-base")):
            name = base.name.removesuffix("-base")
            other = next(path for path in folder.glob(f"{name}-*") if path != base)
            axes = ("threads",) if other.name == "threads-one" else ()
            overall, *each = regression.check(
                regression.evidence(str(base)), regression.evidence(str(other)), axes=axes
            )
            counts = Counter(v.verdict for v in each)
            yield (
                f"{base.name}, {other.name}",
                overall.verdict,
                f"{overall.ratio:.3f} ({overall.ratio_low:.3f} to {overall.ratio_high:.3f})",
                ", ".join(f"{n} {word}" for word, n in counts.most_common()),
                f"{each[0].label} {each[0].ratio:.2f}",
            )

    table("Slower on purpose", ["captures", "all together", "ratio", "each workload", "slowest"], rows())


PARTS: dict[str, Callable[[np.random.Generator, int], None]] = {
    "rules": rules,
    "models": models,
    "families": families,
    "margin": margin,
    "more": more,
    "time": timed,
}


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--pairs", type=Path, help="folder of captures NNa, NNb")
    parser.add_argument("--purpose", type=Path, help="folder of captures NAME-base, NAME-slow")
    asked = parser.parse_args()
    if asked.pairs:
        pairs(asked.pairs)
    if asked.purpose:
        purpose(asked.purpose)
    if asked.pairs or asked.purpose:
        return
    for name in asked.only or PARTS:
        start = time.perf_counter()
        # More is many checks a trial, the others of rules are slow.
        PARTS[name](np.random.default_rng(asked.seed), max(asked.trials // (5 if name in ("more", "rules") else 1), 10))
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

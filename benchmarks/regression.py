"""How often does `perfmodel check` cry wolf, and how often does it find 10 %? On made-up noise, and on real captures.

    python benchmarks/regression.py [--trials 100] [--seed 0] [--only rules models ...]
    python benchmarks/regression.py --pairs DIR
    python benchmarks/regression.py --purpose DIR

Without a folder, times are drawn (`Noise` says how) and judged by `perfmodel.regression.check` on records in memory:

    rules     other rules beside it: false alarms where nothing changed, and how many find all workloads 10 % slower
    models    by noise: false alarms, what of 10 % is found (all, a quarter, one), intervals that hold the truth
    families  false alarms by number of workloads and of runs
    margin    at exactly the margin: how often it is called slower, and how often ok
    more      how many conclude after as many further runs as they asked for
    reach     the largest deviation between runs at which a slowdown is found in 95 % of cases
    time      one check of 500 workloads in 10 runs

`--pairs` reads captures NNa, NNb that were measured in turns with nothing changed, and counts verdicts; `--purpose`
reads NAME-base beside NAME-slow (or NAME-one) and prints what is said of each.
"""

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
from regression_made_up import PARTS, is_alarm, percent, table

from perfmodel import regression
from perfmodel.regression import SLOWER, Evidence

FACTORS = (1.05, 1.1, 1.2, 1.3, 1.5)
WORDS = ("ok", "inconclusive", "improved", "regressed", "suspect")


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


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
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

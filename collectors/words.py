"""Plans and captures in a few lines for people."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import store
from .design import Point
from .progress import clock_words
from .timing import median_error_frac
from .workloads import Workload

N_FIRST = 10


def _placement(w: Workload) -> str:
    way = f" ({w.residency})" if w.residency else ""
    return f"{w.access}{way}" + (f" {w.offload_frac:.0%} {w.order}" if w.offloaded else "")


def plan_words(
    points: Sequence[Point], seconds: Sequence[float], minutes: float, runs: int, skipped: Sequence[str]
) -> list[str]:
    """A campaign's plan: what the time is likely to buy, each study, and the first points."""
    # Calibration, profiles and starts take about a third; the rest is shared by the runs.
    slice_s = 0.65 * 60 * minutes / runs
    n_fit = int(np.searchsorted(np.cumsum(seconds), slice_s))
    lines = [
        f"{len(points)} workloads are planned, about {clock_words(sum(seconds))} a run; {minutes:g} minutes in {runs} "
        f"runs are likely to reach the first {n_fit} (guessed from assumed rates: calibration corrects them)",
        f"{'study':<17} {'planned':>7} {'reached':>7}",
    ]
    planned, reached = (Counter(point.study for point in part) for part in (points, points[:n_fit]))
    lines += [f"{study:<17} {n:>7} {reached[study]:>7}" for study, n in planned.items()]
    lines.append("first points")
    for point in points[:N_FIRST]:
        w = point.workload
        what = w.op if w.gemm_k is None else f"{w.op} {w.gemm_k} x {w.gemm_n}"
        lines.append(
            f"  {w.shape}, {what}, {w.dtype}, {w.n_tokens} tokens, {w.routing}, {_placement(w)}, {w.launch or 'eager'}"
        )
    return [*lines, *(f"left out: {sentence}" for sentence in skipped)]


def grid_words(workloads: Sequence[Workload], skipped: Sequence[str], runs: int) -> list[str]:
    """A sweep's plan: each shape with how much of it is measured."""
    groups: dict[str, list[int]] = {}
    for w in workloads:
        groups.setdefault(w.shape, []).append(w.n_tokens)
    lines = [f"{len(workloads)} workloads, {len(workloads) * runs} points in {runs} runs"]
    for shape, tokens in groups.items():
        first = next(w for w in workloads if w.shape == shape)
        lines.append(
            f"  {shape}: {first.n_experts} experts, top-{first.top_k}, hidden {first.hidden}, inter {first.inter}, "
            f"{len(tokens)} workloads of {min(tokens)} to {max(tokens)} tokens"
        )
    return [*lines, *(f"  left out: {sentence}" for sentence in skipped)]


def rehearsal_words(points: Sequence[Point], tried: Sequence[tuple[Workload, bool, str]]) -> list[str]:
    """What a dry run found: each study and access mode with how many points compute what they should, then what not."""
    study_of = {point.workload.id: point.study for point in points}
    groups: Counter[tuple[str, str]] = Counter()
    right: Counter[tuple[str, str]] = Counter()
    for w, is_right, _ in tried:
        group = study_of[w.id], f"{w.access} ({w.residency})" if w.residency else w.access
        groups[group] += 1
        right[group] += is_right
    lines = [f"{'study':<17} {'access':<19} {'points':>6} {'right':>6}"]
    lines += [f"{study:<17} {access:<19} {n:>6} {right[study, access]:>6}" for (study, access), n in groups.items()]
    lines += [f"wrong: {w.shape} {_placement(w)}: {words}" for w, is_right, words in tried if not is_right]
    notes = Counter(words for _, is_right, words in tried if is_right and words)
    return [*lines, *(f"{n} points: {words}" for words, n in notes.items())]


def summary_words(folder: Path, spent_s: float) -> list[str]:
    """What a capture holds."""
    points, left_out = store.points(folder), store.left_out(folder)
    errors = [median_error_frac(point["times_ns"]) for point in points]
    n_workloads, n_runs = (len({point[key] for point in points}) for key in ("workload", "run"))
    lines = [
        f"{len(points)} points of {n_workloads} workloads in {n_runs} runs, {len(store.calibrations(folder))} "
        f"calibration measurements, {clock_words(spent_s)} spent"
    ]
    if errors:
        middle, most = np.median(errors), np.quantile(errors, 0.9)
        lines.append(f"relative error of a point: median {middle:.1%}, 9 in 10 below {most:.1%}")
    if left_out:
        reasons = Counter(entry["reason"] for entry in left_out).most_common()
        lines += [f"left out {n}: {reason}" for reason, n in reasons[:5]]
        lines += [f"and {len(reasons) - 5} more reasons in {store.LEFT_OUT}"] if len(reasons) > 5 else []
    return lines

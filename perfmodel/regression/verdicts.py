"""Is the candidate slower than the baseline: comparability first, then a Welch interval on run medians per workload."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from perfmodel.capture import Capture, fingerprint_differences
from perfmodel.capture_lines import RESIDENT
from perfmodel.errors import InputError, NotComparableError

DEFAULT_MARGIN_FRAC = 0.03
CONFIDENCE = 0.90  # two-sided, so 5 % on the side that matters
POWER = 0.8  # chance that the runs asked for suffice
ASSUMED_RUN_SD = 0.05  # log sd between runs, assumed where a capture holds a single run
# Log sd between captures of a virtual machine that took less than SHORT_CAPTURE_S: of the mean over all workloads, and
# of a single one (docs/decisions/0008).
ASSUMED_DRIFT_SD, ASSUMED_WORKLOAD_DRIFT_SD = 0.07, 0.2
SHORT_CAPTURE_S = 300
AXES = ("machine", "software", "kernel", "settings")

Array = NDArray[np.float64]

OVERALL = "all workloads"


@dataclass(frozen=True)
class Verdict:
    """One workload compared: candidate over baseline as a ratio with its 90 % interval, and what it means.

    `ok` says slower by no more than the margin; `inconclusive` that the runs cannot tell, with `n_more_runs` wanted on
    each side (null where more runs of this kind cannot help); `suspect` slower, but resting on an assumed spread
    between runs, because a side has only one.
    """

    workload: str
    label: str
    ratio: float
    ratio_low: float
    ratio_high: float
    n_runs_baseline: int
    n_runs_candidate: int
    verdict: str
    n_more_runs: int | None


def require_comparable(
    baseline: Capture, candidate: Capture, axes: Sequence[str] = ()
) -> dict[str, tuple[object, object]]:
    """Refuse captures that differ outside the declared axes of change; returns the differences that are declared.

    An axis is a prefix such as `software` or `software.torch`. Raises NotComparableError naming the first differences.
    """
    for axis in axes:
        if axis.partition(".")[0] not in AXES:
            raise InputError(
                f"unknown axis {axis!r}; known: {', '.join(AXES)}, each also with a key, as software.torch"
            )
    differences = fingerprint_differences(baseline, candidate)
    undeclared = {key: pair for key, pair in differences.items() if not is_declared(key, axes)}
    if undeclared:
        shown = "; ".join(f"{key}: {a!r} against {b!r}" for key, (a, b) in list(undeclared.items())[:4])
        more = f" and {len(undeclared) - 4} more" if len(undeclared) > 4 else ""
        raise NotComparableError(
            f"not comparable: the captures differ in {shown}{more}; declare with --axis what you mean to test"
        )
    return differences


def is_declared(key: str, axes: Sequence[str]) -> bool:
    """Whether a fact of the fingerprint, such as `software.torch`, lies on one of the declared axes of change."""
    return any(key == axis or key.startswith(axis + ".") for axis in axes)


@dataclass(frozen=True)
class Side:
    """Log run medians of one workload in one capture, and the variance that its runs cannot show."""

    log_ns: Array
    drift_variance: float

    @property
    def variance(self) -> float:
        """Variance of the mean of the runs, drift left out."""
        if len(self.log_ns) < 2:
            return ASSUMED_RUN_SD**2
        # Run medians are timer readings: below a per mille the spread of a few runs says nothing.
        return max(float(self.log_ns.var(ddof=1)), 1e-6) / len(self.log_ns)

    @property
    def interval(self) -> tuple[float, float, float]:
        """The mean of the runs and the ends of its interval (Student's t, CONFIDENCE), log ns."""
        n, mean, variance = len(self.log_ns), float(self.log_ns.mean()), self.variance + self.drift_variance
        df = math.inf if n < 2 else (n - 1) * (variance / self.variance) ** 2
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, df)) * math.sqrt(variance)
        return mean, mean - half, mean + half


def _n_more_runs(gap: float, a: Side, b: Side) -> int | None:
    """Runs wanted on each side to tell a difference of `gap` (log units) with stated confidence and power; None where
    no number would do, because assumed drift alone hides it."""
    needed = (gap / float(stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER))) ** 2
    left = needed - a.drift_variance - b.drift_variance
    if left <= 0:
        return None
    n_a, n_b = len(a.log_ns), len(b.log_ns)
    return max(math.ceil((a.variance * n_a + b.variance * n_b) / left) - min(n_a, n_b), 1)


def _compare(workload: str, label: str, a: Side, b: Side, margin: float) -> tuple[Verdict, float]:
    """A verdict on one workload, before correction for many, with its one-sided p-value."""
    n_a, n_b, d = len(a.log_ns), len(b.log_ns), float(b.log_ns.mean() - a.log_ns.mean())
    single = min(n_a, n_b) < 2
    variance = a.variance + b.variance + a.drift_variance + b.drift_variance
    # Welch and Satterthwaite, with what is assumed taken as known.
    estimated = sum(side.variance**2 / (len(side.log_ns) - 1) for side in (a, b) if len(side.log_ns) > 1)
    df = variance**2 / estimated if estimated else math.inf
    se = math.sqrt(variance)
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, df))
    low, high, m = d - t * se, d + t * se, math.log1p(margin)
    more = None
    if low > m:
        verdict = "suspect" if single else "regressed"
    elif high < -m:
        verdict = "improved"
    elif high < m:
        verdict = "ok"
    else:
        verdict = "inconclusive"
        more = _n_more_runs(max(abs(d - m), m / 2), a, b)
    result = Verdict(workload, label, math.exp(d), math.exp(low), math.exp(high), n_a, n_b, verdict, more)
    return result, float(stats.t.sf((d - m) / se, df))


def _may_drift(capture: Capture) -> bool:
    """Whether runs cannot show it all: a virtual machine's neighbours stay for longer than a short capture takes."""
    runs = capture.manifest.get("runs") or []
    if not runs or not capture.manifest["machine"].get("hypervisor"):
        return False
    span_s = max(run["finished"] for run in runs) - min(run["started"] for run in runs)
    return bool(span_s < SHORT_CAPTURE_S)


def check(
    baseline: Capture, candidate: Capture, margin_frac: float = DEFAULT_MARGIN_FRAC, axes: Sequence[str] = ()
) -> list[Verdict]:
    """Candidate against baseline: first all workloads together, then each, slowest first.

    A run (a fresh process) is the sampling unit. Per-workload regressions are kept only where Holm's correction over
    all workloads keeps them. Raises NotComparableError when the captures differ outside `axes` or share no workload.
    """
    if not 0 < margin_frac < 10:
        raise InputError(f"margin is {margin_frac:g}, expected a fraction above 0, such as 0.03 for 3 %")
    require_comparable(baseline, candidate, axes)
    measured = set(candidate.observations["workload"])
    common = [key for key in baseline.observations["workload"].unique(maintain_order=True) if key in measured]
    if not common:
        raise NotComparableError("not comparable: the captures share no workload")
    labels = labels_of(baseline)
    sides = [sides_of(capture, common) for capture in (baseline, candidate)]

    def compare(key: str) -> tuple[Verdict, float]:
        return _compare(key, labels.get(key, key), sides[0][key], sides[1][key], margin_frac)

    compared = [compare(key) for key in common]
    overall, _ = compare(OVERALL)
    kept = _holm([p for _, p in compared], (1 - CONFIDENCE) / 2)
    verdicts = [
        v if keep or v.verdict not in ("regressed", "suspect") else _as_inconclusive(v)
        for (v, _), keep in zip(compared, kept, strict=True)
    ]
    return [overall, *sorted(verdicts, key=lambda v: -v.ratio)]


def sides_of(capture: Capture, workloads: Sequence[str]) -> dict[str, Side]:
    """What the runs of a capture say of each of these workloads, and under OVERALL of their geometric mean.

    Raises NotComparableError where no run measured them all.
    """
    medians, drifts = _run_medians(capture), _may_drift(capture)
    sides = {
        key: Side(np.array(list(medians[key].values())), ASSUMED_WORKLOAD_DRIFT_SD**2 * drifts) for key in workloads
    }
    return {OVERALL: Side(_overall(medians, workloads), ASSUMED_DRIFT_SD**2 * drifts), **sides}


def _as_inconclusive(v: Verdict) -> Verdict:
    return replace(v, verdict="inconclusive", n_more_runs=None)


def _run_medians(capture: Capture) -> dict[str, dict[int, float]]:
    """Log median time by workload and run."""
    table = capture.observations.group_by("workload", "run", maintain_order=True).agg(pl.col("time_ns").median().log())
    medians: dict[str, dict[int, float]] = {}
    for workload, run, log_ns in table.iter_rows():
        medians.setdefault(workload, {})[run] = log_ns
    return medians


def _overall(medians: dict[str, dict[int, float]], common: Sequence[str]) -> Array:
    """Mean log time over the workloads, one number for each run that measured all of them."""
    runs = set.intersection(*(set(medians[key]) for key in common))
    if not runs:
        raise NotComparableError("not comparable: a capture has no run that measured every workload of both")
    return np.array([np.mean([medians[key][run] for key in common]) for run in sorted(runs)])


def labels_of(capture: Capture) -> dict[str, str]:
    """What people call the workloads of a capture, by id."""
    rows = capture.observations.unique("workload", maintain_order=True)
    return {
        row["workload"]: f"{row['op']} {row['shape']}"
        + (f" {row['gemm_k']}x{row['gemm_n']}" if row["gemm_k"] else "")
        + f", {row['n_tokens']} tokens, {row['routing']}"
        + (f", {100 * row['offload_frac']:g} % {row['access']}" if row["access"] != RESIDENT else "")
        + "".join(f", {word}" for word in (row["residency"], row["launch"]) if word)
        + (f", {row['dtype']}" if row["dtype"] != capture.dtype else "")
        for row in rows.iter_rows(named=True)
    }


def _holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses Holm's step-down procedure rejects at family-wise level alpha (Holm 1979)."""
    order = np.argsort(p_values)
    rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > alpha / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def n_missing(one: Capture, other: Capture) -> int:
    """How many workloads of one capture the other did not measure."""
    return len(set(one.observations["workload"]) - set(other.observations["workload"]))


def is_slower(verdicts: Sequence[Verdict]) -> bool:
    """Whether any verdict says the candidate is slower."""
    return any(v.verdict in ("regressed", "suspect") for v in verdicts)

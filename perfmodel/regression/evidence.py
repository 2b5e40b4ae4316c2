"""One side of a comparison: run medians of workloads, when they were taken, and under which circumstances."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby, pairwise
from typing import Any

import polars as pl

from perfmodel.capture import OBSERVATIONS, Capture
from perfmodel.capture_lines import NOT_CONTENT, RESIDENT
from perfmodel.errors import InputError, NotComparableError
from perfmodel.hardware import same_fact
from perfmodel.text import counted, printable, shortened

CAPTURE, TRACES = "capture", "traces"  # what a side was measured with
AXES = ("machine", "software", "kernel", "settings")
# Other words for what may differ, as patterns of facts; a new torch brings its own libraries and its own kernel.
AXIS_WORDS = {
    "hardware": ("machine", "machine.*"),
    "torch": ("software.torch*", "software.cublas", "software.cudnn", "kernel"),
    "driver": ("machine.driver*",),
    "os": ("software.kernel_release", "software.platform"),
    "threads": ("settings.threads", "machine.n_threads"),
}
NARROW, KERNEL = ("driver", "threads", "os", "torch"), "kernel"
SAME_MACHINE = ("driver", "threads")  # axes of change on which it is still the machine that it was
MUST_TELL = ("machine", "software")  # of which captures that share no fact at all are not comparable
N_NAMED, N_WORDS = 4, 80  # facts that a sentence names; characters of one
# What a workload of a capture is: columns of its observations that must be alike where the id is.
CONTENT = [key for key in OBSERVATIONS if key not in (*NOT_CONTENT, "run", "times_ns", "time_ns", "capture")]
_MORE_RUNS = {
    CAPTURE: "collect with --runs 5",
    TRACES: "record 5 traces of each side in turns, each in a fresh process, and give the folders",
}
SHORT_CAPTURE_S = 300  # a virtual machine's neighbours stay for longer than such a capture takes


@dataclass(frozen=True)
class Measured:
    """What the runs of one side say of a workload or of a detail: `run_ns` the median time in each run.

    `log_se` is the standard error of a single run's median (log units), known from the steps within it; null: unknown.
    `facts` is what the workload is, as far as it has to be kept: a line of a plan, or the shapes of an operator.
    """

    workload: str
    label: str
    run_ns: Mapping[int, float]
    log_se: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run (a fresh process): the occasion it belongs to, and seconds since 1970, null where they are not known."""

    run: int
    occasion: int = 0
    started: float | None = None
    finished: float | None = None


@dataclass(frozen=True, eq=False)
class Evidence:
    """One side of a comparison, whatever it was read from: a capture, a saved baseline, or traces.

    `workloads` are judged; `details` are not, and tell where time went: operators, kernel classes, launch metrics,
    parts of a step, each as ns (or a count) of one step by run. `may_drift` says that runs of one occasion cannot show
    what changes between occasions. `capture` is there where models can be fitted to the side, null for traces. `notes`
    are what a reader must know of it.
    """

    name: str
    kind: str
    fingerprint: Mapping[str, Any]
    workloads: Mapping[str, Measured]
    runs: tuple[Run, ...]
    may_drift: bool = False
    details: Mapping[str, Measured] = field(default_factory=dict)
    capture: Capture | None = None
    notes: tuple[str, ...] = ()

    @property
    def occasions(self) -> dict[int, int]:
        """The occasion of each run."""
        return {one.run: one.occasion for one in self.runs}


def of_capture(capture: Capture) -> Evidence:
    """A capture as one side of a comparison; all its runs are one occasion."""
    labels = labels_of(capture)
    table = capture.observations.group_by("workload", "run", maintain_order=True).agg(pl.col("time_ns").median())
    run_ns: dict[str, dict[int, float]] = {}
    for workload, run, time_ns in table.iter_rows():
        run_ns.setdefault(workload, {})[run] = time_ns
    spans = {run["run"]: run for run in capture.manifest.get("runs") or []}
    runs = tuple(
        Run(run, 0, spans.get(run, {}).get("started"), spans.get(run, {}).get("finished"))
        for run in capture.observations["run"].unique().sort()
    )
    return Evidence(
        name=capture.name,
        kind=CAPTURE,
        fingerprint=capture.fingerprint,
        workloads={key: Measured(key, labels[key], times) for key, times in run_ns.items()},
        runs=runs,
        may_drift=is_short_on_virtual_machine(runs, capture.fingerprint),
        capture=capture,
    )


def is_short_on_virtual_machine(runs: Sequence[Run], fingerprint: Mapping[str, Any]) -> bool:
    """Whether runs cannot show it all: a virtual machine's neighbours stay for longer than a short capture takes."""
    started = [one.started for one in runs if one.started is not None]
    finished = [one.finished for one in runs if one.finished is not None]
    if not started or not finished or not fingerprint.get("machine.hypervisor"):
        return False
    return max(finished) - min(started) < SHORT_CAPTURE_S


def labels_of(capture: Capture) -> dict[str, str]:
    """What people call the workloads of a capture, by id."""
    rows = capture.observations.unique("workload", maintain_order=True)
    return {row["workload"]: label_of(row, capture.dtype) for row in rows.iter_rows(named=True)}


def label_of(row: Mapping[str, Any], dtype: str) -> str:
    """What people call a workload of a capture in which most are of `dtype`."""
    return (
        f"{row['op']} {row['shape']}"
        + (f" {row['gemm_k']}x{row['gemm_n']}" if row["gemm_k"] else "")
        + f", {row['n_tokens']} tokens, {row['routing']}"
        + (f", {100 * row['offload_frac']:g} % {row['access']}" if row["access"] != RESIDENT else "")
        + "".join(f", {word}" for word in (row["residency"], row["launch"]) if word)
        + (f", {row['dtype']}" if row["dtype"] != dtype else "")
    )


def alternate(one: Evidence, other: Evidence) -> bool:
    """Whether the runs of both sides took turns on one machine, so that what drifts is in both alike: never three of a
    side in a row, none begun before the last had ended, and at least three runs of each."""
    if any(key.startswith("machine.") and not is_declared(key, SAME_MACHINE) for key in differences(one, other)):
        return False
    runs = [
        (run.started, side, run.finished)
        for side, evidence in enumerate((one, other))
        for run in evidence.runs
        if run.started is not None
    ]
    if min(len(one.runs), len(other.runs)) < 3 or len(runs) < len(one.runs) + len(other.runs):
        return False
    if any(finished is not None and finished < started for started, _, finished in runs):
        return False  # of such times nothing follows
    runs.sort(key=lambda run: run[:2])
    # Times are kept in whole seconds.
    if any(before[2] is not None and before[2] > after[0] + 1 for before, after in pairwise(runs)):
        return False
    stretches = [len(list(group)) for _, group in groupby(side for _, side, _ in runs)]
    return max(stretches) <= 2


def differences(one: Evidence, other: Evidence) -> dict[str, tuple[object, object]]:
    """Every fact of machine, software, kernel and settings in which two sides differ, among those that both tell.

    Of captures that share no fact of the machine, or of the software, that is the difference: `machine.*`.
    """
    a, b = one.fingerprint, other.fingerprint
    found = {key: (a[key], b[key]) for key in sorted(a.keys() & b.keys()) if not same_fact(key, a[key], b[key])}
    for group in MUST_TELL if one.kind == other.kind == CAPTURE else ():
        told = [{key for key in side if key.startswith(f"{group}.")} for side in (a, b)]
        if any(told) and not set.intersection(*told):
            found[f"{group}.*"] = (counted(len(told[0]), "fact"), counted(len(told[1]), "fact"))
    return found


def untold(baseline: Evidence, candidate: Evidence, axes: Sequence[str] = ()) -> list[str]:
    """Sentences on facts that one side alone tells, so that nobody knows whether they differ; declared ones may."""
    found = []
    for words, one, other in (("baseline", baseline, candidate), ("candidate", candidate, baseline)):
        keys = [key for key in sorted(one.fingerprint.keys() - other.fingerprint.keys()) if not is_declared(key, axes)]
        if keys:
            found.append(
                f"{counted(len(keys), 'fact')} of the {words} alone, which could not be compared: {_some(keys)}"
            )
    return found


def _some(words: Sequence[str]) -> str:
    more = f" and {len(words) - N_NAMED} more" if len(words) > N_NAMED else ""
    return ", ".join(shortened(one, N_WORDS) for one in words[:N_NAMED]) + more


def require_same_content(baseline: Evidence, candidate: Evidence) -> None:
    """Refuse captures that mean other work by the id of a workload; raises NotComparableError naming what differs."""
    if baseline.capture is None or candidate.capture is None:
        return
    first, second = (
        side.capture.observations.unique("workload", maintain_order=True).select("workload", *CONTENT)
        for side in (baseline, candidate)
        if side.capture is not None
    )
    both = first.join(second, on="workload", suffix=" of the candidate", maintain_order="left")
    for key in CONTENT:
        apart = both.filter(pl.col(key).ne_missing(pl.col(f"{key} of the candidate")))
        if not apart.is_empty():
            of, a, b = apart.select("workload", key, f"{key} of the candidate").row(0)
            raise NotComparableError(
                f"not comparable: workload {printable(of)} is not the same work on both sides: {key} is {_fact(a)} in "
                f"the baseline, {_fact(b)} in the candidate"
            )


def _fact(value: object) -> str:
    return shortened(repr(value), N_WORDS)


def doubts(baseline: Evidence, candidate: Evidence) -> tuple[str, ...]:
    """Sentences on what two sides cannot show together, and whether they are those that were meant; often none."""
    found = []
    if min(len(baseline.runs), len(candidate.runs)) < 2:
        found.append(
            "a side has a single run, so that the spread between runs is assumed and nothing slower is firmer than "
            f"suspect; {_MORE_RUNS[baseline.kind]}"
        )
    began, ended = [run.started for run in baseline.runs], [run.finished for run in candidate.runs]
    first, other = ({key: dict(one.run_ns) for key, one in side.workloads.items()} for side in (baseline, candidate))
    if first == other:
        found.append("both sides hold the same measurements: nothing was compared")
    elif None not in (*began, *ended) and min(filter(None, began), default=0) > max(filter(None, ended), default=0):
        found.append("the baseline was measured after the candidate: are they the right way round?")
    return tuple(found)


def is_declared(key: str, axes: Sequence[str]) -> bool:
    """Whether a fact of the fingerprint, such as `software.torch`, lies on one of the declared axes of change."""
    return any(fnmatchcase(key, pattern) for axis in axes for pattern in AXIS_WORDS.get(axis, (axis, f"{axis}.*")))


def axes_of(keys: Collection[str]) -> list[str]:
    """The axes that declare these facts of the fingerprint and little else: a narrow word such as `threads` where it
    says it all, as another machine would excuse what a changed setting does to it."""
    words = [word for word in NARROW if any(key != KERNEL and is_declared(key, [word]) for key in keys)]
    wide = sorted({key.partition(".")[0] for key in keys if not is_declared(key, words)})
    left = [key for key in keys if not is_declared(key, wide)]
    return [*(word for word in words if any(is_declared(key, [word]) for key in left)), *wide]


def may_excuse(axes: Sequence[str]) -> bool:
    """Whether another machine was declared, whose rates may explain a slowdown. A driver is none: what it loses is the
    regression."""
    return any(axis == "hardware" or (axis.partition(".")[0] == "machine" and "driver" not in axis) for axis in axes)


def require_comparable(
    baseline: Evidence, candidate: Evidence, axes: Sequence[str] = ()
) -> dict[str, tuple[object, object]]:
    """Refuse sides that differ outside the declared axes of change; returns the differences that are declared.

    An axis is one of AXIS_WORDS, or a prefix such as `software` or `software.torch`. Raises InputError for another, and
    NotComparableError naming the first differences.
    """
    for axis in axes:
        group, dot, key = axis.partition(".")
        if axis not in AXIS_WORDS and (group not in AXES or (dot and not key)):
            known = ", ".join((*AXIS_WORDS, *AXES))
            raise InputError(f"unknown axis {axis!r}; known: {known}, the last four also with a key, as software.torch")
    if baseline.kind != candidate.kind:
        raise NotComparableError(
            f"not comparable: {_fact(baseline.name)} is of {baseline.kind}, {_fact(candidate.name)} of {candidate.kind}"
        )
    found = differences(baseline, candidate)
    undeclared = {key: pair for key, pair in found.items() if not is_declared(key, axes)}
    if undeclared:
        shown = "; ".join(
            f"{shortened(key, N_WORDS)}: {_fact(a)} against {_fact(b)}"
            for key, (a, b) in [*undeclared.items()][:N_NAMED]
        )
        more = f" and {len(undeclared) - N_NAMED} more" if len(undeclared) > N_NAMED else ""
        of = "captures" if baseline.kind == CAPTURE else baseline.kind
        raise NotComparableError(
            f"not comparable: the {of} differ in {shown}{more}; declare what you mean to test; all of it would be "
            + " ".join(f"--axis {axis}" for axis in axes_of(undeclared))
        )
    return found

"""Traces as one side of a comparison: one file, or a folder of traces of fresh processes; judged by their steps."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from perfmodel.capture_lines import MANIFEST
from perfmodel.errors import InputError, NotComparableError, about
from perfmodel.readers import is_folder_of_ranks, read_trace
from perfmodel.readers.folder import (
    find_ranks,
    ignored_note,
    listed,
    rank_in_name,
    read_or_why,
    recorded_rank,
    refuse_if_all_failed,
    time_base_ns,
)
from perfmodel.regression.evidence import TRACES, Evidence, Measured, Run, differences
from perfmodel.trace import DEVICE_KINDS, Trace

from .changes import require_same_work
from .parts import details_of
from .steps import PASS, STEP, WINDOW, Steps, judged_steps

N_RESAMPLES = 999
# Options of torch's profiler that cost time on the host, which writes them only where they are on.
PROFILER_OPTIONS = ("with_stack", "record_shapes", "profile_memory")
_JUDGED_BY = {
    STEP: None,
    PASS: "no step is marked in the traces, so that MoE layer passes are judged, which take at least half of the time",
    WINDOW: "no step is marked in the traces, so that each is judged as a whole, and must have recorded as much work",
}


@dataclass(frozen=True)
class _Taken:
    """One trace as a side of its own: the file, its rank and process, what it says, and the times of its steps."""

    file: str
    rank: int | None
    process: int | None
    evidence: Evidence
    spans: tuple[tuple[int, int], ...]

    @property
    def step_ns(self) -> float:
        """The time of its step."""
        return next(iter(self.evidence.workloads.values())).run_ns[0]


def is_of_traces(path: Path) -> bool:
    """Whether a path is a trace or a folder of traces, rather than a capture or what is no measurement."""
    if not path.is_dir():
        return path.is_file()
    if (path / MANIFEST).exists():
        return False
    if not is_folder_of_ranks(path):
        return True
    try:
        find_ranks(path)
    except InputError:
        return False
    return True


def of_traces(path: str | Path) -> Evidence:
    """A trace file, or a folder of traces, as one side of a comparison.

    Each file of a folder is a run of its own, of a fresh process; but files of different ranks are one run of one job,
    which is judged by the rank whose step is longest, for no other rank may begin the next step before it. Several runs
    of a job lie in a subfolder each. The workload is the step (`trace_steps.judged_steps`), its time in a run the
    median over steps, `log_se` what steps say of that (`log_se_of_median`). `details` are those of `trace_parts`, the
    fingerprint is what files tell of machine, software and settings. A file that cannot be read is left out with a
    note. Raises InputError where none can, and where two files hold the same recording; NotComparableError where the
    traces of the folder differ in their fingerprint or their work.
    """
    path = Path(path)
    if not is_folder_of_ranks(path):
        trace = read_trace(path)
        with about(path):
            return of_trace(trace, path.name)
    with about(path):
        files, ignored = find_ranks(path)
        found, failed = [], {}
        for file in files:
            name = str(file.relative_to(path))
            trace_or_why = read_or_why(file, None)
            if isinstance(trace_or_why, str):
                failed[name] = trace_or_why
                continue
            with about(name):
                found.append(_taken(trace_or_why, name))
        refuse_if_all_failed(failed, len(files))
        notes = [*ignored_note(ignored), *(f"{name} is left out: {why}" for name, why in failed.items())]
        _refuse_repeats(found)
        runs, of_ranks = _runs_of(found)
        return _together(path.resolve().name, runs, [*notes, *of_ranks])


def of_trace(trace: Trace, name: str) -> Evidence:
    """One trace that was read already as one side of a comparison, as `of_traces` makes it of a file."""
    return _taken(trace, name).evidence


def _taken(trace: Trace, name: str) -> _Taken:
    """One trace as a side with one run."""
    steps = judged_steps(trace.events)
    details = details_of(trace, steps)
    run_ns = {0: float(np.median(steps.dur_ns))}
    base_ns = time_base_ns(trace)
    first, last = trace.events.select(pl.min("start_ns"), end=(pl.col("start_ns") + pl.col("dur_ns")).max()).row(0)
    started, finished = (None if base_ns is None else (base_ns + at) / 1e9 for at in (first, last))
    judged_by = _JUDGED_BY[steps.how]
    notes = [] if judged_by is None else [judged_by]
    if steps.n_threads > 1:
        notes.append(f"{name}: of {steps.n_threads} threads with steps the one with the longest is judged")
    evidence = Evidence(
        name=name,
        kind=TRACES,
        fingerprint=_fingerprint(trace, steps, details),
        workloads={steps.how: Measured(steps.how, steps.how, run_ns, log_se_of_median(steps.dur_ns))},
        runs=(Run(0, 0, started, finished),),
        details=details,
        notes=(*notes, *trace.notes),
    )
    spans = tuple(steps.windows.select(pl.col("start_ns") + (base_ns or 0), "dur_ns").iter_rows())
    recorded = recorded_rank(trace)
    processes = steps.events["process"].drop_nulls().unique()
    return _Taken(
        name,
        rank_in_name(name) if recorded is None else recorded,
        int(processes[0]) if len(processes) == 1 else None,
        evidence,
        spans,
    )


def log_se_of_median(dur_ns: NDArray[np.float64]) -> float | None:
    """The standard error of the median step of one run (log units), by a bootstrap over blocks of consecutive steps.

    Steps that follow each other are alike, so that single ones drawn at random would promise too much (circular blocks:
    Politis and Romano 1992); blocks are as long as the cube root of the number of steps, rounded up. Seeded by the
    times themselves. Null for fewer than three steps.
    """
    n = len(dur_ns)
    if n < 3:
        return None
    length = math.ceil(n ** (1 / 3))
    seed = int.from_bytes(hashlib.sha256(np.ascontiguousarray(dur_ns).tobytes()).digest()[:8])
    starts = np.random.default_rng(seed).integers(0, n, (N_RESAMPLES, math.ceil(n / length)))
    rows = ((starts[:, :, None] + np.arange(length)) % n).reshape(N_RESAMPLES, -1)[:, :n]
    return float(np.median(np.log(dur_ns)[rows], axis=1).std(ddof=1))


def _refuse_repeats(found: Sequence[_Taken]) -> None:
    """A copy of a trace is no second run."""
    first: dict[tuple[int | None, tuple[tuple[int, int], ...]], str] = {}
    for one in found:
        other = first.setdefault((one.rank, one.spans), one.file)
        if other != one.file:
            raise InputError(
                f"{other} and {one.file} hold the same recording; expected traces of fresh processes, each once"
            )


def _runs_of(found: Sequence[_Taken]) -> tuple[list[Evidence], list[str]]:
    """The runs of a folder, each as a side with one run: files, or the slowest rank of each job."""
    ranks = Counter(one.rank for one in found)
    if len(ranks) == 1:
        return [one.evidence for one in found], _of_one_process(found)
    jobs: dict[Path, list[_Taken]] = {}
    for one in found:
        jobs.setdefault(Path(one.file).parent, []).append(one)
    is_one_job = max(ranks.values()) == 1
    groups = [list(found)] if is_one_job else list(jobs.values())
    if None in ranks or any(Counter(one.rank for one in group) != Counter({*ranks}) for group in groups):
        said = listed([f"{name or 'none'} in {n}" for name, n in sorted(ranks.items(), key=str)])
        raise InputError(
            f"traces of several ranks that are no whole runs (rank {said} files); expected all ranks of one job, or a "
            "subfolder with all of them for each run"
        )
    slowest = [max(group, key=lambda one: one.step_ns) for group in groups]
    said = listed([f"{one.rank} ({one.file})" for one in slowest])
    notes = [f"of {len(ranks)} ranks the one with the longest step is judged, on which all others wait: rank {said}"]
    n_ranks = slowest[0].evidence.fingerprint.get("settings.world_size", len(ranks))
    if n_ranks > len(ranks):
        notes.append(f"only {len(ranks)} of {n_ranks} ranks are there, so that a slower one may be missing")
    return [one.evidence for one in slowest], notes


def _of_one_process(found: Sequence[_Taken]) -> list[str]:
    """A warning where several traces may be cycles of one profiler; a container may number its processes alike, too."""
    counts = Counter(one.process for one in found if one.process is not None)
    process, n_files = max(counts.items(), key=lambda item: item[1], default=(None, 0))
    if n_files < 2:
        return []
    return [
        f"{n_files} traces are of processes with one number ({process}): if these are cycles of one process, they are "
        "no runs of their own, and promise more than is known"
    ]


def _together(name: str, runs: Sequence[Evidence], notes: Sequence[str]) -> Evidence:
    """Sides of one run each as one side."""
    first = runs[0]
    for other in runs[1:]:
        apart = differences(first, other)
        if apart:
            shown = "; ".join(f"{key}: {a!r} against {b!r}" for key, (a, b) in list(apart.items())[:4])
            raise NotComparableError(
                f"{first.name} and {other.name} are no repeats of each other, they differ in {shown}"
            )
        try:
            require_same_work(first, other)
        except NotComparableError as error:
            raise NotComparableError(f"{first.name} and {other.name} are no repeats of each other: {error}") from None
    own = dict.fromkeys(note for run in runs for note in run.notes)
    return Evidence(
        name=name,
        kind=TRACES,
        fingerprint=first.fingerprint,
        workloads=_merged([run.workloads for run in runs]),
        runs=tuple(replace(run.runs[0], run=number) for number, run in enumerate(runs)),
        details=_merged([run.details for run in runs]),
        notes=(*notes, *own),
    )


def _merged(of_runs: Sequence[Mapping[str, Measured]]) -> dict[str, Measured]:
    """What was measured in several runs, each of which knows of itself alone."""
    keys = dict.fromkeys(key for one in of_runs for key in one)
    merged = {}
    for key in keys:
        measured = {number: one[key] for number, one in enumerate(of_runs) if key in one}
        first = next(iter(measured.values()))
        merged[key] = replace(first, run_ns={number: one.run_ns[0] for number, one in measured.items()})
    return merged


def _fingerprint(trace: Trace, steps: Steps, details: Mapping[str, Measured]) -> dict[str, Any]:
    """What a file tells of the machine, the software and how it was recorded; what it does not tell is not there."""
    meta = trace.meta
    used = steps.events.filter(pl.col("kind").is_in(DEVICE_KINDS)).select("rank", "device").unique()
    n_devices = used.height
    device = int(used["device"].min()) if n_devices else None  # type: ignore[arg-type]
    properties = _device(meta, device)
    job = meta.get("distributedInfo")
    job = job if isinstance(job, Mapping) else {}
    options = {f"settings.{name}": _is_on(meta, name) for name in PROFILER_OPTIONS}
    told = {
        "machine.gpu_name": properties.get("name") or _gpu_of_nsys(meta, device),
        "machine.gpu_memory_bytes": properties.get("totalGlobalMem"),
        "machine.driver_api": meta.get("cuda_driver_version") or meta.get("hip_driver_version"),
        "software.torch_cuda": meta.get("cuda_runtime_version"),
        "software.torch_hip": meta.get("hip_runtime_version"),
        "machine.driver": _noted(meta, "nvidia_driver_version"),
        "software.torch": _noted(meta, "torch_version") or _noted(meta, "pytorch_version"),
        "software.nccl": job.get("nccl_version"),
        "settings.profiler": trace.source,
        "settings.device": "gpu" if n_devices else "cpu",
        "settings.n_devices": n_devices or None,
        "settings.world_size": job.get("world_size"),
        "settings.dtype": _dtype(details),
        **(options if trace.source == "kineto" and "schemaVersion" in meta else {}),
    }
    return {key: value for key, value in told.items() if isinstance(value, (str, int, float, bool)) and value != ""}


def _noted(meta: Mapping[str, Any], key: str) -> str | None:
    """A version that a program noted of itself beside the events, at whatever depth (`torch.utils.collect_env` and
    those who keep what it finds); null where none is noted, or several."""
    found, left = set(), [meta]
    while left:
        here = left.pop()
        left += [inner for inner in here.values() if isinstance(inner, Mapping)]
        version = here.get(key)
        found |= {version} if isinstance(version, str) and version[:1].isdigit() else set()
    return found.pop() if len(found) == 1 else None


def _device(meta: Mapping[str, Any], device: int | None) -> Mapping[str, Any]:
    """What torch recorded of a device; ROCm numbers them otherwise in events, where only one kind tells which it is."""
    found = meta.get("deviceProperties")
    known = [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []
    named = [one for one in known if one.get("id") == device]
    kinds = {(one.get("name"), one.get("totalGlobalMem")) for one in known}
    return named[0] if named else known[0] if device is not None and len(kinds) == 1 else {}


def _gpu_of_nsys(meta: Mapping[str, Any], device: int | None) -> object:
    found = meta.get("gpus")
    is_known = isinstance(found, list) and device is not None and 0 <= device < len(found)
    return found[device] if is_known else None  # type: ignore[index]


def _is_on(meta: Mapping[str, Any], option: str) -> bool:
    return str(meta.get(option, 0)).lower() in ("1", "true")


def _dtype(details: Mapping[str, Measured]) -> str | None:
    """The type in which most FLOPs of matrix products are computed, null where shapes were not recorded."""
    flops: Counter[str] = Counter()
    for one in details.values():
        if one.facts.get("dtype"):
            flops[one.facts["dtype"]] += one.facts["n_flops"]
    return flops.most_common(1)[0][0] if flops else None

"""A capture of an expert-parallel layer: what every rank did in every step, phase by phase, on one clock.

docs/expert-parallel.md describes the files. What they add up to is computed in `ep_steps`.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from perfmodel.capture_lines import DTYPES, PROFILES, SCHEMA, WORKLOADS, read_lines
from perfmodel.errors import InputError
from perfmodel.moe import MoEShape

EP_MANIFEST, STEPS_FILE, PROBES_FILE = "expert_parallel.json", "steps.jsonl", "probes.jsonl"
KIND = "expert-parallel"
# In the order in which a token meets them. `counts` tells every rank how many rows it will receive, which the
# all-to-all of rows (`dispatch`) has to know; `combine` is the all-to-all back.
RECORDED = ("gate", "permute", "counts", "dispatch", "gemm1", "activation", "gemm2", "combine", "reduce")
# Rows arrive by source rank: what sorts them by expert, and back afterwards, is recorded as `permute` too, and told
# from what a rank does with rows of its own tokens by when it happens: after the first dispatch was called.
REGROUP = "regroup"
EP_PHASES = (*RECORDED[:4], REGROUP, *RECORDED[4:])
COMMUNICATION = ("counts", "dispatch", "combine")
EP_SCHEDULES = ("bulk", "chunked")
PHASE = pl.Enum(EP_PHASES)

# One row: one phase of one rank in one step. Times in ns on rank 0's clock, from the start of the collection; a phase
# of communication lasts from its call to its completion, waiting for other ranks included. `chunk` counts from 0.
STEPS = pl.Schema(
    {
        "workload": pl.String(),
        "step": pl.Int64(),
        "rank": pl.Int64(),
        "phase": PHASE,
        "chunk": pl.Int64(),
        "start_ns": pl.Int64(),
        "dur_ns": pl.Int64(),
    }
)
# One row: one rank in one step.
ENDS = pl.Schema({name: pl.Int64() if name != "workload" else pl.String() for name in ("workload", "step", "rank")})
ENDS |= {"start_ns": pl.Int64(), "end_ns": pl.Int64()}
# One row: one probe of one rank, `value` in the base unit `unit`; `params` are JSON. Null `rank`: of all together.
PROBES = pl.Schema(
    {"probe": pl.String(), "rank": pl.Int64(), "params": pl.String(), "value": pl.Float64(), "unit": pl.String()}
)


class EpSettings(msgspec.Struct, frozen=True):
    """How it was collected: ranks, what they compute on, threads of each; null `threads`: not told."""

    n_ranks: int
    device: str
    dtype: str
    backend: str = ""
    threads: int | None = None
    seed: int | None = None
    n_warm_up: int | None = None
    n_steps: int | None = None
    n_chunks: list[int] = []


class Clock(msgspec.Struct, frozen=True):
    """By how much a rank's clock is behind rank 0's, and how far off that may be, ns."""

    rank: int
    offset_ns: float = 0
    error_ns: float = 0


class EpManifest(msgspec.Struct, frozen=True):
    """expert_parallel.json: machine and software are kept as a capture of one process has them. `cpus_of_ranks` are the
    processors that each rank is bound to, null where ranks are not bound, empty where a system cannot."""

    settings: EpSettings
    machine: dict[str, Any]
    software: dict[str, Any] = {}
    kernel: str | None = None
    clock: list[Clock] = []
    cpus_of_ranks: list[list[int]] | None = None
    created: str = ""
    collector: str = ""


class EpWorkload(msgspec.Struct, frozen=True):
    """One layer that was run: `gpu_of[expert]` is the rank that holds an expert, `rows[source rank][expert]` how many
    rows the tokens of a rank have for it."""

    workload: str
    shape: str
    n_experts: int
    top_k: int
    hidden: int
    inter: int
    n_gemms: int
    dtype: str
    tokens_per_gpu: int
    routing: str
    schedule: str
    n_chunks: int
    gpu_of: list[int]
    rows: list[list[int]]

    @property
    def moe_shape(self) -> MoEShape:
        """The experts of the layer."""
        sizes = (self.n_experts, self.top_k, self.hidden, self.inter, self.n_gemms)
        return MoEShape(self.shape, *sizes, dtype=self.dtype)

    @property
    def twin(self) -> tuple[object, ...]:
        """What two workloads share that differ in their schedule alone."""
        return (*self.moved, tuple(self.gpu_of), tuple(map(tuple, self.rows)))

    @property
    def moved(self) -> tuple[object, ...]:
        """What two workloads share that differ in schedule and number of ranks (weak scaling)."""
        sizes = (self.n_experts, self.top_k, self.hidden, self.inter, self.n_gemms, self.dtype)
        return (self.shape, *sizes, self.tokens_per_gpu, self.routing)

    @property
    def way(self) -> str:
        """The schedule in a word: `bulk`, `chunked x 4`."""
        return self.schedule if self.schedule == "bulk" else f"{self.schedule} x {self.n_chunks}"


class StepLine(msgspec.Struct, frozen=True):
    """One rank in one step; `phases` are phase, chunk, start, duration."""

    workload: str
    step: int
    rank: int
    start_ns: int
    end_ns: int
    phases: list[tuple[str, int, int, int]]


class ProbeLine(msgspec.Struct, frozen=True):
    """One measurement of a machine number while all ranks work, or, where `params` say so, one alone."""

    probe: str
    value: float
    unit: str
    rank: int | None = None
    params: dict[str, Any] = {}


@dataclass(frozen=True)
class EpCapture:
    """One folder: what was run (`workloads`, in the order of the file), its phases (STEPS), when each rank began and
    ended each step (ENDS), and what the machine can do (PROBES)."""

    name: str
    path: Path
    manifest: EpManifest
    workloads: tuple[EpWorkload, ...]
    steps: pl.DataFrame
    ends: pl.DataFrame
    probes: pl.DataFrame

    @property
    def n_ranks(self) -> int:
        """Members of the group."""
        return self.manifest.settings.n_ranks

    @property
    def dtype(self) -> str:
        """The dtype of the settings, as workloads call it."""
        return DTYPES.get(self.manifest.settings.dtype, self.manifest.settings.dtype)

    @property
    def clock_error_ns(self) -> float:
        """How far two ranks' times may be apart for no other reason than their clocks: the largest error, twice."""
        return 2 * max((one.error_ns for one in self.manifest.clock), default=0.0)

    @cached_property
    def by_id(self) -> Mapping[str, EpWorkload]:
        """The workloads by their ids."""
        return {one.workload: one for one in self.workloads}

    @cached_property
    def measured(self) -> tuple[EpWorkload, ...]:
        """The workloads with at least one step."""
        seen = set(self.ends["workload"].unique())
        return tuple(one for one in self.workloads if one.workload in seen)

    def choose(self, word: str) -> EpWorkload:
        """A measured workload by its id, the beginning of it, or its number from 1; raises InputError."""
        found = [one for one in self.measured if one.workload.startswith(word)]
        if len(found) == 1:
            return found[0]
        if word.isdigit() and 1 <= int(word) <= len(self.measured):
            return self.measured[int(word) - 1]
        ids = ", ".join(one.workload for one in self.measured[:5])
        raise InputError(
            f"workload {word!r} is {'ambiguous' if found else 'unknown'}; expected a number from 1 to "
            f"{len(self.measured)} or an id such as {ids}"
        )

    @property
    def traces(self) -> list[Path]:
        """The folders of profiled traces, one for each profiled workload."""
        return sorted(path for path in (self.path / PROFILES).glob("*") if path.is_dir())


def same_work(captures: Sequence[EpCapture], word: str) -> list[EpWorkload]:
    """The workload that `word` chooses in the first capture that knows it, and in the others the one of the same shape,
    tokens, routing and schedule, whatever its id there; raises InputError where a capture has none."""
    knows = next((one for one in captures if any(w.workload.startswith(word) for w in one.measured)), captures[0])
    chosen = knows.choose(word)
    found = []
    for capture in captures:
        alike = [one for one in capture.measured if (one.moved, one.way) == (chosen.moved, chosen.way)]
        if not alike:
            raise InputError(
                f"{capture.name} has no workload like {chosen.workload} of {knows.name}: {chosen.shape}, "
                f"{chosen.tokens_per_gpu} tokens a rank, {chosen.routing}, {chosen.way}"
            )
        found.append(chosen if capture is knows else alike[0])
    return found


def is_ep_capture(path: str | Path) -> bool:
    """Whether a folder is a capture of an expert-parallel layer."""
    return (Path(path) / EP_MANIFEST).is_file()


def shipped_ep_captures() -> list[Path]:
    """The captures of expert-parallel layers that come with the project."""
    here = Path(__file__).parent
    root = here.parent if (here.parent / "pyproject.toml").is_file() else here
    return sorted(file.parent for file in (root / "traces").glob(f"*/{EP_MANIFEST}"))


def load_ep_capture(path: str | Path) -> EpCapture:
    """Read the capture of an expert-parallel layer; raises InputError when a folder is none or contradicts itself."""
    path = Path(path)
    if not is_ep_capture(path):
        found = "a file" if path.is_file() else f"a folder without {EP_MANIFEST}" if path.is_dir() else "nothing"
        raise InputError(
            f"{str(path)!r} is no capture of an expert-parallel layer: found {found}; docs/expert-parallel.md says "
            "what one holds"
        )
    manifest = _manifest(path / EP_MANIFEST)
    workloads = read_lines(path / WORKLOADS, EpWorkload)
    for workload in workloads:
        _check_workload(path.name, workload, manifest.settings.n_ranks)
    n_lines = Counter(one.workload for one in workloads)
    if len(n_lines) < len(workloads):
        raise InputError(f"capture {path.name!r}: workload {n_lines.most_common(1)[0][0]} stands there twice")
    lines = read_lines(path / STEPS_FILE, StepLine)
    if not lines:
        raise InputError(f"capture {path.name!r} holds no step")
    _check_ids(path.name, lines, {one.workload: one for one in workloads})
    steps, ends = _tables(lines)
    _check_ranks(path.name, ends, manifest.settings.n_ranks)
    return EpCapture(path.name, path, manifest, tuple(workloads), steps, ends, _probes(path))


def _manifest(file: Path) -> EpManifest:
    where = f"capture {file.parent.name!r}: {file.name}"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        schema, kind = content["schema"], content["kind"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{where} is no manifest: no JSON object with a schema and a kind") from None
    if schema != SCHEMA or kind != KIND:
        raise InputError(f"{where} is of schema {schema!r} and kind {kind!r}, expected {SCHEMA} and {KIND!r}")
    try:
        manifest = msgspec.convert(content, EpManifest)
    except msgspec.ValidationError as error:
        raise InputError(f"{where} is damaged: {error}") from None
    n_ranks, threads = manifest.settings.n_ranks, manifest.settings.threads
    if n_ranks < 1 or (threads is not None and threads < 1):
        raise InputError(f"{where} tells of {n_ranks} ranks of {threads} threads, expected at least 1 of each")
    if manifest.cpus_of_ranks is not None and len(manifest.cpus_of_ranks) != n_ranks:
        raise InputError(f"{where} tells the processors of {len(manifest.cpus_of_ranks)} ranks, expected {n_ranks}")
    return manifest


def _check_workload(capture: str, one: EpWorkload, n_ranks: int) -> None:
    where = f"capture {capture!r}: workload {one.workload}"
    if one.schedule not in EP_SCHEDULES:
        raise InputError(f"{where} has schedule {one.schedule!r}; known: {', '.join(EP_SCHEDULES)}")
    if one.n_chunks < 1 or (one.schedule == "bulk" and one.n_chunks != 1):
        raise InputError(f"{where} is {one.schedule} in {one.n_chunks} chunks, expected 1 in bulk and else at least 1")
    try:
        _ = one.moe_shape
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if len(one.gpu_of) != one.n_experts or not all(0 <= rank < n_ranks for rank in one.gpu_of):
        raise InputError(f"{where} names no rank from 0 to {n_ranks - 1} for each of its {one.n_experts} experts")
    if [len(row) for row in one.rows] != [one.n_experts] * n_ranks:
        raise InputError(f"{where}: rows are not those of {n_ranks} ranks for {one.n_experts} experts each")
    total = one.tokens_per_gpu * one.top_k
    for rank, row in enumerate(one.rows):
        if one.tokens_per_gpu < 1 or sum(row) != total or not 0 <= min(row) <= max(row) <= one.tokens_per_gpu:
            raise InputError(
                f"{where}: rank {rank} has {sum(row)} rows, the busiest expert {max(row)} of them; expected "
                f"{one.tokens_per_gpu} tokens x top-{one.top_k} = {total}, no expert with more than there are tokens"
            )


def _check_ids(capture: str, lines: Sequence[StepLine], known: Mapping[str, EpWorkload]) -> None:
    for line in lines:
        where = f"capture {capture!r}: step {line.step} of workload {line.workload} on rank {line.rank}"
        if line.workload not in known:
            raise InputError(f"{where}: no such workload in {WORKLOADS}")
        if line.end_ns < line.start_ns:
            raise InputError(f"{where} ends before it begins")
        n_chunks = known[line.workload].n_chunks
        for phase, chunk, start_ns, dur_ns in line.phases:
            if phase not in RECORDED:
                raise InputError(f"{where} has a phase {phase!r}; known: {', '.join(RECORDED)}")
            if not 0 <= chunk < n_chunks:
                raise InputError(f"{where}: {phase} of chunk {chunk}, expected 0 to {n_chunks - 1}")
            if dur_ns < 0 or start_ns < line.start_ns or start_ns + dur_ns > line.end_ns:
                raise InputError(
                    f"{where}: {phase} from {start_ns} ns for {dur_ns} ns is not inside its step, {line.start_ns} to "
                    f"{line.end_ns} ns"
                )


def _check_ranks(capture: str, ends: pl.DataFrame, n_ranks: int) -> None:
    """Every rank once in every step."""
    ranks = ends.group_by("workload", "step", maintain_order=True).agg(pl.col("rank").sort())
    for workload, step, found in ranks.iter_rows():
        if found != list(range(n_ranks)):
            raise InputError(
                f"capture {capture!r}: step {step} of workload {workload} was recorded by ranks "
                f"{', '.join(map(str, found))}; expected each of 0 to {n_ranks - 1} once"
            )


def _tables(lines: Sequence[StepLine]) -> tuple[pl.DataFrame, pl.DataFrame]:
    ends = [(one.workload, one.step, one.rank, one.start_ns, one.end_ns) for one in lines]
    steps = [(one.workload, one.step, one.rank, *phase) for one in lines for phase in one.phases]
    order = ["workload", "step", "rank"]
    sent_ns = pl.when(pl.col("phase") == "dispatch").then("start_ns").min().over(order)
    is_regrouping = (pl.col("phase") == "permute") & (pl.col("start_ns") > sent_ns)
    phase = pl.when(is_regrouping).then(pl.lit(REGROUP, PHASE)).otherwise("phase").alias("phase")
    return (
        pl.DataFrame(steps, schema=STEPS, orient="row")
        .with_columns(phase)
        .sort(*order, "start_ns", maintain_order=True),
        pl.DataFrame(ends, schema=ENDS, orient="row").sort(*order),
    )


def _probes(path: Path) -> pl.DataFrame:
    lines = read_lines(path / PROBES_FILE, ProbeLine)
    if not all(np.isfinite(line.value) and line.value > 0 for line in lines):
        raise InputError(f"capture {path.name!r}: {PROBES_FILE} holds a value that is not positive")
    rows = [(line.probe, line.rank, json.dumps(line.params, sort_keys=True), line.value, line.unit) for line in lines]
    return pl.DataFrame(rows, schema=PROBES, orient="row")

"""Structure of a few points: named ranges, shapes, kernels, by torch's profiler or under nsys; never a source of times.

Timing runs in other processes and unprofiled, since profiling slows a small layer down by half. A CUDA graph replays
kernels, not what the host did when it was captured: ranges surround a replay, and there are none inside.
"""

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from perfmodel.errors import InputError

from .layer import Mark, no_mark
from .profile_checks import refuse_gaps, scrubbed, work_of, write_packed
from .profile_points import N_STEPS, file_name, in_the_way, range_name
from .workloads import Workload

N_WARM_UP = 2  # the first call loads kernels and grows the allocator's memory


class Prepared(Protocol):
    """A workload that is ready to run: `call(n)` stands for `n_inner` calls, `facts` go with its measurements."""

    @property
    def call(self) -> Callable[[int], object]:
        """Run it; the number says which weights of the rotation."""

    @property
    def n_inner(self) -> int:
        """How many calls of the workload one call of this is."""

    @property
    def facts(self) -> dict[str, Any]:
        """What is worth saying about how it runs."""

    def close(self) -> None:
        """Give back what it holds."""


PrepareMarked = Callable[[Mark], Prepared]


class _PlainCall:
    """A bare function of the call's number as a Prepared."""

    n_inner = 1

    def __init__(self, call: Callable[[int], object]) -> None:
        self.call = call
        self.facts: dict[str, Any] = {}

    def close(self) -> None:
        """Nothing is held."""


def _as_prepared(made: Any) -> Prepared:
    return made if hasattr(made, "call") else _PlainCall(made)


@cache  # a failing import searches every folder of the path, which would stand in the profile
def _nvtx_range() -> Callable[[str], AbstractContextManager[object]]:
    """A range that nsys sees: of the nvtx package, else of torch, else none. NVTX keeps every name for ever."""
    try:
        import nvtx
    except (ImportError, OSError):
        return _torch_range if torch.cuda.is_available() else lambda _name: nullcontext()
    return partial(nvtx.annotate, domain="perfmodel")


@contextmanager
def _torch_range(name: str) -> Iterator[None]:
    torch.cuda.nvtx.range_push(name)  # nvtx.range() takes braces in a name for a format
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """Name a range for torch's profiler and for nsys at once; the one that is not there takes no notice."""
    with _nvtx_range()(name), record_function(name):
        yield


@contextmanager
def without_profiler_chatter() -> Iterator[None]:
    """Hold back what the profiler's C++ side writes to stderr (`USDT: ... profiler_start`); all else is passed on."""
    sys.stderr.flush()
    real = os.dup(2)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            held.seek(0)
            sys.stderr.writelines(line for line in held if not line.startswith("USDT:"))


def _session(is_cuda: bool) -> profile:
    # The first session of a process decides whether CUDA is ever traced in it: never one of the CPU alone before.
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda else [])
    # Tracing stays loaded between sessions: newer versions take it down, and graphs captured meanwhile may then replay
    # without their kernels in the trace, or crash.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    return profile(activities=activities, record_shapes=True, acc_events=True)


@cache
def _wake_profiler() -> None:
    """Load the device's tracing before a graph is captured: on some versions a profiler that comes later breaks it."""
    with without_profiler_chatter(), _session(is_cuda=True):
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()


def counting(counts: Counter[str]) -> Mark:
    """Ranges `perfmodel::PART` that are counted as they are entered."""

    def mark(part: str) -> AbstractContextManager[None]:
        counts[f"perfmodel::{part}"] += 1
        return named_range(f"perfmodel::{part}")

    return mark


def _wait(workload: Workload) -> None:
    if workload.device == "cuda":
        torch.cuda.synchronize()


def _steps(prepared: Prepared, workload: Workload) -> None:
    """The steps that are recorded; each begins on an idle device, so that launch delays are those of one step."""
    for step in range(1, N_STEPS + 1):
        with named_range(range_name(workload)):
            prepared.call(step)
        _wait(workload)


def _warm_up(prepared: Prepared, workload: Workload) -> None:
    for n in range(N_WARM_UP if workload.device == "cuda" else 1):
        prepared.call(n)
    _wait(workload)


def trace_of(run: Callable[[], None], is_cuda: bool, table_of: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The trace of what runs, scrubbed, with the side table `perfmodel` of what a range's name cannot hold.

    The table is asked for once all has run, and says on CUDA how much device work there is. Raises InputError when the
    profiler writes no JSON.
    """
    with without_profiler_chatter(), _session(is_cuda) as session:
        run()
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "trace.json"
        with without_profiler_chatter():
            session.export_chrome_trace(str(raw))
        try:
            trace = json.loads(raw.read_text(encoding="utf-8", errors="replace"))
        except ValueError as error:
            raise InputError(f"the profiler wrote a trace that is no JSON ({error})") from None
        table = {**table_of(), **(work_of(trace) if is_cuda else {})}
        return scrubbed({**trace, "perfmodel": json.loads(json.dumps(table, default=str))}, scratch)


def _recorded(prepared: Prepared, workload: Workload, parts: Counter[str]) -> dict[str, Any]:
    """The trace of the steps of a workload."""
    _warm_up(prepared, workload)
    parts.clear()

    def table() -> dict[str, Any]:
        ranges = {range_name(workload): {name: n // N_STEPS for name, n in sorted(parts.items())}}
        facts = {"facts": prepared.facts} if prepared.facts else {}
        return {**workload.to_line(), "n_steps": N_STEPS, "n_inner": prepared.n_inner, "ranges": ranges, **facts}

    return trace_of(lambda: _steps(prepared, workload), workload.device == "cuda", table)


def write_profile(folder: Path, prepare_marked: PrepareMarked, workload: Workload) -> Path:
    """Profile a few steps of a workload into a folder; returns the file, which is there only when it is whole.

    `prepare_marked` makes the workload ready, with the ranges it is given around its parts. Raises InputError when the
    trace lacks ranges, kernels or launches, saying what may be the cause.
    """
    is_cuda, is_graph = workload.device == "cuda", workload.launch == "graph"
    hint = in_the_way(os.environ) if is_cuda else None
    if hint:
        print(f"note: {hint}", file=sys.stderr)
    if is_graph:
        _wake_profiler()
    parts: Counter[str] = Counter()
    prepared = _as_prepared(prepare_marked(no_mark if is_graph else counting(parts)))
    try:
        trace = _recorded(prepared, workload, parts)
    finally:
        prepared.close()
    expected = {range_name(workload): N_STEPS, **parts}
    refuse_gaps(trace, expected, on_cuda=is_cuda, from_graph=is_graph, hint=hint)
    path = folder / file_name(workload)
    write_packed(path, trace)
    return path


def nsys_stage(
    points: Sequence[Workload],
    prepare_of: Callable[[Workload], PrepareMarked],
    begin: Callable[[Workload], None],
    leave_out: Callable[[Workload, Exception], None],
) -> int:
    """What runs under nsys: prepare and warm up all points, then record their steps between cudaProfilerStart and Stop.

    `begin` is told of each point before it is prepared and before it is recorded, `leave_out` of each that fails, which
    stops no other unless `leave_out` raises. Returns how many points were recorded. Raises InputError without CUDA,
    when torch's profiler is on (it would take the device's tracing from nsys), and when no point can be prepared.
    """
    if not torch.cuda.is_available():
        raise InputError(f"nsys: torch {torch.__version__} finds no CUDA device here, so there is nothing to record")
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        raise InputError("nsys: torch's profiler is on in this process; the device's tracing has one user")
    held: list[Prepared] = []
    ready: list[tuple[Workload, Prepared]] = []
    n_recorded = 0
    try:
        for workload in points:
            begin(workload)
            try:
                mark = no_mark if workload.launch == "graph" else counting(Counter())
                prepared = _as_prepared(prepare_of(workload)(mark))
                held.append(prepared)
                _warm_up(prepared, workload)
                ready.append((workload, prepared))
            except Exception as error:
                leave_out(workload, error)
        if not ready:
            raise InputError("nsys: no point could be prepared, so there is nothing to record")
        torch.cuda.profiler.start()
        try:
            for workload, prepared in ready:
                begin(workload)
                try:
                    _steps(prepared, workload)
                    n_recorded += 1
                except Exception as error:
                    leave_out(workload, error)
        finally:
            torch.cuda.profiler.stop()
    finally:
        for prepared in held:
            with suppress(Exception):
                prepared.close()
    return n_recorded

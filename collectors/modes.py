"""The ways to reach experts that are not in device memory, as steps: in place, after a copy, during one, on the host.

The steps of a call are built once for every rotation position (`access.py`) and share a slate. Where a way needs it,
experts are in slot order, residents first, so that the rows of either memory are one range.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from .lanes import COMPUTE, COPY_IN, COPY_OUT, HOST, Run, Step
from .layer import Mark, Matrix, Scaled, activate, apply_experts, dispatch, no_mark, route
from .memory import active_offloaded, expert_elements, hosted
from .workloads import Workload

CHUNK_BYTES = 1 << 24  # a copy of this size reaches the link's rate
FP8_WEIGHT_SCALE = 0.02 / 16  # fp8 weights are drawn sixteen times wide, where e4m3 has its full precision


@dataclass
class Slate:
    """What the steps of one call hand to each other; each call overwrites it."""

    rows: Matrix | None = None  # sorted by slot
    outs: dict[str, Tensor] = field(default_factory=dict)  # results of parts, in the order of their rows
    order: Tensor | None = None
    token: Tensor | None = None
    ends: Tensor | None = None
    weights: Tensor | None = None
    result: Tensor | None = None
    parts: tuple[str, ...] = ()  # names of `outs` in the order of their rows

    def forget(self) -> None:
        """Let go of results."""
        self.result = None
        self.outs.clear()


@dataclass(frozen=True)
class Part:
    """Neighbouring rows and the experts they meet: where the rows end for each expert, and its weights."""

    first: int
    last: int
    offs: Tensor
    weights: tuple[Matrix, ...]


@dataclass(frozen=True)
class Problem:
    """One workload on one device, experts in slot order: inputs that stay, and where rows end."""

    workload: Workload
    device: torch.device
    slots: tuple[int, ...]
    ends: tuple[int, ...]  # of each slot's rows
    is_gated: bool
    router: Tensor | None
    x: Tensor | None  # of a layer
    chosen: Tensor | None  # slots each token selects
    rows: Matrix | None  # of a grouped GEMM
    mark: Mark
    made: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @property
    def is_layer(self) -> bool:
        """Whether routing and combining belong to the call."""
        return self.x is not None

    def rows_of(self, slot: int, n_slots: int = 1) -> tuple[int, int]:
        """First and last row of neighbouring slots."""
        return (self.ends[slot - 1] if slot else 0), self.ends[slot + n_slots - 1]

    def offs(self, slots: Sequence[int], first: int) -> Tensor:
        """Where the rows of slots end, counted from a first row: what grouped GEMM wants, on the device."""
        ends = tuple(self.ends[slot] - first for slot in slots)
        if ends not in self.made:  # the same for all positions
            self.made[ends] = torch.tensor(ends, dtype=torch.int32, device=self.device)
        return self.made[ends]


@cache
def _scales(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.full(shape, FP8_WEIGHT_SCALE, device=device)


def scaled(matrix: Tensor) -> Matrix:
    """Weights with their scales where they are fp8, as they are otherwise."""
    if matrix.dtype != torch.float8_e4m3fn:
        return matrix
    return Scaled(matrix, _scales(matrix.shape[:-1], matrix.device))


def _compute(slate: Slate, problem: Problem, name: str, part: Part) -> None:
    slate.outs.pop(name, None)  # so that its memory serves the next result
    assert slate.rows is not None
    rows = slate.rows[part.first : part.last]
    slate.outs[name] = apply_experts(rows, part.weights, part.offs, problem.is_gated, problem.mark)


def _route(slate: Slate, problem: Problem) -> None:
    assert problem.router is not None and problem.x is not None
    slate.rows = slate.result = None  # so that their memory serves the next call
    slate.outs.clear()
    slate.weights = route(problem.router, problem.x, problem.workload.top_k)


def _dispatch(slate: Slate, problem: Problem) -> None:
    assert problem.x is not None and problem.chosen is not None
    slate.rows, slate.ends, slate.order, slate.token = dispatch(problem.x, problem.chosen, len(problem.ends))


def _read_counts(slate: Slate, problem: Problem) -> None:
    """Bring the counts to the host, as a layer must that decides there what to copy; they are those of the plan."""
    assert slate.ends is not None
    if tuple(slate.ends.tolist()) != problem.ends:
        raise RuntimeError("the counts read back from the device are not those of the workload")


def _combine(slate: Slate, problem: Problem, parts: Sequence[tuple[str, int, int]]) -> None:
    assert problem.x is not None and slate.weights is not None and slate.order is not None and slate.token is not None
    weights = slate.weights.reshape(-1)[slate.order].unsqueeze(1)
    result = torch.zeros_like(problem.x)
    for name, first, last in parts:
        out = slate.outs[name].mul_(weights[first:last])
        result.index_add_(0, slate.token[first:last], out)
    slate.result = result


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source, non_blocking=True)


def host_experts(
    rows: Tensor, weights: Sequence[Tensor], ends: Sequence[tuple[int, int]], out: Tensor, is_gated: bool
) -> None:
    """Experts on the CPU, one after the other, into `out` [R, N]; `ends` are (expert, where its rows end).

    One matrix product per expert is what grouped GEMM does on a CPU too; this one writes straight into pinned memory.
    """
    first = 0
    for expert, last in ends:
        hidden = rows[first:last]
        for matrix in weights[:-1]:
            hidden = activate(torch.mm(hidden, matrix[expert].T), is_gated)
        torch.mm(hidden, weights[-1][expert].T, out=out[first:last])
        first = last


def _marked(mark: Mark, name: str, run: Run) -> Run:
    def call() -> None:
        with mark(name):
            run()

    return call


class Builder:
    """Collects the steps of one position; `front` is what a step waits for that needs host counts, or rows."""

    def __init__(self, slate: Slate, problem: Problem) -> None:
        self.slate, self.problem = slate, problem
        self.steps: list[Step] = []
        self.parts: list[tuple[str, int, int]] = []
        self.rows_ready: tuple[str, ...] = ()
        self.counts_known: tuple[str, ...] = ()
        if problem.is_layer:
            self.add("router", COMPUTE, (), partial(_route, slate, problem))
            self.add("dispatch", COMPUTE, (), partial(_dispatch, slate, problem))
            self.add("counts", HOST, ("dispatch",), partial(_read_counts, slate, problem))
            self.rows_ready, self.counts_known = ("dispatch",), ("counts",)

    def add(self, name: str, lane: str, after: tuple[str, ...], run: Run) -> None:
        """One more step, in a range of its name without the number."""
        if self.problem.mark is not no_mark:
            run = _marked(self.problem.mark, name.partition(" ")[0], run)
        self.steps.append(Step(name, lane, after, run))

    def compute(self, name: str, part: Part, after: tuple[str, ...] = ()) -> None:
        """Experts over some rows; no step where there are none."""
        if part.last > part.first:
            ready = tuple(dict.fromkeys((*self.counts_known, *after)))
            self.add(name, COMPUTE, ready, partial(_compute, self.slate, self.problem, name, part))
            self.parts.append((name, part.first, part.last))

    def done(self, after: tuple[str, ...] = ()) -> tuple[Step, ...]:
        """The steps, of a layer with the weighted sum at the end."""
        self.slate.parts = tuple(name for name, _, _ in self.parts)
        if self.problem.is_layer:
            self.add("combine", COMPUTE, after, partial(_combine, self.slate, self.problem, tuple(self.parts)))
        return tuple(self.steps)


def _resident_part(problem: Problem, device: tuple[Tensor, ...]) -> Part:
    n = len(device[0])
    first, last = problem.rows_of(0, n) if n else (0, 0)
    return Part(first, last, problem.offs(range(n), 0), tuple(scaled(m) for m in device))


def split_steps(
    slate: Slate, problem: Problem, device: tuple[Tensor, ...], far: tuple[Tensor, ...]
) -> tuple[Step, ...]:
    """Zero-copy by two launches: residents over device memory, the offloaded over host memory seen in place."""
    build = Builder(slate, problem)
    n = len(device[0])
    build.compute("resident", _resident_part(problem, device))
    first, last = problem.rows_of(n, len(far[0]))
    offs = problem.offs(range(n, n + len(far[0])), first)
    build.compute("offloaded", Part(first, last, offs, tuple(scaled(m) for m in far)))
    return build.done()


def copy_steps(
    slate: Slate, problem: Problem, device: tuple[Tensor, ...], host: tuple[Tensor, ...]
) -> tuple[Step, ...]:
    """The active offloaded experts are copied to their places on the device, then one launch serves all."""
    build = Builder(slate, problem)
    away = hosted(problem.workload)
    pairs = []
    for target, source in zip(device, host, strict=True):
        for first, last in _runs(away):
            place = away.index(first)
            pairs.append((target[first : last + 1], source[place : place + last + 1 - first]))
    if pairs:
        build.add("copy", COPY_IN, build.counts_known, partial(_copy, pairs))
    n = len(problem.ends)
    part = Part(0, problem.ends[-1], problem.offs(range(n), 0), tuple(scaled(m) for m in device))
    build.compute("experts", part, ("copy",) if pairs else ())
    return build.done()


def _runs(experts: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbours in ascending experts."""
    found: list[tuple[int, int]] = []
    for expert in experts:
        if found and found[-1][1] == expert - 1:
            found[-1] = found[-1][0], expert
        else:
            found.append((expert, expert))
    return found


def chunk_experts(workload: Workload, element_bytes: int) -> int:
    """Experts of one chunk of the overlapped copy: enough bytes for the link, yet at least two chunks if possible."""
    n_active = len(active_offloaded(workload))
    enough = -(-CHUNK_BYTES // (expert_elements(workload) * element_bytes))
    return max(1, min(enough, -(-n_active // 2)))


def overlap_steps(
    slate: Slate, problem: Problem, device: tuple[Tensor, ...], host: tuple[Tensor, ...],
    buffers: Sequence[tuple[Tensor, ...]],
) -> tuple[Step, ...]:  # fmt: skip
    """Residents compute while the active offloaded experts arrive in chunks, in two buffers in turn; chunks follow."""
    build = Builder(slate, problem)
    away, size = hosted(problem.workload), len(buffers[0][0])
    chunks = [range(first, min(first + size, len(away))) for first in range(0, len(away), size)]  # places in the host's

    def bring(number: int) -> None:
        chunk = chunks[number]
        pairs = [
            (target[: len(chunk)], source[chunk.start : chunk.stop])
            for source, target in zip(host, buffers[number % 2], strict=True)
        ]
        # A buffer is overwritten only after the chunk that was in it has been computed.
        after = (f"chunk {number - 2}",) if number >= 2 else ()
        build.add(f"copy {number}", COPY_IN, (*build.counts_known, *after), partial(_copy, pairs))

    for number in range(min(2, len(chunks))):
        bring(number)
    build.compute("resident", _resident_part(problem, device))
    for number, chunk in enumerate(chunks):
        slots = [problem.slots.index(away[place]) for place in chunk]
        first, last = problem.rows_of(slots[0])[0], problem.ends[slots[-1]]
        weights = tuple(scaled(m[: len(chunk)]) for m in buffers[number % 2])
        build.compute(f"chunk {number}", Part(first, last, problem.offs(slots, first), weights), (f"copy {number}",))
        if number + 2 < len(chunks):
            bring(number + 2)
    return build.done()


def _send(slate: Slate, problem: Problem, first: int, target: Tensor) -> None:
    assert isinstance(slate.rows, Tensor)
    target.copy_(slate.rows[first : problem.ends[-1]], non_blocking=True)


def _receive(slate: Slate, target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)
    slate.outs["host"] = target


def cpu_steps(
    slate: Slate, problem: Problem, device: tuple[Tensor, ...], host: tuple[Tensor, ...],
    pinned: tuple[Tensor, Tensor], target: Tensor,
) -> tuple[Step, ...]:  # fmt: skip
    """Rows of offloaded experts go to the host, which computes them while the device computes the others."""
    build = Builder(slate, problem)
    first, last = problem.ends[len(device[0]) - 1] if len(device[0]) else 0, problem.ends[-1]
    if last == first:
        build.compute("resident", _resident_part(problem, device))
        return build.done()
    ready = (*build.counts_known, *build.rows_ready)
    build.add("send", COPY_OUT, ready, partial(_send, slate, problem, first, pinned[0]))
    build.compute("resident", _resident_part(problem, device))
    away = hosted(problem.workload)
    ends = [(place, problem.ends[problem.slots.index(expert)] - first) for place, expert in enumerate(away)]
    build.add("host", HOST, ("send",), partial(host_experts, pinned[0], host, ends, pinned[1], problem.is_gated))
    build.add("receive", COPY_IN, ("host",), partial(_receive, slate, target, pinned[1]))
    build.parts.append(("host", first, last))
    return build.done(("receive",))

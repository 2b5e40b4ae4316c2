"""Offloaded workloads made ready to be called: inputs, weights in two memories, a call for each rotation position."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perfmodel.errors import InputError
from perfmodel.routing import Shares

from .driver import LOCATION_HOST_NUMA, Range
from .lanes import COPY_IN, COPY_OUT, Run, Step, in_order, on_cuda
from .layer import Layer, Mark, Matrix, grouped_mm, moe_layer, no_mark, quantised
from .mapped import map_experts, n_mapped_copies, virtual_memory
from .memory import (
    Pool,
    active_offloaded,
    expert_elements,
    fill,
    hosted,
    matrices,
    place,
    residents,
    seen_by_device,
    staging_elements,
    views,
)
from .modes import (
    FP8_WEIGHT_SCALE,
    Problem,
    Slate,
    chunk_experts,
    copy_steps,
    cpu_steps,
    overlap_steps,
    scaled,
    split_steps,
)
from .workloads import Workload, choices, workload_seed

IDLE_DEVICE_BYTES = 6 << 30
HOLD_UP_CYCLES = 2_000_000  # about a millisecond


@dataclass(frozen=True)
class Arranged:
    """A workload ready to be called: a call for each rotation position, its result, and where its weights lie.

    `steps` are those of each position, empty where a call is one launch. `experts(position)` gives for each matrix
    `[N, K]` of every slot, `written(position)` what a call writes before it reads it.
    """

    problem: Problem
    calls: tuple[Callable[[], object], ...]
    steps: tuple[tuple[Step, ...], ...]
    slate: Slate
    experts: Callable[[int], list[list[Matrix]]]
    written: Callable[[int], list[Tensor]]
    facts: dict[str, object]
    close: Callable[[], None]

    def result(self) -> Tensor:
        """What the last call computed: `[T, H]` of a layer, `[R, N]` by slot of a grouped GEMM."""
        if self.slate.result is not None:
            return self.slate.result
        return torch.cat([self.slate.outs[name] for name in self.slate.parts])


def late(arranged: Arranged, position: int, lane: str) -> Run:
    """The call of a position on CUDA with the work of one lane held up: what should wait for it and does not, shows."""

    def held_up(step: Step) -> Step:
        def run() -> None:
            torch.cuda._sleep(HOLD_UP_CYCLES)
            step.run()

        return replace(step, run=run) if step.lane == lane else step

    return on_cuda([held_up(step) for step in arranged.steps[position]], streams())


def activation_dtype(dtype: str) -> torch.dtype:
    """What activations are kept in: fp8 experts compute on bf16."""
    return torch.float32 if dtype == "fp32" else torch.bfloat16


def rows_of_gemm(workload: Workload, device: torch.device) -> Matrix:
    """Random rows of an isolated grouped GEMM `[tokens x top-k, K]`; in fp32 they may not fit.

    fp8 is quantised by what comes before, which is not timed.
    """
    n_rows, width = workload.n_tokens * workload.top_k, matrices(workload)[0][1]
    drawn = torch.randn(n_rows, width, device=device, dtype=activation_dtype(workload.dtype))
    return quantised(drawn) if workload.dtype == "fp8" else drawn


def router_of(pool: Pool, workload: Workload) -> Tensor:
    """The router's weights `[E, H]`: copied from the beginning of the pool."""
    n, hidden = workload.n_experts, workload.hidden
    router = pool.flat[: n * hidden].view(n, hidden)
    if router.dtype == torch.float8_e4m3fn:
        return router.float().mul_(FP8_WEIGHT_SCALE).to(torch.bfloat16)
    return router.clone()


def problem_of(pool: Pool, workload: Workload, shares: Shares | None, run: int, mark: Mark = no_mark) -> Problem:
    """Inputs of a workload, random but for the routing; residents come first where the mode computes them apart."""
    device, dtype = pool.flat.device, activation_dtype(workload.dtype)
    away = tuple(sorted(workload.offloaded or ()))
    is_apart = workload.access in ("copy-overlap", "cpu") or workload.residency == "split"
    slots = residents(workload) + away if is_apart else tuple(range(workload.n_experts))
    ends = tuple(np.cumsum([workload.tokens_per_expert[e] for e in slots]).tolist())
    torch.manual_seed(workload_seed(workload.moe_shape, run, workload.id, 0))
    is_gated = workload.n_gemms == 3
    if workload.op != "moe_layer":
        rows = rows_of_gemm(workload, device)
        return Problem(workload, device, slots, ends, is_gated, None, None, None, rows, mark)
    x = torch.randn(workload.n_tokens, workload.hidden, device=device, dtype=dtype)
    slot_of = np.empty(workload.n_experts, dtype=np.int64)
    slot_of[list(slots)] = np.arange(workload.n_experts)
    chosen = torch.from_numpy(slot_of[choices(workload, shares)]).to(device)
    return Problem(workload, device, slots, ends, is_gated, router_of(pool, workload), x, chosen, None, mark)


@cache
def streams() -> dict[str, torch.cuda.Stream]:
    """The streams of the side lanes, the same for all points of a process."""
    return {lane: torch.cuda.Stream() for lane in (COPY_IN, COPY_OUT)}


def _executor(problem: Problem) -> Callable[[Sequence[Step]], Run]:
    if problem.device.type == "cuda":
        return lambda steps: on_cuda(steps, streams())
    return in_order


def _whole(problem: Problem, slate: Slate, weights: tuple[Matrix, ...]) -> Callable[[], object]:
    """One launch over all experts, wherever their pages are: the call of resident experts."""
    if problem.is_layer:
        assert problem.router is not None and problem.x is not None and problem.chosen is not None
        layer = Layer(problem.router, weights[0], weights[1], problem.workload.top_k, problem.is_gated)
        x, chosen = problem.x, problem.chosen

        def call_layer() -> Tensor:
            slate.result = None
            slate.result = moe_layer(layer, x, chosen, problem.mark)
            return slate.result

        return call_layer
    rows, offs = problem.rows, problem.offs(range(len(problem.ends)), 0)
    assert rows is not None
    slate.parts = ("experts",)

    def call_gemm() -> Tensor:
        slate.outs.clear()  # so that its memory serves the next result
        slate.outs["experts"] = grouped_mm(rows, weights[0], offs)
        return slate.outs["experts"]

    return call_gemm


def _nothing() -> None:
    """There is nothing to give back."""


def _arrange_whole(pool: Pool, problem: Problem) -> Arranged:
    """Zero-copy in one launch: mapped, on coherent machines system memory, and without CUDA one ordinary tensor."""
    workload = problem.workload
    slate = Slate(rows=problem.rows)
    close: Callable[[], None] = _nothing
    facts: dict[str, object] = {}
    if workload.residency == "system":
        from .system_memory import system_experts

        found, close, facts = system_experts(pool, workload)
    elif pool.flat.is_cuda:
        found, close, facts = _mapped(pool, workload)
    else:
        resident = replace(workload, offloaded=None)
        found = [placed.device for placed in place(pool, resident, workload.n_experts)[0]]
        facts = {"emulated": "one ordinary tensor stands for a range over two memories"}
    try:
        positions = [tuple(scaled(m) for m in weights) for weights in found]
        calls = tuple(_whole(problem, slate, weights) for weights in positions)
    except BaseException:
        close()
        raise

    def experts(position: int) -> list[list[Matrix]]:
        return [[matrix[slot] for slot in range(len(problem.slots))] for matrix in positions[position]]

    facts = {**facts, "n_device_copies": len(found), "n_expert_launches": 1}
    return Arranged(problem, calls, (), slate, experts, lambda _position: [], facts, close)


def _mapped(pool: Pool, workload: Workload) -> tuple[list[tuple[Tensor, ...]], Callable[[], None], dict[str, object]]:
    memory = virtual_memory(pool)
    n_copies = n_mapped_copies(pool, workload)
    if n_copies < 1:
        raise InputError(f"{workload.shape} does not fit into the device and host memory that can be mapped")
    ranges: list[Range] = []
    found: list[tuple[Tensor, ...]] = []

    def close() -> None:
        torch.cuda.synchronize()
        while ranges:
            memory.unmap(ranges.pop())
        # Granules of the device are quickly made again and others may need the memory; those of the host are not.
        memory.trim(IDLE_DEVICE_BYTES, memory.made_bytes(True))

    try:
        for _ in range(n_copies):
            copy = []
            for n, k in matrices(workload):
                tensor, mapped = map_experts(pool, workload, n, k)
                ranges.append(mapped)
                copy.append(tensor)
            found.append(tuple(copy))
    except BaseException:
        close()
        raise
    element_bytes = pool.flat.element_size()
    strides = [tensor.stride(0) * element_bytes for tensor in found[0]]
    node = memory.host.id if memory.host.type == LOCATION_HOST_NUMA else None
    return found, close, {"expert_stride_bytes": strides, "granule_bytes": memory.granule_bytes, "host_node": node}


def _weights_again(staged: Tensor, weights: Tensor, device: torch.device) -> None:
    """Weights where activations were staged in the host buffer: other workloads have experts there."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    fill(staged, weights.reshape(-1))


def _arrange_steps(pool: Pool, problem: Problem) -> Arranged:
    workload = problem.workload
    n_on_device = workload.n_experts if workload.access == "copy" else len(residents(workload))
    placed, rest, (n_device, n_host) = place(pool, workload, n_on_device)
    slate = Slate(rows=problem.rows)
    close: Callable[[], None] = _nothing
    scratch: list[Tensor] = []
    facts: dict[str, object] = {"n_device_copies": n_device, "n_host_copies": n_host}
    if workload.access == "copy":
        steps = [copy_steps(slate, problem, p.device, p.host) for p in placed]
    elif workload.access == "copy-overlap":
        size = chunk_experts(workload, pool.flat.element_size())
        one = torch.empty(2, size * expert_elements(workload), dtype=pool.flat.dtype, device=problem.device)
        buffers = [views(half, 0, size, matrices(workload)) for half in one]
        steps = [overlap_steps(slate, problem, p.device, p.host, buffers) for p in placed]
        scratch = [expert for buffer in buffers for matrix in buffer for expert in matrix]
        facts["chunk_experts"] = size
    elif workload.access == "cpu":
        (_, k), (n, _) = matrices(workload)[0], matrices(workload)[-1]
        n_rows = staging_elements(workload) // (k + n)
        pinned = rest[: n_rows * k].view(n_rows, k), rest[n_rows * k : n_rows * (k + n)].view(n_rows, n)
        target = torch.empty_like(pinned[1], device=problem.device)
        if n_rows:
            scratch = [*pinned, target]
            close = partial(_weights_again, rest[: n_rows * (k + n)], placed[0].host[0], problem.device)
        steps = [cpu_steps(slate, problem, p.device, p.host, pinned, target) for p in placed]
        facts["host_kernel"] = "one mm per expert"
        facts["host_threads"] = torch.get_num_threads()
    else:
        steps = [split_steps(slate, problem, p.device, tuple(seen_by_device(pool, m) for m in p.host)) for p in placed]
    bind = _executor(problem)
    calls = tuple(bind(found) for found in steps)

    def experts(position: int) -> list[list[Matrix]]:
        """Also after a copy the offloaded experts are those of the host; where none has tokens there are no weights."""
        where = {e: (True, i) for i, e in enumerate(hosted(workload))}
        if n_on_device == workload.n_experts:
            where = {e: (False, e) for e in problem.slots} | where
        else:
            where |= {e: (False, i) for i, e in enumerate(residents(workload))}
        found = []
        for device, host in zip(placed[position].device, placed[position].host, strict=True):
            nothing = device.new_empty(device.shape[1:])
            lie = [(host if where[e][0] else device)[where[e][1]] if e in where else nothing for e in problem.slots]
            found.append([scaled(matrix) for matrix in lie])
        return found

    def written(position: int) -> list[Tensor]:
        if workload.access != "copy":
            return scratch
        return [matrix[expert] for matrix in placed[position].device for expert in hosted(workload)]

    launching = ("resident", "offloaded", "experts", "chunk")
    n_launches = sum(step.name.partition(" ")[0] in launching for step in steps[0])
    facts |= {"n_expert_launches": n_launches, "counts": "read back in each call" if problem.is_layer else "known"}
    return Arranged(problem, calls, tuple(steps), slate, experts, written, facts, close)


def arrange(pool: Pool, workload: Workload, shares: Shares | None, run: int, mark: Mark = no_mark) -> Arranged:
    """An offloaded workload with its steps, weights and facts; call `close` when done.

    Raises InputError where the mode cannot do what the workload asks, CudaDriverError where pages cannot be mapped.
    """
    if workload.access == "cpu" and workload.dtype == "fp8":
        raise InputError("experts on the CPU compute in fp32 or bf16, not in fp8")
    problem = problem_of(pool, workload, shares, run, mark)
    is_whole = workload.access == "zero-copy" and workload.residency != "split"
    arranged = _arrange_whole(pool, problem) if is_whole else _arrange_steps(pool, problem)
    active = active_offloaded(workload)
    element_bytes = pool.flat.element_size()
    on_device = sum(workload.tokens_per_expert[e] > 0 for e in residents(workload))
    per_expert = expert_elements(workload) * element_bytes
    facts: dict[str, Any] = {
        "n_positions": len(arranged.calls),
        "n_active_offloaded": len(active),
        "offloaded_active_bytes": len(active) * per_expert,
        "resident_active_bytes": on_device * per_expert,
        "offloaded_rows": sum(workload.tokens_per_expert[e] for e in active),
        **arranged.facts,
    }
    # How much of the device's weights passes before any is read again.
    facts["rotated_bytes"] = int(facts["n_device_copies"]) * on_device * per_expert
    return replace(arranged, facts=facts)

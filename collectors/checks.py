"""Does an offloaded workload compute what it should: beside a slow twin and beside the same weights on the device.

What a call must write is spoilt before, so that weights or results that happen to lie there already cannot pass for
its own; on CUDA calls are also made with each lane held up, so that what does not wait for it reads what is spoilt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perfmodel.routing import Shares

from .access import Arranged, arrange, late
from .lanes import HOST
from .layer import Layer, Matrix, Scaled, apply_experts, dispatch, route, slow_grouped_mm, slow_moe_layer
from .memory import Pool
from .workloads import Workload

# Largest difference over largest magnitude: from the slow twin in fp32, and from the same weights all on the device,
# where only the order of sums differs.
TOLERANCE = {"fp32": 1e-4, "bf16": 4e-2, "fp8": 1e-1}
SAME_TOLERANCE = {"fp32": 1e-5, "bf16": 1.6e-2, "fp8": 1.6e-2}

SLOW, SAME = "the slow reference", "the same weights all on the device"


@dataclass(frozen=True)
class Difference:
    """What was compared with what, the largest difference over the largest value, and how large it may be."""

    name: str
    reference: str
    difference: float
    limit: float


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value; not-a-number when either has one."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def _gathered(experts: list[Matrix], device: torch.device) -> Matrix:
    """All experts of one matrix in one tensor on the device, read by a kernel where it can: copies may refuse."""
    plain = [e.values if isinstance(e, Scaled) else e for e in experts]
    bits = torch.empty(len(plain), *plain[0].view(torch.uint8).shape, dtype=torch.uint8, device=device)
    for place, matrix in zip(bits, plain, strict=True):
        torch.bitwise_or(matrix.view(torch.uint8).to(device), 0, out=place)
    values = bits.view(plain[0].dtype)
    scales = [e.scale.to(device) for e in experts if isinstance(e, Scaled)]
    return Scaled(values, torch.stack(scales)) if scales else values


def expected_of(arranged: Arranged, experts: list[list[Matrix]]) -> tuple[Tensor, Tensor | None]:
    """What a call must give: by the slow twin, and by the ordinary kernel over all experts with rows, on the device.

    The second is null when the device has no memory for them.
    """
    problem = arranged.problem
    offs = problem.offs(range(len(problem.ends)), 0)
    if problem.is_layer:
        assert problem.router is not None and problem.x is not None and problem.chosen is not None
        far = Layer(problem.router, experts[0], experts[1], problem.workload.top_k, problem.is_gated)
        slow = slow_moe_layer(far, problem.x, problem.chosen)
    else:
        assert problem.rows is not None
        slow = slow_grouped_mm(problem.rows, experts[0], offs)
    firsts = (0, *problem.ends)
    busy = [slot for slot, end in enumerate(problem.ends) if end > firsts[slot]]
    try:
        near = [_gathered([matrix[slot] for slot in busy], problem.device) for matrix in experts]
        offs_of_busy = problem.offs(busy, 0)
        if problem.rows is not None:
            return slow, apply_experts(problem.rows, near, offs_of_busy, problem.is_gated)
        assert problem.router is not None and problem.x is not None and problem.chosen is not None
        weights = route(problem.router, problem.x, problem.workload.top_k).reshape(-1)
        rows, _, order, token = dispatch(problem.x, problem.chosen, len(problem.ends))
        out = apply_experts(rows, near, offs_of_busy, problem.is_gated).mul_(weights[order].unsqueeze(1))
        return slow, torch.zeros_like(problem.x).index_add_(0, token, out)
    except torch.cuda.OutOfMemoryError:
        return slow, None


def _spoil(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Not-a-number into the first and the last row of each, so that what is not written again cannot pass for right.

    Returns the places and what was there.
    """
    kept = []
    for part in (part for tensor in tensors for part in (tensor[:1], tensor[-1:])):
        kept.append((part, part.clone()))
        part.view(torch.uint8).fill_(0xFF)  # in each of the dtypes that is one
    return kept


def _in_a_row(arranged: Arranged, calls: Sequence[tuple[int, Callable[[], object]]]) -> list[Tensor]:
    """Results of calls that follow each other at once, begun with nothing of earlier calls in their buffers."""
    is_cuda = arranged.problem.device.type == "cuda"
    kept = [pair for position, _ in calls for pair in _spoil(arranged.written(position))]
    if is_cuda:
        torch.cuda.synchronize()
    found = []
    try:
        for _, call in calls:
            arranged.slate.forget()
            call()
            found.append(arranged.result().clone())
    finally:
        if is_cuda:
            torch.cuda.synchronize()  # copies from the host may still read what is put back here
        for part, before in reversed(kept):
            part.copy_(before)
    return found


def offloaded_differences(pool: Pool, workload: Workload, shares: Shares | None) -> list[Difference]:
    """How far calls of an offloaded workload are from what they should give, in several orders of their work."""
    arranged = arrange(pool, workload, shares, 0)
    what = f"{workload.op} with {workload.access} {workload.residency or ''}".rstrip()
    parts = []
    # Where the host computes, or parts of a layer are summed in another order, more than the order within sums differs.
    is_same = workload.access != "cpu" and not arranged.problem.is_layer
    same_limit = (SAME_TOLERANCE if is_same else TOLERANCE)[workload.dtype]
    positions = (0, 1 % len(arranged.calls))  # two calls in a row, since the second meets the buffers of the first
    try:
        expected = [expected_of(arranged, arranged.experts(position)) for position in positions]
        rows = {"": [(p, arranged.calls[p]) for p in positions]}
        lanes = {step.lane for step in arranged.steps[0]} if arranged.steps else set()
        for lane in sorted(lanes - {HOST}) if pool.flat.is_cuda and len(lanes) > 1 else ():
            rows[f", {lane} held up,"] = [(p, late(arranged, p, lane)) for p in positions]
        for words, calls in rows.items():
            for found, (slow, same) in zip(_in_a_row(arranged, calls), expected, strict=True):
                parts.append(Difference(what + words, SLOW, difference(found, slow), TOLERANCE[workload.dtype]))
                if same is not None:
                    parts.append(Difference(what + words, SAME, difference(found, same), same_limit))
    finally:
        arranged.close()
        if pool.flat.is_cuda:
            torch.cuda.empty_cache()  # the gathered experts were large
    return parts

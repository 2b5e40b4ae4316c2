"""From a planned workload to a call that can be timed: one pool of random weights, rotated so that caches stay cold.

All workloads view the same flat buffer, allocated and touched once; a view of a shape is a number of copies of its
layer. Each call takes other weights: another copy, or the same experts shifted around the circle, which keeps the
counts as a multiset and therefore the work.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from perfmodel.errors import InputError
from perfmodel.routing import Shares

from .layer import Layer, Mark, grouped_mm, moe_layer, no_mark, slow_grouped_mm, slow_moe_layer
from .plan import Workload, choices, rotation, workload_seed

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHT_SCALE = 0.02  # keeps activations of order one at the widths of real models
FILL_ELEMENTS = 1 << 24  # random numbers drawn once; the rest of the pool repeats them
TOLERANCE = {"fp32": 1e-4, "bf16": 4e-2}  # largest difference over largest magnitude


@dataclass(frozen=True)
class Pool:
    """The buffer of weights, and how many bytes of weights must pass before any is read again."""

    flat: Tensor
    cold_bytes: float


def make_pool(n_bytes: int, cold_bytes: float, dtype: str, device: str, seed: int) -> Pool:
    """A flat buffer of random weights, never zeros, every page touched."""
    torch.manual_seed(seed)
    flat = torch.empty(n_bytes // TORCH_DTYPES[dtype].itemsize, dtype=TORCH_DTYPES[dtype], device=device)
    block = torch.randn(min(FILL_ELEMENTS, flat.numel()), device=device).mul_(WEIGHT_SCALE).to(flat.dtype)
    for part in flat.split(block.numel()):
        part.copy_(block[: part.numel()])
    return Pool(flat, cold_bytes)


def layers(pool: Pool, workload: Workload, n_copies: int) -> list[Layer]:
    """The first copies of a workload's layer in the pool; they share one router."""
    shape = workload.moe_shape
    (k1, n1), (k2, n2) = shape.gemms
    n_up, n_down = shape.n_experts * k1 * n1, shape.n_experts * k2 * n2
    router = pool.flat[: shape.n_experts * shape.hidden].view(shape.n_experts, shape.hidden).clone()
    found = []
    for copy in range(n_copies):
        weights = pool.flat[copy * (n_up + n_down) :]
        gate_up = weights[:n_up].view(shape.n_experts, n1, k1)
        down = weights[n_up : n_up + n_down].view(shape.n_experts, n2, k2)
        found.append(Layer(router, gate_up, down, shape.top_k, shape.n_gemms == 3))
    return found


def prepare(
    pool: Pool, workload: Workload, shares: Shares | None, run: int, mark: Mark = no_mark
) -> Callable[[int], Tensor]:
    """The workload as a function of the call's number; its inputs exist and only its own work is left to do."""
    layer_elements = workload.moe_shape.layer_bytes / pool.flat.element_size()
    n_copies, n_shifts = rotation(workload, pool.cold_bytes, int(pool.flat.numel() // layer_elements))
    copies = layers(pool, workload, n_copies)
    chosen = torch.from_numpy(choices(workload, shares)).to(pool.flat.device)
    # A random start, another one in each run: no expert is always the first.
    generator = torch.Generator().manual_seed(workload_seed(workload.moe_shape, run, workload.id, 0))
    start = int(torch.randint(workload.n_experts, (), generator=generator))
    step = max(1, workload.n_experts // n_shifts)
    rolled = [(chosen + start + shift * step) % workload.n_experts for shift in range(n_shifts)]
    device, dtype = pool.flat.device, pool.flat.dtype
    n_rows = workload.n_tokens * workload.top_k
    if workload.op == "moe_layer":
        x = torch.randn(workload.n_tokens, workload.hidden, device=device).to(dtype)
        return lambda n: moe_layer(copies[n % n_copies], x, rolled[n // n_copies % n_shifts], mark)
    offs = [
        torch.bincount(c.reshape(-1), minlength=workload.n_experts)
        .cumsum(0)
        .to(torch.int32)  # grouped GEMM wants int32
        for c in rolled
    ]
    is_up = (workload.gemm_k, workload.gemm_n) == workload.moe_shape.gemms[0]
    weights = [copy.gate_up if is_up else copy.down for copy in copies]
    assert workload.gemm_k is not None
    rows = torch.randn(n_rows, workload.gemm_k, device=device).to(dtype)
    return lambda n: grouped_mm(rows, weights[n % n_copies], offs[n // n_copies % n_shifts])


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def _differences(pool: Pool, workload: Workload, shares: Shares | None) -> dict[str, float]:
    layer = layers(pool, workload, 1)[0]
    device, dtype = pool.flat.device, pool.flat.dtype
    chosen = torch.from_numpy(choices(workload, shares)).to(device)
    x = torch.randn(workload.n_tokens, workload.hidden, device=device).to(dtype)
    parts = {"the MoE layer": _difference(moe_layer(layer, x, chosen), slow_moe_layer(layer, x, chosen))}
    offs = torch.bincount(chosen.reshape(-1), minlength=workload.n_experts).cumsum(0).to(torch.int32)
    for name, weights in (("gate and up", layer.gate_up), ("down", layer.down)):
        rows = torch.randn(chosen.numel(), weights.shape[2], device=device).to(dtype)
        expected = slow_grouped_mm(rows, weights, offs)
        parts[f"the grouped GEMM of {name}"] = _difference(grouped_mm(rows, weights, offs), expected)
    return parts


def check(pool: Pool, workload: Workload, shares: Shares | None) -> None:
    """Compare the layer and both grouped GEMMs of a workload with slow twins.

    Raises InputError on a difference, and when this torch has no such kernel.
    """
    try:
        parts = _differences(pool, workload, shares)
    except RuntimeError as error:  # a dtype this grouped GEMM does not know on this device
        reason = str(error).splitlines()[0]
        raise InputError(f"{workload.shape} in {workload.dtype} on {workload.device} does not run: {reason}") from None
    for name, difference in parts.items():
        if not difference < TOLERANCE[workload.dtype]:
            raise InputError(
                f"{name} of {workload.shape} differs from the slow reference by {difference:.2g} of its largest value, "
                f"more than {TOLERANCE[workload.dtype]:g}: this torch computes it wrongly and was not timed"
            )

"""From a planned workload to a call that can be timed: one pool of random weights, rotated so that caches stay cold.

All workloads view the same flat buffer, allocated and touched once; a view of a shape is a number of copies of its
layer. Each call takes other weights: another copy, or the same experts shifted around the circle, which keeps the
counts as a multiset and therefore the work. Offloaded experts are where they are, so there only copies rotate.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from perfmodel.errors import InputError, first_line
from perfmodel.routing import Shares

from .access import Arranged, activation_dtype, arrange, router_of, rows_of_gemm
from .checks import SLOW, TOLERANCE, Difference, difference, offloaded_differences
from .graphs import Recorded, record
from .lanes import HOST
from .layer import (
    Layer,
    Mark,
    grouped_mm,
    moe_layer,
    no_mark,
    slow_grouped_mm,
    slow_moe_layer,
    stacked,
)
from .mapped import support, trim
from .memory import MAX_POSITIONS, TORCH_DTYPES, HostSide, Pool, fill
from .modes import scaled
from .workloads import Workload, choices, rotation, workload_seed

WEIGHT_SCALE = 0.02  # keeps activations of order one at the widths of real models
FP8_DRAW_SCALE = 16.0  # the scales of fp8 weights undo it (modes.FP8_WEIGHT_SCALE)
# Random numbers drawn once; the rest of the pool repeats them. Not a power of two, or experts of one would repeat too
# and a check would not see one taken for another; a multiple of 1024, so that copying them stays quick.
FILL_ELEMENTS = (1 << 24) - 3072
Made = TypeVar("Made")


@dataclass(frozen=True)
class Prepared:
    """A workload ready to be timed: `call(n)` is the n-th call and stands for `n_inner` of the workload.

    `facts` are what its observation should say beside the times. `close` gives back what it holds beyond the pool.
    """

    call: Callable[[int], object]
    n_inner: int
    facts: dict[str, object]
    close: Callable[[], None]


def make_pool(
    n_bytes: int, cold_bytes: float, dtype: str, device: str, seed: int, host: HostSide | None = None
) -> Pool:
    """A flat buffer of random weights, never zeros, every page touched.

    The host side of offloaded experts is made when a point first needs it, within the limits that `host` states.
    """
    torch.manual_seed(seed)
    flat = torch.empty(n_bytes // TORCH_DTYPES[dtype].itemsize, dtype=TORCH_DTYPES[dtype], device=device)
    scale = FP8_DRAW_SCALE if dtype == "fp8" else WEIGHT_SCALE
    fill(flat, torch.randn(min(FILL_ELEMENTS, flat.numel()), device=device).mul_(scale).to(flat.dtype))
    return Pool(flat, cold_bytes, host or HostSide())


def layers(pool: Pool, workload: Workload, n_copies: int) -> list[Layer]:
    """The first copies of a workload's layer in the pool; they share one router."""
    shape = workload.moe_shape
    (k1, n1), (k2, n2) = shape.gemms
    n_up, n_down = shape.n_experts * k1 * n1, shape.n_experts * k2 * n2
    router = router_of(pool, workload)
    found = []
    for copy in range(n_copies):
        weights = pool.flat[copy * (n_up + n_down) :]
        gate_up = scaled(weights[:n_up].view(shape.n_experts, n1, k1))
        down = scaled(weights[n_up : n_up + n_down].view(shape.n_experts, n2, k2))
        found.append(Layer(router, gate_up, down, shape.top_k, shape.n_gemms == 3))
    return found


def _resident(
    pool: Pool, workload: Workload, shares: Shares | None, run: int, mark: Mark
) -> tuple[Callable[[int], Tensor], int]:
    """The n-th call of an all-resident workload, and after how many calls weights come again."""
    layer_elements = workload.moe_shape.layer_bytes / pool.flat.element_size()
    n_copies, n_shifts = rotation(workload, pool.cold_bytes, int(pool.flat.numel() // layer_elements))
    copies = layers(pool, workload, n_copies)
    chosen = torch.from_numpy(choices(workload, shares)).to(pool.flat.device)
    # A random start, another one in each run: no expert is always the first.
    generator = torch.Generator().manual_seed(workload_seed(workload.moe_shape, run, workload.id, 0))
    start = int(torch.randint(workload.n_experts, (), generator=generator))
    step = max(1, workload.n_experts // n_shifts)
    rolled = [(chosen + start + shift * step) % workload.n_experts for shift in range(n_shifts)]
    device, dtype = pool.flat.device, activation_dtype(workload.dtype)
    n_positions = n_copies * n_shifts
    if workload.op == "moe_layer":
        x = torch.randn(workload.n_tokens, workload.hidden, device=device, dtype=dtype)
        return lambda n: moe_layer(copies[n % n_copies], x, rolled[n // n_copies % n_shifts], mark), n_positions
    offs = [
        torch.bincount(c.reshape(-1), minlength=workload.n_experts)
        .cumsum(0)
        .to(torch.int32)  # grouped GEMM wants int32
        for c in rolled
    ]
    is_up = (workload.gemm_k, workload.gemm_n) == workload.moe_shape.gemms[0]
    weights = [copy.gate_up if is_up else copy.down for copy in copies]
    rows = rows_of_gemm(workload, device)
    return lambda n: grouped_mm(rows, weights[n % n_copies], offs[n // n_copies % n_shifts]), n_positions


def _nothing() -> None:
    """There is nothing to give back."""


def _replay_difference(recorded: Recorded, arranged: Arranged | None, call: Callable[[], object]) -> float:
    """How far the last call of the last graph is from the same call as it is launched.

    What the graph writes is not-a-number before: memory may still hold the result of a call that was launched.
    """

    def result(returned: object) -> Tensor:
        found = arranged.result() if arranged is not None else returned
        assert isinstance(found, Tensor)
        return found

    outs = [recorded.last] if arranged is None else [arranged.slate.result, *arranged.slate.outs.values()]
    for out in outs:
        if isinstance(out, Tensor):
            out.fill_(torch.nan)
    recorded.replay(recorded.n_graphs - 1)
    found = result(recorded.last).clone()
    return difference(found, result(call()))


def _replayed(
    pool: Pool, workload: Workload, arranged: Arranged | None, eager: Prepared, n_positions: int, is_checked: bool
) -> Prepared:
    """The same calls replayed from CUDA graphs; raises InputError where they cannot be recorded."""
    try:
        if not pool.flat.is_cuda:
            raise InputError("only a CUDA device replays calls from a graph")
        if arranged is not None and any(step.lane == HOST for step in (arranged.steps or ((),))[0]):
            raise InputError("a call in which the host takes part cannot be replayed from a graph")
        calls = [partial(eager.call, n) for n in range(min(n_positions, MAX_POSITIONS))]
        recorded = record(calls, arranged.slate.forget if arranged is not None else _nothing)
    except BaseException:
        eager.close()
        raise

    def close() -> None:
        recorded.close()
        eager.close()

    if is_checked:
        try:
            apart = _replay_difference(recorded, arranged, calls[recorded.n_inner * recorded.n_graphs - 1])
        except BaseException:
            close()
            raise
        if not apart < TOLERANCE[workload.dtype]:
            close()
            raise InputError(f"a replayed graph differs from the same call by {apart:.2g} of its largest value")
    facts = {**eager.facts, "calls_per_graph": recorded.n_inner, "n_graphs": recorded.n_graphs}
    return Prepared(recorded.replay, recorded.n_inner, facts, close)


def prepare(pool: Pool, workload: Workload, shares: Shares | None, run: int, mark: Mark = no_mark) -> Prepared:
    """The workload as a function of the call's number; its inputs exist and only its own work is left to do.

    Raises InputError where the machine or torch cannot do it in the way the workload says, and CudaDriverError (an
    OSError) where the driver refuses to map memory.
    """
    return _with_room(pool, lambda: _prepare(pool, workload, shares, run, mark))


def _with_room(pool: Pool, make: Callable[[], Made]) -> Made:
    """What is made, a second time without what other points left when the device has no memory for it at first."""
    try:
        return make()
    except torch.cuda.OutOfMemoryError:
        pass  # what was begun is held by the error until here
    trim(pool)  # granules and blocks
    return make()


def _prepare(
    pool: Pool, workload: Workload, shares: Shares | None, run: int, mark: Mark, is_checked: bool = False
) -> Prepared:
    arranged = None
    if workload.access != "resident":
        arranged = arrange(pool, workload, shares, run, mark)
        calls = arranged.calls
        n_positions = len(calls)
        eager = Prepared(lambda n: calls[n % n_positions](), 1, arranged.facts, arranged.close)
    else:
        call, n_positions = _resident(pool, workload, shares, run, mark)
        eager = Prepared(call, 1, {"n_positions": n_positions}, _nothing)
    if workload.launch is None:
        return eager
    return _replayed(pool, workload, arranged, eager, n_positions, is_checked)


def _resident_differences(pool: Pool, workload: Workload, shares: Shares | None) -> list[Difference]:
    layer = layers(pool, workload, 1)[0]
    device, dtype = pool.flat.device, activation_dtype(workload.dtype)
    limit = TOLERANCE[workload.dtype]
    chosen = torch.from_numpy(choices(workload, shares)).to(device)
    x = torch.randn(workload.n_tokens, workload.hidden, device=device).to(dtype)
    apart = difference(moe_layer(layer, x, chosen), slow_moe_layer(layer, x, chosen))
    parts = [Difference("the MoE layer", SLOW, apart, limit)]
    offs = torch.bincount(chosen.reshape(-1), minlength=workload.n_experts).cumsum(0).to(torch.int32)
    for name, weights in zip(("gate and up", "down"), stacked(layer), strict=True):
        rows = torch.randn(chosen.numel(), weights.shape[2], device=device).to(dtype)
        expected = slow_grouped_mm(rows, weights, offs)
        apart = difference(grouped_mm(rows, weights, offs), expected)
        parts.append(Difference(f"the grouped GEMM of {name}", SLOW, apart, limit))
    return parts


def _differences(pool: Pool, workload: Workload, shares: Shares | None) -> list[Difference]:
    find = _resident_differences if workload.access == "resident" else offloaded_differences
    parts = find(pool, workload, shares)
    if workload.launch is not None:
        _prepare(pool, workload, shares, 0, no_mark, is_checked=True).close()
    return parts


def check(pool: Pool, workload: Workload, shares: Shares | None) -> None:
    """Compare a workload with slow twins and, when offloaded, with the same weights all on the device.

    Of a resident workload the layer and both grouped GEMMs; of one replayed from graphs also the replay. Raises
    InputError on a difference, naming the mode, and when this torch has no such kernel.
    """
    where = f"{workload.shape} in {workload.dtype} on {workload.device}"
    try:
        parts = _with_room(pool, lambda: _differences(pool, workload, shares))
    except torch.cuda.OutOfMemoryError:
        raise  # this says nothing of the way: it was not checked
    except (RuntimeError, OSError) as error:  # a dtype this grouped GEMM does not know on this device, a driver's no
        reason = first_line(error)
        raise InputError(f"{where} does not run with {workload.access} access: {reason}") from None
    for part in parts:
        if not part.difference < part.limit:
            raise InputError(
                f"{part.name} of {workload.shape} differs from {part.reference} by {part.difference:.2g} of its "
                f"largest value, more than {part.limit:g}: this torch computes it wrongly and was not timed"
            )


WAYS = ("graph", "fp8", "split", "mapped", "system")  # those last that might leave the device in disorder


def capability(device: str, way: str) -> str | None:
    """Why a way of zero-copy, replaying from graphs, or fp8 does not work here, or null: a tiny workload is checked.

    A CPU has none of them: there is no other memory to offload to.
    """
    if device != "cuda":
        return "experts are offloaded from a CUDA device only"
    plain = Workload(
        "grouped_gemm", "trial", 4, 2, 256, 128, 3, 256, 256, "bf16", device, 16, "uniform", 0, (8, 8, 8, 8)
    )
    away = replace(plain, access="zero-copy", offloaded=(1, 3), offload_frac=0.5, order="ascending")
    trials = {way: replace(away, residency=way) for way in ("mapped", "split", "system")}
    trials |= {"graph": replace(plain, launch="graph"), "fp8": replace(plain, dtype="fp8")}
    trial = trials[way]
    try:
        if way == "mapped" and (reason := support(device)):
            return reason
        with torch.inference_mode():
            pool = make_pool(int(4 * trial.moe_shape.layer_bytes), 0.0, trial.dtype, device, 0)
            check(pool, trial, None)
            trim(pool)
    except (InputError, RuntimeError, OSError) as error:
        return first_line(error)
    return None

"""Weights in two memories: where the experts of each rotation position lie, on the device and on the host.

Host memory is one pinned buffer a process, since torch rounds pinned allocations up to powers of two. Each position
reads other copies, so that caches stay cold. One range over both memories is in `mapped.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from perfmodel.errors import InputError

from .alias import check_alias, device_alias
from .driver import VirtualMemory
from .workloads import Workload

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
# Host weights pass this many bytes before they are read again: the last-level caches of servers hold less.
HOST_COLD_BYTES = 1 << 29
MAX_HOST_COPIES, MAX_POSITIONS = 64, 64
# One launch over host memory has idle experts there too: this many copies, and more as long as they are small, since
# the GPU's cache may keep what it reads of host memory.
FEW_COPIES, FEW_COPIES_BYTES = 4, 1 << 31
DEVICE_RESERVE_BYTES = 4 << 30  # for activations, while granules are mapped
FILL_ELEMENTS = (1 << 24) - 10_007
FREE_SHARE = 0.8  # of free host memory that may be pinned


@dataclass
class HostSide:
    """What a process holds beside the pool of device weights; made when the first offloaded point needs it."""

    limit_bytes: int | None = None  # of pinned host memory; null: a share of what is free
    wanted_bytes: int = 0  # what all points of the process need, so that the buffer is made once
    flat: Tensor | None = None
    alias: Tensor | None = None  # the same memory as the GPU sees it
    virtual: VirtualMemory | None = None


@dataclass(frozen=True)
class Pool:
    """The buffer of weights, and how many bytes of weights must pass before any is read again."""

    flat: Tensor
    cold_bytes: float
    host: HostSide = field(default_factory=HostSide)


def matrices(workload: Workload) -> tuple[tuple[int, int], ...]:
    """`(N, K)` of each weight matrix of one expert: one for a grouped GEMM, gate and up and down for a layer."""
    if workload.gemm_k is not None and workload.gemm_n is not None:
        return ((workload.gemm_n, workload.gemm_k),)
    return tuple((n, k) for k, n in workload.moe_shape.gemms)


def expert_elements(workload: Workload) -> int:
    """Weights of one expert that the operation reads."""
    return sum(n * k for n, k in matrices(workload))


def active_offloaded(workload: Workload) -> tuple[int, ...]:
    """The offloaded experts that receive tokens, in ascending order."""
    return tuple(sorted(e for e in workload.offloaded or () if workload.tokens_per_expert[e] > 0))


def residents(workload: Workload) -> tuple[int, ...]:
    """The experts in device memory, in ascending order."""
    away = set(workload.offloaded or ())
    return tuple(e for e in range(workload.n_experts) if e not in away)


def hosted(workload: Workload) -> tuple[int, ...]:
    """The experts of which the host buffer holds weights, ascending: the offloaded that receive tokens.

    One launch over host memory also looks at experts without tokens, so there they have weights too.
    """
    return tuple(sorted(workload.offloaded or ())) if workload.residency == "split" else active_offloaded(workload)


def staging_elements(workload: Workload) -> int:
    """Pinned elements of activations that go to the host and back when the host computes."""
    if workload.access != "cpu":
        return 0
    dims = matrices(workload)
    rows = sum(workload.tokens_per_expert[e] for e in active_offloaded(workload))
    return rows * (dims[0][1] + dims[-1][0])


def host_bytes(workload: Workload, n_copies: int = 1) -> int:
    """Pinned host memory a point needs for so many copies of its offloaded experts."""
    elements = n_copies * len(hosted(workload)) * expert_elements(workload) + staging_elements(workload)
    return elements * TORCH_DTYPES[workload.dtype].itemsize


def n_host_copies(workload: Workload, limit_bytes: float) -> int:
    """Copies of the offloaded experts that keep the host's caches cold, as far as the limit allows; 0: none fits."""
    touched = len(active_offloaded(workload)) * expert_elements(workload) * TORCH_DTYPES[workload.dtype].itemsize
    one = host_bytes(workload, 1) - host_bytes(workload, 0)
    most = MAX_HOST_COPIES
    if workload.residency == "split" and one:
        most = min(most, max(FEW_COPIES, FEW_COPIES_BYTES // one))
    wanted = min(most, math.ceil(HOST_COLD_BYTES / touched)) if touched else 1
    room = int((limit_bytes - host_bytes(workload, 0)) // one) if one else wanted
    return max(0, min(wanted, room))


def uses_buffer(workload: Workload) -> bool:
    """Whether the offloaded experts lie in the pinned buffer: mapped and system memory are placed otherwise."""
    return bool(workload.offloaded) and workload.residency not in ("mapped", "system")


def largest_buffer_bytes(limit_bytes: float) -> int:
    """The largest power of two within a limit, since torch pins powers of two; 0 when there is none."""
    return 0 if limit_bytes < 1 else 1 << int(limit_bytes).bit_length() - 1


def host_pool_bytes(workloads: Sequence[Workload], limit_bytes: float) -> int:
    """Size of the one pinned buffer that serves all offloaded workloads: a power of two, at most the limit.

    A workload of which not one copy fits does not count: it is refused when it is prepared.
    """
    largest = largest_buffer_bytes(limit_bytes)
    needed = 0
    for workload in filter(uses_buffer, workloads):
        if n_copies := n_host_copies(workload, largest):
            needed = max(needed, host_bytes(workload, n_copies))
    return 1 << (needed - 1).bit_length() if needed else 0


def free_host_bytes() -> int:
    """Host memory that may still be taken: what the system has free, or less where a control group limits it."""
    found = [1 << 62]
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        root = Path("/sys/fs/cgroup")
        words = [*_lines(root / limit)[:1], *_lines(root / used)[:1]]
        if len(words) == 2 and all(word.isdecimal() for word in words):
            # Cached files count as used there and give way.
            cached = [int(line.split()[1]) for line in _lines(root / stat) if line.startswith("inactive_file ")]
            found.append(int(words[0]) - int(words[1]) + sum(cached))
    return max(0, min(found))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def fill(flat: Tensor, block: Tensor) -> None:
    """Write a block again and again over a buffer, each time from its beginning."""
    for part in flat.split(block.numel()):
        part.copy_(block[: part.numel()])


def host_buffer(pool: Pool, n_elements: int) -> Tensor:
    """The pinned buffer, made or made larger until it holds so many elements; ordinary memory without CUDA.

    Raises InputError when the limit or the free memory does not allow it.
    """
    side, element_bytes = pool.host, pool.flat.element_size()
    needed = n_elements * element_bytes
    if side.flat is not None and side.flat.numel() >= n_elements:
        return side.flat
    held = 0 if side.flat is None else side.flat.numel() * element_bytes
    free = FREE_SHARE * free_host_bytes() + held
    limit = largest_buffer_bytes(min(free, side.limit_bytes if side.limit_bytes is not None else free))
    size = min(limit, 1 << (max(needed, side.wanted_bytes, 1) - 1).bit_length())
    if size < needed:
        raise InputError(f"{needed} bytes of host memory are needed for offloaded experts and {limit} may be taken")
    side.flat = side.alias = None
    if pool.flat.is_cuda and hasattr(torch._C, "_host_emptyCache"):
        torch._C._host_emptyCache()  # torch keeps freed pinned memory otherwise
    flat = torch.empty(size, dtype=torch.uint8, pin_memory=pool.flat.is_cuda).view(pool.flat.dtype)
    # The buffer is written by the host, so that its pages lie where the host's threads are.
    # A block of odd length: experts of a power of two then differ from each other and from those of the pool. And
    # turned by half, or the beginning would equal the pool's, and experts copied there in vain would look copied.
    bits = pool.flat[: min(FILL_ELEMENTS, pool.flat.numel())].cpu().view(torch.uint8)
    half = bits.numel() // 2 // element_bytes * element_bytes
    fill(flat, torch.cat([bits[half:], bits[:half]]).view(flat.dtype))
    side.flat = flat
    if pool.flat.is_cuda:
        alias = device_alias(flat.view(torch.uint8))
        check_alias(flat.view(torch.uint8), alias)
        side.alias = alias.view(pool.flat.dtype)
    return flat


@dataclass(frozen=True)
class Placed:
    """One rotation position: for each matrix the experts on the device and those on the host, `[expert, N, K]`."""

    device: tuple[Tensor, ...]
    host: tuple[Tensor, ...]


def views(flat: Tensor, first: int, n_experts: int, dims: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """`[n_experts, N, K]` of each matrix, one after the other in a flat buffer."""
    found = []
    for n, k in dims:
        found.append(flat[first : first + n_experts * n * k].view(n_experts, n, k))
        first += n_experts * n * k
    return tuple(found)


def n_positions(workload: Workload, cold_bytes: float) -> int:
    """Positions until what lies on the device may be read again; offloaded experts alone when none there has tokens."""
    counts = workload.tokens_per_expert
    on_device = sum(counts[e] > 0 for e in residents(workload)) or sum(count > 0 for count in counts)
    touched = max(1, on_device) * expert_elements(workload) * TORCH_DTYPES[workload.dtype].itemsize
    return min(MAX_POSITIONS, math.ceil(cold_bytes / touched) + 1)


def place(pool: Pool, workload: Workload, n_on_device: int) -> tuple[list[Placed], Tensor, tuple[int, int]]:
    """The rotation positions over the pool and the host buffer, the buffer's rest for staging, copies in each memory.

    `n_on_device` experts of each copy are on the device, the `hosted` ones on the host. Device and host copies rotate
    on their own, as many as fit. Raises InputError when not one copy fits.
    """
    dims, per_expert = matrices(workload), expert_elements(workload)
    wanted = n_positions(workload, pool.cold_bytes)
    on_device, on_host = n_on_device * per_expert, len(hosted(workload)) * per_expert
    n_device = min(wanted, pool.flat.numel() // on_device) if on_device else 1
    if n_device < 1:
        raise InputError(f"{workload.shape} has more weights than the pool holds")
    element_bytes = pool.flat.element_size()
    limit = pool.host.limit_bytes if pool.host.limit_bytes is not None else FREE_SHARE * free_host_bytes()
    limit = largest_buffer_bytes(limit)
    if pool.host.flat is not None:  # what is there is used: growing it would take time and memory
        held = pool.host.flat.numel() * element_bytes
        limit = held if n_host_copies(workload, held) else limit
    n_host = n_host_copies(workload, limit)
    if n_host < 1:
        raise InputError(f"the offloaded experts of {workload.shape} need more host memory than may be taken")
    buffer = host_buffer(pool, max(1, n_host * on_host + staging_elements(workload)))
    found = [
        Placed(
            views(pool.flat, position % n_device * on_device, n_on_device, dims),
            views(buffer, position % n_host * on_host, len(hosted(workload)), dims),
        )
        for position in range(max(n_device, n_host))
    ]
    return found, buffer[n_host * on_host :], (n_device, n_host)


def seen_by_device(pool: Pool, host: Tensor) -> Tensor:
    """A tensor of the host buffer as kernels of the device see it in place; itself without CUDA."""
    if pool.host.alias is None or pool.host.flat is None:
        return host
    alias = pool.host.alias
    return alias.as_strided(host.shape, host.stride(), host.storage_offset())

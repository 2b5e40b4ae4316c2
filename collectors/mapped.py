"""One tensor over two memories: each expert on its own pages of the device or of the host, seen by one launch."""

import torch
from torch import Tensor

from perfmodel.errors import first_line
from perfmodel.moe import ACTIVATION_BYTES

from .driver import CudaDriverError, Driver, Range, VirtualMemory, load_library, open_virtual_memory
from .memory import DEVICE_RESERVE_BYTES, FREE_SHARE, Pool, free_host_bytes, matrices, n_positions
from .workloads import Workload

SMALL_RESERVE_BYTES = 1 << 30  # beside the result of the largest batches
MAX_COPIES = 16  # mapping takes a driver call for each granule


class _Bytes:
    """Memory the driver knows, under the CUDA array interface."""

    def __init__(self, address: int, n_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (n_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def tensor_at(address: int, n_bytes: int) -> Tensor:
    """A CUDA tensor of bytes over mapped memory, which it does not own.

    Raises RuntimeError or ValueError when torch does not take the address for one of a CUDA device.
    """
    found = torch.as_tensor(_Bytes(address, n_bytes), device="cuda")
    if found.data_ptr() != address:
        raise RuntimeError("torch copied memory that was to be seen in place")
    return found


def virtual_memory(pool: Pool) -> VirtualMemory:
    """The granules of this process; raises CudaDriverError where device and host memory cannot share a range."""
    if pool.host.virtual is None:
        torch.empty(1, device="cuda")  # makes the device's context current on this thread
        pool.host.virtual = open_virtual_memory(Driver(load_library()), torch.cuda.current_device())
    return pool.host.virtual


def _fill_range(mapped: Range, pool: Pool, whole: Tensor) -> None:
    """Random weights into the granules that nothing was written to, by a kernel: a copy may refuse host addresses."""
    step = mapped.granule_bytes
    bits = whole.view(torch.int32)
    source = pool.flat[: pool.flat.numel() // 4 * 4].view(torch.int32)
    n_block = min(source.numel(), step // 4)
    # Other numbers in every granule, also of other ranges since granules are reused: or experts could be mixed up and
    # nobody would see it.
    starts = torch.randint(source.numel() - n_block + 1, (len(mapped.fresh),)).tolist()
    for place, first in zip(sorted(mapped.fresh), starts, strict=True):
        for part in bits[place * step // 4 : (place + 1) * step // 4].split(n_block):
            torch.bitwise_or(source[first : first + part.numel()], 0, out=part)
    torch.cuda.synchronize()


def map_experts(pool: Pool, workload: Workload, n: int, k: int) -> tuple[Tensor, Range]:
    """`[expert, N, K]` in one range, each expert on its own pages of the device or, when offloaded, of the host.

    The stride between experts is rounded up to whole granules. Raises CudaDriverError.
    """
    memory = virtual_memory(pool)
    element_bytes, away = pool.flat.element_size(), set(workload.offloaded or ())
    per_expert = -(-n * k * element_bytes // memory.granule_bytes)
    mapped = memory.map([e in away for e in range(workload.n_experts) for _ in range(per_expert)])
    try:
        whole = tensor_at(mapped.address, mapped.n_bytes)
        _fill_range(mapped, pool, whole)
    except BaseException:
        memory.unmap(mapped, is_filled=False)
        raise
    stride = per_expert * memory.granule_bytes // element_bytes
    first = memory.granule_bytes // element_bytes
    flat = whole.view(pool.flat.dtype)
    return flat.as_strided((workload.n_experts, n, k), (stride, k, 1), first), mapped


def n_mapped_copies(pool: Pool, workload: Workload) -> int:
    """Copies of a layer that can be mapped at once, as many as the rotation wants; 0 when none fits."""
    memory = virtual_memory(pool)
    n_granules = sum(-(-n * k * pool.flat.element_size() // memory.granule_bytes) for n, k in matrices(workload))
    n_away = len(workload.offloaded or ())
    device_one = (workload.n_experts - n_away) * n_granules * memory.granule_bytes + len(matrices(workload)) * (
        memory.granule_bytes
    )
    host_one = n_away * n_granules * memory.granule_bytes
    torch.cuda.empty_cache()  # what torch holds back is room too
    row_bytes = matrices(workload)[-1][0] * ACTIVATION_BYTES.get(workload.dtype, 2.0)
    result_bytes = workload.n_tokens * workload.top_k * row_bytes
    reserve = max(DEVICE_RESERVE_BYTES, result_bytes + SMALL_RESERVE_BYTES)
    device_room = memory.idle_bytes(False) + max(0, torch.cuda.mem_get_info()[0] - reserve)
    host_room = memory.idle_bytes(True) + FREE_SHARE * free_host_bytes()
    if pool.host.limit_bytes is not None:
        host_room = min(host_room, memory.idle_bytes(True) + pool.host.limit_bytes - memory.made_bytes(True))
    wanted = min(MAX_COPIES, n_positions(workload, pool.cold_bytes))
    return int(max(0, min(wanted, device_room // device_one, host_room // host_one if host_one else wanted)))


def trim(pool: Pool) -> None:
    """Give idle granules and torch's cached blocks back to the device, when another point finds no memory."""
    if pool.host.virtual is not None:
        torch.cuda.synchronize()
        pool.host.virtual.trim()
    if pool.flat.is_cuda:
        torch.cuda.empty_cache()


def support(device: str) -> str | None:
    """Why one tensor cannot lie in both memories here, or null: one range is made, written through and read back."""
    if device != "cuda":
        return "only CUDA devices map two memories into one range"
    try:
        torch.empty(1, device="cuda")
        memory = open_virtual_memory(Driver(load_library()), torch.cuda.current_device())
        mapped = memory.map([True, False])
        try:
            values = tensor_at(mapped.address, mapped.n_bytes).view(torch.int32)
            torch.arange(values.numel(), out=values)
            expected = torch.arange(values.numel(), dtype=torch.int32, device="cuda")
            is_right = bool((values == expected).all().item())
            del values
        finally:
            torch.cuda.synchronize()
            memory.unmap(mapped)
            memory.trim()
    except (CudaDriverError, RuntimeError, ValueError, TypeError) as error:
        return first_line(error)
    return None if is_right else "what was written to a range over two memories did not come back"

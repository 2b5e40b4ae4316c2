"""Experts in plain system memory on coherent machines, each on the pages of the CPU's or the GPU's memory node.

The GPU is a memory node there and reads what malloc gives. Placement is asked of the kernel by number, so that no
library is needed, and looked up again after the pages were touched.
"""

import ctypes
import mmap
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from perfmodel.errors import InputError

from .driver import (
    HOST_NUMA_ID,
    NUMA_CONFIG,
    NUMA_ID,
    PAGEABLE_MEMORY_ACCESS,
    CudaDriverError,
    Driver,
    load_library,
)
from .memory import DEVICE_RESERVE_BYTES, FILL_ELEMENTS, FREE_SHARE, Pool, fill, free_host_bytes, matrices, n_positions
from .workloads import Workload

SYSCALLS = {"x86_64": (237, 279), "aarch64": (235, 239)}  # mbind, move_pages
MPOL_BIND = 2
STRIDE_BYTES = 1 << 21  # a huge page: experts never share one
MAX_NODES = 1024


@dataclass(frozen=True)
class Nodes:
    """The memory nodes of the host's and the GPU's memory."""

    host: int
    gpu: int


def nodes() -> Nodes:
    """Where the two memories are; raises InputError where the GPU does not read plain system memory as its own node."""
    try:
        driver = Driver(load_library())
        device = torch.cuda.current_device()
        if not driver.attribute(PAGEABLE_MEMORY_ACCESS, device):
            raise InputError("this GPU does not read plain system memory")
        if driver.attribute(NUMA_CONFIG, device) != 1:
            raise InputError("the memory of this GPU is no memory node of the system")
        return Nodes(max(0, driver.attribute(HOST_NUMA_ID, device)), driver.attribute(NUMA_ID, device))
    except CudaDriverError as error:
        raise InputError(f"the driver does not say where memory lies: {error}") from None


def _system(number: int, *arguments: object) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    if library.syscall(ctypes.c_long(number), *arguments) < 0:
        code = ctypes.get_errno()
        raise InputError(f"the system does not place memory: {os.strerror(code)}")


def bind(address: int, n_bytes: int, node: int) -> None:
    """Ask for the pages of a range that nothing touched yet to come from one node; raises InputError."""
    if platform.machine() not in SYSCALLS or not 0 <= node < MAX_NODES:
        raise InputError(f"placing memory is not known for {platform.machine()} and node {node}")
    mask = (ctypes.c_ulong * (MAX_NODES // 64))()
    mask[node // 64] = 1 << node % 64
    _system(
        SYSCALLS[platform.machine()][0], ctypes.c_void_p(address), ctypes.c_ulong(n_bytes), ctypes.c_int(MPOL_BIND),
        mask, ctypes.c_ulong(MAX_NODES + 1), ctypes.c_uint(0),
    )  # fmt: skip


def nodes_of(addresses: Sequence[int]) -> list[int]:
    """The node of the page at each address; negative error numbers for pages that are not there."""
    n = len(addresses)
    pages, found = (ctypes.c_void_p * n)(*addresses), (ctypes.c_int * n)()
    _system(
        SYSCALLS[platform.machine()][1], ctypes.c_int(0), ctypes.c_ulong(n), pages, ctypes.c_void_p(None), found,
        ctypes.c_int(0),
    )  # fmt: skip
    return list(found)


def device_tensor(address: int, n_bytes: int) -> Tensor:
    """A CUDA tensor of bytes over plain system memory, which torch's other ways refuse as unknown to the driver."""
    device = torch.device("cuda", torch.cuda.current_device())
    storage = torch._C._construct_storage_from_data_pointer(address, device, n_bytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (n_bytes,), (1,))


@dataclass(frozen=True)
class Held:
    """One mapping with the experts of one matrix: some addresses in it and the nodes they were placed on."""

    memory: mmap.mmap
    addresses: list[int]
    placed: list[int]

    @property
    def n_moved(self) -> int:
        """How many of the pages looked at are on another node now."""
        return sum(a != b for a, b in zip(nodes_of(self.addresses), self.placed, strict=True))


def _one_matrix(pool: Pool, workload: Workload, n: int, k: int, where: Nodes, driver: Driver) -> tuple[Tensor, Held]:
    element_bytes, away = pool.flat.element_size(), set(workload.offloaded or ())
    stride = -(-n * k * element_bytes // STRIDE_BYTES) * STRIDE_BYTES
    # Private, as malloc gives it: shared memory is another kind to the kernel and has small pages.
    memory = mmap.mmap(-1, (workload.n_experts + 1) * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    handle = ctypes.c_char.from_buffer(memory)
    base = ctypes.addressof(handle)
    del handle  # it would keep the mapping from being closed
    first = -base % STRIDE_BYTES
    for expert in range(workload.n_experts):
        bind(base + first + expert * stride, stride, where.host if expert in away else where.gpu)
    on_host = torch.frombuffer(memory, dtype=torch.uint8)[first : first + workload.n_experts * stride]
    # Not a block of a power of two: experts begin at multiples of one and would all be alike.
    fill(on_host.view(pool.flat.dtype), pool.flat[: min(FILL_ELEMENTS, pool.flat.numel())].cpu())
    n_bytes = n * k * element_bytes
    starts = [base + first + expert * stride for expert in range(workload.n_experts)]
    for expert in away:
        with suppress(CudaDriverError):  # where the driver knows no such advice pages are looked up again all the same
            driver.keep_on_host(starts[expert], stride)
    held = Held(
        memory,
        [(start + at) // mmap.PAGESIZE * mmap.PAGESIZE for start in starts for at in (0, n_bytes // 2, n_bytes - 1)],
        [where.host if expert in away else where.gpu for expert in range(workload.n_experts) for _ in range(3)],
    )
    if n_wrong := held.n_moved:
        raise InputError(f"{n_wrong} of {len(held.placed)} pages lie on another memory node than asked for")
    flat = device_tensor(base + first, workload.n_experts * stride).view(pool.flat.dtype)
    return flat.as_strided((workload.n_experts, n, k), (stride // element_bytes, k, 1)), held


def system_experts(
    pool: Pool, workload: Workload
) -> tuple[list[tuple[Tensor, ...]], Callable[[], None], dict[str, object]]:
    """Copies of a layer's experts in system memory, what gives them back, and facts; raises InputError."""
    if not pool.flat.is_cuda:
        raise InputError("system memory read in place needs a CUDA device")
    where = nodes()
    strides = [-(-n * k * pool.flat.element_size() // STRIDE_BYTES) * STRIDE_BYTES for n, k in matrices(workload)]
    n_away = len(workload.offloaded or ())
    on_gpu, on_host = (workload.n_experts - n_away + 1) * sum(strides), n_away * sum(strides)
    room = max(0, torch.cuda.mem_get_info()[0] - DEVICE_RESERVE_BYTES) // on_gpu
    host_room = int(FREE_SHARE * free_host_bytes()) // on_host if on_host else room
    n_copies = min(n_positions(workload, pool.cold_bytes), room, host_room)
    if n_copies < 1:
        raise InputError(f"{workload.shape} does not fit into the free memory of both nodes")
    held: list[Held] = []
    found = []
    driver = Driver(load_library())
    for _ in range(n_copies):
        copy = []
        for n, k in matrices(workload):
            tensor, one = _one_matrix(pool, workload, n, k, where, driver)
            held.append(one)
            copy.append(tensor)
        found.append(tuple(copy))

    def close() -> None:
        torch.cuda.synchronize()
        # A driver may move what kernels read often; such times would be those of another placement.
        n_moved, n_pages = sum(one.n_moved for one in held), sum(len(one.placed) for one in held)
        held.clear()  # the mapping goes with its last view
        if n_moved:
            raise InputError(f"{n_moved} of {n_pages} pages of experts were moved to another memory node meanwhile")

    return found, close, {"expert_stride_bytes": strides, "host_node": where.host, "gpu_node": where.gpu}

"""Host memory as a CUDA tensor without a copy: what kernels then read, they read over the link.

Under unified addressing the address of pinned host memory is valid in kernels. torch takes it by the CUDA array
interface, which asks the driver what an address is and accepts memory that was pinned.
"""

from typing import Any

import torch
from torch import Tensor

from perfmodel.errors import InputError


class _Bytes:
    """The bytes of a host tensor as an array on the device; holds the tensor, so that the alias keeps it alive."""

    def __init__(self, host: Tensor) -> None:
        self.host = host

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        n_bytes = self.host.numel() * self.host.element_size()
        # Bytes, because the interface knows neither bfloat16 nor float8. Version 2: no stream to wait for.
        return {"shape": (n_bytes,), "typestr": "|u1", "data": (self.host.data_ptr(), False), "version": 2}


def device_alias(host: Tensor, pageable: bool = False) -> Tensor:
    """A CUDA tensor of the same shape and dtype over the same host memory; it keeps `host` alive.

    `host` is contiguous, and pinned unless `pageable`: then the device must read plain memory in place, which the
    caller has asked the driver (`gpu.reads_pageable`). Raises InputError on another tensor, and when torch made a copy.
    """
    if host.device.type != "cpu" or not host.is_contiguous() or host.numel() == 0:
        raise InputError("only contiguous host memory that is not empty can be seen by the device in place")
    if not pageable and not host.is_pinned():
        raise InputError("this host memory is not pinned; the device cannot read it in place")
    # With an index torch believes us; without, it asks the driver, which refuses memory that was not pinned.
    device = f"cuda:{torch.cuda.current_device()}" if pageable else "cuda"
    flat: Tensor = torch.as_tensor(_Bytes(host), device=device)
    if flat.data_ptr() != host.data_ptr():
        raise InputError("torch copied the host memory instead of sharing it; it cannot be read in place")
    return flat.view(host.dtype).view(host.shape)


def check_alias(host: Tensor, alias: Tensor) -> None:
    """Raise InputError unless a write by the host shows on the device, and one by the device on the host.

    Overwrites the first and last byte for a moment.
    """
    here, there = host.view(-1).view(torch.uint8), alias.view(-1).view(torch.uint8)
    for at in (0, here.numel() - 1):
        before = int(here[at])
        here[at] = before ^ 0x5A
        torch.cuda.synchronize()
        seen_there = int(torch.bitwise_xor(there[at : at + 1], 0))  # by a kernel, not by a copy engine
        there[at : at + 1].fill_(before)
        torch.cuda.synchronize()
        if seen_there != before ^ 0x5A or int(here[at]) != before:
            raise InputError("host and device do not see each other's writes: this memory is not shared")

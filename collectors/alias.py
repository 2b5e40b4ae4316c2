"""Host memory as a tensor of the GPU, without a copy: kernels read it over the link."""

import torch
from torch import Tensor

# The array interface knows no bfloat16 and no fp8: memory is handed over as integers of the same width.
CARRIERS = {1: ("|u1", torch.uint8), 2: ("<i2", torch.int16), 4: ("<i4", torch.int32)}


class _Memory:
    """Memory under the CUDA array interface, version 3."""

    def __init__(self, address: int, shape: tuple[int, ...], typestr: str, owner: object) -> None:
        self.owner = owner  # torch keeps this object while the tensor lives, and so what owns the memory
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype, owner: object) -> Tensor:
    """A CUDA tensor over memory the driver knows at an address; the tensor keeps the owner alive.

    Raises ValueError or RuntimeError when torch does not take the address for one of a CUDA device.
    """
    typestr, _carrier = CARRIERS[dtype.itemsize]
    found = torch.as_tensor(_Memory(address, shape, typestr, owner), device="cuda")
    if found.data_ptr() != address:
        raise RuntimeError("torch copied memory that was to be seen in place")
    return found.view(dtype)


def device_alias(pinned: Tensor) -> Tensor:
    """A CUDA tensor over the memory of a pinned CPU tensor; both see what either writes."""
    if not pinned.is_contiguous():
        raise ValueError("only contiguous memory has an alias")
    return tensor_at(pinned.data_ptr(), tuple(pinned.shape), pinned.dtype, pinned)

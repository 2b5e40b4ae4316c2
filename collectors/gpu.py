"""What the GPU is and how it hangs on the host: for the machine part of a capture. Never its serial, UUID or bus id.

Functions import torch themselves; what a driver does not tell is null. Nothing needs root, nothing is changed.
"""

import ctypes
import sys
from collections.abc import Callable, Mapping
from typing import Any

from . import machine, smi

# cuda.h, CUdevice_attribute.
ATTRIBUTES = {
    "gpu_is_integrated": 18,
    "pageable_memory_access": 88,
    "pageable_uses_host_page_tables": 100,
    "gpu_memory_numa_node": 131,
    "host_numa_node": 134,
}
YES_OR_NO = ("gpu_is_integrated", "pageable_memory_access", "pageable_uses_host_page_tables")
CUDA_SUCCESS = 0
# PCI Express Base Specification: transfers a second of a lane, and the share of bits that are data.
PCIE_TRANSFERS_PER_S = {1: 2.5e9, 2: 5e9, 3: 8e9, 4: 16e9, 5: 32e9, 6: 64e9}
PCIE_DATA_FRAC = {2.5e9: 8 / 10, 5e9: 8 / 10, 8e9: 128 / 130, 16e9: 128 / 130, 32e9: 128 / 130, 64e9: 242 / 256}


def driver_library() -> Any | None:
    """The CUDA driver library, or null where there is none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def driver_facts(library: Any | None, ordinal: int) -> dict[str, object]:
    """Newest CUDA the driver knows, and attributes of a device about memory it shares with the host; null: not told."""
    found: dict[str, object] = dict.fromkeys(("driver_cuda", *ATTRIBUTES))
    if library is None:
        return found
    value, device = ctypes.c_int(), ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(value)) == CUDA_SUCCESS:
        found["driver_cuda"] = f"{value.value // 1000}.{value.value % 1000 // 10}"
    if library.cuInit(0) != CUDA_SUCCESS or library.cuDeviceGet(ctypes.byref(device), ordinal) != CUDA_SUCCESS:
        return found
    for name, attribute in ATTRIBUTES.items():
        if library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) == CUDA_SUCCESS:
            # -1 says that there is no such memory node
            found[name] = bool(value.value) if name in YES_OR_NO else value.value if value.value >= 0 else None
    return found


def reads_pageable(facts: Mapping[str, object]) -> bool:
    """Whether kernels read malloc'ed memory in place through the host's page tables, instead of by migrating pages."""
    return facts.get("pageable_memory_access") is True and facts.get("pageable_uses_host_page_tables") is True


def link_kind(facts: Mapping[str, object]) -> str | None:
    """`nvlink-c2c` or `pcie`: what joins GPU and host; null when nothing tells."""
    if facts.get("c2c_n_links") or facts.get("pageable_uses_host_page_tables"):
        return "nvlink-c2c"
    return "pcie" if facts.get("pcie_gen_max") or facts.get("pcie_max_lanes") else None


def link_nominal_bytes_per_s(facts: Mapping[str, object]) -> float | None:
    """What the widest link of GPU and host could carry one way, packet headers not taken off; null when not told."""
    if facts.get("c2c_peak_bytes_per_s"):
        return float(str(facts["c2c_peak_bytes_per_s"]))
    generation, lanes = facts.get("pcie_gen_max"), facts.get("pcie_width_max") or facts.get("pcie_max_lanes")
    by_generation = PCIE_TRANSFERS_PER_S.get(generation) if isinstance(generation, int) else None
    transfers_per_s = by_generation or facts.get("pcie_max_transfers_per_s")
    if not isinstance(lanes, int) or not isinstance(transfers_per_s, float) or transfers_per_s not in PCIE_DATA_FRAC:
        return None
    return round(transfers_per_s * PCIE_DATA_FRAC[transfers_per_s] * lanes / 8)


def _library_version(soname: str, function: str) -> str | None:
    """Major.minor.patch of a CUDA library that torch has loaded, by its GetProperty function; null when not loaded."""
    try:
        call: Callable[..., int] = getattr(ctypes.CDLL(soname), function)
    except (OSError, AttributeError):
        return None
    part, parts = ctypes.c_int(), []
    for which in range(3):  # library_types.h: MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL
        if call(which, ctypes.byref(part)) != 0:
            return None
        parts.append(str(part.value))
    return ".".join(parts)


def cuda_software() -> dict[str, object]:
    """Versions of the CUDA libraries of this torch: runtime built for, cuBLAS, cuDNN; null without CUDA."""
    import torch

    if torch.version.cuda is None:
        return {"torch_cuda": None, "cublas": None, "cudnn": None}
    major = torch.version.cuda.partition(".")[0]
    try:
        n = torch.backends.cudnn.version()
    except RuntimeError:  # torch refuses a cuDNN of another version than its own; nothing here needs one
        n = None
    return {
        "torch_cuda": torch.version.cuda,
        "cublas": _library_version(f"libcublas.so.{major}", "cublasGetProperty"),
        "cudnn": None if n is None else f"{n // 10000}.{n % 10000 // 100}.{n % 100}",
    }


def smi_id() -> str:
    """How nvidia-smi calls the current GPU; for questions only, never stored."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def gpu(device: str) -> dict[str, object]:
    """The GPU's entries of the machine part; empty on the CPU."""
    if device != "cuda":
        return {}
    import torch

    ordinal = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(ordinal)
    place = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    facts: dict[str, object] = {
        "gpu_name": properties.name,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_n_sms": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "gpu_l2_bytes": properties.L2_cache_size,
        "gpu_n_visible": torch.cuda.device_count(),
        **driver_facts(driver_library(), ordinal),
        **(machine.pci_link(*(int(part) for part in place if part is not None)) if None not in place else {}),
        **smi.gpu_smi(smi_id()),
        **smi.modes(smi_id()),
    }
    return {**facts, "link_kind": link_kind(facts), "link_nominal_bytes_per_s": link_nominal_bytes_per_s(facts)}

"""What no machine can exceed: nominal rates of a known GPU and of the link, else generous ones; calibrated rates."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perfmodel.hardware import HardwareProfile, hardware, profile_name
from perfmodel.plausible.folder import Folder

# Bytes per second of one lane in one direction after line coding (PCI-SIG: 2.5, 5, 8, 16, 32, 64 GT/s).
PCIE_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.877e9}
PCIE_GENERATIONS = {2.5e9: 1, 5e9: 2, 8e9: 3, 16e9: 4, 32e9: 5, 64e9: 6}  # by transfers per second
C2C_BYTES_PER_S = 450e9  # NVLink-C2C, one direction (NVIDIA GH200 datasheet)

# Of machines that no profile knows: about three times the best sold when this was written, so that only slips of unit
# or of clock stand out. A core of a CPU: 128 fp32 FLOP, or 2,048 of narrower numbers (twice AMX in bf16),
# a cycle at 8 GHz.
GENERIC_MEMORY_BYTES_PER_S = 25e12
GENERIC_LINK_BYTES_PER_S = 1.8e12
GENERIC_HOST_BYTES_PER_S = 3e12
GENERIC_GPU_FLOPS_PER_S = {"fp32": 5e15, "tf32": 5e15, "fp16": 1e16, "bf16": 1e16, "fp8": 2e16}
GENERIC_CORE_FLOPS_PER_S = {"fp32": 1.1e12, "fp16": 17e12, "bf16": 17e12, "fp8": 17e12}

NOMINAL_BYTES_MARGIN = 1.02  # a nominal bandwidth is a count of transfers: only clock tolerance and rounding exceed it
# A datasheet's peak is taken at its boost clock; H100 SXM reaches 1,980 MHz where the datasheet's 989 TFLOP/s are
# those of about 1,830.
NOMINAL_FLOPS_MARGIN = 1.10


@dataclass(frozen=True)
class Limit:
    """A rate that cannot be exceeded, margin included, and what says so."""

    value: float
    source: str


@dataclass(frozen=True)
class Ceilings:
    """The nominal limits of a machine: device memory, host memory, link (null on a CPU), and FLOP/s by dtype."""

    memory: Limit
    host: Limit
    link: Limit
    flops: dict[str, Limit]
    host_flops: Limit
    manifest_link: Limit | None


def known_gpu(folder: Folder) -> HardwareProfile | None:
    """The shipped profile of the GPU that the manifest names, or None."""
    found = profile_name(str(folder.manifest.machine.get("gpu_name", "")))
    return hardware(found) if found and folder.is_cuda else None


def _number(machine: Mapping[str, Any], *keys: str) -> float | None:
    """The first of several keys under which the machine has a number, however it is written, or None."""
    for key in keys:
        digits = re.search(r"\d+(?:\.\d+)?(?:e\d+)?", str(machine.get(key)))
        if digits and not isinstance(machine[key], bool):
            return float(digits[0])
    return None


def manifest_link(machine: Mapping[str, Any]) -> Limit | None:
    """The nominal rate of one direction of the link that the machine part describes, or None where it does not."""
    if machine.get("link_kind") == "nvlink-c2c" or _number(machine, "c2c_n_links"):
        rate = max(C2C_BYTES_PER_S, _number(machine, "link_nominal_bytes_per_s") or 0.0)
        return Limit(rate * NOMINAL_BYTES_MARGIN, "NVLink-C2C in the manifest")
    # What the driver says of GPU and slot together, else what the card could do in the best slot.
    transfers = _number(machine, "pcie_max_transfers_per_s")
    generation = _number(machine, "pcie_gen_max") or (PCIE_GENERATIONS.get(transfers) if transfers else None)
    width = _number(machine, "pcie_width_max", "pcie_max_lanes")
    if generation not in PCIE_LANE_BYTES_PER_S or width is None or not 1 <= width <= 32:
        return None
    rate = PCIE_LANE_BYTES_PER_S[int(generation)] * width
    return Limit(rate * NOMINAL_BYTES_MARGIN, f"PCIe {generation:g}.0 x{width:g} in the manifest")


def ceilings_of(folder: Folder) -> Ceilings:
    """What the machine of a capture cannot exceed, from the manifest, a known GPU's datasheet, or what none exceeds."""
    machine, profile = folder.manifest.machine, known_gpu(folder)
    cores = max(_number(machine, "n_cores") or 1.0, 1.0)
    core_flops = {d: Limit(cores * x, f"{cores:g} cores of any CPU") for d, x in GENERIC_CORE_FLOPS_PER_S.items()}
    host = Limit(GENERIC_HOST_BYTES_PER_S, "the memory of any CPU")
    named = manifest_link(machine)
    link = named or Limit(GENERIC_LINK_BYTES_PER_S, "the link of any machine")
    if not folder.is_cuda:
        return Ceilings(host, host, host, core_flops, core_flops["bf16"], None)
    memory = Limit(GENERIC_MEMORY_BYTES_PER_S, "the memory of any GPU")
    flops = {dtype: Limit(rate, "any GPU") for dtype, rate in GENERIC_GPU_FLOPS_PER_S.items()}
    if profile is not None:
        source = f"the datasheet in profile {profile.name}"
        memory = Limit(profile["memory_peak_bytes_per_s"] * NOMINAL_BYTES_MARGIN, source)
        for dtype in flops:
            peak = profile.first(f"{dtype}_peak_flops_per_s", *(["bf16_peak_flops_per_s"] if dtype == "fp16" else []))
            if peak is not None:
                flops[dtype] = Limit(peak[1].value * NOMINAL_FLOPS_MARGIN, source)
        nominal = Limit(profile["link_peak_bytes_per_s"] * NOMINAL_BYTES_MARGIN, source)
        link = nominal if named is None or nominal.value > named.value else named
    return Ceilings(memory, host, link, flops, core_flops["bf16"], named)


def limit_of(quantity: str, ceilings: Ceilings) -> Limit | None:
    """The limit of a calibrated quantity, or None where nothing bounds it from above."""
    if quantity.startswith("link_") and quantity.endswith("_bytes_per_s"):
        is_sum = quantity.startswith("link_both")
        return Limit(ceilings.link.value * (2 if is_sum else 1), ceilings.link.source)
    if quantity.startswith("memory_") and quantity.endswith("_bytes_per_s"):
        return ceilings.memory
    if quantity.startswith("host_") and quantity.endswith("_per_s"):
        return ceilings.host if quantity.endswith("_bytes_per_s") else ceilings.host_flops
    return ceilings.flops.get(quantity.partition("_")[0]) if quantity.endswith("_flops_per_s") else None


def best_calibrated(folder: Folder) -> dict[str, float]:
    """The highest value of each quantity among the manifest, its runs and the calibration lines."""
    best: dict[str, float] = defaultdict(float)
    several = [folder.manifest.calibration, *(run.calibration or {} for run in folder.manifest.runs)]
    for key, number in ((k, c.value) for numbers in several for k, c in numbers.items()):
        best[key] = max(best[key], number)
    for _, line in folder.calibrations:
        if line.quantity is not None:
            best[line.quantity] = max(best[line.quantity], line.value)
    return {key: value for key, value in best.items() if value > 0}

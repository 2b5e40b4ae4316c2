"""What a machine can do: profiles read from TOML, every number with its unit, kind of evidence and source."""

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from perfmodel.errors import InputError
from perfmodel.text import UNITS, to_base

SMALLEST, LARGEST = 1e-3, 1e21  # in base units; beyond lies a slip of unit or finger
MEMORY_DRIFT_FRAC = 1e-3  # what firmware and kernel keep of the memory differs from boot to boot
# What a number rests on: a vendor's nominal figure, somebody's publication, our measurement, or nothing but a reason
# that the source gives, where a machine cannot be described without it.
EVIDENCE = ("datasheet", "paper", "measured", "assumed")
DEVICES = ("gpu", "cpu")
PROFILE_DIR = Path(__file__).parent / "data" / "hardware"

# The vocabulary of machine numbers: the name ends in its base unit. `memory` is what the computing device reads at
# full speed (HBM of a GPU, DRAM of a CPU); `host` is the CPU beside a GPU; `link` joins the two; `ndp` are memory
# modules of the host that compute on what they hold.
QUANTITIES: dict[str, str] = {
    "bf16_peak_flops_per_s": "dense bf16 matrix peak of the computing device",
    "fp16_peak_flops_per_s": "dense fp16 matrix peak of the computing device",
    "fp8_peak_flops_per_s": "dense fp8 matrix peak of the computing device",
    "fp32_peak_flops_per_s": "fp32 matrix peak of the computing device",
    "bf16_gemm_flops_per_s": "rate a large dense bf16 GEMM reaches",
    "fp8_gemm_flops_per_s": "rate a large dense fp8 GEMM reaches",
    "fp16_gemm_flops_per_s": "rate a large dense fp16 GEMM reaches",
    "tf32_gemm_flops_per_s": "rate a large dense fp32 GEMM reaches where it may round its inputs to tf32",
    "fp32_gemm_flops_per_s": "rate a large dense fp32 GEMM reaches",
    "memory_capacity_bytes": "device memory",
    "memory_peak_bytes_per_s": "nominal bandwidth of device memory",
    "memory_stream_bytes_per_s": "bandwidth a streaming kernel reaches in device memory",
    "memory_copy_bytes_per_s": "copy within device memory, reads and writes counted",
    "memory_triad_bytes_per_s": "triad in device memory, two arrays read and one written",
    "l2_capacity_bytes": "last-level cache of the computing device",
    "n_cores_count": "streaming multiprocessors of a GPU, cores of a CPU",
    "host_capacity_bytes": "memory of the host CPU",
    "host_peak_bytes_per_s": "nominal bandwidth of host memory",
    "host_stream_bytes_per_s": "bandwidth a streaming kernel reaches in host memory",
    "host_gemm_flops_per_s": "rate a large expert GEMM reaches on the host CPU in its best dtype",
    "link_peak_bytes_per_s": "nominal bandwidth of the host-device link, one direction",
    "link_h2d_copy_bytes_per_s": "host-to-device copy, pinned memory",
    "link_d2h_copy_bytes_per_s": "device-to-host copy, pinned memory",
    "link_h2d_pageable_bytes_per_s": "host-to-device copy, pageable memory",
    "link_d2h_pageable_bytes_per_s": "device-to-host copy, pageable memory",
    "link_both_copy_bytes_per_s": "copies in both directions at once, pinned memory, the sum of the two",
    "link_kernel_read_bytes_per_s": "device kernel reading host memory in place",
    "link_system_read_bytes_per_s": "device kernel reading plain system memory in place, on coherent machines",
    "link_h2d_contended_bytes_per_s": "host-to-device copy from pinned memory while the host CPU computes experts",
    "host_gemm_contended_flops_per_s": "rate of expert GEMMs on the host CPU while host-to-device copies run",
    "n_ndp_count": "near-data memory modules (DIMMs that compute)",
    "ndp_peak_bytes_per_s": "bandwidth inside one near-data DIMM",
    "ndp_peak_flops_per_s": "rate of expert GEMMs inside one near-data DIMM",
    "ndp_link_peak_bytes_per_s": "nominal bandwidth between near-data DIMMs, without the CPU",
    "peer_link_peak_bytes_per_s": "nominal bandwidth to the other GPUs of the node, one direction",
    "peer_link_all_to_all_bytes_per_s": "bandwidth an all-to-all reaches inside a node, one direction of one GPU",
    "peer_link_alpha_ns": "start of a message to another GPU of the node, before its first byte arrives",
    "net_link_peak_bytes_per_s": "nominal bandwidth of a GPU's share of the network between nodes, one direction",
    "net_link_all_to_all_bytes_per_s": "bandwidth an all-to-all reaches between nodes, one direction of one GPU",
    "net_link_alpha_ns": "start of a message to a GPU of another node, before its first byte arrives",
    "n_node_gpus_count": "GPUs that peer links join: those of one node, or of one NVLink domain",
    "n_host_gpus_count": "GPUs that share the host as it is described here",
    "launch_overhead_ns": "launch call to start of a null kernel",
    "null_kernel_ns": "duration of a null kernel",
    "graph_launch_ns": "launch of a CUDA graph of one null kernel, waited for nothing",
    "graph_kernel_ns": "each further null kernel of a CUDA graph",
    "call_overhead_ns": "one grouped GEMM call on minimal work, host time included",
}

# What lies outside one machine: it changes nothing of what one GPU with its host does.
OF_OTHERS = ("peer_link_", "net_link_", "n_node_gpus_", "n_host_gpus_")

# What drivers call the GPUs of shipped profiles, and folders of public measurements (whole names), as patterns. A slice
# (MIG) goes by its GPU's name and has less of everything. Other sizes and form factors of the same chips are not meant.
DEVICE_NAMES: dict[str, str] = {
    "a100-sxm-80gb": r"A100-SXM4-80GB|^a100_sxm$",
    "b200-sxm": r"\bB200\b|^b200_sxm$",
    "gb200": r"\bGB200\b|^gb200(_sxm)?$",
    "gh200": r"GH200 480GB|^gh200(_sxm)?$",
    "h100-pcie": r"H100 PCIe|^h100_pcie$",
    "h100-sxm": r"H100 80GB HBM3|^h100_sxm$",
    "h200-sxm": r"\bH200\b(?! NVL)|^h200_sxm$",
    "l40s": r"\bL40S\b|^l40s$",
}


@dataclass(frozen=True)
class Quantity:
    """One number of a machine in base units, with the evidence it rests on."""

    value: float
    kind: str  # one of EVIDENCE
    source: str
    date: str | None = None


@dataclass(frozen=True)
class HardwareProfile:
    """One machine; `device` says what computes the resident experts; quantities are keyed by the QUANTITIES names."""

    name: str
    title: str
    device: str
    quantities: Mapping[str, Quantity]
    notes: str = ""

    @property
    def own_quantities(self) -> dict[str, Quantity]:
        """The quantities without those of links to other GPUs: what one GPU with its host is told from another by."""
        return {key: quantity for key, quantity in self.quantities.items() if not key.startswith(OF_OTHERS)}

    def __getitem__(self, key: str) -> float:
        """The value of a quantity in base units; raises InputError when this machine has none."""
        if key not in self.quantities:
            raise InputError(f"hardware {self.name!r} has no {key}; it has {', '.join(self.quantities)}")
        return self.quantities[key].value

    def first(self, *keys: str) -> tuple[str, Quantity] | None:
        """The first of several quantities that this machine has, best evidence listed first, or None."""
        return next(((key, self.quantities[key]) for key in keys if key in self.quantities), None)


def same_fact(key: str, one: object, other: object) -> bool:
    """Whether two values of a fact of a machine are equal; of its memory's size, whether they are of one machine."""
    if key.endswith("memory_bytes") and isinstance(one, int) and isinstance(other, int):
        return abs(one - other) <= MEMORY_DRIFT_FRAC * max(one, other)
    return one == other


def profile_name(device: str) -> str | None:
    """The shipped profile of a GPU as its driver names it (`NVIDIA H200`), or None where none is shipped.

    Folder names of public measurements (`h200_sxm`) are known too.
    """
    return next((profile for profile, pattern in DEVICE_NAMES.items() if re.search(pattern, device)), None)


def load_profile(path: str | Path) -> HardwareProfile:
    """Read one hardware TOML; refuses a number without unit, kind or source, and a name outside QUANTITIES."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no hardware file {str(path)!r}; names of shipped profiles: {', '.join(names())}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path.name} is not TOML: {error}") from None
    title, device = table.pop("title", path.stem), table.pop("device", None)
    notes = table.pop("notes", "")
    if device not in DEVICES:
        raise InputError(f"{path.name}: device is {device!r}, expected one of {', '.join(DEVICES)}")
    quantities = {key: _quantity(path.name, key, entry) for key, entry in table.items()}
    return HardwareProfile(path.stem, title, device, quantities, notes)


def _quantity(file: str, key: str, entry: Any) -> Quantity:
    if key not in QUANTITIES:
        raise InputError(f"{file}: unknown quantity {key!r}; known: {', '.join(QUANTITIES)}")
    given = {name for name, part in entry.items() if str(part).strip()} if isinstance(entry, dict) else set()
    missing = {"value", "unit", "kind", "source"} - given
    if missing:
        raise InputError(f"{file}: {key} lacks {', '.join(sorted(missing))}")
    if entry["kind"] not in EVIDENCE:
        raise InputError(f"{file}: {key} has kind {entry['kind']!r}, expected one of {', '.join(EVIDENCE)}")
    value = entry["value"]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InputError(f"{file}: {key} is {value!r}, expected a positive number")
    try:
        value, suffix = to_base(value, entry["unit"])
    except InputError as error:
        raise InputError(f"{file}: {key}: {error}") from None
    if not SMALLEST <= value <= LARGEST:
        raise InputError(f"{file}: {key} is {entry['value']} {entry['unit']}, which no machine has")
    if not key.endswith("_" + suffix):
        raise InputError(f"{file}: {key} is given in {entry['unit']}, which is not what its name says")
    return Quantity(value, entry["kind"], entry["source"], entry.get("date"))


def to_toml(profile: HardwareProfile) -> str:
    """A profile as the text of a hardware file, in base units, which `load_profile` reads back to the same values."""
    unit_of = {suffix: unit for unit, (suffix, factor) in UNITS.items() if factor == 1}
    lines = [f"title = {json.dumps(profile.title)}", f"device = {json.dumps(profile.device)}"]
    lines += [f"notes = {json.dumps(profile.notes)}"] if profile.notes else []
    for key, q in profile.quantities.items():
        unit = next(unit for suffix, unit in unit_of.items() if key.endswith("_" + suffix))
        lines += ["", f"[{key}]", f"value = {q.value!r}", f"unit = {json.dumps(unit)}", f"kind = {json.dumps(q.kind)}"]
        lines += [f"source = {json.dumps(q.source)}"] + ([f"date = {json.dumps(q.date)}"] if q.date else [])
    return "\n".join(lines) + "\n"


def names() -> list[str]:
    """The names of the shipped hardware profiles."""
    return sorted(path.stem for path in PROFILE_DIR.glob("*.toml"))


def hardware(name: str) -> HardwareProfile:
    """The profile of that name, or of the TOML file at that path; raises InputError listing the valid names."""
    if name.endswith(".toml"):
        return load_profile(name)
    if name not in names():
        raise InputError(f"unknown hardware {name!r}; known: {', '.join(names())}, or the path of a .toml file")
    return _shipped(PROFILE_DIR / f"{name}.toml")


@cache
def _shipped(path: Path) -> HardwareProfile:
    return load_profile(path)  # once a process: the dashboard asks for profiles at every change of a control

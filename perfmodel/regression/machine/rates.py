"""Does a machine reach what sound machines reach of their nominal rates, or what its like reached when it was captured.

Nominal rates come from a datasheet (of a GPU that the catalogue knows, or one that was given), else are derived of a
CPU's facts where these tell its clock or its memory. What part of them is sound is in data/reached.toml, with sources.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isclose
from pathlib import Path
from typing import Any

from perfmodel import text
from perfmodel.capture import Capture
from perfmodel.errors import InputError
from perfmodel.hardware import QUANTITIES, HardwareProfile
from perfmodel.latency import LatencyModel
from perfmodel.text import to_base

from .items import LOOK_AT, OPEN, RATES, Item, held, number, words_of

REACHED_FILE = Path(__file__).parents[2] / "data" / "reached.toml"
SAME = "same processor"
NO_DATASHEET = "no datasheet; give one with --hardware FILE.toml"
# The rows of data/reached.toml that stand for a quantity without rows of its own: wider and narrower numbers alike,
# both directions of a full-duplex link alike.
STANDS_FOR = {
    ("fp16_gemm_flops_per_s", "gpu"): "bf16_gemm_flops_per_s",
    ("fp32_gemm_flops_per_s", "gpu"): "bf16_gemm_flops_per_s",
    ("bf16_gemm_flops_per_s", "cpu"): "fp32_gemm_flops_per_s",
    ("link_d2h_copy_bytes_per_s", "pcie"): "link_h2d_copy_bytes_per_s",
    ("host_stream_bytes_per_s", "cpu"): "memory_stream_bytes_per_s",
}
NARROW_PEAKS = {"fp16": ("fp16", "bf16"), "bf16": ("bf16", "fp16")}  # datasheets give one number for both
# The same memory, measured by one more kernel: memory_stream_bytes_per_s is the best of them.
DETAILS = ("memory_copy_bytes_per_s", "memory_triad_bytes_per_s")
LINKS = ("link_h2d_copy_bytes_per_s", "link_d2h_copy_bytes_per_s", "link_kernel_read_bytes_per_s")
C2C_FROM_BYTES_PER_S = 200e9  # a nominal link above that is no PCIe x16 (PCI-SIG: 126 GB/s at generation 6)
# FLOP a cycle and core of fp32: both FMA units at their width (vendors' optimisation guides). AMD of family 25 (Zen 3
# and 4) computes 512 bits in two steps; Intel's servers have two 512-bit units but for the smallest models.
FP32_FLOPS_PER_CYCLE = {
    ("AuthenticAMD", "25"): 32.0,
    ("AuthenticAMD", "26"): 64.0,
    ("GenuineIntel", "6", "avx512f"): 64.0,
    ("GenuineIntel", "6"): 32.0,
}
AMX_BF16_FLOPS_PER_CYCLE = 1024.0  # Intel: 1,024 bf16 operations a cycle and core
BF16_FACTOR = 2.0  # of AVX512_BF16 over fp32 FMA at the same width

SOFTWARE = "kernels that the libraries pick: torch_cpu_capability, MKL_ENABLE_INSTRUCTIONS, ONEDNN_MAX_CPU_ISA"
NEXT = {
    "gpu gemm": (
        "clocks, power cap and temperature under load: nvidia-smi -q -d CLOCK,POWER,PERFORMANCE",
        "other processes on the GPU: nvidia-smi pmon",
        "versions of driver and cuBLAS",
    ),
    "gpu memory": (
        "memory clock under load, and ECC: nvidia-smi -q -d CLOCK,ECC",
        "other processes on the GPU: nvidia-smi pmon",
    ),
    "pcie": (
        "PCIe generation and width under load: nvidia-smi -q -d PCIE; slot, riser and BIOS",
        "the memory node that the GPU hangs on: numactl --cpunodebind, --membind",
        "IOMMU, and other devices behind the same switch: nvidia-smi topo -m",
    ),
    "nvlink-c2c": (
        "links that are up: nvidia-smi c2c -s",
        "where host memory was taken: numactl --membind of the node of the CPU",
    ),
    "time": (
        "clock and governor of the host's cores, and the node that the GPU hangs on",
        "other load on the host; persistence mode of the GPU",
    ),
    "cpu gemm": (
        SOFTWARE,
        "clock under load: governor, power cap, cgroup quota (cpu.max), other load",
        "threads bound to physical cores, one each (SMT)",
    ),
    "cpu memory": (
        "other load on the machine, also of a neighbour on the same host",
        "all memory channels populated, NUMA binding, transparent huge pages",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Reached:
    """What one machine reached and its nominal value, in the base unit of the quantity, with the source; `machine` is a
    profile's name where there is one."""

    quantity: str
    of: str
    machine: str
    value: float
    nominal: float
    source: str

    @property
    def frac(self) -> float:
        """The share of the nominal value."""
        return self.value / self.nominal


@dataclass(frozen=True)
class Nominal:
    """What a rate could be at most, what it is of, and whence it is known; `profile` names the datasheet, null where
    there is none. Of a time it is what is typical."""

    value: float
    of: str
    source: str
    profile: str | None = None


@cache
def _table() -> tuple[tuple[Reached, ...], dict[tuple[str, str], float]]:
    content = tomllib.loads(REACHED_FILE.read_text(encoding="utf-8"))
    rows = tuple(
        Reached(
            row["quantity"],
            row["of"],
            row["machine"],
            to_base(row["value"], row["unit"])[0],
            to_base(row["nominal"], row["unit"])[0],
            row["source"],
        )
        for row in content["reached"]
    )
    apart = {(row["unit"], of): float(row["frac"]) for row in content["apart"] for of in row["of"]}
    return rows, apart


def reached(quantity: str, of: str, profile: str | None = None, nominal: float | None = None) -> list[Reached]:
    """What sound machines reached of a quantity, lowest share first: that profile, or of links those with the same
    nominal value, alone where they are among them."""
    wanted = quantity if any(r.quantity == quantity and r.of == of for r in _table()[0]) else None
    wanted = wanted or STANDS_FOR.get((quantity, of))
    rows = [row for row in _table()[0] if row.quantity == wanted and row.of == of]
    is_link = quantity in LINKS and nominal is not None
    own = [row for row in rows if row.machine == profile or (is_link and isclose(row.nominal, nominal or 0.0))]
    return sorted(own or rows, key=lambda row: row.frac)


def apart_frac(quantity: str, of: str) -> float:
    """How far below what others reached a sound machine may be."""
    unit = next(unit for unit in ("flops_per_s", "bytes_per_s", "ns") if quantity.endswith(unit))
    return _table()[1][unit, of]


def rate_items(
    capture: Capture, datasheet: HardwareProfile | None, peers: Sequence[LatencyModel], *, is_given: bool = False
) -> list[Item]:
    """Each calibrated rate and time of a capture, held against its nominal value or, on a CPU without one, against
    what shipped models of the same processor were calibrated to; what nothing is known of in one item.

    A GPU's name does not say what host it is in: `host_` rates are judged with a datasheet that `is_given`. Raises
    InputError for a datasheet of another kind of device.
    """
    device = _device(capture)
    if datasheet is not None and datasheet.device != device:
        raise InputError(
            f"hardware {datasheet.name!r} is a {datasheet.device}, and capture {capture.name!r} was computed on a "
            f"{device}; profiles: `perfmodel list`"
        )
    entries: Mapping[str, Any] = capture.manifest["calibration"]
    found, without = [], []
    for key in QUANTITIES:
        if not entries.get(key, {}).get("value") or key in DETAILS or not key.endswith(("_per_s", "_ns")):
            continue  # nothing that was reached is no rate
        value = float(entries[key]["value"])
        item = _against_nominal(capture, key, value, datasheet, is_given) or _against_peers(capture, key, value, peers)
        if item is None:
            without.append(f"{_short(key)} {text.figure(key, value)}")
        else:
            found.append(item)
    found += [
        Item(RATES, _short(key), OPEN, f"was not calibrated{_why_left_out(capture)}")
        for key in _expected(capture)
        if not entries.get(key, {}).get("value")
    ]
    if without:
        why = NO_DATASHEET if datasheet is None else f"neither {datasheet.name} nor publications say what is sound"
        found.append(Item(RATES, "other rates", OPEN, f"{why}: {', '.join(without)}"))
    return [*found, *_instruction_sets(capture)]


def _device(capture: Capture) -> str:
    return "gpu" if capture.manifest["settings"]["device"] == "cuda" else "cpu"


def _short(key: str) -> str:
    """A quantity as people call it: its name without its unit."""
    for unit in ("_flops_per_s", "_bytes_per_s", "_ns"):
        key = key.removesuffix(unit)
    return key.replace("_", " ").replace("gemm", "GEMM")


def _expected(capture: Capture) -> list[str]:
    """What a calibration measures on any machine of this kind."""
    keys = [f"{capture.dtype}_gemm_flops_per_s", "memory_stream_bytes_per_s"]
    return [*keys, "link_h2d_copy_bytes_per_s", "launch_overhead_ns"] if _device(capture) == "gpu" else keys


def _why_left_out(capture: Capture) -> str:
    reasons = capture.left_out.filter(capture.left_out["probe"].is_not_null())["reason"].unique().sort().to_list()
    return f"; probes left out: {text.shortened('; '.join(reasons), 100)}" if reasons else ""


def _against_nominal(
    capture: Capture, key: str, value: float, datasheet: HardwareProfile | None, is_given: bool
) -> Item | None:
    nominal = _nominal(capture, key, datasheet, is_given)
    rows = [] if nominal is None else reached(key, nominal.of, nominal.profile, nominal.value)
    if nominal is None or not rows:
        return None
    least = rows[0].frac * (1 - apart_frac(key, nominal.of))
    shown = text.figure(key, value)
    if key.endswith("_ns"):
        typical = text.figure(key, nominal.value)
        words = (
            f"{shown}, typical {typical} ({nominal.source}); up to {text.figure(key, nominal.value / least)} is sound"
        )
        return held(RATES, _short(key), words, nominal.value / value, least, NEXT["time"])
    words = f"{shown} is {text.frac(value / nominal.value)} of {text.figure(key, nominal.value)} ({nominal.source}); "
    words += f"sound from {text.frac(least)}, as {rows[0].machine} reached {text.frac(rows[0].frac)}"
    return held(RATES, _short(key), words, value / nominal.value, least, _next_of(key, nominal.of))


def _next_of(key: str, of: str) -> tuple[str, ...]:
    if of in ("pcie", "nvlink-c2c"):
        return NEXT[of]
    return NEXT[f"{'gpu' if of == 'gpu' else 'cpu'} {'gemm' if '_gemm_' in key else 'memory'}"]


def _nominal(capture: Capture, key: str, datasheet: HardwareProfile | None, is_given: bool) -> Nominal | None:
    """The nominal value of a calibrated quantity, null where none is known."""
    of, machine = _device(capture), capture.manifest["machine"]
    if key.endswith("_ns"):
        rows = reached(key, of, datasheet.name if datasheet else None)
        slowest = max(rows, key=lambda row: row.value, default=None)
        return None if slowest is None else Nominal(slowest.value, of, slowest.source, slowest.machine)
    if key.startswith("host_"):
        if not is_given or not key.startswith("host_stream"):
            return None
        of = "cpu"
    if key == "bf16_gemm_flops_per_s" and of == "cpu" and "amx_bf16" in (words_of(machine.get("cpu_flags"))):
        of = "amx"
    if datasheet is not None:
        dtype, _, rest = key.partition("_gemm_")
        peaks = [f"{one}_peak_{rest}" for one in NARROW_PEAKS.get(dtype, (dtype,))] if rest else []
        if key in LINKS:
            peaks = ["link_peak_bytes_per_s"]
        elif key in ("memory_stream_bytes_per_s", "host_stream_bytes_per_s"):
            peaks = [key.replace("_stream_", "_peak_")]
        peak = datasheet.first(*peaks)
        if peak is None:
            return None
        if key in LINKS:
            of = "nvlink-c2c" if peak[1].value > C2C_FROM_BYTES_PER_S else "pcie"
        return Nominal(peak[1].value, of, f"{peak[1].kind} in {datasheet.name}", datasheet.name)
    return _derived(key, of, machine, capture.manifest["settings"].get("threads"))


def _derived(key: str, of: str, machine: Mapping[str, Any], threads: object) -> Nominal | None:
    """The nominal rate of a CPU from its facts, null where they do not tell its base clock or its memory."""
    channels, transfers = (number(machine.get(f"memory_{one}")) for one in ("n_channels", "transfers_per_s"))
    if key == "memory_stream_bytes_per_s" and of == "cpu" and channels and transfers:
        words = f"derived: {channels:g} memory channels x 8 B x {transfers / 1e6:,.0f} MT/s"
        return Nominal(channels * 8 * transfers, of, words)
    clock_mhz, flags = number(machine.get("cpu_base_mhz")), words_of(machine.get("cpu_flags"))
    per_cycle = _flops_per_cycle(machine)
    dtype = key.partition("_gemm_")[0]
    cores = min((one for one in (number(machine.get("n_cores")), number(threads)) if one), default=None)
    if of not in ("cpu", "amx") or "_gemm_" not in key or not clock_mhz or per_cycle is None or cores is None:
        return None
    if of == "amx":
        per_cycle = AMX_BF16_FLOPS_PER_CYCLE
    elif dtype == "bf16" and "avx512_bf16" in flags:
        per_cycle *= BF16_FACTOR
    elif dtype != "fp32":
        return None
    words = f"derived: {cores:g} cores x {per_cycle:g} FLOP a cycle x {clock_mhz / 1e3:g} GHz base clock"
    return Nominal(cores * per_cycle * clock_mhz * 1e6, of, words)


def _flops_per_cycle(machine: Mapping[str, Any]) -> float | None:
    """fp32 FLOP a cycle and core by the instruction sets of a processor, null where they are not known."""
    who, flags = (str(machine.get("cpu_vendor")), str(machine.get("cpu_family"))), words_of(machine.get("cpu_flags"))
    if "avx512f" in flags and (*who, "avx512f") in FP32_FLOPS_PER_CYCLE:
        return FP32_FLOPS_PER_CYCLE[*who, "avx512f"]
    return FP32_FLOPS_PER_CYCLE.get(who) if "avx2" in flags else None


def _against_peers(capture: Capture, key: str, value: float, peers: Sequence[LatencyModel]) -> Item | None:
    """A CPU's rate against that of shipped captures of the same processor: GEMMs by thread, memory and times where as
    many threads computed. Null where there are none."""
    threads = capture.manifest["settings"].get("threads")
    least, who = None, ""
    for model in peers:
        found, n_peer = model.profile.quantities.get(key), model.profile.first("n_cores_count")
        if found is None or n_peer is None or not threads:
            continue
        scale = float(threads) / n_peer[1].value
        is_alike = "_gemm_" in key or (scale == 1 and (key != "call_overhead_ns" or model.dtype == capture.dtype))
        if not is_alike:
            continue
        expected = found.value * (scale if "_gemm_" in key else 1.0)
        share = expected / value if key.endswith("_ns") else value / expected
        if least is None or share > least:
            least, who = share, f"{text.figure(key, expected)} in {model.profile.name}"
    if least is None:
        return None
    limit = 1 - apart_frac(key, SAME)
    kind = "time" if key.endswith("_ns") else "cpu gemm" if "_gemm_" in key else "cpu memory"
    words = (
        f"{text.figure(key, value)}, and the same processor {who} ({text.frac(least)}); sound from {text.frac(limit)}"
    )
    return held(RATES, _short(key), words, least, limit, NEXT[kind])


def _instruction_sets(capture: Capture) -> list[Item]:
    """Whether a CPU's fp32 and bf16 rates stand to each other as its instruction sets make them: no datasheet and no
    clock is needed to see that one of them does not use the registers or the instructions there are."""
    machine, entries = capture.manifest["machine"], capture.manifest["calibration"]
    flags = words_of(machine.get("cpu_flags"))
    both = [entries.get(f"{dtype}_gemm_flops_per_s") for dtype in ("bf16", "fp32")]
    if _device(capture) != "cpu" or "avx512_bf16" not in flags or not all(both):
        return []
    ratio = float(both[0]["value"]) / float(both[1]["value"])
    rows = reached("fp32_gemm_flops_per_s", "cpu")
    room = rows[-1].frac / rows[0].frac  # how unlike two GEMMs may use what they have
    words = f"bf16 GEMMs run at {ratio:.2f}x the rate of fp32 ones, and at {BF16_FACTOR:g}x by their instruction sets"
    name = "bf16 beside fp32"
    low, high = ratio < BF16_FACTOR / room, ratio > BF16_FACTOR * room and "amx_bf16" not in flags
    if not low and not high:
        return [held(RATES, name, words, min(ratio / BF16_FACTOR, 1.0), 1 / room, ())]
    slow = "bf16 does without its instructions" if low else "fp32 does not use the width of its registers"
    frac = ratio / BF16_FACTOR if low else BF16_FACTOR / ratio
    return [Item(RATES, name, LOOK_AT, f"{words}: {slow}", (SOFTWARE,), frac, 1 / room)]

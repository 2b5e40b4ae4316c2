"""What this machine is, without saying whose: processor, caches, memory, versions. Never host, user or folder names.

Needs no torch; reads /proc and /sys and leaves null what a system does not tell.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

# The instruction sets that decide which GEMM kernels run.
FLAGS_OF_INTEREST = (
    "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd",
    "bf16", "i8mm", "sve", "sve2", "svebf16",
)  # fmt: skip
CPU_DIR = Path("/sys/devices/system/cpu")


def cpu_list() -> list[int]:
    """The logical processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _cpuinfo() -> Mapping[str, str]:
    """The first processor's entries of /proc/cpuinfo."""
    first = (_read(Path("/proc/cpuinfo")) or "").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def n_physical_cores() -> int:
    """Cores this process may use, hardware threads of one core counted once."""
    cpus = cpu_list()
    siblings = {_read(CPU_DIR / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return max(1, len(siblings))


def cache_bytes(level: int) -> int | None:
    """Bytes of the data or unified caches of a level that the usable processors reach, or null when unknown."""
    instances: dict[str, int] = {}
    for cpu in cpu_list():
        for index in sorted((CPU_DIR / f"cpu{cpu}/cache").glob("index*")):
            size = re.fullmatch(r"(\d+)K", _read(index / "size") or "")
            if _read(index / "level") == str(level) and _read(index / "type") != "Instruction" and size:
                instances[_read(index / "shared_cpu_list") or str(cpu)] = int(size[1]) * 1024
    return sum(instances.values()) or None


def last_level_cache_bytes() -> int | None:
    """The last-level cache the usable processors reach: level 3, or level 2 where there is none."""
    return cache_bytes(3) or cache_bytes(2)


def memory_bytes() -> int | None:
    """Memory of the machine, or the limit of the control group when that is lower; null when unknown."""
    total = re.search(r"MemTotal:\s*(\d+) kB", _read(Path("/proc/meminfo")) or "")
    sizes = [int(total[1]) * 1024] if total else []
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        words = _read(Path("/sys/fs/cgroup") / limit) or ""
        sizes += [int(words)] if words.isdecimal() else []
    return min(sizes, default=None)


def available_bytes() -> int | None:
    """Memory that new allocations can take now, or null when unknown."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", _read(Path("/proc/meminfo")) or "")
    return int(found[1]) * 1024 if found else None


def load_average() -> float | None:
    """Mean number of running processes over the last minute, or null when unknown."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def others_busy_s() -> float | None:
    """Processor seconds that everything but this process has used since the machine started, or null when unknown."""
    first = (_read(Path("/proc/stat")) or "").split("\n")[0].split()
    if len(first) < 9 or first[0] != "cpu":
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(ticks) for ticks in first[1:9])
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def machine(threads: int) -> dict[str, object]:
    """The machine part of capture.json."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu_model": info.get("model name") or platform.machine(),
        "cpu_vendor": info.get("vendor_id"),
        "cpu_family": info.get("cpu family"),
        "cpu_model_number": info.get("model"),
        "n_cores": n_physical_cores(),
        "n_logical_cpus": len(cpu_list()),
        "n_threads": threads,
        "cpu_flags": [flag for flag in FLAGS_OF_INTEREST if flag in flags],
        "l2_bytes": cache_bytes(2),
        "l3_bytes": cache_bytes(3),
        "memory_bytes": memory_bytes(),
        "n_numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or None,
        "hypervisor": "hypervisor" in flags if flags else None,
    }


def software() -> dict[str, object]:
    """The software part of capture.json; torch's build is added by the process that imports torch."""
    try:
        torch_version: str | None = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch_version = None
    return {
        "python": platform.python_version(),
        "torch": torch_version,
        "numpy": metadata.version("numpy"),
        "kernel_release": platform.release(),
        "platform": f"{sys.platform}-{platform.machine()}",
    }


def gpu_smi(uuid: str) -> dict[str, object]:
    """What nvidia-smi says of one GPU: driver, power limit, link; empty when it cannot be asked. The id is not kept."""
    fields = {
        "driver": "driver_version",
        "power_limit_watts": "power.limit",
        "pcie_gen_max": "pcie.link.gen.max",
        "pcie_width_max": "pcie.link.width.max",
        "sm_clock_max_mhz": "clocks.max.sm",
    }
    query = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer.strip().split(",")]
    return {key: value for key, value in zip(fields, values, strict=False) if value and not value.startswith("[")}

"""What this machine is, without saying whose: processor, caches, memory, versions. Never host, user or folder names.

Needs no torch; reads /proc and /sys and leaves null what a system does not tell.
"""

import os
import platform
import re
import socket
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from .memory_modules import memory_modules
from .smi import gpu_smi

__all__ = ["available_bytes", "gpu_smi", "machine", "memory_bytes", "software"]

# The instruction sets that decide which GEMM kernels run.
FLAGS_OF_INTEREST = (
    "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd",
    "bf16", "i8mm", "sve", "sve2", "svebf16",
)  # fmt: skip
CPU_DIR, NODE_DIR = Path("/sys/devices/system/cpu"), Path("/sys/devices/system/node")
DMI_DIR, DMI_TABLE = Path("/sys/class/dmi/id"), Path("/sys/firmware/dmi/tables/DMI")
GROUP_DIR, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
EDAC_DIR = Path("/sys/devices/system/edac/mc")
# What /proc/cpuinfo of an Arm processor calls (implementer, part); Arm's own names.
ARM_CORES = {
    ("0x41", "0xd0c"): "Arm Neoverse N1", ("0x41", "0xd40"): "Arm Neoverse V1", ("0x41", "0xd49"): "Arm Neoverse N2",
    ("0x41", "0xd4f"): "Arm Neoverse V2",
}  # fmt: skip


def cpu_list() -> list[int]:
    """The logical processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


CPUS_AT_START = tuple(cpu_list())
ENOUGH_NEAR = 16  # processors of a memory node, or half of all


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


def _core_of(cpu: int) -> str:
    return _read(CPU_DIR / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu)


def cpus_by_core() -> list[int]:
    """The logical processors this process may use: one of each core, then the second of each, and so on."""
    place: dict[str, int] = {}
    order = []
    for cpu in cpu_list():
        core = _core_of(cpu)
        place[core] = place.get(core, 0) + 1
        order.append((place[core], cpu))
    return [cpu for _, cpu in sorted(order)]


def n_physical_cores() -> int:
    """Cores this process may use, hardware threads of one core counted once; no more than its group's processor time.

    A group of 16 cores' time on a machine of 112 sees all of them, and that many threads would wait for their turns.
    """
    n_cores = len({_core_of(cpu) for cpu in cpu_list()})
    return max(1, min(n_cores, int(cpu_quota_cores() or n_cores)))


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


def _of_groups(controller: str, name: str, name_v1: str) -> list[tuple[Path, str]]:
    """Folder and text of a file of this process's control group and of those around it, of either kind of group.

    A container sees its own group as the root; a batch job does not, and finds its limits further down.
    """
    bases = {GROUP_DIR: name, GROUP_DIR / controller: name_v1}
    places = [(GROUP_DIR, ""), (GROUP_DIR / controller, "")]
    for line in (_read(OWN_GROUPS) or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            places.append((GROUP_DIR, path))
        elif controller in controllers.split(","):
            places.append((GROUP_DIR / controller, path))
    folders = {
        base / part: bases[base]
        for base, path in places
        for part in (Path(path.strip("/")), *Path(path.strip("/")).parents)
    }
    return [(folder, words) for folder, file in folders.items() if (words := _read(folder / file))]


def memory_bytes() -> int | None:
    """Memory of the machine, or the limit of the control group when that is lower; null when unknown."""
    total = re.search(r"MemTotal:\s*(\d+) kB", _read(Path("/proc/meminfo")) or "")
    sizes = [int(total[1]) * 1024] if total else []
    limits = _of_groups("memory", "memory.max", "memory.limit_in_bytes")
    sizes += [int(words) for _, words in limits if words.isdecimal()]
    return min(sizes, default=None)


def available_bytes() -> int | None:
    """Memory that new allocations can take now, or less where a control group limits it; null when unknown."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", _read(Path("/proc/meminfo")) or "")
    sizes = [int(found[1]) * 1024] if found else []
    for folder, limit in _of_groups("memory", "memory.max", "memory.limit_in_bytes"):
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes") or ""
        if limit.isdecimal() and used.isdecimal():
            # Cached files count as used there and give way.
            cached = re.search(r"^inactive_file (\d+)", _read(folder / "memory.stat") or "", re.M)
            sizes.append(max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0)))
    return min(sizes, default=None)


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


def cpus_of(words: str) -> list[int]:
    """The numbers of a list as the kernel writes it: `0-2,8` is 0, 1, 2, 8; empty for no words."""
    found: list[int] = []
    for part in words.split(",") if words.strip() else []:
        first, _, last = part.strip().partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def cpus_of_node(node: int) -> list[int]:
    """The logical processors of a memory node that this process might use when it began; empty when there are none."""
    return sorted(set(cpus_of(_read(NODE_DIR / f"node{node}/cpulist") or "")) & set(CPUS_AT_START))


def stay_near(node: int) -> None:
    """Keep this process, threads to come included, on the processors of a memory node, where it has enough of them.

    Pinned memory then lies where the GPU hangs, and not on a node of chance. A container may have a few processors
    there and most elsewhere: experts that the host computes need those more.
    """
    near = cpus_of_node(node)
    if hasattr(os, "sched_setaffinity") and len(near) >= min(ENOUGH_NEAR, len(CPUS_AT_START) / 2) and near:
        os.sched_setaffinity(0, near)


def numa_nodes() -> list[dict[str, object]]:
    """Memory nodes with their processors, how many of them this process may use, and their bytes (null: not told)."""
    found: list[dict[str, object]] = []
    for folder in sorted(NODE_DIR.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        total = re.search(r"MemTotal:\s*(\d+) kB", _read(folder / "meminfo") or "")
        cpus = cpus_of(_read(folder / "cpulist") or "")
        found.append(
            {
                "node": int(folder.name[4:]),
                "n_cpus": len(cpus),
                "n_usable_cpus": len(set(cpus) & set(CPUS_AT_START)),
                "memory_bytes": int(total[1]) * 1024 if total else None,
            }
        )
    return found


def n_nodes_in_use() -> int:
    """Memory nodes with processors that this process may use now; 1 when the system does not tell."""
    mine = set(cpu_list())
    lists = (_read(folder / "cpulist") or "" for folder in NODE_DIR.glob("node[0-9]*"))
    return max(1, sum(bool(mine & set(cpus_of(words))) for words in lists))


def pci_link(domain: int, bus: int, device: int) -> dict[str, object]:
    """The memory node a PCI device hangs on and its widest link, from sysfs; null: not told. The id is not kept."""
    folder = Path(f"/sys/bus/pci/devices/{domain:04x}:{bus:02x}:{device:02x}.0")
    node, width = _read(folder / "numa_node") or "", _read(folder / "max_link_width") or ""
    speed = re.match(r"[\d.]+", _read(folder / "max_link_speed") or "")
    return {
        "gpu_numa_node": int(node) if node.isdecimal() else None,  # -1: the system does not say
        "pcie_max_transfers_per_s": float(speed[0]) * 1e9 if speed else None,
        "pcie_max_lanes": int(width) if width.isdecimal() and width not in ("0", "255") else None,
    }


def cpu_quota_cores() -> float | None:
    """Processor time of the control group in cores, or null when it has no limit or does not tell."""
    found = []
    for folder, words in _of_groups("cpu", "cpu.max", "cpu.cfs_quota_us"):
        quota, _, period = words.partition(" ")
        period = period or _read(folder / "cpu.cfs_period_us") or ""
        if quota.isdecimal() and period.isdecimal():  # `max` and -1 are no limit
            found.append(int(quota) / int(period))
    return min(found, default=None)


def _cpu_model(info: Mapping[str, str]) -> str:
    arm = ARM_CORES.get((info.get("CPU implementer", ""), info.get("CPU part", "")))
    return info.get("model name") or arm or platform.machine()


def _bracketed(path: Path) -> str | None:
    chosen = re.search(r"\[(\w+)\]", _read(path) or "")
    return chosen[1] if chosen else None


def _product(name: str) -> str | None:
    """Maker or product of the system; null when it would name the host."""
    words = _read(DMI_DIR / name)
    return words if words and socket.gethostname().lower() not in words.lower() else None


def _setting(path: str) -> str | None:
    return _read(Path(path)) or None


def _mhz(name: str) -> float | None:
    words = _read(CPU_DIR / f"cpu{cpu_list()[0]}/cpufreq/{name}") or ""
    return int(words) / 1000 if words.isdecimal() else None


def machine(threads: int) -> dict[str, object]:
    """The machine part of capture.json."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu_model": _cpu_model(info),
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
        "n_numa_nodes": len(list(NODE_DIR.glob("node[0-9]*"))) or None,
        "hypervisor": "hypervisor" in flags if flags else None,
        "hypervisor_kind": _setting("/sys/hypervisor/type"),
        "numa_nodes": numa_nodes(),
        "smt": {"1": True, "0": False}.get(_read(CPU_DIR / "smt/active") or ""),
        "cpu_quota_cores": cpu_quota_cores(),
        "cpu_governor": _read(CPU_DIR / f"cpu{cpu_list()[0]}/cpufreq/scaling_governor"),
        "cpu_max_mhz": _mhz("cpuinfo_max_freq"),
        "cpu_base_mhz": _mhz("base_frequency"),
        "transparent_huge_pages": _bracketed(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "numa_balancing": _setting("/proc/sys/kernel/numa_balancing"),
        "system_vendor": _product("sys_vendor"),
        "system_product": _product("product_name"),
        **memory_modules(EDAC_DIR, DMI_TABLE),
    }


def gpu(device: str) -> dict[str, object]:
    """The GPU's entries of the machine part; empty on the CPU. Imports torch on CUDA."""
    from . import gpu as of_gpu

    return of_gpu.gpu(device)


def torch_build() -> dict[str, object]:
    """How this torch was built, as far as it decides which kernels run, and its CUDA libraries. Imports torch."""
    import torch

    from . import gpu as of_gpu

    return {
        "torch_mkldnn": torch.backends.mkldnn.is_available(),
        "torch_mkl": torch.backends.mkl.is_available(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **of_gpu.cuda_software(),
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

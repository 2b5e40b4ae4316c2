"""Virtual memory of the CUDA driver through ctypes: one address range whose pages lie on the GPU or in host memory.

Physical memory is made in granules, kept in a pool, and mapped piece by piece into ranges; a range is what a kernel
sees as one tensor. Imports no torch: whoever calls it has made a CUDA context current on this thread.
"""

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Values of cuda.h, the same from CUDA 12.2 to 13.
PINNED_ALLOCATION = 1
LOCATION_DEVICE, LOCATION_HOST, LOCATION_HOST_NUMA = 1, 2, 3
ACCESS_READ_WRITE = 3
GRANULARITY_MINIMUM, GRANULARITY_RECOMMENDED = 0, 1
HAS_VIRTUAL_MEMORY, NUMA_CONFIG, NUMA_ID, HOST_NUMA_ID = 102, 130, 131, 134
PAGEABLE_MEMORY_ACCESS = 88
SET_PREFERRED_LOCATION, DEVICE_CPU = 3, -1
LARGEST_GRANULE_BYTES = 1 << 26  # larger pages would put several experts into one


class CudaDriverError(OSError):
    """A call of the CUDA driver failed; the message names the call and the driver's own name of the error."""


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Flags(ctypes.Structure):
    _fields_ = (
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("win32", ctypes.c_void_p),
        ("flags", _Flags),
    )


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", ctypes.c_int))


def load_library() -> Any:
    """The driver's library; raises CudaDriverError where there is none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise CudaDriverError(f"there is no CUDA driver library: {error}") from None


class Driver:
    """The few driver calls that are needed, each of which raises CudaDriverError when it fails."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def _do(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name, None)
        if function is None:
            raise CudaDriverError(f"this CUDA driver has no {name}")
        if code := function(*arguments):
            words = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(words))
            raise CudaDriverError(f"{name} failed: {(words.value or b'unknown error').decode()} ({code})")

    def attribute(self, number: int, device: int) -> int:
        """One CUdevice_attribute of a device."""
        value, handle = ctypes.c_int(), ctypes.c_int()
        self._do("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
        self._do("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), handle)
        return value.value

    @staticmethod
    def _properties(location: Location) -> Properties:
        return Properties(PINNED_ALLOCATION, 0, location, None, _Flags())

    def granule_bytes(self, location: Location, which: int = GRANULARITY_RECOMMENDED) -> int:
        """The unit in which physical memory is made and mapped there, recommended or the smallest."""
        size, properties = ctypes.c_size_t(), self._properties(location)
        option = ctypes.c_int(which)
        self._do("cuMemGetAllocationGranularity", ctypes.byref(size), ctypes.byref(properties), option)
        return size.value

    def create(self, n_bytes: int, location: Location) -> int:
        """Physical memory somewhere; returns its handle."""
        handle, properties = ctypes.c_uint64(), self._properties(location)
        flags = ctypes.c_uint64(0)
        self._do("cuMemCreate", ctypes.byref(handle), ctypes.c_size_t(n_bytes), ctypes.byref(properties), flags)
        return handle.value

    def release(self, handle: int) -> None:
        """Give physical memory back; it goes when it is also unmapped."""
        self._do("cuMemRelease", ctypes.c_uint64(handle))

    def reserve(self, n_bytes: int, alignment_bytes: int) -> int:
        """An address range without memory; returns where it begins."""
        address = ctypes.c_uint64()
        self._do(
            "cuMemAddressReserve", ctypes.byref(address), ctypes.c_size_t(n_bytes), ctypes.c_size_t(alignment_bytes),
            ctypes.c_uint64(0), ctypes.c_uint64(0),
        )  # fmt: skip
        return address.value

    def free(self, address: int, n_bytes: int) -> None:
        """Give an address range back; nothing may be mapped in it."""
        self._do("cuMemAddressFree", ctypes.c_uint64(address), ctypes.c_size_t(n_bytes))

    def map(self, address: int, n_bytes: int, handle: int) -> None:
        """Put physical memory behind addresses."""
        size, offset, flags = ctypes.c_size_t(n_bytes), ctypes.c_size_t(0), ctypes.c_uint64(0)
        self._do("cuMemMap", ctypes.c_uint64(address), size, offset, ctypes.c_uint64(handle), flags)

    def unmap(self, address: int, n_bytes: int) -> None:
        """Take the physical memory away from addresses."""
        self._do("cuMemUnmap", ctypes.c_uint64(address), ctypes.c_size_t(n_bytes))

    def keep_on_host(self, address: int, n_bytes: int) -> None:
        """Ask the driver not to move plain system memory to the device, however often kernels read it."""
        advice, place = ctypes.c_int(SET_PREFERRED_LOCATION), ctypes.c_int(DEVICE_CPU)
        self._do("cuMemAdvise", ctypes.c_uint64(address), ctypes.c_size_t(n_bytes), advice, place)

    def allow(self, address: int, n_bytes: int, device: int) -> None:
        """Let a device read and write a mapped range."""
        access = Access(Location(LOCATION_DEVICE, device), ACCESS_READ_WRITE)
        size, count = ctypes.c_size_t(n_bytes), ctypes.c_size_t(1)
        self._do("cuMemSetAccess", ctypes.c_uint64(address), size, ctypes.byref(access), count)


@dataclass(frozen=True)
class Range:
    """Addresses with memory behind them: one device granule in front, then `granules` (handle, is on the host)."""

    address: int
    granule_bytes: int
    granules: tuple[tuple[int, bool], ...]
    fresh: frozenset[int]  # places of granules that nothing was ever written to

    @property
    def n_bytes(self) -> int:
        """Size of the whole range."""
        return self.granule_bytes * len(self.granules)


class VirtualMemory:
    """Granules of one device and its host, reused by one range after another."""

    def __init__(self, driver: Driver, device: int, host: Location, granule_bytes: int) -> None:
        self.driver, self.device, self.host, self.granule_bytes = driver, device, host, granule_bytes
        self._location = {False: Location(LOCATION_DEVICE, device), True: host}
        self._idle: dict[bool, list[int]] = {False: [], True: []}
        self._n_made = {False: 0, True: 0}

    def made_bytes(self, on_host: bool) -> int:
        """Physical memory held there, in use or idle."""
        return self._n_made[on_host] * self.granule_bytes

    def idle_bytes(self, on_host: bool) -> int:
        """Physical memory held there that no range uses."""
        return len(self._idle[on_host]) * self.granule_bytes

    def _take(self, on_host: bool) -> tuple[int, bool]:
        """A granule's handle and whether it is new."""
        if self._idle[on_host]:
            return self._idle[on_host].pop(), False
        handle = self.driver.create(self.granule_bytes, self._location[on_host])
        self._n_made[on_host] += 1
        return handle, True

    def map(self, on_host: Sequence[bool]) -> Range:
        """A range with a device granule in front and then one granule on the host or the device for each entry.

        The first one is there because torch asks the driver which device an address belongs to. Raises CudaDriverError,
        and then leaves nothing mapped or reserved.
        """
        places = (False, *on_host)
        size = self.granule_bytes
        address = self.driver.reserve(size * len(places), size)
        taken: list[tuple[int, bool]] = []
        fresh: set[int] = set()
        n_mapped = 0
        try:
            for place, is_host in enumerate(places):
                handle, is_new = self._take(is_host)
                taken.append((handle, is_host))
                if is_new:
                    fresh.add(place)
                self.driver.map(address + place * size, size, handle)
                n_mapped += 1
            first = 0
            for place in range(1, len(places) + 1):  # neighbours in one memory get access in one call
                if place == len(places) or places[place] != places[first]:
                    self.driver.allow(address + first * size, (place - first) * size, self.device)
                    first = place
        except OSError:
            self._take_apart(address, len(places), n_mapped)
            self._give_back(taken, frozenset(fresh))
            raise
        return Range(address, size, tuple(taken), frozenset(fresh))

    def _take_apart(self, address: int, n_granules: int, n_mapped: int) -> None:
        for place in range(n_mapped):
            self.driver.unmap(address + place * self.granule_bytes, self.granule_bytes)
        self.driver.free(address, n_granules * self.granule_bytes)

    def unmap(self, mapped: Range, is_filled: bool = True) -> None:
        """Take a range apart; its granules are idle again, or gone where they were new and not filled.

        No kernel may still use it.
        """
        self._take_apart(mapped.address, len(mapped.granules), len(mapped.granules))
        self._give_back(mapped.granules, frozenset() if is_filled else mapped.fresh)

    def _give_back(self, granules: Sequence[tuple[int, bool]], unwritten: frozenset[int]) -> None:
        # What was never written to must not come back as if it had been.
        for place, (handle, is_host) in enumerate(granules):
            if place in unwritten:
                self.driver.release(handle)
                self._n_made[is_host] -= 1
            else:
                self._idle[is_host].append(handle)

    def trim(self, keep_device_bytes: int = 0, keep_host_bytes: int = 0) -> None:
        """Give idle granules back, all but so many bytes in each memory."""
        for is_host, keep_bytes in ((False, keep_device_bytes), (True, keep_host_bytes)):
            handles = self._idle[is_host]
            while len(handles) * self.granule_bytes > keep_bytes:
                self.driver.release(handles.pop())
                self._n_made[is_host] -= 1


def _node_numbers(path: Path) -> list[int]:
    """Numbers such as `0-1,3`; none where the system does not tell."""
    try:
        words = path.read_text(encoding="utf-8").strip()
        ends = [part.partition("-") for part in words.split(",") if part]
        return [node for first, _, last in ends for node in range(int(first), int(last or first) + 1)]
    except (OSError, ValueError):
        return []


def memory_nodes(folder: Path = Path("/sys/devices/system/node")) -> list[int]:
    """The host's memory nodes: those with memory and processors, since on coherent machines the GPU's is a node too."""
    with_processors = _node_numbers(folder / "has_cpu")
    return [node for node in _node_numbers(folder / "has_memory") if node in with_processors or not with_processors]


def open_virtual_memory(driver: Driver, device: int) -> VirtualMemory:
    """Virtual memory over a device and the host memory nearest to it; raises CudaDriverError where that cannot be.

    Host memory on a node needs a driver of CUDA 12.2 or later, host memory anywhere one of CUDA 13; containers may
    forbid some nodes. Whatever makes a granule is taken.
    """
    if not driver.attribute(HAS_VIRTUAL_MEMORY, device):
        raise CudaDriverError("this device has no virtual memory management")
    try:
        nearest = max(0, driver.attribute(HOST_NUMA_ID, device))
    except CudaDriverError:
        nearest = 0
    reasons = []
    nodes = [nearest, *(node for node in memory_nodes() if node != nearest)]
    for host in (*(Location(LOCATION_HOST_NUMA, node) for node in nodes), Location(LOCATION_HOST, 0)):
        try:
            places = (Location(LOCATION_DEVICE, device), host)
            sizes = [driver.granule_bytes(place) for place in places]
            if max(sizes) > LARGEST_GRANULE_BYTES:
                sizes = [driver.granule_bytes(place, GRANULARITY_MINIMUM) for place in places]
            if max(sizes) > LARGEST_GRANULE_BYTES:
                raise CudaDriverError(f"memory comes in pieces of {max(sizes)} bytes")
            driver.release(driver.create(max(sizes), host))
        except CudaDriverError as error:
            reasons.append(str(error))
            continue
        return VirtualMemory(driver, device, host, max(sizes))
    words = "; ".join(dict.fromkeys(reasons))
    raise CudaDriverError(f"no host memory can be mapped beside device memory: {words}")

"""A CUDA driver library made up for tests: virtual memory management over real pages of this process.

Addresses are reserved, granules are pages of an anonymous file, and mapping puts them behind addresses, which nobody
can touch before access was allowed or after they were unmapped: a mistake ends the process, as it would the kernel.
Error codes are those of cuda.h.
"""

import ctypes
import os

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, INVALID_DEVICE = 0, 1, 2, 101
NAMES = {1: b"CUDA_ERROR_INVALID_VALUE", 2: b"CUDA_ERROR_OUT_OF_MEMORY", 101: b"CUDA_ERROR_INVALID_DEVICE"}
NO_ACCESS, READ_WRITE = 0, 3  # PROT_NONE, PROT_READ | PROT_WRITE
SHARED, PRIVATE, FIXED, ANONYMOUS, NO_RESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
# Of cuda.h: virtual memory management, NUMA id of the host's memory; all others are 0, NUMA ids of a GPU -1.
ATTRIBUTES = {102: 1, 134: 0, 131: -1}
COHERENT = {88: 1, 100: 1, 102: 1, 130: 1, 131: 0, 134: 0}  # and reads plain memory; both memories are node 0
FAILED = ctypes.c_void_p(-1).value


def _plain(argument):
    return argument.value if hasattr(argument, "value") else argument


class Driver:
    """The library; `leaks()` says what was not given back. `most_bytes` is what each memory holds."""

    def __init__(self, is_coherent: bool = False, granule_bytes: int = 1 << 16, most_bytes: int = 1 << 31) -> None:
        self.granule_bytes, self.most_bytes = granule_bytes, most_bytes
        self.attributes = COHERENT if is_coherent else ATTRIBUTES
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = (
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
        )  # fmt: skip
        self._libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self._libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._file, self._file_bytes = os.memfd_create("granules"), 0
        self.handles: dict[int, tuple[int, int, int]] = {}  # handle -> offset in the file, bytes, location type
        self.ranges: dict[int, tuple[int, int, int]] = {}  # first address -> bytes, what mmap gave and its bytes
        self.mapped: dict[int, tuple[int, int]] = {}  # address -> bytes, handle
        self.allowed: set[int] = set()
        self.n_mapped_ever = 0
        self._n_handles = 0

    def _mmap(self, address, n_bytes, access, flags, file=-1, offset=0):
        found = self._libc.mmap(address, n_bytes, access, flags, file, offset)
        assert found != FAILED, os.strerror(ctypes.get_errno())
        return found

    # --- what the library exports ---

    def cuInit(self, flags):
        return SUCCESS

    def cuDriverGetVersion(self, value):
        value._obj.value = 13000
        return SUCCESS

    def cuGetErrorName(self, code, words):
        words._obj.value = NAMES[_plain(code)]
        return SUCCESS

    def cuDeviceGet(self, handle, ordinal):
        handle._obj.value = 0
        return SUCCESS if _plain(ordinal) == 0 else INVALID_DEVICE

    def cuDeviceGetAttribute(self, value, attribute, device):
        if _plain(device) != 0:
            return INVALID_DEVICE
        value._obj.value = self.attributes.get(_plain(attribute), 0)
        return SUCCESS

    def _is_place(self, location):
        return location.type in (1, 3) and location.id == 0  # device 0 or the host's memory node 0

    def cuMemGetAllocationGranularity(self, size, properties, option):
        if not self._is_place(properties._obj.location) or _plain(option) not in (0, 1):
            return INVALID_VALUE
        size._obj.value = self.granule_bytes
        return SUCCESS

    def cuMemCreate(self, handle, size, properties, flags):
        n_bytes, wanted = _plain(size), properties._obj
        if n_bytes % self.granule_bytes or not n_bytes or _plain(flags) or wanted.type != 1:
            return INVALID_VALUE
        if not self._is_place(wanted.location) or wanted.handle_types:
            return INVALID_VALUE
        if self.held_bytes(wanted.location.type) + n_bytes > self.most_bytes:
            return OUT_OF_MEMORY
        self._n_handles += 1
        handle._obj.value = self._n_handles
        self.handles[self._n_handles] = self._file_bytes, n_bytes, wanted.location.type
        self._file_bytes += n_bytes  # never used again: new memory holds zeros
        os.ftruncate(self._file, self._file_bytes)
        return SUCCESS

    def cuMemRelease(self, handle):
        return SUCCESS if self.handles.pop(_plain(handle), None) else INVALID_VALUE

    def cuMemAddressReserve(self, address, size, alignment, wanted, flags):
        n_bytes, step = _plain(size), max(_plain(alignment), self.granule_bytes)
        if n_bytes % self.granule_bytes or not n_bytes or step & (step - 1) or _plain(flags):
            return INVALID_VALUE
        whole = self._mmap(None, n_bytes + step, NO_ACCESS, PRIVATE | ANONYMOUS | NO_RESERVE)
        first = -(-whole // step) * step
        address._obj.value = first
        self.ranges[first] = n_bytes, whole, n_bytes + step
        return SUCCESS

    def cuMemAddressFree(self, address, size):
        first, n_bytes = _plain(address), _plain(size)
        if self.ranges.get(first, (0,))[0] != n_bytes or any(first <= a < first + n_bytes for a in self.mapped):
            return INVALID_VALUE
        _, whole, whole_bytes = self.ranges.pop(first)
        assert self._libc.munmap(whole, whole_bytes) == 0
        return SUCCESS

    def cuMemMap(self, address, size, offset, handle, flags):
        first, n_bytes, granule = _plain(address), _plain(size), self.handles.get(_plain(handle))
        is_inside = any(start <= first and first + n_bytes <= start + r[0] for start, r in self.ranges.items())
        if granule is None or granule[1] != n_bytes or _plain(offset) or _plain(flags) or not is_inside:
            return INVALID_VALUE
        if first % self.granule_bytes or any(a < first + n_bytes and first < a + m[0] for a, m in self.mapped.items()):
            return INVALID_VALUE
        self._mmap(first, n_bytes, NO_ACCESS, SHARED | FIXED, self._file, granule[0])
        self.mapped[first] = n_bytes, _plain(handle)
        self.n_mapped_ever += 1
        return SUCCESS

    def cuMemUnmap(self, address, size):
        first, n_bytes = _plain(address), _plain(size)
        inside = [a for a in self.mapped if first <= a < first + n_bytes]
        if not inside or sum(self.mapped[a][0] for a in inside) != n_bytes:
            return INVALID_VALUE
        for one in inside:
            del self.mapped[one]
            self.allowed.discard(one)
        self._mmap(first, n_bytes, NO_ACCESS, PRIVATE | ANONYMOUS | NO_RESERVE | FIXED)
        return SUCCESS

    def cuMemSetAccess(self, address, size, access, count):
        first, n_bytes, wanted = _plain(address), _plain(size), access._obj
        inside = [a for a in self.mapped if first <= a < first + n_bytes]
        if _plain(count) != 1 or wanted.flags != 3 or (wanted.location.type, wanted.location.id) != (1, 0):
            return INVALID_VALUE
        if not inside or sum(self.mapped[a][0] for a in inside) != n_bytes:
            return INVALID_VALUE
        assert self._libc.mprotect(first, n_bytes, READ_WRITE) == 0
        self.allowed.update(inside)
        return SUCCESS

    # --- for tests ---

    def held_bytes(self, location_type: int) -> int:
        """Physical memory made and not released in one memory: 1 the device's, 3 the host's."""
        return sum(n_bytes for _, n_bytes, kind in self.handles.values() if kind == location_type)

    def knows(self, address: int, n_bytes: int) -> bool:
        """Whether a range is mapped and may be touched from beginning to end."""
        covered = sum(min(address + n_bytes, a + self.mapped[a][0]) - max(address, a) for a in self.allowed
                      if a < address + n_bytes and address < a + self.mapped[a][0])  # fmt: skip
        return covered == n_bytes

    def leaks(self) -> list[str]:
        """What is still mapped, reserved or held; empty when all was given back."""
        found = [f"{len(self.mapped)} granules mapped"] if self.mapped else []
        found += [f"{len(self.ranges)} ranges reserved"] if self.ranges else []
        return found + ([f"{len(self.handles)} granules held"] if self.handles else [])

    def lose_all(self) -> None:
        """What the end of a process gives back."""
        for first, (n_bytes, whole, whole_bytes) in list(self.ranges.items()):
            inside = [a for a in self.mapped if first <= a < first + n_bytes]
            for one in inside:
                del self.mapped[one]
            assert self._libc.munmap(whole, whole_bytes) == 0
        self.ranges.clear()
        self.handles.clear()
        self.allowed.clear()

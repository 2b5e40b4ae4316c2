"""Virtual memory of the CUDA driver on a made-up driver that checks what it is asked and can refuse."""

import ctypes

import pytest

from collectors.driver import (
    HAS_VIRTUAL_MEMORY,
    HOST_NUMA_ID,
    LOCATION_DEVICE,
    LOCATION_HOST,
    LOCATION_HOST_NUMA,
    Access,
    CudaDriverError,
    Driver,
    Properties,
    VirtualMemory,
    memory_nodes,
    open_virtual_memory,
)

GRANULE = 1 << 21
NAMES = {1: b"CUDA_ERROR_INVALID_VALUE", 2: b"CUDA_ERROR_OUT_OF_MEMORY", 801: b"CUDA_ERROR_NOT_SUPPORTED"}


class MadeLibrary:
    """The driver's functions over dictionaries; `refuse` maps a function to (how many calls succeed first, code)."""

    def __init__(self, attributes=None, granule_bytes=GRANULE, host_kinds=(LOCATION_HOST_NUMA,)):
        self.granule_bytes, self.host_kinds = granule_bytes, host_kinds
        self.attributes = {HAS_VIRTUAL_MEMORY: 1, HOST_NUMA_ID: 1, **(attributes or {})}
        self.smallest_bytes: int | None = None  # of a granule; null: as recommended
        self.forbidden: set[int] = set()  # memory nodes
        self.refuse: dict[str, tuple[int, int]] = {}
        self.handles: dict[int, tuple[int, int]] = {}  # handle: (kind, id) of its place
        self.ranges: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.allowed: set[int] = set()
        self.next = 0x7F0000000000 // GRANULE

    def _refused(self, name):
        n_left, code = self.refuse.get(name, (1, 0))
        if name in self.refuse:
            self.refuse[name] = (n_left - 1, code)
        return code if n_left <= 0 else 0

    def _made_at(self, properties):
        assert properties.type == 1 and properties.handle_types == 0 and not properties.win32
        return properties.location.type, properties.location.id

    def cuGetErrorName(self, code, words):
        words._obj.value = NAMES[code.value]
        return 0

    def cuDeviceGet(self, handle, ordinal):
        handle._obj.value = ordinal.value
        return 0

    def cuDeviceGetAttribute(self, value, number, device):
        if number.value not in self.attributes:
            return 1
        value._obj.value = self.attributes[number.value]
        return 0

    def cuMemGetAllocationGranularity(self, size, properties, option):
        kind, _ = self._made_at(properties._obj)
        if kind != LOCATION_DEVICE and kind not in self.host_kinds:
            return 1
        size._obj.value = self.granule_bytes if option.value == 1 else self.smallest_bytes or self.granule_bytes
        return 0

    def cuMemCreate(self, handle, size, properties, flags):
        kind, number = self._made_at(properties._obj)
        if code := self._refused("cuMemCreate"):
            return code
        if kind != LOCATION_DEVICE and (kind not in self.host_kinds or number in self.forbidden):
            return 801
        assert size.value == (self.smallest_bytes or self.granule_bytes) and flags.value == 0
        self.next += 1
        self.handles[self.next] = kind, number
        handle._obj.value = self.next
        return 0

    def cuMemRelease(self, handle):
        assert handle.value not in self.mapped.values(), "released while it is mapped"
        del self.handles[handle.value]
        return 0

    def cuMemAddressReserve(self, address, size, alignment, wanted, flags):
        if code := self._refused("cuMemAddressReserve"):
            return code
        assert size.value % self.granule_bytes == 0 and size.value and flags.value == wanted.value == 0
        assert alignment.value == self.granule_bytes
        self.next += size.value // GRANULE + 1
        address._obj.value = self.next * GRANULE
        self.ranges[address._obj.value] = size.value
        return 0

    def cuMemAddressFree(self, address, size):
        assert self.ranges.pop(address.value) == size.value
        assert not any(address.value <= a < address.value + size.value for a in self.mapped), "freed while mapped"
        return 0

    def cuMemMap(self, address, size, offset, handle, flags):
        if code := self._refused("cuMemMap"):
            return code
        assert size.value == self.granule_bytes and offset.value == flags.value == 0
        assert address.value % self.granule_bytes == 0
        assert any(a <= address.value < a + n for a, n in self.ranges.items()), "mapped outside a range"
        assert address.value not in self.mapped and handle.value not in self.mapped.values(), "mapped twice"
        assert handle.value in self.handles
        self.mapped[address.value] = handle.value
        return 0

    def cuMemUnmap(self, address, size):
        assert size.value == self.granule_bytes
        del self.mapped[address.value]
        self.allowed.discard(address.value)
        return 0

    def cuMemSetAccess(self, address, size, access, count):
        if code := self._refused("cuMemSetAccess"):
            return code
        found = access._obj
        assert (found.location.type, found.location.id, found.flags, count.value) == (LOCATION_DEVICE, 0, 3, 1)
        pieces = range(address.value, address.value + size.value, self.granule_bytes)
        assert all(piece in self.mapped for piece in pieces)
        assert len({self.handles[self.mapped[piece]][0] for piece in pieces}) == 1
        self.allowed |= set(pieces)
        return 0


def test_structures_are_those_of_the_header():
    # sizeof and offsetof of cuda.h 13.0, printed by a compiler
    assert (ctypes.sizeof(Properties), ctypes.sizeof(Access)) == (32, 12)
    assert (Properties.location.offset, Properties.win32.offset, Properties.flags.offset) == (8, 16, 24)


def test_a_range_has_each_granule_where_it_was_asked_for():
    library = MadeLibrary()
    memory = open_virtual_memory(Driver(library), 0)
    assert memory.granule_bytes == GRANULE and not library.handles  # the trial granule is gone
    mapped = memory.map([True, False, False, True])
    assert mapped.n_bytes == 5 * GRANULE and mapped.fresh == {0, 1, 2, 3, 4}
    places = [library.handles[library.mapped[mapped.address + i * GRANULE]] for i in range(5)]
    on_device, on_host = (LOCATION_DEVICE, 0), (LOCATION_HOST_NUMA, 1)
    assert places == [on_device, on_host, on_device, on_device, on_host]
    assert library.allowed == {mapped.address + i * GRANULE for i in range(5)}
    assert (memory.made_bytes(False), memory.made_bytes(True)) == (3 * GRANULE, 2 * GRANULE)


def test_granules_are_used_again_and_all_given_back():
    library = MadeLibrary()
    memory = open_virtual_memory(Driver(library), 0)
    first, second = memory.map([True, True]), memory.map([False])
    memory.unmap(first)
    assert memory.idle_bytes(True) == 2 * GRANULE and len(library.handles) == 5
    third = memory.map([True, False, True, True])  # one host granule and one device granule more
    assert len(library.handles) == 7 and len(third.fresh) == 2
    memory.unmap(third)
    memory.unmap(second)
    assert not library.mapped and not library.ranges and len(library.handles) == 7
    memory.trim(keep_device_bytes=2 * GRANULE + 1, keep_host_bytes=GRANULE)
    assert (memory.idle_bytes(False), memory.idle_bytes(True)) == (2 * GRANULE, GRANULE)
    memory.trim()
    assert not library.handles
    assert memory.made_bytes(False) == memory.made_bytes(True) == memory.idle_bytes(True) == 0


def test_what_was_not_filled_does_not_come_back():
    library = MadeLibrary()
    memory = open_virtual_memory(Driver(library), 0)
    memory.unmap(memory.map([True]))
    mapped = memory.map([True, True])
    memory.unmap(mapped, is_filled=False)
    assert len(library.handles) == 2 and memory.idle_bytes(True) == memory.idle_bytes(False) == GRANULE


@pytest.mark.parametrize("name", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemAddressReserve"])
@pytest.mark.parametrize("n_succeed", range(3))
def test_a_refusal_in_the_middle_leaves_nothing_behind(name, n_succeed):
    library = MadeLibrary()
    memory = open_virtual_memory(Driver(library), 0)
    library.refuse[name] = (n_succeed if name != "cuMemAddressReserve" else 0, 2)
    with pytest.raises(CudaDriverError, match=rf"{name} failed: CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        memory.map([True, False, True, False])
    assert not library.mapped and not library.ranges and not library.handles
    assert memory.made_bytes(False) == memory.made_bytes(True) == 0
    library.refuse.clear()
    assert len(memory.map([True, False]).granules) == 3  # and it goes on


def test_the_kind_of_host_memory_that_works_is_taken():
    library = MadeLibrary(host_kinds=(LOCATION_HOST,))
    memory = open_virtual_memory(Driver(library), 0)
    mapped = memory.map([True])
    assert library.handles[library.mapped[mapped.address + GRANULE]] == (LOCATION_HOST, 0)
    with pytest.raises(CudaDriverError, match=r"no host memory can be mapped.*CUDA_ERROR_INVALID_VALUE"):
        open_virtual_memory(Driver(MadeLibrary(host_kinds=())), 0)


def test_other_nodes_are_tried_where_the_nearest_is_forbidden(monkeypatch, tmp_path):
    (tmp_path / "has_memory").write_text("0-1,3\n")
    assert memory_nodes(tmp_path) == [0, 1, 3]
    (tmp_path / "has_cpu").write_text("0-1\n")
    assert memory_nodes(tmp_path) == [0, 1]  # node 3 is a GPU's memory
    assert memory_nodes(tmp_path / "none") == []
    (tmp_path / "has_memory").write_text("what\n")
    assert memory_nodes(tmp_path) == []
    monkeypatch.setattr("collectors.driver.memory_nodes", lambda: [0, 1, 3])
    library = MadeLibrary()
    library.refuse["cuMemCreate"] = (0, 801)
    with pytest.raises(CudaDriverError, match="no host memory"):
        open_virtual_memory(Driver(library), 0)
    assert library.refuse["cuMemCreate"][0] == -3  # the nearest node 1, then 0 and 3; this driver knows no "anywhere"
    library.refuse.clear()
    library.forbidden = {1, 0}
    assert open_virtual_memory(Driver(library), 0).host.id == 3


def test_what_a_device_cannot_is_said():
    with pytest.raises(CudaDriverError, match="no virtual memory management"):
        open_virtual_memory(Driver(MadeLibrary({HAS_VIRTUAL_MEMORY: 0})), 0)
    with pytest.raises(CudaDriverError, match="pieces of 536870912 bytes"):
        open_virtual_memory(Driver(MadeLibrary(granule_bytes=1 << 29)), 0)
    library = MadeLibrary(granule_bytes=1 << 29)
    library.smallest_bytes = GRANULE
    assert open_virtual_memory(Driver(library), 0).granule_bytes == GRANULE
    library = MadeLibrary()
    del library.attributes[HOST_NUMA_ID]  # an older driver does not know the number
    assert isinstance(open_virtual_memory(Driver(library), 0), VirtualMemory)


def test_a_driver_that_lacks_a_call_says_so():
    class Old:
        pass

    with pytest.raises(CudaDriverError, match="this CUDA driver has no cuMemAddressReserve"):
        Driver(Old()).reserve(GRANULE, GRANULE)

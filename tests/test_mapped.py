"""What needs a GPU, on made-up parts: experts mapped by a made-up driver, calls recorded by a made-up graph."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from collectors.driver import CudaDriverError, Driver, open_virtual_memory
from perfmodel.errors import InputError
from tests.test_driver import MadeLibrary

torch = pytest.importorskip("torch", reason="torch is not installed")

from collectors import access, checks, graphs, layer, mapped, memory, points  # noqa: E402
from tests.test_access import OPS, made, pool_for  # noqa: E402

GRANULE = 1 << 14


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def library(monkeypatch):
    """A made-up driver with small granules under `mapped`, whose ranges are ordinary memory."""
    found = MadeLibrary(granule_bytes=GRANULE)
    made_memory = open_virtual_memory(Driver(found), 0)
    monkeypatch.setattr(mapped, "virtual_memory", lambda pool: made_memory)
    monkeypatch.setattr(access, "virtual_memory", lambda pool: made_memory)
    monkeypatch.setattr(mapped, "tensor_at", lambda address, n_bytes: torch.zeros(n_bytes, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    found.memory = made_memory
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_mapped_experts_are_strided_filled_computed_and_given_back(library, op, dtype):
    workload, _ = made(op=op, way=("zero-copy", "mapped"), dtype=dtype, hidden=80, inter=48)
    pool = pool_for(workload, cold_bytes=1.0)
    copies, close, facts = access._mapped(pool, workload)
    assert len(copies) == memory.n_positions(workload, 1.0) == 2
    for matrix, (n, k), stride_bytes in zip(
        copies[0], memory.matrices(workload), facts["expert_stride_bytes"], strict=True
    ):
        assert tuple(matrix.shape) == (8, n, k)
        per_expert = -(-n * k * matrix.element_size() // GRANULE)
        assert matrix.stride() == (per_expert * GRANULE // matrix.element_size(), k, 1)
        assert stride_bytes == per_expert * GRANULE
        assert matrix.storage_offset() == GRANULE // matrix.element_size()  # behind the granule of the device
        assert all(float(expert.float().std()) > 0.01 for expert in matrix)  # every granule is filled
        assert len({float(expert.float().sum()) for expert in matrix}) == 8  # and differently
        offs = torch.arange(1, 9, dtype=torch.int32) * 2
        rows = torch.randn(16, k).to(matrix.dtype)
        found, slow = layer.grouped_mm(rows, matrix, offs), layer.slow_grouped_mm(rows, matrix, offs)
        assert checks.difference(found, slow) < checks.TOLERANCE[dtype]
    n_handles = len(library.handles)
    assert library.memory.made_bytes(True) > 0
    close()
    assert not library.mapped and not library.ranges and len(library.handles) == n_handles


def test_how_many_copies_can_be_mapped(library, monkeypatch):
    workload, _ = made(way=("zero-copy", "mapped"))  # 64 x 64 fp32 is one granule; five on the device, three not
    pool = pool_for(workload, cold_bytes=1e9)
    room = 5 * (5 + 1) * GRANULE + GRANULE - 1  # five copies, each with a granule in front
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (memory.DEVICE_RESERVE_BYTES + room, 80 << 30))
    assert mapped.n_mapped_copies(pool, workload) == 5
    pool.host.limit_bytes = 2 * 3 * GRANULE
    assert mapped.n_mapped_copies(pool, workload) == 2
    pool.host.limit_bytes = 3 * GRANULE - 1
    assert mapped.n_mapped_copies(pool, workload) == 0
    with pytest.raises(InputError, match="does not fit into the device and host memory"):
        access._mapped(pool, workload)


@pytest.mark.parametrize("n_maps", range(4))
def test_a_driver_that_refuses_in_the_middle_leaves_nothing_mapped(library, n_maps):
    workload, _ = made(op="moe_layer", way=("zero-copy", "mapped"))
    library.refuse["cuMemSetAccess"] = (7 * n_maps, 2)
    with pytest.raises(CudaDriverError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        access._mapped(pool_for(workload, cold_bytes=1e9), workload)
    assert not library.mapped and not library.ranges


def test_granules_that_cannot_be_filled_are_not_kept(library, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch, "bitwise_or", refuse)
    workload, _ = made(way=("zero-copy", "mapped"))
    with pytest.raises(RuntimeError, match="illegal"):
        access._mapped(pool_for(workload, cold_bytes=1.0), workload)
    assert not library.mapped and not library.handles


def test_host_weights_are_seen_by_the_device_where_they_are():
    workload, _ = made(way=("zero-copy", "split"))
    pool = pool_for(workload)
    placed, _, _ = memory.place(pool, workload, 5)
    assert memory.seen_by_device(pool, placed[1].host[0]) is placed[1].host[0]  # without CUDA
    pool.host.alias = pool.host.flat.clone()
    for position in placed[:3]:
        seen = memory.seen_by_device(pool, position.host[0])
        assert seen.data_ptr() - pool.host.alias.data_ptr() == position.host[0].data_ptr() - pool.host.flat.data_ptr()
        assert torch.equal(seen, position.host[0])


# --- graphs ---


class MadeGraphs:
    """torch.cuda as far as recording needs it: what runs inside a recording is replayed from a list."""

    def __init__(self, monkeypatch):
        made_graphs = self
        self.recording = None
        self.modes = []
        self.current = ["main"]

        class Graph:
            def __init__(self):
                self.calls = []

            def replay(self):
                for call in self.calls:
                    call()

        class Stream:
            def wait_stream(self, other):
                pass

        @contextmanager
        def stream(_stream):
            made_graphs.current.append("side")
            yield
            made_graphs.current.pop()

        @contextmanager
        def graph(one, pool, stream):
            assert (pool, made_graphs.current[-1]) == ("pool", "side")
            made_graphs.recording = one
            try:
                yield
            finally:
                made_graphs.recording = None

        graphs.capture_stream.cache_clear()
        for name, value in {
            "CUDAGraph": Graph, "Stream": Stream, "stream": stream, "graph": graph, "synchronize": lambda: None,
            "current_stream": Stream, "graph_pool_handle": lambda: "pool", "set_sync_debug_mode": self.modes.append,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def made_graphs(monkeypatch):
    yield MadeGraphs(monkeypatch)
    graphs.capture_stream.cache_clear()


def test_positions_are_spread_over_graphs_and_replayed_in_turn(made_graphs):
    seen = []

    def call(n):
        if made_graphs.recording is not None:
            made_graphs.recording.calls.append(lambda: seen.append(n))
        return n

    recorded = graphs.record([lambda n=n: call(n) for n in range(33)])
    assert (recorded.n_inner, recorded.n_graphs, recorded.last) == (11, 3, 32)
    assert seen == list(range(33))  # each graph once
    seen.clear()
    for n in range(4):
        recorded.replay(n)
    assert seen == [*range(33), *range(11)]
    assert made_graphs.modes == ["error", "default"]
    recorded.close()


def test_work_that_waits_for_the_device_is_refused_before_it_is_recorded(made_graphs):
    def waits():
        assert made_graphs.recording is None
        if made_graphs.modes == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(InputError, match=r"waits for the device.*synchronizing"):
        graphs.record([waits, waits])
    assert made_graphs.modes == ["error", "default"]


def test_a_recording_that_fails_is_a_sentence(made_graphs):
    def fails():
        if made_graphs.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(InputError, match="cannot be recorded into a CUDA graph: operation not permitted when stream"):
        graphs.record([fails])


def test_a_host_lane_is_no_work_for_a_graph(monkeypatch):
    workload, shares = made(op="moe_layer", way=("copy", None))
    pool = pool_for(workload)
    arranged = access.arrange(pool, workload, shares, 0)
    closed = []
    eager = points.Prepared(lambda n: None, 1, {}, lambda: closed.append(True))
    on_device = replace(pool, flat=type("Flat", (), {"is_cuda": True})())
    with pytest.raises(InputError, match="the host takes part"):
        points._replayed(on_device, workload, arranged, eager, 1, False)
    assert closed == [True]


def test_a_replay_that_computes_something_else_is_refused(made_graphs, monkeypatch):
    workload, _ = made()
    on_device = points.Pool(type("Flat", (), {"is_cuda": True})(), 0.0)
    numbers = {"eager": 1.0, "graph": 1.0}

    def call(n):
        if made_graphs.recording is None:
            return torch.full((3,), numbers["eager"])
        out = torch.ones(3)  # as if memory held the right result before any replay
        if numbers["graph"] is not None:
            made_graphs.recording.calls.append(lambda: out.fill_(numbers["graph"]))
        return out

    eager = points.Prepared(call, 1, {"n_positions": 2}, lambda: None)
    prepared = points._replayed(on_device, workload, None, eager, 2, True)
    assert (prepared.n_inner, prepared.facts["calls_per_graph"]) == (2, 2)
    for wrong in (0.0, None):  # other numbers, or a replay that does nothing
        numbers["graph"] = wrong
        with pytest.raises(InputError, match="a replayed graph differs"):
            points._replayed(on_device, workload, None, eager, 2, True)


# --- the lines that only a CUDA device reaches, on a CPU that is taken for one ---


@pytest.fixture
def taken_for_cuda(monkeypatch):
    """torch makes CPU tensors where CUDA ones are asked for."""

    def on_cpu(make):
        def made_here(*arguments, device=None, pin_memory=False, **more):
            return make(*arguments, **more)

        return made_here

    for name in ("empty", "arange", "randn", "full", "tensor"):
        monkeypatch.setattr(torch, name, on_cpu(getattr(torch, name)))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))


class Flat:
    """A pool's buffer that says it is on CUDA."""

    is_cuda = True

    def __init__(self, flat):
        self.flat, self.dtype = flat, flat.dtype

    def __getitem__(self, part):
        return self.flat[part]

    def __getattr__(self, name):
        return getattr(self.flat, name)


def test_the_pinned_buffer_is_aliased_and_its_alias_tried(taken_for_cuda, monkeypatch):
    tried = []
    monkeypatch.setattr(memory, "device_alias", lambda host: host)
    monkeypatch.setattr(memory, "check_alias", lambda host, alias: tried.append((host.dtype, alias.dtype)))
    pool = points.make_pool(1 << 16, 0.0, "bf16", "cuda", 0, memory.HostSide(1 << 20))
    pool = points.Pool(Flat(pool.flat), 0.0, pool.host)
    buffer = memory.host_buffer(pool, 1000)
    assert (buffer.numel(), buffer.dtype) == (1024, torch.bfloat16)
    assert (pool.host.alias.numel(), pool.host.alias.dtype) == (1024, torch.bfloat16)
    assert tried == [(torch.uint8, torch.uint8)]
    assert memory.host_buffer(pool, 1024) is buffer
    assert memory.host_buffer(pool, 1025).numel() == 2048 and len(tried) == 2  # made anew
    part = pool.host.flat[1024:1088].view(1, 8, 8)
    assert torch.equal(memory.seen_by_device(pool, part), part)


def test_support_is_tried_and_reasons_are_said(taken_for_cuda, monkeypatch):
    library = MadeLibrary(granule_bytes=GRANULE)
    monkeypatch.setattr(mapped, "load_library", lambda: library)
    monkeypatch.setattr(mapped, "tensor_at", lambda address, n_bytes: torch.zeros(n_bytes, dtype=torch.uint8))
    assert mapped.support("cuda") is None
    assert not library.handles and not library.ranges

    class Forgetful(torch.Tensor):
        __hash__ = torch.Tensor.__hash__

        def __eq__(self, other):
            return torch.zeros(1, dtype=torch.bool)

    bad = torch.zeros(GRANULE * 3, dtype=torch.uint8).as_subclass(Forgetful)
    monkeypatch.setattr(mapped, "tensor_at", lambda address, n_bytes: bad)
    assert "did not come back" in mapped.support("cuda")
    library.refuse["cuMemCreate"] = (0, 801)
    assert "CUDA_ERROR_NOT_SUPPORTED" in mapped.support("cuda")

    def no_library():
        raise CudaDriverError("there is no CUDA driver library")

    monkeypatch.setattr(mapped, "load_library", no_library)
    assert "no CUDA driver library" in mapped.support("cuda")


def test_the_granules_of_a_process_are_opened_once(taken_for_cuda, monkeypatch):
    monkeypatch.setattr(mapped, "load_library", lambda: MadeLibrary(granule_bytes=GRANULE))
    pool = points.make_pool(1 << 16, 0.0, "bf16", "cuda", 0)
    first = mapped.virtual_memory(pool)
    assert mapped.virtual_memory(pool) is first and first.granule_bytes == GRANULE


def test_what_a_device_can_is_tried_one_by_one(taken_for_cuda, monkeypatch):
    monkeypatch.setattr(points, "support", lambda device: None)
    found = {way: points.capability("cuda", way) for way in points.WAYS}
    # A CPU taken for CUDA maps (one ordinary tensor) and splits; it records no graphs and multiplies no fp8.
    assert found["mapped"] is None and found["split"] is None
    assert "graph" in found["graph"] and "does not run" in found["fp8"] and "CUDA" in found["system"]
    monkeypatch.setattr(points, "support", lambda device: "no such memory")
    assert points.capability("cuda", "mapped") == "no such memory"
    monkeypatch.setattr(points, "check", lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA error: sticky\nmore")))
    assert points.capability("cuda", "split") == "CUDA error: sticky"


def test_a_point_that_finds_no_memory_is_tried_once_more_after_idle_memory_was_given_back(monkeypatch):
    workload, shares = made()
    pool, tries, trimmed = pool_for(workload), [], []
    right = points._prepare

    def at_first_full(*arguments):
        tries.append(1)
        if len(tries) == 1:
            raise torch.cuda.OutOfMemoryError("full")
        return right(*arguments)

    monkeypatch.setattr(points, "_prepare", at_first_full)
    monkeypatch.setattr(points, "trim", trimmed.append)
    assert points.prepare(pool, workload, shares, 0).n_inner == 1
    assert len(tries) == 2 and trimmed == [pool]


def test_experts_in_system_memory_are_placed_filled_and_computed(taken_for_cuda, monkeypatch):
    from collectors import system_memory

    def here(address, n_bytes):
        storage = torch._C._construct_storage_from_data_pointer(address, torch.device("cpu"), n_bytes)
        return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (n_bytes,), (1,))

    library = MadeLibrary()
    library.advised = []
    library.cuMemAdvise = lambda address, n_bytes, advice, place: library.advised.append(
        (address.value, n_bytes.value, advice.value, place.value)
    )
    monkeypatch.setattr(system_memory, "load_library", lambda: library)
    monkeypatch.setattr(system_memory, "nodes", lambda: system_memory.Nodes(0, 0))
    monkeypatch.setattr(system_memory, "device_tensor", here)
    workload, _ = made(op="moe_layer", way=("zero-copy", "system"), dtype="bf16")
    pool = pool_for(workload, cold_bytes=1.0)
    on_device = points.Pool(Flat(pool.flat), 1.0)
    try:
        copies, close, facts = system_memory.system_experts(on_device, workload)
    except InputError as error:  # a container may forbid placing
        pytest.skip(str(error))
    assert len(copies) == 2 and facts["expert_stride_bytes"] == [1 << 21, 1 << 21]
    for matrix, (n, k) in zip(copies[1], memory.matrices(workload), strict=True):
        assert tuple(matrix.shape) == (8, n, k) and matrix.stride() == (1 << 20, k, 1)
        assert matrix.data_ptr() % (1 << 21) == 0
        assert all(float(expert.float().std()) > 0.01 for expert in matrix)
        rows, offs = torch.randn(16, k).to(matrix.dtype), torch.arange(1, 9).to(torch.int32) * 2
        found, slow = layer.grouped_mm(rows, matrix, offs), layer.slow_grouped_mm(rows, matrix, offs)
        assert checks.difference(found, slow) < checks.TOLERANCE["bf16"]
    # The driver is asked to leave each offloaded expert of both matrices of both copies on the host: 3 is the advice to
    # prefer a place, -1 the host.
    starts = {m.data_ptr() + expert * (1 << 21) for copy in copies for m in copy for expert in workload.offloaded}
    assert set(library.advised) == {(start, 1 << 21, 3, -1) for start in starts} and len(library.advised) == 12
    close()
    _, close, _ = system_memory.system_experts(on_device, workload)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="96 of 96 pages of experts were moved"):
        patch.setattr(system_memory, "nodes_of", lambda addresses: [5] * len(addresses))
        close()  # two copies, two matrices, eight experts, three pages each
    del library.cuMemAdvise  # an older driver has no such call
    system_memory.system_experts(on_device, workload)[1]()
    with pytest.raises(InputError, match="lie on another memory node"):
        monkeypatch.setattr(system_memory, "nodes_of", lambda addresses: [5] * len(addresses))
        system_memory.system_experts(on_device, workload)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (memory.DEVICE_RESERVE_BYTES, 80 << 30))
    with pytest.raises(InputError, match="does not fit into the free memory of both nodes"):
        system_memory.system_experts(on_device, workload)

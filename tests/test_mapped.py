"""What needs a GPU, on made-up parts: experts mapped by a made-up driver, calls recorded by a made-up graph."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from collectors.driver import CudaDriverError, Driver, open_virtual_memory
from perfmodel.errors import InputError
from tests.test_driver import MadeLibrary

torch = pytest.importorskip("torch", reason="torch is not installed")

from collectors import access, graphs, layer, mapped, memory, points  # noqa: E402
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
        assert points._difference(found, slow) < points.TOLERANCE[dtype]
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
    out = {"eager": torch.ones(3), "graph": torch.ones(3)}

    def call(n):
        return out["eager" if made_graphs.recording is None else "graph"]

    eager = points.Prepared(call, 1, {"n_positions": 2}, lambda: None)
    prepared = points._replayed(on_device, workload, None, eager, 2, True)
    assert (prepared.n_inner, prepared.facts["calls_per_graph"]) == (2, 2)
    out["graph"] = torch.zeros(3)
    with pytest.raises(InputError, match="a replayed graph differs"):
        points._replayed(on_device, workload, None, eager, 2, True)

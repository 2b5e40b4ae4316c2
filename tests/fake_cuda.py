"""A CUDA device made up for tests: tensors without data, streams and events on a false clock, null kernels that cost.

Tensors are torch's FakeTensors, so that kernels check shapes, dtypes and strides as they would on a GPU. Every stand-in
has only methods that the real class has.
"""

import contextlib
import types
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

EVENT_NS, NULL_NS, GRAPH_NS = 500.0, 1_000.0, 4_000.0
FREE_BYTES = 60 << 30


class Clock:
    """The device's time, and what was done on it in order."""

    def __init__(self) -> None:
        self.now_ns, self.done, self.captured = 0.0, [], None

    def spend(self, ns: float) -> None:
        self.now_ns += ns


def install(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Put the made-up device in torch's place for one test; returns its clock."""
    clock = Clock()

    class Event:
        def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
            self.is_timing, self.at_ns = enable_timing, None

        def record(self, stream: object = None) -> None:
            clock.spend(EVENT_NS)
            self.at_ns = clock.now_ns

        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            assert self.at_ns is not None, "an event nobody recorded is waited for"

        def elapsed_time(self, end_event: "Event") -> float:
            assert self.is_timing and end_event.is_timing
            return (end_event.at_ns - self.at_ns) / 1e6

    class Stream:
        def wait_event(self, event: Event) -> None:
            assert event.at_ns is not None
            clock.done.append("fork")

        def wait_stream(self, stream: "Stream") -> None:
            clock.done.append("join")

    class CUDAGraph:
        n_kernels = 0

        def replay(self) -> None:
            assert self.n_kernels
            clock.spend(GRAPH_NS + NULL_NS * self.n_kernels)

    for stand_in in (Event, Stream, CUDAGraph):
        for name in vars(stand_in):
            if not name.startswith("__") and callable(getattr(stand_in, name)):
                assert hasattr(getattr(torch.cuda, stand_in.__name__), name), f"{stand_in.__name__} has no {name}"

    def sleep(cycles: int) -> None:
        if clock.captured is not None:
            clock.captured.n_kernels += 1
        else:
            clock.spend(NULL_NS if cycles == 0 else 1e6)

    @contextlib.contextmanager
    def capture(graph: CUDAGraph) -> Iterator[None]:
        clock.captured = graph
        yield
        clock.captured = None

    properties = types.SimpleNamespace(
        name="made up", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20,
        uuid="0-0", pci_domain_id=0, pci_bus_id=1, pci_device_id=0,
    )  # fmt: skip
    current = Stream()
    stand_ins = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "graph": capture,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda: current,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "synchronize": lambda: clock.done.append("wait"),
        "mem_get_info": lambda: (FREE_BYTES, 80 << 30),
        "get_device_properties": lambda _device: properties,
        "get_device_capability": lambda: (9, 0),
        "_sleep": sleep,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)  # raises when torch has no such name
    # Tensors without data are not told from inference tensors the way real ones are.
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    return clock


class _Copies(TorchFunctionMode):
    """Notes copies instead of making them, which a torch without CUDA refuses even where there is no data."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, int, bool]] = []

    def __torch_function__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        if func is not torch.Tensor.copy_:
            return func(*args, **kwargs)
        target, source = args
        assert target.shape == source.shape and target.dtype == source.dtype
        n_bytes = source.numel() * source.element_size()
        self.seen.append((source.device.type, target.device.type, n_bytes, kwargs.get("non_blocking", False)))
        return target


@contextlib.contextmanager
def no_data() -> Iterator[list[tuple[str, str, int, bool]]]:
    """Tensors on any device, shapes and strides checked, without memory.

    Yields the copies made so far: from device, to device, bytes, whether in the background.
    """
    with FakeTensorMode(), _Copies() as copies:
        yield copies.seen

"""A CUDA device made up for tests that computes: its tensors are those of the CPU, told apart and kept apart.

Operations over tensors of both devices fail as torch's do; work that waits for the device fails while a graph is
captured; a replay does the captured operations again, into the same tensors. Streams run everything at once and in
order, so that what is missing between streams does not show here (the lanes' own tests look for that). Times are those
of this machine and mean nothing.
"""

import contextlib
import ctypes
import gc
import mmap
import time
import types
import weakref
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests import pretend_driver

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
STICKY = "CUDA error: an illegal memory access was encountered\nmade up"
FORBIDDEN = "operation not permitted when stream is capturing"
Tensor = torch.Tensor


class CudaTensor(torch.Tensor):
    """A tensor of the made-up device; its numbers are in the memory of this process."""

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    device = property(lambda self: CUDA)

    def __repr__(self, **_: object) -> str:
        return f"cuda:0 {tuple(self.shape)} {self.dtype}"


# Functions that bring numbers to the host and so wait for the device.
WAITING = {
    Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.nonzero, torch.nonzero, Tensor.__bool__,
    Tensor.__int__, Tensor.__float__, Tensor.__index__, torch.equal, torch.allclose, Tensor.unique, torch.unique,
    Tensor.masked_select, torch.bincount, Tensor.bincount,
}  # fmt: skip
# Functions that may meet tensors of both devices.
ACROSS = {Tensor.copy_, Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type_as}
GROUPED = {torch.nn.functional.grouped_mm, torch._grouped_mm, torch._scaled_grouped_mm}
PRODUCTS = GROUPED | {torch.mm, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch._scaled_mm}


def _tensors(found: object) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, dict):
        found = found.values()
    elif not isinstance(found, list | tuple):
        return []
    tensors = []
    for part in found:
        if isinstance(part, Tensor):
            tensors.append(part)
        elif isinstance(part, list | tuple | dict):
            tensors += _tensors(part)
    return tensors


def _mapped(found: object, change: Callable[[Tensor], object]) -> object:
    if isinstance(found, Tensor):
        return change(found)
    if (isinstance(found, tuple) and hasattr(found, "_fields")) or type(found).__module__ == "torch.return_types":
        return type(found)([_mapped(part, change) for part in found])
    return type(found)(_mapped(part, change) for part in found) if isinstance(found, list | tuple) else found


def _is_device(word: object) -> bool:
    return isinstance(word, torch.device | str) and not isinstance(word, torch.dtype)


class PretendedCuda(TorchFunctionMode):
    """The device. `driver` is its driver library, `before` is called with the name of each matrix product."""

    _shapes_seen: ClassVar[set[str]] = set()

    def __init__(self, total_bytes: int, driver: pretend_driver.Driver) -> None:
        super().__init__()
        self.total_bytes, self.driver = total_bytes, driver
        self.before: Callable[[str], None] = lambda name: None
        self.is_lost = False  # an error that stays for as long as the process lives
        self.n_products = self.n_mixed = self.n_replays = self.n_aliases = 0
        self.pinned: dict[int, int] = {}
        self.capturing: list | None = None
        self.stream: object = None
        self.captured_streams: set = set()
        self.refuses_waiting = False

    # --- torch's functions ---

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.as_tensor and hasattr(args[0], "__cuda_array_interface__"):
            return self._alias(args[0], kwargs.get("device"))
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.is_pinned:
                return self._is_pinned(args[0])
            return self._run(func, args, kwargs)

    def _run(self, func, args, kwargs):
        found = _tensors(args) + _tensors(kwargs) if kwargs else _tensors(args)
        on_cuda = [isinstance(t, CudaTensor) for t in found]
        target = kwargs.pop("device", None)
        if func in (Tensor.to, Tensor.cuda) and target is None:
            target, args = self._target(func, args)
        elif func is Tensor.cpu:
            target = CPU
        target = torch.device(target) if target is not None else None
        is_far = any(on_cuda) or (target is not None and target.type == "cuda")
        if is_far:
            self._refuse(func, found, on_cuda, target)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, args, kwargs, target)
        if kwargs.pop("pin_memory", False):
            return self._pinned_empty(*args, **kwargs)
        if func in PRODUCTS and any(on_cuda):
            self.n_products += 1
            self.before(func.__name__)
            if func in GROUPED:
                self._check_strides(func, args, kwargs)
        call = _as_fp8 if func in (torch._scaled_grouped_mm, torch._scaled_mm) else func
        result = call(*args, **kwargs)
        lies_far = (target.type == "cuda") if target is not None else any(on_cuda)
        held = {id(t): t for t in found}

        def lay(tensor: Tensor) -> Tensor:
            if id(tensor) in held:  # in place, or into `out`
                return tensor
            return tensor.as_subclass(CudaTensor) if lies_far else tensor.as_subclass(Tensor)

        result = _mapped(result, lay)
        if self.capturing is not None and lies_far and isinstance(result, Tensor | tuple | list):
            self.capturing.append((call, args, kwargs, result))
        return result

    def _target(self, func, args):
        """Where `to` takes a tensor, and its arguments without that."""
        if func is Tensor.cuda:
            return CUDA, args[:1]
        rest = list(args[1:])
        for place, word in enumerate(rest):
            if isinstance(word, Tensor):
                return word.device, (args[0], *rest[:place], word.dtype, *rest[place + 1 :])
            if _is_device(word):
                return word, (args[0], *rest[:place], *rest[place + 1 :])
        return None, args

    def _moved(self, func, args, kwargs, target):
        source, is_far = args[0], isinstance(args[0], CudaTensor)
        goes_far = is_far if target is None else target.type == "cuda"
        if is_far and not goes_far:
            self._refuse_waiting(func)
        words = {k: v for k, v in kwargs.items() if k not in ("non_blocking", "memory_format")}
        rest = () if func is not Tensor.to else args[1:]
        found = Tensor.to(source, *rest, **words) if rest or words else source
        if goes_far != is_far:
            found = found.clone() if found.data_ptr() == source.data_ptr() else found
        if found is source:
            return source
        found = found.as_subclass(CudaTensor if goes_far else Tensor)
        if self.capturing is not None and goes_far:
            self.capturing.append((Tensor.to, (source, found.dtype), {}, found))
        return found

    def _refuse(self, func, found, on_cuda, target):
        """Raise as torch does for a lost device, tensors on two devices, or waiting where nobody may."""
        if self.is_lost:
            raise torch.AcceleratorError(STICKY) if hasattr(torch, "AcceleratorError") else RuntimeError(STICKY)
        is_getter = getattr(func, "__name__", "") in ("__get__", "__set__")
        if func not in ACROSS and not is_getter and any(on_cuda):
            near = [t for t, is_far in zip(found, on_cuda, strict=True) if not is_far and t.dim() > 0]
            if near and func not in (Tensor.__getitem__, Tensor.__setitem__):
                self.n_mixed += 1
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                    f"({getattr(func, '__name__', func)})"
                )
        if func in WAITING or (func is torch.tensor and target is not None):
            self._refuse_waiting(func)
        if func is Tensor.copy_ and len(set(on_cuda[:2])) == 2:
            host = found[0] if on_cuda[1] else found[1]
            if not self._is_pinned(host):
                self._refuse_waiting(func)

    def _refuse_waiting(self, func):
        if self.refuses_waiting:
            raise RuntimeError(f"called a synchronizing CUDA operation ({getattr(func, '__name__', func)})")
        if self.capturing is not None:
            raise RuntimeError(f"CUDA error: {FORBIDDEN} ({getattr(func, '__name__', func)})")

    def _check_strides(self, func, args, kwargs):
        """What torch refuses on a GPU: its own checks on tensors without data, once for each shape and stride."""
        key = str([(tuple(t.shape), t.stride(), t.dtype) for t in _tensors([args, kwargs])])
        if key in self._shapes_seen:
            return
        self._shapes_seen.add(key)
        from torch._subclasses.fake_tensor import FakeTensorMode

        def hollow(tensor: Tensor) -> Tensor:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

        with pytest.MonkeyPatch.context() as without:
            # A torch with CUDA would set up a device first, which may not be there.
            without.setattr(torch.cuda, "is_available", lambda: False)
            with FakeTensorMode():
                func(*_mapped(args, hollow), **{name: _mapped(word, hollow) for name, word in kwargs.items()})

    # --- memory ---

    def _pinned_empty(self, *shape, dtype=torch.float32, **_):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        n_elements = torch.Size(shape).numel()
        memory = mmap.mmap(-1, max(1, n_elements * dtype.itemsize))
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        address = tensor.data_ptr()
        self.pinned[address] = len(memory)
        weakref.finalize(memory, self.pinned.pop, address, None)
        return tensor[: n_elements * dtype.itemsize].view(dtype).view(shape)

    def _is_pinned(self, tensor):
        address = tensor.data_ptr()
        return any(first <= address < first + n_bytes for first, n_bytes in self.pinned.items())

    def _alias(self, made, device):
        if self.is_lost:
            raise RuntimeError(STICKY)
        described = made.__cuda_array_interface__
        assert described["typestr"] == "|u1" and described["version"] in (2, 3) and not described["data"][1]
        address, (n_bytes,) = described["data"][0], described["shape"]
        is_pinned = any(a <= address and address + n_bytes <= a + n for a, n in self.pinned.items())
        # With an index torch does not ask the driver whose the address is.
        is_trusted = ":" in str(device) and self.driver.attributes.get(88)
        if not is_pinned and not is_trusted and not self.driver.knows(address, n_bytes):
            raise ValueError("The specified pointer resides on host memory and is not registered with any CUDA device.")
        self.n_aliases += 1
        buffer = (ctypes.c_ubyte * n_bytes).from_address(address)
        buffer.keep = made
        return torch.frombuffer(buffer, dtype=torch.uint8).as_subclass(CudaTensor)

    # --- torch.cuda ---

    def synchronize(self, device: object = None) -> None:
        if self.is_lost:
            raise torch.AcceleratorError(STICKY) if hasattr(torch, "AcceleratorError") else RuntimeError(STICKY)
        self._refuse_waiting(torch.cuda.synchronize)

    def empty_cache(self) -> None:
        if self.is_lost:
            raise RuntimeError(STICKY)


def _as_fp8(a, b, *words, scale_a=None, scale_b=None, offs=None, out_dtype=None, **_):
    """Row-wise scaled products of fp8, as the CUDA kernels compute them, or of one scale for each matrix."""
    scale_a, scale_b = (*words, scale_a, scale_b)[:2] if words else (scale_a, scale_b)
    assert a.dtype == b.dtype == torch.float8_e4m3fn and scale_a.dtype == scale_b.dtype == torch.float32
    assert b.stride(-2) == 1 and a.stride(-1) == 1 and a.shape[-1] % 16 == 0, "fp8 products want K in a row, by 16"
    if offs is None:
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)
    assert offs.dtype == torch.int32 and scale_a.shape == a.shape[:1] and scale_b.shape == (b.shape[0], b.shape[2])
    out, first = torch.empty(len(a), b.shape[2], dtype=out_dtype), 0
    for expert, last in enumerate(offs.tolist()):
        rows = a[first:last].float() * scale_a[first:last, None]
        out[first:last] = (rows @ b[expert].float() * scale_b[expert]).to(out_dtype)
        first = last
    return out


def _stand_ins(device: PretendedCuda) -> dict[str, object]:
    """What takes the place of torch.cuda's names."""

    class Event:
        def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
            self.is_timing, self.at_s, self.stream = enable_timing, None, None

        def record(self, stream: object = None) -> None:
            self.at_s, self.stream = time.perf_counter(), stream or device.stream

        def wait(self, stream: object = None) -> None:
            (stream or device.stream).wait_event(self)

        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            assert self.at_s is not None, "an event nobody recorded is waited for"
            device.synchronize()

        def elapsed_time(self, end_event: "Event") -> float:
            device.synchronize()
            assert self.is_timing and end_event.is_timing
            return max(1e-6, (end_event.at_s - self.at_s) * 1e3)

    class Stream:
        def wait_event(self, event: Event) -> None:
            assert event.at_s is not None, "a stream waits for an event nobody recorded"
            if device.capturing is not None and event.stream in device.captured_streams:
                device.captured_streams.add(self)
                if self is not event.stream:
                    device.unjoined.discard(event.stream)
                if self is not device.origin:
                    device.unjoined.add(self)

        def wait_stream(self, stream: "Stream") -> None:
            event = Event()
            event.record(stream)
            self.wait_event(event)

        def synchronize(self) -> None:
            device.synchronize()

    class CUDAGraph:
        done: list | None = None

        def replay(self) -> None:
            assert self.done, "a graph of nothing is replayed"
            if device.is_lost:
                raise RuntimeError(STICKY)
            device.n_replays += 1
            for func, args, kwargs, result in self.done:
                again = _tensors(func(*args, **kwargs))
                for before, now in zip(_tensors(result), again, strict=True):
                    if before.data_ptr() != now.data_ptr():
                        before.copy_(now)

    @contextlib.contextmanager
    def stream_of(stream: Stream) -> Iterator[None]:
        before, device.stream = device.stream, stream
        assert device.capturing is None or stream in device.captured_streams, "work beside a capture was not forked"
        try:
            yield
        finally:
            device.stream = before

    @contextlib.contextmanager
    def graph(cuda_graph: CUDAGraph, pool: object = None, stream: Stream | None = None) -> Iterator[None]:
        assert device.capturing is None
        before, device.stream = device.stream, stream or Stream()
        device.capturing, device.origin = [], device.stream
        device.captured_streams, device.unjoined = {device.stream}, set()
        try:
            yield
            assert not device.unjoined, "capture of unjoined work"
            cuda_graph.done = device.capturing
        finally:
            device.capturing, device.stream = None, before

    def set_sync_debug_mode(mode: str) -> None:
        device.refuses_waiting = {"error": True, "default": False}[mode]

    def sleep(cycles: int) -> None:
        if device.capturing is not None:
            device.capturing.append((lambda: None, (), {}, None))

    for stand_in in (Event, Stream, CUDAGraph):
        for name in vars(stand_in):
            if not name.startswith("__") and callable(getattr(stand_in, name)):
                assert hasattr(getattr(torch.cuda, stand_in.__name__), name), f"{stand_in.__name__} has no {name}"
    device.stream = Stream()
    properties = types.SimpleNamespace(
        name="made up", major=9, minor=0, multi_processor_count=132, total_memory=device.total_bytes,
        L2_cache_size=1 << 18, uuid="0-0", pci_domain_id=0, pci_bus_id=1, pci_device_id=0,
    )  # fmt: skip
    return {
        "Event": Event, "Stream": Stream, "CUDAGraph": CUDAGraph, "graph": graph, "stream": stream_of,
        "current_stream": lambda: device.stream, "current_device": lambda: 0, "device_count": lambda: 1,
        "is_available": lambda: True, "is_initialized": lambda: True, "synchronize": device.synchronize,
        "empty_cache": device.empty_cache, "mem_get_info": lambda: (int(0.9 * device.total_bytes), device.total_bytes),
        "get_device_properties": lambda _device: properties, "get_device_capability": lambda _device=0: (9, 0),
        "_sleep": sleep, "graph_pool_handle": lambda: (0, 0), "set_sync_debug_mode": set_sync_debug_mode,
    }  # fmt: skip


def forget(device: PretendedCuda) -> None:
    """What the end of a measuring process takes with it: streams, scales and pools kept per process, driver memory."""
    from collectors import access, graphs, modes

    for kept in (access.streams, graphs.capture_stream, modes._scales):
        kept.cache_clear()
    device.driver.lose_all()
    device.is_lost = False


@contextlib.contextmanager
def installed(
    monkeypatch: pytest.MonkeyPatch, is_coherent: bool = False, total_bytes: int = 16 << 30
) -> Iterator[PretendedCuda]:
    """The made-up device in torch's place, without CUDA's tracing; nothing of it is left behind."""
    from collectors import driver, gpu, mapped, profiling, system_memory

    device = PretendedCuda(total_bytes, pretend_driver.Driver(is_coherent))
    for name, stand_in in _stand_ins(device).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)  # raises when torch has no such name
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: 0)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: 0)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: None)
    construct, session = torch._C._construct_storage_from_data_pointer, profiling._session
    monkeypatch.setattr(
        torch._C, "_construct_storage_from_data_pointer", lambda address, _, n_bytes: construct(address, CPU, n_bytes)
    )
    monkeypatch.setattr(profiling, "_session", lambda is_cuda: session(False))  # CUDA's would shout at every operator
    for module in (driver, mapped, system_memory):
        monkeypatch.setattr(module, "load_library", lambda: device.driver)
    monkeypatch.setattr(gpu, "driver_library", lambda: device.driver)
    gc.freeze()  # looking for what is left behind is then quick
    try:
        with device:
            yield device
        gc.collect()  # views of mapped memory go before it does
        forget(device)
    finally:
        gc.unfreeze()

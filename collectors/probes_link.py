"""Probes of what joins a GPU and its host: copies by size, both ways at once, reads in place, and all beside CPU work.

Pinned buffers are plain allocations; small sizes take other parts of a large buffer in turn, so that no cache serves
them again.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from perfmodel.errors import InputError

from . import gpu, machine
from .alias import check_alias, device_alias
from .calibration import Scalar
from .probes import Measured, Probe, cpu_threads, need_free, random_bytes, waited_clock
from .probes_host import expert_call, expert_weights
from .timing import Clock, Limits, cuda_clock, measure

COVER_BYTES = 1 << 28  # sizes below this rotate through as much
CORE_BYTES = 1 << 28
SIZES = {
    "quick": (1 << 20, CORE_BYTES),
    "standard": tuple(4**i << 16 for i in range(8)),  # 64 KiB to 1 GiB
    "full": tuple(2**i << 16 for i in range(15)),
}
BOTH_SIZES = {"quick": (CORE_BYTES,), "standard": (1 << 24, CORE_BYTES), "full": (1 << 20, 1 << 24, CORE_BYTES)}
READ_SIZES = {"quick": (CORE_BYTES,), "standard": (1 << 20, 1 << 24, CORE_BYTES, 1 << 30), "full": SIZES["standard"]}
READ_KERNELS = ("scale", "sum")
BESIDE_ROWS = {"quick": (16,), "standard": (16, 512), "full": (1, 16, 512)}
BESIDE_EXPERT = (2048, 2048)
LEAST_WINDOW_NS, MOST_WINDOW_NS = 20_000_000, 500_000_000
READY_S = 60.0

# The machine number of a copy, by direction and host memory.
COPIES = {
    ("h2d", "pinned"): "link_h2d_copy_bytes_per_s",
    ("d2h", "pinned"): "link_d2h_copy_bytes_per_s",
    ("h2d", "pageable"): "link_h2d_pageable_bytes_per_s",
    ("d2h", "pageable"): "link_d2h_pageable_bytes_per_s",
}


@contextlib.contextmanager
def on_node(node: int | None) -> Iterator[None]:
    """Run this thread on the processors of a memory node inside, so that what it allocates lies there; null: any."""
    if node is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, machine.cpus_of_node(node))
    try:
        with cpu_threads(1):  # threads that torch started here would stay on the node for ever
            yield
    finally:
        os.sched_setaffinity(0, before)


def pair(n_bytes: int, pinned: bool, node: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Host and device buffers of a size, as many as cover the rotation, all filled."""
    total = max(n_bytes, COVER_BYTES)
    need_free(total, "cuda")
    with on_node(node):
        host = random_bytes(total, pinned=pinned)
    return list(host.split(n_bytes)), list(random_bytes(total, "cuda").split(n_bytes))


def copy_call(sources: Sequence[Tensor], targets: Sequence[Tensor], in_background: bool) -> Callable[[int], object]:
    """A copy of the n-th buffer, round and round."""
    return lambda n: targets[n % len(targets)].copy_(sources[n % len(sources)], non_blocking=in_background)


def link_copy(
    direction: str, memory: str, n_bytes: int, quantity: str | None, core: bool, node: int | None = None
) -> Probe:
    """Rate of copies one way, of one size, from or to one kind of host memory; on a given memory node if named."""

    def run(limits: Limits) -> Measured:
        is_pinned = memory == "pinned"
        host, device = pair(n_bytes, is_pinned, node)
        sources, targets = (host, device) if direction == "h2d" else (device, host)
        clock: Clock = cuda_clock if is_pinned else waited_clock
        times = measure(copy_call(sources, targets, in_background=is_pinned), clock, limits)
        way = "to the GPU" if direction == "h2d" else "from the GPU"
        how = f"copies of {n_bytes} bytes {way} back to back, {memory} host memory, {len(host)} buffers in turn"
        return Measured(times, n_bytes, f"{how}, {'CUDA events' if is_pinned else 'wall clock, waited for'}, median")

    params: dict[str, Scalar] = {"direction": direction, "memory": memory, "n_bytes": n_bytes}
    params |= {} if node is None else {"host_node": node}
    return Probe("link_copy", params, quantity, "bytes_per_s", core, run)


def forked_clock(streams: Sequence[torch.cuda.Stream]) -> Clock:
    """Device time from a common start of some streams to the end of the last of them."""

    def clock(work: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for stream in streams:
            stream.wait_event(start)
        work()
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e6

    return clock


def both_ways(n_bytes: int) -> Probe:
    """Rate of copies in both directions at once, their bytes added."""

    def run(limits: Limits) -> Measured:
        host_in, device_in = pair(n_bytes, pinned=True)
        host_out, device_out = pair(n_bytes, pinned=True)
        streams = torch.cuda.Stream(), torch.cuda.Stream()
        copy_in = copy_call(host_in, device_in, in_background=True)
        copy_out = copy_call(device_out, host_out, in_background=True)

        def call(n: int) -> None:
            with torch.cuda.stream(streams[0]):
                copy_in(n)
            with torch.cuda.stream(streams[1]):
                copy_out(n)

        torch.cuda.synchronize()
        times = measure(call, forked_clock(streams), limits)
        how = f"copies of {n_bytes} bytes each way at once, pinned, two streams, both counted, to the end of the later"
        return Measured(times, 2 * n_bytes, f"{how}, CUDA events, median")

    params: dict[str, Scalar] = {"memory": "pinned", "n_bytes": n_bytes}
    return Probe("link_both_ways", params, "link_both_copy_bytes_per_s", "bytes_per_s", False, run)


def read_call(aliases: Sequence[Tensor], kernel: str) -> Callable[[int], object]:
    """A kernel that reads the n-th buffer as fp32: into a sum, or scaled into device memory."""
    numbers = [alias.view(torch.float32) for alias in aliases]
    if kernel == "sum":
        return lambda n: numbers[n % len(numbers)].sum()
    out = torch.empty_like(numbers[0], device="cuda")
    return lambda n: torch.mul(numbers[n % len(numbers)], 2.0, out=out)


def shared_memory(n_bytes: int, memory: str) -> tuple[Tensor, Tensor]:
    """Host memory and the device's alias of it, seen to be one; raises InputError where the device cannot have it."""
    if memory == "system" and not gpu.reads_pageable(
        gpu.driver_facts(gpu.driver_library(), torch.cuda.current_device())
    ):
        raise InputError("this GPU does not read plain system memory through the host's page tables")
    host = random_bytes(n_bytes, pinned=memory == "pinned")
    alias = device_alias(host, pageable=memory == "system")
    check_alias(host, alias)
    return host, alias


def read_in_place(kernel: str, memory: str, n_bytes: int, quantity: str | None, core: bool) -> Probe:
    """Rate at which a kernel reads host memory in place."""

    def run(limits: Limits) -> Measured:
        _host, alias = shared_memory(max(n_bytes, COVER_BYTES), memory)
        aliases = list(alias.split(n_bytes))
        times = measure(read_call(aliases, kernel), cuda_clock, limits)
        how = f"kernel ({kernel}) reading {n_bytes} bytes of {memory} host memory in place, CUDA events, median"
        moved = "; pages may have moved to the GPU" if memory == "system" else ""
        return Measured(times, n_bytes, f"{how}, {len(aliases)} buffers in turn{moved}")

    params: dict[str, Scalar] = {"kernel": kernel, "memory": memory, "n_bytes": n_bytes}
    return Probe("read_in_place", params, quantity, "bytes_per_s", core, run)


def work_within(spans: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """How many pieces of work, each from and to a time, fall between two times; those at an edge count in part."""
    return sum(max(0.0, min(b, end) - max(a, start)) / (b - a) for a, b in spans if b > a)


class Worker:
    """A thread that calls some work again and again between entering and leaving, and notes when each call ran."""

    def __init__(self, work: Callable[[int], object], threads: int, now: Callable[[], float]) -> None:
        self.spans: list[tuple[float, float]] = []
        self._work, self._threads, self._now = work, threads, now
        self._stop, self._ready = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            # Both hold for the calling thread only.
            with torch.inference_mode(), cpu_threads(self._threads):
                while not self._stop.is_set():
                    began = self._now()
                    self._work(len(self.spans))
                    self.spans.append((began, self._now()))
                    if len(self.spans) > 2:
                        self._ready.set()
        except BaseException as error:
            self._error = error
            self._ready.set()

    def __enter__(self) -> "Worker":
        self._thread.start()
        if not self._ready.wait(READY_S):
            self._stop.set()
            raise InputError(f"the CPU did not finish three calls in {READY_S:.0f} s")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error


def together(
    move: Callable[[int], object],
    compute: Callable[[int], object],
    threads: int,
    limits: Limits,
    now: Callable[[], float],
) -> tuple[list[float], list[float], float, float]:
    """Moving data and computing on the CPU at the same time: ns per move and per call of each of the same intervals.

    `move(n)` makes n moves and waits for them. Then ns per move and per call alone, just before.
    """

    def moved_ns(n: int) -> tuple[float, float]:
        start = now()
        move(n)
        return start, now()

    moved_ns(1)
    start, end = moved_ns(1)
    with cpu_threads(threads):
        compute(0)
        began = now()
        for number in range(1, 6):
            compute(number)
        call_ns = (now() - began) / 5
    window_ns = min(MOST_WINDOW_NS, max(LEAST_WINDOW_NS, limits.min_repeat_ns, 5 * call_ns))
    n_moves = max(1, round(window_ns / max(end - start, 1.0)))
    start, end = moved_ns(n_moves)
    alone_ns = (end - start) / n_moves
    with Worker(compute, threads, now) as worker:
        windows = [moved_ns(n_moves) for _ in range(limits.max_repeats)]
    moves = [(b - a) / n_moves for a, b in windows]
    counts = [work_within(worker.spans, a, b) for a, b in windows]
    if min(counts) <= 0:
        raise InputError("the CPU finished nothing while data moved")
    return moves, [(b - a) / n for (a, b), n in zip(windows, counts, strict=True)], alone_ns, call_ns


def beside(what: str, dtype: str, n_rows: int, threads: int) -> list[Probe]:
    """Two probes of one experiment: copies (`h2d copy`) or reads in place (`read`) while the CPU computes experts.

    The second takes what the first saw in the same intervals, and repeats the experiment when there was no first.
    """
    n_bytes, (k, n), kept = CORE_BYTES, BESIDE_EXPERT, dict[str, Measured]()
    count = max(1, threads - 1)  # one is left for the thread that drives the GPU
    n_flops = 2.0 * n_rows * k * n

    def mover() -> Callable[[int], object]:
        if what == "read":
            host, alias = shared_memory(n_bytes, "pinned")
            kernel = read_call([alias], "scale")
            return partial(_many, kernel, host)
        copy_in = copy_call(*pair(n_bytes, pinned=True), in_background=True)
        return partial(_many, copy_in, None)

    def both(limits: Limits) -> tuple[Measured, Measured]:
        compute = expert_call(expert_weights(k, n, dtype), n_rows)
        moves, calls, move_ns, call_ns = together(mover(), compute, count, limits, time.perf_counter_ns)
        how = (
            f"{what} of {n_bytes} bytes of pinned host memory while {count} CPU threads compute {dtype} GEMMs of "
            f"{n_rows} rows with cold {k} x {n} weights, wall clock, both in the same intervals"
        )
        return (
            Measured(moves, n_bytes, how, {"alone_bytes_per_s": float(f"{n_bytes * 1e9 / move_ns:.6g}")}),
            Measured(calls, n_flops, how, {"alone_flops_per_s": float(f"{n_flops * 1e9 / call_ns:.6g}")}),
        )

    def of_link(limits: Limits) -> Measured:
        moves, kept["calls"] = both(limits)
        return moves

    def of_host(limits: Limits) -> Measured:
        return kept.pop("calls", None) or both(limits)[1]

    params: dict[str, Scalar] = {
        "what": what, "dtype": dtype, "n_rows": n_rows, "k": k, "n": n, "threads": count, "n_bytes": n_bytes,
    }  # fmt: skip
    # Few rows read the most memory and disturb copies the most; many rows are the rate of a large GEMM.
    is_copy = what == "h2d copy"
    link_name = "link_h2d_contended_bytes_per_s" if is_copy and n_rows == 16 else None
    host_name = "host_gemm_contended_flops_per_s" if is_copy and n_rows == max(BESIDE_ROWS["standard"]) else None
    return [
        Probe("link_beside_host_gemm", params, link_name, "bytes_per_s", False, of_link),
        Probe("host_gemm_beside_link", params, host_name, "flops_per_s", False, of_host),
    ]


def _many(call: Callable[[int], object], _kept: object, n: int) -> None:
    for number in range(n):
        call(number)
    torch.cuda.synchronize()


def beside_probes(threads: int, preset: str) -> list[Probe]:
    """Data moving and the CPU computing at the same time, and each alone."""
    found = [probe for n_rows in BESIDE_ROWS[preset] for probe in beside("h2d copy", "bf16", n_rows, threads)]
    return found if preset == "quick" else [*found, *beside("read", "bf16", 16, threads)]


def by_node(preset: str) -> list[Probe]:
    """Pinned copies from each memory node with processors of ours, where there are several."""
    usable = [entry["node"] for entry in machine.numa_nodes() if entry["n_usable_cpus"]]
    nodes = [node for node in usable if isinstance(node, int)]
    if len(nodes) < 2 or preset == "quick" or not hasattr(os, "sched_setaffinity"):
        return []
    return [link_copy(way, "pinned", CORE_BYTES, None, False, node) for node in nodes for way in ("h2d", "d2h")]


def _spread(sizes: Sequence[int]) -> list[int]:
    """Sizes in an order of which every beginning spans them: that of the machine's number, both ends, then between."""
    rest = [size for size in sizes if size != CORE_BYTES]
    ends = [rest[0], rest[-1]] if len(rest) > 1 else rest
    between = rest[1:-1]
    return [CORE_BYTES, *ends, *between[::2], *between[1::2]]


def link_probes(preset: str) -> tuple[list[Probe], list[Probe]]:
    """What models need of the link, then how it depends on size and on where host memory lies.

    The machine's number is that of one size, which is large and which the end of each run can repeat.
    """
    read = "link_kernel_read_bytes_per_s"
    first = [
        link_copy("h2d", "pinned", CORE_BYTES, COPIES["h2d", "pinned"], core=True),
        *[read_in_place(kernel, "pinned", CORE_BYTES, read, core=True) for kernel in READ_KERNELS],
        link_copy("d2h", "pinned", CORE_BYTES, COPIES["d2h", "pinned"], core=False),
        read_in_place("scale", "system", CORE_BYTES, "link_system_read_bytes_per_s", core=False),
        *[both_ways(n_bytes) for n_bytes in reversed(BOTH_SIZES[preset])],
    ]
    more = [
        *[
            link_copy(way, memory, n_bytes, quantity if n_bytes == CORE_BYTES else None, core=False)
            for n_bytes in _spread(SIZES[preset])
            for (way, memory), quantity in COPIES.items()
        ],
        *by_node(preset),
        *[
            read_in_place(kernel, "pinned", n_bytes, None, core=False)
            for n_bytes in reversed(READ_SIZES[preset])
            for kernel in READ_KERNELS
        ],
    ]
    known = {probe.key for probe in first}
    return first, [probe for probe in more if probe.key not in known]

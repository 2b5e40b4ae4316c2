"""Probes of a GPU: its memory, its GEMMs with the clocks they ran at, what a launch costs; and the list of all probes.

Device work is timed by events or by the wall clock around an idle device, as each probe says. Clocks and power are read
and never set.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from perfmodel.errors import InputError

from . import gpu, probes_host, probes_link, smi
from .calibration import Scalar
from .layer import grouped_mm
from .probes import TORCH_DTYPES, Measured, Probe, need_free, random_bytes
from .timing import Limits, cuda_clock, host_clock, measure

SIDES = {"quick": (8192,), "standard": (8192,), "full": (8192, 4096, 16384)}
STREAM_BYTES = {"quick": 1 << 28, "standard": 1 << 29, "full": 1 << 30}
ALL_DTYPES = ("bf16", "fp8", "fp16", "tf32", "fp32")
FP8_CAPABILITY = (8, 9)
SAMPLE_S, LEAST_SAMPLES = 3.0, 3  # a GEMM runs on so long, or until so many samples of the clocks are there
WARM_S = 0.2  # an idle GPU has low clocks
EXPERT_K, EXPERT_N, N_EXPERTS = 4096, 14336, 5  # weights streamed by a GEMM: 117 MB in bf16, 587 MB in turn
STREAM_ROWS = {"quick": (1,), "standard": (1, 4, 16, 64), "full": (1, 2, 4, 8, 16, 32, 64)}
BURST = 256  # launches in a row: a stream takes about a thousand before a launch call has to wait
N_GRAPH = 256  # null kernels of the long graph
SLEEP_CYCLES, LONGEST_SLEEP_CYCLES = 1 << 25, 1 << 31  # about 20 ms, 1 s at 2 GHz: the device waits for the host


def device_stream(kernel: str, n_bytes: int, quantity: str, core: bool) -> Probe:
    """Bandwidth of a streaming kernel in device memory."""

    def run(limits: Limits) -> Measured:
        n_arrays, words = probes_host.STREAMS[kernel]
        need_free(n_arrays * n_bytes, "cuda")
        times = measure(probes_host.stream_kernel(kernel, n_bytes, "cuda"), cuda_clock, limits)
        return Measured(
            times, n_arrays * n_bytes, f"{words}, {n_bytes} bytes an array, on the GPU, CUDA events, median"
        )

    return Probe("device_stream", {"kernel": kernel, "n_bytes": n_bytes}, quantity, "bytes_per_s", core, run)


@contextlib.contextmanager
def fp32_precision(word: str) -> Iterator[None]:
    """Compute fp32 GEMMs as `ieee` or `tf32` inside."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = word
    try:
        yield
    finally:
        settings.fp32_precision = before


def gemm_call(dtype: str, side: int) -> Callable[[int], object]:
    """A dense square GEMM on the GPU, its normal random operands made here."""
    a, b = (torch.randn(side, side, device="cuda").to(TORCH_DTYPES[dtype]) for _ in range(2))
    if dtype == "fp8":  # wants its second operand column by column, and scales
        one = torch.ones(1, device="cuda")
        return lambda _: torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    out = torch.empty_like(a)
    return lambda _: torch.mm(a, b, out=out)


def hold(work: Callable[[], object], is_enough: Callable[[], bool], most_s: float) -> None:
    """Repeat some work, each time to its end, until it is enough or time is up."""
    give_up = time.monotonic() + most_s
    while not is_enough() and time.monotonic() < give_up:
        work()


def device_gemm(dtype: str, side: int, quantity: str | None, core: bool) -> Probe:
    """Rate of a dense square GEMM on the GPU, and its clocks meanwhile under `facts`."""

    def run(limits: Limits) -> Measured:
        if dtype == "fp8" and torch.cuda.get_device_capability() < FP8_CAPABILITY:
            raise InputError("this GPU has no fp8 matrix units: they come with capability 8.9")
        need_free(3 * side * side * 4, "cuda")
        with fp32_precision("tf32" if dtype == "tf32" else "ieee"):
            call = gemm_call(dtype, side)
            cuda_clock(lambda: call(0))

            def tenfold() -> None:
                for number in range(10):
                    call(number)
                torch.cuda.synchronize()

            hold(tenfold, lambda: False, WARM_S)
            with smi.Sampler(gpu.smi_id()) as sampler:
                times = measure(call, cuda_clock, limits)
                hold(tenfold, lambda: sampler.failed or len(sampler.samples) >= LEAST_SAMPLES, SAMPLE_S)
                samples = list(sampler.samples)
        how = f"dense {dtype} GEMM of {side} x {side} x {side} on the GPU, normal random numbers"
        fast = " with fast accumulation, out in bf16" if dtype == "fp8" else ""
        return Measured(times, 2.0 * side**3, f"{how}{fast}, CUDA events, median", smi.seen(samples))

    return Probe("device_gemm", {"dtype": dtype, "side": side}, quantity, "flops_per_s", core, run)


def weight_stream(n_rows: int) -> Probe:
    """Bandwidth at which a bf16 GEMM of few rows reads its weights."""

    def run(limits: Limits) -> Measured:
        expert_bytes = EXPERT_K * EXPERT_N * 2
        flat = random_bytes(N_EXPERTS * expert_bytes, "cuda").view(torch.bfloat16)
        weights = [part.view(EXPERT_N, EXPERT_K).t() for part in flat.split(EXPERT_K * EXPERT_N)]
        rows = torch.randn(n_rows, EXPERT_K, device="cuda").to(torch.bfloat16)
        out = torch.empty(n_rows, EXPERT_N, dtype=torch.bfloat16, device="cuda")
        times = measure(lambda n: torch.mm(rows, weights[n % N_EXPERTS], out=out), cuda_clock, limits)
        how = f"bf16 GEMM of {n_rows} rows with {EXPERT_K} x {EXPERT_N} weights, {N_EXPERTS} in turn so that L2 is cold"
        return Measured(times, expert_bytes, f"{how}, bytes of weights alone, CUDA events, median")

    params: dict[str, Scalar] = {"dtype": "bf16", "n_rows": n_rows, "k": EXPERT_K, "n": EXPERT_N}
    return Probe("device_weight_stream", params, None, "bytes_per_s", False, run)


def null_kernel() -> None:
    """Launch the smallest kernel torch has, past its dispatcher: a wait of no cycles."""
    torch.cuda._sleep(0)


def burst_times(launch: Callable[[], object], size: int, limits: Limits) -> list[float]:
    """Host ns per launch call, each repeat a number of bursts onto an idle device; the waits between do not count."""

    def burst() -> None:
        for _ in range(size):
            launch()

    def once() -> float:
        torch.cuda.synchronize()
        return host_clock(burst)

    once()
    n_bursts = max(1, min(64, round(limits.min_repeat_ns / max(once(), 1.0))))
    return [sum(once() for _ in range(n_bursts)) / (n_bursts * size) for _ in range(limits.max_repeats)]


def queued_ns(work: Callable[[], object]) -> float:
    """Device ns of work that is all queued before the device begins it, so that no launch call is waited for.

    Raises InputError when even a second is too short for the host to queue it.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    cycles = SLEEP_CYCLES
    while cycles <= LONGEST_SLEEP_CYCLES:
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        start.record()
        work()
        end.record()
        is_late = start.query()  # the device came to the start before everything was queued
        end.synchronize()
        if not is_late:
            return float(start.elapsed_time(end)) * 1e6
        cycles *= 4
    raise InputError("the device began before the host had queued the work, however long it was held")


def launch_burst(core: bool) -> Probe:
    """What a launch costs the host when it does not wait."""

    def run(limits: Limits) -> Measured:
        times = burst_times(null_kernel, BURST, limits)
        return Measured(
            times, 1, f"host time of launching a null kernel from Python in bursts of {BURST}, not waited for"
        )

    return Probe("launch_burst", {}, "launch_overhead_ns", "ns", core, run)


def launch_round_trip() -> Probe:
    """A null kernel launched on an idle device and waited for."""

    def call(_: int) -> None:
        null_kernel()
        torch.cuda.synchronize()

    def run(limits: Limits) -> Measured:
        torch.cuda.synchronize()
        times = measure(call, host_clock, limits)
        return Measured(times, 1, "a null kernel launched and waited for, wall clock, median")

    return Probe("launch_round_trip", {}, None, "ns", False, run)


def null_kernel_duration() -> Probe:
    """Device time of a null kernel in a row of them."""

    def run(limits: Limits) -> Measured:
        def many() -> None:
            for _ in range(BURST):
                null_kernel()

        queued_ns(many)
        times = [queued_ns(many) / BURST for _ in range(limits.max_repeats)]
        how = f"{BURST} null kernels queued behind a wait, CUDA events around them: from start to start, gaps included"
        return Measured(times, 1, how)

    return Probe("null_kernel_in_stream", {}, "null_kernel_ns", "ns", False, run)


def null_graph(n_kernels: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of null kernels, replayed once."""
    torch.cuda.synchronize()
    null_kernel()  # a kernel must be loaded before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(n_kernels):
            null_kernel()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def graph_launch(n_kernels: int) -> Probe:
    """What launching a CUDA graph costs the host."""

    def run(limits: Limits) -> Measured:
        size = max(4, BURST // n_kernels // 4)
        times = burst_times(null_graph(n_kernels).replay, size, limits)
        how = f"host time of replaying a CUDA graph of {n_kernels} null kernels in bursts of {size}, not waited for"
        return Measured(times, 1, how)

    quantity = "graph_launch_ns" if n_kernels == 1 else None
    return Probe("graph_launch", {"n_kernels": n_kernels}, quantity, "ns", False, run)


def graph_kernel() -> Probe:
    """What each further kernel of a CUDA graph takes on the device."""

    def run(limits: Limits) -> Measured:
        one, many = null_graph(1), null_graph(N_GRAPH)
        queued_ns(one.replay), queued_ns(many.replay)
        pairs = [(queued_ns(one.replay), queued_ns(many.replay)) for _ in range(limits.max_repeats)]
        how = f"device time of a graph of {N_GRAPH} null kernels less that of one, over {N_GRAPH - 1}, CUDA events"
        return Measured([(long - short) / (N_GRAPH - 1) for short, long in pairs], 1, how)

    return Probe("graph_kernel", {"n_kernels": N_GRAPH}, "graph_kernel_ns", "ns", False, run)


def grouped_gemm_burst(dtype: str) -> Probe:
    """One grouped GEMM call after another without waiting: the slower of host and device."""

    def run(limits: Limits) -> Measured:
        kind = TORCH_DTYPES[dtype]
        rows, weights = torch.randn(1, 16, device="cuda").to(kind), torch.randn(1, 16, 16, device="cuda").to(kind)
        offs = torch.ones(1, dtype=torch.int32, device="cuda")
        times = measure(lambda _: grouped_mm(rows, weights, offs), cuda_clock, limits)
        return Measured(times, 1, f"{dtype} grouped GEMMs of 1 group, 1 row, 16 x 16 in a row, CUDA events, per call")

    return Probe("grouped_gemm_burst", {"dtype": dtype}, None, "ns", False, run)


def by_turns(*lists: Sequence[Probe]) -> list[Probe]:
    """Lists as one, so that any beginning holds about the same part of each; their own orders stay."""
    places = [((at + 0.5) / len(one), number, at) for number, one in enumerate(lists) for at in range(len(one))]
    return [lists[number][at] for _, number, at in sorted(places)]


def _gemms(dtypes: Sequence[str], preset: str) -> list[Probe]:
    wanted = [*dtypes, *(d for d in ALL_DTYPES if d not in dtypes and preset != "quick")]
    return [
        device_gemm(dtype, side, f"{dtype}_gemm_flops_per_s", core=(dtype, place) == (wanted[0], 0))
        for dtype in wanted
        for place, side in enumerate(SIDES[preset])
    ]


def cuda_probes(dtypes: Sequence[str], threads: int, preset: str) -> list[Probe]:
    """The probes of a machine with a GPU, the most important first: what models need before what explains them."""
    n_bytes = STREAM_BYTES[preset]
    streams = [
        device_stream("read", n_bytes, "memory_stream_bytes_per_s", core=True),
        device_stream("copy", n_bytes, "memory_copy_bytes_per_s", core=False),
        device_stream("triad", n_bytes, "memory_triad_bytes_per_s", core=False),
    ]
    callable_dtypes = [dtype for dtype in dtypes if dtype in ("bf16", "fp16", "fp32")] or ["bf16"]
    overheads = [
        probes_host.call_overhead("cuda", dtype, None if place else "call_overhead_ns", core=not place)
        for place, dtype in enumerate(callable_dtypes)
    ]
    first_link, more_link = probes_link.link_probes(preset)
    host = probes_host.host_probes(threads, preset)
    gemms = _gemms(dtypes, preset)
    return [
        gemms[0],
        *streams,
        *first_link,
        launch_burst(core=True),
        null_kernel_duration(),
        graph_launch(1),
        graph_kernel(),
        *overheads,
        launch_round_trip(),
        *gemms[1 : len(dtypes)],
        *host[:3],
        *probes_link.beside_probes(threads, preset),
        # What explains: cut anywhere, it leaves something of each.
        *by_turns(
            more_link,
            host[3:],
            gemms[len(dtypes) :],
            [weight_stream(n_rows) for n_rows in STREAM_ROWS[preset]],
            [graph_launch(N_GRAPH), *[grouped_gemm_burst(dtype) for dtype in callable_dtypes]],
        ),
    ]

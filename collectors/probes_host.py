"""Probes of a CPU and its memory: streams by thread count, dense GEMMs, GEMMs of one expert by rows, call overhead.

The same probes serve a machine that computes on its CPU and the host beside a GPU; only the names of the machine
numbers differ.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from perfmodel.errors import InputError

from . import machine
from .calibration import Scalar
from .layer import grouped_mm
from .probes import TORCH_DTYPES, Measured, Probe, cpu_threads, need_free, random_bytes
from .timing import Limits, clock_of, host_clock, measure

FALLBACK_CACHE_BYTES = 1 << 25
STREAM_OVER_CACHE = 8  # a streamed array is this many last-level caches large
LEAST_STREAM_BYTES, MOST_STREAM_BYTES = 1 << 26, 1 << 31
MEMORY_PARTS = 8  # and at most this part of memory
PROBE_SIDE, GEMM_SIDES = 512, (8192, 4096, 2048, 1024, 512)
GEMM_NS = 200_000_000  # a dense GEMM should not take longer than this
EXPERTS = ((2048, 2048), (7168, 2048))  # K x N of one expert's GEMM: small and large models
COLD_CACHES, MOST_COLD_BYTES = 4, 1 << 30  # weights are read again after this many last-level caches of others
EXPERT_NS = {"quick": 200_000_000, "standard": 3_000_000_000, "full": 5_000_000_000}  # for all calls of one probe
ROWS = {
    "quick": (1, 16, 256),
    "standard": (1, 4, 16, 64, 256, 1024, 4096),
    "full": tuple(2**i for i in range(13)),
}

# Kernels of a stream: arrays it touches, and of how many arrays bytes count.
STREAMS: Mapping[str, tuple[int, str]] = {
    "read": (1, "sum of one array"),
    "copy": (2, "copy, one array read and one written"),
    "triad": (3, "triad, two arrays read and one written"),
}


def where_of(device: str) -> str:
    """How times on a device are taken, in words."""
    return "CUDA events" if device == "cuda" else "wall clock"


def stream_bytes() -> int:
    """Size of a streamed array: 8 last-level caches, within bounds and an eighth of memory; a multiple of 4 KiB."""
    wanted = STREAM_OVER_CACHE * (machine.last_level_cache_bytes() or FALLBACK_CACHE_BYTES)
    most = min(MOST_STREAM_BYTES, (machine.memory_bytes() or 4 << 30) // MEMORY_PARTS)
    return max(min(max(wanted, LEAST_STREAM_BYTES), most) // 4096, 1) * 4096


def stream_kernel(kernel: str, n_bytes: int, device: str) -> Callable[[int], object]:
    """A call that streams through arrays of so many bytes in fp32, allocated and filled here."""
    arrays = [random_bytes(n_bytes, device).view(torch.float32) for _ in range(STREAMS[kernel][0])]
    if kernel == "read":
        return lambda _: arrays[0].sum()
    if kernel == "copy":
        return lambda _: arrays[1].copy_(arrays[0])
    return lambda _: torch.add(arrays[0], arrays[1], alpha=3.0, out=arrays[2])


def host_stream(kernel: str, count: int, threads: int, n_bytes: int, quantity: str, core: bool) -> Probe:
    """Bandwidth of one streaming kernel on some of the threads."""

    def run(limits: Limits) -> Measured:
        n_arrays, words = STREAMS[kernel]
        with cpu_threads(threads):  # all of them touch the pages first, however many stream
            need_free(n_arrays * n_bytes, "cpu")
            call = stream_kernel(kernel, n_bytes, "cpu")
            torch.set_num_threads(count)
            times = measure(call, host_clock, limits)
        nodes = machine.n_nodes_in_use()
        return Measured(
            times,
            n_arrays * n_bytes,
            f"{words}, {n_bytes} bytes an array, {count} threads, pages first touched by {threads} on {nodes} memory "
            f"node{'s' * (nodes > 1)}; each array counted once, without the read that a write may cost; median",
        )

    params: dict[str, Scalar] = {"kernel": kernel, "threads": count, "n_bytes": n_bytes}
    return Probe("host_stream", params, quantity, "bytes_per_s", core, run)


def dense_gemm(device: str, dtype: str, threads: int, quantity: str | None, core: bool) -> Probe:
    """Rate of a dense square GEMM on the CPU, as large as fits a fifth of a second."""

    def times(side: int, limits: Limits) -> list[float]:
        a, b = (torch.randn(side, side, device=device).to(TORCH_DTYPES[dtype]) for _ in range(2))
        out = torch.empty_like(a)
        return measure(lambda _: torch.mm(a, b, out=out), clock_of(device), limits)

    def run(limits: Limits) -> Measured:
        with cpu_threads(threads):
            probe_ns = statistics.median(times(PROBE_SIDE, limits))
            side = next((s for s in GEMM_SIDES if probe_ns * (s / PROBE_SIDE) ** 3 < GEMM_NS), PROBE_SIDE)
            need_free(3 * side * side * 4, device)
            found = times(side, limits)
        how = f"dense {dtype} GEMM of {side} x {side} x {side}, preallocated, normal random numbers, {where_of(device)}"
        return Measured(found, 2 * side**3, f"{how}, {threads} threads, median")

    return Probe("dense_gemm", {"dtype": dtype, "on": device}, quantity, "flops_per_s", core, run)


def expert_weights(k: int, n: int, dtype: str) -> list[Tensor]:
    """Weights `[K, N]` of several experts, as views of what lies `[N, K]`: enough that each is cold when used again."""
    expert_bytes = k * n * TORCH_DTYPES[dtype].itemsize
    cold_bytes = COLD_CACHES * (machine.last_level_cache_bytes() or FALLBACK_CACHE_BYTES)
    n_experts = max(2, min(cold_bytes, MOST_COLD_BYTES) // expert_bytes + 1)
    flat = random_bytes(n_experts * expert_bytes).view(TORCH_DTYPES[dtype])
    return [weights.view(n, k).t() for weights in flat.split(k * n)]


def expert_call(weights: Sequence[Tensor], n_rows: int) -> Callable[[int], object]:
    """The GEMM of one expert on so many rows; the n-th call takes the n-th expert, round and round."""
    k, n = weights[0].shape
    rows = torch.randn(n_rows, k).to(weights[0].dtype)
    out = torch.empty(n_rows, n, dtype=weights[0].dtype)
    return lambda number: torch.mm(rows, weights[number % len(weights)], out=out)


def refuse_slow(call_for: Callable[[int], Callable[[int], object]], n_rows: int, limits: Limits, most_ns: int) -> None:
    """Raise InputError when measuring on so many rows would take longer than `most_ns`, judged by fewer rows first."""
    n_calls = limits.min_repeats + 2
    for fewer in itertools.takewhile(lambda rows: rows <= n_rows, (1, 16, 256, 4096)):
        call = call_for(fewer)
        call(0)
        # More than 16 rows: compute grows with them. Up to there a GEMM reads its weights in much the same time.
        expected_ns = host_clock(partial(call, 1)) * n_calls * (n_rows / fewer if fewer >= 16 else 1)
        if expected_ns > most_ns:
            raise InputError(f"{n_rows} rows would take about {expected_ns / 1e9:.1f} s, more than {most_ns / 1e9:.1f}")
        if fewer * 16 > n_rows:
            return


def expert_gemm(
    dtype: str, shape: tuple[int, int], n_rows: int, threads: int, preset: str, quantity: str | None
) -> Probe:
    """Rate of the GEMM of one expert on the CPU, its weights cold."""
    k, n = shape

    def run(limits: Limits) -> Measured:
        with cpu_threads(threads):
            weights = expert_weights(k, n, dtype)
            refuse_slow(partial(expert_call, weights), n_rows, limits, EXPERT_NS[preset])
            times = measure(expert_call(weights, n_rows), host_clock, limits)
        how = f"GEMM of {n_rows} rows with {k} x {n} {dtype} weights on {threads} CPU threads, wall clock, median"
        return Measured(times, 2.0 * n_rows * k * n, f"{how}; {len(weights)} experts in turn so that weights are cold")

    params: dict[str, Scalar] = {"dtype": dtype, "k": k, "n": n, "n_rows": n_rows, "threads": threads}
    return Probe("host_expert_gemm", params, quantity, "flops_per_s", False, run)


def call_overhead(device: str, dtype: str, quantity: str | None, core: bool) -> Probe:
    """Time of one grouped GEMM call with next to no work, host time included."""

    def run(limits: Limits) -> Measured:
        kind = TORCH_DTYPES[dtype]
        rows, weights = torch.randn(1, 16, device=device).to(kind), torch.randn(1, 16, 16, device=device).to(kind)
        offs = torch.ones(1, dtype=torch.int32, device=device)
        finish: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None

        def call(_: int) -> None:
            grouped_mm(rows, weights, offs)
            finish()

        times = measure(call, host_clock, limits)
        return Measured(times, 1, f"{dtype} grouped GEMM of 1 group, 1 row, 16 x 16, wall clock, waited for, median")

    return Probe("grouped_gemm_call", {"dtype": dtype, "on": device}, quantity, "ns", core, run)


def _counts(threads: int, preset: str) -> list[int]:
    some = {threads} if preset == "quick" else {1, max(1, threads // 2), threads}
    return sorted(some | ({max(1, threads // 4)} if preset == "full" else set()), reverse=True)


def _streams(quantities: Mapping[str, str], threads: int, preset: str, core: bool) -> list[Probe]:
    """Streams on all threads first, then on fewer; of the few threads the read alone, which says the most."""
    n_bytes, found = stream_bytes(), []
    for count in _counts(threads, preset):
        kernels = STREAMS if count > 1 or threads == 1 or preset == "full" else ("read",)
        for kernel in kernels:
            is_core = core and count == threads and kernel != "copy"
            found.append(host_stream(kernel, count, threads, n_bytes, quantities[kernel], is_core))
    return found


def _experts(dtypes: Sequence[str], threads: int, preset: str, quantity: str | None) -> list[Probe]:
    shapes = EXPERTS[:1] if preset == "quick" else EXPERTS
    rows = ROWS[preset]
    rows = (rows[-1], rows[0], *rows[2:-1:2], *rows[1:-1:2])  # any beginning spans them, and has the highest rate
    return [
        expert_gemm(dtype, shape, n_rows, threads, preset, quantity)
        for shape in shapes
        for n_rows in rows
        for dtype in dtypes
    ]


def cpu_probes(dtypes: Sequence[str], threads: int, preset: str) -> list[Probe]:
    """The probes of a machine that computes on its CPU."""
    of_cpu = [dtype for dtype in dtypes if dtype in ("fp32", "bf16")]
    others = [dtype for dtype in ("fp32", "bf16") if dtype not in of_cpu and preset != "quick"]
    quantities = {
        "read": "memory_stream_bytes_per_s",
        "copy": "memory_copy_bytes_per_s",
        "triad": "memory_triad_bytes_per_s",
    }
    streams = _streams(quantities, threads, preset, core=True)
    gemms = [dense_gemm("cpu", dtype, threads, f"{dtype}_gemm_flops_per_s", core=True) for dtype in of_cpu]
    overheads = [
        call_overhead("cpu", dtype, "call_overhead_ns" if dtype == of_cpu[0] else None, core=dtype == of_cpu[0])
        for dtype in of_cpu
    ]
    return [
        *gemms,
        *[probe for probe in streams if probe.core],
        *overheads,
        *[probe for probe in streams if not probe.core],
        *[dense_gemm("cpu", dtype, threads, f"{dtype}_gemm_flops_per_s", core=False) for dtype in others],
        *_experts([*of_cpu, *others], threads, preset, None),
    ]


def host_probes(threads: int, preset: str) -> list[Probe]:
    """The probes of the host beside a GPU."""
    dtypes = ("bf16",) if preset == "quick" else ("bf16", "fp32")
    streams = _streams(dict.fromkeys(STREAMS, "host_stream_bytes_per_s"), threads, preset, core=False)
    return [
        *streams[: len(STREAMS)],
        *_experts(dtypes, threads, preset, "host_gemm_flops_per_s"),
        *streams[len(STREAMS) :],
        *[dense_gemm("cpu", dtype, threads, "host_gemm_flops_per_s", core=False) for dtype in dtypes],
        call_overhead("cpu", "bf16", None, core=False),
    ]

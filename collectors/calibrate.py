"""The few numbers of a machine that a roofline needs, measured: names and units are those of perfmodel.hardware."""

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from perfmodel.text import NS_PER_S

from . import machine
from .layer import grouped_mm
from .timing import Clock, Limits, host_clock, measure, spread_frac

Entry = dict[str, float | int | str]
PROBE_SIDE, GEMM_SIDES = 512, (8192, 4096, 2048, 1024, 512)
GEMM_NS = 200_000_000  # a dense GEMM should not take longer than this
STREAM_OVER_CACHE = 8  # a streamed array is this many last-level caches large


def entry(times_ns: list[float], value_of: Callable[[float], float], how: str) -> Entry:
    """A calibration number: the value at the median time, the scatter and number of repeats, and how it was made."""
    return {
        "value": float(f"{value_of(statistics.median(times_ns)):.6g}"),
        "spread_frac": round(spread_frac(times_ns), 4),
        "n": len(times_ns),
        "how": how,
    }


def stated(value: int, how: str) -> Entry:
    """A number the system tells: no scatter, one reading."""
    return {"value": float(value), "spread_frac": 0.0, "n": 1, "how": how}


def cuda_clock(work: Callable[[], object]) -> float:
    """Device time in ns between two events around work in the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e6


def clock_of(device: str) -> Clock:
    """The clock for work on a device."""
    return cuda_clock if device == "cuda" else host_clock


def gemm(device: str, dtype: torch.dtype, limits: Limits) -> Entry:
    """Rate of a dense square GEMM, as large as fits a fifth of a second."""
    clock = clock_of(device)

    def times(side: int, budget: Limits) -> list[float]:
        a = torch.randn(side, side, device=device).to(dtype)
        b = torch.randn(side, side, device=device).to(dtype)
        out = torch.empty_like(a)
        return measure(lambda _: torch.mm(a, b, out=out), clock, budget)

    probe_ns = statistics.median(times(PROBE_SIDE, limits))
    side = next((s for s in GEMM_SIDES if probe_ns * (s / PROBE_SIDE) ** 3 < GEMM_NS), PROBE_SIDE)
    where = "CUDA events" if device == "cuda" else "wall clock"
    how = f"dense GEMM of {side} x {side} x {side}, preallocated, {where}, median"
    return entry(times(side, limits), lambda ns: 2 * side**3 * NS_PER_S / ns, how)


def cpu_stream(threads: int, cache_bytes: int, limits: Limits) -> Entry:
    """Best rate of reading an array much larger than the caches, or of a triad, over thread counts."""
    n = STREAM_OVER_CACHE * cache_bytes // 4
    a, b, out = torch.ones(n), torch.full((n,), 2.0), torch.zeros(n)
    kernels: dict[str, tuple[Callable[[int], object], int]] = {
        "sum of one array (read only)": (lambda _: a.sum(), 4 * n),
        "triad, two arrays read and one written": (lambda _: torch.add(a, b, alpha=3.0, out=out), 12 * n),
    }
    best: Entry | None = None
    try:
        for count in sorted({1, max(1, threads // 2), threads}):
            torch.set_num_threads(count)
            for name, (kernel, n_bytes) in kernels.items():
                how = f"{name}, {4 * n} bytes an array, {count} threads, the best of threads and of read and triad"
                found = entry(measure(kernel, host_clock, limits), lambda ns, b=n_bytes: b * NS_PER_S / ns, how)
                best = found if best is None or float(found["value"]) > float(best["value"]) else best
    finally:
        torch.set_num_threads(threads)
    assert best is not None
    return best


def call_overhead(device: str, dtype: torch.dtype, limits: Limits) -> Entry:
    """Time of one grouped GEMM call with next to no work, host time included."""
    rows, weights = torch.randn(1, 16, device=device).to(dtype), torch.randn(1, 16, 16, device=device).to(dtype)
    offs = torch.ones(1, dtype=torch.int32, device=device)
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None

    def call(_: int) -> None:
        grouped_mm(rows, weights, offs)
        finish()

    times = measure(call, host_clock, limits)
    return entry(times, lambda ns: ns, "grouped GEMM of 1 group, 1 row, 16 x 16, wall clock, waited for, median")


def copy_rate(source: torch.Tensor, target: torch.Tensor, moved_bytes: int, how: str, limits: Limits) -> Entry:
    """Rate of a copy that the device makes, by CUDA events."""
    times = measure(lambda _: target.copy_(source, non_blocking=True), cuda_clock, limits)
    return entry(times, lambda ns: moved_bytes * NS_PER_S / ns, how)


def cuda_numbers(limits: Limits) -> dict[str, Entry]:
    """Device memory, link and launch numbers of the current GPU. Plain allocations; clocks and power are left alone."""
    properties = torch.cuda.get_device_properties(0)
    n = min(1 << 28, torch.cuda.mem_get_info()[0] // 8)
    a, b = torch.ones(n, dtype=torch.uint8, device="cuda"), torch.ones(n, dtype=torch.uint8, device="cuda")
    pinned = torch.ones(n, dtype=torch.uint8, pin_memory=True)
    tiny = torch.ones(1, device="cuda")

    def round_trip(_: int) -> None:
        tiny.add_(1)
        torch.cuda.synchronize()

    launch = measure(round_trip, host_clock, limits)
    return {
        "memory_stream_bytes_per_s": copy_rate(
            a, b, 2 * n, f"device copy of {n} bytes, read and write counted", limits
        ),
        "link_h2d_copy_bytes_per_s": copy_rate(pinned, a, n, f"copy of {n} bytes from pinned host memory", limits),
        "link_d2h_copy_bytes_per_s": copy_rate(a, pinned, n, f"copy of {n} bytes to pinned host memory", limits),
        "launch_overhead_ns": entry(
            launch, lambda ns: ns, "one smallest kernel launched and waited for, wall clock: an upper bound"
        ),
        "l2_capacity_bytes": stated(properties.L2_cache_size, "told by the driver"),
        "n_cores_count": stated(properties.multi_processor_count, "told by the driver"),
        "memory_capacity_bytes": stated(properties.total_memory, "told by the driver"),
    }


def calibrate(device: str, dtype: str, threads: int, limits: Limits) -> dict[str, Entry]:
    """The calibration part of capture.json: quantity name to value in base units, scatter, repeats and how."""
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    found = {
        f"{dtype}_gemm_flops_per_s": gemm(device, torch_dtype, limits),
        "call_overhead_ns": call_overhead(device, torch_dtype, limits),
    }
    if device == "cuda":
        return {**found, **cuda_numbers(limits)}
    cache_bytes, memory_bytes = machine.last_level_cache_bytes(), machine.memory_bytes()
    found["memory_stream_bytes_per_s"] = cpu_stream(threads, cache_bytes or 1 << 25, limits)
    found["n_cores_count"] = stated(machine.n_physical_cores(), "physical cores this process may use")
    if cache_bytes is not None:
        found["l2_capacity_bytes"] = stated(cache_bytes, "last-level caches the usable cores reach, told by the kernel")
    if memory_bytes is not None:
        found["memory_capacity_bytes"] = stated(memory_bytes, "memory of the machine or its control group")
    return found


def pooled(processes: Sequence[Mapping[str, Entry]]) -> dict[str, Entry]:
    """One calibration of those of several processes: of each number the middle one, `n` counting the processes.

    Its scatter is that of the repeats inside the process or of the values between processes, whichever is larger.
    """
    found = {}
    for name, first in processes[0].items():
        entries = sorted((numbers[name] for numbers in processes if name in numbers), key=lambda e: float(e["value"]))
        if len(entries) == 1:
            found[name] = first
            continue
        middle = entries[(len(entries) - 1) // 2]
        between = round(spread_frac([float(e["value"]) for e in entries]), 4)
        found[name] = {**middle, "spread_frac": max(float(middle["spread_frac"]), between), "n": len(entries)}
    return found

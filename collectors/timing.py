"""How a point is timed: warm up, then repeats of batches of calls until the median is known well enough.

A repeat is a batch of calls back to back, long enough for the clock; what is kept is the mean time of its calls. The
clock is an argument, so that tests run on a false one and CUDA brings its events; only that one needs torch.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Call = Callable[[int], object]  # the n-th call; n chooses the rotated weights
Clock = Callable[[Callable[[], object]], float]  # runs some work to its end, returns the ns it took

QUIET_CORES = 0.2  # cores that others may use while a point is measured
TICKS_S = 0.03  # the system counts processor time in ticks of 10 ms
LOOK_S = 0.5  # how long one looks whether others are busy
MEDIAN_ERROR = 1.2533  # standard error of the median of normal errors, in those of the mean: sqrt(pi / 2)
MAD_TO_SIGMA, MEAN_DEVIATION_TO_SIGMA = 1.4826, 1.2533  # of normal errors


@dataclass(frozen=True)
class Limits:
    """When a point is measured enough, at most `max_repeats` repeats kept; a run waits `patience_s` for other work."""

    min_repeat_ns: int
    point_ns: int
    min_repeats: int = 5
    max_repeats: int = 7
    error_frac: float = 0.02
    n_tries: int = 1
    patience_s: float = 0.0


FULL = Limits(min_repeat_ns=20_000_000, point_ns=400_000_000, n_tries=6, patience_s=900.0)
QUICK = Limits(min_repeat_ns=2_000_000, point_ns=100_000_000)
STANDARD = Limits(min_repeat_ns=20_000_000, point_ns=400_000_000, n_tries=3, patience_s=60.0)
CUDA = Limits(min_repeat_ns=5_000_000, point_ns=200_000_000, max_repeats=15)  # events are exact, the host is not shared


def host_clock(work: Callable[[], object]) -> float:
    """Wall time in ns of work that is finished when it returns."""
    start = time.perf_counter_ns()
    work()
    return time.perf_counter_ns() - start


def spread_frac(times: list[float]) -> float:
    """Scatter of repeats: median absolute deviation, scaled to a standard deviation, over the median."""
    middle = float(np.median(times))
    return MAD_TO_SIGMA * float(np.median(np.abs(np.array(times) - middle))) / middle if middle > 0 else 0.0


def median_error_frac(times: list[float]) -> float:
    """Standard error of the median of repeats, as a fraction of it, from the mean absolute deviation about the median.

    Not from the median deviation: that is zero when most of a few repeats agree, however far off the others are.
    """
    middle = float(np.median(times))
    sigma = MEAN_DEVIATION_TO_SIGMA * float(np.mean(np.abs(np.array(times) - middle)))
    return MEDIAN_ERROR * sigma / math.sqrt(len(times)) / middle if middle > 0 else 0.0


def measure(call: Call, clock: Clock, limits: Limits) -> list[float]:
    """Mean ns per call of each repeat; at least one warm-up call and `min_repeats` repeats are made."""
    n_calls = 0

    def batch(size: int) -> float:
        nonlocal n_calls
        first, n_calls = n_calls, n_calls + size

        def work() -> None:
            for number in range(first, first + size):
                call(number)

        return clock(work) / size

    warm_ns = batch(1)
    if warm_ns < limits.min_repeat_ns:  # the first call pays for pages and thread pools: look again before sizing
        warm_ns = batch(max(1, min(10, int(limits.min_repeat_ns / max(warm_ns, 1.0)))))
    size = max(1, math.ceil(limits.min_repeat_ns / max(warm_ns, 1.0)))
    times: list[float] = []
    spent_ns = 0.0
    while len(times) < limits.max_repeats:
        times.append(batch(size))
        spent_ns += times[-1] * size
        if len(times) >= limits.min_repeats:
            error = median_error_frac(times)
            if error < limits.error_frac or spent_ns > limits.point_ns:
                break
    return times


def wait_for_quiet(others_busy_s: Callable[[], float | None], patience_s: float) -> float:
    """Sleep until other processes leave the machine alone or patience ends; returns the seconds waited."""
    started = time.monotonic()
    while time.monotonic() - started < patience_s:
        before = others_busy_s()
        time.sleep(LOOK_S)
        after = others_busy_s()
        if before is None or after is None or after - before <= QUIET_CORES * LOOK_S:
            break
    return time.monotonic() - started


def measure_undisturbed(
    attempt: Callable[[], list[float]], others_busy_s: Callable[[], float | None], n_tries: int, patience_s: float
) -> tuple[list[float], bool, float]:
    """The repeats of the least disturbed of up to n_tries attempts, whether others disturbed even that, seconds waited.

    Busy processes beside slow parallel kernels tenfold; repeats alone do not show it when all are slow. After a
    disturbed attempt the next one waits for quiet, as long as patience lasts.
    """
    best: tuple[float, list[float]] | None = None
    waited_s = 0.0
    for n_left in reversed(range(n_tries)):
        started, busy_s = time.monotonic(), others_busy_s()
        times = attempt()
        wall_s, later_s = time.monotonic() - started, others_busy_s()
        if busy_s is None or later_s is None:
            return times, False, waited_s
        disturbance = max(0.0, later_s - busy_s - TICKS_S) / wall_s
        if best is None or disturbance < best[0]:
            best = disturbance, times
        if best[0] <= QUIET_CORES or n_left == 0 or waited_s >= patience_s:
            break
        waited_s += wait_for_quiet(others_busy_s, patience_s - waited_s)
    assert best is not None
    return best[1], best[0] > QUIET_CORES, waited_s


def cuda_clock(work: Callable[[], object]) -> float:
    """Device time in ns between two events around work in the current stream."""
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e6


def clock_of(device: str) -> Clock:
    """The clock for work on a device."""
    return cuda_clock if device == "cuda" else host_clock

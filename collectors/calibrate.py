"""The core numbers of a machine as one table, measured anew: what a sweep notes before its first and after each run."""

from . import probes
from .calibration import Entry, pooled, summary
from .timing import Limits, clock_of, cuda_clock

__all__ = ["calibrate", "clock_of", "cuda_clock", "pooled"]


def calibrate(device: str, dtype: str, threads: int, limits: Limits) -> dict[str, Entry]:
    """The calibration part of capture.json: quantity name to value in base units, scatter, repeats and how."""
    core = [probe for probe in probes.probes(device, [dtype], threads, "quick") if probe.core]
    lines = [probes.run_probe(probe, limits, run=0) for probe in core]
    return {**summary(lines), **probes.stated_numbers(device)}

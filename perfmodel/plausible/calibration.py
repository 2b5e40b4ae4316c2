"""Can the calibrated numbers be true: against what the machine can do, against each other, and over the runs."""

from collections import defaultdict
from collections.abc import Iterator

from perfmodel import text
from perfmodel.capture_lines import CALIBRATION, MANIFEST
from perfmodel.plausible.ceilings import (
    GENERIC_GPU_FLOPS_PER_S,
    GENERIC_MEMORY_BYTES_PER_S,
    best_calibrated,
    ceilings_of,
    limit_of,
)
from perfmodel.plausible.folder import ERROR, WARNING, Finding, Folder

# A launch, a null kernel or a call on next to nothing takes this long on some machine; outside lies a slip of unit.
SHORTEST_NS, LONGEST_NS = 50.0, 50e6
ORDER_MARGIN = 1.05  # two rates that must be in order may stand the other way round by the noise of a quiet machine
SUM_MARGIN = 1.10  # both directions at once against the sum of each alone
SCATTER_FRAC = 0.15  # of repeats or runs of a calibrated number, as a standard deviation over the median
DRIFT = 1.5  # how far apart runs may measure one number before it deserves a word

# (what cannot be faster, than what, why)
ORDERED = (
    ("link_h2d_pageable_bytes_per_s", "link_h2d_copy_bytes_per_s", "a pageable copy passes through pinned memory"),
    ("link_d2h_pageable_bytes_per_s", "link_d2h_copy_bytes_per_s", "a pageable copy passes through pinned memory"),
    ("link_h2d_contended_bytes_per_s", "link_h2d_copy_bytes_per_s", "the host's memory is shared while it computes"),
    ("host_gemm_contended_flops_per_s", "host_gemm_flops_per_s", "the host's memory is shared while copies run"),
    ("graph_kernel_ns", "graph_launch_ns", "a further kernel of a graph costs less than launching it"),
)
ORDERED_ON_GPU = (
    ("fp32_gemm_flops_per_s", "bf16_gemm_flops_per_s", "fp32 takes more work than bf16"),
    ("bf16_gemm_flops_per_s", "fp8_gemm_flops_per_s", "bf16 takes more work than fp8"),
    ("link_h2d_copy_bytes_per_s", "memory_stream_bytes_per_s", "the link is slower than device memory"),
)


def calibrated_rates(folder: Folder) -> Iterator[Finding]:
    """No calibrated rate exceeds the nominal one of its machine, and no time is impossibly short or long."""
    ceilings = ceilings_of(folder)
    several = [folder.manifest.calibration, *(run.calibration or {} for run in folder.manifest.runs)]
    for key, value in sorted({(key, number.value) for numbers in several for key, number in numbers.items()}):
        if key.endswith("_ns") and not SHORTEST_NS <= value <= LONGEST_NS:
            words = f"{key} is {text.ns(value)}, expected {text.ns(SHORTEST_NS)} to {text.ns(LONGEST_NS)}"
            limit = SHORTEST_NS if value < SHORTEST_NS else LONGEST_NS
            yield Finding(ERROR, "physics", "impossible time", words, f"calibration.{key}", value, limit)
    for key, value in sorted(best_calibrated(folder).items()):
        where = f"calibration.{key}"
        limit_found = limit_of(key, ceilings)
        if limit_found is not None and value > limit_found.value:
            words = f"{key} is {text.figure(key, value)}, more than {text.figure(key, limit_found.value)}"
            words += f", which is what {limit_found.source} allows"
            yield Finding(ERROR, "physics", "impossible rate", words, where, value, limit_found.value)
        elif ceilings.manifest_link and key.startswith("link_") and key.endswith("_per_s"):
            allowed = ceilings.manifest_link.value * (2 if key.startswith("link_both") else 1)
            if value > allowed:
                words = f"{key} is {text.figure(key, value)}, more than {ceilings.manifest_link.source} carries: "
                words += "the manifest misreads the link"
                yield Finding(WARNING, "physics", "link", words, where, value, allowed)


def calibration_details(folder: Folder) -> Iterator[Finding]:
    """No measurement of a probe without a quantity is beyond what any machine does."""
    most = {"bytes_per_s": GENERIC_MEMORY_BYTES_PER_S, "flops_per_s": max(GENERIC_GPU_FLOPS_PER_S.values())}
    for number, line in folder.calibrations:
        limit = most.get(line.unit)
        if line.quantity is None and limit is not None and line.value > limit:
            words = f"{line.probe} gave {text.in_unit(line.value, line.unit)}, more than any machine does"
            yield Finding(
                ERROR, "physics", "impossible rate", words, f"{CALIBRATION}, line {number}", line.value, limit
            )


def calibration_order(folder: Folder) -> Iterator[Finding]:
    """Rates that must be in order are: pageable under pinned, contended under alone, both ways under their sum."""
    entries = folder.manifest.calibration
    for small, large, why in (*ORDERED, *(ORDERED_ON_GPU if folder.is_cuda else ())):
        if small not in entries or large not in entries:
            continue
        value, limit = entries[small].value, entries[large].value
        noise = 3 * max(entries[small].spread_frac or 0.0, entries[large].spread_frac or 0.0)
        if value > limit * max(ORDER_MARGIN, 1 + noise):
            words = f"{small} ({text.figure(small, value)}) exceeds {large} ({text.figure(large, limit)}), yet {why}"
            yield Finding(WARNING, "physics", "order of rates", words, MANIFEST, value, limit)
    h2d, d2h, both = (entries.get(f"link_{k}_copy_bytes_per_s") for k in ("h2d", "d2h", "both"))
    if h2d and d2h and both:
        limit = SUM_MARGIN * (h2d.value + d2h.value)
        if both.value > limit:
            words = f"copies both ways reach {text.bytes_per_s(both.value)}, more than the sum of each alone"
            yield Finding(WARNING, "physics", "order of rates", words, MANIFEST, both.value, limit)


def scatter(folder: Folder) -> Iterator[Finding]:
    """The repeats of each calibrated number agree."""
    for key, entry in folder.manifest.calibration.items():
        if (entry.spread_frac or 0.0) > SCATTER_FRAC:
            words = f"{key} scatters by {text.frac(entry.spread_frac)}: the machine was busy, or its clocks moved"
            yield Finding(WARNING, "noise", "scatter", words, MANIFEST, entry.spread_frac, SCATTER_FRAC)


def drift(folder: Folder) -> Iterator[Finding]:
    """What the machine could do stayed the same over the runs."""
    values: dict[str, list[float]] = defaultdict(list)
    for run in folder.manifest.runs:
        for key, entry in (run.calibration or {}).items():
            values[key].append(entry.value)
    for _, line in folder.calibrations:
        if line.quantity is not None:
            # One number for each set of parameters: thread counts and sizes differ, runs should not.
            params = ", ".join([line.probe, *(f"{key} {value}" for key, value in sorted(line.params.items()))])
            values[f"{line.quantity} ({params})"].append(line.value)
    moved = []
    for key, several in values.items():
        low, high = min(several), max(several)
        if low > 0 and high > DRIFT * low:
            name = key.partition(" ")[0]
            words = f"{key} drifts from {text.figure(name, low)} to {text.figure(name, high)} between runs"
            moved.append(Finding(WARNING, "noise", "drift", words, MANIFEST, high / low, DRIFT))
    yield from sorted(moved, key=lambda f: -(f.value or 0.0))


CHECKS = (calibrated_rates, calibration_details, calibration_order, scatter, drift)

"""Can the measured times be true: against the machine's roofs, against each other, and as repeats of one thing."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from perfmodel import text
from perfmodel.capture_lines import GRAPH, MANIFEST, OBSERVATIONS_FILE, RESIDENT, ObservationLine, WorkloadLine
from perfmodel.moe import WEIGHT_BYTES
from perfmodel.plausible.ceilings import Ceilings, Limit, best_calibrated, ceilings_of
from perfmodel.plausible.folder import ERROR, WARNING, Finding, Folder, label
from perfmodel.text import NS_PER_S

# Calibration reads one size of one kernel: another may do somewhat better. On a machine shared with others calibration
# read 68 GFLOP/s where a point of the next minute reached 114, and 104 where others reached 186.
CALIBRATED_MARGIN, CALIBRATED_LIMIT = 1.25, 3.0
LINK_RATES = ("link_h2d_copy_bytes_per_s", "link_kernel_read_bytes_per_s", "link_system_read_bytes_per_s")
CALL_FRAC = 0.25  # of the calibrated grouped GEMM call: less is no call (on a CPU, where calls do not overlap)
FASTEST_GPU_NS = 400.0  # less than the shortest kernels take, replayed from a graph or not
MEDIAN_ERROR, MEAN_DEVIATION_TO_SIGMA = 1.2533, 1.2533  # as collectors take them: sqrt(pi / 2) twice, normal errors
DEFAULT_ERROR_FRAC = 0.02
NOISY_FRAC = 0.5  # share of points above the stated error that deserves a word
DISTURBED_FRAC = 0.2  # share of points during which other processes were busy
SLOWED = ("slowdown", "brake")  # reasons for clocks that are not those of a healthy card; a power cap is
RUNS_APART = 3.0  # slowest over fastest run of a workload
FALLS_TO = 0.6  # time with more tokens over that with fewer, all else equal
LAYER_FRAC = 0.7  # time of a whole layer over that of its two grouped GEMMs
TWIN_MARGIN = 0.10  # how much faster than all resident an offloaded call may look beside its own error
REPLAY_MARGIN, LAUNCHING_NS = 0.25, 3e6  # a replay against a launched call; the host's work for the largest layer
CONSTANT_FRAC = 0.05  # share of points whose repeats all agree to the ns, above which no clock was read
CONSTANT_FROM_NS = 100_000  # means over thousands of short replays may well agree to a rounded nanosecond
MIN_REPEATS = 3  # of a point, to say that they agree


def median_ns(o: ObservationLine) -> float:
    """The median of the repeats."""
    return float(statistics.median(o.times_ns))


def error_frac(times_ns: list[int]) -> float:
    """Standard error of the median of repeats as a fraction of it, from their mean absolute deviation about it."""
    middle = statistics.median(times_ns)
    deviation = statistics.fmean(abs(t - middle) for t in times_ns)
    return float(MEDIAN_ERROR * MEAN_DEVIATION_TO_SIGMA * deviation / len(times_ns) ** 0.5 / middle)


def stated_error_frac(timing: Mapping[str, Any] | None) -> float:
    """The error that the timing part of the settings asked for, or the usual one."""
    stated = (timing or {}).get("error_frac")
    return float(stated) if isinstance(stated, int | float) and stated > 0 else DEFAULT_ERROR_FRAC


def expert_weights(w: WorkloadLine) -> int:
    """Weights of one expert that one call of the operation reads."""
    if w.gemm_k is not None and w.gemm_n is not None:
        return w.gemm_k * w.gemm_n
    return w.n_gemms * w.hidden * w.inter


def active_bytes(w: WorkloadLine) -> tuple[float, float]:
    """Bytes of the weights of the experts that receive tokens: those in device memory, and those offloaded."""
    gone = set(w.offloaded or ())
    active = [i for i, n in enumerate(w.tokens_per_expert) if n > 0]
    n_offloaded = sum(i in gone for i in active)
    per_expert = expert_weights(w) * WEIGHT_BYTES.get(w.dtype, 0.0)
    return (len(active) - n_offloaded) * per_expert, n_offloaded * per_expert


@dataclass(frozen=True)
class Roof:
    """What bounds one rate of a point: the nominal limit, the best calibrated rate (null: none), and words for both."""

    rule: str
    words: str
    name: str  # of the rate, for its unit
    limit: Limit
    best: float | None

    def broken_by(self, rate: float, where: str) -> Iterator[Finding]:
        """The finding, if any, that a rate is above the nominal limit or far above the best calibrated one."""
        reached = f"{self.words} at {text.figure(self.name, rate)}"
        if rate > self.limit.value:
            words = (
                f"{reached}, more than the {text.figure(self.name, self.limit.value)} that {self.limit.source} allows"
            )
            yield Finding(ERROR, "physics", self.rule, words, where, rate, self.limit.value)
        elif self.best is not None and rate > CALIBRATED_MARGIN * self.best:
            is_far = rate > CALIBRATED_LIMIT * self.best
            margin = CALIBRATED_LIMIT if is_far else CALIBRATED_MARGIN
            words = f"{reached}, {rate / self.best:.2f} times the best calibrated rate "
            words += f"({text.figure(self.name, self.best)})"
            severity = ERROR if is_far else WARNING
            yield Finding(severity, "physics", self.rule, words, where, rate, margin * self.best)


def _roofs_of(w: WorkloadLine, ceilings: Ceilings, best: dict[str, float]) -> Iterator[tuple[Roof, float]]:
    """Each roof over a workload, with the FLOPs or bytes that it bounds."""
    if w.dtype in ceilings.flops:
        rate = best.get(f"{w.dtype}_gemm_flops_per_s")
        if rate is not None and w.access == "cpu":  # two processors compute
            rate += best.get("host_gemm_flops_per_s", 0.0)
        roof = Roof("too much computed", "it computes", "flops_per_s", ceilings.flops[w.dtype], rate)
        yield roof, 2.0 * w.n_tokens * w.top_k * expert_weights(w)
    here, there = active_bytes(w)
    if w.device != "cuda":
        here, there = here + there, 0.0  # both memories are one
    stream = best.get("memory_stream_bytes_per_s")
    yield Roof("weights too fast", "its weights are read", "bytes_per_s", ceilings.memory, stream), here
    if w.access == "cpu":
        limit, rate = ceilings.host, best.get("host_stream_bytes_per_s")
    else:
        limit, rate = ceilings.link, max((best[key] for key in LINK_RATES if key in best), default=None)
    yield Roof("offloaded weights too fast", "its offloaded weights come", "bytes_per_s", limit, rate), there


def roofs(folder: Folder) -> Iterator[Finding]:
    """No point computes faster than the machine can, reads its weights faster than its memory gives them, or moves
    offloaded ones faster than the link carries them. Weights are cold: collectors rotate them."""
    ceilings, best = ceilings_of(folder), best_calibrated(folder)
    for _, w, o in folder.measured:
        if not o.times_ns or w.dtype not in WEIGHT_BYTES:
            continue
        for roof, amount in _roofs_of(w, ceilings, best):
            yield from roof.broken_by(amount / median_ns(o) * NS_PER_S, f"{label(w)}, run {o.run}")


def shortest_times(folder: Folder) -> Iterator[Finding]:
    """No point takes less than a call on nothing."""
    call = folder.manifest.calibration.get("call_overhead_ns")
    floor_ns = FASTEST_GPU_NS if folder.is_cuda else CALL_FRAC * call.value if call else 0.0
    for _, w, o in folder.measured:
        if o.times_ns and min(o.times_ns) < floor_ns:
            words = f"it took {text.ns(min(o.times_ns))}, less than the {text.ns(floor_ns)} of a call on nothing"
            where = f"{label(w)}, run {o.run}"
            yield Finding(ERROR, "physics", "too short", words, where, min(o.times_ns), floor_ns)


def noise(folder: Folder) -> Iterator[Finding]:
    """Repeats scatter, but not too much: none agree to the ns, and the error of most medians is as stated."""
    stated = stated_error_frac(folder.manifest.settings.timing)
    points = [(w, o) for _, w, o in folder.measured if len(o.times_ns) >= MIN_REPEATS]
    if not points:
        return
    long = [o for _, o in points if min(o.times_ns) >= CONSTANT_FROM_NS]
    constant = [o for o in long if len(set(o.times_ns)) == 1]
    if constant:
        words = (
            f"the repeats of {len(constant)} of {len(long)} long points all agree to the nanosecond, as no clock does"
        )
        severity = ERROR if len(constant) > CONSTANT_FRAC * len(long) else WARNING
        share = len(constant) / len(long)
        yield Finding(severity, "noise", "constant times", words, OBSERVATIONS_FILE, share, CONSTANT_FRAC)
    errors = [error_frac(o.times_ns) for _, o in points]
    share = sum(e > stated for e in errors) / len(errors)
    if share > NOISY_FRAC:
        words = f"{text.frac(share)} of the points have an error above the {text.frac(stated)} that was asked for"
        words += f"; median {text.frac(statistics.median(errors))}, worst {text.frac(max(errors))}"
        yield Finding(WARNING, "noise", "errors", words, OBSERVATIONS_FILE, share, NOISY_FRAC)
    for record in folder.manifest.runs:
        n_points = sum(o.run == record.run for _, o in points)
        if n_points and (record.n_disturbed or 0) > DISTURBED_FRAC * n_points:
            share = (record.n_disturbed or 0) / n_points
            words = f"other processes were busy during {record.n_disturbed} of {n_points} points of run {record.run}"
            yield Finding(WARNING, "noise", "disturbed", words, MANIFEST, share, DISTURBED_FRAC)


def throttling(folder: Folder) -> Iterator[Finding]:
    """The GPU was not slowed down by heat or by its board while it computed."""
    seen = folder.manifest.machine.get("under_load")
    reasons = seen.get("clock_reasons") if isinstance(seen, dict) else None
    slowed = [str(r) for r in reasons if any(w in str(r) for w in SLOWED)] if isinstance(reasons, list) else []
    if slowed:
        words = f"the GPU was slowed down under load: {', '.join(slowed)}"
        yield Finding(WARNING, "noise", "throttling", words, f"{MANIFEST}, machine.under_load")


def medians(folder: Folder) -> dict[str, dict[int, float]]:
    """The median time of each workload in each run, ns."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for _, w, o in folder.measured:
        if o.times_ns:
            found[w.workload][o.run] = median_ns(o)
    return dict(found)


def runs_agree(folder: Folder) -> Iterator[Finding]:
    """No run of a workload is several times slower than another."""
    for key, by_run in medians(folder).items():
        low, high = min(by_run.values()), max(by_run.values())
        if high > RUNS_APART * low:
            words = f"its runs take {text.ns(low)} to {text.ns(high)}, a factor of {high / low:.1f}"
            where = label(folder.workloads[key])
            yield Finding(WARNING, "noise", "runs apart", words, where, high / low, RUNS_APART)


def _kind(w: WorkloadLine, *dropped: str) -> tuple[Any, ...]:
    """What a workload is, without its id, its study and some other parts: equal for those that may be compared."""
    left = ("workload", "study", *dropped)
    parts = {name: getattr(w, name) for name in w.__struct_fields__ if name not in left}
    return tuple(tuple(part) if isinstance(part, list) else part for part in parts.values())


def _by_kind(folder: Folder, *dropped: str) -> dict[tuple[Any, ...], list[tuple[WorkloadLine, float]]]:
    found: dict[tuple[Any, ...], list[tuple[WorkloadLine, float]]] = defaultdict(list)
    for key, by_run in medians(folder).items():
        w = folder.workloads[key]
        found[_kind(w, *dropped)].append((w, statistics.median(by_run.values())))
    return found


def _room(errors: Mapping[str, float], *workloads: WorkloadLine) -> float:
    """How far two times may differ by noise alone, as a fraction: three times the sum of their errors, at most 0.9."""
    return min(0.9, 3 * sum(errors[w.workload] for w in workloads))


def more_tokens_take_longer(folder: Folder) -> Iterator[Finding]:
    """The time of a shape, routing and access does not fall when tokens grow."""
    errors = _worst_errors(folder)
    for several in _by_kind(folder, "n_tokens", "tokens_per_expert", "offloaded").values():
        in_order = sorted(several, key=lambda point: point[0].n_tokens)
        for (few, few_ns), (many, many_ns) in pairwise(in_order):
            limit = FALLS_TO * (1 - _room(errors, few, many))
            if many_ns < limit * few_ns and many.n_tokens > few.n_tokens:
                words = f"{many.n_tokens} tokens take {text.ns(many_ns)}, and {few.n_tokens} take {text.ns(few_ns)}"
                yield Finding(WARNING, "physics", "falls with tokens", words, label(many), many_ns / few_ns, limit)


def layers_hold_their_gemms(folder: Folder) -> Iterator[Finding]:
    """A whole layer takes about as long as its two grouped GEMMs alone, or longer."""
    errors = _worst_errors(folder)
    for several in _by_kind(folder, "op", "gemm_k", "gemm_n").values():
        gemms = [(w, time_ns) for w, time_ns in several if w.op == "grouped_gemm"]
        sum_ns = sum(time_ns for _, time_ns in gemms)
        for w, time_ns in several:
            limit = LAYER_FRAC * (1 - _room(errors, w, *(gemm for gemm, _ in gemms)))
            if w.op == "moe_layer" and len(gemms) == 2 and time_ns < limit * sum_ns:
                words = f"the layer takes {text.ns(time_ns)}, and its two grouped GEMMs alone {text.ns(sum_ns)}"
                yield Finding(WARNING, "physics", "layer", words, label(w), time_ns / sum_ns, limit)


def offloading_costs(folder: Folder) -> Iterator[Finding]:
    """No offloaded call is faster than the same call with everything resident, by more than their errors."""
    errors = _worst_errors(folder)
    for several in _by_kind(folder, "access", "offload_frac", "offloaded", "order", "residency", "launch").values():
        resident = [(w, time_ns) for w, time_ns in several if w.access == RESIDENT]
        for w, time_ns in several:
            # Launched the same way where measured; else the replayed one, which is not slower than a launched one.
            twins = [twin for twin in resident if twin[0].launch == w.launch] or [
                twin for twin in resident if twin[0].launch is not None
            ]
            if not twins or not w.offloaded:
                continue
            twin, twin_ns = twins[0]
            room = max(TWIN_MARGIN, _room(errors, w, twin))
            if time_ns < (1 - room) * twin_ns:
                words = (
                    f"it takes {text.ns(time_ns)} with {len(w.offloaded)} experts offloaded, and {text.ns(twin_ns)} "
                )
                words += "with all of them resident"
                ratio = time_ns / twin_ns
                yield Finding(WARNING, "physics", "offloading is free", words, label(w), ratio, 1 - room)


def replays_take_no_longer(folder: Folder) -> Iterator[Finding]:
    """A call replayed from a CUDA graph takes what its kernels take: no longer than the same call launched by the host,
    and shorter by no more than launching costs. Else the calls of a graph were counted wrongly."""
    errors = _worst_errors(folder)
    for several in _by_kind(folder, "launch").values():
        by_launch = {w.launch: (w, time_ns) for w, time_ns in several}
        if not by_launch.keys() >= {None, GRAPH}:
            continue
        (launched, launched_ns), (replayed, replayed_ns) = by_launch[None], by_launch[GRAPH]
        room = max(REPLAY_MARGIN, _room(errors, launched, replayed))
        least_ns, most_ns = (1 - room) * launched_ns - LAUNCHING_NS, (1 + room) * launched_ns
        if not least_ns <= replayed_ns <= most_ns:
            words = f"replayed it takes {text.ns(replayed_ns)}, and launched by the host {text.ns(launched_ns)}"
            limit = most_ns if replayed_ns > most_ns else least_ns
            yield Finding(WARNING, "physics", "replays", words, label(replayed), replayed_ns, limit)


def _worst_errors(folder: Folder) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for _, w, o in folder.measured:
        if o.times_ns:
            found[w.workload] = max(found[w.workload], error_frac(o.times_ns))
    return found


CHECKS = (
    roofs,
    shortest_times,
    more_tokens_take_longer,
    layers_hold_their_gemms,
    offloading_costs,
    replays_take_no_longer,
    noise,
    throttling,
    runs_agree,
)

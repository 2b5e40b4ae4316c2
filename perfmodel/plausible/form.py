"""Is a capture what its form says: ids, token counts, offloading, one observation a point, runs, calibration lines."""

from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from perfmodel import text
from perfmodel.capture_lines import (
    ACCESS,
    CALIBRATION,
    GRAPH,
    LEFT_OUT,
    MANIFEST,
    OBSERVATIONS_FILE,
    OPS,
    ORDERS,
    RESIDENCIES,
    RESIDENT,
    WORKLOADS,
    WorkloadLine,
    content_id,
)
from perfmodel.errors import InputError
from perfmodel.hardware import QUANTITIES
from perfmodel.moe import WEIGHT_BYTES
from perfmodel.plausible.folder import ERROR, WARNING, Finding, Folder, label
from perfmodel.routing import pattern_shares

ROUNDED_FRAC = 1e-3  # calibrated numbers are written with six digits; more apart is another number
UNIT_SUFFIXES = ("flops_per_s", "bytes_per_s", "bytes", "ns", "frac", "count")
STREAMS = ("memory_copy_bytes_per_s", "memory_triad_bytes_per_s")  # stand for memory_stream_bytes_per_s where faster
CLOCK_SLACK_S = 5.0  # starts are whole seconds, and a system's clock may be set while a capture is taken


def _error(rule: str, sentence: str, where: str) -> Finding:
    return Finding(ERROR, "form", rule, sentence, where)


def _warning(rule: str, sentence: str, where: str) -> Finding:
    return Finding(WARNING, "form", rule, sentence, where)


def workload_ids(folder: Folder) -> Iterator[Finding]:
    """Every id is the hash of its line, and no workload is planned twice."""
    times_planned = Counter(line.get("workload") for _, line in folder.raw_workloads)
    for number, line in folder.raw_workloads:
        expected = content_id(line)
        where = f"{WORKLOADS}, line {number}"
        if line["workload"] != expected:
            words = f"the id {line['workload']} is not the hash of its line, which gives {expected}"
            yield _error("id", words, where)
        if times_planned[line["workload"]] > 1:
            yield _error("planned twice", f"workload {line['workload']} stands there more than once", where)
    n_said = folder.manifest.n_workloads
    if n_said is not None and n_said != len(folder.raw_workloads):
        words = f"n_workloads is {n_said}, and {len(folder.raw_workloads)} are planned"
        yield _error("n_workloads", words, MANIFEST)


def workload_contents(folder: Folder) -> Iterator[Finding]:
    """Known operations and dtypes, the settings' device, GEMM sizes that belong to the shape, counts that add up."""
    for w in folder.workloads.values():
        where = label(w)
        if w.op not in OPS:
            yield _error("op", f"op is {w.op!r}, expected one of {', '.join(OPS)}", where)
        if w.dtype not in WEIGHT_BYTES:
            yield _error("dtype", f"dtype {w.dtype!r} is unknown", where)
        if w.device != folder.manifest.settings.device:
            words = f"device is {w.device!r}, and the settings say {folder.manifest.settings.device!r}"
            yield _error("device", words, where)
        sizes = {(w.hidden, (w.n_gemms - 1) * w.inter), (w.inter, w.hidden)}
        if w.op == "grouped_gemm" and (w.gemm_k, w.gemm_n) not in sizes:
            yield _error("GEMM sizes", f"{w.gemm_k} x {w.gemm_n} is neither gate and up nor down of its shape", where)
        if w.op == "moe_layer" and (w.gemm_k, w.gemm_n) != (None, None):
            yield _error("GEMM sizes", "a whole layer has the sizes of a single GEMM", where)
        if min(w.n_experts, w.top_k, w.hidden, w.inter, w.n_tokens, w.n_gemms - 1) < 1 or w.top_k > w.n_experts:
            yield _error("shape", "experts, top-k, widths, GEMMs or tokens are not those of a layer", where)
        counts = w.tokens_per_expert
        if len(counts) != w.n_experts:
            yield _error("counts", f"tokens_per_expert has {len(counts)} entries for {w.n_experts} experts", where)
        elif sum(counts) != w.n_tokens * w.top_k:
            words = f"tokens_per_expert sums to {sum(counts)}, expected tokens x top-k = {w.n_tokens * w.top_k}"
            yield _error("counts", words, where)
        elif counts and not 0 <= min(counts) <= max(counts) <= w.n_tokens:
            yield _error("counts", f"an expert has fewer than 0 or more than {w.n_tokens} tokens", where)


def offloading(folder: Folder) -> Iterator[Finding]:
    """Access, offloaded experts, their fraction, order, residency and launch agree with each other."""
    for w in folder.workloads.values():
        where, ids = label(w), w.offloaded
        if w.access not in ACCESS:
            yield _error("access", f"access is {w.access!r}, expected one of {', '.join(ACCESS)}", where)
        if w.access == RESIDENT:
            if ids or w.offload_frac or w.residency:
                words = "everything is resident, yet experts are offloaded, or a residency is named"
                yield _error("access", words, where)
            ids = []
        if ids is None:
            yield _error("offloaded", f"access is {w.access} and the offloaded experts are not named", where)
            continue
        if len(set(ids)) != len(ids) or any(not 0 <= i < w.n_experts for i in ids):
            yield _error("offloaded", f"offloaded names an expert twice, or one outside 0 to {w.n_experts - 1}", where)
        elif abs(w.offload_frac * w.n_experts - len(ids)) > 1e-6:
            words = f"offload_frac is {w.offload_frac:g}, and {len(ids)} of {w.n_experts} experts are offloaded"
            yield _error("offload_frac", words, where)
        if w.access != RESIDENT and not ids:
            yield _warning("offloaded", f"access is {w.access} and no expert is offloaded", where)
        if w.order is not None and w.order not in ORDERS:
            yield _error("order", f"order is {w.order!r}, expected one of {', '.join(ORDERS)}", where)
        if (w.access == "zero-copy") != (w.residency is not None):
            yield _error("residency", f"residency is {w.residency!r} under {w.access}, which only zero-copy has", where)
        elif w.residency is not None and w.residency not in RESIDENCIES:
            words = f"residency is {w.residency!r}, expected one of {', '.join(RESIDENCIES)}"
            yield _error("residency", words, where)
        if w.launch not in (None, GRAPH):
            yield _error("launch", f"launch is {w.launch!r}, expected {GRAPH!r} or null", where)
        elif w.launch == GRAPH and (w.device != "cuda" or w.access == "cpu"):
            words = f"a CUDA graph cannot replay {w.access} on {w.device}: the host computes or copies in between"
            yield _error("launch", words, where)


def placement_order(folder: Folder) -> Iterator[Finding]:
    """Experts offloaded in an order of popularity are those, by the tokens they get or by the stated shares."""
    for w in folder.workloads.values():
        if w.offloaded and w.order in ("ascending", "descending") and not _is_in_order(w):
            words = f"the offloaded experts are not the {'coldest' if w.order == 'ascending' else 'hottest'}"
            yield _warning("order", f"{words}, by their tokens or by the shares of {w.routing}", label(w))


def _is_in_order(w: WorkloadLine) -> bool:
    if len(w.tokens_per_expert) != w.n_experts or any(not 0 <= i < w.n_experts for i in w.offloaded or ()):
        return True  # said elsewhere
    sign = 1 if w.order == "ascending" else -1
    offloaded = np.isin(np.arange(w.n_experts), w.offloaded or ())

    def agrees(popularity: NDArray[np.float64]) -> bool:
        coldest_first = sign * popularity
        kept, gone = coldest_first[~offloaded], coldest_first[offloaded]
        return not len(kept) or bool(gone.max() <= kept.min() + 1e-12)

    counts = np.array(w.tokens_per_expert, dtype=np.float64)
    if agrees(counts):
        return True
    try:
        shares = pattern_shares(w.routing, w.n_experts).ravel()
    except InputError:  # shares of a file or of a recorded run are not at hand: the tokens must agree on the whole
        kept, gone = counts[~offloaded], counts[offloaded]
        return bool(sign * kept.mean() >= sign * gone.mean())
    return agrees(shares)


def observations(folder: Folder) -> Iterator[Finding]:
    """Every observation is of a planned workload, the only one of its run, and has times."""
    seen = Counter((o.workload, o.run) for _, o in folder.observations)
    for number, o in folder.observations:
        where = f"{OBSERVATIONS_FILE}, line {number}"
        if o.workload not in folder.workloads:
            yield _error("unplanned", f"workload {o.workload} is not planned", where)
        if seen[o.workload, o.run] > 1:
            words = f"workload {o.workload} was measured {seen[o.workload, o.run]} times in run {o.run}"
            yield _error("measured twice", words, where)
        if not o.times_ns:
            yield _error("no time", f"workload {o.workload} has no time", where)
    if not folder.observations:
        yield _error("no observation", "nothing has been measured yet", OBSERVATIONS_FILE)


def runs(folder: Folder) -> Iterator[Finding]:
    """Each run has one record, in order of time, and accounts for the points it left out."""
    records = folder.manifest.runs
    for run, times in Counter(record.run for record in records).items():
        if times > 1:
            yield _error("runs", f"run {run} has {times} records", MANIFEST)
    done: dict[int, set[str]] = defaultdict(set)
    for _, o in folder.observations:
        done[o.run].add(o.workload)
    failed = {line.workload for _, line in folder.left_out if line.workload is not None}
    has_budget = folder.manifest.settings.minutes is not None
    for record in records:
        if record.started > record.finished:
            yield _error("time", f"run {record.run} finished before it started", MANIFEST)
        n_left_out, n_todo = record.n_left_out or 0, record.n_todo or 0
        # Within a time budget later runs repeat what the first one measured.
        expected = done[0] if has_budget and record.run > 0 else set(folder.workloads)
        missing = expected - done[record.run]
        if n_left_out > len(set(folder.workloads) - done[record.run]):
            words = f"run {record.run} says {n_left_out} points were left out, and fewer are missing"
            yield _error("n_left_out", words, MANIFEST)
        elif len(missing - failed) > n_left_out + n_todo:
            words = f"run {record.run} lacks {text.counted(len(missing - failed), 'point')} of {len(expected)}"
            # A campaign that was given more minutes adds to its first run what later ones no longer reach.
            finding = _warning if has_budget else _error
            words += f", and says that {n_left_out + n_todo} were left out or left to do"
            yield finding("n_left_out", words, MANIFEST)
    recorded = {record.run for record in records}
    for run in sorted({o.run for _, o in folder.observations} - recorded):
        words = f"run {run} has {len(done[run])} points and no record in {MANIFEST}: it did not end"
        yield _warning("runs", words, OBSERVATIONS_FILE)
    yield from _time_order(folder)


def _time_order(folder: Folder) -> Iterator[Finding]:
    spans = {r.run: (r.started, r.finished) for r in folder.manifest.runs if not r.n_resumed}
    latest: dict[int, float] = defaultdict(float)
    for number, o in folder.observations:
        if o.started is None:
            continue
        where = f"{OBSERVATIONS_FILE}, line {number}"
        if o.started < latest[o.run] - CLOCK_SLACK_S:
            yield _error("time", f"a point of run {o.run} started before the one above it", where)
        latest[o.run] = max(latest[o.run], o.started)
        if o.run in spans:
            first, last = spans[o.run]
            if not first - CLOCK_SLACK_S <= o.started <= last + CLOCK_SLACK_S:
                yield _error("time", f"a point of run {o.run} started outside of its run", where)


def left_out(folder: Folder) -> Iterator[Finding]:
    """What was left out is planned, gives a reason, and was not measured after all."""
    done = {(o.workload, o.run) for _, o in folder.observations}
    for number, line in folder.left_out:
        where = f"{LEFT_OUT}, line {number}"
        if [line.workload, line.probe, line.profile, line.stage].count(None) != 3:
            words = "the line names none, or several, of a workload, a probe, a profile and a stage"
            yield _error("left out", words, where)
        elif line.workload is not None and line.workload not in folder.workloads:
            yield _error("left out", f"workload {line.workload} is not planned", where)
        elif (line.workload, line.run) in done:
            yield _warning("left out", f"workload {line.workload} was left out of run {line.run} and measured", where)
        if not line.reason.strip():
            yield _error("left out", "no reason is given", where)


def calibration_lines(folder: Folder) -> Iterator[Finding]:
    """Calibration lines have a known quantity in its unit, a positive value, flat parameters, and n times."""
    for number, line in folder.calibrations:
        where = f"{CALIBRATION}, line {number}"
        if line.unit not in UNIT_SUFFIXES:
            yield _error("unit", f"unit is {line.unit!r}, expected one of {', '.join(UNIT_SUFFIXES)}", where)
        if line.quantity is not None and line.quantity not in QUANTITIES:
            yield _error("quantity", f"quantity {line.quantity!r} is unknown", where)
        elif line.quantity is not None and not line.quantity.endswith("_" + line.unit):
            yield _error("unit", f"{line.quantity} is given in {line.unit}, which is not what its name says", where)
        if not line.value > 0:
            yield _error("value", f"{line.probe} gave {line.value:g}, expected a positive number", where)
        if any(isinstance(value, dict | list) for value in line.params.values()):
            yield _error("params", f"the parameters of {line.probe} are not flat", where)
        if line.n is not None and line.times_ns and line.n != len(line.times_ns):
            yield _warning("n", f"n is {line.n}, and there are {len(line.times_ns)} times", where)


def calibration_summary(folder: Folder) -> Iterator[Finding]:
    """Each number of the manifest lies within what the calibration lines of its quantity say."""
    lines: dict[str, list[float]] = defaultdict(list)
    for _, line in folder.calibrations:
        if line.quantity is not None:
            lines[line.quantity].append(line.value)
            if line.quantity in STREAMS:
                lines["memory_stream_bytes_per_s"].append(line.value)
    for key, number in folder.manifest.calibration.items():
        where = f"{MANIFEST}, calibration.{key}"
        if key not in QUANTITIES:
            yield _warning("quantity", f"quantity {key!r} is unknown", where)
        if not number.value > 0:
            yield _error("value", f"{key} is {number.value:g}, expected a positive number", where)
        if key in lines:
            low, high = min(lines[key]), max(lines[key])
            if not low * (1 - ROUNDED_FRAC) <= number.value <= high * (1 + ROUNDED_FRAC):
                words = f"{key} is {number.value:g}, and its calibration lines say {low:g} to {high:g}"
                yield _error("summary", words, where)
    if not folder.manifest.calibration:
        yield _error("calibration", "the machine was not calibrated", MANIFEST)
    if folder.manifest.kernel is None:
        yield _error("kernel", "which grouped GEMM ran is not said", MANIFEST)


CHECKS = (
    workload_ids,
    workload_contents,
    offloading,
    placement_order,
    observations,
    runs,
    left_out,
    calibration_lines,
    calibration_summary,
)

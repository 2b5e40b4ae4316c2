"""Bulk-synchronous and chunked schedules of an expert-parallel layer: collectives between phases, one at a time.

A collective is a rendezvous: it begins when the last GPU comes to it and ends for all at once. Bulk does everything in
one piece; chunked cuts the rows into pieces, whose collectives run beside the experts of other pieces.
"""

import numpy as np

from perfmodel.physics import Array

from .costs import BEFORE, EXPERTS, Layer, compute_ns, link_ns
from .overheads import Overheads
from .timeline import LayerTimeline, Span


def bulk_timeline(layer: Layer, overheads: Overheads) -> LayerTimeline:
    """Each phase of the whole layer behind the one before, `overheads.n_chunks` left aside."""
    return _timeline(layer, overheads, 1, "bulk")


def chunked_timeline(layer: Layer, overheads: Overheads) -> LayerTimeline:
    """The rows in `overheads.n_chunks` pieces: while experts compute one, collectives move others."""
    return _timeline(layer, overheads, overheads.n_chunks, "chunked")


def capacity_rows(layer: Layer, overheads: Overheads) -> tuple[Array, Array, float]:
    """Rows between GPUs as they are sent `[source, GPU]`, rows of experts as they are computed `[GPU, place]`, and the
    share of rows that is dropped, all by the capacity of the overheads."""
    traffic = layer.traffic
    if overheads.capacity_factor is None:
        return traffic.rows_between, traffic.received, 0.0
    if overheads.capacity_factor:
        even = traffic.n_tokens * traffic.top_k / len(traffic.gpu_of)
        capacity = np.ceil(overheads.capacity_factor * even)
    else:
        capacity = np.full(traffic.n_gpus, traffic.rows.max())
    kept = np.minimum(traffic.rows, capacity[:, None]).sum()
    n_held = np.array([len(slots) for slots in traffic.slots_of], dtype=np.float64)
    place = np.arange(traffic.received.shape[1])
    computed = np.where(place < n_held[:, None], capacity.sum(), 0.0)
    return capacity[:, None] * n_held, computed, float(1 - kept / traffic.rows.sum())


def all_to_all_ns(layer: Layer, rows_between: Array, overheads: Overheads) -> float:
    """How long one collective takes from the moment all GPUs are there: its start, the latency of the slowest link it
    crosses, and the busiest GPU's bytes; 0 for one GPU."""
    fabric = layer.fabric
    if fabric.n_gpus == 1:
        return 0.0
    alpha = max(link.alpha_ns for link in (fabric.inside, fabric.between) if link is not None)
    return float(overheads.collective_ns + alpha + link_ns(layer, rows_between).max())


def _timeline(layer: Layer, overheads: Overheads, n_chunks: int, schedule: str) -> LayerTimeline:
    sent_rows, computed_rows, dropped = capacity_rows(layer, overheads)
    n_gpus, factor = layer.fabric.n_gpus, overheads.work_factor
    whole = compute_ns(layer, 1.0, computed_rows)
    piece = whole if n_chunks == 1 else compute_ns(layer, 1 / n_chunks, computed_rows)
    # Communication kernels hold their processors while they run beside the experts of other chunks.
    slow = factor / (1 - (overheads.comm_sm_frac if n_chunks > 1 and n_gpus > 1 else 0.0))
    experts = {name: piece[name] * slow for name in EXPERTS}
    own = {name: whole[name] * factor for name in (*BEFORE, "reduce")}
    transfer = all_to_all_ns(layer, sent_rows / n_chunks, overheads)
    transfer += (factor - 1) * (transfer - overheads.collective_ns) if n_gpus > 1 else 0.0
    spans: list[Span] = []
    free = np.zeros(n_gpus)  # when each GPU's processors are
    link_free = 0.0

    def compute(phase: str, dur: Array, after: Array | float, chunk: int) -> Array:
        start = np.maximum(free, after)
        spans.extend(
            Span(g, "compute", phase, float(start[g]), float(dur[g]), chunk) for g in range(n_gpus) if dur[g] > 0
        )
        free[:] = start + dur
        return free.copy()

    def collective(phase: str, ready: float, chunk: int) -> float:
        nonlocal link_free
        start = max(ready, link_free)
        for lane in ("send", "receive") if transfer > 0 else ():
            spans.extend(Span(g, lane, phase, start, transfer, chunk) for g in range(n_gpus))
        link_free = start + transfer
        return link_free

    for phase in BEFORE:
        ready = compute(phase, own[phase], 0.0, 0)
    arrived = [collective("dispatch", float(ready.max()), 0)]
    last = 0.0
    for chunk in range(n_chunks):
        if chunk + 1 < n_chunks:  # the next chunk is on its way before this one is computed
            arrived.append(collective("dispatch", float(ready.max()), chunk + 1))
        done = np.zeros(n_gpus)
        for phase in EXPERTS:
            done = compute(phase, experts[phase], arrived[chunk], chunk)
        last = collective("combine", float(done.max()), chunk)
    end = compute("reduce", own["reduce"], last, 0)
    return _summed(layer, overheads, schedule, spans, end, sent_rows, dropped, n_chunks * transfer)


def _summed(
    layer: Layer,
    overheads: Overheads,
    schedule: str,
    spans: list[Span],
    end: Array,
    sent_rows: Array,
    dropped: float,
    transfer_ns: float,
) -> LayerTimeline:
    """The timeline with what the host needs to launch it in front: its first launch, and what of the others no work
    of the device hides."""
    n_gpus = layer.fabric.n_gpus
    device_ns = float(end.max())
    host_ns = overheads.n_launches * overheads.host_launch_ns
    launch = max(host_ns - device_ns, min(overheads.n_launches, 1) * overheads.host_launch_ns)
    spans = [span._replace(start_ns=span.start_ns + launch) for span in spans]
    by_phase: dict[str, Array] = {}
    for span in spans:
        if span.lane == "compute":
            by_phase.setdefault(span.phase, np.zeros(n_gpus))[span.gpu] += span.dur_ns
    busy = np.asarray(sum(by_phase.values()))
    phases = {"launch": launch, **{name: float(ns.max()) for name, ns in by_phase.items()}}
    phases |= {"dispatch": transfer_ns, "combine": transfer_ns} if transfer_ns else {}
    remote = layer.traffic.rows_between * (1 - np.eye(n_gpus))
    return LayerTimeline(
        schedule=schedule,
        latency_ns=device_ns + launch,
        end_ns=tuple(float(x) for x in end + launch),
        phases=phases,
        busy_ns=tuple(float(x) for x in busy),
        bounds={
            **{name: float(ns.max()) for name, ns in layer.bounds_ns.items()},
            "host": host_ns,
        },
        bottleneck=max(phases, key=lambda name: phases[name]),
        n_launches=overheads.n_launches,
        sent_bytes=2 * float((sent_rows * (1 - np.eye(n_gpus))).sum()) * layer.row_bytes,
        payload_bytes=2 * float(remote.sum()) * layer.row_bytes,
        dropped_frac=dropped,
        spans=tuple(spans),
    )

"""Bulk-synchronous and chunked schedules of an expert-parallel layer: collectives between phases, one at a time.

A collective is a rendezvous: it begins when the last GPU comes to it and ends for all at once. Bulk does everything in
one piece; chunked cuts the rows into pieces, whose collectives run beside the experts of other pieces.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from perfmodel.physics import Array

from .costs import BEFORE, EXPERTS, Layer, bounds_ns, compute_ns, link_ns
from .overheads import Overheads
from .timeline import PHASES, TRANSFERS, LayerTimeline, Span

GOLDEN = (5**0.5 - 1) / 2  # multiples of it fill 0 to 1 evenly, however many there are


def bulk_timeline(layer: Layer, overheads: Overheads) -> LayerTimeline:
    """Each phase of the whole layer behind the one before, `overheads.n_chunks` left aside."""
    return _timeline(layer, overheads, 1, "bulk")


def chunked_timeline(layer: Layer, overheads: Overheads) -> LayerTimeline:
    """The rows in `overheads.n_chunks` pieces: while experts compute one, collectives move others.

    One GPU by itself has nothing to move, and one piece.
    """
    return _timeline(layer, overheads, overheads.n_chunks if layer.traffic.n_gpus > 1 else 1, "chunked")


@dataclass(frozen=True)
class Sent:
    """What a schedule makes of the rows that were asked for: `between[source, GPU]` as they are sent, `computed[GPU,
    place]` as experts compute them, both with padding; `wanted[source, GPU]` what is sent without padding, and
    `kept[source, slot]` the rows that are not dropped."""

    between: Array
    wanted: Array
    computed: Array
    kept: Array


def sent_rows(layer: Layer, overheads: Overheads) -> Sent:
    """Padding and dropping by the capacity of the overheads, what one GPU may have for one expert; or tokens in place
    of rows where they are sent once to each GPU.

    One GPU by itself has nothing to pad for.
    """
    traffic = layer.traffic
    if overheads.capacity_factor is None or traffic.n_gpus == 1:
        between = traffic.tokens if overheads.once_per_gpu else traffic.rows_between
        return Sent(between, between, traffic.received, traffic.rows)
    if overheads.capacity_factor:
        even = traffic.n_tokens * traffic.top_k / len(traffic.gpu_of)
        capacity = np.ceil(overheads.capacity_factor * even)
    else:
        capacity = np.full(traffic.n_gpus, traffic.rows.max())
    padded = np.repeat(capacity[:, None], len(traffic.gpu_of), axis=1)
    kept = np.minimum(traffic.rows, padded)
    return Sent(traffic.between(padded), traffic.between(kept), traffic.at_experts(padded.sum(axis=0)), kept)


def chunk_rows(rows: Array, n_chunks: int) -> Array:
    """Whole rows of each chunk, `[chunk, GPU, place]`, summing to `rows[GPU, place]` and as even as they can be; which
    chunks have one more differs from place to place, so that few rows spread over chunks."""
    first = np.arange(rows.shape[1]) * GOLDEN % 1
    edges = np.floor(rows * np.arange(n_chunks + 1)[:, None, None] / n_chunks + first)
    return np.asarray(np.diff(edges, axis=0))


def all_to_all_ns(layer: Layer, rows_between: Array, overheads: Overheads) -> float:
    """How long one collective takes from the moment all GPUs are there: its start, the latency of the slowest link it
    crosses, and the busiest GPU's bytes; 0 for one GPU."""
    fabric = layer.fabric
    if fabric.n_gpus == 1:
        return 0.0
    alpha = max(link.alpha_ns for link in (fabric.inside, fabric.between) if link is not None)
    moving = alpha + float(link_ns(layer, rows_between).max())
    return overheads.collective_ns + overheads.work_factor * moving


@dataclass(frozen=True)
class _Times:
    """How long each piece takes: phases of the whole layer, `[GPU]`; those of each chunk's experts, `[GPU]`; one
    collective of a chunk by TRANSFERS; what the host needs to launch all."""

    whole: dict[str, Array]
    experts: list[dict[str, Array]]
    collective: dict[str, float]
    host_ns: float

    def shortened(self, phase: str) -> "_Times":
        """The same with one phase a tenth shorter."""

        def cut(times: dict[str, Any]) -> dict[str, Any]:
            return {name: ns * (0.9 if name == phase else 1.0) for name, ns in times.items()}

        host_ns = self.host_ns * (0.9 if phase == "launch" else 1.0)
        return _Times(cut(self.whole), [cut(one) for one in self.experts], cut(self.collective), host_ns)


def _timeline(layer: Layer, overheads: Overheads, n_chunks: int, schedule: str) -> LayerTimeline:
    sent = sent_rows(layer, overheads)
    n_gpus, factor = layer.fabric.n_gpus, overheads.work_factor
    whole = compute_ns(layer, 1.0, sent.computed)
    chunks = chunk_rows(sent.computed, n_chunks)
    pieces = [whole] if n_chunks == 1 else [compute_ns(layer, 1 / n_chunks, rows) for rows in chunks]
    # Communication kernels hold their processors while they run beside the experts of other chunks. Links to the host
    # and its CPU do not mind.
    slow = dict.fromkeys(EXPERTS, factor / (1 - (overheads.comm_sm_frac if n_chunks > 1 else 0.0)))
    slow["offload"] = factor
    collective_ns = all_to_all_ns(layer, sent.between / n_chunks, overheads)
    times = _Times(
        {name: whole[name] * factor for name in (*BEFORE, "reduce")},
        [{name: piece[name] * slow[name] for name in EXPERTS} for piece in pieces],
        dict.fromkeys(TRANSFERS, collective_ns),
        overheads.n_launches * overheads.host_launch_ns,
    )
    spans, end = _run(times)
    launch_ns = _launch_ns(times, overheads, end)
    spans = [span._replace(start_ns=span.start_ns + launch_ns) for span in spans]
    phases = {"launch": launch_ns, **_phases(times)}
    latency_ns = float(end.max()) + launch_ns

    def without(phase: str) -> float:
        shorter = times.shortened(phase)
        end = _run(shorter)[1]
        return float(end.max()) + _launch_ns(shorter, overheads, end)

    remote = 1 - np.eye(n_gpus)
    bounds_of = {**bounds_ns(layer, sent.kept), "link": link_ns(layer, sent.wanted + sent.wanted.T)}
    # An engine that is measured to be faster than the model moves the bounds with it.
    bounds = {name: float(ns.max()) * min(factor, 1.0) for name, ns in bounds_of.items()}
    busy = sum((ns for one in (times.whole, *times.experts) for ns in one.values()), np.zeros(n_gpus))
    return LayerTimeline(
        schedule=schedule,
        latency_ns=latency_ns,
        end_ns=tuple(float(x) for x in end + launch_ns),
        phases=phases,
        busy_ns=tuple(float(x) for x in busy),
        bounds={**bounds, "host": times.host_ns},
        bottleneck=min(phases, key=without),
        n_launches=overheads.n_launches,
        sent_bytes=2 * float((sent.between * remote).sum()) * layer.row_bytes,
        payload_bytes=2 * float((sent.wanted * remote).sum()) * layer.row_bytes,
        dropped_frac=float(1 - sent.kept.sum() / layer.traffic.rows.sum()),
        computed_padding_frac=float(1 - sent.kept.sum() / sent.computed.sum()),
        spans=tuple(spans),
    )


def _launch_ns(times: _Times, overheads: Overheads, end: Array) -> float:
    """What the host adds in front of the device's work: its first launch, and what of the others no work hides."""
    return max(times.host_ns - float(end.max()), times.host_ns / max(overheads.n_launches, 1))


def _phases(times: _Times) -> dict[str, float]:
    """How long each phase that takes any time takes on the GPU that it takes longest."""
    experts = {name: np.sum([one[name] for one in times.experts], axis=0) for name in EXPERTS}
    found = {name: float(ns.max()) for name, ns in {**times.whole, **experts}.items()}
    found |= {name: len(times.experts) * ns for name, ns in times.collective.items()}
    return {name: found[name] for name in PHASES if found[name] > 0}


def _run(times: _Times) -> tuple[list[Span], Array]:
    """Who does what when, from the first kernel on, and when each GPU is done, `[GPU]`."""
    n_gpus, n_chunks = len(times.whole["gate"]), len(times.experts)
    spans: list[Span] = []
    free = np.zeros(n_gpus)  # when each GPU's processors are
    link_free = 0.0

    def compute(phase: str, dur: Array, after: float, chunk: int) -> None:
        start = np.maximum(free, after)
        spans.extend(
            Span(g, "compute", phase, float(start[g]), float(dur[g]), chunk) for g in range(n_gpus) if dur[g] > 0
        )
        free[:] = start + dur

    def collective(phase: str, ready: float, chunk: int) -> float:
        nonlocal link_free
        start, dur = max(ready, link_free), times.collective[phase]
        for lane in ("send", "receive") if dur > 0 else ():
            spans.extend(Span(g, lane, phase, start, dur, chunk) for g in range(n_gpus))
        link_free = start + dur
        return link_free

    for phase in BEFORE:
        compute(phase, times.whole[phase], 0.0, 0)
    ready = float(free.max())
    arrived = [collective("dispatch", ready, 0)]
    last = 0.0
    for chunk, experts in enumerate(times.experts):
        if chunk + 1 < n_chunks:  # the next chunk is on its way before this one is computed
            arrived.append(collective("dispatch", ready, chunk + 1))
        for phase in EXPERTS:
            compute(phase, experts[phase], arrived[chunk], chunk)
        last = collective("combine", float(free.max()), chunk)
    compute("reduce", times.whole["reduce"], last, 0)
    return spans, free

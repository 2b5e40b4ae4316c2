"""The fused schedule (FlashMoE, arXiv 2506.04667): one kernel on each GPU sends, computes and combines tiles.

On each GPU router and permute come first. Then its rows leave in blocks of at most 128, one-sided and without padding;
a block that arrives is computed at once, in tiles of 128 x 64 by whichever processors are free, sent back and summed.
Nobody waits for anybody else. `tiles` says what there is to do and how long each task takes, `events` when it is done.

What is modelled, and how:

- Processors: two thread blocks on each SM without the one that schedules; each has its share of the GPU's compute and
  bandwidth, busy or not: where fewer tiles are there than processors, the rest of the GPU is idle.
- A tile of GEMM costs what the latency model says of a grouped GEMM in tiles of 128 x 64. A block of fewer rows costs
  as much as a full one: it is padded where it arrives, never on the wire.
- Weights are read from device memory by the first block that an expert computes, and hit the cache afterwards: too kind
  where the experts of a GPU exceed its L2 and blocks of one expert are far apart. The activation is part of the first
  GEMM's tiles.
- Links: every GPU sends and receives at its link's rate, one block after another, first come first served, inside a
  node and between nodes apart; a block's first byte arrives alpha after it was sent. Blocks go to all GPUs in turn.
- Experts outside device memory hold their GPU up by what the other schedules call `offload`, when they start.
- `work_factor` of the overheads multiplies every duration. What is not in this schedule is left aside: collectives,
  chunks, processors for communication, capacity, tokens sent once to each GPU.
"""

import numpy as np

from perfmodel.physics import Array
from perfmodel.placement.balance import Index

from .costs import BEFORE, Layer, link_ns
from .events import Run, simulate
from .measures import TILE_ROWS
from .overheads import Overheads
from .tiles import Plan, busy_ns, plan_of
from .timeline import TRANSFERS, LayerTimeline, Shared, Span

# Spans of a phase closer than this share of the run are drawn as one: a few thousand for 8 GPUs, not one per task.
SPAN_GAP_FRAC = 0.02


def fused_timeline(layer: Layer, overheads: Overheads) -> LayerTimeline:
    """One MoE layer in one fused kernel per GPU, simulated tile by tile.

    `phases` of tasks are processor time over processors, of transfers the busiest link's time and alpha. `bottleneck`
    is the longest phase of what is busier, processors or, from the first row on, links. Spans are the times in which a
    GPU has anything of a phase under way (gaps under SPAN_GAP_FRAC of the run closed), so those of several phases
    overlap. Raises InputError for a CPU and for a GPU whose number of SMs is not known.
    """
    plan = plan_of(layer, overheads.work_factor)
    ran = simulate(plan)
    launch = overheads.n_launches * overheads.host_launch_ns
    begin = {name: layer.compute_ns[name] * overheads.work_factor for name in BEFORE}
    by_phase = begin | busy_ns(plan)
    busy = np.asarray(sum(by_phase.values()))
    phases = {"launch": launch, **{name: float(ns.max()) for name, ns in by_phase.items() if ns.any()}}
    phases["activation"] = 0.0  # it is part of the first GEMM's tiles
    remote = plan.lane >= 0
    if remote.any():
        one_way = float(link_ns(layer, layer.traffic.rows_between).max()) * overheads.work_factor
        alpha = max(plan.alpha_ns[lane] for lane in np.unique(plan.lane[remote]))
        phases |= dict.fromkeys(TRANSFERS, one_way + alpha)
    computes = [name for name in phases if name not in (*TRANSFERS, "launch")]
    on_wire = plan.begin_ns + layer.bounds_ns["link"] * overheads.work_factor
    tight = computes if busy.max() >= on_wire.max() else TRANSFERS
    sent = 2 * float(plan.blocks.rows[remote].sum()) * layer.row_bytes
    # An engine that is measured to be faster than the model moves the bounds with it.
    bounds = {name: float(ns.max()) * min(overheads.work_factor, 1.0) for name, ns in layer.bounds_ns.items()}
    return LayerTimeline(
        schedule="fused",
        latency_ns=float(ran.end_ns.max()) + launch,
        end_ns=tuple(float(x) for x in ran.end_ns + launch),
        phases=phases,
        busy_ns=tuple(float(x) for x in busy),
        bounds={**bounds, "host": launch},
        bottleneck=max([*tight, "launch"], key=lambda name: phases[name]),
        n_launches=overheads.n_launches,
        sent_bytes=sent,
        payload_bytes=sent,
        computed_padding_frac=float(1 - plan.blocks.rows.sum() / (len(plan.blocks.rows) * TILE_ROWS)),
        spans=tuple(_spans(plan, ran, begin, launch)),
        shared=tuple(_shared(plan, ran, by_phase, gpu) for gpu in range(len(busy))),
    )


def _shared(plan: Plan, ran: Run, by_phase: dict[str, Array], gpu: int) -> Shared:
    """What a GPU works on by phase, and how long its links move rows while processors are idle, and while they are not.

    Links count while they carry a block, not while its first byte is under way.
    """
    remote, source, at = plan.lane >= 0, plan.blocks.source, plan.blocks.gpu
    ways = []
    for way, (sender, taker) in enumerate(((source, at), (at, source))):
        sent, taken = ran.sends[remote & (sender == gpu), way], ran.takes[remote & (taker == gpu), way]
        ways.append(np.array(_joined(np.concatenate([sent, taken]), 0.0)).reshape(-1, 2))
    edges = np.unique(np.concatenate([way.ravel() for way in ways]))
    is_moving = np.array([_n_begun(way[:, 0], edges) > _n_begun(way[:, 1], edges) for way in ways])[:, :-1]
    since, until = ran.idle[gpu].T
    idle_ns = np.diff(_time_after(since, edges) - _time_after(until, edges)) / plan.n_processors
    exposed = (is_moving / np.maximum(is_moving.sum(axis=0), 1)) @ idle_ns
    return Shared(
        {name: float(ns[gpu]) for name, ns in by_phase.items()},
        dict(zip(TRANSFERS, exposed.tolist(), strict=True)),
        float(np.diff(edges) @ is_moving.any(axis=0) - exposed.sum()),
    )


def _n_begun(moments: Array, at: Array) -> Index:
    """How many of ascending `moments` have come `at` each of others."""
    return np.searchsorted(moments, at, side="right")


def _time_after(moments: Array, at: Array) -> Array:
    """The time since each of `moments` that has come `at` each of others, summed."""
    moments = np.sort(moments)
    n = _n_begun(moments, at)
    return np.asarray(n * at - np.append(0.0, np.cumsum(moments))[n])


def _spans(plan: Plan, ran: Run, begin: dict[str, Array], launch: float) -> list[Span]:
    """When each GPU has anything of a phase under way, by lane and phase, then GPU."""
    blocks, n_gpus = plan.blocks, len(plan.begin_ns)
    found, start = [], np.full(n_gpus, launch)
    for phase, dur in begin.items():
        found += [Span(g, "compute", phase, float(start[g]), float(dur[g])) for g in range(n_gpus) if dur[g] > 0]
        start = start + dur
    on_gpu, at_home = blocks.gpu, blocks.source
    drawn: list[tuple[str, str, Index, Array]] = [
        ("compute", "gemm1", on_gpu, ran.tasks[:, 0]),
        ("compute", "gemm2", on_gpu, ran.tasks[:, 1]),
        ("compute", "reduce", at_home, ran.tasks[:, 2]),
        ("send", "dispatch", at_home, ran.sends[:, 0]),
        ("receive", "dispatch", on_gpu, ran.takes[:, 0]),
        ("send", "combine", on_gpu, ran.sends[:, 1]),
        ("receive", "combine", at_home, ran.takes[:, 1]),
    ]
    gap = SPAN_GAP_FRAC * float(ran.end_ns.max())
    for lane, phase, where, times in drawn:
        for g in range(n_gpus):
            for from_ns, to_ns in _joined(times[(where == g) & (times[:, 1] > times[:, 0])], gap):
                found.append(Span(g, lane, phase, launch + from_ns, to_ns - from_ns))
    return found


def _joined(times: Array, gap: float) -> list[tuple[float, float]]:
    """The union of intervals `times[interval, (start, end)]`, gaps of at most `gap` closed."""
    if not len(times):
        return []
    times = times[np.argsort(times[:, 0], kind="stable")]
    ends = np.maximum.accumulate(times[:, 1])
    is_new = np.append(True, times[1:, 0] > ends[:-1] + gap)
    first = np.flatnonzero(is_new)
    last = np.append(first[1:], len(times)) - 1
    return list(zip(times[first, 0].tolist(), ends[last].tolist(), strict=True))

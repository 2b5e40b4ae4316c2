"""Expert-parallel layers on several GPUs: what a bulk, a chunked and a fused schedule cost in closed form.

`bulk` runs dispatch, experts and combine one after another; `chunked` pipelines them in pieces; `fused` is one
persistent kernel whose transfers hide under compute. Balanced routing and one MoE layer; times in ns.
"""

import math
from dataclasses import dataclass, replace

from perfmodel import physics
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.moe import MoEShape
from perfmodel.predict import work_of
from perfmodel.routing import routing
from perfmodel.text import NS_PER_S

SCHEDULES = ("bulk", "chunked", "fused")
N_CHUNKS = 4
N_LAUNCHES = {"bulk": 85, "chunked": 33, "fused": 1}  # Megatron-CUTLASS, COMET, FlashMoE: arXiv 2506.04667 Table 1
COLLECTIVE_LATENCY_NS = 20_000.0  # start of one all-to-all on NVLink; an assumption, to be measured per machine
TILE_ROWS = 128  # bM of the fused kernel (arXiv 2506.04667 section 3)


@dataclass(frozen=True)
class LayerSchedule:
    """Latency of one expert-parallel layer and the time each phase takes on its own.

    Phases of overlapping schedules sum to more than the latency.
    """

    schedule: str
    latency_ns: float
    phases: dict[str, float]
    bottleneck: str


def layer_schedule(
    shape: MoEShape, profile: HardwareProfile, n_gpus: int, tokens_per_gpu: int, schedule: str
) -> LayerSchedule:
    """What one MoE layer costs with its experts spread evenly over n_gpus and tokens_per_gpu tokens on every GPU.

    Raises InputError for an unknown schedule, GPUs that do not divide the experts, or a machine without a peer link.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")
    if n_gpus < 1 or shape.n_experts % n_gpus:
        raise InputError(f"{n_gpus} GPUs cannot share {shape.n_experts} experts evenly")
    rows = tokens_per_gpu * shape.top_k
    _, activation_bytes = physics.element_bytes(shape.dtype)
    transfer = start = 0.0
    if n_gpus > 1:
        remote_bytes = rows * shape.hidden * activation_bytes * (n_gpus - 1) / n_gpus
        transfer = remote_bytes / profile["peer_link_peak_bytes_per_s"] * NS_PER_S
        start = COLLECTIVE_LATENCY_NS
    launch = N_LAUNCHES[schedule] * profile["launch_overhead_ns"]
    work = {"dispatch": transfer, "experts": _experts_ns(shape, profile, n_gpus, rows), "combine": transfer}
    # A pipeline of n pieces shows every phase's first piece and the slowest phase's others. A collective starts once
    # per piece; the one-sided transfers of the fused kernel start once.
    n_pieces = {"bulk": 1.0, "chunked": float(N_CHUNKS), "fused": max(1.0, rows / TILE_ROWS)}[schedule]
    starts = {"dispatch": start, "experts": 0.0, "combine": start}
    fill = math.fsum(starts.values()) if schedule == "fused" else 0.0
    pieces = [work[p] / n_pieces + (0.0 if fill else starts[p]) for p in work]
    latency = launch + fill + math.fsum(pieces) + (n_pieces - 1) * max(pieces)
    n_starts = 1.0 if fill else n_pieces
    phases = {"launch": launch} | {p: work[p] + n_starts * starts[p] for p in work}
    return LayerSchedule(schedule, latency, phases, max(phases, key=lambda phase: phases[phase]))


def _experts_ns(shape: MoEShape, profile: HardwareProfile, n_gpus: int, rows: int) -> float:
    """Time of the grouped GEMMs of one GPU's experts under balanced routing, launches left out."""
    local = replace(shape, n_experts=shape.n_experts // n_gpus, top_k=1)
    work = work_of(local, routing("uniform", local.n_experts, 1, rows), "grouped-gemm")
    form = physics.form_for(profile, physics.PYTORCH_KERNEL, shape.dtype)
    constants = replace(form.defaults, call_ns=0.0) if profile.device == "gpu" else form.defaults
    parts = form.resident_parts(work, physics.ceilings(profile, shape.dtype), constants)
    return float(physics.total(parts).mean())


def overlap_efficiency(latency_two_ns: float, latency_n_ns: float) -> float:
    """Weak-scaling efficiency O_e = T(2) / T(N) (arXiv 2506.04667 Fig 11)."""
    return latency_two_ns / latency_n_ns


def throughput_tokens_per_s(tokens_per_gpu: int, n_gpus: int, latency_ns: float) -> float:
    """Tokens of all GPUs per second (arXiv 2506.04667 Fig 10)."""
    return tokens_per_gpu * n_gpus / latency_ns * NS_PER_S


def symmetric_buffer_bytes(token_buffer_bytes: float, n_tokens: int, n_experts: int) -> float:
    """Size(L) of the fused kernel's symmetric layout: 4 copies of the token buffer, more when an expert's share of the
    tokens is below a tile of 128 rows (arXiv 2506.04667 section 3)."""
    share = n_tokens / n_experts
    return 4 * token_buffer_bytes * max(1.0, TILE_ROWS / share)


def padding_saved_frac(tokens_per_expert: list[int], capacity: int) -> float:
    """Share of a capacity-padded collective's payload that a payload-only transfer does not send."""
    if max(tokens_per_expert) > capacity:
        raise InputError(f"an expert has {max(tokens_per_expert)} tokens, more than the capacity {capacity}")
    return 1 - sum(tokens_per_expert) / (len(tokens_per_expert) * capacity)

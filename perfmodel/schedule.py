"""Expert-parallel layers on several GPUs: what a bulk, a chunked and a fused schedule cost in closed form.

`bulk` runs dispatch, experts and combine one after another; `chunked` pipelines them in pieces; `fused` is one
persistent kernel whose transfers hide under compute. Balanced routing and one MoE layer; times in ns.
"""

import math
from dataclasses import dataclass

from perfmodel import physics
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.moe import MoEShape
from perfmodel.predict import predict
from perfmodel.routing import routing

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
    local = MoEShape(**{**shape.__dict__, "n_experts": shape.n_experts // n_gpus, "top_k": 1})
    rows = tokens_per_gpu * shape.top_k
    experts = predict(profile, local, routing("uniform", local.n_experts, 1, rows)).latency_ns
    _, activation = physics.element_bytes(shape.dtype)
    remote_bytes = rows * shape.hidden * activation * (n_gpus - 1) / n_gpus
    transfer = remote_bytes / profile["peer_link_peak_bytes_per_s"] * 1e9 if n_gpus > 1 else 0.0
    start = COLLECTIVE_LATENCY_NS if n_gpus > 1 else 0.0
    launch = N_LAUNCHES[schedule] * profile["launch_overhead_ns"]
    phases = {"launch": launch, "dispatch": start + transfer, "experts": experts, "combine": start + transfer}
    steady = max(("dispatch", "experts", "combine"), key=lambda phase: phases[phase])
    if schedule == "bulk":
        latency = math.fsum(phases.values())
    else:
        # All phases but the slowest show only their first piece: a chunk, or the first tile's share of the rows.
        n_pieces = N_CHUNKS if schedule == "chunked" else max(1, math.ceil(rows / TILE_ROWS))
        each_start = start * (N_CHUNKS if schedule == "chunked" else 0)
        hidden = [phases[p] for p in ("dispatch", "experts", "combine") if p != steady]
        latency = launch + phases[steady] + math.fsum(hidden) / n_pieces + each_start
    return LayerSchedule(schedule, latency, phases, max(phases, key=lambda phase: phases[phase]))


def overlap_efficiency(latency_two_ns: float, latency_n_ns: float) -> float:
    """Weak-scaling efficiency O_e = T(2) / T(N) (arXiv 2506.04667 Fig 11)."""
    return latency_two_ns / latency_n_ns


def throughput_tokens_per_s(tokens_per_gpu: int, n_gpus: int, latency_ns: float) -> float:
    """Tokens of all GPUs per second (arXiv 2506.04667 Fig 10)."""
    return tokens_per_gpu * n_gpus / latency_ns * 1e9


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

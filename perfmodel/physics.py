"""The physical latency model: what a grouped GEMM and a MoE layer cost under named constants. Pure numpy.

Every formula here has its number in docs/model.md. Arrays are `[batch, expert]` unless said; a batch row is one
workload or one layer. Times are ns, rates per second.
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.moe import ACTIVATION_BYTES, WEIGHT_BYTES
from perfmodel.text import NS_PER_S

Array = NDArray[np.float64]
Parts = dict[str, Array]  # ns [batch] by the names in PARTS

# What a large dense GEMM and a streaming kernel reach of the nominal peak where no achieved rate is known:
# 780 of 989 TFLOP/s and 2.67 of 3.35 TB/s on H100 SXM (aiconfigurator GEMM tables; docs/model.md).
PEAK_GEMM_FRAC, PEAK_STREAM_FRAC = 0.79, 0.80

# The dtypes whose rate stands for one, best first; all others are stored only and compute as bf16 does.
COMPUTES_IN = {
    "fp32": ("fp32",),
    "bf16": ("bf16", "fp16", "fp32"),
    "fp16": ("fp16", "bf16", "fp32"),
    "fp8": ("fp8", "bf16", "fp16", "fp32"),
}

PARTS = ("overhead", "compute", "memory", "link", "host", "activations", "router")


@dataclass(frozen=True)
class Ceilings:
    """The two roofs of a device for one dtype: what dense GEMM and streaming reach, and which numbers say so."""

    flops_per_s: float
    bytes_per_s: float
    from_keys: tuple[str, ...]


@dataclass(frozen=True)
class Constants:
    """The fitted constants; each is positive, `overlap_frac` lies in 0 to 1 (sources in docs/model.md)."""

    eff_compute: float = 1.0  # share of the dense GEMM rate at a full tile
    eff_memory: float = 1.0  # share of the streaming rate when reading weights
    tile_overhead_rows: float = 107.0  # a tile of m rows costs as much as m + this many
    column_overhead: float = 0.0  # an output column costs as much as K + this many terms
    pack_passes: float = 0.0  # times a BLAS call on several rows moves its weights on top of reading them once
    smooth_p: float = 3.0  # sharpness of the maximum of compute and memory
    overlap_frac: float = 0.3  # how much of one expert's memory time hides under another's compute
    call_ns: float = 4000.0  # one grouped GEMM call
    expert_ns: float = 12.0  # one expert of a call, active or not
    layer_ns: float = 20000.0  # everything of a MoE layer that does not grow: router, top-k, sort, small kernels
    row_passes: float = 4.0  # times a routed row of hidden + inter values is moved outside the GEMMs
    token_passes: float = 2.0  # times a token of hidden values is moved outside the GEMMs


@dataclass(frozen=True)
class KernelForm:
    """What is known of a kernel beforehand: rows per tile it may choose from (None: one tile of exactly the expert's
    rows, as a BLAS call per expert has), columns per tile, and whether a single row runs as a matrix-vector product."""

    tile_rows: tuple[int, ...] | None
    tile_cols: int
    has_gemv: bool


# Grouped GEMM on a GPU chooses its row tile; a CPU runs one BLAS call per expert, matrix-vector for a single row.
FORMS = {"gpu": KernelForm((16, 32, 64, 128, 256), 128, False), "cpu": KernelForm(None, 1, True)}
DEFAULTS = {
    "gpu": Constants(),
    # Rounded from the fit on the first shipped capture, a two-core Zen 4 virtual machine.
    "cpu": Constants(
        eff_memory=0.4,
        tile_overhead_rows=23.0,
        column_overhead=120.0,
        pack_passes=0.4,
        smooth_p=10.0,
        overlap_frac=0.0,
        call_ns=7_500.0,
        expert_ns=1_300.0,
        layer_ns=165_000.0,
        row_passes=2.0,
        token_passes=2.0,
    ),
}


@dataclass(frozen=True)
class Work:
    """A batch of MoE workloads as arrays. `rows[batch, expert]`; `k`, `n` `[batch, gemm]` with 0 for no such GEMM;
    `layer[batch]` is 1 where the whole layer runs, 0 for bare grouped GEMMs; the rest are `[batch]`."""

    rows: Array
    k: Array
    n: Array
    layer: Array
    n_tokens: Array
    hidden: Array
    inter: Array
    n_experts: Array
    weight_bytes: float
    activation_bytes: float


def ceilings(profile: HardwareProfile, dtype: str) -> Ceilings:
    """What bounds GEMMs of a dtype on a machine: achieved rates where known, else a stated share of the nominal peak.

    Quantised weights without a rate of their own compute in bf16, bf16 without one in fp32; never the other way.
    Raises InputError when the profile knows no such rate.
    """
    for name in COMPUTES_IN.get(dtype, COMPUTES_IN["bf16"]):
        found = profile.first(f"{name}_gemm_flops_per_s", f"{name}_peak_flops_per_s")
        if found is not None:
            break
    else:
        raise InputError(
            f"hardware {profile.name!r} has no compute rate for {dtype}; it has {', '.join(profile.quantities)}"
        )
    flops = found[1].value * (PEAK_GEMM_FRAC if "_peak_" in found[0] else 1.0)
    memory = profile.first("memory_stream_bytes_per_s", "memory_peak_bytes_per_s")
    if memory is None:
        raise InputError(f"hardware {profile.name!r} has no memory bandwidth")
    stream = memory[1].value * (PEAK_STREAM_FRAC if "_peak_" in memory[0] else 1.0)
    return Ceilings(flops, stream, (found[0], memory[0]))


def attainable_flops_per_s(
    intensity: Array | float, peak_flops_per_s: Array | float, bytes_per_s: Array | float
) -> Array:
    """The roofline: min(peak, intensity x bandwidth), of one intensity in FLOP per byte or of many."""
    return np.asarray(np.minimum(peak_flops_per_s, intensity * bytes_per_s))


def element_bytes(dtype: str) -> tuple[float, float]:
    """Bytes of a stored weight (scales included) and of an activation for a dtype."""
    return WEIGHT_BYTES[dtype], ACTIVATION_BYTES.get(dtype, ACTIVATION_BYTES["bf16"])


def tile_cost_rows(rows: Array, form: KernelForm, overhead_rows: float) -> Array:
    """Rows' worth of compute an expert costs, tile padding included `[batch, expert]` (model 2).

    With tiles of m rows: ceil(rows / m) tiles at m + overhead each, m chosen per batch row to be cheapest, scaled so
    that a full 256-row tile costs 256. With one tile per expert: rows + overhead, none for a matrix-vector product.
    """
    active = rows > 0
    if form.tile_rows is None:
        extra = np.where(rows == 1, 0.0, overhead_rows) if form.has_gemv else overhead_rows
        return np.where(active, rows + extra, 0.0)
    tiles = np.asarray(form.tile_rows, dtype=np.float64)[:, None, None]
    cost = np.ceil(rows[None] / tiles) * (tiles + overhead_rows) / (1 + overhead_rows / 256)
    best = np.argmin(cost.sum(axis=2), axis=0)
    return np.asarray(cost[best, np.arange(rows.shape[0])])


@dataclass(frozen=True)
class Roofs:
    """What bounds each expert of one grouped GEMM, ns `[batch, expert]`: computing, reading its weights from device
    memory, and moving its activations."""

    compute: Array
    weights: Array
    activations: Array

    @property
    def memory(self) -> Array:
        """All traffic with device memory."""
        return self.weights + self.activations


def gemm_roofs(work: Work, g: int, roof: Ceilings, c: Constants, form: KernelForm) -> Roofs:
    """The roofs of grouped GEMM number g (models 2 and 3)."""
    k, n = work.k[:, g, None], work.n[:, g, None]
    cols = np.ceil(n / form.tile_cols) * form.tile_cols
    terms = np.where(k > 0, k + c.column_overhead, 0.0)
    flops = 2.0 * tile_cost_rows(work.rows, form, c.tile_overhead_rows) * terms * cols
    passes = np.where(work.rows > 1, 1 + c.pack_passes, 1.0) if form.has_gemv else 1.0
    weights = np.where(work.rows > 0, passes * terms * n * work.weight_bytes, 0.0)
    ns_per_byte = NS_PER_S / (roof.bytes_per_s * c.eff_memory)
    return Roofs(
        compute=flops / (roof.flops_per_s * c.eff_compute) * NS_PER_S,
        weights=weights * ns_per_byte,
        activations=work.activation_bytes * work.rows * (k + n) * ns_per_byte,
    )


def smooth_max(terms: list[Array], p: float) -> tuple[Array, list[Array]]:
    """The smooth maximum (sum terms^p)^(1/p), and the share of it that each term accounts for; shares add up to it."""
    top = np.maximum(np.maximum.reduce(terms), 1e-12)
    powers = [(term / top) ** p for term in terms]
    total = np.add.reduce(powers)
    value = top * total ** (1 / p)
    return value, [value * power / np.maximum(total, 1e-12) for power in powers]


def experts_time(compute: Array, memory: Array, link: Array, c: Constants) -> Parts:
    """Time of one grouped GEMM from its experts' roofs, ns `[batch]` by part (model 4).

    A share `overlap_frac` of the work runs with all experts pooled under one maximum, the rest expert after expert.
    """
    _, serial = smooth_max([compute, memory, link], c.smooth_p)
    _, pooled = smooth_max([x.sum(axis=1) for x in (compute, memory, link)], c.smooth_p)
    om = c.overlap_frac
    return {
        part: (1 - om) * one.sum(axis=1) + om * all_
        for part, one, all_ in zip(("compute", "memory", "link"), serial, pooled, strict=True)
    }


def overheads(work: Work, roof: Ceilings, c: Constants) -> Parts:
    """What is not GEMM: calls and experts; for whole layers also a fixed part, router, and activations (5, 6)."""
    n_calls = (work.k > 0).sum(axis=1)
    routed = work.rows.sum(axis=1)
    moved = work.activation_bytes * (
        c.row_passes * routed * (work.hidden + work.inter) + c.token_passes * work.n_tokens * work.hidden
    )
    router = 2.0 * work.n_tokens * work.hidden * work.n_experts
    return {
        "overhead": n_calls * (c.call_ns + work.n_experts * c.expert_ns) + work.layer * c.layer_ns,
        "activations": work.layer * moved / (roof.bytes_per_s * c.eff_memory) * NS_PER_S,
        "router": work.layer * router / (roof.flops_per_s * c.eff_compute) * NS_PER_S,
    }


def resident_parts(work: Work, roof: Ceilings, c: Constants, form: KernelForm) -> Parts:
    """Latency by part, ns `[batch]`, with every expert in device memory; the parts sum to the latency (model 1)."""
    return sum_parts(resident_gemm_parts(work, roof, c, form), overheads(work, roof, c))


def resident_gemm_parts(work: Work, roof: Ceilings, c: Constants, form: KernelForm) -> Parts:
    """The grouped GEMMs alone, by part, ns `[batch]`, with every expert in device memory."""
    gemms = []
    for g in range(work.k.shape[1]):
        roofs = gemm_roofs(work, g, roof, c, form)
        gemms.append(experts_time(roofs.compute, roofs.memory, np.zeros_like(roofs.memory), c))
    return sum_parts(*gemms)


def ideal_work(work: Work) -> tuple[Array, Array]:
    """What the grouped GEMMs need at least, `[batch]`: FLOPs without padding, bytes of the active experts' weights."""
    weights = (work.k * work.n).sum(axis=1)
    active = (work.rows > 0).sum(axis=1)
    return 2 * work.rows.sum(axis=1) * weights, active * weights * work.weight_bytes


def sum_parts(*several: Parts) -> Parts:
    """Add times part by part; a part that is absent counts as zero."""
    zero = np.zeros_like(next(iter(several[0].values())))
    return {part: np.asarray(sum((one.get(part, zero) for one in several), zero)) for part in PARTS}


def total(parts: Parts) -> Array:
    """The latency that the parts make up."""
    return np.asarray(np.add.reduce(list(parts.values())))


def constant_names() -> tuple[str, ...]:
    """The names of the fitted constants, in order."""
    return tuple(f.name for f in fields(Constants))

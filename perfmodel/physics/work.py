"""What is computed and on what: batches of MoE workloads as arrays, ceilings of a machine, and parts of a latency."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.moe import ACTIVATION_BYTES, WEIGHT_BYTES
from perfmodel.text import shortened

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Parts = dict[str, Array]  # ns [batch] by the names in PARTS

# The parts of a latency. `overhead` is what grows with nothing but calls and experts; `permute` and `combine` move the
# rows of experts and the tokens; `link`, `host` and `near-data` are what offloaded experts add; `launch` is the time
# that the host needs to launch beyond what the device computes.
PARTS = ("overhead", "compute", "memory", "link", "host", "near-data", "permute", "combine", "router", "launch")

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

TILE_ROWS = (16, 32, 64, 128, 256)  # rows per tile that grouped kernels on GPUs are built for
# What a launch of a Triton kernel is configured with: rows, columns and terms (K) of a tile, tiles of rows that are
# computed in a group for the sake of the cache, warps, pipeline stages, and whether somebody tuned these for the shape.
TILE_FIELDS = ("rows", "cols", "terms", "group", "warps", "stages", "is_tuned")


@dataclass(frozen=True)
class Ceilings:
    """The two roofs of a device for one dtype: what dense GEMM and streaming reach, and which numbers say so."""

    flops_per_s: float
    bytes_per_s: float
    from_keys: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Counts:
    """Rows that each expert receives, `rows[routing, expert]`, zero beyond a layer's experts, and sums over experts
    that are taken once however many workloads share a routing."""

    rows: Array

    @cached_property
    def n_rows(self) -> Array:
        """Rows of all experts, `[routing]`."""
        return np.asarray(self.rows.sum(axis=1))

    @cached_property
    def n_active(self) -> Array:
        """Experts that receive a row at all, `[routing]`."""
        return np.asarray((self.rows > 0).sum(axis=1), dtype=np.float64)

    @cached_property
    def max_rows(self) -> Array:
        """Rows of the busiest expert, `[routing]`."""
        return np.asarray(self.rows.max(axis=1))

    @cached_property
    def tiles(self) -> Array:
        """Tiles of m rows that all experts need, `[routing, m of TILE_ROWS]`."""
        return np.stack([np.ceil(self.rows / m).sum(axis=1) for m in TILE_ROWS], axis=1)


@dataclass(frozen=True, eq=False)
class Work:
    """A batch of MoE workloads as arrays, `[batch]` unless said.

    `routing_of` names the routing in `counts`; `item_of` the measured or asked-for item, of which several batch rows
    are equally likely draws. `k`, `n` are `[batch, gemm]`, 0 for no such GEMM. `layer` is 1 where permute, activation
    and combine are timed too, `router` 1 where the gate GEMM is, `eager` 1 where the host launches each call. `tile`
    is `[batch, TILE_FIELDS]` where the kernel's launch is known to be configured so, else null.
    """

    counts: Counts
    routing_of: Index
    item_of: Index
    k: Array
    n: Array
    layer: Array
    router: Array
    eager: Array
    n_tokens: Array
    hidden: Array
    inter: Array
    n_experts: Array
    weight_bytes: float
    activation_bytes: float
    tile: Array | None = None

    @property
    def rows(self) -> Array:
        """Rows of each expert, `[batch, expert]`."""
        return np.asarray(self.counts.rows[self.routing_of])

    @property
    def n_rows(self) -> Array:
        """Rows of all experts."""
        return np.asarray(self.counts.n_rows[self.routing_of])

    @property
    def n_active(self) -> Array:
        """Experts that receive a row."""
        return np.asarray(self.counts.n_active[self.routing_of])

    @property
    def n_items(self) -> int:
        """How many items the batch rows belong to."""
        return int(self.item_of[-1]) + 1 if len(self.item_of) else 0

    def take(self, items: Index) -> "Work":
        """The work of some items, renumbered from zero in the order of the batch; counts are shared, not copied."""
        chosen = np.zeros(self.n_items, dtype=bool)
        chosen[items] = True
        keep = chosen[self.item_of]
        number = np.cumsum(chosen) - 1
        columns: dict[str, Any] = {
            name: value[keep]
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray) and name != "item_of"
        }
        return replace(self, item_of=number[self.item_of[keep]].astype(np.int64), **columns)

    def mean(self, values: Array) -> Array:
        """The mean over the draws of each item, `[item]`."""
        n = self.n_items
        return np.asarray(np.bincount(self.item_of, values, n) / np.bincount(self.item_of, minlength=n))


def nearest_tile(rows: Array) -> Index:
    """The number in TILE_ROWS of the tile nearest to each height, of the shape of `rows`."""
    return np.asarray(np.abs(rows[..., None] - TILE_ROWS).argmin(axis=-1), dtype=np.int64)


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


def transferred_ceilings(profile: HardwareProfile, dtype: str, source: HardwareProfile) -> Ceilings:
    """The ceilings that efficiencies fitted on another machine are relative to: like scales with like.

    A roof that rests on an achieved rate on one machine and on a share of the nominal peak on the other is scaled from
    the source by the ratio of the nominal peaks, where both have one, for the ratio of unlike rates is no ratio.
    """
    own, theirs = ceilings(profile, dtype), ceilings(source, dtype)
    compute = (own.flops_per_s, own.from_keys[0])
    memory = (own.bytes_per_s, own.from_keys[1])
    if own.from_keys[0] != theirs.from_keys[0]:
        compute = _scaled(*compute, theirs.flops_per_s, theirs.from_keys[0], profile, source)
    if own.from_keys[1] != theirs.from_keys[1]:
        memory = _scaled(*memory, theirs.bytes_per_s, theirs.from_keys[1], profile, source)
    return Ceilings(compute[0], memory[0], (compute[1], memory[1]))


def _scaled(
    own_rate: float, own_key: str, their_rate: float, their_key: str, profile: HardwareProfile, source: HardwareProfile
) -> tuple[float, str]:
    peak = "_".join([*own_key.split("_")[:1], "peak", *own_key.split("_")[2:]])
    same_peak = "_".join([*their_key.split("_")[:1], "peak", *their_key.split("_")[2:]])
    if peak != same_peak or not {peak} <= set(profile.quantities) & set(source.quantities):
        return own_rate, own_key
    return their_rate * profile[peak] / source[peak], peak


def attainable_flops_per_s(
    intensity: Array | float, peak_flops_per_s: Array | float, bytes_per_s: Array | float
) -> Array:
    """The roofline: min(peak, intensity x bandwidth), of one intensity in FLOP per byte or of many."""
    return np.asarray(np.minimum(peak_flops_per_s, intensity * bytes_per_s))


def element_bytes(dtype: str) -> tuple[float, float]:
    """Bytes of a stored weight (scales included) and of an activation for a dtype; raises InputError for another."""
    if dtype not in WEIGHT_BYTES:
        raise InputError(f"dtype {shortened(dtype, 40)!r} is unknown; known: {', '.join(WEIGHT_BYTES)}")
    return WEIGHT_BYTES[dtype], ACTIVATION_BYTES.get(dtype, ACTIVATION_BYTES["bf16"])


def ideal_work(work: Work) -> tuple[Array, Array]:
    """What the grouped GEMMs need at least, `[batch]`: FLOPs without padding, bytes of the active experts' weights."""
    weights = (work.k * work.n).sum(axis=1)
    return 2 * work.n_rows * weights, work.n_active * weights * work.weight_bytes


def elementwise(of_two: np.ufunc, terms: Sequence[Array]) -> Array:
    """A function of two arrays over several, from the first to the last; a ufunc's `reduce` would stack them first."""
    return functools.reduce(of_two, terms)


def smooth_max(terms: list[Array], p: float) -> tuple[Array, list[Array]]:
    """The smooth maximum (sum terms^p)^(1/p), and the share of it that each term accounts for; shares add up to it."""
    value, powers, total = _norm(terms, p)
    return value, [value * power / np.maximum(total, 1e-12) for power in powers]


def smooth_value(terms: list[Array], p: float) -> Array:
    """The smooth maximum alone, for many at a time."""
    return _norm(terms, p)[0]


def _norm(terms: list[Array], p: float) -> tuple[Array, list[Array], Array]:
    """(sum terms^p)^(1/p), and the powers of the terms over the largest with their sum."""
    top = np.maximum(elementwise(np.maximum, terms), 1e-12)
    powers = [(term / top) ** p for term in terms]
    total = elementwise(np.add, powers)
    return top * total ** (1 / p), powers, total


def sum_parts(*several: Parts) -> Parts:
    """Add times part by part; a part that is absent counts as zero, one that all lack stays absent."""
    found = [part for part in PARTS if any(part in one for one in several)]
    return {part: elementwise(np.add, [one[part] for one in several if part in one]) for part in found}


def total(parts: Parts) -> Array:
    """The latency that the parts make up."""
    return elementwise(np.add, list(parts.values()))

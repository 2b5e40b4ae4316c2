"""Grouped GEMM and MoE layer on a GPU: tiles of rows and columns under two roofs (the P10 form, docs/model.md).

Numbers in brackets are those of docs/model.md. Times are ns.
"""

from dataclasses import dataclass

import numpy as np

from perfmodel.text import NS_PER_S

from .priors import Prior
from .work import (
    TILE_FIELDS,
    TILE_ROWS,
    Array,
    Ceilings,
    Index,
    Parts,
    Work,
    elementwise,
    nearest_tile,
    smooth_max,
    sum_parts,
)

TILE_COLS, STEP_TERMS = 128, 64  # what is assumed of a tile that is not known, and what overheads are scaled to
ALIGNED = 16  # elements: a row of weights of another length is not read in vectors by kernels that Triton compiles
# PyTorch's grouped_mm on SM90 (aten/src/ATen/native/cuda/GroupMM.cu at 06c0cf0) does not tune: with at most this many
# rows per expert on average, or columns, it takes tiles of 64 x 128, else of 128 x 256.
SM90_MEAN_ROWS, SM90_COLS, SM90_SMALL, SM90_LARGE = 128, 128, (64, 128), (128, 256)


@dataclass(frozen=True)
class TiledConstants:
    """The fitted constants of a grouped kernel on a GPU; each is positive (defaults: docs/model.md)."""

    eff_compute: float = 1.0  # share of the dense GEMM rate at a tile of 256 rows
    eff_memory: float = 1.0  # share of the streaming rate when reading weights
    tile_overhead_rows: float = 107.0  # a tile of m rows costs as much as m + this many
    tile_overhead_cols: float = 30.0  # a tile of n columns costs as much as n + this many
    step_overhead_terms: float = 16.0  # a step through K by t terms costs as much as t + this many
    tile_overhead_terms: float = 150.0  # a tile costs as much as inner products of K + this many terms
    smooth_p: float = 3.0  # sharpness of the maximum of compute and memory
    call_ns: float = 4000.0  # one grouped GEMM call on the device
    expert_ns: float = 12.0  # one expert of a call, active or not
    layer_ns: float = 20000.0  # all of a MoE layer that does not grow: top-k, sort, small kernels
    row_passes: float = 4.0  # times a routed row of hidden + inter values is moved outside the GEMMs
    token_passes: float = 4.0  # times a token of hidden values is moved outside the GEMMs
    misaligned_compute: float = 2.0  # slow-down of compute where rows of weights cannot be read in vectors
    misaligned_memory: float = 1.2  # the same of reading the weights
    host_call_ns: float = 8000.0  # the host's time to launch one grouped GEMM call
    host_layer_ns: float = 150000.0  # the host's time to launch everything else of a MoE layer


PRIORS = {
    "eff_compute": Prior(0.10, 0.1, 1.6, anchor=True),
    "eff_memory": Prior(0.08, 0.1, 1.6, anchor=True),
    "tile_overhead_rows": Prior(1.5, 1.0, 2000.0),
    "tile_overhead_cols": Prior(1.5, 0.5, 2000.0),
    "step_overhead_terms": Prior(1.5, 0.5, 2000.0),
    "tile_overhead_terms": Prior(1.5, 1.0, 3000.0),
    "smooth_p": Prior(0.5, 1.0, 12.0, anchor=True),
    "call_ns": Prior(1.5, 100.0, 1e6),
    "expert_ns": Prior(1.5, 0.1, 1e5),
    "layer_ns": Prior(1.5, 100.0, 1e7),
    "row_passes": Prior(1.5, 0.05, 200.0),
    "token_passes": Prior(1.5, 0.05, 200.0),
    "misaligned_compute": Prior(1.0, 1.0, 20.0),
    "misaligned_memory": Prior(0.5, 1.0, 20.0),
    "host_call_ns": Prior(1.5, 100.0, 1e7),
    "host_layer_ns": Prior(1.5, 100.0, 1e8),
}


@dataclass(frozen=True)
class Kernel:
    """What is known of a kernel beforehand: whether its tile follows PyTorch's rule for SM90 instead of being the
    cheapest, and whether rows of weights of odd length slow it down. A launch configuration in `Work.tile` wins."""

    sm90_rule: bool = False
    needs_alignment: bool = False


def identified(work: Work, kernel: Kernel) -> list[str]:
    """The constants that observations of this work can say anything about."""
    layer, eager = work.layer > 0, work.eager > 0
    has_bare = bool((~layer).any())
    odd = kernel.needs_alignment and bool(((work.k % ALIGNED != 0) & (work.k > 0)).any())
    asked = {
        "step_overhead_terms": work.tile is not None,
        "tile_overhead_cols": work.tile is not None or kernel.sm90_rule,
        "call_ns": has_bare,
        "layer_ns": layer.any(),
        "row_passes": layer.any(),
        "token_passes": layer.any(),
        "misaligned_compute": odd,
        "misaligned_memory": odd,
        "host_call_ns": bool((eager & ~layer).any()),
        "host_layer_ns": bool((eager & layer).any()),
    }
    return [name for name in PRIORS if asked.get(name, True)]


@dataclass(frozen=True)
class Prepared:
    """What of a batch of work does not depend on constants, once for many evaluations; `[batch, ...]`."""

    work: Work
    n_rows: Array
    n_active: Array
    tiles: Array  # [batch, tile], how many tiles of each height all experts need
    width: Array  # [batch, gemm], columns of a tile
    columns: Array  # [batch, gemm], tiles side by side
    step: Array  # [batch], terms of K that a tile takes at a time
    odd: Array  # [batch, gemm], 1 where rows of weights are misaligned for the kernel
    chosen: Index | None  # [batch, gemm], number of the tile's height, null where the cheapest is taken
    n_chosen: Array | None  # [batch, gemm], how many tiles of that height


def prepare(work: Work, kernel: Kernel) -> Prepared:
    """Tiles, columns and alignment of each workload."""
    n_rows, n_active = work.n_rows, work.n_active
    tiles = work.counts.tiles[work.routing_of]
    odd = ((work.k % ALIGNED != 0) & kernel.needs_alignment).astype(np.float64)
    width = np.full(work.n.shape, float(TILE_COLS))
    step = np.full(len(work.n), float(STEP_TERMS))
    chosen: Index | None = None
    if work.tile is not None:
        height = nearest_tile(work.tile[:, [TILE_FIELDS.index("rows")]])
        chosen = np.repeat(height, work.n.shape[1], axis=1)
        width = np.repeat(work.tile[:, [TILE_FIELDS.index("cols")]], work.n.shape[1], axis=1)
        step = work.tile[:, TILE_FIELDS.index("terms")]
    elif kernel.sm90_rule:
        small = (n_rows[:, None] / work.n_experts[:, None] <= SM90_MEAN_ROWS) | (work.n <= SM90_COLS)
        chosen = np.where(small, TILE_ROWS.index(SM90_SMALL[0]), TILE_ROWS.index(SM90_LARGE[0]))
        width = np.where(small, float(SM90_SMALL[1]), float(SM90_LARGE[1]))
    n_chosen = None if chosen is None else np.take_along_axis(tiles, chosen, axis=1)
    return Prepared(work, n_rows, n_active, tiles, width, np.ceil(work.n / width), step, odd, chosen, n_chosen)


def _tile_cost_rows(c: TiledConstants) -> Array:
    """Rows' worth of compute that one tile of m rows costs, `[tile]`; a tile of 256 rows costs 256 (model 2.1)."""
    m = np.asarray(TILE_ROWS, dtype=np.float64)
    return np.asarray((m + c.tile_overhead_rows) / (1 + c.tile_overhead_rows / 256))


def _column_cost(prepared: Prepared, g: int, c: TiledConstants) -> Array:
    """Columns' worth of compute that the tiles side by side cost, `[batch]`; one of 128 columns, taken through K in
    steps of 64 terms, costs 128."""
    width = (prepared.width[:, g] + c.tile_overhead_cols) / (1 + c.tile_overhead_cols / TILE_COLS)
    step = (1 + c.step_overhead_terms / prepared.step) / (1 + c.step_overhead_terms / STEP_TERMS)
    return np.asarray(prepared.columns[:, g] * width * step)


def gemm_roofs(prepared: Prepared, roof: Ceilings, c: TiledConstants) -> list[tuple[Array, Array]]:
    """For each grouped GEMM the time to compute and to move memory, ns `[batch]`, all experts pooled (2.1, 3)."""
    work = prepared.work
    per_tile = _tile_cost_rows(c)
    if prepared.n_chosen is None:
        cheapest = elementwise(np.minimum, list((prepared.tiles * per_tile).T))
    found = []
    for g in range(work.k.shape[1]):
        k, n = work.k[:, g], work.n[:, g]
        if prepared.chosen is None or prepared.n_chosen is None:
            rows = cheapest
        else:
            rows = prepared.n_chosen[:, g] * per_tile[prepared.chosen[:, g]]
        terms = np.where(k > 0, k + c.tile_overhead_terms, 0.0)
        slow = 1 + prepared.odd[:, g] * (c.misaligned_compute - 1)
        flops = 2 * rows * terms * _column_cost(prepared, g, c) * slow
        weights = prepared.n_active * k * n * work.weight_bytes * (1 + prepared.odd[:, g] * (c.misaligned_memory - 1))
        moved = weights + work.activation_bytes * prepared.n_rows * (k + n)
        found.append(
            (
                flops / (roof.flops_per_s * c.eff_compute) * NS_PER_S,
                moved / (roof.bytes_per_s * c.eff_memory) * NS_PER_S,
            )
        )
    return found


@dataclass(frozen=True)
class ExpertRoofs:
    """What bounds each expert of one grouped GEMM, ns `[batch, expert]`: computing, reading its weights from device
    memory, and moving its activations. Summed over experts they are the pooled roofs of `gemm_roofs`."""

    compute: Array
    weights: Array
    activations: Array


def expert_roofs(work: Work, kernel: Kernel, roof: Ceilings, c: TiledConstants) -> list[ExpertRoofs]:
    """The roofs of each grouped GEMM by expert; the tile is the one that all experts together make cheapest."""
    prepared = prepare(work, kernel)
    rows = work.rows
    per_tile = _tile_cost_rows(c)
    best = np.argmin(prepared.tiles * per_tile, axis=1)
    ns_per_byte = NS_PER_S / (roof.bytes_per_s * c.eff_memory)
    found = []
    for g in range(work.k.shape[1]):
        k, n, odd = work.k[:, g, None], work.n[:, g, None], prepared.odd[:, g, None]
        tile = best if prepared.chosen is None else prepared.chosen[:, g]
        m = np.asarray(TILE_ROWS, dtype=np.float64)[tile][:, None]
        terms = np.where(k > 0, k + c.tile_overhead_terms, 0.0)
        cost = np.ceil(rows / m) * per_tile[tile][:, None]
        flops = 2 * cost * terms * _column_cost(prepared, g, c)[:, None] * (1 + odd * (c.misaligned_compute - 1))
        weights = np.where(rows > 0, k * n * work.weight_bytes * (1 + odd * (c.misaligned_memory - 1)), 0.0)
        found.append(
            ExpertRoofs(
                compute=flops / (roof.flops_per_s * c.eff_compute) * NS_PER_S,
                weights=weights * ns_per_byte,
                activations=work.activation_bytes * rows * (k + n) * ns_per_byte,
            )
        )
    return found


def gemm_parts(prepared: Prepared, roof: Ceilings, c: TiledConstants) -> Parts:
    """The grouped GEMMs alone, by part, ns `[batch]`, with every expert in device memory (model 4)."""
    gemms = []
    for compute, memory in gemm_roofs(prepared, roof, c):
        _, (compute_part, memory_part) = smooth_max([compute, memory], c.smooth_p)
        gemms.append({"compute": compute_part, "memory": memory_part})
    return sum_parts(*gemms)


def other_parts(work: Work, roof: Ceilings, c: TiledConstants) -> Parts:
    """What is not GEMM: calls and experts; for whole layers also a fixed part, router, and activations (5, 6)."""
    ns_per_byte = NS_PER_S / (roof.bytes_per_s * c.eff_memory)
    n_calls = (work.k > 0).sum(axis=1)
    row_bytes = work.activation_bytes * c.row_passes * work.n_rows * (work.hidden + work.inter)
    token_bytes = work.activation_bytes * c.token_passes * work.n_tokens * work.hidden
    router = 2.0 * work.n_tokens * work.hidden * work.n_experts
    calls = n_calls * c.call_ns * (1 - work.layer) + work.layer * c.layer_ns
    return {
        "overhead": calls + work.n_experts * c.expert_ns * np.where(work.layer > 0, 1, n_calls),
        "permute": work.layer * row_bytes * ns_per_byte,
        "combine": work.layer * token_bytes * ns_per_byte,
        "router": work.router * router / (roof.flops_per_s * c.eff_compute) * NS_PER_S,
    }


def launch_floor_ns(work: Work, c: TiledConstants) -> Array:
    """The time that the host needs to launch everything, ns `[batch]`; 0 where nothing is launched call by call."""
    n_calls = (work.k > 0).sum(axis=1)
    return np.asarray(work.eager * (n_calls * c.host_call_ns + work.layer * c.host_layer_ns))


def with_launch_floor(parts: Parts, work: Work, c: TiledConstants) -> Parts:
    """Parts with what the host needs beyond them: a call lasts as long as the slower of device and host (model 1.1)."""
    device = elementwise(np.add, list(parts.values()))
    return {**parts, "launch": np.maximum(launch_floor_ns(work, c) - device, 0.0)}


def resident_parts(prepared: Prepared, roof: Ceilings, c: TiledConstants) -> Parts:
    """Latency by part, ns `[batch]`, with every expert in device memory; the parts sum to the latency (model 1)."""
    work = prepared.work
    parts = sum_parts(gemm_parts(prepared, roof, c), other_parts(work, roof, c))
    return with_launch_floor(parts, work, c)

"""What the fused kernel does, tile by tile: row blocks in the order in which they are sent, and how long tasks take.

A row block is up to 128 rows of one GPU's tokens for one expert: what a packet of the fused kernel carries and what one
row of tiles computes (arXiv 2506.04667 section 3).
"""

from dataclasses import dataclass, replace

import numpy as np

from perfmodel.errors import InputError
from perfmodel.physics import Array, smooth_value, tiled
from perfmodel.placement import RESIDENT
from perfmodel.placement.balance import Index
from perfmodel.predict import work_of
from perfmodel.routing import Routing

from .costs import BEFORE, EXPERTS, Layer, correction_of
from .measures import TILE_ROWS

TILE_COLS = 64  # bN (arXiv 2506.04667 section 3)
BLOCKS_PER_SM, OS_BLOCKS = 2, 1  # thread blocks, and those of them that schedule and subscribe (there, Table 4)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Row blocks of a layer, `[block]`: whose rows they are, on which GPU and in which slot their expert is, how many.

    Ordered as each source sends them: one for each GPU in turn, beginning with its next, of each GPU slot after slot.
    """

    source: Index
    gpu: Index
    slot: Index
    rows: Index


@dataclass(frozen=True, eq=False)
class Plan:
    """All that decides when what happens: row blocks, and durations, ns.

    `begin_ns[GPU]` is when a GPU's router and permute are done, `n_tiles` the tasks of a block's two GEMMs and of its
    weighted sum. A task of GEMM g on a slot takes `gemm_ns[slot, g, 1]` in the first block that computes there, for it
    reads the weights, and `gemm_ns[slot, g, 0]` in all others; a task of the sum `reduce_ns[block]`. `hold_ns[slot]` is
    how long the first block of a slot holds its whole GPU up. `wire_ns[block]` is how long it occupies a link of `lane`
    0 inside a node or 1 between nodes; -1: it stays where it is.
    """

    blocks: Blocks
    n_processors: int
    begin_ns: Array
    n_tiles: tuple[int, int, int]
    gemm_ns: Array
    reduce_ns: Array
    hold_ns: Array
    wire_ns: Array
    lane: Index
    alpha_ns: tuple[float, float]


def n_processors(layer: Layer) -> int:
    """Processors of one GPU: thread blocks that compute. Raises InputError for a CPU, and without a number of SMs."""
    profile = layer.basis.device.profile
    if profile.device != "gpu":
        raise InputError(
            f"hardware {profile.name!r} is a {profile.device}, and the fused schedule is one kernel on a GPU; "
            "expected a GPU, or schedule bulk or chunked"
        )
    cores = profile.first("n_cores_count")
    if cores is None:
        raise InputError(
            f"hardware {profile.name!r} has no n_cores_count (streaming multiprocessors), needed for the fused "
            f"schedule; it has {', '.join(profile.quantities)}"
        )
    return max(1, int(cores[1].value) * BLOCKS_PER_SM - OS_BLOCKS)


def blocks_of(layer: Layer) -> Blocks:
    """The row blocks of a layer; of a source's rows for an expert only the last block may have fewer than 128 rows."""
    rows = layer.traffic.rows.astype(np.int64)
    n_gpus, n_slots = rows.shape
    n_pieces = -(-rows.ravel() // TILE_ROWS)
    pair = np.repeat(np.arange(rows.size), n_pieces)
    piece = np.arange(len(pair)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    source, slot = np.divmod(pair, n_slots)
    gpu = layer.traffic.gpu_of[slot]
    of_pair = np.lexsort((piece, slot, gpu, source))  # what a source has for one GPU stands together
    way = (source * n_gpus + gpu)[of_pair]
    turn = np.empty(len(pair), dtype=np.int64)
    turn[of_pair] = np.arange(len(pair)) - np.searchsorted(way, way)
    order = np.lexsort(((gpu - source) % n_gpus, turn, source))
    left = rows.ravel()[pair] - piece * TILE_ROWS
    return Blocks(source[order], gpu[order], slot[order], np.minimum(left, TILE_ROWS)[order])


def plan_of(layer: Layer, factor: float) -> Plan:
    """The plan of a layer; `factor` multiplies all durations."""
    traffic, fabric = layer.traffic, layer.fabric
    blocks, n = blocks_of(layer), n_processors(layer)
    task_ns, n_tiles = _gemm_tasks(layer, n)
    gemm_ns = task_ns * correction_of(layer)[traffic.gpu_of][:, None, None]
    gemm_ns, hold_ns = _offloaded(layer, blocks, gemm_ns, n_tiles, n)
    own = layer.compute_ns
    n_sum = -(-layer.shape.hidden // TILE_COLS)
    n_rows = np.maximum(traffic.rows.sum(axis=1), 1.0)
    inside = fabric.is_inside[blocks.source, blocks.gpu] > 0
    lane = np.where(blocks.source == blocks.gpu, -1, np.where(inside, 0, 1))
    links = (fabric.inside, fabric.between or fabric.inside)
    ns_per_byte = np.array([link.ns_per_byte for link in links])
    return Plan(
        blocks=blocks,
        n_processors=n,
        begin_ns=np.asarray(sum(own[name] for name in BEFORE)) * factor,
        n_tiles=(*n_tiles, n_sum),
        gemm_ns=gemm_ns * factor,
        # What the whole sum takes is divided by rows: the more rows in a block, the longer its tasks.
        reduce_ns=(own["reduce"] / n_rows)[blocks.source] * blocks.rows * (n / n_sum * factor),
        hold_ns=hold_ns * factor,
        wire_ns=np.where(lane < 0, 0.0, blocks.rows * layer.row_bytes * ns_per_byte[lane]) * factor,
        lane=lane,
        alpha_ns=(links[0].alpha_ns * factor, links[1].alpha_ns * factor),
    )


def _gemm_tasks(layer: Layer, n: int) -> tuple[Array, tuple[int, int]]:
    """How long a task of each GEMM takes a processor, ns `[1, GEMM, without or with weights]`, and tasks of a block.

    A processor has 1 / n of the GPU's compute and bandwidth. A block computes 128 rows, however few it has, reads these
    and writes its results; the two roofs meet in the smooth maximum of docs/model.md.
    """
    device, shape = layer.basis.device, replace(layer.shape, n_experts=1, top_k=1)
    tile = np.array([[TILE_ROWS, TILE_COLS, tiled.STEP_TERMS, 1, 0, 0, 0]], dtype=np.float64)  # physics.TILE_FIELDS
    block = Routing("", np.array([[TILE_ROWS]]), TILE_ROWS, 1)
    work = work_of(shape, block, "grouped-gemm", "graph", tile)
    found, n_tiles = np.empty((1, 2, 2)), [0, 0]
    for g, roofs in enumerate(tiled.expert_roofs(work, tiled.Kernel(), device.roof, device.constants)):
        n_tiles[g] = -(-int(work.n[0, g]) // TILE_COLS)
        for with_weights in (0, 1):
            moved = roofs.activations + with_weights * roofs.weights
            whole = smooth_value([roofs.compute, moved], device.constants.smooth_p)
            found[0, g, with_weights] = whole[0, 0] * n / n_tiles[g]
    return found, (n_tiles[0], n_tiles[1])


def _offloaded(layer: Layer, blocks: Blocks, gemm_ns: Array, n_tiles: tuple[int, int], n: int) -> tuple[Array, Array]:
    """Durations of GEMM tasks, and how long each slot holds its GPU up, ns, with experts outside device memory.

    What these add to the expert phases of other schedules holds the whole GPU up, an even share of it when the first
    block of each of them starts; what they take off shortens their tasks.
    """
    traffic, hold_ns = layer.traffic, np.zeros(len(gemm_ns))
    if layer.tier is None:
        return gemm_ns, hold_ns
    resident = replace(layer, tier=None, access=None)
    more = np.asarray(sum(layer.compute_ns[name] - resident.compute_ns[name] for name in EXPERTS))
    n_blocks = np.bincount(blocks.slot, minlength=len(hold_ns))
    is_off = (layer.tier != RESIDENT) & (n_blocks > 0)
    tasks = np.asarray(n_tiles) / n
    slot_ns = (gemm_ns[:, :, 0] @ tasks) * (n_blocks - 1) + gemm_ns[:, :, 1] @ tasks
    scale = np.ones(len(hold_ns))
    for gpu in range(traffic.n_gpus):
        off = is_off & (traffic.gpu_of == gpu)
        if off.any() and more[gpu] > 0:
            hold_ns[off] = more[gpu] / off.sum()
        elif off.any():
            scale[off] = max(0.0, 1 + more[gpu] / slot_ns[off].sum())
    return gemm_ns * scale[:, None, None], hold_ns


def busy_ns(plan: Plan) -> dict[str, Array]:
    """What each GPU's tasks take, processor time over processors, and what experts outside device memory hold it up,
    ns `[GPU]` by phase: it does not depend on when they run."""
    blocks, n_gpus = plan.blocks, len(plan.begin_ns)
    slots, first = np.unique(blocks.slot, return_index=True)

    def on_gpu(of_block: Array, of_slot: Array) -> Array:
        by_block = np.bincount(blocks.gpu, of_block, n_gpus)
        return np.asarray(by_block + np.bincount(blocks.gpu[first], of_slot[slots], n_gpus))

    found = {}
    for g, name in enumerate(("gemm1", "gemm2")):
        without, reading = plan.gemm_ns[:, g, 0], plan.gemm_ns[:, g, 1]
        found[name] = on_gpu(without[blocks.slot], reading - without) * plan.n_tiles[g] / plan.n_processors
    found["offload"] = on_gpu(np.zeros(len(blocks.slot)), plan.hold_ns)
    found["reduce"] = np.bincount(blocks.source, plan.reduce_ns, n_gpus) * plan.n_tiles[2] / plan.n_processors
    return found

"""The latency staircases of GPUs: from measurements of captures, or from the latency model with a speed for each GPU.

A GPU of an expert-parallel group holds E / G experts and receives token-expert assignments, each a row of its experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil

import numpy as np
import polars as pl

from perfmodel import physics
from perfmodel.capture import IS_OFFLOADED
from perfmodel.errors import InputError
from perfmodel.moe import MoEShape
from perfmodel.physics import Array
from perfmodel.placement.balance import ExpertMap, Index, require_even
from perfmodel.placement.staircase import Staircase, token_counts
from perfmodel.predict import OPS, Basis, work_of
from perfmodel.routing import Recording, Routing, Shares

# From the router's logits on: all that a GPU of the group does with the rows it received.
LAYER = OPS[2]
MAX_DRAWN = 2**20  # assignments of one sequence
N_DRAWS = 4  # sequences of assignments that a predicted staircase is the mean of
# The smaller tile of PyTorch's grouped GEMM on SM90; the larger is twice as high (physics.tiled).
DEFAULT_TILE_ROWS = 64


def local_shape(shape: MoEShape, n_gpus: int) -> MoEShape:
    """What one GPU of a group holds of a layer: E / G experts, rounded up; each assignment is a token of its own."""
    return replace(shape, n_experts=-(-shape.n_experts // n_gpus), top_k=1)


def device_ns(basis: Basis, shape: MoEShape, rows: Array, item_of: Index | None = None) -> Array:
    """The time of one GPU for the rows of its experts, ns `[item]`, as the latency model has it; `rows[batch, expert]`.

    Batch rows of one `item_of` are equally likely draws, of which the mean is taken (null: each its own item). A fitted
    model of the same dtype corrects the physics. `shape` is what the GPU holds.
    """
    n_rows = rows.sum(axis=1)
    empty = Routing("", np.zeros(rows.shape, dtype=np.int64), 0, 1)  # whose rows are put in below, some of them shares
    counts, index = np.unique(np.maximum(np.rint(n_rows), 1).astype(np.int64), return_inverse=True)
    known = [tile for n in counts if (tile := basis.tile(shape, int(n))) is not None]
    work = replace(
        work_of(shape, empty, LAYER, basis.launch),
        counts=physics.Counts(rows),
        n_tokens=n_rows,
        tile=np.concatenate(known)[index.ravel()] if known else None,
    )
    if item_of is not None:
        work = replace(work, item_of=item_of)
    if basis.model is not None and basis.model.dtype == shape.dtype:
        return basis.model.forecast(work, basis.device.profile).ns
    device = basis.device
    return work.mean(physics.total(device.form.resident_parts(work, device.roof, device.constants)))


def layer_ns_by_rows(one: ExpertMap, loads: Array, basis: Basis, shape: MoEShape, speeds: Array) -> float:
    """The slowest GPU's time of a layer under a map, mean over `loads[step, layer, expert]`, ns, each GPU's predicted
    from the rows of each of its experts: what a staircase, which knows their sum alone, does not see."""
    layers = np.arange(len(one.phy2log))[:, None]
    n_held = np.stack([(one.gpu_of == gpu).sum(axis=1) for gpu in range(one.n_gpus)], axis=1)
    first = np.cumsum(n_held, axis=1) - n_held  # slots are in the order of GPUs
    place = np.arange(one.phy2log.shape[1]) - np.take_along_axis(first, one.gpu_of, axis=1)
    rows = np.zeros((len(loads), *n_held.shape, int(n_held.max())))
    rows[:, layers, one.gpu_of, place] = (loads / one.logcnt)[:, layers, one.phy2log]
    flat = rows.reshape(-1, rows.shape[-1])
    ns = np.zeros(len(flat))
    is_used = flat.any(axis=1)  # a GPU without rows does nothing
    ns[is_used] = device_ns(basis, replace(shape, n_experts=flat.shape[1], top_k=1), flat[is_used])
    return float((ns.reshape(rows.shape[:-1]) / speeds).max(axis=2).mean())


def tile_rows_of(basis: Basis, shape: MoEShape, n_rows: int) -> int:
    """The height of tiles that a GPU's kernel takes for so many rows, where it is known; else DEFAULT_TILE_ROWS."""
    tile = basis.tile(shape, n_rows)
    return DEFAULT_TILE_ROWS if tile is None else int(tile[0, physics.TILE_FIELDS.index("rows")])


def predicted_staircase(
    basis: Basis, shape: MoEShape, speeds: Array, shares: Shares, n_most: int, tile_rows: int | None = None
) -> Staircase:
    """The staircases of GPUs that share a layer's experts and differ in speed alone, up to `n_most` assignments.

    Assignments fall on a GPU's experts at random, as popular as the means of G experts each of `shares[layer, expert]`
    in order of popularity; more of them are the same ones and further ones. A speed divides all of the time. Counts are
    those of `token_counts`, with tiles of `tile_rows` (null: what is known of the kernel).
    """
    local = local_shape(shape, len(speeds))
    ranked = -np.sort(-shares, axis=1).mean(axis=0)
    popularity = np.array([some.mean() for some in np.array_split(ranked, local.n_experts)])
    counts = token_counts(n_most, tile_rows or tile_rows_of(basis, local, n_most))
    rows = np.concatenate([_prefixes(popularity / popularity.sum(), counts, draw) for draw in range(N_DRAWS)])
    order = np.tile(np.arange(len(counts)), N_DRAWS).argsort(kind="stable")
    ns = device_ns(basis, local, rows[order], np.repeat(np.arange(len(counts)), N_DRAWS))
    return Staircase(counts, rising(ns)[None]).at_speeds(speeds)


def predicted_times(
    basis: Basis, shape: MoEShape, speeds: Array, recording: Recording, tile_rows: int | None = None
) -> tuple[Staircase, Callable[[ExpertMap, Array], float]]:
    """What `compare` judges maps of a recording by: the staircase over all token counts that it may come to, and the
    time of a layer from the rows of every expert."""
    n_most = ceil(recording.loads.sum(axis=2).max())
    staircase = predicted_staircase(basis, shape, speeds, recording.shares, n_most, tile_rows)
    return staircase, partial(layer_ns_by_rows, basis=basis, shape=shape, speeds=speeds)


def _prefixes(popularity: Shares, counts: Index, seed: int) -> Array:
    """Rows of each expert after the first `counts` of one random sequence of assignments, `[count, expert]`; beyond
    MAX_DRAWN of them, where chance evens out, as expected."""
    n_drawn = min(int(counts[-1]), MAX_DRAWN)
    drawn = np.random.default_rng(seed).choice(len(popularity), size=n_drawn, p=popularity)
    step = np.searchsorted(counts, np.arange(n_drawn), side="right")
    new = np.bincount(step * len(popularity) + drawn, minlength=len(counts) * len(popularity))
    return new.reshape(len(counts), -1).cumsum(axis=0) + np.maximum(counts - n_drawn, 0)[:, None] * popularity


def rising(ns: Array) -> Array:
    """The nearest times that do not fall with more tokens (least squares): noise and a change of tiles make falls."""
    from scipy.optimize import isotonic_regression

    return np.asarray(isotonic_regression(ns).x, dtype=np.float64)


def observed_staircase(
    observations: Sequence[pl.DataFrame], shape: MoEShape, n_gpus: int, speeds: Array | None = None
) -> Staircase:
    """The staircases that captures measured: one table of observations for each GPU, or one for all with `speeds`.

    Used are rows with every expert resident of a layer that one GPU would hold (E / G experts, hidden and inter of the
    shape): whole layers where there are any, else the sum of its grouped GEMMs. The time of a token count is the median
    over routings and runs. Raises InputError where a table has no such rows at two token counts or more, and where
    tables share no counts.
    """
    require_even(shape.n_experts, n_gpus)
    if len(observations) not in (1, n_gpus) or (len(observations) > 1 and speeds is not None):
        raise InputError(
            f"found {len(observations)} captures for {n_gpus} GPUs, expected one for each GPU, or one and their speeds"
        )
    found = [_measured(table, shape, shape.n_experts // n_gpus) for table in observations]
    counts = sorted(set.intersection(*(set(one) for one in found)))
    if len(counts) < 2:
        raise InputError("the captures of the GPUs share fewer than two token counts, measure the same ones on each")
    stairs = Staircase(
        np.array(counts, dtype=np.int64), np.stack([rising(np.array([one[n] for n in counts])) for one in found])
    )
    return stairs if len(found) == n_gpus else stairs.at_speeds(np.ones(n_gpus) if speeds is None else speeds)


def _measured(observations: pl.DataFrame, shape: MoEShape, n_experts: int) -> dict[int, float]:
    """The time at each number of assignments, ns."""
    resident = observations.filter(~IS_OFFLOADED)
    mine = resident.filter(n_experts=n_experts, hidden=shape.hidden, inter=shape.inter, n_gemms=shape.n_gemms)
    op = "moe_layer" if (mine["op"] == "moe_layer").any() else "grouped_gemm"
    each = (
        mine.filter(pl.col("op") == op)
        .group_by(n=pl.col("n_tokens") * pl.col("top_k"), gemm="gemm_k")
        .agg(pl.col("time_ns").median())
    )
    n_gemms = each["gemm"].n_unique()
    whole = each.group_by("n").agg(pl.col("time_ns").sum(), n_gemms=pl.len()).filter(n_gemms=n_gemms).sort("n")
    if whole.height < 2:
        layers = resident.select("n_experts", "hidden", "inter").unique().sort("n_experts", "hidden", "inter").rows()
        known = ", ".join(f"{e} x {h} x {i}" for e, h, i in layers[:8])
        raise InputError(
            f"no two token counts of a layer of {n_experts} experts x {shape.hidden} x {shape.inter} were measured; "
            f"experts x hidden x inter of the capture: {known}{', ...' if len(layers) > 8 else ''}"
        )
    return dict(whole.select("n", "time_ns").iter_rows())

"""Observations as work for the physical model, and the features by which workloads differ to it."""

from dataclasses import replace

import numpy as np
import polars as pl

from perfmodel.errors import InputError
from perfmodel.physics import (
    TILE_FIELDS,
    TILE_ROWS,
    Array,
    Ceilings,
    Counts,
    Parts,
    Work,
    element_bytes,
    ideal_work,
    nearest_tile,
)
from perfmodel.routing import published_counts
from perfmodel.tile_rules import TileRule

N_DRAWS = 8  # batches drawn for a routing of which only the distribution is known
LAYER_OPS = ("moe_layer", "fused_moe")  # a fused_moe call begins with the router's logits, a moe_layer makes them


def work_of(observations: pl.DataFrame, tiles: TileRule | None = None) -> Work:
    """The workloads of an OBSERVATIONS table as arrays; a whole layer has two grouped GEMMs, a single call one.

    A row without `tokens_per_expert` names a published distribution in `routing`, of which N_DRAWS batches are drawn
    (the same at each call). `tiles` says how the kernel's launches are configured. Raises InputError for several
    dtypes, and for a distribution that is not known.
    """
    dtypes = observations["dtype"].unique().to_list()
    if len(dtypes) != 1:
        raise InputError(f"observations of {len(dtypes)} dtypes ({', '.join(sorted(dtypes))}) cannot share one model")
    counts, routing_of, item_of = _routings(observations)

    def column(name: str) -> Array:
        return np.asarray(observations[name].cast(pl.Float64).fill_null(0.0).to_numpy()[item_of])

    op = observations["op"].cast(pl.String)
    is_layer = op.is_in(LAYER_OPS).to_numpy()[item_of]
    hidden, inter, up = column("hidden"), column("inter"), column("n_gemms") - 1
    weight, activation = element_bytes(dtypes[0])
    work = Work(
        counts=counts,
        routing_of=routing_of,
        item_of=item_of,
        k=np.column_stack([np.where(is_layer, hidden, column("gemm_k")), np.where(is_layer, inter, 0.0)]),
        n=np.column_stack([np.where(is_layer, up * inter, column("gemm_n")), np.where(is_layer, hidden, 0.0)]),
        layer=is_layer.astype(np.float64),
        router=(op == "moe_layer").to_numpy()[item_of].astype(np.float64),
        eager=((observations["device"] == "cuda") & observations["launch"].is_null()).to_numpy()[item_of] * 1.0,
        n_tokens=column("n_tokens"),
        hidden=hidden,
        inter=inter,
        n_experts=column("n_experts"),
        weight_bytes=weight,
        activation_bytes=activation,
    )
    return launched(work, observations, tiles)


def launched(work: Work, observations: pl.DataFrame, tiles: TileRule | None) -> Work:
    """The work of these observations, its launches configured as `tiles` says; null: as nobody knows."""
    return replace(work, tile=None if tiles is None else tiles.of(observations)[work.item_of])


def _routings(observations: pl.DataFrame) -> tuple[Counts, np.ndarray, np.ndarray]:
    """The distinct routings, and for each batch row (an item's draw) its routing and its item."""
    number: dict[tuple[object, ...], list[int]] = {}
    drawn: list[list[int] | np.ndarray] = []
    routing_of: list[int] = []
    item_of: list[int] = []
    names = ("tokens_per_expert", "routing", "n_experts", "top_k", "n_tokens")
    for item, (counts, name, n_experts, top_k, n_tokens) in enumerate(observations.select(names).iter_rows()):
        key = (name, n_experts, top_k, n_tokens) if counts is None else tuple(counts)
        if key not in number:
            found = [counts] if counts is not None else published_counts(name, n_experts, top_k, n_tokens, N_DRAWS)
            number[key] = list(range(len(drawn), len(drawn) + len(found)))
            drawn.extend(found)
        routing_of += number[key]
        item_of += [item] * len(number[key])
    rows = np.zeros((len(drawn), max(map(len, drawn))))
    for i, one in enumerate(drawn):
        rows[i, : len(one)] = one
    return Counts(rows), np.array(routing_of, dtype=np.int64), np.array(item_of, dtype=np.int64)


# The axes along which a model extrapolates; a name is what a warning calls it.
HULL = (
    "n_tokens",
    "rows_per_active_expert",
    "compute_over_memory",
    "active_frac",
    "max_over_mean_load",
    "hidden",
    "inter",
    "n_experts",
)
GROWS_WITH_TOKENS = ("n_tokens", "rows_per_active_expert", "compute_over_memory")
LOAD = ("active_frac", "max_over_mean_load")


def hull_features(work: Work, roof: Ceilings) -> dict[str, Array]:
    """Where each item lies along the axes of HULL, means over its draws, `[item]`."""
    flops, weight_bytes = ideal_work(work)
    n_rows, n_active = work.n_rows, work.n_active
    values = (
        work.n_tokens,
        n_rows / n_active,
        (flops / roof.flops_per_s) / (weight_bytes / roof.bytes_per_s),
        n_active / work.n_experts,
        work.counts.max_rows[work.routing_of] * work.n_experts / n_rows,
        np.maximum(work.hidden, work.k[:, 0]),
        np.where(work.layer > 0, work.inter, work.n[:, 0]),
        work.n_experts,
    )
    return {name: work.mean(value) for name, value in zip(HULL, values, strict=True)}


N_FEATURES, N_TILE_FEATURES = 18, 10  # columns of residual_features, and how many more where tiles are known


def residual_features(work: Work, parts: Parts) -> Array:
    """What a learner of residuals sees of each item, `[item, feature]`: what the physics says of it, how its rows fill
    tiles, its widths, and the launch configuration where known (docs/model.md, section 10)."""
    n_rows, n_active = work.n_rows, work.n_active
    latency = np.add.reduce([parts[name] for name in parts])

    def part(*names: str) -> Array:
        return np.asarray(np.add.reduce([np.zeros_like(latency), *(parts[name] for name in names if name in parts)]))

    columns = [
        np.log(latency),
        part("overhead", "launch") / latency,
        part("permute", "combine", "router") / latency,
        np.log(np.maximum(part("compute"), 1e-3) / np.maximum(part("memory"), 1e-3)),
        np.log(n_rows / n_active),
        n_active / work.n_experts,
        np.log(work.counts.max_rows[work.routing_of] * work.n_experts / n_rows),
        np.log(work.k[:, 0]),
        np.log(np.maximum(work.n[:, 0], 1)),
        np.log(np.where(work.layer > 0, work.inter, work.n[:, 0])),
        np.log(work.n_experts),
        np.log(n_rows / work.n_tokens),
        np.log(work.n_tokens),
        work.inter % 128,
        (work.inter % 16 != 0).astype(np.float64),
        work.layer,
    ]
    tiles = work.counts.tiles[work.routing_of]
    for m in (64, 128):
        columns.append(tiles[:, TILE_ROWS.index(m)] * m / n_rows)
    if work.tile is not None:
        rows, cols, terms = (np.log(work.tile[:, TILE_FIELDS.index(name)]) for name in ("rows", "cols", "terms"))
        height = nearest_tile(work.tile[:, TILE_FIELDS.index("rows")])
        n_tiles = tiles[np.arange(len(tiles)), height]
        width = np.exp(cols)
        columns += [rows, cols, terms, *work.tile[:, 3:].T, n_tiles * np.exp(rows) / n_rows]
        columns += [np.ceil(work.n[:, 0] / width) * width / np.maximum(work.n[:, 0], 1)]
        columns += [np.log(n_tiles * np.ceil(np.maximum(work.n[:, 1], work.n[:, 0]) / width))]
    return np.column_stack([work.mean(column) for column in columns])

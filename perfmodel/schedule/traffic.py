"""Who sends what to whom in an expert-parallel layer: rows of each GPU's tokens for each expert, and where those live.

A row is a token-expert assignment. Every GPU has tokens of its own (data parallel) and some of the experts. numpy only.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.moe import MoEShape
from perfmodel.physics import Array
from perfmodel.placement.balance import ExpertMap, Index, linear
from perfmodel.placement.eplb import numbers_among_equals
from perfmodel.routing import MAX_DRAWN, Shares, drawn_choices, drawn_rows, is_pattern, pattern_shares, read_shares

Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Traffic:
    """The rows of one layer: `rows[source GPU, slot]`, whole numbers; `gpu_of[slot]` the GPU that holds each expert, or
    each copy of one; `expert_of[slot]` which expert that is; `n_tokens[source GPU]` its tokens.

    `tokens[source GPU, GPU]` is how many different tokens of a source have at least one row there: what a dispatch that
    sends a token once to each GPU moves. Each source's rows sum to n_tokens x top_k. Raises InputError otherwise.
    """

    rows: Array
    tokens: Array
    gpu_of: Index
    expert_of: Index
    n_tokens: Index
    top_k: int

    def __post_init__(self) -> None:
        n_gpus = len(self.n_tokens)
        if self.rows.shape != (n_gpus, len(self.gpu_of)) or self.tokens.shape != (n_gpus, n_gpus):
            raise InputError(
                f"traffic of {n_gpus} GPUs and {len(self.gpu_of)} slots has rows of shape {self.rows.shape} and tokens "
                f"of shape {self.tokens.shape}"
            )
        if (self.rows < 0).any() or (self.rows.sum(axis=1) != self.n_tokens * self.top_k).any():
            raise InputError("the rows of a GPU do not sum to its tokens x top-k")

    @property
    def n_gpus(self) -> int:
        """GPUs of the layer."""
        return len(self.n_tokens)

    @cached_property
    def rows_between(self) -> Array:
        """Rows that each GPU has for the experts of each, `[source GPU, GPU]`; the diagonal stays where it is."""
        return self.between(self.rows)

    @cached_property
    def received(self) -> Array:
        """Rows of each GPU's own experts, `[GPU, place]`; zero beyond its experts."""
        return self.at_experts(self.rows.sum(axis=0))

    @cached_property
    def slots_of(self) -> tuple[Index, ...]:
        """The slots of each GPU, ascending."""
        return tuple(np.flatnonzero(self.gpu_of == gpu) for gpu in range(self.n_gpus))

    def between(self, rows: Array) -> Array:
        """The sums of `rows[source GPU, slot]` over the slots of each GPU, `[source GPU, GPU]`."""
        return np.stack([np.bincount(self.gpu_of, own, self.n_gpus) for own in rows])

    def at_experts(self, by_slot: NDArray[Number]) -> NDArray[Number]:
        """What is known of each slot, `[slot]`, by GPU, `[GPU, place]`; zero beyond a GPU's experts."""
        found = np.zeros((self.n_gpus, max(len(slots) for slots in self.slots_of)), dtype=by_slot.dtype)
        for gpu, slots in enumerate(self.slots_of):
            found[gpu, : len(slots)] = by_slot[slots]
        return found


def expected_tokens(rows_between: Array, tokens_per_gpu: int, top_k: int) -> Array:
    """How many different tokens of each source have a row on each GPU when no more is known than its rows there,
    `[source GPU, GPU]`: a token misses a GPU when none of its top-k goes there, taken as independent (exact for drawing
    with return)."""
    tokens = tokens_per_gpu * (1 - (1 - rows_between / (tokens_per_gpu * top_k)) ** top_k)
    return np.asarray(np.minimum(tokens, rows_between))


def traffic_of(
    source: str,
    shape: MoEShape,
    n_gpus: int,
    tokens_per_gpu: int,
    expert_map: ExpertMap | None = None,
    layer: int = 0,
    seed: int = 0,
) -> Traffic:
    """The traffic of a layer under a routing pattern or file, `tokens_per_gpu` tokens on every GPU.

    Every GPU draws its own batch; of a large one only how many rows each expert has. `expert_map` says where experts
    live (null: the first E / G on the first GPU and so on); of it and of a file the layer numbered `layer`
    counts. Raises InputError for a routing or map of other experts, a map of other GPUs or without that layer, and for
    GPUs that cannot share the experts evenly.
    """
    shares = layer_shares_of(source, shape, layer)
    chosen = linear(1, shape.n_experts, n_gpus) if expert_map is None else expert_map
    return traffic_from_shares(shares, shape, chosen, tokens_per_gpu, map_layer_of(chosen, n_gpus, layer), seed)


def map_layer_of(chosen: ExpertMap, n_gpus: int, layer: int) -> int:
    """The number in a map of the layer numbered `layer`: a map of one layer is for all. Raises InputError for a map of
    another number of GPUs, or without that layer."""
    if chosen.n_gpus != n_gpus:
        raise InputError(f"the map is for {chosen.n_gpus} GPUs, expected {n_gpus}")
    n_layers = len(chosen.phy2log)
    if n_layers > 1 and layer >= n_layers:
        raise InputError(f"the map has {n_layers} layers, none numbered {layer}; expected 0 to {n_layers - 1}")
    return min(layer, n_layers - 1)


def layer_shares_of(source: str, shape: MoEShape, layer: int = 0) -> Shares:
    """How popular the experts of one layer are, `[1, expert]`, by a routing pattern or file; a pattern, and a file of
    one layer, is for all. Raises InputError for a routing of other experts and for a layer that the file has not."""
    if is_pattern(source):
        return pattern_shares(source, shape.n_experts)
    shares = read_shares(source, shape.n_experts)
    if shares.shape[1] != shape.n_experts:
        raise InputError(f"routing {source!r} is for {shares.shape[1]} experts, the shape has {shape.n_experts}")
    if len(shares) == 1:
        return shares
    if not 0 <= layer < len(shares):
        raise InputError(
            f"routing {source!r} has {len(shares)} layers, none numbered {layer}; expected 0 to {len(shares) - 1}"
        )
    return shares[layer : layer + 1]


def traffic_from_shares(
    shares: Shares, shape: MoEShape, chosen: ExpertMap, tokens_per_gpu: int, map_layer: int = 0, seed: int = 0
) -> Traffic:
    """The traffic under the popularity `shares[1, expert]` of one layer's experts; see `traffic_of`.

    Copies of an expert share its tokens evenly, as ExpertMap says: the sources take copies in turn, each from another
    one on, so that few tokens spread over copies too. Above MAX_DRAWN tokens x experts rows of experts are drawn, and
    how many tokens they are of is taken from batches that are together of that size.
    """
    if tokens_per_gpu < 1:
        raise InputError(f"{tokens_per_gpu} tokens on each GPU, expected at least 1")
    n_gpus, expert_of, gpu_of = chosen.n_gpus, chosen.phy2log[map_layer], chosen.gpu_of[map_layer]
    n_copies = np.bincount(expert_of, minlength=shape.n_experts)
    if len(n_copies) != shape.n_experts or n_copies.min() == 0:
        raise InputError(f"the map does not hold each of the shape's {shape.n_experts} experts, and no others")
    n_tokens = np.full(n_gpus, tokens_per_gpu, dtype=np.int64)
    rows, tokens = np.empty((n_gpus, len(gpu_of))), np.empty((n_gpus, n_gpus))
    if tokens_per_gpu * shape.n_experts > MAX_DRAWN:
        for gpu in range(n_gpus):
            drawn = drawn_rows(shares, tokens_per_gpu, shape.top_k, seed * n_gpus + gpu)
            whole, left = np.divmod(drawn, n_copies)
            turn = (chosen.copy_of[map_layer] - gpu) % n_copies[expert_of]
            rows[gpu] = whole[expert_of] + (turn < left[expert_of])
        n_part = max(MAX_DRAWN // (shape.n_experts * n_gpus), 1)
        part = traffic_from_shares(shares, shape, chosen, n_part, map_layer, seed)
        found = Traffic(rows, tokens, gpu_of, expert_of, n_tokens, shape.top_k)
        each = part.tokens.sum(axis=0) / np.maximum(part.rows_between.sum(axis=0), 1)  # tokens of a row
        likely = np.maximum(found.rows_between * each, found.rows_between / shape.top_k)
        return replace(found, tokens=np.minimum(np.minimum(likely, found.rows_between), tokens_per_gpu))
    slot_of = np.zeros((shape.n_experts, n_copies.max()), dtype=np.int64)
    slot_of[expert_of, chosen.copy_of[map_layer]] = np.arange(len(expert_of))
    for gpu in range(n_gpus):
        choices = drawn_choices(shares, tokens_per_gpu, shape.top_k, seed * n_gpus + gpu)
        turn = numbers_among_equals(choices.reshape(1, -1)).reshape(choices.shape) + gpu
        slots = slot_of[choices, turn % n_copies[choices]]
        rows[gpu] = np.bincount(slots.ravel(), minlength=len(gpu_of))
        goes = np.zeros((tokens_per_gpu, n_gpus), dtype=bool)
        goes[np.arange(tokens_per_gpu)[:, None], gpu_of[slots]] = True
        tokens[gpu] = goes.sum(axis=0)
    return Traffic(rows, tokens, gpu_of, expert_of, n_tokens, shape.top_k)

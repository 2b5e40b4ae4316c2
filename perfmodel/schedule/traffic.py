"""Who sends what to whom in an expert-parallel layer: rows of each GPU's tokens for each expert, and where those live.

A row is a token-expert assignment. Every GPU has tokens of its own (data parallel) and some of the experts. numpy only.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from perfmodel.errors import InputError
from perfmodel.moe import MoEShape
from perfmodel.physics import Array
from perfmodel.placement.balance import ExpertMap, Index, linear
from perfmodel.routing import (
    MAX_DRAWN,
    Shares,
    expected_counts,
    is_pattern,
    pattern_shares,
    read_shares,
    sample_choices,
)


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
        found = np.zeros((self.n_gpus, self.n_gpus))
        np.add.at(found.T, self.gpu_of, self.rows.T)
        return found

    @cached_property
    def slots_of(self) -> tuple[Index, ...]:
        """The slots of each GPU, ascending."""
        return tuple(np.flatnonzero(self.gpu_of == gpu) for gpu in range(self.n_gpus))

    @cached_property
    def received(self) -> Array:
        """Rows of each GPU's own experts, `[GPU, place]`; zero beyond its experts."""
        sums = self.rows.sum(axis=0)
        found = np.zeros((self.n_gpus, max(len(slots) for slots in self.slots_of)))
        for gpu, slots in enumerate(self.slots_of):
            found[gpu, : len(slots)] = sums[slots]
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

    Every GPU draws its own batch, unless it is so large that expected counts stand for it. `expert_map` says where
    experts live (null: the first E / G on the first GPU and so on); of it and of a file the layer numbered `layer`
    counts. Raises InputError for a routing of other experts and for GPUs that cannot share them evenly.
    """
    shares = pattern_shares(source, shape.n_experts) if is_pattern(source) else read_shares(source, shape.n_experts)
    if shares.shape[1] != shape.n_experts:
        raise InputError(f"routing {source!r} is for {shares.shape[1]} experts, the shape has {shape.n_experts}")
    if not 0 <= layer < len(shares):
        raise InputError(f"layer {layer} of routing {source!r}, expected 0 to {len(shares) - 1}")
    chosen = expert_map or linear(1, shape.n_experts, n_gpus)
    return traffic_from_shares(
        shares[layer : layer + 1], shape, chosen, tokens_per_gpu, min(layer, len(chosen.phy2log) - 1), seed
    )


def traffic_from_shares(
    shares: Shares, shape: MoEShape, chosen: ExpertMap, tokens_per_gpu: int, map_layer: int = 0, seed: int = 0
) -> Traffic:
    """The traffic under the popularity `shares[1, expert]` of one layer's experts; see `traffic_of`."""
    if tokens_per_gpu < 1:
        raise InputError(f"{tokens_per_gpu} tokens on each GPU, expected at least 1")
    n_gpus, expert_of, gpu_of = chosen.n_gpus, chosen.phy2log[map_layer], chosen.gpu_of[map_layer]
    # Copies of an expert share its tokens evenly (ExpertMap); whole rows, the first copies get what is left over.
    n_copies = np.bincount(expert_of, minlength=shape.n_experts)[expert_of]
    copy = chosen.copy_of[map_layer]

    def in_slots(counts: Index) -> Array:
        whole, left = np.divmod(counts[..., expert_of], n_copies)
        return np.asarray(whole + (copy < left), dtype=np.float64)

    n_tokens = np.full(n_gpus, tokens_per_gpu, dtype=np.int64)
    if tokens_per_gpu * shape.n_experts > MAX_DRAWN:
        counts = np.tile(expected_counts(shares, tokens_per_gpu, shape.top_k), (n_gpus, 1))
        rows = in_slots(counts)
        there = np.zeros((n_gpus, n_gpus))
        np.add.at(there.T, gpu_of, rows.T)
        return Traffic(
            rows, expected_tokens(there, tokens_per_gpu, shape.top_k), gpu_of, expert_of, n_tokens, shape.top_k
        )
    rows, tokens = np.empty((n_gpus, len(gpu_of))), np.empty((n_gpus, n_gpus))
    first_slot = np.full(shape.n_experts, -1)
    first_slot[expert_of[::-1]] = np.arange(len(expert_of))[::-1]
    for gpu in range(n_gpus):
        choices = sample_choices(shares, tokens_per_gpu, shape.top_k, seed * n_gpus + gpu)
        rows[gpu] = in_slots(np.bincount(choices.ravel(), minlength=shape.n_experts))
        goes = np.zeros((tokens_per_gpu, n_gpus), dtype=bool)
        goes[np.arange(tokens_per_gpu)[:, None], gpu_of[first_slot[choices]]] = True
        tokens[gpu] = goes.sum(axis=0)
    return Traffic(rows, tokens, gpu_of, expert_of, n_tokens, shape.top_k)

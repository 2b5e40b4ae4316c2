"""Which expert-parallel layers are measured: shapes, tokens of each rank, routings and schedules. Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.moe import ACTIVATION_BYTES, MoEShape
from perfmodel.routing import Shares, sample_choices

from .workloads import file_shares, scaled_shape, shares_of, workload_seed

# Small enough for four ranks on two cores: many experts, and few.
SHAPES, TOKENS, ROUTINGS, CHUNKS = ("olmoe/8", "mixtral-8x7b/16"), (16, 64, 256), ("uniform", "power-law:1.2"), (2, 4)
N_WARM_UP, N_STEPS, MINUTES = 2, 8, 3.0


@dataclass(frozen=True)
class Batch:
    """What is asked of the ranks: a layer, the tokens of each rank, how those choose, in how many pieces they go."""

    shape: MoEShape
    n_tokens: int
    routing: str
    n_chunks: int

    @property
    def schedule(self) -> str:
        """`bulk` in one piece, `chunked` in several."""
        return "bulk" if self.n_chunks == 1 else "chunked"

    @property
    def words(self) -> str:
        """The batch for people."""
        pieces = "" if self.n_chunks == 1 else f" in {self.n_chunks} pieces"
        return f"{self.shape.name}, {self.n_tokens} tokens a rank, {self.routing}, {self.schedule}{pieces}"

    @property
    def range_name(self) -> str:
        """The outer range of a profiled step."""
        plain = f"perfmodel::moe_layer|shape={self.shape.name}|tokens={self.n_tokens}|routing={self.routing}"
        pieces = "" if self.n_chunks == 1 else f"|chunks={self.n_chunks}"
        return f"{plain}|schedule={self.schedule}{pieces}"

    def key_values(self) -> dict[str, object]:
        """The part of its line in workloads.jsonl that tells it from the others of its capture."""
        return {
            "shape": self.shape.name,
            "tokens_per_gpu": self.n_tokens,
            "routing": self.routing,
            "schedule": self.schedule,
            "n_chunks": self.n_chunks,
        }

    def line(self, gpu_of: Sequence[int], rows: Sequence[Sequence[int]]) -> dict[str, object]:
        """Its line in workloads.jsonl, without its id: which rank has which expert, rows by source rank and expert."""
        s = self.shape
        return {
            **{"shape": s.name, "n_experts": s.n_experts, "top_k": s.top_k, "hidden": s.hidden, "inter": s.inter},
            **{"n_gemms": s.n_gemms, "dtype": s.dtype},
            **self.key_values(),
            **{"gpu_of": list(gpu_of), "rows": [list(row) for row in rows]},
        }

    def memory_bytes(self, n_ranks: int) -> float:
        """About how much all ranks together hold: weights once, rows on both sides."""
        rows, element = n_ranks * self.n_tokens * self.shape.top_k, ACTIVATION_BYTES[self.shape.dtype]
        widths = 6 * self.shape.hidden + 2 * self.shape.n_gemms * self.shape.inter
        return self.shape.layer_bytes + rows * widths * element


def gpu_of(n_experts: int, n_ranks: int) -> list[int]:
    """The rank of each expert: neighbours together, numbers that differ by one at most."""
    return [expert * n_ranks // n_experts for expert in range(n_experts)]


def firsts(n_experts: int, n_ranks: int) -> list[int]:
    """The first expert of each rank, and the number of experts."""
    return np.searchsorted(gpu_of(n_experts, n_ranks), np.arange(n_ranks + 1)).tolist()


def chosen_experts(batch: Batch, rank: int, n_ranks: int, seed: int, files: Mapping[str, Shares]) -> NDArray[np.int64]:
    """The experts that each token of a rank selects, `[token, top_k]`, drawn by a seed of the rank's own.

    `uniform` is balanced over all ranks: each rank goes on with the expert after the last one of the rank before.
    """
    shape = batch.shape
    if batch.routing == "uniform":
        size = batch.n_tokens * shape.top_k
        flat = (rank * size + np.arange(size, dtype=np.int64)) % shape.n_experts
        return flat.reshape(batch.n_tokens, shape.top_k)
    shares = shares_of(batch.routing, shape.n_experts, files)
    seed = workload_seed(shape, batch.n_tokens, f"{batch.routing}|rank {rank} of {n_ranks}", seed)
    return sample_choices(shares, batch.n_tokens, shape.top_k, seed)


@dataclass(frozen=True)
class Request:
    """What was asked for; `dtype` is that of captures, `routing_files` are `FILE[#KEY][@LAYER]`."""

    n_ranks: int
    dtype: str
    shapes: tuple[str, ...] = SHAPES
    tokens: tuple[int, ...] = TOKENS
    routings: tuple[str, ...] = ROUTINGS
    routing_files: tuple[str, ...] = ()
    chunks: tuple[int, ...] = CHUNKS
    seed: int = 0


def plan(request: Request, memory_limit_bytes: float | None) -> tuple[list[Batch], list[str]]:
    """The batches in the order in which they are measured, and a sentence for each shape of which some do not fit.

    The order is random, so that wherever time ends all shapes and sizes are there and drift of the machine is no
    shape's; the schedules of one batch follow each other, since they are compared. Raises InputError on unknown names,
    more ranks than experts, and when nothing is left.
    """
    files = file_shares(request.routing_files)
    shapes = [scaled_shape(name, request.dtype) for name in request.shapes]
    for shape in shapes:
        if shape.n_experts < request.n_ranks:
            raise InputError(f"{shape.name} has {shape.n_experts} experts, expected one at least for each rank")
    for name, shares in files.items():
        if all(shape.n_experts != shares.shape[1] for shape in shapes):
            raise InputError(f"routing {name} is for {shares.shape[1]} experts, and no shape here has that many")
    kept, skipped = [], []
    for shape in shapes:
        names = [*request.routings, *(n for n, shares in files.items() if shares.shape[1] == shape.n_experts)]
        of_shape = [Batch(shape, n_tokens, routing, 1) for n_tokens in request.tokens for routing in names]
        fits = [
            b for b in of_shape if not (memory_limit_bytes and b.memory_bytes(request.n_ranks) > memory_limit_bytes)
        ]
        kept += fits
        if left_out := sorted({b.n_tokens for b in of_shape} - {b.n_tokens for b in fits}):
            skipped.append(f"{shape.name} with {', '.join(map(str, left_out))} tokens a rank does not fit in memory")
    if not kept:
        raise InputError(f"nothing to measure: {'; '.join(skipped)}")
    order = np.random.default_rng(request.seed).permutation(len(kept))
    schedules = dict.fromkeys((1, *request.chunks))
    batches = [
        Batch(one.shape, one.n_tokens, one.routing, n_chunks)
        for one in (kept[i] for i in order)
        for n_chunks in schedules
        if n_chunks <= one.n_tokens
    ]
    return batches, skipped


def profiled(batches: Sequence[Batch]) -> list[Batch]:
    """The few batches to profile: the shape of fewest experts, skewed where planned, its smallest and a middle size in
    bulk, the middle one in pieces too."""
    fewest = min(batches, key=lambda b: b.shape.n_experts).shape
    of_shape = [b for b in batches if b.shape == fewest]
    skewed = [b for b in of_shape if b.routing != "uniform"] or of_shape
    skewed = [b for b in skewed if b.routing == skewed[0].routing]
    sizes = sorted({b.n_tokens for b in skewed})
    of_middle = [b for b in skewed if b.n_tokens == sizes[len(sizes) // 2]]
    chunked = sorted((b for b in of_middle if b.n_chunks > 1), key=lambda b: b.n_chunks)
    in_bulk = [b for b in skewed if b.n_tokens in (sizes[0], of_middle[0].n_tokens) and b.n_chunks == 1]
    return [*in_bulk, *chunked[:1]]

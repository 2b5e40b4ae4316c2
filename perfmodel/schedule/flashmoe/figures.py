"""What FlashMoE publishes beside latencies, recomputed: stragglers, payload, symmetric tensors (docs/flashmoe.md)."""

import csv
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from perfmodel.routing import SHIPPED, read_recording
from perfmodel.schedule import layer_timeline
from perfmodel.schedule.measures import TILE_ROWS, padding_saved_frac, symmetric_buffer_bytes
from perfmodel.schedule.overheads import DEFAULTS
from perfmodel.schedule.timeline import TRANSFERS, LayerTimeline

from .study import CAPACITY_FACTOR, FOLDER, SHAPE, Setting, layer_at

SYMMETRIC = FOLDER / "flashmoe_symmetric.csv"
UNPADDED = replace(DEFAULTS["bulk"], capacity_factor=None)
FP32_BYTES = 4


def late_gpu_ns(found: LayerTimeline, ratio: float) -> float:
    """The latency of a bulk layer in which one GPU computes `ratio` times slower: every phase waits for it."""
    slow = sum(ns for name, ns in found.phases.items() if name not in (*TRANSFERS, "launch"))
    return found.latency_ns + (ratio - 1) * slow


def uneven_straggler_ratio(routing: str, at: Setting) -> float:
    """The `straggler_ratio` that a routing alone makes in a bulk layer without padding."""
    return straggler_ratio(layer_timeline(layer_at(at, SHAPE.dtype, routing=routing), "bulk", UNPADDED))


def straggler_ratio(found: LayerTimeline) -> float:
    """How much longer the first GPU to come to a bulk layer's combine is in it than the last, which waits for nobody:
    the slowest over the fastest run of one collective (arXiv 2506.04667 Table 2)."""
    done = [span.start_ns + span.dur_ns for span in found.spans if span.phase == "gemm2"]
    end = max(span.start_ns + span.dur_ns for span in found.spans if span.phase == "combine")
    return (end - min(done)) / (end - max(done))


class Payload(NamedTuple):
    """What a padded collective makes of a measured routing, mean over layers: the share of padding in what is sent
    where every expert has the room that the fullest needs, and the share of rows that is dropped where each has room
    for the even share (then as much of what is sent is padding)."""

    padding_frac: float
    dropped_frac: float


def payload(key: str) -> Payload:
    """The padding of one of the shipped measured routings (see `routing.routing_keys`)."""
    loads = read_recording(f"{SHIPPED}#{key}").loads.sum(axis=0)
    kept = np.minimum(loads, CAPACITY_FACTOR * loads.mean(axis=1, keepdims=True))
    return Payload(
        float(np.mean([padding_saved_frac(row, row.max()) for row in loads])),
        float(np.mean(1 - kept.sum(axis=1) / loads.sum(axis=1))),
    )


class Symmetric(NamedTuple):
    """A row of the published table of symmetric tensors: bytes as published, read as GiB, and the model's own size."""

    model: str
    n_bytes: float
    n_experts: int
    hidden: int
    context_tokens: int

    @property
    def tokens_of_4kb(self) -> float:
        """Tokens of 4 KiB that four copies hold."""
        return self.n_bytes / (4 * 4096)

    @property
    def padded_tokens(self) -> int:
        """Tokens of a context with each expert's share rounded up to whole tiles."""
        tile_of_each = TILE_ROWS * self.n_experts
        return -(-self.context_tokens // tile_of_each) * tile_of_each

    def size_bytes(self, n_tokens: int) -> float:
        """Size(L) of fp32 tokens as wide as the model; the least there is where experts have less than a tile each."""
        return symmetric_buffer_bytes(FP32_BYTES * self.hidden * n_tokens, n_tokens, self.n_experts)


@cache
def symmetric() -> tuple[Symmetric, ...]:
    """The published table of symmetric tensors."""
    with SYMMETRIC.open(encoding="utf-8") as file:
        return tuple(
            Symmetric(
                row["model"],
                float(row["symmetric_gb"]) * 2**30,
                int(row["n_experts"]),
                int(row["hidden"]),
                int(row["context_tokens"]),
            )
            for row in csv.DictReader(file)
        )

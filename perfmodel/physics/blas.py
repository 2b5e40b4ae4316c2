"""Grouped GEMM and MoE layer on a CPU: one BLAS call per expert, one after another, each under two roofs.

fp32 goes to an sgemm (MKL), which runs a single row as a matrix-vector product; narrower types go to oneDNN, which
treats a single row as any other and deals blocks of columns to threads. Numbers in brackets are those of docs/model.md.
Times are ns.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfmodel.text import NS_PER_S

from .priors import Prior
from .tiled import ExpertRoofs
from .work import Array, Ceilings, Index, Parts, Work, smooth_max, sum_parts

# How sharply compute and memory of one call bound it. Fits on three captures gave 5 to 12 and hardly tell these apart.
SMOOTH_P = 8.0
# oneDNN computes bf16 in blocks of columns. 64 agreed with measurements on two threads, 16 and 32 did not. That blocks
# shrink to one vector register where there would be fewer than threads is assumed: no CPU of many cores was measured.
BLOCK_ROWS, BLOCK_COLS, LEAST_BLOCK_COLS = 64, 64, 16
# glibc maps a tensor of 32 MiB or more (DEFAULT_MMAP_THRESHOLD_MAX) afresh at each call, so every page of it is faulted
# in; smaller ones come from the heap, whose pages are there. Another allocator may keep them: then `page_ns` is small.
FRESH_BYTES, PAGE_BYTES = 32 * 2**20, 4096
TOKEN_PASSES = 2.0  # the sum over experts is zeroed, and written once more: counted, not fitted
FP32_BYTES = 4.0

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class BlasConstants:
    """The fitted constants of BLAS calls on a CPU; all are positive or zero. Defaults are rounded from the fits on the
    three shipped captures of two-core Zen 4 and Zen 5 virtual machines."""

    eff_compute: float = 1.0  # share of the dense GEMM rate that many rows reach
    eff_memory: float = 0.45  # share of the streaming rate at which one call reads weights once
    pack_passes: float = 0.7  # times an sgemm on several rows moves its weights besides reading them: it packs them
    call_rows: float = 27.0  # a call on several rows computes as long as if it had this many more
    column_terms: float = 60.0  # an output column costs as much as an inner product of K + this many terms
    vector_column_terms: float = 190.0  # the same in a matrix-vector product
    active_ns: float = 4000.0  # one BLAS call: what an expert with rows costs however small it is
    expert_ns: float = 700.0  # one expert of a grouped call, active or not: slicing and dispatch
    call_ns: float = 4000.0  # one grouped GEMM call
    page_ns: float = 1000.0  # first touch of a page of a freshly mapped tensor
    layer_ns: float = 150_000.0  # all of a MoE layer that does not grow
    score_ns: float = 4.0  # softmax and top-k of one token for one expert
    row_passes: float = 6.0  # times a routed row of hidden + inter values is moved outside the GEMMs


# Where oneDNN computes bf16, a call costs more and streams better than one of an sgemm.
FP32_DEFAULTS = BlasConstants()
NARROW_DEFAULTS = BlasConstants(eff_memory=0.7, active_ns=17_000.0, layer_ns=85_000.0)

PRIORS = {
    "eff_compute": Prior(0.10, 0.1, 2.0),
    "eff_memory": Prior(0.5, 0.05, 3.0),
    "pack_passes": Prior(1.0, 0.0, 10.0, unit=1.0),
    "call_rows": Prior(1.0, 0.0, 500.0, unit=20.0),
    "column_terms": Prior(1.0, 0.0, 1000.0, unit=50.0),
    "vector_column_terms": Prior(1.0, 0.0, 1000.0, unit=50.0),
    "active_ns": Prior(1.5, 1.0, 1e6),
    "expert_ns": Prior(1.0, 1.0, 1e6),
    "call_ns": Prior(1.0, 100.0, 1e7),
    "page_ns": Prior(0.5, 1.0, 1e5),
    "layer_ns": Prior(1.5, 100.0, 1e8),
    "score_ns": Prior(1.0, 0.01, 1e3),
    "row_passes": Prior(1.0, 0.05, 200.0),
}


def is_sgemm(work: Work) -> bool:
    """Whether the calls are fp32 ones: these know a matrix-vector product and pack weights for several rows."""
    return work.activation_bytes >= FP32_BYTES


def identified(work: Work) -> list[str]:
    """The constants that observations of this work can say anything about."""
    sgemm = is_sgemm(work)
    on_gemms, on_layer = _fresh_pages(work)
    asked = {
        "pack_passes": sgemm,
        "vector_column_terms": sgemm,
        "page_ns": bool((on_gemms + on_layer).any()),
        "layer_ns": bool(work.layer.any()),
        "row_passes": bool(work.layer.any()),
        "score_ns": bool(work.router.any()),
    }
    return [name for name in PRIORS if asked.get(name, True)]


@dataclass(frozen=True)
class _Calls:
    """BLAS calls, any shape alike: rows, K, N, the columns that the slowest thread makes all take, and what they do."""

    rows: Array
    k: Array
    n: Array
    dealt: Array
    is_vector: Mask  # a matrix-vector product
    is_packed: Mask  # weights are packed before they are used


@dataclass(frozen=True)
class Prepared:
    """What of a batch of work does not depend on constants. Experts of one grouped GEMM that have equally many rows
    are one call here: `owner` is its place in the batch, `many` how many experts it stands for."""

    work: Work
    calls: _Calls
    owner: Index
    many: Array
    gemm_pages: Array  # freshly mapped pages that the outputs of grouped GEMMs fill, [batch]
    layer_pages: Array  # the same of what else a layer makes of rows, [batch]


def dealt_cols(rows: Array, n: Array, n_threads: int) -> Array:
    """Columns that a call costs when its blocks are dealt to threads: as many as if every thread took as long as the
    busiest. Blocks are 64 rows x 64 columns, 16 columns where there would be fewer than threads; shape as rows and n.
    """
    row_blocks = np.maximum(np.ceil(rows / BLOCK_ROWS), 1.0)
    width = np.where(row_blocks * np.ceil(n / BLOCK_COLS) >= n_threads, BLOCK_COLS, LEAST_BLOCK_COLS)
    rounds = np.ceil(row_blocks * np.ceil(n / width) / n_threads)
    return np.asarray(rounds * n_threads * width / row_blocks)


def _calls(work: Work, rows: Array, k: Array, n: Array, n_threads: int) -> _Calls:
    sgemm = is_sgemm(work)
    dealt = n if sgemm else dealt_cols(rows, n, n_threads)
    return _Calls(rows, k, n, dealt, (rows == 1) & sgemm, (rows > 1) & sgemm)


def prepare(work: Work, n_threads: int = 1) -> Prepared:
    """The BLAS calls of each workload; `n_threads` is how many threads share one call."""
    batch, rows, many = _distinct(work)
    is_gemm = work.k[batch] > 0  # [call, gemm]
    call, g = np.nonzero(is_gemm)
    owner = batch[call]
    on_gemms, on_layer = _fresh_pages(work)
    calls = _calls(work, rows[call], work.k[owner, g], work.n[owner, g], n_threads)
    return Prepared(work, calls, owner, many[call], on_gemms, on_layer)


def _distinct(work: Work) -> tuple[Index, Array, Array]:
    """The distinct numbers of rows that experts of each workload have: its place in the batch, rows, how many experts.
    They are found once for each routing, however many workloads share it."""
    found = [np.unique(one[one > 0], return_counts=True) for one in work.counts.rows]
    length = np.array([len(rows) for rows, _ in found])
    first = np.cumsum(length) - length
    own = length[work.routing_of]
    batch = np.repeat(np.arange(len(own)), own)
    place = np.arange(len(batch)) - np.repeat(np.cumsum(own) - own, own)
    entry = first[work.routing_of][batch] + place
    rows, many = (np.concatenate([one[i] for one in found]).astype(np.float64)[entry] for i in range(2))
    return batch, rows, many


def _fresh_pages(work: Work) -> tuple[Array, Array]:
    """Pages of tensors too large for the heap, `[batch]`: outputs of grouped GEMMs; gathered rows, activations and the
    sum over experts of a layer."""

    def pages(elements: Array) -> Array:
        n_bytes = elements * work.activation_bytes
        return np.where(n_bytes >= FRESH_BYTES, n_bytes / PAGE_BYTES, 0.0)

    n_rows = work.n_rows
    gemms = pages(n_rows[:, None] * work.n).sum(axis=1)
    layer = pages(n_rows * work.hidden) + pages(n_rows * work.inter) + pages(work.n_tokens * work.hidden)
    return np.asarray(gemms), np.asarray(work.layer * layer)


def _roofs(calls: _Calls, work: Work, roof: Ceilings, c: BlasConstants) -> ExpertRoofs:
    """The roofs of BLAS calls, ns, of the shape of `calls.rows` (models 2.6 and 3.1)."""
    active = calls.rows > 0
    is_call = active & (calls.k > 0)
    rows = np.where(is_call, calls.rows + np.where(calls.is_vector, 0.0, c.call_rows), 0.0)
    flops = 2 * rows * (calls.k + c.column_terms) * calls.dealt
    terms = calls.k + np.where(calls.is_vector, c.vector_column_terms, c.column_terms)
    passes = 1 + np.where(calls.is_packed, c.pack_passes, 0.0)
    weights = np.where(is_call, terms * calls.n * passes * work.weight_bytes, 0.0)
    activations = work.activation_bytes * calls.rows * (calls.k + calls.n)
    ns_per_byte = NS_PER_S / roof.bytes_per_s
    return ExpertRoofs(
        compute=flops / (roof.flops_per_s * c.eff_compute) * NS_PER_S,
        weights=weights * ns_per_byte / c.eff_memory,
        activations=activations * ns_per_byte,
    )


def expert_roofs(work: Work, roof: Ceilings, c: BlasConstants, n_threads: int = 1) -> list[ExpertRoofs]:
    """The roofs of each grouped GEMM by expert, ns `[batch, expert]`: what its BLAS call is bounded by."""
    rows = work.rows
    found = []
    for g in range(work.k.shape[1]):
        k, n = work.k[:, g, None], work.n[:, g, None]
        found.append(_roofs(_calls(work, rows, k, n, n_threads), work, roof, c))
    return found


def gemm_parts(prepared: Prepared, roof: Ceilings, c: BlasConstants) -> Parts:
    """The grouped GEMMs alone, by part, ns `[batch]`, without what calls and experts cost however small: each call
    under its own maximum (model 4), plus fresh pages (3.2)."""
    roofs = _roofs(prepared.calls, prepared.work, roof, c)
    _, shares = smooth_max([roofs.compute, roofs.weights + roofs.activations], SMOOTH_P)
    n_batch = len(prepared.work.n_tokens)
    compute, memory = (
        np.bincount(prepared.owner, share * prepared.many, n_batch).astype(np.float64) for share in shares
    )
    return {"compute": compute, "memory": memory + prepared.gemm_pages * c.page_ns}


def other_parts(prepared: Prepared, roof: Ceilings, c: BlasConstants) -> Parts:
    """What is not GEMM: calls and experts; for whole layers also a fixed part, moving rows and tokens, and the router
    (models 5.1 and 6.1)."""
    work = prepared.work
    ns_per_byte = NS_PER_S / roof.bytes_per_s
    n_calls = (work.k > 0).sum(axis=1).astype(np.float64)
    experts = c.expert_ns * work.n_experts + c.active_ns * work.n_active
    row_bytes = c.row_passes * work.activation_bytes * work.n_rows * (work.hidden + work.inter)
    token_bytes = TOKEN_PASSES * work.activation_bytes * work.n_tokens * work.hidden
    gate = 2.0 * work.n_tokens * work.hidden * work.n_experts / (roof.flops_per_s * c.eff_compute) * NS_PER_S
    return {
        "overhead": n_calls * (c.call_ns + experts) + work.layer * c.layer_ns,
        "permute": work.layer * row_bytes * ns_per_byte + prepared.layer_pages * c.page_ns,
        "combine": work.layer * token_bytes * ns_per_byte,
        "router": work.router * (gate + c.score_ns * work.n_tokens * work.n_experts),
    }


def resident_parts(prepared: Prepared, roof: Ceilings, c: BlasConstants) -> Parts:
    """Latency by part, ns `[batch]`, with every expert in the CPU's memory; the parts sum to the latency (model 1)."""
    return sum_parts(gemm_parts(prepared, roof, c), other_parts(prepared, roof, c))

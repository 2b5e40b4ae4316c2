"""Figures as the FlashMoE paper defines them: overlap efficiency, throughput, buffer, payload."""

from collections.abc import Sequence

import numpy as np

from perfmodel.errors import InputError
from perfmodel.physics import Array
from perfmodel.text import NS_PER_S

TILE_ROWS = 128  # bM of the fused kernel (arXiv 2506.04667 section 3)


def overlap_efficiency(latency_two_ns: float, latency_n_ns: float) -> float:
    """Weak-scaling efficiency O_e = T(2) / T(N) (arXiv 2506.04667 Fig 11)."""
    return latency_two_ns / latency_n_ns


def throughput_tokens_per_s(tokens_per_gpu: int, n_gpus: int, latency_ns: float) -> float:
    """Tokens of all GPUs per second (arXiv 2506.04667 Fig 10)."""
    return tokens_per_gpu * n_gpus / latency_ns * NS_PER_S


def symmetric_buffer_bytes(token_buffer_bytes: float, n_tokens: int, n_experts: int) -> float:
    """Size(L) of the fused kernel's symmetric layout: 4 copies of the token buffer, more when an expert's share of the
    tokens is below a tile of 128 rows (arXiv 2506.04667 section 3)."""
    share = n_tokens / n_experts
    return 4 * token_buffer_bytes * max(1.0, TILE_ROWS / share)


def padding_saved_frac(tokens_per_expert: Sequence[int], capacity: int) -> float:
    """Share of a capacity-padded collective's payload that a payload-only transfer does not send."""
    if max(tokens_per_expert) > capacity:
        raise InputError(f"an expert has {max(tokens_per_expert)} tokens, more than the capacity {capacity}")
    return 1 - sum(tokens_per_expert) / (len(tokens_per_expert) * capacity)


def block_fill_frac(rows: Array) -> float:
    """How full the row blocks of the fused kernel are: rows `[source GPU, slot]` over what their blocks of TILE_ROWS
    have room for, which is computed whether it is there or not."""
    return float(rows.sum() / (np.ceil(rows / TILE_ROWS).sum() * TILE_ROWS))

"""Staircases and loads for tests of experts over several GPUs."""

import numpy as np

from perfmodel.physics import Array
from perfmodel.placement.staircase import Staircase
from perfmodel.routing import synthetic_counts, synthetic_steps


def straight(n_most: int, speeds: Array, tile_rows: int = 1) -> Staircase:
    """Time that grows evenly, 1 ns an assignment, in steps of a tile."""
    counts = np.arange(tile_rows, n_most + tile_rows, tile_rows)
    return Staircase(counts, counts[None].astype(np.float64)).at_speeds(speeds)


def bursty(n_experts: int, n_steps: int, n_layers: int, n_tokens: int, top_k: int) -> Array:
    """Counts `[step, layer, expert]` of consistent and temporal experts, drawn."""
    shares = synthetic_steps("temporal:4", n_steps, n_layers, n_experts, seed=3)
    return synthetic_counts(shares, n_tokens, top_k, seed=4).astype(np.float64)

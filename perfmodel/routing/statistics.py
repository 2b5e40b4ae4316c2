"""How skewed routing is: coverage curves and the busiest expert against the mean, of counts `[layer, expert]`."""

import numpy as np

from .files import Counts
from .patterns import Shares


def coverage_curve(counts: Counts) -> tuple[Shares, Shares]:
    """How concentrated routing is: fraction of experts (hottest first) and cumulative fraction of assignments.

    Both run from 0 to 1 with n_experts + 1 points; layers are ranked separately, then averaged.
    """
    ranked = -np.sort(-counts.astype(np.float64), axis=1)
    shares = np.cumsum(ranked / ranked.sum(axis=1, keepdims=True), axis=1).mean(axis=0)
    return np.linspace(0, 1, counts.shape[1] + 1), np.concatenate([[0.0], shares])


def experts_for_coverage(counts: Counts, token_frac: float) -> float:
    """The smallest fraction of experts (hottest first) that serves `token_frac` of assignments, mean over layers."""
    ranked = -np.sort(-counts.astype(np.float64), axis=1)
    cumulative = np.cumsum(ranked, axis=1) / ranked.sum(axis=1, keepdims=True)
    needed = (cumulative < token_frac - 1e-12).sum(axis=1) + 1
    return float(np.mean(needed) / counts.shape[1])


def max_over_mean(counts: Counts) -> float:
    """How much busier the busiest expert is than the average one, mean over layers."""
    return float(np.mean(counts.max(axis=1) / counts.mean(axis=1)))

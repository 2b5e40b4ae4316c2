"""Token counts as a public collection of MoE measurements spread them, rebuilt from its definitions. numpy only.

The collectors of ai-dynamo/aiconfigurator name how they spread tokens, but keep no counts. `balanced` has no chance in
it and comes out as it was. `power_law_EXPONENT` was drawn without a seed, so only its distribution can be rebuilt:
average what you compute over draws. docs/routing.md has the definitions.
"""

import math

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .files import Counts

BALANCED, POWER_LAW = "balanced", "power_law_"
PUBLISHED = (BALANCED, f"{POWER_LAW}EXPONENT")
LARGEST_EXPONENT = 10.0  # as of the patterns; the measurements have 1.01 and 1.2
TOKENS_FRAC = 0.8  # weights reach from 1 to this part of the tokens ...
FEW_WEIGHTS = (0.01, 2.0)  # ... or over this range, where a batch has no more assignments than the layer has experts


def is_published(distribution: str) -> bool:
    """Whether `published_counts` can rebuild a distribution of that name."""
    return distribution == BALANCED or _exponent(distribution) is not None


def published_counts(
    distribution: str, n_experts: int, top_k: int, n_tokens: int, n_draws: int = 8, seed: int = 0
) -> Counts:
    """Tokens of each expert `[draw, expert]` under a distribution of the published measurements, on one GPU.

    Rows sum to n_tokens x top_k, with at most n_tokens an expert. `balanced` has one draw; of others, fewer draws are
    the first of more. The same arguments always give the same counts. Raises InputError for an unknown distribution,
    and for top-k, tokens or draws that cannot be.
    """
    if not 1 <= top_k <= n_experts:
        raise InputError(f"top-k {top_k} is outside 1 to the number of experts, {n_experts}")
    if n_tokens < 1 or n_draws < 1:
        raise InputError(f"found {n_tokens} tokens and {n_draws} draws, expected at least 1 of each")
    if distribution == BALANCED:
        return _balanced(n_experts, top_k, n_tokens)
    exponent = _exponent(distribution)
    if exponent is None:
        raise InputError(
            f"unknown published distribution {distribution!r}; known: {', '.join(PUBLISHED)}, "
            f"with an exponent from 0 to {LARGEST_EXPONENT:g}"
        )
    bits = int(np.float64(exponent).view(np.uint64))  # 1.2 and 1.20 are one distribution
    rng = np.random.default_rng([seed, bits, n_experts, top_k, n_tokens])
    bounds = (1.0, TOKENS_FRAC * n_tokens) if n_tokens * top_k > n_experts else FEW_WEIGHTS
    weights = power_law_weights(rng.random((n_draws, n_experts)), exponent, *bounds)
    return repaired_counts(weights, top_k, n_tokens)


def _exponent(distribution: str) -> float | None:
    """The exponent after `power_law_`, or None for another name or no number in range."""
    try:
        exponent = float(distribution.removeprefix(POWER_LAW)) if distribution.startswith(POWER_LAW) else math.nan
    except ValueError:
        return None
    return abs(exponent) if 0 <= exponent <= LARGEST_EXPONENT else None  # abs: -0.0 is 0.0


def power_law_weights(
    quantiles: NDArray[np.float64], exponent: float, least: float, most: float
) -> NDArray[np.float64]:
    """The values at those quantiles (0 to 1) of a density proportional to x^-exponent from least to most."""
    power = 1.0 - exponent
    if abs(power) < 1e-9:  # the limit: logarithms are spread evenly
        return np.asarray(least * (most / least) ** quantiles)
    low, high = least**power, most**power
    return np.asarray((low + quantiles * (high - low)) ** (1.0 / power))


def _balanced(n_experts: int, top_k: int, n_tokens: int) -> Counts:
    """Token t selects (t + j s) mod E for j below k, with stride s = ceil(E / k); fewer than s tokens spread over s.

    Where k strides reach round to the first expert again, a token would select it twice. It then takes the lowest
    offset that is free; the collectors leave that to how their top-k breaks ties.
    """
    stride = -(-n_experts // top_k)
    tokens = np.arange(n_tokens)
    first = tokens % n_experts if n_tokens >= stride else tokens * stride // n_tokens
    base = np.bincount(first, minlength=n_experts)
    offsets = dict.fromkeys(j * stride % n_experts for j in range(top_k))
    free = (offset for offset in range(n_experts) if offset not in offsets)
    chosen = [*offsets, *(next(free) for _ in range(top_k - len(offsets)))]
    counts: Counts = sum((np.roll(base, offset) for offset in chosen), np.zeros(n_experts, dtype=np.int64))
    return counts[None, :]


def repaired_counts(weights: NDArray[np.float64], top_k: int, n_tokens: int) -> Counts:
    """Whole counts `[draw, expert]` in proportion to weights, each row summing to n_tokens x top_k.

    As the collectors do it: round (halves to even), cap at n_tokens, give the overflow to the smallest expert one token
    at a time, then give what is missing in the same way, or take what is too much from the largest.
    """
    total = n_tokens * top_k
    rounded = np.rint(weights / weights.sum(axis=1, keepdims=True) * total).astype(np.int64)
    capped = np.minimum(rounded, n_tokens)
    room = n_tokens * weights.shape[1] - capped.sum(axis=1)
    counts = fill_lowest(capped, np.minimum((rounded - capped).sum(axis=1), room))
    missing = total - counts.sum(axis=1)
    counts = fill_lowest(counts, np.maximum(missing, 0))
    return -fill_lowest(-counts, np.maximum(-missing, 0))  # the largest is the lowest of the negatives


def fill_lowest(levels: Counts, n_units: Counts) -> Counts:
    """Levels `[draw, expert]` after n_units `[draw]` were added one by one, each to the lowest, the first among equals.

    Water filling: the lowest rise together to one level, and what is left goes to the first of them. No level passes a
    cap that all of them respect, as long as the units fit under it.
    """
    ascending = np.sort(levels, axis=1)
    below = np.cumsum(ascending, axis=1)
    ranks = np.arange(1, levels.shape[1] + 1)
    n_rising = (ascending * ranks - below <= n_units[:, None]).sum(axis=1)  # those that the units lift to one level
    held = np.take_along_axis(below, n_rising[:, None] - 1, axis=1)[:, 0]
    surface, left = np.divmod(held + n_units, n_rising)
    rising = levels <= surface[:, None]
    is_first = rising & (np.cumsum(rising, axis=1) <= left[:, None])
    filled: Counts = np.maximum(levels, surface[:, None]) + is_first
    return filled

"""What a sample of few tokens can say of routing: whether skew is more than chance, and what holds on unseen tokens."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .batches import MAX_DRAWN
from .patterns import Shares
from .recording import MAX_LOAD, Loads

N_DRAWN = 64  # random uniform routings, of which the mean and the 95th percentile are told
N_SPLITS = 8  # random halvings of a sample
MIN_STEPS = 8  # from which on whole steps are halved, and not their assignments
SEED = 0


@dataclass(frozen=True, eq=False)
class SamplingError:
    """What chance alone does to samples as large as each layer's: columns with an entry for each layer.

    `uniform_*` is what uniform routing of as many tokens would show, on average and in one sample of twenty
    (`*_high`). `p_value` is how likely it would be at least as uneven as what was recorded. `unseen_frac` is how much
    of further assignments is expected to go to experts never used so far, `n_unseen` how many of those are expected to
    be in use at least, and `n_unused_by_chance` how many uniform routing would leave unused.
    """

    uniform_max_over_mean: Shares
    uniform_max_over_mean_high: Shares
    uniform_gini: Shares
    uniform_gini_high: Shares
    p_value: Shares
    unseen_frac: Shares
    n_unseen: Shares
    n_unused_by_chance: Shares


def is_counted(loads: Loads) -> bool:
    """Whether loads are whole numbers, as counts of assignments are; of weights no sampling error is known."""
    return bool((loads == np.floor(loads)).all())


def sampling_error(counts: Loads, top_k: int | None) -> SamplingError:
    """What chance does to counts `[layer, expert]` of independent tokens; top_k null takes assignments for tokens.

    Tokens of one text are alike, so that real samples say less than as many independent tokens. Uniform counts are
    drawn, from T x E = 2^18 on as normal numbers of their mean and covariance. The test is chi-square with E - 1
    degrees of freedom, whose statistic is (E - 1) / (E - k) times the usual one, as no token selects an expert twice.
    Unseen: Good and Turing's n1 / N (Good 1953) and Chao's n1 (n1 - 1) / 2 (n2 + 1) (bias-corrected, 1984).
    """
    from scipy.stats import chi2

    n_experts, k = counts.shape[1], top_k or 1
    totals = counts.sum(axis=1)
    expected = totals[:, None] / n_experts
    squares = ((counts - expected) ** 2 / expected).sum(axis=1)
    p_value = chi2.sf(squares * (n_experts - 1) / (n_experts - k), n_experts - 1) if k < n_experts else 1.0
    n_unused, once, twice = ((counts == n).sum(axis=1) for n in (0, 1, 2))
    sizes, place = np.unique(np.maximum(np.rint(totals / k), 1), return_inverse=True)
    rng = np.random.default_rng(SEED)
    busiest, gini = [], []
    for n_tokens in sizes:
        drawn = np.sort(uniform_counts(int(n_tokens), n_experts, k, N_DRAWN, rng), axis=1)
        weights = (2 * np.arange(1, n_experts + 1) - n_experts - 1) / (n_tokens * k * n_experts)
        busiest.append(_mean_and_high(drawn[:, -1] * n_experts / (n_tokens * k)))
        gini.append(_mean_and_high((drawn * weights).sum(axis=1)))
    return SamplingError(
        uniform_max_over_mean=np.array(busiest)[place, 0],
        uniform_max_over_mean_high=np.array(busiest)[place, 1],
        uniform_gini=np.array(gini)[place, 0],
        uniform_gini_high=np.array(gini)[place, 1],
        p_value=np.broadcast_to(p_value, totals.shape),
        unseen_frac=np.where(n_unused > 0, once / totals, 0.0),
        n_unseen=np.minimum(once * (once - 1) / (2.0 * (twice + 1)), n_unused),
        n_unused_by_chance=n_experts * (1.0 - k / n_experts) ** (totals / k),
    )


def _mean_and_high(values: Shares) -> tuple[float, float]:
    return float(values.mean()), float(np.quantile(values, 0.95))


def uniform_counts(n_tokens: int, n_experts: int, top_k: int, n_draws: int, rng: np.random.Generator) -> Loads:
    """Random assignments `[draw, expert]` of n_tokens that select any top-k experts alike; normal ones for many."""
    part = top_k / n_experts
    if n_tokens * n_experts > MAX_DRAWN:
        normal = rng.standard_normal((n_draws, n_experts))
        centred = normal - normal.mean(axis=1, keepdims=True)  # rows sum to 0: what one has more, others have less
        spread = np.sqrt(n_tokens * part * (1.0 - part) * n_experts / max(n_experts - 1, 1))
        return np.asarray(n_tokens * part + spread * centred)
    if top_k == 1:
        return rng.multinomial(n_tokens, np.full(n_experts, 1.0 / n_experts), size=n_draws).astype(np.float64)
    drawn = np.empty((n_draws, n_experts))
    for draw in range(n_draws):
        chosen = np.argpartition(rng.random((n_tokens, n_experts)), top_k - 1, axis=1)[:, :top_k]
        drawn[draw] = np.bincount(chosen.ravel(), minlength=n_experts)
    return drawn


def held_out_curves(loads: Loads) -> Shares | None:
    """The part of unseen assignments that the experts hottest in as many others serve, `[layer, n_experts + 1]`.

    Of loads `[step, layer, expert]`, steps are divided into two halves at random, because tokens of one step are alike;
    under MIN_STEPS steps each assignment falls into one of two halves. Hot experts are chosen in one half and judged
    by the other, as mean over halvings and both directions. Half a sample chooses worse than the whole, so this is the
    cautious side of what the recorded hot set does on new tokens. Null for weights of few steps, which have no halves.
    """
    rng = np.random.default_rng(SEED)
    n_steps, whole = len(loads), loads.sum(axis=0)
    if n_steps >= MIN_STEPS:
        is_first = rng.permuted(np.tile(np.arange(n_steps) < n_steps // 2, (N_SPLITS, 1)), axis=1)
        half = np.tensordot(is_first.astype(np.float64), loads, axes=1)
    elif is_counted(loads):
        n_whole = np.minimum(whole, MAX_LOAD).astype(np.int64)
        half = rng.binomial(n_whole, 0.5, size=(N_SPLITS, *n_whole.shape)).astype(np.float64)
    else:
        return None
    chosen_in = np.concatenate([half, np.maximum(whole - half, 0.0)])
    judged_by = np.roll(chosen_in, N_SPLITS, axis=0)  # by the other half
    ranked = np.take_along_axis(judged_by, hottest_first(chosen_in, rng), axis=-1)
    n_judged = ranked.sum(axis=(0, 2))[:, None]  # over all halvings, as a layer may be idle in one
    served = np.cumsum(ranked.sum(axis=0), axis=1) / n_judged
    return np.concatenate([np.zeros((len(served), 1)), served], axis=1)


def hottest_first(loads: Loads, rng: np.random.Generator) -> NDArray[np.int64]:
    """Experts (the last axis) by falling load; ties in random order, so that the numbering of experts says nothing."""
    order: NDArray[np.int64] = np.lexsort((rng.random(loads.shape), -loads), axis=-1)
    return order

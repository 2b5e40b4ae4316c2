"""The routing of a batch: how many tokens each expert receives, as expected or drawn at random. numpy only.

Counts are token-expert assignments; a token that selects top-k experts makes k of them, all different.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .files import Counts, read_shares
from .patterns import Shares, is_pattern, pattern_shares

N_DRAWS = 16  # random batches that stand for one small batch; results are means over them
MAX_DRAWN = 2**18  # tokens x experts above which a batch is so large that its expected counts stand for it
NEVER = -1e6  # logarithm of a share of zero: below every other, so that such experts come last and in random order


@dataclass(frozen=True)
class Routing:
    """Token-expert assignments: `counts[draw, expert]`, each row summing to n_tokens x top_k.

    A row is one layer, or one random batch of one layer: a prediction is the mean over rows. `shares[draw, expert]` is
    how popular each expert is in the long run, which is what a placement may know; null means the counts say it.
    """

    name: str
    counts: Counts
    n_tokens: int
    top_k: int
    shares: Shares | None = None

    def __post_init__(self) -> None:
        if self.counts.ndim != 2:
            raise InputError(
                f"routing {self.name!r}: counts have {self.counts.ndim} dimensions, expected [layer, expert]"
            )
        if (self.counts < 0).any() or (self.counts > self.n_tokens).any():
            raise InputError(f"routing {self.name!r}: an expert has fewer than 0 or more than {self.n_tokens} tokens")
        sums = self.counts.sum(axis=1)
        if (sums != self.n_tokens * self.top_k).any():
            raise InputError(
                f"routing {self.name!r}: a layer sums to {sums[sums != self.n_tokens * self.top_k][0]} assignments, "
                f"expected tokens x top-k = {self.n_tokens * self.top_k}"
            )

    @property
    def popularity(self) -> Shares:
        """The long-run share of each expert, `[draw, expert]`, each row summing to 1."""
        if self.shares is not None:
            return self.shares
        by_count: Shares = self.counts / (self.n_tokens * self.top_k)
        return by_count


def expected_counts(shares: Shares, n_tokens: int, top_k: int) -> Counts:
    """Whole-numbered assignments `[layer, expert]` nearest to the shares, at most n_tokens per expert.

    Each layer sums to n_tokens x top_k exactly. A share that would give an expert more tokens than there are is capped
    and the excess spread over the others in proportion; fractions go to the largest remainders, lower index first.
    """
    n_layers, n_experts = shares.shape
    if not 1 <= top_k <= n_experts:
        raise InputError(f"top-k {top_k} is outside 1 to the number of experts, {n_experts}")
    if n_tokens < 1:
        raise InputError(f"number of tokens is {n_tokens}, expected at least 1")
    counts = np.empty((n_layers, n_experts), dtype=np.int64)
    for layer in range(n_layers):
        ideal = capped(shares[layer], float(n_tokens), float(n_tokens * top_k))
        whole = np.floor(ideal + 1e-9).astype(np.int64)
        remainder = np.where(whole < n_tokens, ideal - whole, -1.0)
        order = np.argsort(-remainder, kind="stable")
        whole[order[: n_tokens * top_k - int(whole.sum())]] += 1
        counts[layer] = whole
    return counts


def capped(shares: Shares, cap: float, total: float) -> NDArray[np.float64]:
    """Water filling: shares x total with no entry above cap; shares of zero join only when the others are full."""
    ideal = np.zeros_like(shares)
    free = np.ones(len(shares), dtype=bool)
    while True:
        left = total - cap * (~free).sum()
        weights = np.where(free, shares, 0.0)
        if weights.sum() <= 0:
            weights = free.astype(np.float64)
        ideal = np.where(free, weights / max(weights.sum(), 1e-300) * left, cap)
        over = free & (ideal > cap)
        if not over.any():
            return ideal
        free &= ~over


def sample_choices(shares: Shares, n_tokens: int, top_k: int, seed: int) -> NDArray[np.int64]:
    """Experts each token selects, `[token, top_k]`, drawn without replacement in proportion to shares of layer 0.

    Experts without a share are drawn only where the others are fewer than top-k. Gumbel top-k sampling (Kool et al.
    2019, arXiv 1903.06059, section 2.3); reproducible by seed.
    """
    rng = np.random.default_rng(seed)
    with np.errstate(divide="ignore"):
        log_shares = np.maximum(np.log(shares[0]), NEVER)
    keys = log_shares[None, :] + rng.gumbel(size=(n_tokens, shares.shape[1]))
    return np.argpartition(-keys, top_k - 1, axis=1)[:, :top_k].astype(np.int64)


def routing(source: str, n_experts: int, top_k: int, n_tokens: int) -> Routing:
    """The routing of a batch under a named pattern or a routing file (see `pattern_shares`, `read_shares`).

    Small batches are drawn at random (seeded, at least N_DRAWS rows over the layers), because it matters which experts
    a few tokens wake; large ones are their expected counts. `uniform` stays balanced to within one token per expert.
    """
    shares = pattern_shares(source, n_experts) if is_pattern(source) else read_shares(source, n_experts)
    if shares.shape[1] != n_experts:
        raise InputError(f"routing {source!r} is for {shares.shape[1]} experts, the model shape has {n_experts}")
    return batch_of(source, shares, n_tokens, top_k)


def batch_of(name: str, shares: Shares, n_tokens: int, top_k: int) -> Routing:
    """The routing of a batch by shares `[layer, expert]` of any origin, drawn or expected as `routing` says."""
    counts = expected_counts(shares, n_tokens, top_k)
    if n_tokens * shares.shape[1] <= MAX_DRAWN:
        shares = np.repeat(shares, -(-N_DRAWS // len(shares)), axis=0)
        if name == "uniform":
            counts = np.random.default_rng(0).permuted(np.repeat(counts, len(shares), axis=0), axis=1)
        else:
            counts = np.stack([drawn_counts(row, n_tokens, top_k, seed) for seed, row in enumerate(shares)])
    return Routing(name, counts, n_tokens, top_k, shares)


def drawn_counts(shares: Shares, n_tokens: int, top_k: int, seed: int) -> Counts:
    """Assignments `[expert]` of one random batch of tokens (see `sample_choices`)."""
    choices = sample_choices(shares[None, :], n_tokens, top_k, seed)
    return np.bincount(choices.ravel(), minlength=len(shares)).astype(np.int64)


def drawn_choices(shares: Shares, n_tokens: int, top_k: int, seed: int) -> Counts:
    """Experts that each token selects, `[token, top_k]`, drawn so that each has its share of the rows in the mean, of
    layer 0 of shares; reproducible by seed.

    Drawing one expert after another in proportion (`sample_choices`) would take rows from popular experts: under
    power-law:0.5 and top-8 of 64 a sixth of the most popular one's. Systematic sampling keeps them: parts of top-k lie
    end to end in an order of each token's own, and those that contain u, u + 1, ... are taken (Madow 1949).
    """
    rng = np.random.default_rng(seed)
    parts = capped(shares[0], 1.0, float(top_k))
    order = np.argsort(rng.random((n_tokens, len(parts)), dtype=np.float32), axis=1)
    taken = np.diff(np.floor(np.cumsum(parts[order], axis=1) + rng.random((n_tokens, 1))), axis=1, prepend=0)
    return np.take_along_axis(order, np.argpartition(-taken, top_k - 1, axis=1)[:, :top_k], axis=1)


def drawn_rows(shares: Shares, n_tokens: int, top_k: int, seed: int) -> Counts:
    """Rows of each expert, `[expert]`, in one random batch: binomial, and together n_tokens x top_k."""
    parts = np.minimum(capped(shares[0], 1.0, float(top_k)), 1.0)
    found = np.random.default_rng(seed).binomial(n_tokens, parts)
    return np.asarray(expected_counts(found[None] / found.sum(), n_tokens, top_k)[0])

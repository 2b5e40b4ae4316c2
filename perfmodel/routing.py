"""How tokens spread over experts: routing patterns with stated definitions, routing files, statistics of skew.

Counts are token-expert assignments; a token that selects top-k experts makes k of them, all different. numpy only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

Counts = NDArray[np.int64]
Shares = NDArray[np.float64]

MMLU_TOKEN_FRAC, MMLU_EXPERT_FRAC = 0.90, 0.65  # "about 90 % of tokens go to 65 % of experts" (ISC 2026 poster)
DEFAULT_EXPONENT = 1.0


MAX_COUNT = 1e18
N_DRAWS = 16  # random batches that stand for one small batch; results are means over them
MAX_DRAWN = 2**18  # tokens x experts above which a batch is so large that its expected counts stand for it


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
        by_count: Shares = self.counts / (self.n_tokens * self.top_k)
        return by_count if self.shares is None else self.shares


def uniform_shares(n_experts: int, _exponent: float = 0.0) -> Shares:
    """Every expert receives the same share of assignments."""
    return np.full((1, n_experts), 1.0 / n_experts)


def power_law_shares(n_experts: int, exponent: float = DEFAULT_EXPONENT) -> Shares:
    """The expert of popularity rank r receives a share proportional to r^-exponent."""
    weights = np.arange(1, n_experts + 1, dtype=np.float64) ** -exponent
    shares: Shares = weights / weights.sum()
    return shares[None, :]


def mmlu_like_shares(n_experts: int, _exponent: float = 0.0) -> Shares:
    """90 % of assignments go evenly to the hottest 65 % of experts, 10 % evenly to the rest (ISC 2026 poster).

    The boundary falls inside an expert when 0.65 x n_experts is no integer: that expert takes a proportional mixture.
    """
    hot, cold = MMLU_TOKEN_FRAC / MMLU_EXPERT_FRAC, (1 - MMLU_TOKEN_FRAC) / (1 - MMLU_EXPERT_FRAC)
    hot_part = np.clip(MMLU_EXPERT_FRAC * n_experts - np.arange(n_experts), 0.0, 1.0)
    shares: Shares = (hot * hot_part + cold * (1.0 - hot_part)) / n_experts
    return shares[None, :]


PATTERNS: dict[str, Callable[[int, float], Shares]] = {
    "uniform": uniform_shares,
    "power-law": power_law_shares,
    "mmlu-like": mmlu_like_shares,
}


def pattern_shares(name: str, n_experts: int) -> Shares:
    """Shares `[1, expert]`, hottest first, of a pattern: `uniform`, `mmlu-like`, `power-law` or `power-law:1.2`."""
    pattern, _, argument = name.partition(":")
    if pattern not in PATTERNS or (argument and pattern != "power-law"):
        raise InputError(f"unknown routing {name!r}; known: {', '.join(PATTERNS)} (power-law:EXPONENT), or a file")
    try:
        exponent = float(argument) if argument else DEFAULT_EXPONENT
    except ValueError:
        raise InputError(f"routing {name!r}: {argument!r} is no exponent; write for example power-law:1.2") from None
    if not 0 <= exponent <= 10:
        raise InputError(f"routing {name!r}: exponent {exponent:g} is outside 0 to 10")
    return PATTERNS[pattern](n_experts, exponent)


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
        ideal = _capped(shares[layer], float(n_tokens), float(n_tokens * top_k))
        whole = np.floor(ideal + 1e-9).astype(np.int64)
        remainder = np.where(whole < n_tokens, ideal - whole, -1.0)
        order = np.argsort(-remainder, kind="stable")
        whole[order[: n_tokens * top_k - int(whole.sum())]] += 1
        counts[layer] = whole
    return counts


def _capped(shares: Shares, cap: float, total: float) -> NDArray[np.float64]:
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

    Gumbel top-k sampling (Kool et al. 2019, arXiv 1903.06059, section 2.3); reproducible by seed.
    """
    rng = np.random.default_rng(seed)
    with np.errstate(divide="ignore"):
        keys = np.log(shares[0])[None, :] + rng.gumbel(size=(n_tokens, shares.shape[1]))
    return np.argpartition(-keys, top_k - 1, axis=1)[:, :top_k].astype(np.int64)


def read_shares(source: str) -> Shares:
    """Shares `[layer, expert]` of a routing file: .npy, .npz or .csv of counts `[layers, experts]` or `[steps, layers,
    experts]` (summed over steps). Of an .npz with several arrays one is chosen as `FILE#KEY`.

    Expert ids keep their order. Raises InputError for a missing file, other shapes, negative or all-zero layers.
    """
    file, _, key = source.partition("#")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"no routing file {file!r}, and no pattern of that name; patterns: {', '.join(PATTERNS)}")
    counts = np.asarray(_read_array(path, key))
    if counts.dtype.kind in "iuf":
        counts = counts.astype(np.float64)
    if counts.ndim == 3:
        counts = counts.sum(axis=0)
    if counts.ndim == 1:
        counts = counts[None, :]
    if counts.ndim != 2 or counts.dtype != np.float64 or not counts.size:
        raise InputError(
            f"{path.name}: found {counts.dtype} in {counts.ndim} dimensions, expected counts [layers, experts]"
        )
    if not ((counts >= 0) & (counts <= MAX_COUNT)).all() or not counts.any(axis=1).all():
        raise InputError(f"{path.name}: counts must be 0 to {MAX_COUNT:g}, and not all zero in a layer")
    sums = counts.sum(axis=1)
    shares: Shares = counts / sums[:, None]
    return shares


def _read_array(path: Path, key: str) -> NDArray[np.generic]:
    try:
        if path.suffix == ".csv":
            text = path.read_text(encoding="utf-8")
            return np.loadtxt(text.splitlines(), delimiter=",", ndmin=2) if text.strip() else np.empty((0, 0))
        with path.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            arrays = {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded}
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise InputError(f"{path.name} is not a routing file (.npy, .npz or .csv of counts): {error}") from None
    if not arrays:
        raise InputError(f"{path.name} holds no arrays")
    if "" in arrays and key:
        raise InputError(f"{path.name} holds one array without a name, so leave out #{key}")
    chosen = key or (next(iter(arrays)) if len(arrays) == 1 else None)
    if chosen not in arrays:
        raise InputError(f"{path.name} holds {', '.join(arrays)}; choose one as {path.name}#{next(iter(arrays))}")
    return arrays[chosen]


def routing(source: str, n_experts: int, top_k: int, n_tokens: int) -> Routing:
    """The routing of a batch under a named pattern or a routing file (see `pattern_shares`, `read_shares`).

    Small batches are drawn at random (seeded, at least N_DRAWS rows over the layers), because it matters which experts
    a few tokens wake; large ones are their expected counts. `uniform` stays balanced to within one token per expert.
    """
    is_pattern = source.partition(":")[0] in PATTERNS
    shares = pattern_shares(source, n_experts) if is_pattern else read_shares(source)
    if shares.shape[1] != n_experts:
        raise InputError(f"routing {source!r} is for {shares.shape[1]} experts, the model shape has {n_experts}")
    counts = expected_counts(shares, n_tokens, top_k)
    if n_tokens * n_experts <= MAX_DRAWN:
        shares = np.repeat(shares, -(-N_DRAWS // len(shares)), axis=0)
        if source == "uniform":
            counts = np.random.default_rng(0).permuted(np.repeat(counts, len(shares), axis=0), axis=1)
        else:
            counts = np.stack([drawn_counts(row, n_tokens, top_k, seed) for seed, row in enumerate(shares)])
    return Routing(source, counts, n_tokens, top_k, shares)


def drawn_counts(shares: Shares, n_tokens: int, top_k: int, seed: int) -> Counts:
    """Assignments `[expert]` of one random batch of tokens (see `sample_choices`)."""
    choices = sample_choices(shares[None, :], n_tokens, top_k, seed)
    return np.bincount(choices.ravel(), minlength=len(shares)).astype(np.int64)


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

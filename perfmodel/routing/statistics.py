"""How skewed routing is: coverage, inequality and active experts of each layer, and whether two recordings agree.

Loads are `[layer, expert]`, token-expert assignments or shares of them. docs/routing.md has the definitions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .batches import capped
from .files import Counts
from .patterns import Shares
from .recording import Loads, Recording

COVERED_FRACS = (0.5, 0.8, 0.9, 0.95, 0.99)  # parts of all assignments whose smallest sets of experts are told


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """How each layer spreads its assignments: columns with an entry for each layer, in the recording's order.

    Counts and inequality: experts with any load (`n_active`), the sum of loads, `gini` (0 even, 1 all on one), entropy
    over that of even routing, its perplexity (`n_effective`: as many even experts would be as uncertain), busiest over
    mean, standard deviation over mean (`variation`). `*_frac` of assignments: of the busiest expert, of the hottest
    10 % and 25 % and the coldest half of experts, an expert at the boundary in part. `covering_frac[layer, i]` is the
    smallest fraction of experts that serves COVERED_FRACS[i].
    """

    layers: NDArray[np.int64]
    n_active: NDArray[np.int64]
    n_assignments: Loads
    covering_frac: Shares
    hottest_frac: Shares
    hottest_tenth_frac: Shares
    hottest_quarter_frac: Shares
    coldest_half_frac: Shares
    gini: Shares
    entropy_frac: Shares
    n_effective: Shares
    max_over_mean: Shares
    variation: Shares

    def to_dicts(self) -> list[dict[str, Any]]:
        """A row for each layer, for tables and JSON; `covering_frac` is by the part of assignments, in per cent."""
        columns = {field.name: getattr(self, field.name).tolist() for field in fields(self)}
        columns["covering_frac"] = [
            {f"{part:.0%}": value for part, value in zip(COVERED_FRACS, row, strict=True)}
            for row in columns["covering_frac"]
        ]
        return [
            {"layer" if name == "layers" else name: column[i] for name, column in columns.items()}
            for i in range(len(self.layers))
        ]


def layer_statistics(recording: Recording) -> LayerStatistics:
    """How each layer of a recording spreads its assignments, summed over steps."""
    shares = recording.shares
    n_experts = shares.shape[1]
    curve = served_curves(shares)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    entropy = -(shares * logs).sum(axis=1)
    ranks = np.arange(1, n_experts + 1)
    return LayerStatistics(
        layers=recording.layers,
        n_active=(shares > 0).sum(axis=1),
        n_assignments=recording.loads.sum(axis=(0, 2)),
        covering_frac=np.stack([covering_fracs(shares, part) for part in COVERED_FRACS], axis=1),
        hottest_frac=shares.max(axis=1),
        hottest_tenth_frac=_served_by(curve, 0.1),
        hottest_quarter_frac=_served_by(curve, 0.25),
        coldest_half_frac=1.0 - _served_by(curve, 0.5),
        gini=np.maximum((np.sort(shares, axis=1) * (2 * ranks - n_experts - 1)).sum(axis=1) / n_experts, 0.0),
        entropy_frac=entropy / np.log(n_experts) if n_experts > 1 else np.ones(len(shares)),
        n_effective=np.exp(entropy),
        max_over_mean=shares.max(axis=1) * n_experts,
        variation=shares.std(axis=1) * n_experts,
    )


def served_curves(loads: Loads | Counts) -> Shares:
    """The part of each layer's assignments that its hottest 0, 1, ... n experts serve, `[layer, n_experts + 1]`."""
    ranked = -np.sort(-loads.astype(np.float64), axis=1)
    served = np.cumsum(ranked, axis=1) / ranked.sum(axis=1, keepdims=True)
    return np.concatenate([np.zeros((len(loads), 1)), served], axis=1)


def _served_by(curve: Shares, expert_frac: float) -> Shares:
    """The curve at a fraction of experts, linear between whole ones."""
    at = expert_frac * (curve.shape[1] - 1)
    below = int(at)
    above = min(below + 1, curve.shape[1] - 1)
    served: Shares = curve[:, below] + (at - below) * (curve[:, above] - curve[:, below])
    return served


def covering_fracs(loads: Loads | Counts, token_frac: float) -> Shares:
    """The smallest fraction of each layer's experts (hottest first) that serves `token_frac` of its assignments."""
    n_needed: Shares = (served_curves(loads)[:, 1:] < token_frac - 1e-12).sum(axis=1) + 1.0
    return np.asarray(n_needed / loads.shape[1])


def coverage_curve(counts: Loads | Counts) -> tuple[Shares, Shares]:
    """How concentrated routing is: fraction of experts (hottest first) and cumulative fraction of assignments.

    Both run from 0 to 1 with n_experts + 1 points; layers are ranked separately, then averaged.
    """
    return np.linspace(0, 1, counts.shape[1] + 1), served_curves(counts).mean(axis=0)


def experts_for_coverage(counts: Counts, token_frac: float) -> float:
    """The smallest fraction of experts (hottest first) that serves `token_frac` of assignments, mean over layers."""
    return float(covering_fracs(counts, token_frac).mean())


def max_over_mean(counts: Counts) -> float:
    """How much busier the busiest expert is than the average one, mean over layers."""
    return float(np.mean(counts.max(axis=1) / counts.mean(axis=1)))


def n_resident_of(resident_frac: float, n_experts: int) -> int:
    """How many experts of a layer stay in device memory: what `n_offloaded_of` of the rest leaves there.

    Raises InputError for a fraction outside 0 to 1.
    """
    if not 0 <= resident_frac <= 1:
        raise InputError(f"a fraction of experts is {resident_frac:g}, expected 0 to 1")
    return n_experts - int(np.floor((1.0 - resident_frac) * n_experts + 0.5))


def selection_chances(shares: Shares, top_k: int) -> Shares:
    """How likely a token selects each expert, `[layer, expert]`: top_k x share, at most 1, each row summing to top_k.

    Shares are parts of the selections that were made, so that top_k x share is exactly the part of tokens that selected
    an expert; what would be above 1 goes to the others in proportion. Raises InputError for top-k outside 1 to the
    number of experts.
    """
    if not 1 <= top_k <= shares.shape[1]:
        raise InputError(f"top-k {top_k} is outside 1 to the number of experts, {shares.shape[1]}")
    chances: Shares = np.minimum(np.stack([capped(row, 1.0, float(top_k)) for row in shares]), 1.0)
    return chances


def active_chances(selected: Shares, n_tokens: int) -> Shares:
    """How likely each expert is active in a batch of independent tokens, of `selection_chances`: 1 - (1 - p)^T."""
    with np.errstate(divide="ignore"):
        chances: Shares = -np.expm1(n_tokens * np.log1p(-selected))
    return chances


def expected_active(shares: Shares, top_k: int, n_tokens: Sequence[int]) -> Shares:
    """How many different experts a layer is expected to use in batches of these sizes, `[layer, size]`."""
    selected = selection_chances(shares, top_k)
    return np.stack([active_chances(selected, n).sum(axis=1) for n in n_tokens], axis=1)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Whether two recordings have the same hot experts, layer by layer (those that both have).

    `rank_correlation` is Spearman's between the experts' shares, NaN where one of them is even. Of the other's
    assignments: `served_frac` by the experts hottest here, `own_frac` by as many that are hottest there, and
    `by_size_frac` by as many without regard to routing.
    """

    name: str
    layers: NDArray[np.int64]
    rank_correlation: Shares
    served_frac: Shares
    own_frac: Shares
    by_size_frac: float

    @property
    def kept_frac(self) -> float | None:
        """How much of what its own hot set would gain over placing by size this one gains; null where none would."""
        possible = float(self.own_frac.mean()) - self.by_size_frac
        return None if possible < 1e-9 else (float(self.served_frac.mean()) - self.by_size_frac) / possible


def compare(recording: Recording, other: Recording, resident_frac: float) -> Comparison:
    """Whether the hot experts of a recording, as many as `resident_frac` says, are those of another as well.

    Raises InputError where the numbers of experts differ, or no layer is in both.
    """
    from scipy.stats import rankdata

    if recording.loads.shape[2] != other.loads.shape[2]:
        raise InputError(
            f"{other.name} has {other.loads.shape[2]} experts and {recording.name} {recording.loads.shape[2]}: "
            "expected recordings of one model"
        )
    layers, mine, theirs = np.intersect1d(recording.layers, other.layers, return_indices=True)
    if not len(layers):
        raise InputError(f"{other.name} and {recording.name} have no layer in common")
    shares, others = recording.shares[mine], other.shares[theirs]
    ranks = [rankdata(each, axis=1) for each in (shares, others)]
    a, b = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        correlation = (a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    n_resident = n_resident_of(resident_frac, shares.shape[1])
    hottest = np.argsort(-shares, axis=1, kind="stable")[:, :n_resident]
    return Comparison(
        other.name,
        layers,
        correlation,
        np.take_along_axis(others, hottest, axis=1).sum(axis=1),
        served_curves(others)[:, n_resident],
        n_resident / shares.shape[1],
    )

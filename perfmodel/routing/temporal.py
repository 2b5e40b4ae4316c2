"""Whether hot experts stay hot: hot sets of windows of steps, experts in bursts, and those that come together.

Everything is over `loads[step, layer, expert]` of steps that follow each other in time.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .patterns import Shares
from .recording import Loads
from .sampling import SEED, hottest_first, is_counted
from .steps import CONSISTENT_STEP_FRAC

HOT_FRAC = 0.25  # of experts that are called hot where nothing else is asked for
WINDOWS = (1, 4, 16)  # steps
MIN_WINDOWS = 4  # of fewer, nothing is said
MAX_WINDOWS = 512  # of more, the last ones are looked at
NEW_WEIGHT = 0.3  # of the moving average: 0.3 of the last window and 0.7 of what it was (TriMoE's predictor)
# GEM (arXiv 2605.19945) publishes means and no cut-offs: consistent experts are used in about 85 % of steps, which is
# the least here, and temporal ones in about 17 % with about 3 times the tokens: here in at most twice as many steps,
# with at least half as many times the tokens of a uniform share.
TEMPORAL_MOST_FRAC, TEMPORAL_LEAST_WEIGHT = 0.34, 1.5
USED_SHARE = 0.5  # an expert is used in a step that sends it at least this part of a uniform share
# Steps are joined until a uniform share is this many assignments: it then falls below half by chance in 4 % of steps.
LEAST_SHARE_COUNT = 8
GROUP_CORRELATION = 0.5  # experts of a group are linked by at least this correlation ...
FALSE_LINKS = 0.05  # ... and by more common steps than chance would give any pair of the layer with this probability
N_PAIRS = 5


@dataclass(frozen=True)
class HotSetOverlap:
    """How well hot sets chosen in the past serve later windows of steps, over the second half of a recording.

    `jaccard` is between the hot sets of a window and the one before. `*_frac` is the part of a window's assignments
    served: by the hot set of the window before (`last`), of a moving average (`average`), of the whole first half
    (`static`), by the window's own, which nothing can know before (`oracle`), and by as many experts at random.
    `n_judged` is the sum of the loads of the windows that are served.
    """

    window_steps: int
    n_windows: int
    n_judged: float
    hot_frac: float
    jaccard: float
    last_frac: float
    average_frac: float
    static_frac: float
    oracle_frac: float
    random_frac: float


def hot_set_overlap(loads: Loads, window_steps: int, n_hot: int) -> HotSetOverlap | None:
    """Whether the n_hot hottest experts of each layer stay hot from window to window; null under MIN_WINDOWS windows.

    Steps at the end that fill no window are left out. Windows and layers count by their assignments, empty ones not.
    """
    n_windows = min(len(loads) // window_steps, MAX_WINDOWS)
    if n_windows < MIN_WINDOWS:
        return None
    end = len(loads) // window_steps * window_steps
    shape = (n_windows, window_steps, *loads.shape[1:])
    sums = loads[end - n_windows * window_steps : end].reshape(shape).sum(axis=1)
    half = n_windows // 2
    rng = np.random.default_rng(SEED)
    hot = _hot(sums, n_hot, rng)
    average = np.empty_like(sums)
    average[0] = sums[0]
    for i in range(1, n_windows):
        average[i] = NEW_WEIGHT * sums[i] + (1.0 - NEW_WEIGHT) * average[i - 1]
    judged, own, before = sums[half:], hot[half:], hot[half - 1 : -1]
    own_used, before_used = own & (judged > 0), before & (sums[half - 1 : -1] > 0)  # what merely fills up is not hot
    both, either = (own_used & before_used).sum(axis=-1), (own_used | before_used).sum(axis=-1)
    some = judged.any(axis=-1) & sums[half - 1 : -1].any(axis=-1)
    n_judged = float(judged.sum())
    last, average_frac, static, oracle = (
        float((judged * chosen).sum()) / max(n_judged, 1e-300)
        for chosen in (before, _hot(average[half - 1 : -1], n_hot, rng), _hot(sums[:half].sum(axis=0), n_hot, rng), own)
    )
    return HotSetOverlap(
        window_steps,
        n_windows,
        n_judged,
        hot_frac=n_hot / loads.shape[2],
        jaccard=float((both / np.maximum(either, 1))[some].mean()) if some.any() else 0.0,
        last_frac=last,
        average_frac=average_frac,
        static_frac=static,
        oracle_frac=oracle,
        random_frac=n_hot / loads.shape[2],
    )


def _hot(loads: Loads, n_hot: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which experts are among the n_hot hottest."""
    is_hot = np.zeros(loads.shape, dtype=bool)
    np.put_along_axis(is_hot, hottest_first(loads, rng)[..., :n_hot], True, axis=-1)
    return is_hot


def used_experts(loads: Loads, used_share: float = USED_SHARE) -> NDArray[np.bool_]:
    """Which experts each step uses, `[step, layer, expert]`: those with at least `used_share` of a uniform share of the
    layer's assignments, and some."""
    return np.asarray((loads >= used_share * loads.mean(axis=2, keepdims=True)) & (loads > 0))


@dataclass(frozen=True)
class Cutoffs:
    """Which experts are consistent and temporal: used in at least and in at most so much of the steps.

    Used is an expert in a step that sends it at least `used_share` of a uniform share; temporal ones receive at least
    `temporal_least_weight` uniform shares when they are used. Raises InputError for what is below 0 or no fraction.
    """

    used_share: float = USED_SHARE
    consistent_least_frac: float = CONSISTENT_STEP_FRAC
    temporal_most_frac: float = TEMPORAL_MOST_FRAC
    temporal_least_weight: float = TEMPORAL_LEAST_WEIGHT

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            most = 1.0 if name.endswith("_frac") else math.inf
            if not 0 <= value <= most:
                raise InputError(f"{name} is {value:g}, expected at least 0{' and at most 1' if most == 1 else ''}")


CUTOFFS = Cutoffs()


@dataclass(frozen=True, eq=False)
class Pair:
    """Two temporal experts of a layer and the correlation of their shares over steps."""

    layer: int
    experts: tuple[int, int]
    correlation: float


@dataclass(frozen=True, eq=False)
class ExpertsInTime:
    """Which experts are always in use and which in bursts: columns with an entry for each layer.

    Consistent and temporal experts are by the `cutoffs`, `joined_steps` steps taken together; `temporal_weight` is what
    temporal ones receive when used, in uniform shares, NaN without one. Groups are of temporal experts whose shares
    rise and fall together (`group_correlation`, the mean inside them, NaN without one); `pairs` are the strongest of
    all layers.
    """

    cutoffs: Cutoffs
    joined_steps: int
    n_joined: int
    used_frac: Shares
    is_consistent: NDArray[np.bool_]
    is_temporal: NDArray[np.bool_]
    temporal_weight: Shares
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    group_correlation: Shares
    pairs: tuple[Pair, ...]


def experts_in_time(
    loads: Loads,
    layers: NDArray[np.int64],
    cutoffs: Cutoffs = CUTOFFS,
) -> ExpertsInTime | None:
    """Which experts of each layer are consistent, and which temporal and together; null for too few steps or tokens.

    A step of few tokens sends most experts nothing by chance, so counts of steps are joined until a uniform share is
    LEAST_SHARE_COUNT assignments on average, in MIN_WINDOWS joined steps or more.
    """
    n_steps, n_layers, n_experts = loads.shape
    mean = float(loads.sum(axis=2).mean()) / n_experts
    joined = int(np.ceil(LEAST_SHARE_COUNT / mean - 1e-9)) if is_counted(loads) and mean < LEAST_SHARE_COUNT else 1
    n_joined = n_steps // joined
    if n_joined < MIN_WINDOWS:
        return None
    sums = loads[: n_joined * joined].reshape(n_joined, joined, n_layers, n_experts).sum(axis=1)
    totals = sums.sum(axis=2, keepdims=True)
    relative = np.divide(sums * n_experts, totals, out=np.zeros_like(sums), where=totals > 0)
    is_used = used_experts(sums, cutoffs.used_share)
    n_used = is_used.sum(axis=0)
    used_frac = n_used / np.maximum((totals > 0).sum(axis=0), 1)
    weight = (relative * is_used).sum(axis=0) / np.maximum(n_used, 1)
    temporal = (n_used > 0) & (used_frac <= cutoffs.temporal_most_frac) & (weight >= cutoffs.temporal_least_weight)
    rows = [
        _together(relative[:, i], is_used[:, i], np.flatnonzero(temporal[i]), int(layers[i])) for i in range(n_layers)
    ]
    with np.errstate(invalid="ignore"):
        temporal_weight = (weight * temporal).sum(axis=1) / temporal.sum(axis=1)
    return ExpertsInTime(
        cutoffs,
        joined,
        n_joined,
        used_frac,
        used_frac >= cutoffs.consistent_least_frac,
        temporal,
        temporal_weight,
        tuple(groups for groups, _, _ in rows),
        np.array([inside for _, inside, _ in rows]),
        tuple(sorted((pair for _, _, pairs in rows for pair in pairs), key=lambda pair: -pair.correlation)[:N_PAIRS]),
    )


def _together(
    relative: Shares, is_used: NDArray[np.bool_], experts: NDArray[np.int64], layer: int
) -> tuple[tuple[tuple[int, ...], ...], float, list[Pair]]:
    """Groups of experts linked by correlation over steps, the mean correlation inside groups, and the linked pairs."""
    from scipy.sparse.csgraph import connected_components
    from scipy.stats import hypergeom

    n_pairs = len(experts) * (len(experts) - 1) // 2
    if not n_pairs:
        return (), float("nan"), []
    correlation = np.asarray(np.corrcoef(relative[:, experts], rowvar=False))
    own = is_used[:, experts].astype(np.int64)
    n_used, n_both = own.sum(axis=0), own.T @ own
    # How likely as many steps are common to two that are used in so many steps each, at random.
    by_chance = hypergeom.sf(n_both - 1, len(is_used), n_used[:, None], n_used[None, :])
    linked = np.triu((correlation >= GROUP_CORRELATION) & (by_chance < FALSE_LINKS / n_pairs), 1)
    _, label = connected_components(linked, directed=False)
    members = [np.flatnonzero(label == i) for i in np.unique(label)]
    members = sorted((each for each in members if len(each) > 1), key=lambda each: -len(each))
    inside = [correlation[np.ix_(each, each)][np.triu_indices(len(each), 1)] for each in members]
    pairs = [Pair(layer, (int(experts[a]), int(experts[b])), float(correlation[a, b])) for a, b in np.argwhere(linked)]
    groups = tuple(tuple(int(e) for e in experts[each]) for each in members)
    return groups, float(np.concatenate(inside).mean()) if inside else float("nan"), pairs

"""How sure a prediction is: held-out errors by group give intervals, and the hull of what was fitted their limits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from perfmodel.physics import Array

from .trees import Trees, grow, trees_from_json
from .work import GROWS_WITH_TOKENS, HULL, LOAD

COVERAGE = 0.90
ANOMALY_LOG = 0.5  # a measurement this far (factor 1.65) from a held-out prediction is no matter of a better formula
LEAST_FOR_SCALE = 300  # measurements below which one width serves all
FLOOR_LOG = 0.005  # added to errors before their logarithm is taken: nothing is known to half a percent
DIRECTIONS = ("tokens", "load", "shape")  # outside by more tokens, by how uneven experts are used, by anything else
SLACK_OCTAVES = 0.15  # a tenth beyond the fitted range is as good as inside
LEAST_IN_STEP = 20  # measurements that a step of a ladder rests on


@dataclass(frozen=True)
class Ladder:
    """How much wider intervals must be outside the hull: up to `reach[i]` octaves outside by `factor[i]`; both rise."""

    reach: tuple[float, ...] = ()
    factor: tuple[float, ...] = ()

    def at(self, octaves: Array) -> Array:
        """The factor at a distance outside, 1 inside, null (NaN) beyond the last step."""
        steps = np.array([1.0, *self.factor, np.nan])
        return np.asarray(steps[np.searchsorted([0.0, *self.reach], octaves, side="left")])


@dataclass(frozen=True, eq=False)
class Confidence:
    """What held-out errors said: `quantile` times the scale of an item is the half-width of its interval, log units.

    `scale` is null where one width serves all. `ranges` are the fitted limits of HULL, `ladders` what lies outside them
    costs, by DIRECTIONS. `n_scores` errors of `n_groups` groups were seen, `n_anomalies` more were beyond ANOMALY_LOG
    and are not what intervals speak of.
    """

    quantile: float
    scale: Trees | None
    ranges: dict[str, tuple[float, float]]
    ladders: dict[str, Ladder]
    n_scores: int
    n_groups: int
    n_anomalies: int

    def base_half_width(self, features: Array) -> Array:
        """The half-width inside the hull, log units `[item]`."""
        scale = np.ones(len(features)) if self.scale is None else np.exp(self.scale.predict(features))
        return np.asarray(self.quantile * scale)

    def half_width(self, features: Array, hull: dict[str, Array]) -> Array:
        """The half-width of each item's interval in log units, NaN where it lies too far outside to say."""
        width = self.base_half_width(features)
        for direction, octaves in octaves_outside(self.ranges, hull).items():
            width = width * self.ladders[direction].at(octaves)
        return np.asarray(width)

    def outside(self, hull: dict[str, Array]) -> list[str]:
        """The axes along which any item lies outside, as phrases that say how far; empty when inside."""
        found = []
        for name in HULL:
            low, high = self.ranges[name]
            values = hull[name]
            slack = 2**SLACK_OCTAVES
            if values.max() > high * slack or values.min() < low / slack:
                worst = values.max() if values.max() > high * slack else values.min()
                found.append(f"{name} {worst:.4g} outside the fitted {low:.4g} to {high:.4g}")
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "quantile": self.quantile,
            "scale": None if self.scale is None else self.scale.to_json(),
            "ranges": {name: list(limits) for name, limits in self.ranges.items()},
            "ladders": {name: [list(one.reach), list(one.factor)] for name, one in self.ladders.items()},
            "n_scores": self.n_scores,
            "n_groups": self.n_groups,
            "n_anomalies": self.n_anomalies,
        }


def confidence_from_json(content: dict[str, Any], n_features: int | None = None) -> Confidence:
    """What `to_json` gave; raises ValueError, KeyError or TypeError on what it could not have given, trees that ask for
    more than `n_features` features among it."""
    numbers = {name: int(content[name]) for name in ("n_scores", "n_groups", "n_anomalies")}
    if min(numbers.values()) < 0:
        raise ValueError("number")
    return Confidence(
        quantile=_limits(0.0, content["quantile"])[1],
        scale=None if content["scale"] is None else trees_from_json(content["scale"], n_features),
        ranges={name: _range(*content["ranges"][name]) for name in HULL},
        ladders={name: _ladder(*content["ladders"][name]) for name in DIRECTIONS},
        **numbers,
    )


def _range(low: float, high: float) -> tuple[float, float]:
    if not low > 0:  # axes are logarithms
        raise ValueError("range")
    low, high = _limits(low, high)
    return low, high


def _ladder(reach: list[float], factor: list[float]) -> Ladder:
    if len(reach) != len(factor) or len(set(reach)) != len(reach):
        raise ValueError("ladder")
    return Ladder(_limits(0.0, *reach)[1:], _limits(1.0, *factor)[1:])


def _limits(*rising: float) -> tuple[float, ...]:
    """Finite numbers that never fall; raises ValueError for others, TypeError for what is no number."""
    if not all(a <= b for a, b in zip(rising, [*rising[1:], np.finfo(np.float64).max], strict=True)):
        raise ValueError("limits")
    return tuple(float(x) for x in rising)


def ranges_of(hull: dict[str, Array]) -> dict[str, tuple[float, float]]:
    """The limits of what was fitted, by axis."""
    return {name: (float(values.min()), float(values.max())) for name, values in hull.items()}


def octaves_outside(ranges: dict[str, tuple[float, float]], hull: dict[str, Array]) -> dict[str, Array]:
    """How far each item lies outside, in factors of two, `[item]` by DIRECTIONS: along the worst axis of each; SLACK is
    inside. Where an item has more tokens than were fitted, all that grows with them counts as tokens."""
    distance = {}
    for name, (low, high) in ranges.items():
        over = np.maximum(np.log2(hull[name] / high), np.log2(low / hull[name]))
        distance[name] = np.where(over > SLACK_OCTAVES, over, 0.0)
    has_more = distance["n_tokens"] * (hull["n_tokens"] > ranges["n_tokens"][1]) > 0
    tokens = np.where(has_more, distance["n_tokens"], 0.0)
    grown = np.maximum.reduce([distance[name] for name in GROWS_WITH_TOKENS])
    load = np.maximum.reduce([distance[name] for name in LOAD])
    shape: Array = np.maximum.reduce([distance[name] for name in HULL if name not in (*GROWS_WITH_TOKENS, *LOAD)])
    return {
        "tokens": tokens,
        "load": np.where(has_more, 0.0, load),
        "shape": np.asarray(np.where(has_more, shape, np.maximum(shape, grown))),
    }


def conformal_quantile(scores: Array, coverage: float = COVERAGE) -> float:
    """The score that a new one stays below with at least this probability, were it exchangeable with these.

    Fewer scores than that takes (9 for 90 %) have no such one among them: then they are taken as sizes of normal errors
    about zero, which gives Student's bound, and it is no less than the largest.
    """
    n = len(scores)
    rank = int(np.ceil((n + 1) * coverage))
    if rank > n:
        rms = float(np.sqrt(np.mean(np.square(scores))))
        return max(float(scores.max()), rms * float(special.stdtrit(n, (1 + coverage) / 2)))
    return float(np.sort(scores)[rank - 1])


def width_of(features: Array, error: Array, groups: NDArray[np.int64]) -> tuple[float, Trees | None]:
    """The conformal quantile of held-out absolute log errors, `error[item]`, and the trees that scale it by item.

    Where there are enough errors, trees learn how large they are where; each group's errors are set in relation to a
    scale learned from the other groups, so that the quantile is honest for new groups (locally weighted conformal
    prediction, Lei et al., JASA 2018, with groups left out).
    """
    if len(error) < LEAST_FOR_SCALE or len(np.unique(groups)) < 4:
        return conformal_quantile(error), None
    target = np.log(error + FLOOR_LOG)

    def learn(rows: NDArray[np.bool_]) -> Trees:
        return grow(features[rows], target[rows], n_trees=50, n_leaves=6, least=max(20, len(error) // 60))

    relative = np.empty(len(error))
    for fold in np.array_split(np.unique(groups), min(8, len(np.unique(groups)))):
        held = np.isin(groups, fold)
        relative[held] = error[held] / np.exp(learn(~held).predict(features[held]))
    return conformal_quantile(relative), learn(np.ones(len(error), dtype=bool))


def ladder_of(octaves: Array, relative: Array, steps: Sequence[float]) -> Ladder:
    """How errors grow outside: for each step up to so many octaves, the quantile of `relative`, the held-out error
    over the half-width inside; at least 1, never falling. A step that too few errors reached joins the next one, and
    the last such steps are not offered."""
    reach: list[float] = []
    factor: list[float] = []
    low = 0.0
    for step in steps:
        here = (octaves > low) & (octaves <= step)
        if here.sum() < LEAST_IN_STEP:
            continue
        reach.append(step)
        factor.append(max([1.0, *factor, conformal_quantile(relative[here])]))
        low = step
    return Ladder(tuple(reach), tuple(factor))

"""Which calibrated rates and overheads moved between two captures."""

import math
from dataclasses import dataclass
from typing import Any

from perfmodel.capture import Capture
from perfmodel.hardware import QUANTITIES

LEAST_MOVED_FRAC = 0.02  # how far a calibrated number is from another, beyond their spreads, to be told as moved


@dataclass(frozen=True)
class Moved:
    """A calibrated quantity of both machines in base units, null where one did not measure it.

    `ratio` is candidate over baseline. `moved` says `faster` or `slower` where that is beyond the spread of both
    calibrations and LEAST_MOVED_FRAC, `same` where it is not, and is null for what is no speed. Where collectors
    measured it in two ways (`baseline_how`, `candidate_how`), part of the ratio may be theirs.
    """

    key: str
    words: str
    baseline: float | None
    candidate: float | None
    ratio: float | None
    moved: str | None
    baseline_how: str | None
    candidate_how: str | None

    @property
    def is_alike(self) -> bool:
        """Whether both sides measured it in the same way."""
        return self.baseline_how == self.candidate_how


def moved_quantities(baseline: Capture, candidate: Capture) -> list[Moved]:
    """The calibrated quantities of both machines and by how much each moved, in the order of the vocabulary."""
    sides = [capture.manifest["calibration"] for capture in (baseline, candidate)]
    keys = [key for key in QUANTITIES if any(key in side for side in sides)]
    return [_moved(key, *(side.get(key) for side in sides)) for key in keys]


def _moved(key: str, first: dict[str, Any] | None, other: dict[str, Any] | None) -> Moved:
    values = [None if entry is None else float(entry["value"]) for entry in (first, other)]
    how = [None if entry is None else entry.get("how") for entry in (first, other)]
    if first is None or other is None or not values[0] or not values[1]:
        return Moved(key, QUANTITIES[key], values[0], values[1], None, None, how[0], how[1])
    ratio, moved = values[1] / values[0], None
    if key.endswith(("_per_s", "_ns")):
        spread = sum(float(entry.get("spread_frac") or 0.0) for entry in (first, other))
        gain = math.log(ratio) * (-1 if key.endswith("_ns") else 1)
        moved = "same" if abs(gain) <= spread + LEAST_MOVED_FRAC else "faster" if gain > 0 else "slower"
    return Moved(key, QUANTITIES[key], values[0], values[1], ratio, moved, how[0], how[1])

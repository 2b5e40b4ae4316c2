"""What is known of each way to reach offloaded experts: fitted constants with their ranges, errors, and their JSON."""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

from perfmodel.capture_lines import RESIDENCIES

from .constants import ASSUMED, PRIORS, OffloadConstants
from .device import ACCESS_MODES

RANGE_SIGMAS = 1.645  # ranges hold 90 % where errors are normal
KNOWN_SIGMA_FRAC = 0.25  # a constant is known when measurements narrow what was believed of it to this part, at least
REREAD_ROWS = (64.0, 128.0, 256.0, 512.0)  # rows of a tile, times the tiles of a cluster that share one read


@dataclass(frozen=True, order=True)
class Way:
    """One composition: an access mode, of zero-copy also how it sees two memories. Ways are never pooled."""

    access: str
    residency: str | None = None

    def __str__(self) -> str:
        """`zero-copy/mapped`, `copy`."""
        return self.access if self.residency is None else f"{self.access}/{self.residency}"

    @classmethod
    def of(cls, words: str) -> Self:
        """What `str` gave; raises ValueError for what it could not have given."""
        access, _, residency = words.partition("/")
        if access not in ACCESS_MODES or residency not in ("", *RESIDENCIES):
            raise ValueError(words)
        return cls(access, residency or None)


@dataclass(frozen=True)
class Fitted:
    """A constant with the range that measurements and prior leave it (90 %), and whether measurements narrowed it to
    a quarter of what was believed before, at least."""

    value: float
    low: float
    high: float
    is_known: bool

    @classmethod
    def of(cls, name: str, value: float, sigma: float) -> Self:
        """A constant fitted to one sigma, in log units or in the unit of its prior."""
        prior = PRIORS[name]
        step = RANGE_SIGMAS * sigma
        low, high = (
            (value * math.exp(-step), value * math.exp(step))
            if prior.unit is None
            else (value - step * prior.unit, value + step * prior.unit)
        )
        return cls(value, max(low, prior.low), min(high, prior.high), sigma <= KNOWN_SIGMA_FRAC * prior.sigma)


@dataclass(frozen=True)
class HeldOut:
    """Errors |predicted / measured - 1| of rows whose group was left out, and the conformal quantile of |log error|."""

    n: int
    n_groups: int
    median_frac: float
    p90_frac: float
    worst_frac: float
    quantile: float


@dataclass(frozen=True)
class WayFit:
    """What was learned of one way: constants by name, errors held out by shape and by offloaded fraction (null: too few
    to hold out), and the half-width of its 90 % interval in log units, the wider of both (null: too few errors).

    `n_with_resident` of the `n_observations` were also measured with all experts resident.
    """

    constants: dict[str, Fitted]
    by_shape: HeldOut | None
    by_frac: HeldOut | None
    log_half_width: float | None
    n_observations: int
    n_with_resident: int


@dataclass(frozen=True)
class OffloadFit:
    """Every way that was measured on one machine, kernel and dtype."""

    ways: dict[Way, WayFit]

    def constants_of(self, access: str, residency: str | None = None) -> tuple[OffloadConstants, bool]:
        """The constants of a way, or of several modes (`copy-overlap+cpu`), and whether all were measured; one that
        never was has the assumed defaults.

        Zero-copy without a residency is `mapped`.
        """
        ways = [self.way(mode, residency if mode == "zero-copy" else None) for mode in access.split("+")]
        values = {name: one.value for way in ways if way is not None for name, one in way.constants.items()}
        return replace(ASSUMED, **values), None not in ways

    def way(self, access: str, residency: str | None = None) -> WayFit | None:
        """What was learned of a way, null when it never was measured."""
        if access == "zero-copy" and residency is None:
            residency = RESIDENCIES[0]
        return self.ways.get(Way(access, residency))

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, by the name of the way."""
        return {str(way): _way_json(one) for way, one in self.ways.items()}


def _way_json(one: WayFit) -> dict[str, Any]:
    return {
        **vars(one),
        "constants": {name: dict(vars(constant)) for name, constant in one.constants.items()},
        "by_shape": None if one.by_shape is None else dict(vars(one.by_shape)),
        "by_frac": None if one.by_frac is None else dict(vars(one.by_frac)),
    }


def from_json(content: dict[str, Any]) -> OffloadFit:
    """What `to_json` gave; raises ValueError, KeyError or TypeError on what it could not have given."""
    return OffloadFit({Way.of(words): _way_of(one) for words, one in content.items()})


def _way_of(content: dict[str, Any]) -> WayFit:
    half_width = content["log_half_width"]
    if half_width is not None and not 0 <= half_width < math.inf:
        raise ValueError("log_half_width")
    return WayFit(
        constants={name: _fitted_of(name, one) for name, one in content["constants"].items()},
        by_shape=None if content["by_shape"] is None else HeldOut(**content["by_shape"]),
        by_frac=None if content["by_frac"] is None else HeldOut(**content["by_frac"]),
        log_half_width=None if half_width is None else float(half_width),
        n_observations=int(content["n_observations"]),
        n_with_resident=int(content["n_with_resident"]),
    )


def _fitted_of(name: str, content: dict[str, Any]) -> Fitted:
    prior = PRIORS[name]
    numbers = [float(content[key]) for key in ("low", "value", "high")]
    slack = 1e-6 * max(abs(prior.low), abs(prior.high))
    if not all(prior.low - slack <= x <= prior.high + slack for x in numbers) or numbers != sorted(numbers):
        raise ValueError(name)
    if not isinstance(content["is_known"], bool):
        raise ValueError(name)
    return Fitted(numbers[1], numbers[0], numbers[2], content["is_known"])

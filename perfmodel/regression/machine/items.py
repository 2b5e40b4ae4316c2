"""One thing that is asked about a machine, with its answer."""

import math
from dataclasses import dataclass

HEALTHY, LOOK_AT, OPEN = "healthy", "look at", "not judged"
RATES, FACTS, STEADINESS, SWEEP, ROOFLINE = (
    "calibrated rates",
    "machine and software",
    "steadiness",
    "the sweep against a model",
    "roofline",
)
SECTIONS = (RATES, FACTS, STEADINESS, SWEEP, ROOFLINE)


@dataclass(frozen=True)
class Item:
    """One thing asked about a machine: `verdict` is one of HEALTHY, LOOK_AT and OPEN, `words` say on what it rests.

    `frac` is what was found as a share of what it is held against, `least_frac` the share below which it deserves a
    look (a share of a time is of the typical time over the measured one); both are null where there is no such number.
    `next_steps` are what to look at, empty where nothing is to be looked at.
    """

    section: str
    name: str
    verdict: str
    words: str
    next_steps: tuple[str, ...] = ()
    frac: float | None = None
    least_frac: float | None = None


def held(section: str, name: str, words: str, frac: float, least_frac: float, next_steps: tuple[str, ...]) -> Item:
    """An item that is healthy where a share reaches the least that it should be."""
    is_low = frac < least_frac
    return Item(section, name, LOOK_AT if is_low else HEALTHY, words, next_steps if is_low else (), frac, least_frac)


def judged(section: str, name: str, wrong: str | None, well: str, next_steps: tuple[str, ...] = ()) -> Item:
    """An item that is healthy, in the words of `well`, unless something is `wrong`."""
    if wrong is None:
        return Item(section, name, HEALTHY, well)
    return Item(section, name, LOOK_AT, wrong, next_steps)


def number(value: object) -> float | None:
    """What a manifest says as a number, which collectors wrote as one or as words; null for anything else."""
    try:
        found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def words_of(value: object) -> list[str]:
    """What a manifest lists, such as instruction sets, as words; nothing for what is no list."""
    return [str(one) for one in value] if isinstance(value, list | tuple) else []

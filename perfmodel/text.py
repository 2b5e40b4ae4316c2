"""The only place where ns, bytes and flops become words, and words become them."""

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

from perfmodel.errors import InputError

# unit word -> (suffix of the base unit it belongs to, factor). Base units are what every number inside is stored in.
UNITS: dict[str, tuple[str, float]] = {
    "ns": ("ns", 1.0),
    "us": ("ns", 1e3),
    "ms": ("ns", 1e6),
    "s": ("ns", 1e9),
    "B": ("bytes", 1.0),
    "kB": ("bytes", 1e3),
    "MB": ("bytes", 1e6),
    "GB": ("bytes", 1e9),
    "TB": ("bytes", 1e12),
    "PB": ("bytes", 1e15),
    "KiB": ("bytes", 2.0**10),
    "MiB": ("bytes", 2.0**20),
    "GiB": ("bytes", 2.0**30),
    "TiB": ("bytes", 2.0**40),
    "B/s": ("bytes_per_s", 1.0),
    "MB/s": ("bytes_per_s", 1e6),
    "GB/s": ("bytes_per_s", 1e9),
    "TB/s": ("bytes_per_s", 1e12),
    "FLOP/s": ("flops_per_s", 1.0),
    "GFLOP/s": ("flops_per_s", 1e9),
    "TFLOP/s": ("flops_per_s", 1e12),
    "PFLOP/s": ("flops_per_s", 1e15),
    "count": ("count", 1.0),
}

NS_PER_US = 1000
NS_PER_S = 1e9
MAX_WHOLE = 10**12  # far above any count that somebody asks for

_TIME_STEPS = (("s", 1e9), ("ms", 1e6), ("µs", 1e3), ("ns", 1.0))
_SI_STEPS = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
# What build servers take for commands in a log: GitHub a line that begins with `::`, also behind blanks, and `##[`
# anywhere; Azure `##vso[` and TeamCity `##teamcity[` anywhere.
_COMMAND = re.compile(r"^([^\S\n]*:)(?=:)|#(?=#\w*\[)", re.MULTILINE)
_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/]+)\s*")


def to_base(value: float, unit: str) -> tuple[float, str]:
    """What is `value unit` in base units: returns the number and the base suffix (`ns`, `bytes`, `flops_per_s` ...).

    Raises InputError on an unknown unit.
    """
    if unit not in UNITS:
        raise InputError(f"unknown unit {unit!r}; known units: {', '.join(UNITS)}")
    suffix, factor = UNITS[unit]
    return value * factor, suffix


def parse_bytes(words: str) -> int:
    """How many bytes does a text such as `40GiB` or `512 MB` mean; raises InputError when it names no byte count."""
    found = _QUANTITY.fullmatch(words)
    suffix, factor = UNITS.get(found[2], ("", 0.0)) if found else ("", 0.0)
    size = float(found[1]) * factor if found else math.inf
    if suffix != "bytes" or not math.isfinite(size):
        raise InputError(f"{words!r} is not a size in bytes; expected a number and a unit, such as 40GiB or 512MB")
    return round(size)


def parse_ns(words: str) -> float:
    """How many nanoseconds does a text such as `180us` or `0.18 ms` mean; raises InputError when it names no time."""
    found = _QUANTITY.fullmatch(words)
    suffix, factor = UNITS.get(found[2], ("", 0.0)) if found else ("", 0.0)
    if found is None or suffix != "ns" or not math.isfinite(float(found[1])):
        raise InputError(f"{words!r} is not a time; expected a number and a unit, such as 180us or 0.2ms")
    return float(found[1]) * factor


def whole(word: str, option: str) -> int:
    """A whole number from the words of an option; raises InputError on another, or one too small or large."""
    try:
        found = int(word)
    except ValueError:
        raise InputError(f"{option} is {word!r}, expected a whole number") from None
    if not 1 <= found <= MAX_WHOLE:
        raise InputError(f"{option} is {word}, expected at least 1 and at most {MAX_WHOLE:,}")
    return found


def number(word: str, option: str) -> float:
    """A positive number from the words of an option; raises InputError on another."""
    try:
        found = float(word)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise InputError(f"{option} is {word!r}, expected a positive number")
    return found


def fraction(word: str, option: str) -> float:
    """A fraction from the words of an option, such as `3%` or `0.03`; raises InputError on another."""
    try:
        return float(word[:-1]) / 100 if word.endswith("%") else float(word)
    except ValueError:
        raise InputError(f"{option} is {word!r}, expected a percentage such as 3% or a fraction such as 0.03") from None


def names(given: Sequence[str] | None) -> list[str]:
    """The names that an option was given, several times or once with commas."""
    return [word.strip() for words in given or () for word in words.split(",")]


def _scaled(value: float, steps: tuple[tuple[str, float], ...], unit: str) -> str:
    for word, factor in steps:
        if abs(value) >= 0.9995 * factor or factor == 1.0:  # 999.7 of a unit would be written 1,000
            return f"{_significant(value / factor)} {word}{unit}"
    raise AssertionError("the last step has factor 1")


def _significant(value: float) -> str:
    if value == 0:
        return "0"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def ns(value: float | None) -> str:
    """A duration in nanoseconds as words for people, `n/a` for null."""
    return "n/a" if value is None else _scaled(value, _TIME_STEPS, "")


def n_bytes(value: float | None) -> str:
    """A byte count as words for people (decimal multiples), `n/a` for null."""
    return "n/a" if value is None else _scaled(value, _SI_STEPS, "B")


def bytes_per_s(value: float | None) -> str:
    """A bandwidth as words for people, `n/a` for null."""
    return "n/a" if value is None else _scaled(value, _SI_STEPS, "B/s")


def flops_per_s(value: float | None) -> str:
    """A compute rate as words for people, `n/a` for null."""
    return "n/a" if value is None else _scaled(value, _SI_STEPS, "FLOP/s")


def frac(value: float | None) -> str:
    """A fraction 0 to 1 as per cent, `n/a` for null."""
    return "n/a" if value is None else f"{100 * value:.1f} %"


def count(value: float | None) -> str:
    """A count with thousands separators, `n/a` for null."""
    return "n/a" if value is None else f"{value:,.0f}"


_WRITERS = {
    "flops_per_s": flops_per_s,
    "bytes_per_s": bytes_per_s,
    "bytes": n_bytes,
    "ns": ns,
    "frac": frac,
    "count": count,
}


def in_unit(value: float | None, suffix: str) -> str:
    """A number in base units as words, chosen by the suffix of its name (`ns`, `bytes`, `bytes_per_s` ...)."""
    return _WRITERS[suffix](value)


def figure(name: str, value: float | None) -> str:
    """A figure as words, by the unit at the end of its name; a count where there is none, `n/a` for null."""
    if name == "flops_per_byte":
        return "n/a" if value is None else f"{value:,.1f}"
    return in_unit(value, next((suffix for suffix in _WRITERS if f"_{name}".endswith(f"_{suffix}")), "count"))


def counted(n: int, noun: str) -> str:
    """A count with its noun, in the plural unless it is one: `1 kernel`, `2,048 kernels`."""
    return f"{count(n)} {noun}" if n == 1 else f"{count(n)} {noun}s"


def printable(words: str) -> str:
    """A name in one line: `?` for each control character, line end or mark that turns the direction of writing."""
    return words if words.isprintable() else "".join(c if c.isprintable() else "?" for c in words)


def for_logs(page: str) -> str:
    """A page as terminals and logs of build servers may have it, whatever names stand in it: `?` for control characters
    but line ends and tabs, and a blank inside what a build server would take for a command."""
    if not page.replace("\n", "").isprintable():
        page = "".join(c if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" else "?" for c in page)
    return _COMMAND.sub(lambda found: f"{found[0]} ", page)


def shortened(words: str, n_most: int) -> str:
    """A name of at most `n_most` characters, the middle left out, for names differ at both ends; no control characters.

    Of kernels the end says more than the middle: what operator a template was made for.
    """
    shown = printable(words)
    if len(shown) <= n_most:
        return shown
    n_end = (n_most - 1) // 3
    return f"{shown[: n_most - 1 - n_end]}…{shown[len(shown) - n_end :]}"


def told_apart(labels: Sequence[str]) -> tuple[Sequence[str], str]:
    """Labels of parts with commas without those parts that all of them share, which leave no room for what tells them
    apart; and the parts that they share, empty where nothing of a label would be left."""
    parts = [label.split(", ") for label in labels]
    shared = [part for part in parts[0] if all(part in one for one in parts)] if len(parts) > 1 else []
    names = [", ".join(part for part in one if part not in shared) for one in parts]
    return (names, ", ".join(shared)) if all(names) else (labels, "")


def short_name(content: Mapping[str, object]) -> str:
    """12 hexadecimal digits that name some content: of the SHA-256 of its compact JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]

"""The lines of calibration.jsonl and the numbers made of them: format, keys, pooling over runs. Needs no torch.

A line is one probe measured once. What one machine number is made of may be many lines: of several runs, and of several
configurations (threads, sizes) of which the best is the machine's.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perfmodel.errors import InputError
from perfmodel.text import NS_PER_S, short_name

from .timing import spread_frac

Scalar = str | int | float | bool | None
Entry = dict[str, float | int | str]
Line = Mapping[str, Any]

UNITS = ("bytes_per_s", "flops_per_s", "ns")
# Lines of the first are also an answer to the second: a triad and a copy are streaming kernels.
ALSO = {
    "memory_copy_bytes_per_s": "memory_stream_bytes_per_s",
    "memory_triad_bytes_per_s": "memory_stream_bytes_per_s",
}
SIGNIFICANT = 6


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT}g}")


def value_of(times_ns: Sequence[float], per_call: float, unit: str) -> float:
    """The number that repeats stand for, at their median: a rate of `per_call` bytes or FLOPs, or ns over `per_call`.

    Raises InputError on an unknown unit, and when the clock saw no time.
    """
    if unit not in UNITS:
        raise InputError(f"a probe measures in {unit!r}, expected one of {', '.join(UNITS)}")
    bad = [t for t in times_ns if not (math.isfinite(t) and t > 0)]
    if not times_ns or bad:
        raise InputError(f"the clock saw {bad[0] if bad else 'no'} ns for a call, which is no time")
    middle = statistics.median(times_ns)
    return _rounded(middle / per_call if unit == "ns" else per_call * NS_PER_S / middle)


def line(
    name: str,
    params: Mapping[str, Scalar],
    run: int,
    quantity: str | None,
    unit: str,
    times_ns: Sequence[float],
    per_call: float,
    how: str,
    took_s: float,
) -> dict[str, object]:
    """One line of calibration.jsonl: a probe, what it saw, and the number made of it.

    `times_ns` are ns per call of each repeat; `per_call` is what a call stands for (bytes, FLOPs; 1 for plain times).
    """
    return {
        "probe": name,
        "params": dict(params),
        "run": run,
        "quantity": quantity,
        "value": value_of(times_ns, per_call, unit),
        "unit": unit,
        "times_ns": [_rounded(t) for t in times_ns],
        "spread_frac": round(spread_frac(list(times_ns)), 4),
        "n": len(times_ns),
        "how": how,
        "took_s": round(took_s, 3),
    }


def probe_key(name: str, params: Mapping[str, Scalar]) -> str:
    """12 hexadecimal digits that name a probe in one configuration, the same on every machine and in every run."""
    return short_name({"probe": name, "params": dict(params)})


def key(measured: Line) -> str:
    """The key of the probe that a line was measured by."""
    return probe_key(measured["probe"], measured["params"])


def stated(value: float, how: str) -> Entry:
    """A number the system tells: no scatter, one reading."""
    return {"value": float(value), "spread_frac": 0.0, "n": 1, "how": how}


def middle_of(entries: Sequence[Entry]) -> Entry:
    """One entry of those of several occasions: the middle value, `n` counting them; a single one stays as it is.

    Its scatter is that of the repeats inside the occasion or of the values between them, whichever is larger.
    """
    if len(entries) == 1:
        return entries[0]
    ordered = sorted(entries, key=lambda entry: float(entry["value"]))
    middle = ordered[(len(ordered) - 1) // 2]
    between = round(spread_frac([float(entry["value"]) for entry in ordered]), 4)
    return {**middle, "spread_frac": max(float(middle["spread_frac"]), between), "n": len(ordered)}


def pooled(processes: Sequence[Mapping[str, Entry]]) -> dict[str, Entry]:
    """One calibration of those of several processes: of each number the middle one, see `middle_of`."""
    return {name: middle_of([numbers[name] for numbers in processes if name in numbers]) for name in processes[0]}


def _words(params: Mapping[str, Scalar], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {params.get(name)}" for name in names)


def _best(quantity: str, configurations: Sequence[tuple[Line, Entry]]) -> Entry:
    """Of the largest size the fastest: small copies and arrays show overheads and caches, not the machine."""
    sizes = [first["params"].get("n_bytes") for first, _ in configurations]
    largest = max((size for size in sizes if isinstance(size, int)), default=None)
    rest = [
        (first, entry) for (first, entry), size in zip(configurations, sizes, strict=True) if largest in (None, size)
    ]
    is_rate = quantity.endswith("_per_s")
    first, entry = (max if is_rate else min)(rest, key=lambda found: float(found[1]["value"]))
    if len(configurations) == 1:
        return entry
    probes = {other["probe"] for other, _ in configurations}
    names = sorted({name for other, _ in configurations for name in other["params"]})
    differing = [n for n in names if len({str(other["params"].get(n)) for other, _ in configurations}) > 1]
    chosen = _words(first["params"], differing)
    what = f"{first['probe']}{' with ' if chosen else ''}{chosen}" if len(probes) > 1 else chosen
    rule = "fastest" if largest is None or len(set(sizes)) == 1 else "largest size, then fastest"
    return {**entry, "how": f"{entry['how']}; {what}: the {rule} of {len(configurations)} configurations"}


def seen_under_load(lines: Iterable[Line]) -> dict[str, Any] | None:
    """Clocks, power, temperature and why the clocks are what they are, of the last GEMM that saw them; null of none."""
    seen = [one["facts"] for one in lines if (one.get("facts") or {}).get("n_samples")]
    return dict(seen[-1]) if seen else None


def summary(lines: Iterable[Line]) -> dict[str, Entry]:
    """The machine numbers that calibration lines amount to: quantity to value, spread, `n` and how. Null ones pass.

    Lines of one probe and configuration pool over runs to their middle; of several configurations the best counts.
    """
    by_quantity: dict[str, dict[str, list[Line]]] = {}
    for measured in lines:
        quantity = measured["quantity"]
        for name in (quantity, ALSO.get(quantity)) if quantity is not None else ():
            if name is not None:
                by_quantity.setdefault(name, {}).setdefault(key(measured), []).append(measured)
    found = {}
    for quantity, by_key in by_quantity.items():
        configurations = []
        for same in by_key.values():
            entries: list[Entry] = [{name: one[name] for name in ("value", "spread_frac", "n", "how")} for one in same]
            configurations.append((same[0], middle_of(entries)))
        found[quantity] = _best(quantity, configurations)
    return found

"""Exports for llama.cpp, whose finest unit is one projection of all experts of a layer (`blk.N.ffn_gate_exps`).

Options as in `common/arg.cpp` and `common/common.h`: `-ot REGEX=BUFFER,...` is searched in tensor names, the first
match counts; `-ncmoe N` keeps the experts of the first N layers on the host.
"""

from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from perfmodel.placement import Loads

from ..files import PlacedModel
from .exported import Exported, Rounding, most_worth_first, rounding

EVERY_PROJECTION = "up|down|gate|gate_up"  # llama.cpp's own list, so that one rule serves fused and split layers
Units = dict[str, int]  # projections of a layer with the GEMMs that each holds


def projections(n_gemms: int, fused: bool = False) -> Units:
    """The expert tensors of a layer and how many of its GEMMs each holds; `fused` where gate and up are one tensor."""
    if n_gemms == 2:
        return {"up": 1, "down": 1}
    return {"gate_up": 2, "down": 1} if fused else {"gate": 1, "up": 1, "down": 1}


def in_order(placed: PlacedModel, order: NDArray[np.int64], units: Units) -> NDArray[np.bool_]:
    """Which projections of which layers the bytes of the resident experts hold, `[layer, projection]`.

    Layers are filled in the given order, each with all its projections that still fit.
    """
    left = int(placed.resident.sum()) * placed.shape.n_gemms  # in GEMMs of one expert
    held = np.zeros((len(placed.layers), len(units)), dtype=np.bool_)
    for layer in order:
        for unit, n_gemms in enumerate(units.values()):
            if n_gemms * placed.shape.n_experts <= left:
                held[layer, unit] = True
                left -= n_gemms * placed.shape.n_experts
    return held


def kept_by(placed: PlacedModel, held: NDArray[np.bool_], units: Units) -> NDArray[np.float64]:
    """The part of each expert on the device, `[layer, expert]`, when the projections `held[layer, projection]` are."""
    parts = held @ np.array(list(units.values())) / placed.shape.n_gemms
    return np.repeat(parts[:, None], placed.shape.n_experts, axis=1)


def llama_cpp(
    placed: PlacedModel, load: Loads | None = None, name: str = "placement", *, fused: bool = False, host: str = "CPU"
) -> Exported:
    """`-ot` rules for what leaves the device, under the bytes of the resident experts, and the best `--n-cpu-moe`.

    The layers kept are those whose resident experts have the largest share of assignments (most resident experts
    without a load), the last one with the projections that still fit. `fused`: gate and up are one tensor, as in some
    architectures. `host`: the buffer type that takes what leaves the device.
    """
    units = projections(placed.shape.n_gemms, fused)
    held = in_order(placed, most_worth_first(placed, load), units)
    found = rounding(placed, kept_by(placed, held, units), load)
    rules = ",".join(f"{regex}={host}" for regex in override_regexes(placed.layers, held, tuple(units)))
    split = np.flatnonzero(held.any(axis=1) & ~held.all(axis=1))
    n_first, first = n_cpu_moe(placed, load)
    flags = [f"-ngl 999 -ot '{rules}'" if rules else "-ngl 999", f"-ngl 999 --n-cpu-moe {n_first}"]
    either = f"# one or the other\n{flags[0]}\n{flags[1]}\n"
    return Exported(
        {f"{name}.llama-cpp.txt": either.encode()},
        tuple(flags),
        (
            *(() if found.is_exact else (f"-ot moves whole projections of layers: {found.words()}",)),
            *(f"layer {placed.layers[layer]} is split: its activations cross the link twice" for layer in split),
            f"--n-cpu-moe {n_first} is the simpler choice: {first.words()}",
        ),
        found,
    )


def n_cpu_moe(placed: PlacedModel, load: Loads | None = None) -> tuple[int, Rounding]:
    """The N of `--n-cpu-moe` that keeps as many last layers as the bytes hold, and its rounding."""
    n_layers, n_experts = placed.resident.shape
    n_whole = int(placed.resident.sum()) // n_experts
    kept = np.zeros(placed.resident.shape)
    kept[n_layers - n_whole :] = 1.0
    n_first = 0 if n_whole == n_layers else placed.layers[n_layers - n_whole - 1] + 1
    return n_first, rounding(placed, kept, load)


def override_regexes(layers: tuple[int, ...], held: NDArray[np.bool_], units: tuple[str, ...]) -> list[str]:
    """Regular expressions that find the expert tensors not `held[layer, projection]`, one per set of projections.

    They use no comma and no `=`, which separate the rules of `-ot`.
    """
    named: dict[str, list[str]] = {}
    for place, row in zip(layers, held, strict=True):
        if not row.all():
            gone = EVERY_PROJECTION if not row.any() else "|".join(u for u, h in zip(units, row, strict=True) if not h)
            named.setdefault(gone, []).append(str(place))
    return [rf"blk\.{_one_of(places)}\.ffn_({gone})_(ch|)exps\." for gone, places in named.items()]


def _one_of(numbers: list[str]) -> str:
    """A regular expression for one of these decimal numbers in rising order; equal starts share a class."""
    tails: dict[str, str] = {}
    for number in numbers:
        tails[number[:-1]] = tails.get(number[:-1], "") + number[-1]
    heads: dict[str, list[str]] = {}
    for head, digits in tails.items():
        heads.setdefault(_digits(digits), []).append(head)
    parts = []
    for digits, before in heads.items():
        longer = [head for head in before if head]
        parts += ([digits] if "" in before else []) + ([_one_of(longer) + digits] if longer else [])
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"


def _digits(digits: str) -> str:
    """A character class for these digits in rising order: `3`, `[37]`, `[3-7]`."""
    if len(digits) == 1:
        return digits
    runs = [[d for _, d in run] for _, run in groupby(enumerate(digits), lambda pair: int(pair[1]) - pair[0])]
    return "[" + "".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else "".join(run) for run in runs) + "]"

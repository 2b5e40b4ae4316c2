"""Exports without an engine: this project's JSON, and loads as the arrays that other planners take."""

import numpy as np

from perfmodel.placement import Loads

from ..files import PlacedModel, placement_json
from .exported import Exported, npy, rounding
from .sglang import whole_counts


def own_json(placed: PlacedModel, load: Loads | None = None, name: str = "placement") -> Exported:
    """This project's placement file, which `read_placement` reads back: nothing is rounded."""
    kept = placed.resident.astype(np.float64)
    return Exported({f"{name}.json": placement_json(placed).encode()}, rounding=rounding(placed, kept, load))


def eplb(placed: PlacedModel, load: Loads | None = None, name: str = "placement") -> Exported:
    """The `weight` that DeepSeek's EPLB balances, as .npy int64 `[layer, expert]`; raises InputError without a load."""
    return Exported(
        {f"{name}.eplb-weight.npy": npy(whole_counts(placed, load))}, warnings=("loads only, no placement",)
    )


def plumb(placed: PlacedModel, load: Loads | None = None, name: str = "placement") -> Exported:
    """The loads that plumb reads, as .npy float32 `[layer, expert]`; raises InputError without a load."""
    counts = whole_counts(placed, load).astype(np.float32)
    return Exported({f"{name}.plumb.npy": npy(counts)}, warnings=("loads only, no placement",))

"""What serving engines count of their experts in a buffer of steps, and the slots that they count. numpy only.

Engines count *physical* experts, the slots on their GPUs, of which several may be replicas of one *logical* expert, the
one that the model knows; a map `[layer, slot]` says which. docs/routing.md has the formats and their traps.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .recording import MAX_WHOLE, Draft, Hints, Loads, loads_of
from .selections import MAX_EXPERTS, MAX_SHARED

MIN_NONZERO = 64  # counts that must share a factor before it is believed to be a number of ranks

Map = NDArray[np.int64]


def map_of(name: str, value: object) -> Map:
    """The logical expert of each slot, `[layer, slot]`, -1 for a slot that is empty."""
    array = np.asarray(value) if isinstance(value, np.ndarray | list) else np.empty(0)
    if array.ndim != 2 or array.dtype.kind not in "iu" or not array.size or array.max() < 0:
        found = f"{array.dtype} in {array.ndim} dimensions"
        raise InputError(f"{name}: found {found} as its map of experts, expected whole numbers [layers, slots]")
    if array.max() >= MAX_EXPERTS:
        raise InputError(f"{name}: its map of experts names expert {array.max()}, expected below {MAX_EXPERTS}")
    return array.astype(np.int64)


def logical_loads(name: str, physical: Loads, slots: Map, n_experts: int) -> Loads:
    """Loads of logical experts `[step, layer, expert]`: those of `physical[step, layer, slot]`, replicas added up."""
    if physical.shape[1:] != slots.shape:
        raise InputError(
            f"{name}: counts are of {physical.shape[1]} layers and {physical.shape[2]} slots, the map of experts of "
            f"{slots.shape[0]} and {slots.shape[1]}"
        )
    used = slots >= 0
    n_layers = len(slots)
    places = (np.arange(n_layers)[:, None] * n_experts + slots)[used]
    rows = [np.bincount(places, weights=step[used], minlength=n_layers * n_experts) for step in physical]
    return np.stack(rows).astype(np.float64).reshape(-1, n_layers, n_experts)


def draft_of_buffer(name: str, counts: NDArray[Any], hints: Hints, slots: Map | None = None) -> Draft:
    """The recording in a circular buffer of steps, `[step, layer, expert]` or one step of it; slots where given a map.

    Rows of zeros were never filled and are left out. What was counted once by each of several ranks is divided.
    """
    loads = loads_of(name, counts)
    if slots is not None:
        loads = logical_loads(name, loads, slots, int(slots.max()) + 1)
    if not loads.any():
        raise InputError(f"{name} recorded nothing: all its counts are zero")
    loads, is_ordered, notes = _in_order(loads)
    loads, more = _of_one_rank(loads)
    return engine_draft(loads, hints, is_ordered, notes + more)


def engine_draft(loads: Loads, hints: Hints, is_ordered: bool, notes: tuple[str, ...]) -> Draft:
    """A draft of logical loads with a row for each layer of the model; fused shared experts at the end are left out."""
    if hints.n_experts is not None and _ends_in_shared(loads, hints.n_experts):
        notes += (f"experts from {hints.n_experts} on are left out: fused shared experts are recorded as if routed",)
        loads = loads[:, :, : hints.n_experts]
    elif hints.n_experts is None and _last_looks_shared(loads):
        notes += (
            f"expert {loads.shape[2] - 1} has the same load in every layer of a step and no other has as much, as a "
            "fused shared expert would; say how many experts are routed to leave it out",
        )
    layers = np.arange(loads.shape[1], dtype=np.int64)
    return Draft(loads, layers, None, None, is_ordered, notes, has_dense_layers=True)


def _ends_in_shared(loads: Loads, n_experts: int) -> bool:
    """Whether what comes after the routed experts is shared: few experts that every token of a step uses.

    Their load is then the same in every layer, and no routed expert has more.
    """
    if not 0 < loads.shape[2] - n_experts <= MAX_SHARED:
        return False
    loads = loads[:, loads.any(axis=(0, 2))]
    of_shared = loads[:, :, n_experts:].sum(axis=2)
    return bool((of_shared == of_shared[:, :1]).all() and (loads[:, :, :n_experts].max(axis=2) <= of_shared).all())


def _last_looks_shared(loads: Loads) -> bool:
    """Whether the last expert is what every token uses in each of several layers, and the only one."""
    loads = loads[:, loads.any(axis=(0, 2))]
    if loads.shape[1] < 2 or loads.shape[2] < 2:
        return False
    return _ends_in_shared(loads, loads.shape[2] - 1) and bool((loads[:, :, :-1].max(axis=2) < loads[:, :, -1]).all())


def _in_order(loads: Loads) -> tuple[Loads, bool, tuple[str, ...]]:
    """The filled steps of a circular buffer, oldest first where that can be told, whether it can, and notes.

    One gap of rows that were never filled lies between the newest and the oldest. A buffer is not begun anew after a
    dump, so that the gap may be anywhere.
    """
    filled = np.asarray(loads.any(axis=(1, 2)))
    n_steps = len(filled)
    if filled.all():
        if n_steps == 1:
            return loads, True, ()
        return loads, False, ("the buffer is full and may have wrapped, so the order of its steps is unknown",)
    begins = np.flatnonzero(filled & ~np.roll(filled, 1))  # rows after a gap
    notes: tuple[str, ...] = (f"{int((~filled).sum())} of {n_steps} steps of the buffer are empty and left out",)
    if len(begins) == 1:
        order = (begins[0] + np.arange(n_steps)) % n_steps
        return loads[order][filled[order]], True, notes
    in_file_order = bool(filled[0] and not filled[-1])
    if not in_file_order:
        notes += ("the buffer has several gaps, so the order of its steps is unknown",)
    return loads[filled], in_file_order, notes


def _of_one_rank(loads: Loads) -> tuple[Loads, tuple[str, ...]]:
    """Loads divided by the factor that all of them share, which is the number of ranks that counted the same tokens."""
    nonzero = loads[loads > 0]
    if (nonzero != np.floor(nonzero)).any() or nonzero.max() > MAX_WHOLE:
        return loads, ()
    factor = int(np.gcd.reduce(nonzero.astype(np.int64)))
    if factor == 1:
        return loads, ()
    if nonzero.size < MIN_NONZERO:
        return loads, (f"all counts are multiples of {factor}, perhaps because as many ranks counted the same tokens",)
    return loads / factor, (
        f"all counts are multiples of {factor}, as where so many tensor-parallel ranks count the same tokens, and are "
        "divided by it",
    )

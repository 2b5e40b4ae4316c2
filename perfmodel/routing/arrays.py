"""Recordings from named arrays, whatever file they came from: counts, ids, or an engine's counts of slots. numpy only.

The arrays of a file that `write_counts` made are `counts` `[steps, layers, experts]` and what they belong to: `layers`,
`top_k` and `n_tokens`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .engines import draft_of_buffer, map_of
from .recording import Draft, Hints, loads_of
from .selections import draft_of_ids, ids_of, is_named_ids, kind_of

COUNTS = "counts"  # the array that is meant where none is named
BESIDE_COUNTS = ("layers", "top_k", "n_tokens")
LOGICAL = "logical_count"  # SGLang's buffer
SLOTS = ("physical_to_logical_map", "last_physical_to_logical_map", "phy2log")
PLACEMENTS = (*SLOTS, "expert_to_ep_rank", "expert_map")
PER_SLOT = ("expert_load_window", "expert_load_pass", "global_physical_count")
MEANT = (COUNTS, "activation_freq", "weight", "expert_counts")  # taken where a file has just one of these names

NUMBERED = re.compile(r"\D*(\d{1,4})\D*")  # arrays of one layer each

Arrays = Mapping[str, NDArray[Any]]


def refuse_key(name: str, key: str) -> None:
    """InputError where a key is given for a file whose parts have no names."""
    if key:
        raise InputError(f"{name} holds no arrays by name, so leave out #{key}")


def draft_of_arrays(name: str, arrays: Arrays, key: str, hints: Hints, is_lenient: bool) -> Draft:
    """The recording in the arrays of a file: the one called `key`, else the one that is meant or the only one.

    The name of an array without one is empty. `is_lenient` is whether arrays that may be counts or ids are counts.
    Raises InputError for keys that are not there, several arrays to choose from, and placements without counts.
    """
    if "" in arrays and key:
        raise InputError(f"{name} holds one array without a name, so leave out #{key}")
    if key in ("", LOGICAL) and LOGICAL in arrays:
        return draft_of_buffer(name, arrays[LOGICAL], hints)
    slots = next((slot for slot in SLOTS if slot in arrays), None)
    if slots is not None:
        found = [one for one in PER_SLOT if one in arrays]
        if key in found or (not key and len(found) == 1):
            return draft_of_buffer(name, arrays[key or found[0]], hints, map_of(name, arrays[slots]))
    if not key and len(arrays) > 1 and hints.kind != "counts" and all(is_named_ids(one) for one in arrays):
        return _draft_of_requests(name, arrays, hints)
    if not key and (draft := _draft_of_layers(name, arrays)) is not None:
        return draft
    chosen = key or _meant(arrays)
    if chosen in PLACEMENTS or (not key and chosen not in arrays and set(arrays) & set(PLACEMENTS)):
        raise InputError(f"{name} says where experts are placed and not how often they are used; expected counts")
    if chosen not in arrays:
        raise InputError(f"{name} holds {', '.join(arrays)}; choose one as {name}#{next(iter(arrays))}")
    if chosen == COUNTS and all(one in arrays for one in BESIDE_COUNTS):
        return _draft_of_own(name, arrays)
    return draft_of_array(name, chosen, arrays[chosen], hints, is_lenient)


def _kind_by(hints: Hints, array: NDArray[Any]) -> str | None:
    """`counts` where what is known of the model rules out ids [tokens, layers, top_k]; null where it does not."""
    if array.ndim != 3 or not array.size:
        return None
    other_width = hints.top_k is not None and array.shape[2] != hints.top_k
    beyond = hints.n_experts is not None and array.max() >= hints.n_experts
    return "counts" if other_width or beyond else None


def draft_of_array(name: str, key: str, array: NDArray[Any], hints: Hints, is_lenient: bool) -> Draft:
    """The recording in one array: counts, up to [steps, layers, experts], or ids [tokens, layers, top_k].

    Which of them is said by `hints.kind`, else by the name of the array or its file, else by its numbers (see
    `kind_of`). Steps of zeros are left out. Raises InputError where it cannot be told.
    """
    is_named = array.ndim > 2 and is_named_ids(key or name)
    kind = hints.kind or ("ids" if is_named else _kind_by(hints, array) or kind_of(array))
    if kind is None and not is_lenient:
        raise InputError(
            f"{name}: whole numbers of shape {array.shape} may be counts [steps, layers, experts] or ids [tokens, "
            "layers, top_k]; say which by kind, counts or ids"
        )
    if kind == "ids":
        guessed = ("read as ids of experts, because no token repeats one and layers do not add up to the same",)
        notes = () if hints.kind or is_named else guessed
        return draft_of_ids(name, ids_of(name, array), hints, notes)
    loads = loads_of(name, array)
    filled = np.asarray(loads.any(axis=(1, 2)))
    notes = ()
    if filled.any() and not filled.all():
        notes = (f"{int((~filled).sum())} of {len(filled)} steps are empty and left out",)
        loads = loads[filled]
    return Draft(loads, np.arange(loads.shape[1], dtype=np.int64), notes=notes)


def _meant(arrays: Arrays) -> str:
    named = [one for one in MEANT if one in arrays]
    return named[0] if len(named) == 1 or COUNTS in arrays else next(iter(arrays)) if len(arrays) == 1 else COUNTS


def _draft_of_layers(name: str, arrays: Arrays) -> Draft | None:
    """The recording in arrays that are one layer each, numbered as `0` or `layer_0`; null where they are not."""
    by_layer = {int(found[1]): array for one, array in arrays.items() if (found := NUMBERED.fullmatch(one))}
    shapes = {array.shape for array in arrays.values()}
    if not 1 < len(by_layer) == len(arrays) or len(shapes) > 1 or len(next(iter(shapes))) != 1:
        return None
    layers = sorted(by_layer)
    loads = loads_of(name, np.stack([by_layer[layer] for layer in layers]))
    notes = (f"its {len(layers)} arrays are read as a layer each, {next(iter(arrays))} and so on",)
    return Draft(loads, np.array(layers), notes=notes, has_dense_layers=True)


def _draft_of_requests(name: str, arrays: Arrays, hints: Hints) -> Draft:
    ids = [ids_of(f"{name}: {one}", array) for one, array in arrays.items() if array.size]
    if len({one.shape[1:] for one in ids}) > 1:
        raise InputError(f"{name}: its arrays of ids have different layers or top-k; choose one as {name}#KEY")
    if not ids:
        raise InputError(f"{name} holds no selected expert")
    return draft_of_ids(name, np.concatenate(ids), hints, (f"{len(ids)} requests, one after the other",))


def _draft_of_own(name: str, arrays: Arrays) -> Draft:
    loads = loads_of(name, arrays[COUNTS])
    layers, top_k, n_tokens = (arrays[one] for one in BESIDE_COUNTS)
    expected = ((loads.shape[1],), (), (loads.shape[0],))
    if any(
        one.shape != shape or one.dtype.kind not in "iu"
        for one, shape in zip((layers, top_k, n_tokens), expected, strict=True)
    ):
        raise InputError(f"{name}: its layers, top_k and n_tokens do not belong to counts of shape {loads.shape}")
    if layers.min() < 0 or len(np.unique(layers)) < len(layers):
        raise InputError(f"{name}: its layers are {layers.tolist()}, expected a place of its own for each, from 0")
    return Draft(loads, layers.astype(np.int64), int(top_k), n_tokens.astype(np.int64))

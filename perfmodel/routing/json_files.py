"""Recordings from JSON and JSON lines: responses of servers, logs of forward passes, arrays as lists. numpy only."""

import base64
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .arrays import draft_of_arrays, refuse_key
from .recording import Draft, Hints, loads_of
from .selections import MAX_EXPERTS, draft_of_ids, ids_of

ROUTED = "routed_experts"
PAIR = re.compile(r"(\d{1,6}):(\d{1,6})")  # plumb's keys, layer:expert


def draft_of_json(path: Path, key: str, hints: Hints, is_lenient: bool) -> Draft:
    """The recording in a file of JSON or JSON lines. Lines are read one by one.

    Raises InputError for what is neither, and for JSON in which no known form of a recording is found.
    """
    name = path.name
    values = json_values(path)
    first = next(values)
    rows = chain(first if isinstance(first, list) and first and isinstance(first[0], dict) else [first], values)
    head = next(rows)
    if isinstance(head, dict) and "forward_pass_id" in head:
        refuse_key(name, key)
        return _draft_of_passes(name, chain([head], rows), hints)
    requests: list[NDArray[np.signedinteger]] = []
    is_alone = True
    for number, row in enumerate(chain([head], rows)):
        is_alone = number == 0
        requests += _requests(name, row, hints)
    if requests:
        refuse_key(name, key)
        return _draft_of_requests(name, requests, hints)
    arrays = _arrays(head, hints) if is_alone else {}
    if not arrays:
        raise InputError(f"{name} is JSON without counts, {ROUTED} or any other known form of a recording")
    return draft_of_arrays(name, arrays, key, hints, is_lenient)


def json_values(path: Path) -> Iterator[Any]:
    """The value of a JSON file, or those of the lines of one of JSON lines. Raises InputError for what is neither."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = (line for line in file if line.strip())
            first, second = next(lines, ""), next(lines, None)
            try:
                value = json.loads(first)
            except ValueError:
                yield json.loads(path.read_text(encoding="utf-8-sig"))
                return
            yield value
            if second is not None:
                yield json.loads(second)
                yield from map(json.loads, lines)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name} is neither JSON nor JSON lines: {error}") from None


def _requests(name: str, value: Any, hints: Hints) -> Iterator[NDArray[np.signedinteger]]:
    """Ids `[token, layer, slot]` of each request whose response is somewhere in a value, in its order."""
    open_values = [value]
    while open_values:
        one = open_values.pop()
        if isinstance(one, dict):
            if one.get(ROUTED) is not None:
                yield _ids(name, one[ROUTED], one, hints)
            open_values += [inner for inner in reversed(list(one.values())) if isinstance(inner, dict | list)]
        elif isinstance(one, list) and one and isinstance(one[0], dict | list):
            open_values += reversed(one)


def _ids(name: str, routed: Any, beside: dict[str, Any], hints: Hints) -> NDArray[np.signedinteger]:
    """Ids of one request: nested lists, or base64 of int32 whose layers and top-k are known from elsewhere."""
    if isinstance(routed, list):
        array = _array(routed)
        if array is None or array.ndim != 3:
            raise InputError(f"{name}: {ROUTED} is no list [tokens, layers, top_k] of whole numbers")
        return ids_of(name, array)
    try:
        flat = np.frombuffer(base64.b64decode(routed, validate=True), "<i4")
    except (ValueError, TypeError):
        raise InputError(f"{name}: {ROUTED} is neither base64 of int32 nor a list of ids") from None
    n_layers, top_k = hints.n_layers, hints.top_k
    numbers: list[Any] = [beside.get("prompt_tokens"), beside.get("completion_tokens")]
    if all(type(number) is int for number in numbers) and (n_layers is None) != (top_k is None):
        n_tokens = sum(numbers) - 1  # the last token that is made is never read
        known = n_tokens * (n_layers or top_k or 1)
        other = len(flat) // known if known > 0 and len(flat) % known == 0 else None
        n_layers, top_k = n_layers or other, top_k or other
    if n_layers is None or top_k is None:
        raise InputError(
            f"{name}: {ROUTED} in base64 does not say its shape; give n_layers (all of the model) and top_k, or the "
            "model's shape"
        )
    if not len(flat) or len(flat) % (n_layers * top_k):
        raise InputError(f"{name}: {ROUTED} has {len(flat)} ids, no multiple of {n_layers} layers x top-k {top_k}")
    return ids_of(name, flat.reshape(-1, n_layers, top_k))


def _draft_of_requests(name: str, requests: list[NDArray[np.signedinteger]], hints: Hints) -> Draft:
    if len({one.shape[1:] for one in requests}) > 1:
        raise InputError(f"{name}: its responses have different layers or top-k")
    notes = (f"{len(requests)} requests, one after the other",) if len(requests) > 1 else ()
    return draft_of_ids(name, np.concatenate(requests), hints, notes)


def _draft_of_passes(name: str, rows: Iterable[Any], hints: Hints) -> Draft:
    """The recording in rows that have `forward_pass_id` and `expert_counts`, `[experts]` or `[layers, experts]`."""
    numbers, counts = [], []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or "forward_pass_id" not in row:
            raise InputError(f"{name}: row {number} has no forward_pass_id")
        if hints.phase is not None and str(row.get("forward_mode")).lower() != hints.phase:
            continue
        array = _array(row.get("expert_counts"))
        if array is None or array.ndim not in (1, 2):
            raise InputError(
                f"{name}: row {number} has no expert_counts [layers, experts]; how many experts are used does not say "
                "which"
            )
        counts.append(loads_of(name, array)[0])
        numbers.append(row["forward_pass_id"])
    if len({one.shape for one in counts}) != 1:
        words = "its passes have different layers or experts" if counts else f"none of its passes is {hints.phase}"
        raise InputError(f"{name}: {words}")
    loads = np.stack(counts)
    filled = np.asarray(loads.any(axis=(1, 2)))
    if not filled.any():
        raise InputError(f"{name} recorded nothing: all its counts are zero")
    notes = () if filled.all() else (f"{int((~filled).sum())} of {len(filled)} passes are empty and left out",)
    is_ordered = all(type(number) is int for number in numbers) and numbers == sorted(numbers)
    layers = np.arange(loads.shape[1], dtype=np.int64)
    return Draft(loads[filled], layers, None, None, is_ordered, notes, True, hints.phase)


def _arrays(value: Any, hints: Hints) -> dict[str, NDArray[Any]]:
    """The arrays that a value holds as lists, by name; empty where there are none."""
    if isinstance(value, list):
        whole = _array(value)
        return {} if whole is None else {"": whole}
    if not isinstance(value, dict):
        return {}
    loads = value.get("expert_loads")
    if isinstance(loads, dict) and loads and all(PAIR.fullmatch(pair) for pair in loads):
        return {"expert_loads": _of_pairs(loads, hints)}
    found = {name: _array(inner) for name, inner in value.items() if isinstance(inner, list)}
    return {name: array for name, array in found.items() if array is not None}


def _of_pairs(loads: dict[str, Any], hints: Hints) -> NDArray[Any]:
    """Loads `[layer, expert]` of a table with keys `layer:expert`; what it does not name is zero."""
    pairs = np.array([pair.split(":") for pair in loads], dtype=np.int64)
    values = _array(list(loads.values()))
    n_layers, n_experts = (int(size) for size in pairs.max(axis=0) + 1)
    n_experts = max(n_experts, hints.n_experts or 0)
    if values is None or values.ndim != 1 or max(n_layers, n_experts) > MAX_EXPERTS:
        raise InputError("expert_loads must hold a number for each layer:expert")
    array = np.zeros((n_layers, n_experts))
    array[pairs[:, 0], pairs[:, 1]] = values
    return array


def _array(value: Any) -> NDArray[Any] | None:
    """A nested list as an array of numbers; null where it is ragged, or holds anything else."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError, RecursionError):
        return None
    return array if array.dtype.kind in "iuf" and array.ndim else None

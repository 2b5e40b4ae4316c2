"""Recordings from the experts that each token selected: arrays of ids `[tokens, layers, top_k]`. numpy only."""

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .recording import Draft, Hints, Loads

BLOCK = 1 << 22  # ids that are counted at once, so that room for their places stays small
MAX_EXPERTS = 1 << 14  # of one layer; no model has a quarter of them
MAX_SHARED = 4  # experts after the routed ones that may be fused shared ones
MAX_SIZE = 1 << 28  # counts of one recording
MAX_TOP_K, MAX_GUESSED = 32, 1024  # slots and ids of what may be guessed to be ids; every model known has fewer
LEAST_SPREAD, LEAST_ROWS = 0.05, 64  # of sums over layers, and how many of them; lost tokens spread counts by less
ID_NAMES = ("routed_experts", "topk_ids")  # what engines call such arrays


def is_named_ids(name: str) -> bool:
    """Whether the name of an array or its file says that it holds ids."""
    return any(word in name.lower() for word in ID_NAMES) and "count" not in name.lower()


def kind_of(array: NDArray[np.generic]) -> str | None:
    """Whether an array `[a, b, c]` is `counts` of [steps, layers, experts] or `ids` of [tokens, layers, top_k].

    Null where it may be either. Ids are whole, below MAX_GUESSED, and all different for one token and layer. The counts
    of a step add up to the same in every layer, or nearly where some are lost; ids do so in a few tokens by chance.
    """
    if array.ndim != 3 or array.dtype.kind not in "iu" or array.shape[2] > MAX_TOP_K or not array.size:
        return "counts"
    ids = array[:, ~_constant_layers(array)]
    if not ids.size or ids.min() < -1 or ids.max() >= MAX_GUESSED:
        return "counts"
    ranked = np.sort(ids, axis=2)
    if ((np.diff(ranked, axis=2) == 0) & (ranked[:, :, 1:] >= 0)).any():
        return "counts"
    if ids.min() == -1:
        return "ids"
    sums = ids.sum(axis=2, dtype=np.float64)
    if ids.shape[1] == 1:
        return "counts" if len(sums) == 1 or (np.diff(sums[:, 0]) == 0).mean() > 0.5 else None
    spread = sums.std(axis=1) / np.maximum(sums.mean(axis=1), 1)
    if not spread.any():
        return "counts"
    return "ids" if np.median(spread) > LEAST_SPREAD and sums.size >= LEAST_ROWS else None


def _constant_layers(ids: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Which layers hold only zeros, while others do not: engines leave a place for dense layers and never fill it."""
    zero: NDArray[np.bool_] = ~np.asarray(ids.any(axis=(0, 2)))
    impossible = ids.shape[2] > 1 or (len(ids) >= LEAST_ROWS and not zero.all())
    return zero if impossible else np.zeros_like(zero)


def ids_of(name: str, array: NDArray[np.generic]) -> NDArray[np.signedinteger]:
    """Ids `[token, layer, slot]` of an array with these axes, without the layer, or with requests before them."""
    if array.dtype.kind not in "iu" or not 2 <= array.ndim <= 4 or not array.size:
        raise InputError(
            f"{name}: found {array.dtype} in {array.ndim} dimensions, expected expert ids [tokens, layers, top_k]"
        )
    shape = (len(array), 1, array.shape[1]) if array.ndim == 2 else (-1, *array.shape[-2:])
    if array.max() >= MAX_EXPERTS or array.min() < -1:
        wrong = array.max() if array.max() >= MAX_EXPERTS else array.min()
        raise InputError(f"{name}: {wrong} is no expert id, expected 0 to {MAX_EXPERTS - 1}, or -1 for none")
    return array.reshape(shape).astype(np.int64 if array.dtype.itemsize > 4 else np.int32, copy=False)


def draft_of_ids(
    name: str,
    ids: NDArray[np.signedinteger],
    hints: Hints,
    notes: tuple[str, ...] = (),
    step_of: NDArray[np.int64] | None = None,
    n_experts: int | None = None,
) -> Draft:
    """What tokens selected, `ids[token, layer, slot]` with -1 for no selection, as loads by step.

    `step_of[token]` ascends; without it a step is `hints.step_tokens` tokens. Ids from n_experts on are left out and
    noted where they can be fused shared experts, which every token uses. Layers of zeros alone are dense layers. Raises
    InputError for no selection at all, and for other ids from n_experts on.
    """
    real = (ids >= 0).any(axis=(1, 2))
    if not real.all():
        ids = ids[real]
        step_of = None if step_of is None else step_of[real]
    if not ids.size:
        raise InputError(f"{name} holds no selected expert")
    n_tokens, n_layers = ids.shape[:2]
    n_experts = n_experts or hints.n_experts
    if n_experts is None:
        n_experts = int(ids.max()) + 1
        notes += (f"the number of experts is not in the file; the largest id makes it {n_experts}",)
    if ids.max() >= n_experts + MAX_SHARED:
        raise InputError(f"{name} names expert {ids.max()}, expected 0 to {n_experts - 1}")
    steps = np.arange(n_tokens) // hints.step_tokens if step_of is None else step_of
    shape = (int(steps[-1]) + 1, n_layers, n_experts)
    if np.prod(shape, dtype=np.float64) > MAX_SIZE:
        raise InputError(f"{name} would be {shape[0]} steps of {n_layers} x {n_experts} counts; take longer steps")
    loads, n_selected, n_outside, n_twice = _counted(ids, steps, shape)
    numbers = np.unique(n_selected[:, loads.any(axis=(0, 2))])
    top_k = int(numbers[0]) if len(numbers) == 1 else None
    if n_outside and top_k is None:  # shared experts are used by every token, as often by one as by another
        raise InputError(f"{name} names expert {ids.max()}, expected 0 to {n_experts - 1}")
    if n_outside:
        notes += (
            f"{n_outside} selections of ids from {n_experts} on are left out: fused shared experts are recorded as if "
            "they were routed",
        )
    if n_twice:
        notes += (f"{n_twice} times a token names an expert twice, which a router does not",)
    if top_k is None:
        notes += ("tokens select different numbers of experts, so top-k and the tokens of a step are unknown",)
    tokens = None if top_k is None else np.bincount(steps, minlength=shape[0])
    layers = np.arange(n_layers, dtype=np.int64)
    return Draft(loads, layers, top_k, tokens, True, notes, has_dense_layers=True)


def _counted(
    ids: NDArray[np.signedinteger], steps: NDArray[np.signedinteger], shape: tuple[int, int, int]
) -> tuple[Loads, NDArray[np.uint16], int, int]:
    """Loads `[step, layer, expert]`, experts selected `[token, layer]`, ids beyond the experts, and repeated ids."""
    n_tokens, n_layers, n_slots = ids.shape
    n_experts = shape[2]
    loads, n_selected = np.zeros(shape), np.empty((n_tokens, n_layers), dtype=np.uint16)
    dense = _constant_layers(ids)
    n_outside = n_twice = 0
    block = max(1, BLOCK // (n_layers * n_slots))
    for start in range(0, n_tokens, block):
        part = np.where(dense[:, None], -1, ids[start : start + block])
        of_step = steps[start : start + block]
        counted = (part >= 0) & (part < n_experts)
        n_selected[start : start + block] = counted.sum(axis=2)
        n_outside += int((part >= n_experts).sum())
        ranked = np.sort(part, axis=2)
        n_twice += int(((np.diff(ranked, axis=2) == 0) & (ranked[:, :, 1:] >= 0)).any(axis=2).sum())
        rows = (of_step - of_step[0])[:, None] * n_layers + np.arange(n_layers)
        places = (rows[:, :, None] * n_experts + part)[counted]
        of_block = slice(int(of_step[0]), int(of_step[-1]) + 1)
        size = (of_block.stop - of_block.start) * n_layers * n_experts
        loads[of_block] += np.bincount(places, minlength=size).reshape(-1, n_layers, n_experts)
    return loads, n_selected, n_outside, n_twice

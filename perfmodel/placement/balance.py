"""Experts spread over several GPUs: maps of experts to GPUs, simple rules that make them, and how even they are.

Loads are token-expert assignments, `[step, layer, expert]` or, summed over steps, `[layer, expert]`. numpy only.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .problem import Array

Index = NDArray[np.int64]


NO_SLOT = -1  # what engines expect in `log2phy` where an expert has fewer copies than another


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """Which GPU holds which expert: `phy2log[layer, slot]` is the expert in a slot of memory, `copy_of[layer, slot]`
    the number of the copy, from 0, `gpu_of[layer, slot]` the GPU of the slot. Copies share their tokens evenly."""

    policy: str
    n_gpus: int
    phy2log: Index
    copy_of: Index
    gpu_of: Index

    @property
    def logcnt(self) -> Index:
        """How many copies each expert has, `[layer, expert]`."""
        counts = np.zeros((len(self.phy2log), int(self.phy2log.max()) + 1), dtype=np.int64)
        np.add.at(counts, (np.arange(len(counts))[:, None], self.phy2log), 1)
        return counts

    @property
    def log2phy(self) -> Index:
        """The slot of each copy of each expert, `[layer, expert, copy]`, -1 beyond its copies (the engines' format)."""
        counts = self.logcnt
        found = np.full((*counts.shape, int(counts.max())), NO_SLOT, dtype=np.int64)
        found[np.arange(len(counts))[:, None], self.phy2log, self.copy_of] = np.arange(self.phy2log.shape[1])
        return found

    @property
    def shares(self) -> Array:
        """The share of each expert's tokens that each GPU computes, `[layer, expert, gpu]`, summing to 1 over GPUs."""
        counts = self.logcnt
        shares = np.zeros((*counts.shape, self.n_gpus))
        np.add.at(shares, (np.arange(len(counts))[:, None], self.phy2log, self.gpu_of), 1.0)
        return np.asarray(shares / counts[:, :, None])

    @property
    def is_even(self) -> bool:
        """Whether every GPU has equally many slots, one GPU's after the other's, as serving engines number them."""
        n_slots = self.phy2log.shape[1]
        return n_slots % self.n_gpus == 0 and bool((self.gpu_of == _gpus_in_turn(n_slots, self.n_gpus)).all())

    def tokens(self, loads: Array) -> Array:
        """Assignments that each GPU computes, `[step, layer, gpu]`, of loads `[step, layer, expert]`."""
        return np.asarray(np.matmul(loads.swapaxes(0, 1), self.shares).swapaxes(0, 1))


def map_of(policy: str, gpu_of_expert: Index, n_gpus: int) -> ExpertMap:
    """The map in which GPU `gpu_of_expert[layer, expert]` holds each expert once; a GPU's experts ascend."""
    slots = np.argsort(gpu_of_expert, axis=1, kind="stable")
    return ExpertMap(policy, n_gpus, slots, np.zeros_like(slots), np.take_along_axis(gpu_of_expert, slots, axis=1))


def map_of_slots(policy: str, phy2log: Index, copy_of: Index, n_gpus: int) -> ExpertMap:
    """The map of slots that are numbered one GPU's after the other's, equally many on each."""
    gpu_of = np.broadcast_to(_gpus_in_turn(phy2log.shape[1], n_gpus), phy2log.shape)
    return ExpertMap(policy, n_gpus, phy2log, copy_of, gpu_of)


def _gpus_in_turn(n_slots: int, n_gpus: int) -> Index:
    return np.arange(n_slots, dtype=np.int64) // max(n_slots // n_gpus, 1)


def require_even(n_experts: int, n_gpus: int) -> None:
    """Raises InputError unless every GPU can hold equally many experts."""
    if n_gpus < 1 or n_experts % n_gpus:
        raise InputError(f"{n_experts} experts cannot be shared evenly by {n_gpus} GPUs, expected a divisor")


def linear(n_layers: int, n_experts: int, n_gpus: int) -> ExpertMap:
    """Experts in their own order, the first E / G on the first GPU and so on: what serving engines do unless told."""
    require_even(n_experts, n_gpus)
    return map_of("linear", np.tile(_gpus_in_turn(n_experts, n_gpus), (n_layers, 1)), n_gpus)


def round_robin(n_layers: int, n_experts: int, n_gpus: int) -> ExpertMap:
    """Expert e on GPU e mod G."""
    require_even(n_experts, n_gpus)
    return map_of("round-robin", np.tile(np.arange(n_experts, dtype=np.int64) % n_gpus, (n_layers, 1)), n_gpus)


def longest_first(
    weights: Array, n_packs: int, n_most: int | None = None, speeds: Array | None = None
) -> tuple[Index, Index]:
    """The pack that each item goes to and its number there, both `[row, item]`: heaviest item first, each to the pack
    that would finish it earliest, of equal ones the first; no pack takes more than `n_most` items (null: no limit).

    Longest processing time first (Graham 1969), on machines of different `speeds[pack]` where given. Rows are
    independent. Items of equal weight keep their order.
    """
    n_rows, n_items = weights.shape
    per_unit = np.ones(n_packs) if speeds is None else 1.0 / speeds
    held, n_held = np.zeros((n_rows, n_packs)), np.zeros((n_rows, n_packs), dtype=np.int64)
    pack_of, number = np.empty((2, n_rows, n_items), dtype=np.int64)
    rows = np.arange(n_rows)
    for item in np.argsort(-weights, axis=1, kind="stable").T:
        weight = weights[rows, item]
        finish = (held + weight[:, None]) * per_unit
        pack = np.where(n_held < (n_items if n_most is None else n_most), finish, np.inf).argmin(axis=1)
        pack_of[rows, item], number[rows, item] = pack, n_held[rows, pack]
        held[rows, pack] += weight
        n_held[rows, pack] += 1
    return pack_of, number


def token_balanced(loads: Array, n_gpus: int, *, is_even: bool = True, speeds: Array | None = None) -> ExpertMap:
    """Longest first by tokens, `loads[layer, expert]`: with equally many experts on every GPU, or as many as they are
    where `is_even` is false. With even experts this is EPLB without copies or groups."""
    n_experts = loads.shape[1]
    if is_even:
        require_even(n_experts, n_gpus)
    pack_of, _ = longest_first(loads, n_gpus, n_experts // n_gpus if is_even else None, speeds)
    return map_of("lpt" if is_even else "lpt-free", pack_of, n_gpus)


def imbalance(tokens: Array) -> float:
    """The busiest GPU's tokens over the mean of all, mean over steps and layers of `[step, layer, gpu]` with tokens."""
    mean = tokens.mean(axis=2)
    return float((tokens.max(axis=2)[mean > 0] / mean[mean > 0]).mean())

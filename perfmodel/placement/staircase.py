"""How long each GPU takes for a number of tokens: a staircase, for kernels compute whole tiles. numpy at import.

After GEM (arXiv 2605.19945): each GPU is timed at the boundaries of tiles only. Tokens are token-expert assignments.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from perfmodel.errors import InputError

from .balance import Index
from .problem import Array

TAIL_RATIO = 1.02  # between counts beyond the last boundary that is timed itself: no step hides a larger difference
N_TILES = 64  # boundaries that are timed one by one, ours; beyond them one more tile is at most 1.6 % of the time
MAX_LISTED = 2**20  # counts whose steps are looked up, not searched
ROUNDING = 1e-6  # of assignments: shares of copies may add up to a hair above a whole number
SPREAD_IN_NODE_FRAC, SPREAD_IN_FLEET_FRAC = 0.077, 0.277  # of throughput: 8 L40s of a node, 128 L40s (GEM)


@dataclass(frozen=True, eq=False)
class Staircase:
    """Time of a layer's experts on each GPU, `ns[gpu, step]`: that of up to `boundaries[step]` assignments and more
    than the step before it. No assignments take no time, and more than the last boundary, where nothing was timed, an
    infinite one. Raises InputError for boundaries that do not ascend from above zero, and for times that are not
    positive or fall with more tokens."""

    boundaries: Index
    ns: Array

    def __post_init__(self) -> None:
        if self.ns.ndim != 2 or self.ns.shape[1:] != self.boundaries.shape or not self.ns.size:
            raise InputError(
                f"a staircase has times of shape {self.ns.shape} at {self.boundaries.shape} boundaries, expected "
                "[gpus, boundaries]"
            )
        if self.boundaries[0] <= 0 or (np.diff(self.boundaries) <= 0).any():
            raise InputError("the token counts of a staircase do not ascend from above zero")
        if not (np.isfinite(self.ns) & (self.ns > 0)).all() or (np.diff(self.ns, axis=1) < 0).any():
            raise InputError("the times of a staircase are not positive, or fall with more tokens")

    @property
    def n_gpus(self) -> int:
        """How many GPUs it knows."""
        return len(self.ns)

    @property
    def spreads(self) -> Array:
        """How much faster than the slowest GPU the fastest is at each boundary: max / min of throughput, less 1."""
        return np.asarray(self.ns.max(axis=0) / self.ns.min(axis=0) - 1)

    @cached_property
    def _levels(self) -> Array:
        """The times between none for no assignments and infinity beyond the last step, `[gpu, 1 + step + 1]`."""
        ends = np.zeros((self.n_gpus, 1)), np.full((self.n_gpus, 1), np.inf)
        return np.concatenate([ends[0], self.ns, ends[1]], axis=1)

    @cached_property
    def _level_at(self) -> Index:
        """The level of every whole number of assignments up to MAX_LISTED: a search asks often."""
        return self._searched(np.arange(min(int(self.boundaries[-1]), MAX_LISTED) + 1))

    def _searched(self, whole: Index) -> Index:
        return np.asarray(np.searchsorted(self.boundaries, whole, side="left") + (whole > 0), dtype=np.int64)

    def _level(self, tokens: Array) -> Index:
        whole = np.ceil(tokens - ROUNDING).astype(np.int64)  # boundaries are whole
        if whole.max(initial=0) < len(self._level_at):
            return np.asarray(self._level_at[np.maximum(whole, 0)])
        return self._searched(whole)

    def of(self, tokens: Array) -> Array:
        """The time of each GPU, ns `[..., gpu]`, for assignments of the same shape."""
        return np.asarray(self._levels[np.arange(self.n_gpus), self._level(tokens)])

    def of_gpu(self, gpu: int | Index, tokens: Array) -> Array:
        """The time of one GPU, or of `gpu[...]`, ns, for assignments of any shape that this has or broadcasts to."""
        return np.asarray(self._levels[gpu, self._level(tokens)])

    def at_speeds(self, speeds: Array) -> "Staircase":
        """The staircases of GPUs that run at `speeds[gpu]` times the speed of this one GPU, or of these."""
        return replace(self, ns=self.ns / speeds[:, None])


def token_counts(n_most: int, tile_rows: int, n_tiles: int = N_TILES, tail_ratio: float = TAIL_RATIO) -> Index:
    """The numbers of assignments to time a GPU at: the first `n_tiles` tile boundaries, then boundaries that each lie
    `tail_ratio` beyond the one before, up to the first that covers `n_most`.

    Below the first boundary stand powers of two (ours): there no tile fills, but each assignment may wake an expert.
    Raises InputError for a tile or an end below 1.
    """
    if n_most < 1 or tile_rows < 1:
        raise InputError(f"counts up to {n_most} in tiles of {tile_rows} rows, expected at least 1 of each")
    last = -(-n_most // tile_rows)
    tiles = list(range(1, min(n_tiles, last) + 1))
    while tiles[-1] < last:
        tiles.append(min(max(int(tiles[-1] * tail_ratio), tiles[-1] + 1), last))
    few = [2**i for i in range((tile_rows - 1).bit_length())]
    return np.array([*few, *(tile * tile_rows for tile in tiles)], dtype=np.int64)


def saved_frac(counts: Index) -> float:
    """The share of runs that timing at these counts saves against timing at every one up to the last."""
    return 1.0 - len(counts) / float(counts[-1])


def spread_speeds(n_gpus: int, spread_frac: float) -> Array:
    """Speeds of GPUs from 1 down to 1 / (1 + spread), evenly apart: emulated variability (evenness is ours)."""
    if spread_frac < 0:
        raise InputError(f"the spread of speeds is {spread_frac:g}, expected at least 0")
    return np.linspace(1.0, 1.0 / (1.0 + spread_frac), n_gpus)

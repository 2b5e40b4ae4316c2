"""A recording of what a router did: loads of experts by step and layer, with what is known of them. numpy only."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .patterns import Shares

Loads = NDArray[np.float64]
MAX_LOAD = 1e18


@dataclass(frozen=True, eq=False)
class Recording:
    """How much each expert was used: `loads[step, layer, expert]`, token-expert assignments or weights like them.

    `layers[layer]` is the place of each MoE layer in its model. `top_k` and `n_tokens[step]` are null where the source
    does not say them; where both are known each step and layer sums to their product. `is_ordered` is whether
    steps follow each other in time. `notes` say in words what reading left out or changed. Raises InputError for loads
    that are negative, not finite, or zero in all steps of a layer.
    """

    name: str
    loads: Loads
    layers: NDArray[np.int64]
    top_k: int | None = None
    n_tokens: NDArray[np.int64] | None = None
    is_ordered: bool = True
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.loads.ndim != 3 or not self.loads.size:
            raise InputError(f"{self.name}: loads of shape {self.loads.shape}, expected [steps, layers, experts]")
        if not ((self.loads >= 0) & (self.loads <= MAX_LOAD)).all():
            raise InputError(f"{self.name}: counts must be 0 to {MAX_LOAD:g}, and not all zero in a layer")
        if len(self.layers) != self.loads.shape[1]:
            raise InputError(f"{self.name}: {len(self.layers)} layers are named, the loads have {self.loads.shape[1]}")
        if not self.loads.any(axis=(0, 2)).all():
            empty = self.layers[~self.loads.any(axis=(0, 2))]
            raise InputError(f"{self.name}: counts must be 0 to {MAX_LOAD:g}, and not all zero in a layer: {empty[0]}")
        if self.n_tokens is not None and self.top_k is not None:
            off = self.loads.sum(axis=2) != (self.n_tokens * self.top_k)[:, None]
            if off.any():
                step, layer = np.argwhere(off)[0]
                raise InputError(
                    f"{self.name}: step {step} of layer {self.layers[layer]} sums to {self.loads[step, layer].sum():g} "
                    f"assignments, expected tokens x top-k = {self.n_tokens[step] * self.top_k}"
                )

    @property
    def shares(self) -> Shares:
        """The share of each expert in all assignments of its layer, `[layer, expert]`, each row summing to 1."""
        sums = self.loads.sum(axis=0)
        shares: Shares = sums / sums.sum(axis=1, keepdims=True)
        return shares

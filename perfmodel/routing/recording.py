"""A recording of what a router did: loads of experts by step and layer, with what is known of them. numpy only.

`Draft` is what readers of files make of them: a recording whose idle layers are still there, because a layer is chosen
by its place in the file.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .patterns import Shares

Loads = NDArray[np.float64]
MAX_LOAD = 1e18
MAX_WHOLE = 2.0**53  # whole numbers beyond it are not all different in float64


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


KINDS = ("counts", "ids")
PHASES = ("prefill", "decode")
STEP_TOKENS = 512


@dataclass(frozen=True)
class Hints:
    """What a user knows of a file that the file may not say; null where it is left to the file.

    `n_layers` counts all layers of the model, `kind` says what whole numbers are and `phase` which forward passes
    count; both are one of KINDS and PHASES. Raises InputError for other words and for numbers below 1.
    """

    n_experts: int | None = None
    top_k: int | None = None
    n_layers: int | None = None
    step_tokens: int = STEP_TOKENS
    kind: str | None = None
    phase: str | None = None

    def __post_init__(self) -> None:
        for field in ("n_experts", "top_k", "n_layers", "step_tokens"):
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{field} is {value!r}, expected a whole number of at least 1")
        for field, known in (("kind", KINDS), ("phase", PHASES)):
            if getattr(self, field) not in (None, *known):
                raise InputError(f"{field} is {getattr(self, field)!r}, expected {' or '.join(known)}")


@dataclass(frozen=True, eq=False)
class Draft:
    """`loads[step, layer, expert]` and the rest of a `Recording`, with layers that may be idle.

    `has_dense_layers` is whether the file has a row for every layer of the model, so that idle ones are expected;
    `phase` the one of PHASES that alone was read, null for all.
    """

    loads: Loads
    layers: NDArray[np.int64]
    top_k: int | None = None
    n_tokens: NDArray[np.int64] | None = None
    is_ordered: bool = True
    notes: tuple[str, ...] = ()
    has_dense_layers: bool = False
    phase: str | None = None


def loads_of(name: str, array: NDArray[np.generic]) -> Loads:
    """Loads `[step, layer, expert]` of an array of counts with one to three of these axes, the last ones."""
    if not array.size:
        raise InputError(f"{name} holds no numbers: its shape is {array.shape}")
    if array.dtype.kind not in "iuf" or not 1 <= array.ndim <= 3:
        found = "float64" if array.dtype.kind in "iuf" else array.dtype
        raise InputError(f"{name}: found {found} in {array.ndim} dimensions, expected counts [layers, experts]")
    loads = array.astype(np.float64)
    if not ((loads >= 0) & (loads <= MAX_LOAD)).all():
        raise InputError(f"{name}: counts must be 0 to {MAX_LOAD:g}, and not all zero in a layer")
    return loads.reshape((1,) * (3 - loads.ndim) + loads.shape)


def tokens_of(loads: Loads, top_k: int) -> NDArray[np.int64] | None:
    """The tokens of each step, where all layers agree on a whole number of them; null otherwise."""
    sums = loads.sum(axis=2)
    n_tokens: Loads = sums[:, 0] / top_k
    if (sums != sums[:, :1]).any() or (n_tokens != np.floor(n_tokens)).any() or (sums > MAX_WHOLE).any():
        return None
    return np.asarray(n_tokens, dtype=np.int64)

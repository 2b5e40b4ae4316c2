"""What a placement policy is asked and what it answers: loads, sizes and capacity; a tier for each expert."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.routing import Counts, Shares

# Where an expert is and who computes it: in device memory; in host memory and copied to the device before the device
# computes it; computed by the host's CPU; inside the memory modules that hold it; read by the device in place.
TIERS = ("resident", "copied", "host", "near-data", "in-place")
RESIDENT, COPIED, ON_HOST, NEAR_DATA, IN_PLACE = range(len(TIERS))
OFFLOADED = 1  # of policies that only know device memory and the rest

Loads = Counts | Shares  # how much each expert is used, `[layer, expert]`
Tiers = NDArray[np.integer]  # numbers of TIERS
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Placement:
    """The tier of each expert, `tier[layer, expert]`: 0 device memory, any other number host memory (see TIERS)."""

    policy: str
    tier: Tiers

    @property
    def offloaded(self) -> NDArray[np.bool_]:
        """Which experts are not in device memory, `[layer, expert]`."""
        return np.asarray(self.tier != RESIDENT)

    @property
    def n_offloaded(self) -> int:
        """How many experts over all layers are not in device memory."""
        return int(self.offloaded.sum())


@dataclass(frozen=True, eq=False)
class Problem:
    """What a policy may know.

    `load[layer, expert]` is the long-run share of each expert in its layer, each row summing to 1 (counts of layers
    that saw the same tokens rank alike); `size_bytes[layer, expert]` its weights; `capacity_bytes` the device memory
    for experts of all layers together, `layer_capacity_bytes` that of each layer by itself (null: only all together
    count). `seed` is for policies that draw. Raises InputError for shapes that differ, loads below 0, sizes of 0 or
    less, and capacities that are not finite or below 0.
    """

    load: Loads
    size_bytes: NDArray[np.float64]
    capacity_bytes: float
    layer_capacity_bytes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.load.ndim != 2 or self.load.shape != self.size_bytes.shape:
            raise InputError(
                f"placement: loads of shape {self.load.shape} and sizes of shape {self.size_bytes.shape}, expected "
                "both [layer, expert]"
            )
        for words, is_right in (
            ("finite loads of at least 0", np.isfinite(self.load).all() and (self.load >= 0).all()),
            ("finite sizes above 0 bytes", np.isfinite(self.size_bytes).all() and (self.size_bytes > 0).all()),
            ("a finite capacity of at least 0 bytes", 0 <= self.capacity_bytes < np.inf),
            ("a finite capacity of a layer of at least 0 bytes", 0 <= (self.layer_capacity_bytes or 0.0) < np.inf),
        ):
            if not is_right:
                raise InputError(f"placement: expected {words}")


Policy = Callable[[Problem], Tiers]  # RESIDENT or OFFLOADED, `[layer, expert]`

"""Where each expert lives, and policies that decide it: functions on arrays, each with its source."""

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


@dataclass(frozen=True)
class Placement:
    """The tier of each expert, `tier[layer, expert]`: 0 device memory, any other number host memory (see TIERS)."""

    policy: str
    tier: NDArray[np.int8]

    @property
    def offloaded(self) -> NDArray[np.bool_]:
        """Which experts are not in device memory, `[layer, expert]`."""
        return np.asarray(self.tier != RESIDENT)

    @property
    def n_offloaded(self) -> int:
        """How many experts over all layers are not in device memory."""
        return int(self.offloaded.sum())


Loads = Counts | Shares  # how much each expert is used, `[layer, expert]`; only the order matters to these policies
Policy = Callable[[Loads, int], NDArray[np.int8]]


def _first_in(order: NDArray[np.int64], n_offloaded: int) -> NDArray[np.int8]:
    tier = np.zeros(order.shape, dtype=np.int8)
    np.put_along_axis(tier, order[:, :n_offloaded], OFFLOADED, axis=1)
    return tier


def ascending(load: Loads, n_offloaded: int) -> NDArray[np.int8]:
    """Offload the least used experts of each layer first; ties go to the higher index (ISC 2026 poster)."""
    n_experts = load.shape[1]
    return _first_in(n_experts - 1 - np.argsort(load[:, ::-1], axis=1, kind="stable"), n_offloaded)


def descending(load: Loads, n_offloaded: int) -> NDArray[np.int8]:
    """Offload the most used experts first: the worst a placement can do, to compare with."""
    return _first_in(np.argsort(-load, axis=1, kind="stable"), n_offloaded)


def random(load: Loads, n_offloaded: int) -> NDArray[np.int8]:
    """Offload experts drawn at random (seed 0), independently per layer."""
    return _first_in(np.argsort(np.random.default_rng(0).random(load.shape), axis=1), n_offloaded)


POLICIES: dict[str, Policy] = {"ascending": ascending, "descending": descending, "random": random}


def n_offloaded_of(offload_frac: float, n_experts: int) -> int:
    """How many experts of a layer a fraction means, to the nearest whole expert; refuses a fraction outside 0 to 1."""
    if not 0 <= offload_frac <= 1:
        raise InputError(f"offloaded fraction is {offload_frac:g}, expected 0 to 1")
    return int(np.floor(offload_frac * n_experts + 0.5))


def place(load: Loads, offload_frac: float, policy: str = "ascending") -> Placement:
    """The placement a policy gives when a fraction of each layer's experts must leave device memory."""
    if policy not in POLICIES:
        raise InputError(f"unknown placement policy {policy!r}; known: {', '.join(POLICIES)}")
    return Placement(policy, POLICIES[policy](load, n_offloaded_of(offload_frac, load.shape[1])))

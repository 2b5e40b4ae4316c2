"""Where each expert lives, and policies that decide it: functions on arrays, each with its source.

`problem` is what a policy is asked and answers, `static` policies that decide once, `dispatch` those that decide at
each step who computes what is not resident. `optimal` looks for the best placement by `costs` within `memory`; `budget`
says how many experts fit. `balance`, `eplb` and `gem` spread experts over GPUs of given `staircase`s. `files` and
`export` write placements.
"""

import numpy as np

from perfmodel.errors import InputError

from .problem import (
    COPIED,
    IN_PLACE,
    NEAR_DATA,
    OFFLOADED,
    ON_HOST,
    RESIDENT,
    TIERS,
    Loads,
    Placement,
    Policy,
    Problem,
    Tiers,
)
from .static import POLICIES

__all__ = [
    "COPIED",
    "IN_PLACE",
    "NEAR_DATA",
    "OFFLOADED",
    "ON_HOST",
    "POLICIES",
    "RESIDENT",
    "TIERS",
    "Loads",
    "Placement",
    "Policy",
    "Problem",
    "Tiers",
    "n_offloaded_of",
    "place",
    "policy_of",
]


def policy_of(name: str) -> Policy:
    """The static policy of a name; raises InputError with the known ones."""
    if name not in POLICIES:
        raise InputError(f"unknown placement policy {name!r}; known: {', '.join(POLICIES)}")
    return POLICIES[name]


def n_offloaded_of(offload_frac: float, n_experts: int) -> int:
    """How many experts of a layer a fraction means, to the nearest whole expert; refuses a fraction outside 0 to 1."""
    if not 0 <= offload_frac <= 1:
        raise InputError(f"offloaded fraction is {offload_frac:g}, expected 0 to 1")
    return int(np.floor(offload_frac * n_experts + 0.5))


def place(load: Loads, offload_frac: float, policy: str = "ascending") -> Placement:
    """The placement a policy gives when a fraction of each layer's experts must leave device memory."""
    decide = policy_of(policy)
    n_layers, n_experts = load.shape
    n_kept = n_experts - n_offloaded_of(offload_frac, n_experts)
    return Placement(policy, decide(Problem(load, np.ones(load.shape), n_layers * n_kept, n_kept)))

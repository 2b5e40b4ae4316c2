"""How GPUs reach each other: latency and bandwidth of links inside a node and between nodes (alpha + beta x bytes)."""

from dataclasses import dataclass

import numpy as np

from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile, hardware, names
from perfmodel.physics import Array
from perfmodel.text import NS_PER_S

# What an all-to-all reaches of a link's nominal rate where no reached rate is known. Assumed; docs/schedule.md.
LINK_FRAC = 0.8
INSIDE_ALPHA_NS, BETWEEN_ALPHA_NS = 2_000.0, 5_000.0  # assumed: a put over NVLink, a message over InfiniBand


@dataclass(frozen=True)
class Link:
    """One GPU's way to others: `alpha_ns` until a message's first byte arrives, `bytes_per_s` one way, and on which
    quantities of the profile that rests."""

    alpha_ns: float
    bytes_per_s: float
    from_keys: tuple[str, ...] = ()

    @property
    def ns_per_byte(self) -> float:
        """The beta of a message."""
        return NS_PER_S / self.bytes_per_s


@dataclass(frozen=True)
class Fabric:
    """`n_gpus` GPUs, `gpus_per_node` of them in each node, in order; the links of a GPU inside its node and to others
    (null in one node). Switched: every GPU sends and receives at its full rate whatever the others do."""

    n_gpus: int
    gpus_per_node: int
    inside: Link
    between: Link | None = None

    def __post_init__(self) -> None:
        if self.n_gpus < 1 or self.gpus_per_node < 1:
            raise InputError(f"{self.n_gpus} GPUs, {self.gpus_per_node} in a node, expected at least 1 of each")
        if self.n_gpus > self.gpus_per_node and (self.between is None or self.n_gpus % self.gpus_per_node):
            raise InputError(
                f"{self.n_gpus} GPUs in nodes of {self.gpus_per_node}: expected whole nodes, and a machine with a "
                "network between nodes (net_link_peak_bytes_per_s)"
            )

    @property
    def is_inside(self) -> Array:
        """1 where two GPUs are in one node, `[GPU, GPU]`."""
        node = np.arange(self.n_gpus) // self.gpus_per_node
        return np.asarray((node[:, None] == node).astype(np.float64))


def fabric_of(profile: HardwareProfile, n_gpus: int, gpus_per_node: int | None = None) -> Fabric:
    """The links of `n_gpus` machines of a profile, `gpus_per_node` in a node (null: all in one).

    Raises InputError where a profile has no peer link, and for several nodes without a network between them.
    """
    per_node = n_gpus if gpus_per_node is None else min(gpus_per_node, n_gpus)
    if n_gpus == 1:
        return Fabric(1, 1, Link(0.0, np.inf))
    between = None
    if n_gpus > per_node:
        between = _link(profile, "net_link", BETWEEN_ALPHA_NS)
    # With one GPU in each node there is nobody inside to talk to.
    inside = Link(0.0, np.inf) if per_node == 1 else _link(profile, "peer_link", INSIDE_ALPHA_NS)
    return Fabric(n_gpus, per_node, inside, between)


def _link(profile: HardwareProfile, which: str, alpha_ns: float) -> Link:
    rate = profile.first(f"{which}_all_to_all_bytes_per_s", f"{which}_peak_bytes_per_s")
    if rate is None:
        able = [name for name in names() if hardware(name).first(f"{which}_peak_bytes_per_s")]
        raise InputError(
            f"hardware {profile.name!r} has no {which}_peak_bytes_per_s, needed to reach other GPUs; shipped machines "
            f"that have: {', '.join(able)}, and a .toml file of your own can"
        )
    alpha = profile.first(f"{which}_alpha_ns")
    keys = (rate[0],) if alpha is None else (rate[0], alpha[0])
    reached = rate[1].value * (LINK_FRAC if "_peak_" in rate[0] else 1.0)
    return Link(alpha_ns if alpha is None else alpha[1].value, reached, keys)

"""What is asked of an expert-parallel layer: machine, model, routing, GPUs, tokens, what is offloaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from perfmodel.hardware import HardwareProfile
from perfmodel.latency import LatencyModel
from perfmodel.moe import MoEShape
from perfmodel.placement import place
from perfmodel.placement.balance import ExpertMap, linear
from perfmodel.predict import Settings, basis_of
from perfmodel.routing import Routing, Shares

from . import layer_timeline
from .costs import LAYER, Layer
from .fabric import fabric_of
from .overheads import DEFAULTS, Overheads
from .timeline import LayerTimeline
from .traffic import traffic_from_shares


@dataclass(frozen=True, eq=False)
class Question:
    """One MoE layer on `n_gpus` GPUs of a kind with `tokens_per_gpu` tokens each, under the popularity `shares[1,
    expert]` of its experts.

    `expert_map` with its `map_layer` says where experts live (null: the first E / G on the first GPU and so on).
    `gpus_per_node` and `gpus_per_host` are what the machine is described with, at most `n_gpus` (null: as the profile
    says, or all in one node, a host for each). Of each GPU's experts `offload_frac`, least used first, are outside
    device memory and reached by one `access` mode.
    """

    profile: HardwareProfile
    shape: MoEShape
    shares: Shares
    n_gpus: int
    tokens_per_gpu: int
    model: LatencyModel | None = None
    expert_map: ExpertMap | None = None
    map_layer: int = 0
    gpus_per_node: int | None = None
    gpus_per_host: int | None = None
    offload_frac: float = 0.0
    access: str = "zero-copy"
    overheads: Mapping[str, Overheads] = field(default_factory=lambda: dict(DEFAULTS))

    @property
    def n_per_node(self) -> int:
        """GPUs of one node that this layer uses."""
        return min(self.gpus_per_node or _count(self.profile, "n_node_gpus_count", self.n_gpus), self.n_gpus)

    @property
    def n_per_host(self) -> int:
        """GPUs of this layer that share one host's memory and CPU."""
        return min(self.gpus_per_host or _count(self.profile, "n_host_gpus_count", 1), self.n_gpus)

    @property
    def n_hosts(self) -> int:
        """Hosts that the GPUs need."""
        return -(-self.n_gpus // self.n_per_host)

    @cached_property
    def layer(self) -> Layer:
        """The layer that is asked about; raises InputError where machine, map, tokens or access mode do not do."""
        chosen = self.expert_map or linear(1, self.shape.n_experts, self.n_gpus)
        traffic = traffic_from_shares(self.shares, self.shape, chosen, self.tokens_per_gpu, self.map_layer)
        fabric = fabric_of(self.profile, self.n_gpus, self.n_per_node)
        basis = basis_of(shared_host(self.profile, self.n_per_host), self.shape, self.model)
        if not self.offload_frac:
            return Layer(basis, self.shape, traffic, fabric)
        used = self.shares[0] / np.bincount(traffic.expert_of, minlength=self.shape.n_experts)
        by_slot, tier = used[traffic.expert_of], np.zeros(len(traffic.gpu_of), dtype=np.int8)
        for slots in traffic.slots_of:
            tier[slots] = place(by_slot[slots][None], self.offload_frac).tier[0]
        popularity = traffic.at_experts(by_slot)
        known = Routing("", np.zeros(popularity.shape, dtype=np.int64), 0, 1, popularity)
        return Layer(
            basis.reaching(self.access, known, Settings(), LAYER), self.shape, traffic, fabric, tier, self.access
        )

    @cached_property
    def even(self) -> "Question":
        """The same with all experts equally popular."""
        return replace(self, shares=np.full_like(self.shares, 1 / self.shape.n_experts))

    @cached_property
    def _timelines(self) -> dict[str, LayerTimeline]:
        return {}

    def timeline(self, schedule: str) -> LayerTimeline:
        """The layer under a schedule."""
        if schedule not in self._timelines:
            self._timelines[schedule] = layer_timeline(self.layer, schedule, self.overheads[schedule])
        return self._timelines[schedule]

    def latency_ns(self, schedule: str) -> float:
        """The latency of the layer under a schedule."""
        return self.timeline(schedule).latency_ns


def _count(profile: HardwareProfile, key: str, default: int) -> int:
    found = profile.first(key)
    return default if found is None else int(found[1].value)


def shared_host(profile: HardwareProfile, n_gpus: int) -> HardwareProfile:
    """The machine as one of `n_gpus` GPUs of a host has it when all use the host at once: its part of the host's
    memory, bandwidth, CPU and of the memory modules that compute; links to the host are its own."""
    part = {key: replace(q, value=q.value / n_gpus) for key, q in profile.quantities.items() if key.startswith("host_")}
    modules = profile.first("n_ndp_count")
    if modules is not None:
        part["n_ndp_count"] = replace(modules[1], value=max(modules[1].value // n_gpus, 1.0))
    return replace(profile, quantities={**profile.quantities, **part}) if n_gpus > 1 else profile

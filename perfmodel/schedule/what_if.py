"""What an expert-parallel layer costs, and what if: larger batches, more skew, other numbers of GPUs.

docs/schedule.md says what each answer means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from perfmodel import text
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.latency import LatencyModel
from perfmodel.model_memory import ModelMemory
from perfmodel.moe import MoEShape
from perfmodel.offload import rate_keys
from perfmodel.placement import place
from perfmodel.placement.balance import ExpertMap, linear
from perfmodel.placement.budget import expert_budget
from perfmodel.placing.room import N_STAGING
from perfmodel.predict import Settings, basis_of
from perfmodel.routing import Routing, Shares, power_law_shares
from perfmodel.text import NS_PER_S

from . import layer_timeline
from .costs import LAYER, Layer
from .fabric import fabric_of
from .measures import symmetric_buffer_bytes
from .overheads import DEFAULTS, Overheads
from .timeline import LayerTimeline
from .traffic import traffic_from_shares

LAUNCH_FRAC = 0.1  # of a layer, below which launch overhead no longer matters
STRAGGLER_FRAC = 0.5  # of a layer, above which stragglers dominate it
MAX_TOKENS = 2**16  # on a GPU, where the search for a batch ends
MAX_EXPONENT, N_HALVINGS = 10.0, 9  # of the power law that skew is searched along, and how finely: to 0.02


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

    def timeline(self, schedule: str) -> LayerTimeline:
        """The layer under a schedule."""
        return layer_timeline(self.layer, schedule, self.overheads[schedule])

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


def launch_batch(question: Question, schedule: str) -> int | None:
    """Tokens on each GPU from which launches add less than LAUNCH_FRAC to the layer under a schedule; null where that
    is not so up to MAX_TOKENS."""

    def is_hidden(n_tokens: int) -> bool:
        found = replace(question, tokens_per_gpu=n_tokens).timeline(schedule)
        return found.phases["launch"] < LAUNCH_FRAC * found.latency_ns

    high = 1
    while not is_hidden(high):
        high *= 2
        if high > MAX_TOKENS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_hidden(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Skew:
    """A skew of the load: the exponent of its power law of popularity ranks, and rows of the busiest GPU over the mean
    of all."""

    exponent: float
    max_over_mean: float


def max_over_mean(layer: Layer) -> float:
    """Rows that the busiest GPU's experts receive, over the mean of all GPUs."""
    rows = layer.traffic.received.sum(axis=1)
    return float(rows.max() / rows.mean())


def skewed(question: Question, exponent: float) -> Question:
    """The same with a power law of popularity ranks, the order of the experts kept; 0 is even."""
    shares = np.empty_like(question.shares)
    shares[0, np.argsort(-question.shares[0], kind="stable")] = power_law_shares(question.shape.n_experts, exponent)[0]
    return replace(question, shares=shares)


def straggler_frac(question: Question, schedule: str) -> float:
    """The part of the layer that even routing would save: what all GPUs wait for the busiest, or pad for it."""
    return 1 - skewed(question, 0.0).latency_ns(schedule) / question.latency_ns(schedule)


def straggler_skew(question: Question, schedule: str) -> Skew | None:
    """The least skew at which stragglers take more than STRAGGLER_FRAC of the layer; null where none does."""
    even_ns = skewed(question, 0.0).latency_ns(schedule)

    def dominates(exponent: float) -> bool:
        return 1 - even_ns / skewed(question, exponent).latency_ns(schedule) > STRAGGLER_FRAC

    low, high = 0.0, MAX_EXPONENT
    if question.n_gpus == 1 or not dominates(high):
        return None
    for _ in range(N_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if dominates(middle) else (middle, high)
    return Skew(high, max_over_mean(skewed(question, high).layer))


@dataclass(frozen=True)
class Prices:
    """What one GPU and one host with its memory cost, in any one currency, bought or by the hour."""

    per_gpu: float
    per_host: float = 0.0


@dataclass(frozen=True)
class Alternative:
    """The same tokens on another number of GPUs: what is offloaded, latency by schedule (null: it cannot run, and
    `reason` says why), and its price (null: no prices are known)."""

    n_gpus: int
    n_hosts: int
    tokens_per_gpu: int
    offload_frac: float | None
    latency_ns: Mapping[str, float] | None
    price: float | None
    reason: str = ""

    @property
    def fastest(self) -> str | None:
        """The schedule with the least latency; null where none can run."""
        return min(self.latency_ns, key=lambda name: (self.latency_ns or {})[name]) if self.latency_ns else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of all GPUs through this layer in a second, by the fastest schedule; null where none can run."""
        if self.latency_ns is None:
            return None
        return self.n_gpus * self.tokens_per_gpu / min(self.latency_ns.values()) * NS_PER_S

    def to_json(self) -> dict[str, Any]:
        """The alternative as plain values."""
        rate = self.tokens_per_s
        return {
            "n_gpus": self.n_gpus,
            "n_hosts": self.n_hosts,
            "tokens_per_gpu": self.tokens_per_gpu,
            "offload_frac": self.offload_frac,
            "latency_ns": dict(self.latency_ns) if self.latency_ns else None,
            "fastest": self.fastest,
            "tokens_per_s": rate,
            "tokens_per_s_per_gpu": rate / self.n_gpus if rate is not None else None,
            "price": self.price,
            "tokens_per_s_per_price": rate / self.price if rate is not None and self.price is not None else None,
            "reason": self.reason,
        }


def fitting_frac(question: Question, memory: ModelMemory) -> float:
    """The part of each GPU's experts that must leave device memory, every layer alike: whole copies of all other
    weights, workspace and staging slots come first. Raises InputError where no expert fits, or the host has no room for
    what leaves; weights that are not known count as none."""
    one = question.shape
    known = memory if memory.non_expert_bytes is not None else replace(memory, non_expert_bytes=0.0)
    budget = expert_budget(question.profile["memory_capacity_bytes"], one, known, n_staging_experts=N_STAGING)
    n_held = -(-one.n_experts // question.n_gpus)
    if question.expert_map is not None:
        gpu_of = question.expert_map.gpu_of[question.map_layer]
        n_held = int(np.bincount(gpu_of, minlength=question.n_gpus).max())
    n_gone = max(n_held - int(budget.expert_bytes // (one.n_layers * one.expert_bytes)), 0)
    host = question.profile.first("host_capacity_bytes")
    need_bytes = n_gone * one.n_layers * one.expert_bytes * question.n_per_host
    if n_gone and (host is None or host[1].value < need_bytes):
        has = "host memory is not known" if host is None else f"the host has {text.n_bytes(host[1].value)}"
        raise InputError(
            f"{n_gone} of {n_held} experts of a layer must leave each GPU, {text.n_bytes(need_bytes)} for all layers "
            f"and {text.counted(question.n_per_host, 'GPU')} of a host, and {has}"
        )
    return n_gone / n_held


def compare(
    question: Question,
    numbers: Sequence[int],
    schedules: Sequence[str],
    memory: ModelMemory | None,
    prices: Prices | None = None,
) -> list[Alternative]:
    """The tokens of all GPUs together on other numbers of GPUs: `memory` says what fits on each, and the rest of the
    experts is offloaded (null: `offload_frac` of the question everywhere).

    Where a number of GPUs cannot hold the model the alternative says why. Raises InputError for a number that does not
    divide tokens or experts, and with a map, which is made for one number of GPUs.
    """
    if question.expert_map is not None:
        raise InputError("a map of experts is for one number of GPUs: compare numbers of GPUs without it")
    n_all = question.n_gpus * question.tokens_per_gpu
    found = []
    for n_gpus in numbers:
        if n_all % n_gpus:
            raise InputError(f"{n_all} tokens of all GPUs do not divide over {n_gpus} GPUs")
        one = replace(question, n_gpus=n_gpus, tokens_per_gpu=n_all // n_gpus)
        price = None if prices is None else n_gpus * prices.per_gpu + one.n_hosts * prices.per_host
        try:
            frac = question.offload_frac if memory is None else fitting_frac(one, memory)
        except InputError as error:
            found.append(Alternative(n_gpus, one.n_hosts, one.tokens_per_gpu, None, None, price, str(error)))
            continue
        one = replace(one, offload_frac=frac)
        latency_ns = {name: one.latency_ns(name) for name in schedules}
        found.append(Alternative(n_gpus, one.n_hosts, one.tokens_per_gpu, frac, latency_ns, price))
    return found


def cited(question: Question, schedules: Sequence[str]) -> list[str]:
    """What the numbers rest on, in words: rates of the machine with their evidence, and what is assumed."""
    layer, roof = question.layer, question.layer.basis.device.roof
    reached = dict(zip(roof.from_keys, (roof.flops_per_s, roof.bytes_per_s), strict=True))
    begins = []
    for where, link in (("inside a node", layer.fabric.inside), ("between nodes", layer.fabric.between)):
        if link is not None and link.from_keys:
            reached[link.from_keys[0]] = link.bytes_per_s
            is_known = len(link.from_keys) > 1
            source = question.profile.quantities[link.from_keys[1]].source if is_known else "assumed"
            begins.append(f"a message {where} begins after {text.ns(link.alpha_ns)}, {source}")
    if layer.access is not None:
        reached |= {key: layer.basis.device.profile[key] for key in rate_keys(layer.basis.device.profile, layer.access)}
    found = []
    for key, rate in reached.items():
        quantity = question.profile.quantities[key]
        taken = f" x {rate / quantity.value:.2f}" if abs(rate / quantity.value - 1) > 5e-3 else ""
        found.append(f"{key} {text.figure(key, quantity.value)}{taken}, {quantity.kind}: {quantity.source}")
    for name in schedules:
        one, usual = question.overheads[name], DEFAULTS[name]
        source = "arXiv 2506.04667 Table 1" if one.n_launches == usual.n_launches else "as given"
        words = f"{name}: launches {one.n_launches} ({source}), of {text.ns(one.host_launch_ns)} (assumed)"
        words += f"; starting a collective {text.ns(one.collective_ns)} (assumed)" if one.collective_ns else ""
        words += f"; pieces {one.n_chunks}" if name == "chunked" else ""
        words += f"; {text.frac(one.comm_sm_frac)} of processors communicate" if one.comm_sm_frac else ""
        begins.append(words)
    return [*found, *begins]


@dataclass(frozen=True, eq=False)
class Answer:
    """What was asked of a layer and found: timelines, and by schedule the tokens from which launches no longer matter,
    what stragglers take and from which skew on they dominate (null: never).

    `buffer_bytes` is the fused kernel's symmetric buffer on each GPU, `routing` the name of what `shares` came from,
    `reasons` what the numbers rest on.
    """

    question: Question
    routing: str
    timelines: tuple[LayerTimeline, ...]
    launch_batch: Mapping[str, int | None]
    straggler_frac: Mapping[str, float]
    skew: Mapping[str, Skew | None]
    max_over_mean: float
    buffer_bytes: float
    reasons: Sequence[str]
    alternatives: Sequence[Alternative] = ()
    notes: Sequence[str] = ()

    @property
    def speedup_over(self) -> dict[str, float]:
        """How many times as fast as each other schedule the fused one is; empty without it."""
        latency_ns = {one.schedule: one.latency_ns for one in self.timelines}
        fused_ns = latency_ns.pop("fused", None)
        return {} if fused_ns is None else {name: ns / fused_ns for name, ns in latency_ns.items()}


def answer(
    question: Question,
    routing: str,
    schedules: Sequence[str],
    alternatives: Sequence[Alternative] = (),
    notes: Sequence[str] = (),
) -> Answer:
    """Everything that can be said of a layer under these schedules."""
    n_tokens, row_bytes = question.tokens_per_gpu, question.layer.row_bytes
    return Answer(
        question,
        routing,
        tuple(question.timeline(name) for name in schedules),
        {name: launch_batch(question, name) for name in schedules},
        {name: straggler_frac(question, name) for name in schedules},
        {name: straggler_skew(question, name) for name in schedules},
        max_over_mean(question.layer),
        symmetric_buffer_bytes(n_tokens * row_bytes, n_tokens, question.shape.n_experts),
        cited(question, schedules),
        alternatives,
        notes,
    )

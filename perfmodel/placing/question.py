"""A placement problem of one machine, model and routing, and what any placement costs there."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from perfmodel.errors import InputError
from perfmodel.moe import MoEShape
from perfmodel.offload import ACCESS_MODES, TIER_OF, Mask, link_rate, modes_of, placement_costs
from perfmodel.offload.beside import crossing_each_ns, host_each_ns
from perfmodel.offload.device import copy_each_ns
from perfmodel.physics import Array, Work, smooth_value, tiled
from perfmodel.placement import NEAR_DATA, RESIDENT, Placement, Tiers
from perfmodel.placement.costs import Costs, condensed, joined
from perfmodel.placement.dispatch import Steps
from perfmodel.placement.memory import Budget
from perfmodel.predict import Basis, Prediction, Settings, placement_ns, predict_placement, work_of
from perfmodel.routing import Counts, Routing, Shares

from .windows import Batch

N_SEARCHED = 8  # steps that a search goes by: it takes longer with each, and charges are exact up to as many


@dataclass(frozen=True, eq=False)
class Question:
    """Where should the experts of a model live? `access` is one mode or several (see `offload.modes_of`),
    `capacity_bytes` the device memory for the experts of all layers of the batches, `host_bytes` that of the host
    (null: enough). `is_per_layer`: as many experts of each layer may be resident, which some engines need. `seed` is
    for policies that draw, and for the search."""

    basis: Basis
    shape: MoEShape
    access: str
    batches: tuple[Batch, ...]
    capacity_bytes: float
    host_bytes: float | None = None
    op: str = "moe-layer"
    settings: Settings = field(default_factory=Settings)
    is_per_layer: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        n_experts = self.batches[0].fitted.shape[2]
        if n_experts != self.shape.n_experts:
            raise InputError(f"the routing is for {n_experts} experts, {self.shape.name} has {self.shape.n_experts}")

    @property
    def n_layers(self) -> int:
        """Layers that are placed."""
        return int(self.batches[0].fitted.shape[1])

    @property
    def tiers(self) -> tuple[int, ...]:
        """The tiers an expert may be in, numbers of placement.TIERS, device memory first."""
        return (RESIDENT, *(TIER_OF[mode] for mode in modes_of(self.access) if mode in TIER_OF))

    @property
    def popularity(self) -> Shares:
        """The share of each expert in its layer in all steps that decide, `[layer, expert]`, each pass counted as often
        as it is made."""
        n_tokens = [b.n_passes * b.n_tokens for b in self.batches]
        shares: Shares = np.average([b.fitted_shares for b in self.batches], axis=0, weights=n_tokens)
        return shares

    @property
    def size_bytes(self) -> Array:
        """Bytes of each expert, `[layer, expert]`."""
        return np.full((self.n_layers, self.shape.n_experts), self.shape.expert_bytes)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The memory that tiers share, as positions in `tiers`."""
        layer_bytes, elsewhere = self.layer_capacity_bytes, tuple(range(1, len(self.tiers)))
        device = (Budget((0,), self.capacity_bytes) if layer_bytes is None else Budget((0,), layer_bytes, True),)
        return device if self.host_bytes is None else (*device, Budget(elsewhere, self.host_bytes))

    @property
    def layer_capacity_bytes(self) -> float | None:
        """Device memory for whole experts of each layer; null where layers share it."""
        return self.n_slots * self.shape.expert_bytes if self.is_per_layer else None

    @property
    def n_slots(self) -> int:
        """Whole experts of each layer that this memory holds, or a cache of it."""
        return min(int(self.capacity_bytes / self.n_layers / self.shape.expert_bytes + 1e-9), self.shape.n_experts)

    @property
    def least_bytes(self) -> float:
        """Device memory that takes what the host has no room for."""
        if self.host_bytes is None:
            return 0.0
        n_each = self.n_layers if self.is_per_layer else 1
        step = n_each * self.shape.expert_bytes
        return step * max(0.0, float(np.ceil((self.size_bytes.sum() - self.host_bytes) / step - 1e-9)))

    def thinned(self, every: int) -> "Question":
        """The same question over every second or third step and so on, for answers that take many placements."""
        few = (
            replace(b, searched=b.searched[::every], fitted=b.fitted[::every], held_out=b.held_out[::every])
            for b in self.batches
        )
        return replace(self, batches=tuple(few))

    def swapped(self) -> "Question":
        """The question of who has seen the steps that judge."""
        batches = (
            Batch(b.n_tokens, b.n_passes, b.held_out, b.held_out, b.fitted, b.held_out_shares, b.fitted_shares)
            for b in self.batches
        )
        return replace(self, batches=tuple(batches))

    @cached_property
    def resident_ns(self) -> tuple[Array, Array]:
        """Mean latency of a layer with all experts in device memory, ns `[batch]`, in the steps that decide and in
        those that judge."""
        found = [
            [float(_resident_ns(self, counts, b.n_tokens).mean()) for counts in (b.fitted, b.held_out)]
            for b in self.batches
        ]
        fitted, held_out = np.array(found).T
        return fitted, held_out


def rows_of(question: Question, counts: Counts, n_tokens: int, home: Tiers | None = None) -> tuple[Basis, Work]:
    """What computes, and one batch row for each step of each layer, steps outermost.

    `home[layer, expert]` says where experts lie: those that memory modules compute in one of them, others over all
    (null: all over all).
    """
    routing, settings = routing_of(question, counts, n_tokens), _settings(question, counts, home)
    basis = question.basis.reaching(question.access, routing, settings, question.op)
    launch = "eager" if question.settings.host_ns is not None else basis.launch
    return basis, work_of(question.shape, routing, question.op, launch, basis.tile(question.shape, n_tokens))


def routing_of(question: Question, counts: Counts, n_tokens: int) -> Routing:
    """The steps of a window as a routing, a row for each step of each layer."""
    shares = np.tile(question.popularity, (len(counts), 1))
    return Routing("window", counts.reshape(shares.shape), n_tokens, question.shape.top_k, shares)


def _settings(question: Question, counts: Counts, home: Tiers | None) -> Settings:
    """The settings with where experts lie: in one memory module only what modules compute."""
    where = np.zeros(counts.shape[1:], np.int8) if home is None else home
    return replace(question.settings, striped=np.tile(where != NEAR_DATA, (len(counts), 1)))


def steps_ns(question: Question, counts: Counts, n_tokens: int, tier: Tiers, home: Tiers | None = None) -> Array:
    """Latency of each step and layer, ns `[step, layer]`, of a placement `tier[layer, expert]`, or one for each step
    `[step, layer, expert]`, of numbers of placement.TIERS; `home` as in `rows_of` (null: the placement itself)."""
    basis, work = rows_of(question, counts, n_tokens, tier if home is None else home)
    rows = np.broadcast_to(tier, counts.shape).reshape(-1, counts.shape[2])
    return placement_ns(basis, work, question.shape, rows, question.access).reshape(counts.shape[:2])


def _resident_ns(question: Question, counts: Counts, n_tokens: int) -> Array:
    """The same with all experts in device memory."""
    basis, work = rows_of(question, counts, n_tokens)
    resident = np.zeros(work.rows.shape, dtype=np.int8)
    return placement_ns(basis, work, question.shape, resident, ACCESS_MODES[0]).reshape(counts.shape[:2])


def costs_of(question: Question, *, contended: bool = False) -> Costs:
    """The costs of all placements over N_SEARCHED steps that stand for those that are searched, tiers by position in
    `tiers`; `contended` where host and link are always busy at once."""
    found = []
    for batch in question.batches:
        basis, work = rows_of(question, batch.searched, batch.n_tokens)
        serial = "copy" in modes_of(question.access)
        device, n_layers = basis.device, question.n_layers
        costs = placement_costs(work, question.tiers, device, n_layers, serial=serial, contended=contended)
        found.append(condensed(costs, N_SEARCHED))
    return joined(found, [batch.n_passes for batch in question.batches])


def dispatch_steps(
    question: Question, counts: Counts, n_tokens: int, resident: Mask, *, contended: bool = False
) -> Steps:
    """What a dispatch may know of steps, a row for each step of each layer: what each expert takes by itself on the
    device, over the link and on the host, these two as if both were busy (`contended`) or not."""
    basis, work = rows_of(question, counts, n_tokens)
    device = basis.device
    on_device = np.zeros_like(work.rows)
    for roofs in tiled.expert_roofs(work, device.kernel, device.roof, device.constants):
        on_device += smooth_value([roofs.compute, roofs.weights + roofs.activations], device.constants.smooth_p)
    link = copy_each_ns(work, link_rate(device.profile, "copy", contended=contended)[0], device.offload)
    host = host_each_ns(work, device, contended=contended) + crossing_each_ns(work, device)
    rows = np.tile(resident, (len(counts), 1))
    return Steps(counts.reshape(rows.shape), rows, on_device, link, np.where(work.rows > 0, host, 0.0))


def prediction(question: Question, batch: Batch, tier: Tiers, home: Tiers) -> Prediction:
    """The prediction for the steps of a batch that judge, with its interval, parts and reasons, of a placement
    `home[layer, expert]` whose experts are used as `tier[layer, expert]` says, or one for each step."""
    counts = batch.held_out
    routing = routing_of(question, counts, batch.n_tokens)
    found = predict_placement(
        question.basis,
        question.shape,
        routing,
        Placement("", np.broadcast_to(tier, counts.shape).reshape(routing.counts.shape)),
        question.access,
        op=question.op,
        settings=_settings(question, counts, home),
    )
    n_offloaded = float((home != RESIDENT).sum(axis=1).mean())  # those that sleep in a step too
    return replace(found, n_offloaded=round(n_offloaded), offloaded_bytes=n_offloaded * question.shape.expert_bytes)

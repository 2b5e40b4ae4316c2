"""How long each GPU of an expert-parallel layer computes in each phase, by the latency model, and what bounds it.

On one GPU the phases sum to what `predict --op moe-layer` says of the layer.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from perfmodel import physics
from perfmodel.moe import MoEShape
from perfmodel.offload import placement_parts
from perfmodel.physics import Array, Counts, Parts, Work, total
from perfmodel.placement import RESIDENT, Tiers
from perfmodel.placement.balance import Index
from perfmodel.predict import OWN_TO_DEVICE, Basis, learned_correction, work_of
from perfmodel.routing import Routing
from perfmodel.text import NS_PER_S

from .fabric import Fabric
from .traffic import Traffic

GEMMS = ("gemm1", "gemm2")
EXPERTS = ("gemm1", "activation", "gemm2", "offload")  # what experts do with the rows that arrived
BEFORE = ("gate", "permute")  # what a GPU does with its tokens before they leave
LAYER = "moe-layer"
# How what is neither GEMM nor router is divided among phases, counted in the layer of separate operators that models of
# CPUs are fitted on. Operators, for its fixed time: gate: linear, softmax, top-k; permute: sort, divide, range, search,
# gather; activation: SiLU, multiply; reduce: gather of weights, multiply, zero, add by token. Passes over the hidden
# values of a row: gathered 2; multiplied in place 2, read to be added 1 (what is added to counts by token). Kernels of
# GPUs are fused in ways that nobody counted: the fixed time stays the gate's, all moving of hidden values `permute`.
OPERATORS = {"blas": {"gate": 3, "permute": 5, "activation": 2, "reduce": 4}, "tiled": {"gate": 1}}
HIDDEN_PASSES = {"blas": {"permute": 2, "reduce": 3}, "tiled": {"permute": 1}}


@dataclass(frozen=True, eq=False)
class Layer:
    """One MoE layer on several GPUs of one kind: what a machine can do (`basis`), the experts, who sends what, the
    links; `tier[slot]` where each expert lies (null: all in device memory), reached by `access` (see
    `offload.modes_of`; null only where nothing is offloaded). Host rates of `basis` are one GPU's share."""

    basis: Basis
    shape: MoEShape
    traffic: Traffic
    fabric: Fabric
    tier: Tiers | None = None
    access: str | None = None

    @property
    def row_bytes(self) -> float:
        """Bytes of one row on the wire: hidden values as the layer computes with them."""
        return self.shape.hidden * physics.element_bytes(self.shape.dtype)[1]

    @cached_property
    def compute_ns(self) -> dict[str, Array]:
        """The time of each phase that computes, ns `[GPU]`, by the names in timeline.PHASES, all rows at once."""
        return compute_ns(self)

    @cached_property
    def bounds_ns(self) -> dict[str, Array]:
        """What no schedule can beat on each GPU, ns `[GPU]`: see `bounds_ns`."""
        return bounds_ns(self)


def compute_ns(layer: Layer, share: float = 1.0, received_rows: Array | None = None) -> dict[str, Array]:
    """The time of each phase that computes when a GPU has `share` of all its rows and tokens, ns `[GPU]`.

    Weights are read for each share anew: that is what pipelining in chunks costs. `received_rows[GPU, place]` are what
    experts compute, taken as they are, where that is not the share of `Traffic.received` (null): padding, or the whole
    rows of a chunk. Experts outside device memory add `offload`; where they take more off the GPU than they cost, they
    shorten the grouped GEMMs instead.
    """
    device = layer.basis.device
    sent, received = _sent_work(layer, share), _received_work(layer, share, received_rows)
    sending = _resident(layer, sent)
    there = _resident(layer, received)
    no_gemm = _resident(layer, replace(received, k=received.k * 0, n=received.n * 0))
    correction = correction_of(layer, received)
    hidden = layer.shape.hidden / (layer.shape.hidden + layer.shape.inter)
    found = {
        "gate": sending["router"],
        "permute": np.zeros(layer.traffic.n_gpus),
        "activation": there["permute"] * (1 - hidden),
        "reduce": sending["combine"],
    }
    for amount, counted in ((no_gemm["overhead"], OPERATORS), (sending["permute"] * hidden, HIDDEN_PASSES)):
        of_phases = counted[device.form.name]
        for name, n in of_phases.items():
            found[name] = found[name] + amount * (n / sum(of_phases.values()))
    for g, name in enumerate(GEMMS):
        keep = np.arange(received.k.shape[1]) == g
        one = _resident(layer, replace(received, k=received.k * keep, n=received.n * keep))
        found[name] = one["compute"] + one["memory"] + one["overhead"] - no_gemm["overhead"]
    offload = np.zeros(layer.traffic.n_gpus)
    if layer.tier is not None and (layer.tier != RESIDENT).any() and layer.access is not None:
        parts, _ = placement_parts(received, received_tier(layer), layer.access, device)
        own = total({name: value for name, value in parts.items() if name in OWN_TO_DEVICE})
        offload = total(parts) - parts.get("launch", 0.0) - own + (own - total(there)) * correction
    found = {name: value * correction for name, value in found.items()}
    busy = sum(found[name] for name in EXPERTS[:3])
    shrink = 1 + np.minimum(offload, 0.0) / np.maximum(busy, 1e-9)
    for name in EXPERTS[:3]:
        found[name] = found[name] * np.maximum(shrink, 0.0)
    return {**found, "offload": np.maximum(offload, 0.0)}


def operator_ns(layer: Layer) -> float:
    """What one small operator of a layer takes however few its rows, ns: an even share of the layer's fixed time; 0 on
    a GPU, whose host launches it ahead of time."""
    form = layer.basis.device.form.name
    return layer.basis.device.constants.layer_ns / sum(OPERATORS[form].values()) if form == "blas" else 0.0


def bounds_ns(layer: Layer, kept_rows: Array | None = None) -> dict[str, Array]:
    """What no schedule can beat on each GPU, ns `[GPU]`, of rows `kept_rows[source, slot]` that are not dropped (null:
    all of them).

    `compute` is the arithmetic of its resident experts' rows at the full rate, `memory` reading the weights of those
    with rows once, `link` what its busiest link carries one way, dispatch and combine together: what it sends in one it
    receives in the other, so that both ways carry the same, padding and latency left aside. Where a fitted model has
    its own kernels run faster than the roof, they are the bound.
    """
    basis, traffic = layer.basis, layer.traffic
    kept = traffic.rows if kept_rows is None else kept_rows
    between = traffic.between(kept)
    work = _received_work(layer, received_rows=traffic.at_experts(kept.sum(axis=0)))
    resident = work.rows if layer.tier is None else np.where(received_tier(layer) == RESIDENT, work.rows, 0.0)
    here = replace(work, counts=Counts(resident), routing_of=np.arange(traffic.n_gpus, dtype=np.int64))
    roof, form = basis.device.roof, basis.device.form
    correction = np.minimum(correction_of(layer, work), 1.0)
    ideal = zip(physics.ideal_work(here), (roof.flops_per_s, roof.bytes_per_s), strict=True)
    modelled = zip(*form.gemm_roofs(here, roof, basis.device.constants), strict=True)
    compute, memory = (
        np.minimum(amount / rate * NS_PER_S, np.sum(of_gemms, axis=0)) * correction
        for (amount, rate), of_gemms in zip(ideal, modelled, strict=True)
    )
    return {"compute": compute, "memory": memory, "link": link_ns(layer, between + between.T)}


def link_ns(layer: Layer, rows_between: Array) -> Array:
    """How long each GPU's links are busy with rows `[source, GPU]`, ns `[GPU]`: the busier of sending and receiving,
    and of the links inside and between nodes, which work side by side."""
    inside = layer.fabric.is_inside
    busiest = np.zeros(layer.fabric.n_gpus)
    for link, mask in ((layer.fabric.inside, inside), (layer.fabric.between, 1 - inside)):
        if link is not None:
            remote = rows_between * mask * (1 - np.eye(len(rows_between))) * layer.row_bytes
            busiest = np.maximum(busiest, np.maximum(remote.sum(axis=1), remote.sum(axis=0)) * link.ns_per_byte)
    return busiest


def correction_of(layer: Layer, work: Work | None = None) -> Array:
    """What a fitted model's residual multiplies the time of each GPU by, `[GPU]`, of the experts' side of `work` (null:
    all rows); 1 without a model, and where no row arrives, of which no model knows anything."""
    work = _received_work(layer) if work is None else work
    is_idle = work.n_rows == 0
    rows = work.rows
    rows[is_idle, 0] = 1.0
    known = learned_correction(layer.basis, replace(work, counts=Counts(rows)), layer.shape)
    return np.where(is_idle, 1.0, known)


def received_tier(layer: Layer) -> Tiers:
    """The tier of each GPU's own experts, `[GPU, place]`, as `Traffic.received` has them."""
    if layer.tier is None:
        return np.full(layer.traffic.received.shape, RESIDENT, dtype=np.int8)
    return layer.traffic.at_experts(layer.tier)


def _resident(layer: Layer, work: Work) -> Parts:
    """Parts of work with all experts in device memory, without what the host needs to launch it."""
    device = layer.basis.device
    parts = device.form.resident_parts(work, device.roof, device.constants)
    return {name: value for name, value in parts.items() if name != "launch"}


def _sent_work(layer: Layer, share: float) -> Work:
    """The router's side: each GPU's own tokens and all experts."""
    traffic = layer.traffic
    n_tokens = traffic.n_tokens.astype(np.float64) * share
    return _work(layer, traffic.rows * share, n_tokens, layer.shape.n_experts, layer.shape.top_k)


def _received_work(layer: Layer, share: float = 1.0, received_rows: Array | None = None) -> Work:
    """The experts' side: the rows that arrive on each GPU."""
    rows = layer.traffic.received * share if received_rows is None else received_rows
    n_held = np.array([max(len(slots), 1) for slots in layer.traffic.slots_of])  # a GPU may have no expert
    # Of padding no token is known; a token has at most top-k rows. Where nothing arrives one stands for none.
    n_tokens = np.maximum(layer.traffic.tokens.sum(axis=0) * share, rows.sum(axis=1) / layer.shape.top_k)
    return _work(layer, rows, np.where(n_tokens > 0, n_tokens, 1.0), n_held, 1)


def _work(layer: Layer, rows: Array, n_tokens: Array, n_experts: Index | int, top_k: int) -> Work:
    shape = replace(layer.shape, n_experts=rows.shape[1], top_k=top_k)
    empty = Routing("", np.zeros(rows.shape, dtype=np.int64), 0, 1)  # whose rows are put in below, some of them shares
    known = [layer.basis.tile(shape, max(1, round(n))) for n in n_tokens]
    tiles = [tile for tile in known if tile is not None]
    return replace(
        work_of(shape, empty, LAYER, "graph"),
        counts=Counts(rows),
        n_tokens=np.asarray(n_tokens, dtype=np.float64),
        n_experts=np.broadcast_to(np.asarray(n_experts, dtype=np.float64), len(rows)).copy(),
        tile=np.concatenate(tiles) if tiles else None,
    )

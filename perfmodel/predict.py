"""What moving experts off the device costs: the prediction of a placement, its parts, and how sure it is."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from perfmodel import physics, text
from perfmodel.errors import InputError
from perfmodel.explain import Explanation, explain
from perfmodel.hardware import HardwareProfile
from perfmodel.latency import COVERAGE, Forecast, LatencyModel
from perfmodel.moe import MoEShape
from perfmodel.offload import ACCESS_MODES, Device, Host, Mask, modes_of, placement_parts, rate_keys
from perfmodel.offload.fitted import OffloadFit, Way, from_json
from perfmodel.physics import Array, Parts, Work, total
from perfmodel.placement import Placement, Tiers, place
from perfmodel.routing import Routing
from perfmodel.transfer import zero_shot_half_width

OPS = ("grouped-gemm", "moe-layer", "fused-moe")
LAUNCHES = ("graph", "eager")
LAUNCH_KEYS = ("launch_overhead_ns", "null_kernel_ns")  # together the floor of one grouped GEMM call
OWN_TO_DEVICE = ("overhead", "compute", "memory", "permute", "combine", "router")  # what a residual corrects


@dataclass(frozen=True)
class Prediction:
    """Latency of one MoE layer under a placement; times in ns, `parts` sum to `latency_ns`.

    `interval` is the range that holds 90 % of measurements, null where none can be promised; `basis` says what the
    numbers rest on and `reasons` why; `explanation` (null unless asked for) what binds and what would change them.
    With several layers in the routing, times are means over layers.
    """

    latency_ns: float
    baseline_latency_ns: float
    parts: dict[str, float]
    bottleneck: str
    interval: tuple[float, float] | None
    basis: str
    reasons: tuple[str, ...]
    n_offloaded: int
    n_experts: int
    offloaded_bytes: float
    explanation: Explanation | None = None

    @property
    def slowdown(self) -> float:
        """Latency over latency with every expert in device memory."""
        return self.latency_ns / self.baseline_latency_ns

    def to_json(self) -> dict[str, Any]:
        """The prediction as plain values; part names end in `_ns`. An explanation is one key more."""
        found: dict[str, Any] = {
            "latency_ns": self.latency_ns,
            "baseline_latency_ns": self.baseline_latency_ns,
            "slowdown": self.slowdown,
            "parts": {f"{name}_ns": value for name, value in self.parts.items()},
            "bottleneck": self.bottleneck,
            "interval": list(self.interval) if self.interval else None,
            "basis": self.basis,
        }
        if self.explanation is not None:
            found["explanation"] = {"reasons": list(self.reasons), **self.explanation.to_json()}
        return found

    def __str__(self) -> str:
        """The prediction as a few lines for people."""
        share = f"{self.n_offloaded} of {self.n_experts} experts ({text.n_bytes(self.offloaded_bytes)})"
        interval = (
            f"{text.ns(self.interval[0])} to {text.ns(self.interval[1])} ({COVERAGE:.0%} interval)"
            if self.interval
            else "no interval: "
            + ("no fitted model" if self.basis == "datasheet" else "outside what the model can vouch for, see basis")
        )
        parts = sorted(((v, k) for k, v in self.parts.items() if v > 0.0005 * self.latency_ns), reverse=True)
        lines = [
            f"latency       {text.ns(self.latency_ns)} per layer, {interval}",
            f"all resident  {text.ns(self.baseline_latency_ns)}",
            f"slowdown      {self.slowdown:.3f}x with {share} of a layer offloaded",
            f"bottleneck    {self.bottleneck}",
            "parts         " + ", ".join(f"{k} {text.ns(v)} ({text.frac(v / self.latency_ns)})" for v, k in parts),
            *(self.explanation.lines() if self.explanation else ()),
            f"basis         {self.basis}" + "".join(f"\n              - {reason}" for reason in self.reasons),
        ]
        return "\n".join(lines)


def work_of(shape: MoEShape, routing: Routing, op: str, launch: str = LAUNCHES[0], tile: Array | None = None) -> Work:
    """One batch row per layer of the routing: the experts' grouped GEMMs alone, the whole MoE layer from its input, or
    a fused MoE call from the router's logits on; replayed from a graph, or launched by the host call by call."""
    if op not in OPS:
        raise InputError(f"unknown op {op!r}; known: {', '.join(OPS)}")
    if launch not in LAUNCHES:
        raise InputError(f"unknown launch {launch!r}; known: {', '.join(LAUNCHES)}")
    n_layers = routing.counts.shape[0]
    (k_up, n_up), (k_down, n_down) = shape.gemms
    weight, activation = physics.element_bytes(shape.dtype)
    index = np.arange(n_layers, dtype=np.int64)

    def column(value: float) -> Array:
        return np.full(n_layers, float(value))

    return Work(
        counts=physics.Counts(routing.counts.astype(np.float64)),
        routing_of=index,
        item_of=index,
        k=np.tile([float(k_up), float(k_down)], (n_layers, 1)),
        n=np.tile([float(n_up), float(n_down)], (n_layers, 1)),
        layer=column(op != "grouped-gemm"),
        router=column(op == "moe-layer"),
        eager=column(launch == "eager"),
        n_tokens=column(routing.n_tokens),
        hidden=column(shape.hidden),
        inter=column(shape.inter),
        n_experts=column(shape.n_experts),
        weight_bytes=weight,
        activation_bytes=activation,
        tile=None if tile is None else np.repeat(tile, n_layers, axis=0),
    )


@dataclass(frozen=True)
class Settings:
    """How offloaded experts are kept and reached, beyond the access mode: how zero-copy sees two memories (null: one
    launch over mapped pages), slots of a paged memory (null: as many as are not offloaded), what the host needs to
    launch one layer, or its bare grouped GEMMs, call by call (null: the constants), a fitted model of the host CPU
    (null: its rates alone), and which experts lie over all memory modules of the host, `[batch, expert]` (null: as the
    layout of the device says)."""

    residency: str | None = None
    n_slots: int | None = None
    host_ns: float | None = None
    host_model: LatencyModel | None = None
    striped: Mask | None = None


@dataclass(frozen=True)
class Basis:
    """What a prediction computes with, and the fitted model it comes from, if any, with what it knows of offloading."""

    device: Device
    model: LatencyModel | None
    offload: OffloadFit | None = None

    def reaching(self, access: str, routing: Routing, settings: Settings, op: str) -> "Basis":
        """The same for one access mode: with the constants that were fitted for it, where they were."""
        constants = self.device.offload
        if self.offload is not None:
            constants, _ = self.offload.constants_of(access, settings.residency)
        host = settings.host_model
        own = self.device.constants
        if settings.host_ns is not None and self.device.profile.device == "gpu":
            per_call, rest = (settings.host_ns / 2, 0.0) if op == OPS[0] else (0.0, settings.host_ns)  # of two GEMMs
            own = replace(own, host_call_ns=per_call, host_layer_ns=rest)
        device = replace(
            self.device,
            constants=own,
            offload=constants,
            residency=settings.residency,
            n_slots=settings.n_slots,
            shares=routing.popularity,
            striped=settings.striped,
            host=None if host is None else Host(host.form, host.roof, host.constants_),
        )
        return replace(self, device=device)

    @property
    def launch(self) -> str:
        """How calls are launched unless said otherwise: as those were that the model was fitted on."""
        if self.model is None or self.device.profile.device == "cpu":
            return LAUNCHES[0]
        return "graph" if self.model.evidence_.get("launch") == "graph" else "eager"

    def tile(self, shape: MoEShape, n_tokens: int) -> Array | None:
        """How the model's kernel is configured for a shape, `[1, TILE_FIELDS]`; null where that is not known."""
        rule = self.model.tiles_ if self.model is not None else None
        if rule is None:
            return None
        return replace(rule, machine=self.device.profile.name).at(shape.n_experts, shape.inter, n_tokens)


def basis_of(profile: HardwareProfile, shape: MoEShape, model: LatencyModel | None) -> Basis:
    """The ceilings and constants to predict with: a fitted model's, or the profile's with default constants.

    A model of another machine of the same kind lends its efficiencies to this machine's ceilings. Raises InputError
    when model and hardware are not of the same kind of device.
    """
    if model is None:
        form = physics.form_for(profile, physics.PYTORCH_KERNEL, shape.dtype)
        constants = form.defaults
        if profile.device == "gpu" and set(LAUNCH_KEYS) <= set(profile.quantities):
            constants = replace(constants, call_ns=sum(profile[key] for key in LAUNCH_KEYS))
        return Basis(Device(profile, physics.ceilings(profile, shape.dtype), form, constants), None)
    if model.profile.device != profile.device:
        raise InputError(
            f"the model was fitted on a {model.profile.device} ({model.profile.name}), hardware {profile.name!r} is a "
            f"{profile.device}; use a model of the same kind of device, or none"
        )
    roof = physics.transferred_ceilings(profile, shape.dtype, model.profile)
    try:
        known = from_json(model.offload_) if model.offload_ else None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError("the model's constants of offloading are damaged; fit it again") from None
    return Basis(Device(profile, roof, model.form, model.constants_), model, known)


def predict_placement(
    basis: Basis,
    shape: MoEShape,
    routing: Routing,
    placement: Placement,
    access: str,
    *,
    op: str = OPS[0],
    launch: str | None = None,
    settings: Settings = Settings(),
    explained: bool = False,
) -> Prediction:
    """What one MoE layer costs when the placement's experts are offloaded, against all experts resident.

    `access` is one mode, or several with a plus (`copy-overlap+cpu`), of which the placement's tiers choose.
    """
    basis = basis.reaching(access, routing, settings, op)
    launch = launch or ("eager" if settings.host_ns is not None else basis.launch)
    work = work_of(shape, routing, op, launch, basis.tile(shape, routing.n_tokens))
    off = placement.offloaded
    correction, forecast = _learned(basis, work, shape)
    baseline = _corrected(basis.device.form.resident_parts(work, basis.device.roof, basis.device.constants), correction)
    raw, binding = placement_parts(work, placement.tier, access, basis.device)
    parts = _corrected(raw, correction)
    means = {name: float(value.mean()) for name, value in parts.items()}
    latency = math.fsum(means.values())
    modes = modes_of(access) if off.any() else ()
    ways = [(mode, settings.residency) for mode in modes]
    reasons, kind, sure = _evidence(basis, work, shape, ways, _half_width(basis, work, forecast))
    return Prediction(
        latency_ns=latency,
        baseline_latency_ns=math.fsum(float(value.mean()) for value in baseline.values()),
        parts=means,
        bottleneck=_bottleneck(means, binding),
        interval=None if sure is None else (latency * math.exp(-sure), latency * math.exp(sure)),
        basis=kind,
        reasons=tuple(reasons),
        n_offloaded=round(placement.n_offloaded / off.shape[0]),
        n_experts=shape.n_experts,
        offloaded_bytes=placement.n_offloaded / off.shape[0] * shape.expert_bytes,
        explanation=explain(work, placement.tier, access, basis.device, basis.model) if explained else None,
    )


def placement_ns(basis: Basis, work: Work, shape: MoEShape, tier: Tiers, access: str) -> Array:
    """Latency of each row of work, ns `[batch]`, with each expert in `tier[batch, expert]`, as `predict_placement` has
    it but without evidence; `basis` is one that reaches the access modes."""
    parts, _ = placement_parts(work, tier, access, basis.device)
    return total(_corrected(parts, learned_correction(basis, work, shape)))


def learned_correction(basis: Basis, work: Work, shape: MoEShape) -> Array:
    """What a fitted model's residual multiplies the device's time of each row of work by, `[batch]`; 1 without a model
    of the shape's dtype."""
    return _learned(basis, work, shape)[0]


def _learned(basis: Basis, work: Work, shape: MoEShape) -> tuple[Array, Forecast | None]:
    """What the model's residual multiplies the device's time by, `[batch]`, and its forecast of the resident layer,
    null without a model of this dtype."""
    model = basis.model
    if model is None or model.dtype != shape.dtype:
        return np.ones(len(work.k)), None
    forecast = model.forecast(work, basis.device.profile)
    return forecast.ns / forecast.physical_ns, forecast


def _half_width(basis: Basis, work: Work, forecast: Forecast | None) -> float | None:
    """The half-width of the interval of all layers together, log units, null where any lies too far outside."""
    model = basis.model
    if forecast is None or model is None:
        return None
    width = forecast.log_half_width
    if model.profile.own_quantities != basis.device.profile.own_quantities:
        width = zero_shot_half_width(model, work, basis.device.profile)
    return None if np.isnan(width).any() else float(np.average(width, weights=forecast.ns))


def _corrected(parts: Parts, correction: Array) -> Parts:
    return {name: value * correction if name in OWN_TO_DEVICE else value for name, value in parts.items()}


def _bottleneck(means: dict[str, float], binding: list[str | None]) -> str:
    """The part that outlasts what it overlaps in most rows, else the largest part."""
    overlapped = [part for part in binding if part is not None]
    if 2 * len(overlapped) > len(binding):
        return max(set(overlapped), key=overlapped.count)
    return max(means, key=lambda name: means[name])


def _evidence(
    basis: Basis, work: Work, shape: MoEShape, ways: list[tuple[str, str | None]], half_width: float | None
) -> tuple[list[str], str, float | None]:
    """Why to believe a prediction: reasons in words, the basis, and the half-width of the interval in log units.

    `ways` are access modes with their residency, none when nothing is offloaded.
    """
    profile, model = basis.device.profile, basis.model
    keys = (*basis.device.roof.from_keys, *(key for way in ways for key in rate_keys(profile, *way)))
    if model is None:
        keys += tuple(key for key in LAUNCH_KEYS if key in profile.quantities)
    reasons = [_cited(key, basis.device) for key in dict.fromkeys(keys)]
    capacity = profile.first("memory_capacity_bytes")
    all_layers = shape.layer_bytes * shape.n_layers
    if capacity is not None and all_layers > capacity[1].value:
        reasons.append(
            f"the experts of all {shape.n_layers} layers take {text.n_bytes(all_layers)}, more than device memory "
            f"({text.n_bytes(capacity[1].value)}): all resident is hypothetical"
        )
    if model is None:
        return [*reasons, "default constants, no fitted model given (--model)"], "datasheet", None
    is_here = model.profile.own_quantities == profile.own_quantities
    elsewhere = [] if is_here else [f"fitted on {model.profile.name}"]
    unknown = [] if model.dtype == shape.dtype else [f"fitted on {model.dtype}, this shape is {shape.dtype}"]
    for way in ways:
        known = basis.offload.way(*way) if basis.offload is not None else None
        if known is None:
            unknown.append(f"no expert offloaded by {Way(*way)} was among the observations: its constants are assumed")
        else:
            reasons.append(f"constants of {Way(*way)} fitted on {known.n_observations} observations")
            if not is_here:
                unknown.append("nothing is known of their errors on another machine")
            elif known.log_half_width is None:
                unknown.append("too few of them could be held out, so nothing is known of their errors")
            elif half_width is not None:  # both errors act: the resident latency's and the slowdown's
                half_width = math.hypot(half_width, known.log_half_width)
    outside = model.outside(work)
    if unknown or half_width is None:
        return [*reasons, *elsewhere, *unknown, *outside], "extrapolated", None
    if elsewhere:
        elsewhere = [f"{elsewhere[0]}: the interval is wider by what its constants may be on another machine"]
        return [*reasons, *elsewhere, *outside], "extrapolated", half_width
    if outside:
        wider = "the interval is as much wider as held-out errors grew that far outside"
        return [*reasons, *outside, wider], "extrapolated", half_width
    return [*reasons, f"constants fitted on {model.n_observations_} observations"], "fitted", half_width


def _cited(key: str, device: Device) -> str:
    """A machine number as it enters a prediction: value, what is reached of a nominal peak, evidence, source."""
    quantity = device.profile.quantities[key]
    value = {"flops_per_s": device.roof.flops_per_s, "bytes_per_s": device.roof.bytes_per_s}.get(_suffix(key))
    taken = ""
    if "_peak_" in key and not key.startswith("link_"):
        is_roof = key in device.roof.from_keys and value is not None
        taken = f" x {value / quantity.value:.2f}" if is_roof and value else f" x {physics.PEAK_STREAM_FRAC}"
    return f"{key} {text.in_unit(quantity.value, _suffix(key))}{taken}, {quantity.kind}: {quantity.source}"


def _suffix(key: str) -> str:
    return next(s for s in ("bytes_per_s", "flops_per_s", "bytes", "count", "ns") if key.endswith("_" + s))


def predict(
    profile: HardwareProfile,
    shape: MoEShape,
    routing: Routing,
    offload_frac: float = 0.0,
    access: str = ACCESS_MODES[0],
    *,
    op: str = OPS[0],
    model: LatencyModel | None = None,
    launch: str | None = None,
    settings: Settings = Settings(),
    explained: bool = False,
) -> Prediction:
    """What it costs to offload a fraction of each layer's experts, least used first (ISC 2026 poster).

    `launch` is graph or eager, null for what the model was fitted on (graph without one). Raises InputError for an
    unknown access mode, op or launch, a fraction outside 0 to 1, and a machine without a second tier.
    """
    placement = place(routing.popularity, offload_frac)
    basis = basis_of(profile, shape, model)
    return predict_placement(
        basis, shape, routing, placement, access, op=op, launch=launch, settings=settings, explained=explained
    )


def slowdown_curve(
    profile: HardwareProfile,
    shape: MoEShape,
    routing: Routing,
    access: str = ACCESS_MODES[0],
    *,
    op: str = OPS[0],
    model: LatencyModel | None = None,
    launch: str | None = None,
    settings: Settings = Settings(),
) -> list[Prediction]:
    """Predictions along the offloaded fraction, from none to all experts in at most 65 steps."""
    basis = basis_of(profile, shape, model)
    steps = np.unique(np.round(np.linspace(0, shape.n_experts, min(shape.n_experts, 64) + 1)))
    placements = (place(routing.popularity, float(n) / shape.n_experts) for n in steps)
    return [
        predict_placement(basis, shape, routing, placement, access, op=op, launch=launch, settings=settings)
        for placement in placements
    ]

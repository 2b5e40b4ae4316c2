"""What moving experts off the device costs: the prediction of a placement, its parts, and how sure it is."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from perfmodel import physics, text
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.latency import COVERAGE, LatencyModel
from perfmodel.moe import MoEShape
from perfmodel.offload import ACCESS_MODES, Device, offload_parts, rate_keys
from perfmodel.physics import Work
from perfmodel.placement import Placement, place
from perfmodel.routing import Routing

OPS = ("grouped-gemm", "moe-layer")
LAUNCH_KEYS = ("launch_overhead_ns", "null_kernel_ns")  # together the floor of one grouped GEMM call


@dataclass(frozen=True)
class Prediction:
    """Latency of one MoE layer under a placement; times in ns, `parts` sum to `latency_ns`.

    `interval` is the range that holds 90 % of measurements, null unless a fitted model covers the case; `basis` says
    what the numbers rest on and `reasons` why. With several layers in the routing, times are means over layers.
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

    @property
    def slowdown(self) -> float:
        """Latency over latency with every expert in device memory."""
        return self.latency_ns / self.baseline_latency_ns

    def to_json(self) -> dict[str, Any]:
        """The prediction as plain values; part names end in `_ns`."""
        return {
            "latency_ns": self.latency_ns,
            "baseline_latency_ns": self.baseline_latency_ns,
            "slowdown": self.slowdown,
            "parts": {f"{name}_ns": value for name, value in self.parts.items()},
            "bottleneck": self.bottleneck,
            "interval": list(self.interval) if self.interval else None,
            "basis": self.basis,
        }

    def __str__(self) -> str:
        """The prediction as a few lines for people."""
        share = f"{self.n_offloaded} of {self.n_experts} experts ({text.n_bytes(self.offloaded_bytes)})"
        interval = (
            f"{text.ns(self.interval[0])} to {text.ns(self.interval[1])} ({COVERAGE:.0%} interval)"
            if self.interval
            else "no interval: "
            + ("no fitted model" if self.basis == "datasheet" else "outside what the model was fitted on")
        )
        parts = sorted(((v, k) for k, v in self.parts.items() if v > 0.0005 * self.latency_ns), reverse=True)
        lines = [
            f"latency       {text.ns(self.latency_ns)} per layer, {interval}",
            f"all resident  {text.ns(self.baseline_latency_ns)}",
            f"slowdown      {self.slowdown:.3f}x with {share} of a layer offloaded",
            f"bottleneck    {self.bottleneck}",
            "parts         " + ", ".join(f"{k} {text.ns(v)} ({text.frac(v / self.latency_ns)})" for v, k in parts),
            f"basis         {self.basis}" + "".join(f"\n              - {reason}" for reason in self.reasons),
        ]
        return "\n".join(lines)


def work_of(shape: MoEShape, routing: Routing, op: str) -> Work:
    """One batch row per layer of the routing, for the experts' grouped GEMMs alone or the whole MoE layer."""
    if op not in OPS:
        raise InputError(f"unknown op {op!r}; known: {', '.join(OPS)}")
    n_layers = routing.counts.shape[0]
    (k_up, n_up), (k_down, n_down) = shape.gemms
    weight, activation = physics.element_bytes(shape.dtype)

    def column(value: float) -> physics.Array:
        return np.full(n_layers, float(value))

    return Work(
        rows=routing.counts.astype(np.float64),
        k=np.tile([float(k_up), float(k_down)], (n_layers, 1)),
        n=np.tile([float(n_up), float(n_down)], (n_layers, 1)),
        layer=column(op == "moe-layer"),
        n_tokens=column(routing.n_tokens),
        hidden=column(shape.hidden),
        inter=column(shape.inter),
        n_experts=column(shape.n_experts),
        weight_bytes=weight,
        activation_bytes=activation,
    )


@dataclass(frozen=True)
class Basis:
    """What a prediction computes with, and the fitted model it comes from, if any."""

    device: Device
    model: LatencyModel | None


def basis_of(profile: HardwareProfile, shape: MoEShape, model: LatencyModel | None) -> Basis:
    """The ceilings and constants to predict with: a fitted model's, or the profile's with default constants.

    A model of another machine of the same kind lends its efficiencies to this machine's ceilings. Raises InputError
    when model and hardware are not of the same kind of device.
    """
    roof = physics.ceilings(profile, shape.dtype)
    if model is None:
        constants = physics.DEFAULTS[profile.device]
        if set(LAUNCH_KEYS) <= set(profile.quantities):
            constants = replace(constants, call_ns=sum(profile[key] for key in LAUNCH_KEYS))
        return Basis(Device(profile, roof, constants, physics.FORMS[profile.device]), None)
    if model.profile.device != profile.device:
        raise InputError(
            f"the model was fitted on a {model.profile.device} ({model.profile.name}), hardware {profile.name!r} is a "
            f"{profile.device}; use a model of the same kind of device, or none"
        )
    return Basis(Device(profile, roof, model.constants_, model.form), model)


def predict_placement(
    basis: Basis, shape: MoEShape, routing: Routing, placement: Placement, access: str, *, op: str = OPS[0]
) -> Prediction:
    """What one MoE layer costs when the placement's experts are offloaded, against all experts resident."""
    work, device = work_of(shape, routing, op), basis.device
    off = placement.offloaded
    baseline = physics.resident_parts(work, device.roof, device.constants, device.form)
    parts, binding = offload_parts(work, off, access, device)
    means = {name: float(value.mean()) for name, value in parts.items()}
    latency = math.fsum(means.values())
    reasons, kind, half_width = _evidence(basis, work, shape, access if off.any() else None)
    return Prediction(
        latency_ns=latency,
        baseline_latency_ns=math.fsum(float(value.mean()) for value in baseline.values()),
        parts=means,
        bottleneck=_bottleneck(means, binding),
        interval=None if half_width is None else (latency * math.exp(-half_width), latency * math.exp(half_width)),
        basis=kind,
        reasons=tuple(reasons),
        n_offloaded=round(placement.n_offloaded / off.shape[0]),
        n_experts=shape.n_experts,
        offloaded_bytes=placement.n_offloaded / off.shape[0] * shape.expert_bytes,
    )


def _bottleneck(means: dict[str, float], binding: list[str | None]) -> str:
    """The part that outlasts what it overlaps in most rows, else the largest part."""
    overlapped = [part for part in binding if part is not None]
    if 2 * len(overlapped) > len(binding):
        return max(set(overlapped), key=overlapped.count)
    return max(means, key=lambda name: means[name])


def _evidence(basis: Basis, work: Work, shape: MoEShape, access: str | None) -> tuple[list[str], str, float | None]:
    """Why to believe a prediction: reasons in words, the basis, and the half-width of the interval in log units.

    `access` is null when nothing is offloaded.
    """
    profile = basis.device.profile
    keys = (*basis.device.roof.from_keys, *(rate_keys(profile, access) if access else ()))
    if basis.model is None:
        keys += tuple(key for key in LAUNCH_KEYS if key in profile.quantities)
    reasons = [_cited(key, profile) for key in dict.fromkeys(keys)]
    capacity = profile.first("memory_capacity_bytes")
    all_layers = shape.layer_bytes * shape.n_layers
    if capacity is not None and all_layers > capacity[1].value:
        reasons.append(
            f"the experts of all {shape.n_layers} layers take {text.n_bytes(all_layers)}, more than device memory "
            f"({text.n_bytes(capacity[1].value)}): all resident is hypothetical"
        )
    model = basis.model
    if model is None:
        return [*reasons, "default constants, no fitted model given (--model)"], "datasheet", None
    outside = [] if model.profile.quantities == profile.quantities else [f"fitted on {model.profile.name}"]
    if model.dtype != shape.dtype:
        outside.append(f"fitted on {model.dtype}, this shape is {shape.dtype}")
    if access:
        outside.append("no offloaded expert was among the observations")
    outside += model.outside(work)
    if outside:
        return [*reasons, *outside], "extrapolated", None
    half_width: float | None = model.log_half_width_
    return [*reasons, f"constants fitted on {model.n_observations_} observations"], "fitted", half_width


def _cited(key: str, profile: HardwareProfile) -> str:
    """A machine number as it enters a prediction: value, discount of a nominal peak, kind of evidence, source."""
    quantity = profile.quantities[key]
    discount = {"flops_per_s": physics.PEAK_GEMM_FRAC, "bytes_per_s": physics.PEAK_STREAM_FRAC}.get(_suffix(key), 1.0)
    taken = f" x {discount}" if "_peak_" in key and not key.startswith("link_") else ""
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
) -> Prediction:
    """What it costs to offload a fraction of each layer's experts, least used first (ISC 2026 poster).

    Raises InputError for an unknown access mode or op, a fraction outside 0 to 1, and a machine without a second tier.
    """
    placement = place(routing.popularity, offload_frac)
    return predict_placement(basis_of(profile, shape, model), shape, routing, placement, access, op=op)


def slowdown_curve(
    profile: HardwareProfile,
    shape: MoEShape,
    routing: Routing,
    access: str = ACCESS_MODES[0],
    *,
    op: str = OPS[0],
    model: LatencyModel | None = None,
) -> list[Prediction]:
    """Predictions along the offloaded fraction, from none to all experts in at most 65 steps."""
    basis = basis_of(profile, shape, model)
    steps = np.unique(np.round(np.linspace(0, shape.n_experts, min(shape.n_experts, 64) + 1)))
    placements = (place(routing.popularity, float(n) / shape.n_experts) for n in steps)
    return [predict_placement(basis, shape, routing, placement, access, op=op) for placement in placements]

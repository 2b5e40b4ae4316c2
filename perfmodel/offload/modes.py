"""What a MoE layer costs when some experts' weights live in host memory: access modes over the same roofs."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile, Quantity
from perfmodel.physics import (
    PEAK_STREAM_FRAC,
    Array,
    Ceilings,
    Counts,
    Form,
    Parts,
    Work,
    smooth_max,
    sum_parts,
    tiled,
    total,
)
from perfmodel.text import NS_PER_S

from .constants import OffloadConstants

# zero-copy: the kernel reads offloaded weights in place over the link. copy: active offloaded experts are copied, then
# computed. copy-overlap: copied while resident experts compute. cpu: offloaded experts are computed on the host.
ACCESS_MODES = ("zero-copy", "copy", "copy-overlap", "cpu")

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Device:
    """What computes: the machine, its ceilings for a dtype, its kernel's form and constants, and those of offloading.

    `tiled` kernels only: a machine whose experts a CPU computes has no second memory to offload to.
    """

    profile: HardwareProfile
    roof: Ceilings
    form: Form
    constants: Any
    offload: OffloadConstants = OffloadConstants()


def link_rate(profile: HardwareProfile, access: str) -> tuple[float, str]:
    """Bytes per second at which offloaded weights reach the device, and the quantity that says so.

    The tighter of the link and nominal host memory: a one-way read can exceed STREAM, and on GH200 does. Raises
    InputError for a machine without a second memory tier.
    """
    read = ("link_kernel_read_bytes_per_s",) if access == "zero-copy" else ()
    found = profile.first(*read, "link_h2d_copy_bytes_per_s", "link_peak_bytes_per_s")
    if found is None:
        raise InputError(f"hardware {profile.name!r} has no link to a second memory tier, so nothing can be offloaded")
    host = profile.first("host_peak_bytes_per_s")
    if host is not None and host[1].value < found[1].value:
        return host[1].value, host[0]
    return found[1].value, found[0]


def rate_keys(profile: HardwareProfile, access: str) -> tuple[str, ...]:
    """The quantities of a machine, beside its ceilings, that decide what offloading costs under an access mode."""
    link = (link_rate(profile, access)[1],)
    if access != "cpu":
        return link
    back = profile.first("link_d2h_copy_bytes_per_s")
    return ("host_gemm_flops_per_s", _host_stream(profile)[0], *link, *((back[0],) if back else ()))


def _host_stream(profile: HardwareProfile) -> tuple[str, Quantity]:
    found = profile.first("host_stream_bytes_per_s", "host_peak_bytes_per_s")
    if found is None:
        raise InputError(f"hardware {profile.name!r} has no host memory bandwidth, needed for --access cpu")
    return found


def offload_parts(work: Work, offloaded: Mask, access: str, device: Device) -> tuple[Parts, list[str | None]]:
    """Latency by part, ns `[batch]`, with the experts of `offloaded[batch, expert]` in host memory, and for each batch
    row the part that binds although it overlaps others (None: the largest part binds). Model 7."""
    if access not in ACCESS_MODES:
        raise InputError(f"unknown access mode {access!r}; known: {', '.join(ACCESS_MODES)}")
    none_binds: list[str | None] = [None] * len(work.k)
    if not offloaded.any():
        return device.form.resident_parts(work, device.roof, device.constants), none_binds
    rate, _ = link_rate(device.profile, access)
    other = tiled.other_parts(work, device.roof, device.constants)
    if access == "zero-copy":
        parts = sum_parts(_zero_copy(work, offloaded, rate, device), other)
        return tiled.with_launch_floor(parts, work, device.constants), none_binds
    if access == "cpu":
        return _on_cpu(work, offloaded, rate, device)
    o = device.offload
    active = offloaded & (work.rows > 0)
    parts = device.form.resident_parts(work, device.roof, device.constants)
    per_expert = _expert_bytes(work) / (rate * o.copy_eff) * NS_PER_S + o.copy_ns
    transfer = np.where(active, per_expert, 0.0).sum(axis=1)
    if access == "copy":
        return sum_parts(parts, {"link": transfer}), none_binds
    last = _last_expert(work, offloaded, device)
    gemms = parts["compute"] + parts["memory"]
    hidden = o.copy_overlap_frac * np.minimum(transfer, np.maximum(gemms - last, 0.0))
    exposed = np.maximum(transfer - hidden, 0.0)
    return sum_parts(parts, {"link": exposed}), ["link" if x > 0 else None for x in exposed]


def _expert_bytes(work: Work) -> Array:
    return np.asarray((work.k * work.n).sum(axis=1, keepdims=True) * work.weight_bytes)


def _kernel(device: Device) -> tiled.Kernel:
    if device.form.kernel is None:
        raise InputError(f"hardware {device.profile.name!r} computes on its CPU, so nothing can be offloaded")
    return device.form.kernel


def _zero_copy(work: Work, offloaded: Mask, rate: float, device: Device) -> Parts:
    """Grouped GEMMs that read offloaded weights over the link, again for each further row block (model 7.1).

    Of the experts a share `link_overlap_frac` runs pooled under one maximum, the rest one after another; resident ones
    are pooled with each other in either case, as they are when nothing is offloaded.
    """
    o, c = device.offload, device.constants
    reads = 1 + o.reread_frac * np.maximum(np.ceil(work.rows / o.reread_rows) - 1, 0)
    gemms = []
    for g, roofs in enumerate(tiled.expert_roofs(work, _kernel(device), device.roof, c)):
        weight_bytes = work.k[:, g, None] * work.n[:, g, None] * work.weight_bytes
        link = np.where(offloaded & (work.rows > 0), weight_bytes * reads / (rate * o.link_eff) * NS_PER_S, 0.0)
        memory = np.where(offloaded, roofs.activations, roofs.weights + roofs.activations)
        _, own = smooth_max([np.where(offloaded, x, 0.0) for x in (roofs.compute, memory, link)], c.smooth_p)
        _, rest = smooth_max([np.where(offloaded, 0.0, x).sum(axis=1) for x in (roofs.compute, memory)], c.smooth_p)
        _, pooled = smooth_max([x.sum(axis=1) for x in (roofs.compute, memory, link)], c.smooth_p)
        serial = [own[0].sum(axis=1) + rest[0], own[1].sum(axis=1) + rest[1], own[2].sum(axis=1)]
        om = o.link_overlap_frac
        gemms.append(
            {
                part: (1 - om) * one + om * all_
                for part, one, all_ in zip(("compute", "memory", "link"), serial, pooled, strict=True)
            }
        )
    return sum_parts(*gemms)


def _last_expert(work: Work, offloaded: Mask, device: Device) -> Array:
    """GEMM time of the slowest offloaded expert: it can only start when its weights have arrived, `[batch]` ns."""
    times = np.zeros_like(work.rows)
    for roofs in tiled.expert_roofs(work, _kernel(device), device.roof, device.constants):
        memory = roofs.weights + roofs.activations
        times = times + smooth_max([roofs.compute, memory], device.constants.smooth_p)[0]
    return np.asarray(np.where(offloaded & (work.rows > 0), times, 0.0).max(axis=1))


def _on_cpu(work: Work, offloaded: Mask, rate: float, device: Device) -> tuple[Parts, list[str | None]]:
    """Offloaded experts on the host beside the device; activations cross the link both ways (model 7.3)."""
    profile, o = device.profile, device.offload
    stream = _host_stream(profile)
    bandwidth = stream[1].value * (PEAK_STREAM_FRAC if "_peak_" in stream[0] else 1.0) * o.host_eff_memory
    back = profile.first("link_d2h_copy_bytes_per_s")
    rows = np.where(offloaded, work.rows, 0.0)
    weights = (work.k * work.n).sum(axis=1, keepdims=True)
    reading = np.where(rows > 0, weights * work.weight_bytes, 0.0) / bandwidth
    computing = 2.0 * rows * weights / (profile["host_gemm_flops_per_s"] * o.host_eff_compute)
    crossing = (
        rows.sum(axis=1) * work.hidden * work.activation_bytes * (1 / rate + 1 / (back[1].value if back else rate))
    )
    n_active = (rows > 0).sum(axis=1)
    host = (np.maximum(reading, computing).sum(axis=1) + crossing) * NS_PER_S
    host = host + n_active * o.host_expert_ns + np.where(n_active > 0, o.merge_ns, 0.0)
    on_device = replace(
        work,
        counts=Counts(np.where(offloaded, 0.0, work.rows)),
        routing_of=np.arange(len(work.k), dtype=np.int64),
    )
    prepared = device.form.prepare(on_device)
    gemms = tiled.gemm_parts(prepared, device.roof, device.constants)
    exposed = np.maximum(host - total(gemms), 0.0)
    parts = sum_parts(gemms, tiled.other_parts(work, device.roof, device.constants), {"host": exposed})
    floor = tiled.with_launch_floor(parts, work, device.constants)
    return floor, ["host" if x > 0 else None for x in exposed]

"""What a MoE layer costs when some experts' weights live in host memory: four access modes over the same roofs."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile, Quantity
from perfmodel.physics import (
    PEAK_STREAM_FRAC,
    Array,
    Ceilings,
    Constants,
    KernelForm,
    Parts,
    Work,
    experts_time,
    gemm_roofs,
    overheads,
    resident_gemm_parts,
    resident_parts,
    smooth_max,
    sum_parts,
    total,
)
from perfmodel.text import NS_PER_S

# zero-copy: the kernel reads offloaded weights in place over the link. copy: active offloaded experts are copied, then
# computed. copy-overlap: copied while resident experts compute. cpu: offloaded experts are computed on the host.
ACCESS_MODES = ("zero-copy", "copy", "copy-overlap", "cpu")

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class ReRead:
    """How often a kernel reads offloaded weights again: `frac` more times for each further block of `rows` rows.

    The defaults agree with both published points of the GH200 study (docs/model.md 8); two points do not identify them.
    """

    frac: float = 0.25
    rows: int = 256


@dataclass(frozen=True)
class Device:
    """What computes: the machine, its ceilings for a dtype, its kernel's constants and form, and the re-reads."""

    profile: HardwareProfile
    roof: Ceilings
    constants: Constants
    form: KernelForm
    reread: ReRead = ReRead()


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
    roof, c, form = device.roof, device.constants, device.form
    none_binds: list[str | None] = [None] * len(work.rows)
    if not offloaded.any():
        return resident_parts(work, roof, c, form), none_binds
    rate, _ = link_rate(device.profile, access)
    if access == "zero-copy":
        return sum_parts(_zero_copy(work, offloaded, rate, device), overheads(work, roof, c)), none_binds
    if access == "cpu":
        return _on_cpu(work, offloaded, rate, device)
    parts = resident_parts(work, roof, c, form)
    transfer = (np.where(offloaded & (work.rows > 0), _expert_bytes(work), 0.0)).sum(axis=1) / rate * NS_PER_S
    if access == "copy":
        return sum_parts(parts, {"link": transfer}), none_binds
    last = _last_expert(work, offloaded, device)
    exposed = np.maximum(transfer + last - total(resident_gemm_parts(work, roof, c, form)), 0.0)
    return sum_parts(parts, {"link": exposed}), ["link" if x > 0 else None for x in exposed]


def _expert_bytes(work: Work) -> Array:
    return np.asarray((work.k * work.n).sum(axis=1, keepdims=True) * work.weight_bytes)


def _zero_copy(work: Work, offloaded: Mask, rate: float, device: Device) -> Parts:
    """Grouped GEMMs that read offloaded weights over the link, again for each further row block (model 7.1)."""
    roof, c = device.roof, device.constants
    reads = 1 + device.reread.frac * np.maximum(np.ceil(work.rows / device.reread.rows) - 1, 0)
    gemms = []
    for g in range(work.k.shape[1]):
        roofs = gemm_roofs(work, g, roof, c, device.form)
        weight_bytes = work.k[:, g, None] * work.n[:, g, None] * work.weight_bytes
        link = np.where(offloaded & (work.rows > 0), weight_bytes * reads / rate * NS_PER_S, 0.0)
        gemms.append(experts_time(roofs.compute, np.where(offloaded, roofs.activations, roofs.memory), link, c))
    return sum_parts(*gemms)


def _last_expert(work: Work, offloaded: Mask, device: Device) -> Array:
    """GEMM time of the slowest offloaded expert: it can only start when its weights have arrived, `[batch]` ns."""
    times = np.zeros_like(work.rows)
    for g in range(work.k.shape[1]):
        roofs = gemm_roofs(work, g, device.roof, device.constants, device.form)
        times = times + smooth_max([roofs.compute, roofs.memory], device.constants.smooth_p)[0]
    return np.asarray(np.where(offloaded & (work.rows > 0), times, 0.0).max(axis=1))


def _on_cpu(work: Work, offloaded: Mask, rate: float, device: Device) -> tuple[Parts, list[str | None]]:
    """Offloaded experts on the host beside the device; activations cross the link both ways (model 7.3)."""
    profile = device.profile
    stream = _host_stream(profile)
    bandwidth = stream[1].value * (PEAK_STREAM_FRAC if "_peak_" in stream[0] else 1.0)
    back = profile.first("link_d2h_copy_bytes_per_s")
    rows = np.where(offloaded, work.rows, 0.0)
    weights = (work.k * work.n).sum(axis=1, keepdims=True)
    reading = np.where(rows > 0, weights * work.weight_bytes, 0.0) / bandwidth
    computing = 2.0 * rows * weights / profile["host_gemm_flops_per_s"]
    crossing = (
        rows.sum(axis=1) * work.hidden * work.activation_bytes * (1 / rate + 1 / (back[1].value if back else rate))
    )
    host = (np.maximum(reading, computing).sum(axis=1) + crossing) * NS_PER_S
    on_device = replace(work, rows=np.where(offloaded, 0.0, work.rows))
    gemms = resident_gemm_parts(on_device, device.roof, device.constants, device.form)
    exposed = np.maximum(host - total(gemms), 0.0)
    parts = sum_parts(gemms, overheads(work, device.roof, device.constants), {"host": exposed})
    return parts, ["host" if x > 0 else None for x in exposed]

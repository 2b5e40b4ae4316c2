"""Experts that others compute beside the device: the host's CPU, or the memory modules that hold them.

A layer whose experts are split over several of these, some copied to the device meanwhile or read in place, is one
composition of which the access modes `cpu` and `near-data` are the simplest cases (TriMoE, arXiv 2603.01058; HybriMoE,
2504.05897; ktransformers). Numbers in brackets are those of docs/model.md. Times are ns.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from perfmodel.physics import Array, Parts, Work, sum_parts, tiled, total
from perfmodel.placement import COPIED, IN_PLACE, NEAR_DATA, ON_HOST, Tiers
from perfmodel.text import NS_PER_S

from .device import (
    LAYOUTS,
    SPREADS,
    Device,
    Mask,
    back_rate,
    copies_ns,
    counts_ns,
    expert_bytes,
    host_bytes_per_s,
    host_gemm,
    link_rate,
    part_of,
    require_near_data,
    require_one_of,
)
from .in_place import in_place_parts
from .overlap import exposed_ns


def beside_parts(work: Work, domain: Tiers, device: Device) -> tuple[Parts, list[str | None]]:
    """Latency by part, ns `[batch]`, with each expert where `domain[batch, expert]` says (a number of placement.TIERS),
    and for each row the part that outlasts what runs beside it (None: the largest part binds). Models 7.4 to 7.6.

    The layer lasts as long as the slowest of device, host and memory modules, and adds their results. Raises InputError
    for a machine that lacks what a domain needs.
    """
    awake = work.rows > 0
    copied, on_host, near_data, read = (awake & (domain == d) for d in (COPIED, ON_HOST, NEAR_DATA, IN_PLACE))
    away = on_host | near_data
    elsewhere = np.isin(domain, (ON_HOST, NEAR_DATA))
    here = part_of(work, ~elsewhere, work.n_experts - elsewhere.sum(axis=1))
    if read.any():
        gemms = in_place_parts(here, read, device)
    else:
        gemms = tiled.gemm_parts(tiled.prepare(here, device.kernel), device.roof, device.constants)
    is_shared = ((copied | read).any(axis=1) | device.link_busy) & on_host.any(axis=1)
    exposed = _by_contention(is_shared, lambda shared: _copy_side(work, copied, total(gemms), device, shared))
    crossing = np.where(away, crossing_each_ns(work, device), 0.0).sum(axis=1)
    host = _by_contention(is_shared, lambda shared: host_ns(work, on_host, device, contended=shared))
    host = np.where(on_host.any(axis=1), host + crossing, 0.0)
    modules = np.zeros_like(host)
    if near_data.any():
        modules = near_data_ns(work, near_data, copied | on_host | read, device)
        modules = np.where(near_data.any(axis=1), modules + crossing, 0.0)
    on_device = total(gemms) + exposed
    beyond = np.maximum(np.maximum(host, modules) - on_device, 0.0)
    merge = np.where(away.any(axis=1), device.offload.merge_ns, 0.0)
    by_host = np.where(near_data.any(axis=1), (host >= modules) & on_host.any(axis=1), True)
    parts = sum_parts(
        gemms,
        tiled.other_parts(work, device.roof, device.constants),
        {"link": exposed} if copied.any() else {},
        {"host": np.where(by_host, beyond + merge, 0.0)} if on_host.any() else {},
        {"near-data": np.where(by_host, 0.0, beyond + merge)} if near_data.any() else {},
        {"overhead": counts_ns(work, copied | away, device.offload)},
    )
    names = np.where(beyond > 0, np.where(by_host, "host", "near-data"), np.where(exposed > 0, "link", ""))
    return tiled.with_launch_floor(parts, work, device.constants), [str(name) or None for name in names]


def _by_contention(is_shared: NDArray[np.bool_], ns_of: Callable[[bool], Array]) -> Array:
    """A time by whether the host computes while the link carries weights, row by row."""
    if not is_shared.any():
        return np.asarray(ns_of(False))
    return np.where(is_shared, ns_of(True), ns_of(False))


def _copy_side(work: Work, copied: Mask, gemms: Array, device: Device, contended: bool) -> Array:
    """What of copies beside the other work is exposed (7.3), at the rate that modules and link both reach."""
    if not copied.any():
        return np.zeros(len(gemms))
    rate = link_rate(device.profile, "copy", contended=contended)[0]
    striped = _striped(work, device)
    transfer = copies_ns(work, copied & striped, rate, device.offload)
    if not striped.all():
        from_one = min(rate, host_bytes_per_s(device.profile) / device.profile["n_ndp_count"])
        transfer = transfer + copies_ns(work, copied & ~striped, from_one, device.offload)
    return exposed_ns(work, copied, transfer, gemms, device)


def _striped(work: Work, device: Device) -> Mask:
    """Which experts lie over all modules of host memory instead of in one, `[batch, expert]`; all where modules do not
    compute, for then nobody would put an expert into one."""
    if device.striped is not None:
        return device.striped
    return np.full(work.rows.shape, "n_ndp_count" not in device.profile.quantities or device.layout == "striped")


def crossing_each_ns(work: Work, device: Device) -> Array:
    """Activations of each expert, out of the device and back over the link, `[batch, expert]` ns."""
    last = np.maximum((work.n > 0).sum(axis=1) - 1, 0)
    out_width, back_width = work.k[:, 0], work.n[np.arange(len(last)), last]
    forth, back = back_rate(device.profile)[0], link_rate(device.profile, "copy")[0]
    per_row = work.activation_bytes * (out_width / forth + back_width / back) * NS_PER_S
    return np.asarray(work.rows * per_row[:, None])


def host_ns(work: Work, on_host: Mask, device: Device, *, contended: bool = False) -> Array:
    """How long the CPU computes the experts of `on_host[batch, expert]`, one after another, `[batch]` ns (7.4).

    A fitted model of the CPU (`Device.host`) says it where there is one, else the rates of the machine. `contended`
    where copies of weights share the host's memory.
    """
    awake = on_host & (work.rows > 0)
    if device.host is not None:
        none = np.zeros_like(work.layer)
        part = part_of(work, awake, awake.sum(axis=1).astype(np.float64))
        part = replace(part, layer=none, router=none, eager=none, tile=None)
        host = device.host
        return np.where(awake.any(axis=1), total(host.form.resident_parts(part, host.roof, host.constants)), 0.0)
    return np.asarray(np.where(awake, host_each_ns(work, device, contended=contended), 0.0).sum(axis=1))


def host_each_ns(work: Work, device: Device, *, contended: bool = False) -> Array:
    """How long each expert takes on the CPU at the rates of the machine, `[batch, expert]` ns (7.4): the longer of its
    FLOPs and of reading its weights.

    `contended`: at the rates measured beside copies, and weights are read with what the copies leave of the bandwidth,
    at least half of it.
    """
    profile, o = device.profile, device.offload
    bytes_per_s = host_bytes_per_s(profile)
    if contended:
        bytes_per_s = max(bytes_per_s - link_rate(profile, "copy", contended=True)[0], bytes_per_s / 2)
    flops_per_s = host_gemm(profile, contended=contended)[1].value * o.host_eff_compute
    reading = expert_bytes(work) / (bytes_per_s * o.host_eff_memory)
    computing = 2.0 * work.rows * (work.k * work.n).sum(axis=1, keepdims=True) / flops_per_s
    return np.asarray(np.maximum(reading, computing) * NS_PER_S + o.host_expert_ns)


def near_data_ns(work: Work, near_data: Mask, read: Mask, device: Device) -> Array:
    """How long the busiest memory module works on the experts of `near_data[batch, expert]`, `[batch]` ns (7.5).

    An expert is on one module, or on all at once where it is striped. Before that modules serve the weights of
    `read[batch, expert]` to device and host (TriMoE's T_cont), each with its part of the bandwidth.
    """
    require_one_of("layout", device.layout, LAYOUTS)
    require_one_of("spread", device.spread, SPREADS)
    computing, serving = near_data_each_ns(work, device)
    n = int(device.profile["n_ndp_count"])
    striped = _striped(work, device)
    times, served = np.where(near_data, computing, 0.0), np.where(read, serving, 0.0)
    everywhere = np.where(striped, times / n + served, 0.0).sum(axis=1)
    if striped.all():
        return np.asarray(everywhere)
    times, contended = np.where(striped, 0.0, times), _even(np.where(striped, 0.0, served * n), n)
    if device.spread == "even":
        return np.asarray((_even(times, n) + contended).max(axis=1) + everywhere)
    return np.asarray(longest_first(times, contended).max(axis=1) + everywhere)


def near_data_each_ns(work: Work, device: Device) -> tuple[Array, Array]:
    """How long each expert takes on one memory module, the longer of its FLOPs and of its weights at its rates, and
    how long all modules together serve its weights to others, `[batch, expert]` ns; 0 without rows."""
    require_near_data(device.profile)
    profile, eff = device.profile, device.offload.ndp_eff
    weights = (work.k * work.n).sum(axis=1, keepdims=True)
    computing = 2.0 * work.rows * weights / (profile["ndp_peak_flops_per_s"] * eff)
    reading = weights * work.weight_bytes / (profile["ndp_peak_bytes_per_s"] * eff)
    awake = (work.rows > 0) * NS_PER_S
    return np.maximum(computing, reading) * awake, expert_bytes(work) / host_bytes_per_s(profile) * awake


def _even(values: Array, n: int) -> Array:
    """Sums over the experts of each module, `[batch, module]`, expert e being on module e mod n."""
    return np.stack([values[:, unit::n].sum(axis=1) for unit in range(n)], axis=1)


def longest_first(times: Array, start: Array) -> Array:
    """How long each unit works, `[batch, unit]`, when jobs `times[batch, job]` go, the longest first, to the unit that
    is least busy (LPT, Graham 1969); `start[batch, unit]` is what units have to do before."""
    loads, batch = start.copy(), np.arange(len(start))
    for job in np.argsort(-times, axis=1, kind="stable").T:
        loads[batch, loads.argmin(axis=1)] += times[batch, job]
    return loads

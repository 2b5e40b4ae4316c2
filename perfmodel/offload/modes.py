"""What a MoE layer costs when some experts' weights live in host memory: access modes over the same roofs.

Numbers in brackets are those of docs/model.md. Times are ns.
"""

import numpy as np

from perfmodel.capture_lines import RESIDENCIES
from perfmodel.errors import InputError
from perfmodel.physics import Array, Parts, Work, sum_parts, tiled
from perfmodel.placement import COPIED, IN_PLACE, NEAR_DATA, ON_HOST, RESIDENT, Tiers

from .beside import beside_parts
from .device import (
    ACCESS_MODES,
    Device,
    Mask,
    copies_ns,
    counts_ns,
    link_rate,
    part_of,
    rate_keys,
    require_near_data,
    require_one_of,
)
from .in_place import in_place_parts
from .overlap import exposed_ns
from .paged import paged_parts

Binding = list[str | None]

# The tier of what an access mode reaches. Modes whose experts others compute, or that are read meanwhile, mix.
TIER_OF = {"zero-copy": IN_PLACE, "copy": COPIED, "copy-overlap": COPIED, "cpu": ON_HOST, "near-data": NEAR_DATA}
MIXABLE = ("zero-copy", "copy-overlap", "cpu", "near-data")


def modes_of(access: str) -> tuple[str, ...]:
    """The access modes of one, or of several that are written with a plus (`copy-overlap+cpu`); raises InputError for
    an unknown one and for those that do not mix."""
    modes = tuple(access.split("+"))
    for mode in modes:
        require_one_of("access mode", mode, ACCESS_MODES if len(modes) == 1 else MIXABLE)
    if len(set(modes)) < len(modes):
        raise InputError(f"access {access!r} names a mode twice")
    return modes


def placement_parts(work: Work, tier: Tiers, access: str, device: Device) -> tuple[Parts, Binding]:
    """Latency by part, ns `[batch]`, and what binds, with each expert in `tier[batch, expert]`, a number of
    placement.TIERS, of one access mode or several (see `modes_of`).

    Of one mode it only counts whether an expert is resident. Raises InputError as `offload_parts` does.
    """
    modes = modes_of(access)
    if len(modes) == 1:
        return offload_parts(work, tier != RESIDENT, access, device)
    for mode in modes:
        _ = rate_keys(device.profile, mode)  # refuses machines that lack what it needs
    return beside_parts(work, tier, device)


def offload_parts(work: Work, offloaded: Mask, access: str, device: Device) -> tuple[Parts, Binding]:
    """Latency by part, ns `[batch]`, with the experts of `offloaded[batch, expert]` outside device memory, and for each
    batch row the part that binds although it overlaps others (None: the largest part binds). Model 7.

    Nothing offloaded is the resident latency exactly. Raises InputError for an unknown access mode or residency, and
    for a machine that lacks what the mode needs.
    """
    require_one_of("access mode", access, ACCESS_MODES)
    require_one_of("residency", device.residency or RESIDENCIES[0], RESIDENCIES)
    is_full = access != "paged" or device.n_slots is None or bool((device.n_slots >= work.n_experts).all())
    if not offloaded.any() and is_full:
        return device.form.resident_parts(work, device.roof, device.constants), [None] * len(work.k)
    _ = link_rate(device.profile, access, device.residency), device.kernel  # both refuse machines that cannot offload
    if access == "near-data":
        require_near_data(device.profile)
    if access in ("cpu", "near-data"):
        domain = np.where(offloaded, ON_HOST if access == "cpu" else NEAR_DATA, RESIDENT)
        return beside_parts(work, domain, device)
    parts, binding = {
        "zero-copy": _in_place,
        "copy": _copied,
        "copy-overlap": _copied_meanwhile,
        "paged": paged_parts,
    }[access](work, offloaded, device)
    return tiled.with_launch_floor(parts, work, device.constants), binding


def _in_place(work: Work, offloaded: Mask, device: Device) -> tuple[Parts, Binding]:
    """Zero-copy: one launch that reads two memories, or two launches of one memory each (7.1)."""
    other = tiled.other_parts(work, device.roof, device.constants)
    n_gone = offloaded.sum(axis=1)
    if device.residency != "split":
        return sum_parts(in_place_parts(work, offloaded, device), other), [None] * len(n_gone)
    here = part_of(work, ~offloaded, work.n_experts - n_gone)
    there = part_of(work, offloaded, n_gone)
    is_two = (here.rows.any(axis=1) & there.rows.any(axis=1)).astype(np.float64)
    second = is_two * (work.k > 0).sum(axis=1) * device.constants.call_ns
    parts = sum_parts(
        tiled.gemm_parts(tiled.prepare(here, device.kernel), device.roof, device.constants),
        in_place_parts(there, offloaded, device),
        other,
        {"overhead": second + counts_ns(work, offloaded & (work.rows > 0), device.offload)},
    )
    return parts, [None] * len(n_gone)


def _arrived_parts(work: Work, offloaded: Mask, device: Device) -> Parts:
    """The layer once all weights are in device memory, without the host's launch floor."""
    return sum_parts(
        tiled.gemm_parts(tiled.prepare(work, device.kernel), device.roof, device.constants),
        tiled.other_parts(work, device.roof, device.constants),
        {"overhead": counts_ns(work, offloaded & (work.rows > 0), device.offload)},
    )


def _copied(work: Work, offloaded: Mask, device: Device) -> tuple[Parts, Binding]:
    """Copy, then compute: the link's time and the resident layer's add up (7.2)."""
    transfer = copies_ns(work, offloaded, _copy_rate(device), device.offload)
    return sum_parts(_arrived_parts(work, offloaded, device), {"link": transfer}), [None] * len(transfer)


def _copied_meanwhile(work: Work, offloaded: Mask, device: Device) -> tuple[Parts, Binding]:
    """Copy beside computing: what of the copy outlasts earlier work and the other experts is exposed (7.3)."""
    transfer = copies_ns(work, offloaded, _copy_rate(device), device.offload)
    parts = _arrived_parts(work, offloaded, device)
    exposed = exposed_ns(work, offloaded, transfer, parts["compute"] + parts["memory"], device)
    return sum_parts(parts, {"link": exposed}), _link_where(exposed)


def _copy_rate(device: Device) -> float:
    return link_rate(device.profile, "copy", contended=device.link_busy)[0]


def _link_where(exposed: Array) -> Binding:
    return ["link" if x > 0 else None for x in exposed]

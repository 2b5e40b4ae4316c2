"""What computes, what lies beside it, and at which rates: a machine as the access modes see it."""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfmodel import hardware
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile, Quantity
from perfmodel.physics import PEAK_STREAM_FRAC, Array, Ceilings, Counts, Form, Work, tiled
from perfmodel.text import NS_PER_S

from .constants import ASSUMED, OffloadConstants

Mask = NDArray[np.bool_]

# zero-copy: the kernel reads offloaded weights in place over the link. copy: active offloaded experts are copied, then
# computed. copy-overlap: copied while others compute. cpu: computed on the host. near-data: computed inside the memory
# modules that hold them. paged: device memory is a cache of experts, and those not in it are copied when needed.
ACCESS_MODES = ("zero-copy", "copy", "copy-overlap", "cpu", "near-data", "paged")
LAYOUTS = ("localised", "striped")  # an expert's weights in host memory: on one module, or over all of them
SPREADS = ("lpt", "even")  # experts over modules: longest first onto the least busy one, or expert e on module e mod n
NDP_KEYS = ("n_ndp_count", "ndp_peak_bytes_per_s", "ndp_peak_flops_per_s")


@dataclass(frozen=True)
class Host:
    """The CPU beside a GPU as a fitted model knows it: the form of its kernel, its ceilings, its constants."""

    form: Form
    roof: Ceilings
    constants: Any


@dataclass(frozen=True)
class Device:
    """What computes: the machine, its ceilings for a dtype, its kernel's form and constants, and those of offloading.

    `residency` is how zero-copy sees two memories, one of RESIDENCIES: one launch over mapped pages (null too), two
    launches, one launch over plain system memory. `host` is a fitted model of the CPU; null: the machine's rates
    and the `host_` constants say what it does. `previous_ns` is the time of work before this layer under which a copy
    may hide, `link_busy` whether weights of other layers cross the link while the host computes. `layout` and `spread`
    are those of near-data modules, `striped[batch, expert]` says it by expert (null: all as `layout`). `n_slots` is how
    many experts of a layer a paged memory holds (null: as many as are not offloaded), `shares[batch, expert]` their
    long-run popularity (null: every step is as this one).
    """

    profile: HardwareProfile
    roof: Ceilings
    form: Form
    constants: Any
    offload: OffloadConstants = ASSUMED
    residency: str | None = None
    host: Host | None = None
    previous_ns: float = 0.0
    link_busy: bool = False
    layout: str = LAYOUTS[0]
    spread: str = SPREADS[0]
    n_slots: int | None = None
    shares: Array | None = None
    striped: Mask | None = None

    @property
    def kernel(self) -> tiled.Kernel:
        """What is known of the kernel; raises InputError for a CPU, which has no second memory to offload to."""
        if self.form.kernel is None or self.profile.device != "gpu":
            raise InputError(_no_second_tier(self.profile))
        return self.form.kernel


def _no_second_tier(profile: HardwareProfile) -> str:
    return f"hardware {profile.name!r} has no link to a second memory tier, so nothing can be offloaded"


def require_one_of(what: str, found: str, known: tuple[str, ...]) -> None:
    """Refuse a word that is none of the known ones."""
    if found not in known:
        raise InputError(f"unknown {what} {found!r}; known: {', '.join(known)}")


def link_rate(
    profile: HardwareProfile, access: str, residency: str | None = None, *, contended: bool = False
) -> tuple[float, str]:
    """Bytes per second at which offloaded weights reach the device, and the quantity that says so.

    The tighter of the link and nominal host memory: a one-way read can exceed STREAM, and on GH200 does. `contended`
    where the host computes at the same time. Raises InputError for a machine without a second memory tier.
    """
    first: tuple[str, ...] = ("link_h2d_contended_bytes_per_s",) if contended else ()
    if access == "zero-copy":
        system = ("link_system_read_bytes_per_s",) if residency == "system" else ()
        first = (*system, "link_kernel_read_bytes_per_s")
    found = profile.first(*first, "link_h2d_copy_bytes_per_s", "link_peak_bytes_per_s")
    if found is None:
        raise InputError(_no_second_tier(profile))
    host = profile.first("host_peak_bytes_per_s")
    if host is not None and host[1].value < found[1].value:
        return host[1].value, host[0]
    return found[1].value, found[0]


def host_gemm(profile: HardwareProfile, *, contended: bool = False) -> tuple[str, Quantity]:
    """The rate of expert GEMMs on the host, of them while copies run where that was measured."""
    first = ("host_gemm_contended_flops_per_s",) if contended else ()
    found = profile.first(*first, "host_gemm_flops_per_s")
    if found is None:
        raise InputError(f"hardware {profile.name!r} has no host_gemm_flops_per_s, needed for --access cpu")
    return found


def host_stream(profile: HardwareProfile) -> tuple[str, Quantity]:
    """The bandwidth of host memory, as a streaming kernel reaches it or nominal."""
    found = profile.first("host_stream_bytes_per_s", "host_peak_bytes_per_s")
    if found is None:
        raise InputError(f"hardware {profile.name!r} has no host memory bandwidth, needed for --access cpu")
    return found


def host_bytes_per_s(profile: HardwareProfile) -> float:
    """What streaming reaches in host memory: measured, or a stated share of the nominal peak."""
    key, quantity = host_stream(profile)
    return quantity.value * (PEAK_STREAM_FRAC if "_peak_" in key else 1.0)


def back_rate(profile: HardwareProfile) -> tuple[float, str]:
    """Bytes per second from the device to the host, and the quantity that says so."""
    found = profile.first("link_d2h_copy_bytes_per_s")
    return (found[1].value, found[0]) if found is not None else link_rate(profile, "copy")


def require_near_data(profile: HardwareProfile) -> None:
    """Refuse a machine whose memory modules do not compute."""
    missing = [key for key in NDP_KEYS if key not in profile.quantities]
    if missing:
        able = [name for name in hardware.names() if set(NDP_KEYS) <= set(hardware.hardware(name).quantities)]
        shipped = f"; shipped machines that can: {', '.join(able)}" if able else ""
        raise InputError(
            f"hardware {profile.name!r} has no memory modules that compute (it lacks {', '.join(missing)}), needed for "
            f"--access near-data{shipped}"
        )


def rate_keys(profile: HardwareProfile, access: str, residency: str | None = None) -> tuple[str, ...]:
    """The quantities of a machine, beside its ceilings, that decide what offloading costs under an access mode."""
    found = [link_rate(profile, access, residency)[1]]
    if access == "cpu":
        found = [host_gemm(profile)[0], host_stream(profile)[0], *found, back_rate(profile)[1]]
    elif access == "near-data":
        require_near_data(profile)
        found = [*NDP_KEYS, *found, back_rate(profile)[1]]
    return tuple(dict.fromkeys(found))


def usable_modes(profile: HardwareProfile) -> tuple[str, ...]:
    """The access modes that a machine has all numbers for; none where there is no second memory tier."""
    found = []
    for access in ACCESS_MODES if profile.device == "gpu" else ():
        with suppress(InputError):
            rate_keys(profile, access)
            found.append(access)
    return tuple(found)


def part_of(work: Work, keep: Mask, n_experts: Array) -> Work:
    """The same work for the experts of `keep[batch, expert]` alone, in a launch over `n_experts[batch]` experts."""
    return replace(
        work,
        counts=Counts(np.where(keep, work.rows, 0.0)),
        routing_of=np.arange(len(work.k), dtype=np.int64),
        n_experts=np.maximum(n_experts, 1.0),
    )


def expert_bytes(work: Work) -> Array:
    """Weight bytes of one expert in all grouped GEMMs, `[batch, 1]`."""
    return np.asarray((work.k * work.n).sum(axis=1, keepdims=True) * work.weight_bytes)


def copies_ns(work: Work, copied: Mask, bytes_per_s: float, o: OffloadConstants) -> Array:
    """How long the link carries the experts of `copied[batch, expert]` that have rows, `[batch]` ns."""
    return np.asarray(np.where(copied, copy_each_ns(work, bytes_per_s, o), 0.0).sum(axis=1))


def copy_each_ns(work: Work, bytes_per_s: float, o: OffloadConstants) -> Array:
    """How long the link carries each expert, `[batch, expert]` ns; 0 without rows."""
    per_expert = expert_bytes(work) / (bytes_per_s * o.copy_eff) * NS_PER_S + o.copy_ns
    return np.asarray(np.where(work.rows > 0, per_expert, 0.0))


def counts_ns(work: Work, active: Mask, o: OffloadConstants) -> Array:
    """What a whole layer with active offloaded experts pays for telling the host its counts, `[batch]` ns."""
    return np.asarray(np.where((work.layer > 0) & active.any(axis=1), o.counts_ns, 0.0))

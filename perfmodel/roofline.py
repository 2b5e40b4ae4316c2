"""Ceilings of a machine per memory tier, ridge points, and where a measured workload stands under them."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from perfmodel.hardware import HardwareProfile
from perfmodel.latency import work_of
from perfmodel.physics import attainable_flops_per_s, ceilings, ideal_work
from perfmodel.text import NS_PER_S

DEVICE_MEMORY = "device memory"  # its bandwidth is that of `physics.ceilings`
# Tier name -> the quantities that give its bandwidth, best evidence first.
TIERS: dict[str, tuple[str, ...]] = {
    "host link, read in place": ("link_kernel_read_bytes_per_s",),
    "host link, copy": ("link_h2d_copy_bytes_per_s", "link_peak_bytes_per_s"),
    "host memory": ("host_stream_bytes_per_s", "host_peak_bytes_per_s"),
}


@dataclass(frozen=True)
class Tier:
    """One slanted ceiling: bandwidth of a memory tier, its evidence, and the ridge point in FLOP per byte."""

    name: str
    bytes_per_s: float
    kind: str
    ridge_flops_per_byte: float


def tiers(profile: HardwareProfile, dtype: str) -> list[Tier]:
    """The slanted ceilings of a machine, fastest first (Williams, Waterman, Patterson, CACM 2009)."""
    roof = ceilings(profile, dtype)
    peak, memory = roof.flops_per_s, profile.quantities[roof.from_keys[1]]
    found = {name: profile.first(*keys) for name, keys in TIERS.items()}
    rows = [Tier(name, q[1].value, q[1].kind, peak / q[1].value) for name, q in found.items() if q is not None]
    rows.append(Tier(DEVICE_MEMORY, roof.bytes_per_s, memory.kind, peak / roof.bytes_per_s))
    return sorted(rows, key=lambda tier: -tier.bytes_per_s)


def points(observations: pl.DataFrame, profile: HardwareProfile) -> pl.DataFrame:
    """Where each observation stands: arithmetic intensity (FLOP per byte of active weights and activations), achieved
    rate, share of the roof above it, and whether that roof is compute or memory.

    FLOPs and bytes are those of the grouped GEMMs; the time of a whole layer holds more, so its rate reads low.
    """
    work = work_of(observations)
    roof = ceilings(profile, observations["dtype"][0])
    flops, weight_bytes = (work.mean(x) for x in ideal_work(work))
    activation_bytes = work.mean(work.activation_bytes * work.n_rows * (work.k + work.n).sum(axis=1))
    intensity = flops / (weight_bytes + activation_bytes)
    achieved = flops / observations["time_ns"].to_numpy() * NS_PER_S
    attainable = attainable_flops_per_s(intensity, roof.flops_per_s, roof.bytes_per_s)
    return observations.select("op", "shape", "n_tokens", "routing", "time_ns").with_columns(
        flops_per_byte=pl.Series(intensity),
        achieved_flops_per_s=pl.Series(achieved),
        roof_frac=pl.Series(achieved / attainable),
        bound=pl.Series(np.where(attainable < roof.flops_per_s, "memory", "compute")),
    )

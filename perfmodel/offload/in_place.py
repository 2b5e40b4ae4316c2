"""Experts that kernels read where they lie: grouped GEMMs over device memory and, through the link, host memory."""

import numpy as np

from perfmodel.physics import Array, Parts, Work, smooth_max, sum_parts, tiled
from perfmodel.text import NS_PER_S

from .device import Device, Mask, link_rate


def link_ns(work: Work, device: Device) -> list[Array]:
    """How long each expert's weights take to be read over the link, for each grouped GEMM, ns `[batch, expert]`; again
    for each further row block, and not at all without rows (7.1)."""
    o = device.offload
    rate = link_rate(device.profile, "zero-copy", device.residency)[0] * o.link_eff
    reads = 1 + o.reread_frac * np.maximum(np.ceil(work.rows / o.reread_rows) - 1, 0)
    weights = ((work.k * work.n).T * work.weight_bytes)[:, :, None]  # [gemm, batch, 1]
    return [np.where(work.rows > 0, of_gemm * reads / rate * NS_PER_S, 0.0) for of_gemm in weights]


def in_place_parts(work: Work, offloaded: Mask, device: Device) -> Parts:
    """The grouped GEMMs by part, ns `[batch]`, with the weights of `offloaded[batch, expert]` read over the link (7.1).

    Of the experts a share `link_overlap_frac` runs pooled under one maximum, the rest one after another; resident ones
    are pooled with each other in either case, as they are when nothing is offloaded.
    """
    o, c = device.offload, device.constants
    gemms = []
    roofs_of_gemms = tiled.expert_roofs(work, device.kernel, device.roof, c)
    for roofs, over_link in zip(roofs_of_gemms, link_ns(work, device), strict=True):
        link = np.where(offloaded, over_link, 0.0)
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

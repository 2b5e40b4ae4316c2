"""What of a copy is seen when experts are computed while others arrive."""

import numpy as np

from perfmodel.physics import Array, Work, smooth_value, tiled

from .device import Device, Mask, expert_bytes

CHUNK_BYTES = 2**24  # a copy of this size reaches the link's rate: experts arrive in chunks of at least so much


def exposed_ns(work: Work, copied: Mask, transfer: Array, gemms: Array, device: Device) -> Array:
    """The part of a `transfer[batch]` that no work hides, `[batch]` ns (model 7.3).

    It may hide under the work before the layer and under the layer's own GEMMs, `gemms[batch]`, except those of the
    last chunk, which begin when it has arrived. Of what could hide, the share `copy_overlap_frac` does.
    """
    room = device.previous_ns + np.maximum(gemms - last_chunk_ns(work, copied, device), 0.0)
    return np.asarray(np.maximum(transfer - device.offload.copy_overlap_frac * np.minimum(transfer, room), 0.0))


def last_chunk_ns(work: Work, copied: Mask, device: Device) -> Array:
    """GEMM time of the chunk of copied experts that arrives last, `[batch]` ns.

    Chunks hold whole experts, CHUNK_BYTES of them or half of all copied ones where these are fewer; which experts are
    the last is chance, so the mean expert stands for each.
    """
    times = np.zeros_like(work.rows)
    for roofs in tiled.expert_roofs(work, device.kernel, device.roof, device.constants):
        memory = roofs.weights + roofs.activations
        times = times + smooth_value([roofs.compute, memory], device.constants.smooth_p)
    active = copied & (work.rows > 0)
    n_active = active.sum(axis=1)
    enough = np.ceil(CHUNK_BYTES / expert_bytes(work)[:, 0])
    n_last = np.maximum(np.minimum(enough, np.ceil(n_active / 2)), 1.0)
    return np.asarray(np.where(active, times, 0.0).sum(axis=1) / np.maximum(n_active, 1) * n_last)

"""Device memory as a cache of experts: which are not there when a batch wants them, and what fetching them costs."""

import numpy as np

from perfmodel.errors import InputError
from perfmodel.physics import Array, Parts, Work, sum_parts, tiled

from .device import Device, Mask, copies_ns, counts_ns, link_rate

N_HALVINGS = 80


def paged_parts(work: Work, offloaded: Mask, device: Device) -> tuple[Parts, list[str | None]]:
    """Latency by part, ns `[batch]`, when a layer has slots for some of its experts and evicts the least recently used.

    Expected distinct misses are copied before they are computed; where more experts are awake than there are slots, the
    layer runs in waves, each a launch of its own, those found in slots first (model 7.7).
    """
    n_slots = slots_of(work, offloaded, device)
    awake = (work.rows > 0).sum(axis=1)
    misses = expected_misses(work, n_slots, device.shares)
    one = copies_ns(work, work.rows > 0, link_rate(device.profile, "copy")[0], device.offload) / np.maximum(awake, 1)
    n_waves = np.maximum(np.ceil(awake / n_slots), 1.0)
    parts = sum_parts(
        tiled.gemm_parts(tiled.prepare(work, device.kernel), device.roof, device.constants),
        tiled.other_parts(work, device.roof, device.constants),
        {"link": misses * one},
        {"overhead": (n_waves - 1) * (work.k > 0).sum(axis=1) * device.constants.call_ns},
        {"overhead": counts_ns(work, (misses[:, None] > 0) & (work.rows > 0), device.offload)},
    )
    return parts, [None] * len(awake)


def slots_of(work: Work, offloaded: Mask, device: Device) -> Array:
    """How many experts of a layer fit in device memory, `[batch]`: as many as are not offloaded, at least the one that
    is computed, unless said otherwise; raises InputError for less than one."""
    if device.n_slots is None:
        return np.asarray(np.maximum(work.n_experts - offloaded.sum(axis=1), 1.0))
    if device.n_slots < 1:
        raise InputError(f"{device.n_slots} slots for experts, expected at least 1 for --access paged")
    return np.asarray(np.minimum(device.n_slots, work.n_experts), dtype=np.float64)


def expected_misses(work: Work, n_slots: Array, shares: Array | None) -> Array:
    """How many of the experts that are awake are expected not to be in a slot, `[batch]`.

    Che's approximation of LRU (Che, Tung & Wang, IEEE JSAC 2002), step by step: an expert is in a slot when it was
    awake in one of the last tau steps, tau such that as many experts as there are slots are expected to have been. A
    step wakes an expert of `shares[batch, expert]` with probability 1 - (1 - top-k x share)^tokens; null shares: every
    step wakes the experts that this one does.
    """
    rows = work.rows
    if shares is None:
        asleep = np.where(rows > 0, 0.0, 1.0)
    else:
        top_k = (work.n_rows / work.n_tokens)[:, None]
        asleep = (1 - np.minimum(top_k * shares, 1.0)) ** work.n_tokens[:, None]
    log_asleep = np.log(np.clip(asleep, 1e-12, 1.0))
    tau = _characteristic_steps(log_asleep, n_slots)
    is_missing = np.exp(log_asleep * tau[:, None])
    is_missing = np.where((n_slots >= work.n_experts)[:, None], 0.0, is_missing)
    return np.asarray(np.where(rows > 0, is_missing, 0.0).sum(axis=1))


def _characteristic_steps(log_asleep: Array, n_slots: Array) -> Array:
    """The tau for which sum (1 - asleep^tau) is the number of slots, `[batch]`, by bisection of its logarithm; a large
    one where fewer experts than slots ever wake."""
    low, high = np.full(len(n_slots), -40.0), np.full(len(n_slots), 40.0)
    for _ in range(N_HALVINGS):
        middle = (low + high) / 2
        n_inside = (-np.expm1(log_asleep * np.exp(middle)[:, None])).sum(axis=1)
        low, high = np.where(n_inside < n_slots, middle, low), np.where(n_inside < n_slots, high, middle)
    return np.asarray(np.exp((low + high) / 2))

"""Many placements of one layer at once: what each expert adds is computed once, a placement is a sum over experts."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.physics import Array, Work, tiled, total
from perfmodel.text import NS_PER_S

from .device import Device, Mask, copies_ns, counts_ns, link_rate

Table = NDArray[np.float32]
IN_TABLES = ("zero-copy", "copy")


@dataclass(frozen=True, eq=False)
class CostTable:
    """What the latency of one layer is made of, by expert, under one access mode.

    `per_expert[expert, column]` are the sums that an offloaded expert moves, `fixed_ns` what no placement changes;
    `compute_ns`, `memory_ns` (by GEMM) are those of all experts resident.
    """

    access: str
    per_expert: Table
    fixed_ns: float
    compute_ns: Array
    memory_ns: Array
    smooth_p: float
    overlap_frac: float
    counts_ns: float  # what telling the host its counts costs where any active expert is copied

    def latencies_ns(self, offloaded: Mask | Table) -> Array:
        """Latency of each placement, ns `[placement]`, of `offloaded[placement, expert]`; as `offload_parts` has it."""
        moved = (np.asarray(offloaded, dtype=np.float32) @ self.per_expert).astype(np.float64)
        latency = np.full(len(moved), self.fixed_ns)
        p, n_gemms = self.smooth_p, len(self.compute_ns)
        if self.access == "copy":
            gemms = sum(_smooth(self.compute_ns[g], self.memory_ns[g], 0.0, p) for g in range(n_gemms))
            return np.asarray(latency + gemms + moved[:, 0] + np.where(moved[:, 1] > 0.5, self.counts_ns, 0.0))
        for g in range(n_gemms):
            own, compute, traffic, weights, link = moved[:, 5 * g : 5 * g + 5].T
            rest = _smooth(self.compute_ns[g] - compute, self.memory_ns[g] - traffic, 0.0, p)
            pooled = _smooth(self.compute_ns[g], self.memory_ns[g] - weights, link, p)
            latency += (1 - self.overlap_frac) * (own + rest) + self.overlap_frac * pooled
        return np.asarray(latency)


def _smooth(a: Array | float, b: Array | float, c: Array | float, p: float) -> Array:
    """(a^p + b^p + c^p)^(1/p), of what rounding may have brought just below zero too."""
    a, b, c = (np.maximum(np.asarray(x, dtype=np.float64), 0.0) for x in (a, b, c))
    top = np.maximum(np.maximum(np.maximum(a, b), c), 1e-12)
    return np.asarray(top * ((a / top) ** p + (b / top) ** p + (c / top) ** p) ** (1 / p))


def cost_table(work: Work, access: str, device: Device) -> CostTable:
    """The table of a layer, the single batch row of `work`, under zero-copy in one launch, or a serial copy.

    Launches by the host are not in it. Raises InputError for other access modes and for several layers.
    """
    if access not in IN_TABLES:
        raise InputError(f"access mode {access!r} has no table of costs; those that have: {', '.join(IN_TABLES)}")
    if access == "zero-copy" and device.residency == "split":
        raise InputError("zero-copy in two launches (split) has no table of costs; in one launch it has")
    if len(work.k) != 1:
        raise InputError(f"a table of costs is of one layer, found {len(work.k)}")
    o, c = device.offload, device.constants
    active = work.rows > 0
    columns: list[Array] = []
    compute, memory = [], []
    reads = 1 + o.reread_frac * np.maximum(np.ceil(work.rows / o.reread_rows) - 1, 0)
    rate = link_rate(device.profile, "zero-copy", device.residency)[0] * o.link_eff
    for g, roofs in enumerate(tiled.expert_roofs(work, device.kernel, device.roof, c)):
        weight_bytes = work.k[:, g, None] * work.n[:, g, None] * work.weight_bytes
        link = np.where(active, weight_bytes * reads / rate * NS_PER_S, 0.0)
        own = _smooth(roofs.compute, roofs.activations, link, c.smooth_p)
        columns += [own, roofs.compute, roofs.weights + roofs.activations, roofs.weights, link]
        compute.append(roofs.compute.sum())
        memory.append((roofs.weights + roofs.activations).sum())
    if access == "copy":
        experts = np.arange(work.rows.shape[1])
        one_each = [copies_ns(work, experts[None] == i, link_rate(device.profile, "copy")[0], o) for i in experts]
        columns = [np.stack(one_each, axis=1), active.astype(np.float64)]
    fixed = float(total(tiled.other_parts(work, device.roof, c))[0])
    per_expert = np.concatenate(columns, axis=0).T.astype(np.float32)
    told = float(counts_ns(work, active, o)[0])
    roofs_ns = np.array(compute), np.array(memory)
    return CostTable(access, per_expert, fixed, *roofs_ns, c.smooth_p, o.link_overlap_frac, told)

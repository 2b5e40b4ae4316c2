"""Why a prediction is what it is: which roof binds, rows against the knee, sensitivities, the nearest measurements."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from perfmodel import text
from perfmodel.latency import LatencyModel, hull_features
from perfmodel.offload import Device, link_rate, modes_of, placement_parts
from perfmodel.physics import Array, Work, total
from perfmodel.placement import Tiers

STEP_LOG = 0.01  # by how much a constant is moved to see what that does
GEMMS = ("up", "down")  # the grouped GEMMs of a layer, in the order of `Work.k`
N_SENSITIVE, N_NEAREST = 5, 3


@dataclass(frozen=True)
class Nearest:
    """A measurement near a prediction: how far away along the axes of the hull, in factors of two, all taken together;
    what was measured, and what a model that had not seen its shape predicted."""

    shape: str
    op: str
    n_tokens: int
    routing: str
    octaves: float
    measured_ns: float
    predicted_ns: float


@dataclass(frozen=True)
class Explanation:
    """What lies behind a prediction.

    `roofs` says for each grouped GEMM with all experts resident whether computing or memory binds it, and how many
    times the other roof fits. `rows_per_active_expert` (mean over layers) stands against `knee_rows`, the rows at which
    an expert's GEMMs turn from bound by reading its weights to bound by computing, from device memory and from where
    offloaded ones are read.
    `sensitivity` is the relative change of the latency for a relative change of a constant, largest first.
    """

    roofs: dict[str, str]
    rows_per_active_expert: float
    knee_rows: dict[str, float]
    sensitivity: dict[str, float]
    nearest: tuple[Nearest, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"nearest": [asdict(one) for one in self.nearest]}

    def lines(self) -> list[str]:
        """As lines for people."""
        knees = ", ".join(f"{rows:,.0f} from {where}" for where, rows in self.knee_rows.items())
        found = [
            "roofs         " + ", ".join(f"{gemm} bound by {roof}" for gemm, roof in self.roofs.items()),
            f"rows          {self.rows_per_active_expert:,.1f} per active expert; computing binds above {knees}",
            "changes with  " + ", ".join(f"{name} ({value:+.2f})" for name, value in self.sensitivity.items()),
        ]
        for i, one in enumerate(self.nearest):
            what = f"{one.shape}, {text.count(one.n_tokens)} tokens, {one.routing}, {one.op}"
            times = f"measured {text.ns(one.measured_ns)}, predicted unseen {text.ns(one.predicted_ns)}"
            found.append(f"{'nearest' if i == 0 else '':14}{what}: {times} ({one.octaves:.1f} octaves away)")
        return found


def explain(work: Work, tier: Tiers, access: str, device: Device, model: LatencyModel | None) -> Explanation:
    """What a prediction for this work under this placement rests on."""
    return Explanation(
        roofs=_roofs(work, device),
        rows_per_active_expert=float((work.n_rows / work.n_active).mean()),
        knee_rows=_knees(work, tier, access, device),
        sensitivity=_sensitivity(work, tier, access, device),
        nearest=_nearest(work, device, model),
    )


def _roofs(work: Work, device: Device) -> dict[str, str]:
    """The larger of the time to compute and to move memory of each grouped GEMM, sums over layers, in words."""
    found = {}
    for g, (compute, memory) in enumerate(device.form.gemm_roofs(work, device.roof, device.constants)):
        if not (work.k[:, g] > 0).any():
            continue
        times = {"computing": float(compute.sum()), "memory": float(memory.sum())}
        binds = max(times, key=lambda roof: times[roof])
        ratio = max(times.values()) / max(min(times.values()), 1e-12)
        found[GEMMS[g]] = f"{binds} ({ratio:.1f}x)"
    return found


def _knees(work: Work, tier: Tiers, access: str, device: Device) -> dict[str, float]:
    """Rows n at which 2 n K N / F = w K N / B, of the achieved rates (the ridge point in rows), by source."""
    c, roof, o = device.constants, device.roof, device.offload
    flops = roof.flops_per_s * c.eff_compute
    sources = {"device memory": roof.bytes_per_s * c.eff_memory}
    over_link = [mode for mode in modes_of(access) if mode in ("zero-copy", "copy", "copy-overlap")]
    if tier.any() and over_link:
        share = o.link_eff if over_link[0] == "zero-copy" else o.copy_eff
        sources["the link"] = link_rate(device.profile, over_link[0], device.residency)[0] * share
    return {where: flops * work.weight_bytes / (2 * rate) for where, rate in sources.items()}


def _latency(work: Work, tier: Tiers, access: str, device: Device) -> float:
    return float(total(placement_parts(work, tier, access, device)[0]).mean())


def _sensitivity(work: Work, tier: Tiers, access: str, device: Device) -> dict[str, float]:
    """d log latency / d log constant of the constants that matter most, at most N_SENSITIVE; efficiencies stand for the
    rates of the machine."""
    base = _latency(work, tier, access, device)
    moved = np.exp(STEP_LOG)
    found = {}
    for part in ("constants", "offload"):
        values = getattr(device, part)
        for field in fields(values):
            changed = replace(values, **{field.name: getattr(values, field.name) * moved})
            latency = _latency(work, tier, access, replace(device, **{part: changed}))
            found[field.name] = float(np.log(latency / base) / STEP_LOG)
    ranked = sorted(found, key=lambda name: -abs(found[name]))
    return {name: round(found[name], 4) for name in ranked[:N_SENSITIVE] if abs(found[name]) > 0.005}


def _nearest(work: Work, device: Device, model: LatencyModel | None) -> tuple[Nearest, ...]:
    """The measurements of the model that lie nearest to the mean of the layers."""
    points = model.points_ if model is not None else None
    if not points:
        return ()
    here = {name: float(values.mean()) for name, values in hull_features(work, device.roof).items()}
    away: Array = np.zeros(len(points["shape"]))
    for name, value in here.items():
        away = away + np.log2(np.array(points[f"at_{name}"]) / value) ** 2
    away = np.sqrt(away)
    names = ("shape", "op", "n_tokens", "routing", "measured_ns", "predicted_ns")
    return tuple(
        Nearest(octaves=round(float(away[i]), 3), **{name: points[name][i] for name in names})
        for i in np.argsort(away, kind="stable")[:N_NEAREST]
    )

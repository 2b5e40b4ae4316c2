"""What is read off curves of slowdown: how many experts leave for nothing, which placements none beats, the knee."""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from perfmodel.capture import IS_OFFLOADED, Capture, per_workload
from perfmodel.moe import MoEShape
from perfmodel.predict import Prediction

FREE_FRAC = 0.02  # a slowdown up to this is called free: repeated measurements of a kernel differ by about as much


def n_free(curve: Sequence[Prediction], within_frac: float = FREE_FRAC) -> int:
    """How many experts of a layer may leave before the slowdown first passes 1 + `within_frac`, along a curve from none
    to all (`predict.slowdown_curve`): what they take hides under what the device does anyway."""
    found = 0
    for one in curve:
        if one.slowdown > 1 + within_frac:
            break
        found = one.n_offloaded
    return found


def most_free(curves: Mapping[str, Sequence[Prediction]], within_frac: float = FREE_FRAC) -> tuple[str, int, int]:
    """The curve along which most experts leave for nothing, the first of equals: label, how many, and of how many."""
    label = max(curves, key=lambda label: n_free(curves[label], within_frac))
    return label, n_free(curves[label], within_frac), curves[label][0].n_experts


def curve_rows(curves: Mapping[str, Sequence[Prediction]]) -> pl.DataFrame:
    """Curves as a table: a row for each point of each `line`, in order."""
    rows = [
        {
            "line": label,
            "n_offloaded": p.n_offloaded,
            "slowdown": p.slowdown,
            "latency_ns": p.latency_ns,
            "bottleneck": p.bottleneck,
            "basis": p.basis,
        }
        for label, curve in curves.items()
        for p in curve
    ]
    return pl.DataFrame(rows)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points (memory, slowdown) no other beats in both, by their place in `points`, the least memory first."""
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not found or points[i][1] < points[found[-1]][1]:
            found.append(i)
    return found


def knee(points: Sequence[tuple[float, float]]) -> int | None:
    """The place of the point of a falling curve that lies farthest below the line from its first to its last, both axes
    scaled to 1 (Satopaa et al. 2011, "Finding a kneedle in a haystack"); null where none lies below."""
    if len(points) < 3:
        return None
    values = np.array(points, dtype=np.float64)
    span = values[-1] - values[0]
    if (span == 0).any():
        return None
    x, y = ((values - values[0]) / span).T
    best = int((y - x).argmax())  # a falling curve is scaled to a rising one: below the line is above it
    return best if (y - x)[best] > 1e-9 else None


_SAME = ("op", "shape", "dtype", "n_tokens", "routing", "launch")


def measured_slowdowns(
    capture: Capture, shape: MoEShape, n_tokens: int, routing: str, access: str
) -> dict[str, list[tuple[float, float]]]:
    """What a capture measured of whole layers with offloaded experts, least used first, by how they were launched and
    zero-copy saw two memories: offloaded fractions with the time over that of the same layer with all resident.

    Only workloads of this shape, dtype, batch and routing whose resident layer was measured as well; empty for none.
    """
    rows = per_workload(capture.observations).filter(
        pl.col("gemm_k").is_null(),
        pl.col("shape") == shape.name,
        pl.col("dtype") == shape.dtype,
        pl.col("n_tokens") == n_tokens,
        pl.col("routing") == routing,
    )
    resident = rows.filter(~IS_OFFLOADED).select(*_SAME, resident_ns="time_ns")
    away = rows.filter(IS_OFFLOADED, pl.col("access") == access, pl.col("order") == "ascending")
    found: dict[str, list[tuple[float, float]]] = {}
    paired = away.join(resident, on=_SAME, how="inner", nulls_equal=True).sort("offload_frac")
    for row in paired.iter_rows(named=True):
        way = ", ".join(word for word in (row["residency"], row["launch"] or "launched by the host") if word)
        found.setdefault(f"measured, {way}", []).append((row["offload_frac"], row["time_ns"] / row["resident_ns"]))
    return found

"""What is read off curves of slowdown: how many experts leave for nothing, which placements none beats, the knee."""

from collections.abc import Mapping, Sequence

import numpy as np

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

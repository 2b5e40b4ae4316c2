"""From capture folders to a fitted model with its held-out errors: what `perfmodel fit` runs."""

from collections.abc import Callable, Sequence

import polars as pl

from perfmodel import text
from perfmodel.capture import (
    Capture,
    fingerprint_differences,
    fitted_rows,
    load_capture,
    per_workload,
    profile_of,
)
from perfmodel.errors import InputError, NotComparableError
from perfmodel.latency import Errors, LatencyModel, evaluate_by_shape


def fit_captures(
    paths: Sequence[str], progress: Callable[[str], None] = lambda _: None
) -> tuple[LatencyModel, dict[str, dict[str, Errors]]]:
    """Fit one model to captures of one machine, kernel and dtype; returns it with held-out errors by shape.

    Only resident experts in the dtype of the settings are fitted, and of calls launched by the host and calls replayed
    from a CUDA graph the more numerous; `progress` is told how many others were left out. Raises NotComparableError
    when the captures differ in machine, kernel or dtype, which must never be pooled, and InputError when nothing is
    left to fit or there are fewer than three shapes to hold out.
    """
    captures = [load_capture(path) for path in paths]
    first = captures[0]
    for other in captures[1:]:
        _require_same(first, other)
    observations = per_workload(pl.concat([capture.observations for capture in captures]))
    observations, n_left_out = fitted_rows(observations, first.dtype)
    for reason, n in n_left_out.items():
        progress(f"left out: {text.counted(n, 'workload')} {reason}")
    if not observations.height:
        raise InputError(f"{', '.join(c.name for c in captures)}: no resident {first.dtype} workload to fit a model on")
    progress(f"{observations.height} workloads of {observations['shape'].n_unique()} shapes")
    profile = profile_of(first)
    model = LatencyModel(profile, first.dtype, str(first.manifest["kernel"]))
    errors = evaluate_by_shape(model, observations, progress)
    model.fit(observations)
    model.evidence_ = {
        "captures": [{"name": c.name, "digest": c.digest, "n_observations": c.observations.height} for c in captures],
        "n_workloads": observations.height,
        "launch": observations["launch"][0],
        "machine": dict(first.manifest["machine"]),
        "software": dict(first.manifest["software"]),
    }
    return model, errors


def _require_same(first: Capture, other: Capture) -> None:
    if first.digest == other.digest:
        raise InputError(f"captures {first.name!r} and {other.name!r} are the same measurements twice")
    differences = fingerprint_differences(first, other)
    if differences:
        key, (a, b) = next(iter(differences.items()))
        raise NotComparableError(
            f"captures {first.name!r} and {other.name!r} differ in {key} ({a!r}, {b!r}) and cannot share a model"
        )

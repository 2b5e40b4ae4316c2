"""All that is said of the routing of a recording, in one record: `summarise`."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from perfmodel.errors import InputError

from .recording import Recording
from .sampling import SamplingError
from .statistics import Comparison, LayerStatistics, compare, expected_active, layer_statistics, n_resident_of
from .temporal import (
    CUTOFFS,
    HOT_FRAC,
    WINDOWS,
    Cutoffs,
    ExpertsInTime,
    HotSetOverlap,
    experts_in_time,
    hot_set_overlap,
)
from .verdict import RESIDENT_FRAC, Verdict, judge

DECODE_TOKENS = (1, 4, 16, 64, 256)  # batches that are judged where none are named


@dataclass(frozen=True, eq=False)
class RoutingSummary:
    """What a recording says of its routing: of each layer, over time, against others, and the verdict.

    `n_active_per_step` is how many experts of a layer a step used on average, `n_active_independent` how many it would
    with tokens that select independently; null where top-k or the tokens of steps are unknown. `overlaps` is empty and
    `experts` null for too few steps, or steps in no order of time.
    """

    recording: Recording
    layers: LayerStatistics
    verdict: Verdict
    resident_frac: float
    n_active_per_step: float
    n_active_independent: float | None
    overlaps: tuple[HotSetOverlap, ...]
    experts: ExpertsInTime | None
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON holds it: null where a figure cannot be told."""
        recording = self.recording
        chance = _chance_rows(self.verdict.sampling, len(self.layers.layers))
        gains = self.verdict.layer_gain_frac.tolist()
        rows = [
            row | {"gain_frac": gain_frac} | more
            for row, gain_frac, more in zip(self.layers.to_dicts(), gains, chance, strict=True)
        ]
        return {
            "name": recording.name,
            "n_steps": len(recording.loads),
            "n_layers": recording.loads.shape[1],
            "n_experts": recording.loads.shape[2],
            "top_k": recording.top_k,
            "n_tokens": None if recording.n_tokens is None else int(recording.n_tokens.sum()),
            "is_ordered": recording.is_ordered,
            "notes": list(recording.notes),
            "verdict": {
                "label": self.verdict.label,
                "reason": self.verdict.reason,
                "resident_frac": self.resident_frac,
                "resident": [asdict(each) for each in self.verdict.gains],
                "n_decode_tokens": self.verdict.n_decode_tokens,
                "decode": [asdict(each) for each in self.verdict.decode],
            },
            "n_active_per_step": self.n_active_per_step,
            "n_active_independent": self.n_active_independent,
            "layers": rows,
            "overlaps": [asdict(each) for each in self.overlaps],
            "experts_in_time": None if self.experts is None else _in_time(self.experts, recording),
            "against": [_against(each) for each in self.comparisons],
        }


def summarise(
    recording: Recording,
    n_tokens: Sequence[int] = DECODE_TOKENS,
    resident_frac: float = RESIDENT_FRAC,
    windows: Sequence[int] = WINDOWS,
    against: Sequence[Recording] = (),
    hot_frac: float = HOT_FRAC,
    cutoffs: Cutoffs = CUTOFFS,
) -> RoutingSummary:
    """All that is said of the routing of a recording; `against` are others that its hot experts are tried on.

    The verdict and comparisons are about resident_frac of experts, overlaps of windows about the hot_frac hottest;
    `cutoffs` say which experts are consistent and temporal.

    Raises InputError for fractions and batches that cannot be, top-k outside 1 to the number of experts, and others
    that are of another model.
    """
    n_experts = recording.loads.shape[2]
    if any(n < 1 for n in n_tokens):
        raise InputError(f"a batch of {min(n_tokens)} tokens, expected at least 1")
    if recording.top_k is not None and not 1 <= recording.top_k <= n_experts:
        raise InputError(f"top-k {recording.top_k} is outside 1 to the number of experts, {n_experts}")
    n_hot = max(n_resident_of(hot_frac, n_experts), 1)
    found = [hot_set_overlap(recording.loads, window, n_hot) for window in windows] if recording.is_ordered else []
    used = recording.loads.any(axis=2)
    return RoutingSummary(
        recording,
        layer_statistics(recording),
        judge(recording, n_tokens, resident_frac, windows),
        resident_frac,
        float((recording.loads > 0).sum(axis=2)[used].mean()),
        _independent(recording),
        tuple(each for each in found if each),
        experts_in_time(recording.loads, recording.layers, cutoffs) if recording.is_ordered else None,
        tuple(compare(recording, other, resident_frac) for other in against),
    )


def selected(recording: Recording, layers: Sequence[int]) -> Recording:
    """The recording of some layers alone, by their place in the model; raises InputError for one it does not have."""
    unknown = sorted(set(layers) - set(recording.layers.tolist()))
    if unknown:
        known = ", ".join(str(layer) for layer in recording.layers)
        raise InputError(f"{recording.name} has no layer {unknown[0]}; its layers are {known}")
    kept = np.isin(recording.layers, list(layers))
    return replace(recording, loads=recording.loads[:, kept], layers=recording.layers[kept])


def _independent(recording: Recording) -> float | None:
    if recording.n_tokens is None or recording.top_k is None:
        return None
    sizes, n_steps = np.unique(recording.n_tokens[recording.n_tokens > 0], return_counts=True)
    expected = expected_active(recording.shares, recording.top_k, sizes.tolist()).mean(axis=0)
    return float(np.average(expected, weights=n_steps))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _chance_rows(sampling: SamplingError | None, n_layers: int) -> list[dict[str, float | None]]:
    """The sampling error of each layer; null where there is none to tell."""
    names = [field.name for field in fields(SamplingError)]
    columns = [[None] * n_layers if sampling is None else getattr(sampling, name).tolist() for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _in_time(experts: ExpertsInTime, recording: Recording) -> dict[str, Any]:
    return asdict(experts.cutoffs) | {
        "joined_steps": experts.joined_steps,
        "n_joined": experts.n_joined,
        "pairs": [asdict(pair) for pair in experts.pairs],
        "layers": [
            {
                "layer": int(layer),
                "consistent": np.flatnonzero(experts.is_consistent[i]).tolist(),
                "temporal": np.flatnonzero(experts.is_temporal[i]).tolist(),
                "temporal_weight": _number(experts.temporal_weight[i]),
                "groups": [list(group) for group in experts.groups[i]],
                "group_correlation": _number(experts.group_correlation[i]),
            }
            for i, layer in enumerate(recording.layers)
        ],
    }


def _against(comparison: Comparison) -> dict[str, Any]:
    return {
        "name": comparison.name,
        "by_size_frac": comparison.by_size_frac,
        "served_frac": float(comparison.served_frac.mean()),
        "own_frac": float(comparison.own_frac.mean()),
        "kept_frac": comparison.kept_frac,
        "layers": [
            {"layer": int(layer), "rank_correlation": _number(rho), "served_frac": float(here), "own_frac": float(own)}
            for layer, rho, here, own in zip(
                comparison.layers, comparison.rank_correlation, comparison.served_frac, comparison.own_frac, strict=True
            )
        ],
    }

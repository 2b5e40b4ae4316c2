"""In which order a campaign measures its points, the telling ones first, and what is left out.

Each study's points are ordered so that every prefix is spread over the whole study, and the studies take turns. A
campaign that is cut anywhere therefore leaves a design that a model can be fitted on. Needs no torch.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from perfmodel.routing import Shares
from perfmodel.text import NS_PER_S

from .studies import CPU_SCALES, CUDA_SCALES, STUDIES, Facts, Maker
from .timing import Limits
from .workloads import Workload

SETUP_S = {"cpu": 0.05, "cuda": 0.06}  # making inputs, capturing a graph; what a point costs beside its calls
LONGEST_CALL_S = {"quick": 0.05, "standard": 0.5, "full": 2.0}
GUESS_OF_REPEATS = 6
SHARE_OF_LENGTH = 0.5  # a study's part of any beginning grows with the root of its points: small ones end early
# A launch per expert, and host work per call of an eager layer: only for guessing how long a point takes.
EXPERT_NS, LAYER_NS = {"cpu": 3_000.0, "cuda": 100.0}, {"cpu": 150_000.0, "cuda": 200_000.0}


@dataclass(frozen=True)
class Point:
    """One planned workload and the study that asked for it first."""

    workload: Workload
    study: str


def call_s(w: Workload, facts: Facts) -> float:
    """A guess at the seconds of one call, for planning only: the roofline plus what launches cost."""
    rows = w.n_tokens * w.top_k
    active = [count > 0 for count in w.tokens_per_expert]
    expert_bytes = w.touched_bytes / max(1, sum(active))
    far = sum(active[e] for e in w.offloaded or ()) * expert_bytes
    seconds = max(w.gemm_flops / facts.flops_per_s, (w.touched_bytes + w.activation_bytes) / facts.bytes_per_s)
    seconds += sum(active) * EXPERT_NS[facts.device] / NS_PER_S
    if w.op == "moe_layer":
        seconds += LAYER_NS[facts.device] / NS_PER_S
    if far and w.access == "cpu":
        moved = sum(w.tokens_per_expert[e] for e in w.offloaded or ()) / rows
        seconds += max(moved * w.gemm_flops / facts.host_flops_per_s, far / facts.host_bytes_per_s)
    elif far and facts.link_bytes_per_s:
        seconds += far / facts.link_bytes_per_s * (2 if w.access == "zero-copy" else 1)
    return seconds


def point_s(w: Workload, facts: Facts, limits: Limits) -> float:
    """A guess at the seconds a point takes: set-up, warm-up and repeats."""
    one = call_s(w, facts)
    repeats = GUESS_OF_REPEATS * max(limits.min_repeat_ns / NS_PER_S, one)
    return SETUP_S[facts.device] + 2 * one + min(repeats, limits.point_ns / NS_PER_S + limits.min_repeats * one)


def spread_order(features: NDArray[np.float64]) -> list[int]:
    """An order of points `[point, feature]` of which every beginning is spread out: the middle one first, then always
    the one farthest from all before it."""
    scale = np.maximum(features.max(axis=0) - features.min(axis=0), 1e-9)
    x = (features - features.min(axis=0)) / scale
    order = [int(np.argmin(((x - np.median(x, axis=0)) ** 2).sum(axis=1)))]
    nearest = ((x - x[order[0]]) ** 2).sum(axis=1)
    for _ in range(len(x) - 1):
        nearest[order[-1]] = -1.0
        order.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, ((x - x[order[-1]]) ** 2).sum(axis=1))
    return order


def _features(points: Sequence[Workload]) -> NDArray[np.float64]:
    """Where a point lies in what decides its time: work, rows per awake expert, awake share, widths, placement."""
    names = {key: sorted({str(getattr(w, key)) for w in points}) for key in ("routing", "order")}
    rows = []
    for w in points:
        active = sum(count > 0 for count in w.tokens_per_expert)
        k, n = w.gemm_k or w.hidden, w.gemm_n or w.inter
        labels = [names[key].index(str(getattr(w, key))) for key in names]
        rows.append(
            [
                np.log2(w.n_tokens), np.log2(w.n_tokens * w.top_k / active), np.log2(w.n_experts),
                active / w.n_experts, np.log2(k * n), np.log2(k / n), w.offload_frac, float(w.launch == "graph"),
                float(w.op == "moe_layer"), *(float(label) for label in labels),
            ]
        )  # fmt: skip
    return np.array(rows, dtype=np.float64)


def resident_twin(w: Workload, launch: str | None) -> Workload:
    """The same point with every expert on the device: what a slowdown is measured against."""
    return replace(
        w, access="resident", offload_frac=0.0, offloaded=None, order=None, residency=None,
        launch=launch if w.op == "grouped_gemm" else w.launch,
    )  # fmt: skip


def _unfit(w: Workload, facts: Facts, preset: str) -> str | None:
    """Why a point is not planned, or None."""
    layer_bytes = w.moe_shape.layer_bytes
    if layer_bytes > facts.pool_limit_bytes:
        return "the weights do not fit in memory"
    if layer_bytes + 1.5 * w.activation_bytes > facts.memory_limit_bytes:
        return "weights and activations do not fit in memory"
    if w.offloaded and layer_bytes * len(w.offloaded) / w.n_experts > facts.host_limit_bytes:
        return "the offloaded weights exceed what may be pinned in host memory"
    if call_s(w, facts) > LONGEST_CALL_S[preset]:
        return f"a call would take more than {LONGEST_CALL_S[preset]:g} s"
    return None


def _units(points: Sequence[Workload], launch: str | None) -> list[list[Workload]]:
    """Points that only make sense together: a placement under every access mode, behind its resident twin."""
    units: dict[tuple[object, ...], list[Workload]] = {}
    for w in points:
        twin = resident_twin(w, launch)
        unit = units.setdefault((twin.id, w.offload_frac, w.order), [twin] if w.offloaded else [])
        unit.append(w)
    return list(units.values())


def design(facts: Facts, preset: str, seed: int, files: Mapping[str, Shares]) -> tuple[list[Point], list[str]]:
    """The points of a campaign, the most telling first, and a sentence for each group that is left out.

    Deterministic: equal facts give equal plans. A placement is measured under all its access modes in one go.
    """
    scales = CUDA_SCALES if facts.device == "cuda" else CPU_SCALES
    maker = Maker(facts, scales[preset], seed, files)
    reasons: Counter[tuple[str, str]] = Counter()
    queues: list[tuple[str, list[list[Workload]]]] = []
    seen: set[str] = set()
    for study, make in STUDIES.items():
        fresh = []
        for w in make(maker):
            if w.id in seen:
                continue
            seen.add(w.id)
            reason = _unfit(w, facts, preset)
            if reason is None:
                fresh.append(w)
            else:
                reasons[study, reason] += 1
        if fresh:
            units = _units(fresh, maker.launch)
            order = spread_order(_features([unit[-1] for unit in units]))
            queues.append((study, [units[i] for i in order]))
    skipped = [f"{n} points of the study {study}: {reason}" for (study, reason), n in reasons.items()]
    return _take_turns(queues), skipped


def _take_turns(queues: Sequence[tuple[str, list[list[Workload]]]]) -> list[Point]:
    """One unit of each study in turn; turns grow with the root of a study's length, so that small ones end early."""
    turns = []
    for rank, (_, units) in enumerate(queues):
        n_points, so_far = sum(map(len, units)), 0.0
        for position, unit in enumerate(units):
            turns.append(((so_far + len(unit) / 2) / n_points**SHARE_OF_LENGTH, rank, position))
            so_far += len(unit)
    planned: dict[str, Point] = {}
    for _, rank, position in sorted(turns):
        study, units = queues[rank]
        for w in units[position]:
            planned.setdefault(w.id, Point(w, study))
    return list(planned.values())

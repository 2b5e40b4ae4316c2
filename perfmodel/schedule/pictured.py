"""Where the time of a layer goes under each schedule, to the GPU that all wait for, and what would shorten it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .measures import overlap_efficiency
from .question import Question
from .timeline import PHASES, TRANSFERS, LayerTimeline, Shared, Span
from .what_if import max_over_mean, skew_frac, unpadded_bulk_ns

LAUNCH, WAITING = "launch", "waiting"
PARTS = (LAUNCH, *PHASES, WAITING)
END_FRAC = 1e-9  # of a layer; what takes less is rounding


@dataclass(frozen=True)
class Breakdown:
    """What one GPU does in the time of a layer: `parts` (names of PARTS) sum to the latency, ns.

    Phases count for the time in which they have the GPU's processors. A transfer counts only while processors have
    nothing to do: that is communication nothing hides (`exposed_ns`); what is under way while the GPU computes is
    `hidden_ns`. `launch` is the time before the first phase, `waiting` the rest, in which nothing is under way.
    """

    schedule: str
    gpu: int
    parts: dict[str, float]
    hidden_ns: float

    @property
    def exposed_ns(self) -> float:
        """Communication under which nothing is computed."""
        return sum(self.parts.get(name, 0.0) for name in TRANSFERS)

    @property
    def hidden_frac(self) -> float | None:
        """The share of communication that computing hides; null where nothing moves."""
        moved = self.exposed_ns + self.hidden_ns
        return self.hidden_ns / moved if moved else None


def slowest_gpu(one: LayerTimeline) -> int:
    """The GPU that all wait for: the one that computes longest, the first of several."""
    return int(np.argmax(one.busy_ns))


def breakdown(one: LayerTimeline, gpu: int | None = None) -> Breakdown:
    """What a GPU (null: the slowest) does in the time of a layer under a schedule.

    Of phases that share processors, as in one fused kernel, each counts for its processor time over processors, and a
    transfer for the share of processors that have no task while it is under way.
    """
    gpu = slowest_gpu(one) if gpu is None else gpu
    own = [span for span in one.spans if span.gpu == gpu]
    shared = one.shared[gpu] if one.shared else _by_spans(own, one.latency_ns)
    before = min((span.start_ns for span in own), default=one.latency_ns)
    found = {**shared.work, **shared.exposed_ns, LAUNCH: before}
    found[WAITING] = one.latency_ns - sum(found.values())
    least = END_FRAC * one.latency_ns
    parts = {name: found[name] for name in PARTS if found.get(name, 0.0) > least}
    return Breakdown(one.schedule, gpu, parts, shared.hidden_ns)


def _by_spans(own: Sequence[Span], latency_ns: float) -> Shared:
    """The same of a GPU that does one thing after another, by its spans."""
    start = np.array([span.start_ns for span in own])
    end = start + np.array([span.dur_ns for span in own])
    edges = np.unique(np.clip(np.concatenate([[0.0, latency_ns], start, end]), 0.0, latency_ns))
    dur, middle = np.diff(edges), (edges[1:] + edges[:-1]) / 2
    is_on = (start[:, None] <= middle) & (middle < end[:, None])
    is_compute = np.array([span.lane == "compute" for span in own], dtype=bool)
    is_computing = is_on[is_compute].any(axis=0)
    moves = [[span.lane != "compute" and span.phase == name for span in own] for name in TRANSFERS]
    moving = np.array([is_on[np.array(of_it, dtype=bool)].any(axis=0) for of_it in moves])
    exposed = moving / np.maximum(moving.sum(axis=0), 1) @ np.where(is_computing, 0.0, dur)
    return Shared(
        {name: sum(s.dur_ns for s in own if s.lane == "compute" and s.phase == name) for name in PHASES},
        dict(zip(TRANSFERS, exposed.tolist(), strict=True)),
        float(dur @ (moving.any(axis=0) & is_computing)),
    )


@dataclass(frozen=True)
class Picture:
    """Schedules of one layer side by side: timelines, where the slowest GPU's time goes, `overlap_efficiency` T(2) /
    T(N) with as many tokens on each GPU (null for one GPU and under a map of experts), `skew_frac` that even routing
    would save, and `unpadded_bulk_ns`, bulk without capacity (null: it has none)."""

    question: Question
    routing: str
    timelines: tuple[LayerTimeline, ...]
    breakdowns: tuple[Breakdown, ...]
    overlap_efficiency: dict[str, float | None]
    skew_frac: dict[str, float]
    unpadded_bulk_ns: float | None
    max_over_mean: float

    @property
    def ranked(self) -> list[LayerTimeline]:
        """The schedules, fastest first."""
        return sorted(self.timelines, key=lambda one: one.latency_ns)

    def levers(self, schedule: str) -> dict[str, float]:
        """What would shorten the layer under a schedule, and by which share of its latency, most first: `skew` (even
        routing), `launches` (all hidden), `communication` (all hidden), `offload` (all resident), `padding` (bulk's
        capacity gone). Each by itself; they do not add up."""
        at = [one.schedule for one in self.timelines].index(schedule)
        latency_ns, parts = self.timelines[at].latency_ns, self.breakdowns[at].parts
        found = {
            "skew": self.skew_frac[schedule],
            "launches": parts.get(LAUNCH, 0.0) / latency_ns,
            "communication": self.breakdowns[at].exposed_ns / latency_ns,
            "offload": parts.get("offload", 0.0) / latency_ns,
        }
        if schedule == "bulk" and self.unpadded_bulk_ns is not None:
            found["padding"] = 1 - self.unpadded_bulk_ns / latency_ns
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    def to_json(self) -> dict[str, Any]:
        """The picture as plain values, without spans."""
        return {
            one.schedule: {
                "slowest_gpu": of_it.gpu,
                "parts": {f"{name}_ns": ns for name, ns in of_it.parts.items()},
                "exposed_ns": of_it.exposed_ns,
                "hidden_ns": of_it.hidden_ns,
                "overlap_efficiency": self.overlap_efficiency[one.schedule],
                "levers": {f"{name}_frac": share for name, share in self.levers(one.schedule).items()},
            }
            for one, of_it in zip(self.timelines, self.breakdowns, strict=True)
        }


def picture(question: Question, routing: str, schedules: Sequence[str]) -> Picture:
    """The schedules of a question side by side; `routing` is the name of its shares."""
    timelines = tuple(question.timeline(name) for name in schedules)
    two = None
    if question.n_gpus > 1 and question.expert_map is None:
        two = question if question.n_gpus == 2 else replace(question, n_gpus=2)
    efficiency = {
        one.schedule: overlap_efficiency(two.latency_ns(one.schedule), one.latency_ns) if two else None
        for one in timelines
    }
    return Picture(
        question,
        routing,
        timelines,
        tuple(breakdown(one) for one in timelines),
        efficiency,
        {name: skew_frac(question, name) for name in schedules},
        unpadded_bulk_ns(question) if "bulk" in schedules else None,
        max_over_mean(question.layer),
    )

"""What follows from comparing policies: which access mode, how much memory, how many experts, which batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from perfmodel.errors import InputError
from perfmodel.offload import rate_keys, usable_modes
from perfmodel.placement import COPIED, IN_PLACE, RESIDENT
from perfmodel.placement.budget import HostNeed
from perfmodel.predict import Prediction

from . import CACHE, FORESEEN, OPTIMAL, TO_COMPARE
from .compare import (
    Outcome,
    Progress,
    best_of,
    compare,
    evaluated,
    policy_names,
    quietly,
    tiers_in_steps,
)
from .question import Question, prediction
from .room import Engine, needed
from .windows import Batch, drift

ALL = "all"
# What is tried where nobody says how experts are reached: every mode by itself, and those that share the work.
MIXES = ("copy-overlap+cpu", "zero-copy+cpu", "copy-overlap+cpu+near-data")
PARETO_FRACS = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
N_HALVINGS = 9  # of the range of memory in a search
THINNED = 2  # every second step of a window where many placements are asked for


def accesses(question: Question) -> tuple[str, ...]:
    """The access modes and mixes that place experts and that the machine has all numbers for."""
    usable = [mode for mode in usable_modes(question.basis.device.profile) if mode != "paged"]
    return (*usable, *(mix for mix in MIXES if set(mix.split("+")) <= set(usable)))


def by_access(question: Question, progress: Progress = quietly) -> dict[str, Outcome]:
    """The best placement under each access mode and mix over a few steps, the fastest in those that decided first.

    Raises InputError for a machine without a second memory.
    """
    names = accesses(question)
    if not names:
        _ = rate_keys(question.basis.device.profile, question.access)  # says what is missing
    found = {}
    for name in names:
        progress(f"access {name} ...")
        found[name] = compare(replace(question.thinned(THINNED), access=name), (OPTIMAL,))[0]
    return dict(sorted(found.items(), key=lambda item: item[1].fitted_slowdown))


@dataclass(frozen=True)
class Point:
    """One point of a trade-off: device memory for experts, how many of them leave it, and the slowdown that costs."""

    capacity_bytes: float
    n_resident: int
    n_offloaded: int
    slowdown: float


@dataclass(frozen=True, eq=False)
class Answer:
    """One answered question: the question, in words its windows and memory, outcomes to compare, the one to take, by
    policy (of placements) the prediction for `batch`, that which takes most of the time, and what the host must hold.

    Beside it what else was asked: the best by access mode, a trade-off, and for a limit of slowdown how many experts
    may leave and the slowdown by batch (tokens, slowdown).
    """

    question: Question
    windows: str
    notes: Sequence[str]
    outcomes: Sequence[Outcome]
    best: Outcome
    batch: Batch
    predictions: Mapping[str, Prediction]
    host: HostNeed
    accesses: Mapping[str, Outcome]
    trade_off: Sequence[Point] = ()
    limit: float | None = None
    leaving: Point | None = None
    sizes: Sequence[tuple[int, float]] = ()

    @property
    def drift(self) -> float | None:
        """How far routing has moved from the steps that decided to those that judge, in passes that take most time;
        null where that cannot be told."""
        return drift(self.batch)


def answered(
    question: Question,
    windows: str,
    notes: Sequence[str],
    engine: Engine,
    policy: str = ALL,
    is_auto: bool = False,
    progress: Progress = quietly,
) -> Answer:
    """All policies compared, or one beside ours, under the access mode of the question or (`is_auto`) the fastest one.

    Taken is the policy that was named, else ours. Raises InputError for a policy that nobody can choose.
    """
    if len(question.tiers) < 2:
        raise InputError(f"access {question.access} is a cache and places no experts; the row lru says what one costs")
    found = by_access(question, progress) if is_auto else {}
    if found:
        question = replace(question, access=next(iter(found)))
    names = policy_names(question)
    if policy in TO_COMPARE:
        raise InputError(f"{policy} is a row of --policy {ALL} to compare with, no placement to choose")
    if policy != ALL and policy not in names:
        raise InputError(f"unknown placement policy {policy!r}; known here: {', '.join(names)}, {ALL}")
    outcomes = compare(question, (*names, FORESEEN) if policy == ALL else names, progress)
    if policy != ALL:
        outcomes = [one for one in outcomes if one.policy in (policy, OPTIMAL)]
    best = next(one for one in outcomes if one.policy == (OPTIMAL if policy == ALL else policy))
    shape, batch = question.shape, question.batches[int((best.held_out_ns * best.passes).argmax())]
    n_resident = round(float((best.tier == RESIDENT).mean()) * shape.n_layers * shape.n_experts)
    is_pinned = bool(np.isin(best.tier, (COPIED, IN_PLACE)).any())
    return Answer(
        question,
        windows,
        notes,
        outcomes,
        best,
        batch,
        {
            one.policy: prediction(question, batch, tiers_in_steps(question, one, batch), one.tier)
            for one in outcomes
            if one.policy != CACHE and (one is best or question.basis.model is not None)
        },
        needed(question.basis.device.profile, shape, engine, n_resident, is_pinned),
        found,
    )


def _point(question: Question, policy: str) -> Point:
    found = compare(question.thinned(THINNED), (policy,))[0]
    n = int((found.tier == RESIDENT).sum())
    return Point(question.capacity_bytes, n, found.tier.size - n, found.slowdown)


def trade_off(question: Question, policy: str = OPTIMAL, progress: Progress = quietly) -> list[Point]:
    """Slowdown by device memory, from as few resident experts as the host has room for to all, as one policy places
    them."""
    found = []
    for share in PARETO_FRACS:
        capacity = share * float(question.size_bytes.sum())
        if capacity >= question.least_bytes:
            progress(f"{share:.0%} of the experts resident ...")
            found.append(_point(replace(question, capacity_bytes=capacity), policy))
    return found


def most_leaving(question: Question, limit: float, policy: str = OPTIMAL, progress: Progress = quietly) -> Point | None:
    """How many experts may leave device memory before the slowdown passes a limit; null where one is too many, or as
    few of them as the search tells apart.

    Found by halving the range of memory, so near to a step that the slowdown may not fall evenly. Raises InputError for
    a limit below 1.
    """
    if limit < 1:
        raise InputError(f"a slowdown of {limit:g}x is asked for, expected at least 1")
    one_bytes = question.shape.expert_bytes * (question.n_layers if question.is_per_layer else 1)
    n_all = round(float(question.size_bytes.sum()) / one_bytes)
    low, high = round(question.least_bytes / one_bytes) - 1, n_all  # resident: fewer than can be, all
    best: Point | None = None
    for _ in range(N_HALVINGS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        progress(f"{n_all - middle} of {n_all} leave ...")
        found = _point(replace(question, capacity_bytes=middle * one_bytes), policy)
        if found.slowdown <= limit:
            best, high = found, middle
        else:
            low = middle
    return best


def by_batch(question: Question, outcome: Outcome, batches: tuple[Batch, ...]) -> list[tuple[int, float]]:
    """The slowdown of one placement at other batch sizes: tokens and slowdown. What is not resident is reached as is
    fastest at each size: as placed, or all of it in one of the tiers that the access modes have."""
    resident = outcome.tier == RESIDENT
    ways = [(outcome.tier, outcome.dispatch)]
    ways += [(np.where(resident, RESIDENT, tier).astype(np.int8), None) for tier in question.tiers[1:]]
    found = []
    for batch in batches:
        alone = replace(question, batches=(batch,))
        tried = [evaluated(alone, outcome.policy, tier, dispatch) for tier, dispatch in ways]
        found.append((batch.n_tokens, best_of(tried).slowdown))
    return found


def with_limit(placed: Answer, limit: float, batches: tuple[Batch, ...], progress: Progress = quietly) -> Answer:
    """An answer with how many experts may leave, and how slow the placement is in these batches, for a limit."""
    leaving = most_leaving(placed.question, limit, placed.best.policy, progress)
    sizes = by_batch(placed.question, placed.best, batches)
    return replace(placed, limit=limit, leaving=leaving, sizes=sizes)

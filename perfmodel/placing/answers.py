"""What follows from comparing policies: which access mode, how much memory, how many experts, which batches."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from perfmodel.errors import InputError
from perfmodel.offload import rate_keys, usable_modes
from perfmodel.placement import RESIDENT
from perfmodel.predict import Prediction

from .compare import OPTIMAL, Outcome, Progress, compare, evaluated, thinned
from .question import Question
from .windows import Batch

# What is tried where nobody says how experts are reached: every mode by itself, and those that share the work.
MIXES = ("copy-overlap+cpu", "zero-copy+cpu", "copy-overlap+cpu+near-data")
PARETO_FRACS = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
N_HALVINGS = 9  # of the range of memory in a search
FEW_STEPS = 4  # of a window where many placements are asked for


def accesses(question: Question) -> tuple[str, ...]:
    """The access modes and mixes that place experts and that the machine has all numbers for."""
    profile = question.basis.device.profile
    usable = [mode for mode in usable_modes(profile) if mode != "paged"]
    return (*usable, *(mix for mix in MIXES if set(mix.split("+")) <= set(usable)))


def by_access(question: Question, progress: Progress = lambda _: None) -> dict[str, Outcome]:
    """The best placement under each access mode and mix, the fastest in the steps that decided first.

    Raises InputError for a machine without a second memory.
    """
    names = accesses(question)
    if not names:
        _ = rate_keys(question.basis.device.profile, question.access)  # says what is missing
    found = {}
    for name in names:
        progress(f"access {name} ...")
        found[name] = compare(replace(thinned(question, FEW_STEPS), access=name), (OPTIMAL,))[0]
    return dict(sorted(found.items(), key=lambda item: item[1].fitted_total_ns))


@dataclass(frozen=True)
class Point:
    """One point of a trade-off: device memory for experts, how many of them leave it, and the slowdown that costs."""

    capacity_bytes: float
    n_resident: int
    n_offloaded: int
    slowdown: float


@dataclass(frozen=True, eq=False)
class Answer:
    """One answered question: what was asked, outcomes, the best of them, its prediction for the first batch, and what
    was asked beside: access modes, a trade-off, the most experts that may leave within a limit, slowdown by batch."""

    question: Question
    windows: str
    budget: Sequence[str]
    outcomes: Sequence[Outcome]
    best: Outcome
    prediction: Prediction
    accesses: Mapping[str, Outcome]
    trade_off: Sequence[Point] = ()
    limit: float | None = None
    leaving: Point | None = None
    sizes: Sequence[tuple[int, float]] = ()
    within: str = ""


def _point(question: Question, policy: str) -> Point:
    found = compare(thinned(question, FEW_STEPS), (policy,))[0]
    n = int((found.tier == RESIDENT).sum())
    return Point(question.capacity_bytes, n, found.tier.size - n, found.slowdown)


def trade_off(question: Question, policy: str = OPTIMAL, progress: Progress = lambda _: None) -> list[Point]:
    """Slowdown by device memory, from no expert resident to all, as one policy places them."""
    found = []
    for share in PARETO_FRACS:
        progress(f"{share:.0%} of the experts resident ...")
        found.append(_point(replace(question, capacity_bytes=share * float(question.size_bytes.sum())), policy))
    return found


def most_leaving(
    question: Question, limit: float, policy: str = OPTIMAL, progress: Progress = lambda _: None
) -> Point | None:
    """How many experts may leave device memory before the slowdown passes a limit; null where one is too many.

    Found by halving the range of memory, so near to a step that the slowdown may not fall evenly.
    """
    if limit < 1:
        raise InputError(f"a slowdown of {limit:g}x is asked for, expected at least 1")
    n_all = question.popularity.size
    low, high = 0, n_all  # experts resident: too few, enough
    best: Point | None = None
    one_bytes = question.shape.expert_bytes
    for _ in range(min(N_HALVINGS, int(np.ceil(np.log2(n_all))) + 1)):
        middle = (low + high) // 2
        progress(f"{n_all - middle} of {n_all} experts leave ...")
        found = _point(replace(question, capacity_bytes=middle * one_bytes), policy)
        if found.slowdown <= limit:
            best, high = found, middle
        else:
            low = middle
        if high - low <= 1:
            break
    return best


def by_batch(question: Question, outcome: Outcome, batches: Iterable[Batch]) -> list[tuple[int, float]]:
    """The slowdown of one placement at other batch sizes: tokens and slowdown. What is not resident is reached as is
    fastest at each size: as placed, or all of it in one of the tiers that the access modes have."""
    resident = outcome.tier == RESIDENT
    ways = [(outcome.tier, outcome.dispatch)]
    ways += [(np.where(resident, RESIDENT, tier).astype(np.int8), None) for tier in question.tiers[1:]]
    found = []
    for batch in batches:
        alone = replace(question, batches=(batch,))
        slowdowns = [evaluated(alone, outcome.policy, tier, dispatch).slowdown for tier, dispatch in ways]
        found.append((batch.n_tokens, min(slowdowns)))
    return found


def below(points: list[tuple[int, float]], limit: float) -> str:
    """At which of these batch sizes the slowdown stays within a limit, in words."""
    good = [slowdown <= limit for _, slowdown in points]
    sizes = [f"{n:,}" for n, _ in points]
    if all(good):
        return f"at all batches from {sizes[0]} to {sizes[-1]} tokens"
    if not any(good):
        return f"at no batch from {sizes[0]} to {sizes[-1]} tokens"
    changes = [i for i in range(1, len(good)) if good[i] != good[i - 1]]
    if len(changes) == 1:
        at = changes[0]
        return f"from {sizes[at]} tokens on" if good[at] else f"up to {sizes[at - 1]} tokens"
    return "at " + ", ".join(size for size, is_good in zip(sizes, good, strict=True) if is_good) + " tokens"

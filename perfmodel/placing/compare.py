"""Policies side by side: what each one's placement costs in steps that it has not seen."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from perfmodel.errors import InputError
from perfmodel.offload import Mask
from perfmodel.placement import COPIED, NEAR_DATA, ON_HOST, POLICIES, RESIDENT, TIERS, Problem, Tiers
from perfmodel.placement.costs import Array, Costs
from perfmodel.placement.dispatch import DISPATCHES
from perfmodel.placement.optimal import Solution, minimise
from perfmodel.routing import Counts
from perfmodel.trimoe import machine_of, schedule
from perfmodel.trimoe.prediction import HOT_FROM, Bounds, classify

from .question import Question, costs_of, resident_ns, steps_ns, steps_of
from .windows import Batch

OPTIMAL, CACHE, FORESEEN = "optimal", "lru", "foreseen"
# Policies that divide each step anew among device and host: by what they keep resident, and their dispatch.
TRIMOE = "trimoe"
COLD_BOUNDS = (0.25, 0.5, 1.0, 2.0, 4.0)  # loads over the mean below which TriMoE calls an expert cold, to choose from
DISPATCHED = {
    "fiddler": ("fiddler", "fiddler"),
    "hybrimoe": ("frequency", "hybrimoe"),
    TRIMOE: ("frequency", TRIMOE),
}
BEST_DISPATCH = "balanced"

Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a policy costs: mean latency of a layer by batch, ns, in the steps that decided (`fitted_ns[batch]`) and in
    those that judge (`held_out_ns[batch]`), and of the latter with all experts resident (`resident_ns[batch]`).

    `tier[layer, expert]` are numbers of placement.TIERS; `dispatch` names how what is not resident is divided in each
    step (null: as the tiers say). `passes[batch]` weigh batches. `solution` is null for policies without a bound.
    """

    policy: str
    tier: Tiers
    dispatch: str | None
    fitted_ns: Array
    held_out_ns: Array
    resident_ns: Array
    passes: Array
    solution: Solution | None = None

    @property
    def slowdown(self) -> float:
        """Time over the time with all experts resident, in the steps that judge."""
        return float(self.held_out_ns @ self.passes / (self.resident_ns @ self.passes))

    @property
    def fitted_total_ns(self) -> float:
        """Time of a layer in all passes of the steps that decided."""
        return float(self.fitted_ns @ self.passes)


def policy_names(question: Question) -> tuple[str, ...]:
    """The policies that can answer a question, ours last."""
    static = [name for name in POLICIES if name not in DISPATCHED]
    dispatched = [name for name in DISPATCHED if name != TRIMOE or NEAR_DATA in question.tiers]
    return (*static, *(dispatched if _divides(question) else ()), CACHE, OPTIMAL)


def _divides(question: Question) -> bool:
    """Whether the device or the host may compute an expert that is in host memory."""
    return {COPIED, ON_HOST} <= set(question.tiers)


def thinned(question: Question, n_steps: int) -> Question:
    """The same question over fewer steps, for answers that take many placements."""
    few = (replace(b, fitted=b.fitted[:n_steps], held_out=b.held_out[:n_steps]) for b in question.batches)
    return replace(question, batches=tuple(few))


def compare(question: Question, names: tuple[str, ...], progress: Progress = lambda _: None) -> list[Outcome]:
    """What each of the named policies costs, in their order; `optimal` knows the others and is never slower than any of
    them in the steps that decided. Raises InputError for a name that is not among `policy_names`."""
    known = (*policy_names(question), FORESEEN)
    for name in names:
        if name not in known:
            raise InputError(f"unknown placement policy {name!r}; known here: {', '.join(known)}")
    costs = costs_of(question)
    colder = _coldest(question, costs)
    found: dict[str, Outcome] = {}
    for name in [name for name in names if name not in (OPTIMAL, FORESEEN)]:
        progress(f"{name} ...")
        found[name] = _cached(question) if name == CACHE else _by_policy(question, name, colder)
    if OPTIMAL in names:
        progress("optimal ...")
        found[OPTIMAL] = _optimal(question, costs, colder, [one for name, one in found.items() if name != CACHE])
    if FORESEEN in names:
        progress("what could have been known ...")
        found[FORESEEN] = replace(_optimal(_swapped(question), costs_of(question, held_out=True), colder, []))
        found[FORESEEN] = evaluated(question, FORESEEN, found[FORESEEN].tier, found[FORESEEN].dispatch)
    return [found[name] for name in names]


def best_of(outcomes: list[Outcome]) -> Outcome:
    """The one that is fastest in the steps that decided: what a person would choose, knowing no others. Caches do not
    count, for they are no placement."""
    return min((one for one in outcomes if one.policy not in (CACHE, FORESEEN)), key=lambda one: one.fitted_total_ns)


def _swapped(question: Question) -> Question:
    """The question of who has seen the steps that judge."""
    batches = tuple(replace(b, fitted=b.held_out, held_out=b.fitted) for b in question.batches)
    return replace(question, batches=batches)


def _coldest(question: Question, costs: Costs) -> Tiers:
    """The tier outside device memory in which each expert is fastest by its own longest load, `[layer, expert]`."""
    longest = np.stack([costs.by_layer(block.values.max(axis=2)) for block in costs.blocks[1:]], axis=2)
    coldest: Tiers = np.array(question.tiers[1:], dtype=np.int8)[longest.argmin(axis=2)]
    return coldest


def _by_policy(question: Question, name: str, colder: Tiers) -> Outcome:
    """The outcome of a published policy, which knows popularity, sizes and memory."""
    keeps, dispatch = DISPATCHED.get(name, (name, None))
    problem = Problem(question.popularity, question.size_bytes, question.capacity_bytes)
    is_resident = POLICIES[keeps](problem) == RESIDENT
    if name == TRIMOE:
        colder = _coldest_by_trimoe(question, is_resident)
    return evaluated(question, name, np.where(is_resident, RESIDENT, colder).astype(np.int8), dispatch)


def _coldest_by_trimoe(question: Question, is_resident: Mask) -> Tiers:
    """Memory modules for cold experts, host memory for warm ones, by the bound between them that suits the steps that
    decided best; TriMoE publishes none."""
    few, found = thinned(question, 2), {}
    for bound in COLD_BOUNDS:
        is_cold = classify(question.popularity, Bounds(bound, max(bound, HOT_FROM))) == 0
        colder = np.where(is_cold, NEAR_DATA, ON_HOST).astype(np.int8)
        tier = np.where(is_resident, RESIDENT, colder).astype(np.int8)
        found[evaluated(few, TRIMOE, tier, TRIMOE).fitted_total_ns] = colder
    return found[min(found)]


def _optimal(question: Question, costs: Costs, colder: Tiers, others: list[Outcome]) -> Outcome:
    """The placement of least predicted time. The search goes by the table of costs, where others help it to start; what
    it and the others found is then judged by the full formulas, each with and without dividing steps anew."""
    position = np.zeros(len(TIERS), dtype=np.int8)
    position[list(question.tiers)] = np.arange(len(question.tiers))
    starts = tuple(position[one.tier] for one in others)
    solution = minimise(costs, question.size_bytes, question.budgets, starts)
    tiers = [np.array(question.tiers, dtype=np.int8)[solution.tier]]
    if len(question.tiers) > 2:  # host and link slow each other, which the table leaves out
        busy = minimise(costs_of(question, contended=True), question.size_bytes, question.budgets, starts)
        tiers.append(np.array(question.tiers, dtype=np.int8)[busy.tier])
    candidates = [evaluated(question, OPTIMAL, tier, None) for tier in tiers]
    if _divides(question):
        tiers += [one.tier for one in sorted(others, key=lambda one: one.fitted_total_ns)[:1]]
        candidates += [evaluated(question, OPTIMAL, tier, BEST_DISPATCH) for tier in tiers]
    found = min([*candidates, *others], key=lambda one: one.fitted_total_ns)
    return replace(found, policy=OPTIMAL, solution=solution)


def _cached(question: Question) -> Outcome:
    """A cache of each layer's experts, least recently used out, as large as the memory: the expected misses."""
    n_slots = int(question.capacity_bytes // (question.n_layers * question.shape.expert_bytes))
    if n_slots < 1:
        raise InputError("a cache needs room for an expert of each layer")
    settings = replace(question.settings, n_slots=min(n_slots, question.shape.n_experts))
    cached = replace(question, access="paged", settings=settings)
    tier = np.ones(question.popularity.shape, dtype=np.int8)
    return evaluated(cached, CACHE, tier, None)


def evaluated(question: Question, policy: str, tier: Tiers, dispatch: str | None) -> Outcome:
    """What a placement costs in both windows, by the full formulas."""

    def mean_ns(counts: Counts, n_tokens: int) -> float:
        domains = tier if dispatch is None else divided(question, counts, n_tokens, tier, dispatch)
        return float(steps_ns(question, counts, n_tokens, domains, tier).mean())

    batches = question.batches
    return Outcome(
        policy,
        tier,
        dispatch,
        np.array([mean_ns(b.fitted, b.n_tokens) for b in batches]),
        np.array([mean_ns(b.held_out, b.n_tokens) for b in batches]),
        np.array([float(resident_ns(question, b.held_out, b.n_tokens).mean()) for b in batches]),
        np.array([b.n_passes for b in batches]),
    )


def domains(question: Question, outcome: Outcome, batch: Batch) -> Tiers:
    """The tier of each expert in the steps that judge: `[layer, expert]`, or `[step, layer, expert]` where each is
    divided anew."""
    if outcome.dispatch is None:
        return outcome.tier
    return divided(question, batch.held_out, batch.n_tokens, outcome.tier, outcome.dispatch)


def divided(question: Question, counts: Counts, n_tokens: int, tier: Tiers, dispatch: str) -> Tiers:
    """Who computes what in each step, `[step, layer, expert]`, where a dispatch divides what is not resident.

    Ours takes for each step of each layer what the full formulas say is fastest: all on the host, all copied, or
    divided, by the rates that host and link have alone or at once, and as TriMoE does where memory modules compute.
    """
    resident = tier == RESIDENT
    if dispatch == TRIMOE:
        return _by_trimoe(question, counts, n_tokens, tier)
    steps = steps_of(question, counts, n_tokens, resident)
    if dispatch != BEST_DISPATCH:
        return np.asarray(DISPATCHES[dispatch](steps).reshape(counts.shape), dtype=np.int8)
    busy = steps_of(question, counts, n_tokens, resident, contended=True)
    ways = [DISPATCHES[name](steps) for name in ("all-host", "all-copied", BEST_DISPATCH)]
    ways.append(DISPATCHES[BEST_DISPATCH](busy))
    tried = [way.reshape(counts.shape) for way in ways]
    if NEAR_DATA in question.tiers:
        tried += [np.broadcast_to(tier, counts.shape), _by_trimoe(question, counts, n_tokens, tier)]
    best = np.argmin([steps_ns(question, counts, n_tokens, domains, tier) for domains in tried], axis=0)
    return np.asarray(np.take_along_axis(np.stack(tried), best[None, :, :, None], axis=0)[0], dtype=np.int8)


def _by_trimoe(question: Question, counts: Counts, n_tokens: int, tier: Tiers) -> Tiers:
    """TriMoE's schedule of each step: experts that the placement leaves to memory modules lie in one of them, dealt out
    by their loads, the others over all."""
    machine = machine_of(question.basis.device.profile, question.shape, n_tokens, model=question.basis.model)
    home = np.argsort(np.argsort(-question.popularity, axis=1, kind="stable"), axis=1) % machine.n_dimms
    resident, striped, homes = (np.tile(x, (len(counts), 1)) for x in (tier == RESIDENT, tier != NEAR_DATA, home))
    costs = machine.costs(counts.reshape(homes.shape).astype(np.float64), resident, striped, homes.astype(np.int64))
    return np.asarray(schedule(costs, is_guarded=False).reshape(counts.shape), dtype=np.int8)

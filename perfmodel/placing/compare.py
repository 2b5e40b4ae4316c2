"""Policies side by side: what each one's placement costs in steps that it has not seen."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from perfmodel.errors import InputError
from perfmodel.offload import Mask, modes_of
from perfmodel.physics import Array
from perfmodel.placement import COPIED, NEAR_DATA, ON_HOST, POLICIES, RESIDENT, TIERS, Problem, Tiers
from perfmodel.placement.costs import Costs
from perfmodel.placement.dispatch import DISPATCHES
from perfmodel.placement.optimal import minimise
from perfmodel.routing import Counts
from perfmodel.trimoe import machine_of, schedule
from perfmodel.trimoe.prediction import COLD, HOT_FROM, Bounds, classify
from perfmodel.trimoe.systems import COLD_FRACS

from . import CACHE, FIXED, FORESEEN, OPTIMAL, TO_COMPARE
from .question import Question, costs_of, dispatch_steps, steps_ns
from .windows import Batch

# Policies that divide each step anew among device and host: by what they keep resident, and their dispatch.
TRIMOE = "trimoe"
DISPATCHED = {
    "fiddler": ("fiddler", "fiddler"),
    "hybrimoe": ("frequency", "hybrimoe"),
    TRIMOE: ("frequency", TRIMOE),
}
BEST_DISPATCH = "balanced"

Progress = Callable[[str], None]


def quietly(_: str) -> None:
    """The progress of whom nobody watches."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a policy costs: mean latency of a layer by batch, ns, in the steps that decided (`fitted_ns[batch]`) and in
    those that judge (`held_out_ns[batch]`), and both with all experts resident.

    `tier[layer, expert]` are numbers of placement.TIERS; `dispatch` names how what is not resident is divided in each
    step (null: as the tiers say). `passes[batch]` weigh batches. Of the mean latency of a layer in the steps that were
    searched, the table of costs says `table_ns` for this placement (null: it has no place for a cache or for steps that
    are divided) and at least `bound_ns` for any placement (null where no bound was looked for).
    """

    policy: str
    tier: Tiers
    dispatch: str | None
    fitted_ns: Array
    held_out_ns: Array
    fitted_resident_ns: Array
    resident_ns: Array
    passes: Array
    table_ns: float | None = None
    bound_ns: float | None = None

    @property
    def slowdown(self) -> float:
        """Time over the time with all experts resident, in the steps that judge."""
        return float(self.held_out_ns @ self.passes / (self.resident_ns @ self.passes))

    @property
    def fitted_slowdown(self) -> float:
        """The same in the steps that decided."""
        return float(self.fitted_ns @ self.passes / (self.fitted_resident_ns @ self.passes))

    @property
    def gap_frac(self) -> float | None:
        """By how much of its time a placement that divides no steps could be faster at most, by the table of costs."""
        if self.table_ns is None or self.bound_ns is None:
            return None
        return max(1 - self.bound_ns / self.table_ns, 0.0)

    def swapped(self) -> "Outcome":
        """The same for who decides on the steps that judge; the table of costs is another one then."""
        return replace(
            self,
            fitted_ns=self.held_out_ns,
            held_out_ns=self.fitted_ns,
            fitted_resident_ns=self.resident_ns,
            resident_ns=self.fitted_resident_ns,
            table_ns=None,
            bound_ns=None,
        )


def policy_names(question: Question) -> tuple[str, ...]:
    """The policies that can answer a question, ours last."""
    static = [name for name in POLICIES if name not in DISPATCHED]
    dispatched = [name for name in DISPATCHED if name != TRIMOE or NEAR_DATA in question.tiers]
    cache = (CACHE,) if question.n_slots else ()
    return (*static, *((*dispatched, *cache, FIXED) if _divides(question) else cache), OPTIMAL)


def _divides(question: Question) -> bool:
    """Whether the device or the host may compute an expert that is in host memory."""
    return {COPIED, ON_HOST} <= set(question.tiers)


def compare(question: Question, names: tuple[str, ...], progress: Progress = quietly) -> list[Outcome]:
    """What each of the named policies costs, in their order.

    `optimal` knows the others that are named and is never slower than any of them in the steps that decided, and
    `optimal-fixed` never slower than those that divide no steps; caches do not count. `foreseen` is what `optimal`
    could do if it knew the steps that judge. Raises InputError for a name that is none of `policy_names`.
    """
    known = (*policy_names(question), FORESEEN)
    for name in names:
        if name not in known:
            raise InputError(f"unknown placement policy {name!r}; known here: {', '.join(known)}")
    costs = costs_of(question)
    colder = _coldest(question, costs)
    found: dict[str, Outcome] = {}
    for name in (name for name in names if name not in (OPTIMAL, FIXED, FORESEEN)):
        progress(f"{name} ...")
        found[name] = _cached(question) if name == CACHE else _by_policy(question, name, colder)
    others = [one for name, one in found.items() if name != CACHE]
    bound_ns = None
    if {OPTIMAL, FIXED} & set(names):
        progress("optimal ...")
        ours, bound_ns = _ours(question, costs, others)
        found |= ours
        others += ours.values()
    if FORESEEN in names:
        progress("what could have been known ...")
        best = _ours(question.swapped(), costs_of(question.swapped()), [one.swapped() for one in others])[0][OPTIMAL]
        found[FORESEEN] = replace(best.swapped(), policy=FORESEEN)
    return [_with_bound(question, costs, found[name], bound_ns) for name in names]


def _with_bound(question: Question, costs: Costs, one: Outcome, bound_ns: float | None) -> Outcome:
    """An outcome with what the table of costs says of it, and of all."""
    has_row = one.dispatch is None and one.policy != CACHE
    table_ns = float(costs.layers_ns(_positions(question, one.tier)).mean()) if has_row else None
    return replace(one, table_ns=table_ns, bound_ns=bound_ns)


def _numbers(question: Question) -> Tiers:
    """Numbers of placement.TIERS by position in the question's tiers."""
    return np.array(question.tiers, dtype=np.int8)


def _positions(question: Question, tier: Tiers) -> Tiers:
    """Positions in the question's tiers of numbers of placement.TIERS."""
    position = np.zeros(len(TIERS), dtype=np.int8)
    position[list(question.tiers)] = np.arange(len(question.tiers))
    return np.asarray(position[tier])


def _coldest(question: Question, costs: Costs) -> Tiers:
    """The tier outside device memory in which each expert is fastest by its own longest load, `[layer, expert]`."""
    longest = np.stack([costs.by_layer(block.values.max(axis=2)) for block in costs.blocks[1:]], axis=2)
    return np.asarray(_numbers(question)[1:][longest.argmin(axis=2)])


def _problem(question: Question, load: Array) -> Problem:
    """What a policy is asked that keeps experts by their load, `[layer, expert]`."""
    capacity = question.capacity_bytes * (1 + 1e-12)  # 29 % of 100 experts are 28.999999999999996 in float64
    return Problem(load, question.size_bytes, capacity, question.layer_capacity_bytes, question.seed)


def _topped(question: Question, tier: Tiers) -> Tiers:
    """The placement with room that it leaves given to experts that no step woke that was searched, the most used ones
    first: these cost nothing there, and other steps may wake them."""
    is_resident = tier == RESIDENT
    sleeps = np.all([(b.searched == 0).all(axis=0) for b in question.batches], axis=0)
    kept = POLICIES["frequency"](_problem(question, np.where(is_resident, 2.0, sleeps * (1 + question.popularity))))
    return np.where(is_resident | (sleeps & (kept == RESIDENT)), RESIDENT, tier).astype(np.int8)


def _by_policy(question: Question, name: str, colder: Tiers) -> Outcome:
    """The outcome of a published policy, which knows popularity, sizes and memory."""
    keeps, dispatch = DISPATCHED.get(name, (name, None))
    is_resident = POLICIES[keeps](_problem(question, question.popularity)) == RESIDENT
    if name == TRIMOE:
        return _by_cold_bounds(question, is_resident)
    return evaluated(question, name, np.where(is_resident, RESIDENT, colder).astype(np.int8), dispatch)


def _by_cold_bounds(question: Question, is_resident: Mask) -> Outcome:
    """TriMoE: memory modules for cold experts, host memory for warm ones, by the bound between them that suits the
    steps that decided best; it publishes none."""
    few, tried = question.thinned(4), []
    for frac in COLD_FRACS[1:]:  # without the first, under which none is cold
        is_cold = classify(question.popularity, Bounds(frac * HOT_FROM, HOT_FROM)) == COLD
        tier = np.where(is_resident, RESIDENT, np.where(is_cold, NEAR_DATA, ON_HOST)).astype(np.int8)
        tried.append(evaluated(few, TRIMOE, tier, TRIMOE))
    return evaluated(question, TRIMOE, min(tried, key=_fitted_slowdown).tier, TRIMOE)


def _fitted_slowdown(one: Outcome) -> float:
    return one.fitted_slowdown


def _ours(question: Question, costs: Costs, others: list[Outcome]) -> tuple[dict[str, Outcome], float]:
    """The placements of least predicted time, with steps divided where they can be (`optimal`) and without
    (`optimal-fixed`), and the least mean latency of a layer that the table of costs has for any that divides none.

    The search goes by the table, where others help it to start; what it and the others found is then judged by the full
    formulas. Where host and link slow each other, which the table leaves out, it is searched a second time as if they
    always did; and once more without memory modules, of which the table thinks too well where few experts share them.
    """
    starts = tuple(_positions(question, one.tier) for one in others)
    tables = [costs, *([costs_of(question, contended=True)] if len(question.tiers) > 2 else [])]
    solutions = [minimise(one, question.size_bytes, question.budgets, starts, question.seed) for one in tables]
    tiers = [_topped(question, _numbers(question)[solution.tier]) for solution in solutions]
    tiers += _without_modules(question)
    static = [*(evaluated(question, FIXED, tier, None) for tier in tiers), *(o for o in others if o.dispatch is None)]
    fixed = min(static, key=_fitted_slowdown)
    candidates = [fixed, *others]
    if _divides(question):
        so_far = min(candidates, key=_fitted_slowdown).tier
        tiers += [] if any(np.array_equal(so_far, tier) for tier in tiers) else [so_far]
        candidates += [evaluated(question, OPTIMAL, tier, BEST_DISPATCH) for tier in tiers]
    best = min(candidates, key=_fitted_slowdown)
    found = {FIXED: replace(fixed, policy=FIXED), OPTIMAL: replace(best, policy=OPTIMAL)}
    return found, solutions[0].bound_ns / question.n_layers


def _without_modules(question: Question) -> list[Tiers]:
    """The placement found where no memory module computes, if some do and others could."""
    modes = [mode for mode in modes_of(question.access) if mode != TIERS[NEAR_DATA]]
    if NEAR_DATA not in question.tiers or not modes:
        return []
    fewer = replace(question, access="+".join(modes))
    costs = costs_of(fewer, contended=len(fewer.tiers) > 2)
    found = minimise(costs, fewer.size_bytes, fewer.budgets, (), fewer.seed)
    return [_topped(fewer, _numbers(fewer)[found.tier])]


def best_of(outcomes: list[Outcome]) -> Outcome:
    """The one that is fastest in the steps that decided: what a person would choose, knowing no others."""
    return min((one for one in outcomes if one.policy not in TO_COMPARE), key=_fitted_slowdown)


def _cached(question: Question) -> Outcome:
    """A cache of each layer's experts, least recently used out, as large as the memory: the expected misses."""
    settings = replace(question.settings, n_slots=question.n_slots)
    tier = np.ones(question.popularity.shape, dtype=np.int8)
    return evaluated(replace(question, access="paged", settings=settings), CACHE, tier, None)


def evaluated(question: Question, policy: str, tier: Tiers, dispatch: str | None) -> Outcome:
    """What a placement costs in both windows, by the full formulas."""

    def mean_ns(counts: Counts, n_tokens: int) -> float:
        used = tier if dispatch is None else divided(question, counts, n_tokens, tier, dispatch)
        return float(steps_ns(question, counts, n_tokens, used, tier).mean())

    batches = question.batches
    return Outcome(
        policy,
        tier,
        dispatch,
        np.array([mean_ns(b.fitted, b.n_tokens) for b in batches]),
        np.array([mean_ns(b.held_out, b.n_tokens) for b in batches]),
        *question.resident_ns,
        np.array([b.n_passes for b in batches]),
    )


def tiers_in_steps(question: Question, outcome: Outcome, batch: Batch) -> Tiers:
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
    steps = dispatch_steps(question, counts, n_tokens, resident)
    if dispatch != BEST_DISPATCH:
        return np.asarray(DISPATCHES[dispatch](steps).reshape(counts.shape), dtype=np.int8)
    busy = dispatch_steps(question, counts, n_tokens, resident, contended=True)
    ways = [DISPATCHES[name](steps) for name in ("all-host", "all-copied", BEST_DISPATCH)]
    ways.append(DISPATCHES[BEST_DISPATCH](busy))
    tried = [way.reshape(counts.shape) for way in ways]
    if NEAR_DATA in question.tiers:
        tried += [np.broadcast_to(tier, counts.shape), _by_trimoe(question, counts, n_tokens, tier)]
    best = np.argmin([steps_ns(question, counts, n_tokens, way, tier) for way in tried], axis=0)
    return np.asarray(np.take_along_axis(np.stack(tried), best[None, :, :, None], axis=0)[0], dtype=np.int8)


def _by_trimoe(question: Question, counts: Counts, n_tokens: int, tier: Tiers) -> Tiers:
    """TriMoE's schedule of each step: experts that the placement leaves to memory modules lie in one of them, dealt out
    by their loads, the others over all."""
    machine = machine_of(question.basis.device.profile, question.shape, n_tokens, model=question.basis.model)
    home = np.argsort(np.argsort(-question.popularity, axis=1, kind="stable"), axis=1) % machine.n_dimms
    resident, striped, homes = (np.tile(x, (len(counts), 1)) for x in (tier == RESIDENT, tier != NEAR_DATA, home))
    costs = machine.costs(counts.reshape(homes.shape).astype(np.float64), resident, striped, homes.astype(np.int64))
    return np.asarray(schedule(costs, is_guarded=False).reshape(counts.shape), dtype=np.int8)

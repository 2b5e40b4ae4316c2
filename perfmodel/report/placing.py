"""Pages about where experts should live: a comparison of policies, trade-offs, and what an export loses."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from perfmodel import text
from perfmodel.placement import RESIDENT, TIERS

from .words import table

if TYPE_CHECKING:  # these bring scipy and scikit-learn, which other pages do not need
    from perfmodel.placing.answers import Answer
    from perfmodel.placing.compare import Outcome
    from perfmodel.placing.question import Question

CACHE, FORESEEN = "lru", "foreseen"  # outcomes that are no placement to choose


def placing_page(placed: "Answer") -> str:
    """The comparison of policies as a page for people."""
    question = placed.question
    passes = " and ".join(f"{text.count(b.n_passes)} of {text.counted(b.n_tokens, 'token')}" for b in question.batches)
    single = len(question.batches) == 1
    batch = text.counted(question.batches[0].n_tokens, "token") if single else f"passes: {passes}"
    head = f"{question.shape.name} on {question.basis.device.profile.title}, {batch}, {question.access}"
    lines = [head, placed.windows, *placed.budget, ""]
    lines += [_accesses(placed), ""] if placed.accesses else []
    lines.append(_policies(placed.outcomes, question))
    lines += ["", *_verdict(placed)]
    if placed.trade_off:
        rows = [
            [text.n_bytes(p.capacity_bytes), str(p.n_resident), str(p.n_offloaded), f"{p.slowdown:.3f}x"]
            for p in placed.trade_off
        ]
        lines += ["", table(rows, ["device memory for experts", "resident", "offloaded", "slowdown"])]
    if placed.limit is not None:
        lines += ["", *_break_even(placed)]
    lines += ["", str(placed.prediction)]
    return "\n".join(lines)


def _accesses(placed: "Answer") -> str:
    rows = [[name, f"{one.slowdown:.3f}x"] for name, one in placed.accesses.items()]
    return table(rows, ["access, best placement of each", "slowdown"])


def _policies(outcomes: Sequence["Outcome"], question: "Question") -> str:
    rows = []
    for one in sorted(outcomes, key=lambda one: one.slowdown):
        times = [text.ns(ns) for ns in one.held_out_ns]
        placed = [text.n_bytes(size) for size in _tier_bytes(one, question).values()]
        where = ["cache" if one.policy == CACHE else size for size in placed]
        rows.append([one.policy, f"{one.slowdown:.3f}x", *times, text.ns(one.fitted_total_ns), *where, _note(one)])
    sizes = [f"{b.n_tokens:,} tokens" for b in question.batches]
    tiers = [TIERS[tier] for tier in question.tiers]
    return table(rows, ["policy", "slowdown", *sizes, "when decided", *tiers, "steps divided"])


def _note(one: "Outcome") -> str:
    return one.dispatch or "-"


def _tier_bytes(one: "Outcome", question: "Question") -> dict[str, float]:
    n_experts = np.bincount(one.tier.ravel(), minlength=len(TIERS))
    return {TIERS[tier]: int(n_experts[tier]) * question.shape.expert_bytes for tier in question.tiers}


def _verdict(placed: "Answer") -> list[str]:
    best, others = placed.best, [one for one in placed.outcomes if one.policy not in (placed.best.policy, FORESEEN)]
    lines = [f"best          {best.policy}: {best.slowdown:.3f}x in steps it has not seen"]
    rivals = sorted((one for one in others if one.policy != CACHE), key=lambda one: one.slowdown)
    if rivals:
        lead = rivals[0].slowdown / best.slowdown - 1
        words = f"{text.frac(lead)} slower" if lead >= 0 else f"{text.frac(-lead)} faster there than the best"
        lines.append(f"next          {rivals[0].policy}, {words}")
    if best.solution is not None:
        lines.append(
            f"certificate   in the steps that decided no placement can be more than "
            f"{text.frac(max(best.solution.gap_frac, 0.0))} faster, by the table of costs"
        )
    if len(best.passes) > 1:
        spent = best.held_out_ns * best.passes
        shares = ", ".join(
            f"{text.frac(share)} in passes of {b.n_tokens:,} tokens"
            for share, b in zip(spent / spent.sum(), placed.question.batches, strict=True)
        )
        lines.append(f"time          {shares}")
    if best.dispatch is not None:
        lines.append(
            f"engine        must decide in each step whether host or device computes an offloaded expert "
            f"({best.dispatch}); as one that never does: see the other policies"
        )
    return lines


def _break_even(placed: "Answer") -> list[str]:
    limit, leaving = f"{placed.limit:g}x", placed.leaving
    n_all = placed.question.popularity.size
    if leaving is None:
        lines = [f"break-even    no expert may leave before the slowdown passes {limit}"]
    else:
        lines = [
            f"break-even    {leaving.n_offloaded} of {n_all} experts may leave before the slowdown passes {limit} "
            f"({leaving.slowdown:.3f}x, {text.n_bytes(leaving.capacity_bytes)} stay in device memory)"
        ]
    if placed.sizes:
        lines.append(f"batches       the best placement stays within {limit} {placed.within}")
        lines.append("              " + ", ".join(f"{n:,}: {slowdown:.2f}x" for n, slowdown in placed.sizes))
    return lines


def placing_json(placed: "Answer") -> dict[str, Any]:
    """The same as plain values."""
    question = placed.question

    def of(one: "Outcome") -> dict[str, Any]:
        solution = one.solution
        return {
            "policy": one.policy,
            "slowdown": one.slowdown,
            "held_out_ns": one.held_out_ns.tolist(),
            "fitted_ns": one.fitted_ns.tolist(),
            "resident_ns": one.resident_ns.tolist(),
            "n_resident": int((one.tier == RESIDENT).sum()),
            "tier_bytes": _tier_bytes(one, question),
            "dispatch": one.dispatch,
            "table_ns": None if solution is None else solution.time_ns,
            "bound_ns": None if solution is None else solution.bound_ns,
            "gap_frac": None if solution is None else solution.gap_frac,
        }

    return {
        "shape": question.shape.name,
        "hardware": question.basis.device.profile.name,
        "access": question.access,
        "batches": [{"n_tokens": b.n_tokens, "n_passes": b.n_passes} for b in question.batches],
        "windows": placed.windows,
        "capacity_bytes": question.capacity_bytes,
        "budget": list(placed.budget),
        "accesses": {name: one.slowdown for name, one in placed.accesses.items()},
        "policies": [of(one) for one in placed.outcomes],
        "best": of(placed.best),
        "prediction": placed.prediction.to_json(),
        "trade_off": [vars(point) for point in placed.trade_off],
        "limit": placed.limit,
        "leaving": None if placed.leaving is None else vars(placed.leaving),
        "by_batch": [{"n_tokens": n, "slowdown": slowdown} for n, slowdown in placed.sizes],
    }

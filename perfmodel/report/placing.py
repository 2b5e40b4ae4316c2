"""Pages about where experts should live: a comparison of policies, trade-offs, and what an export loses."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from perfmodel import text
from perfmodel.placement import NEAR_DATA, RESIDENT, TIERS
from perfmodel.placing import CACHE, FIXED, FORESEEN, OPTIMAL

from .words import table, wrapped

if TYPE_CHECKING:  # these bring scipy and scikit-learn, which other pages do not need
    from perfmodel.placing.answers import Answer
    from perfmodel.placing.compare import Outcome
    from perfmodel.placing.question import Question
    from perfmodel.predict import Prediction

INDENT = " " * 14
SAME_FRAC = 0.02  # placements of the same size nearer to each other than this are alike
MOST_MOVED = 6  # layers, and experts of one, that are named where an edited placement is described
MOVED = 1.2  # drift from which on routing is said to move: 0.8 to 1.2 on routing that stays, 1.3 to 4 on made-up drift
LEGEND = (
    "slowdown: over all experts resident, in the steps that judge; fitted: in those by which the best was chosen; to "
    "gain: by how much any other placement could be faster at most, by the table of costs; divided by: the rule that "
    "shares out each step's experts among device and host (-: each expert has its place)"
)


def placing_page(placed: "Answer", width: int) -> str:
    """The comparison of policies as a page for people, tables as wide as they are, other lines at most `width`."""
    question = placed.question
    passes = " and ".join(f"{text.count(b.n_passes)} of {text.counted(b.n_tokens, 'token')}" for b in question.batches)
    tokens = text.counted(placed.batch.n_tokens, "token")
    batch = tokens if len(question.batches) == 1 else f"passes: {passes}"
    head = f"{question.shape.name} on {question.basis.device.profile.title}, {batch}, {question.access}"
    prediction = str(placed.predictions[placed.best.policy]).split("\n")
    if len(question.batches) > 1:
        prediction[0] = f"{prediction[0]}, in passes of {tokens}"
    parts = [
        _prose([head, placed.windows, *placed.notes, *_host(placed)], width),
        _accesses(placed) if placed.accesses else "",
        f"{_policies(placed)}\n{_prose([LEGEND], width)}",
        _prose(verdict_lines(placed), width),
        _trade_off(placed) if placed.trade_off else "",
        _prose(_break_even(placed), width) if placed.limit is not None else "",
        _prose(prediction, width),
    ]
    return "\n\n".join(part for part in parts if part)


def _prose(lines: Sequence[str], width: int) -> str:
    return "\n".join(wrapped(line, width, "", INDENT) for line in lines)


def _host(placed: "Answer") -> list[str]:
    need = placed.host
    of = "" if need.capacity_bytes is None else f" of {text.n_bytes(need.capacity_bytes)}"
    words = f"experts in host memory {text.n_bytes(need.needed_bytes)}{of}"
    return ["; ".join([words, *need.notes])]


def _accesses(placed: "Answer") -> str:
    rows = [
        [
            name,
            f"{one.slowdown:.3f}x",
            f"{one.fitted_slowdown:.3f}x",
            text.n_bytes(_tier_bytes(placed, one)["resident"]),
        ]
        for name, one in placed.accesses.items()
    ]
    return table(rows, ["access, the best placement of each", "slowdown", "fitted", "resident"])


def _policies(placed: "Answer") -> str:
    head, rows = policy_rows(placed)
    return table(rows, head)


def policy_rows(placed: "Answer") -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table of policies in words, the fastest in the steps that judge first."""
    question = placed.question
    is_single = len(question.batches) == 1
    ranges = {name: found.interval for name, found in placed.predictions.items() if found.interval and is_single}
    rows = []
    for one in sorted(placed.outcomes, key=lambda one: one.slowdown):
        sizes = [text.n_bytes(size) for size in _tier_bytes(placed, one).values()]
        if one.policy == CACHE:
            sizes = ["cache"] * len(sizes)
        elif one.dispatch is not None and NEAR_DATA not in question.tiers:
            sizes[1:] = ["by step"] * (len(sizes) - 1)
        low_high = ranges.get(one.policy)
        rows.append(
            [
                one.policy,
                f"{one.slowdown:.3f}x",
                f"{one.fitted_slowdown:.3f}x",
                text.ns(one.held_out_ns[0]) if is_single else text.ns(float(one.held_out_ns @ one.passes)),
                *([f"{text.ns(low_high[0])} to {text.ns(low_high[1])}" if low_high else "-"] if ranges else []),
                *sizes,
                "-" if one.gap_frac is None else text.frac(one.gap_frac),
                one.dispatch or "-",
            ]
        )
    interval = ["90 % interval"] if ranges else []
    tiers = [TIERS[tier] for tier in question.tiers]
    time = "a layer" if is_single else "all passes"
    head = ["policy", "slowdown", "fitted", time, *interval, *tiers, "to gain", "divided by"]
    return head, rows


def _tier_bytes(placed: "Answer", one: "Outcome") -> dict[str, float]:
    n_experts = np.bincount(one.tier.ravel(), minlength=len(TIERS))
    question = placed.question
    return {TIERS[tier]: int(n_experts[tier]) * question.shape.expert_bytes for tier in question.tiers}


def verdict_lines(placed: "Answer") -> list[str]:
    """Which policy was taken, what it is worth beside the others and how sure that is: lines of a word and what it says
    (from the column of INDENT on)."""
    best, question = placed.best, placed.question
    by_name = {one.policy: one for one in placed.outcomes}
    lines = [f"best          {best.policy}: {best.slowdown:.3f}x in steps it has not seen"]
    if best.policy not in (OPTIMAL, FIXED):
        lines = [f"taken         {best.policy}: {best.slowdown:.3f}x in steps it has not seen"]
    rivals = sorted(
        (one for name, one in by_name.items() if name not in (best.policy, CACHE, FORESEEN)),
        key=lambda one: one.slowdown,
    )
    if rivals:
        lead = rivals[0].slowdown / best.slowdown - 1
        lines.append(f"next          {rivals[0].policy}, {text.frac(abs(lead))} {'slower' if lead >= 0 else 'faster'}")
    fixed = [one for name, one in by_name.items() if one.dispatch is None and name not in (CACHE, FORESEEN)]
    if len(fixed) > 2 and max(one.slowdown for one in fixed) < (1 + SAME_FRAC) * min(one.slowdown for one in fixed):
        lines.append(
            f"no benefit    placements differ by less than {text.frac(SAME_FRAC)}: at this batch it counts how many "
            "experts are resident, not which"
        )
    seen = by_name.get(FORESEEN)
    to_gain = 0.0 if seen is None else 1 - seen.slowdown / best.slowdown
    gain = f"who knew the steps that judge could be {text.frac(to_gain)} faster"
    drift = placed.drift
    if drift is not None and drift > MOVED and (to_gain > SAME_FRAC or seen is None):
        could = f"; {gain}, and nobody who decides before can be sure of that" if seen is not None else ""
        lines.append(
            f"routing       moves: steps that judge are {drift:.1f} times as far from those that decided as these from "
            f"each other{could}"
        )
    elif to_gain > SAME_FRAC:
        why = (
            "; too few batches decide to tell chance from routing that moves"
            if drift is None
            else ", but routing is not seen to move: they are as near to those that decided as these to each other"
        )
        lines.append(f"{'foresight' if drift is None else 'chance':14}{gain}{why}")
    certified = best if best.gap_frac is not None else by_name.get(FIXED)
    if certified is not None and certified.gap_frac is not None:
        lines.append(
            f"certificate   in the steps that were searched no placement can be more than "
            f"{text.frac(certified.gap_frac)} faster than {certified.policy}, by the table of costs, in which "
            "host and link never slow each other and no step is divided anew"
        )
    if len(best.passes) > 1:
        spent = best.held_out_ns * best.passes
        shares = ", ".join(
            f"{text.frac(share)} in passes of {b.n_tokens:,} tokens ({time / whole:.2f}x)"
            for share, b, time, whole in zip(
                spent / spent.sum(), question.batches, best.held_out_ns, best.resident_ns, strict=True
            )
        )
        lines.append(f"time          {shares}")
    if best.dispatch is not None:
        other = f"; {FIXED} is for engines that do not ({by_name[FIXED].slowdown:.3f}x)" if FIXED in by_name else ""
        lines.append(
            f"engine        must decide in each step whether host or device computes an expert that is not resident "
            f"({best.dispatch}){other}"
        )
    return lines


BINDS = {
    "overhead": "launching the kernels",
    "compute": "computing",
    "memory": "reading weights from GPU memory",
    "link": "moving or reading offloaded weights over the link",
    "host": "the host's CPU, which computes offloaded experts",
    "near-data": "the memory modules, which compute offloaded experts",
    "permute": "sorting tokens by expert",
    "combine": "adding up what experts give",
    "router": "the router",
    "launch": "the host, which launches the layer call by call",
}


def prediction_facts(found: "Prediction") -> list[tuple[str, str]]:
    """A prediction in a few words, each with its label: what leaving costs, what binds, what the numbers rest on."""
    more_ns = found.latency_ns - found.baseline_latency_ns
    sign = "cost" if more_ns >= 0 else "save"
    largest = sorted(found.parts.items(), key=lambda item: -item[1])[:2]
    shares = " and ".join(f"{name} {text.frac(value / found.latency_ns)}" for name, value in largest if value > 0)
    what = (
        "all experts are on the GPU"
        if not found.n_offloaded
        else f"{found.n_offloaded} of {found.n_experts} experts off the GPU {sign} {text.ns(abs(more_ns))} a layer"
    )
    sure = "" if found.interval is None else f", {text.ns(found.interval[0])} to {text.ns(found.interval[1])} (90 %)"
    rests = {
        "datasheet": "default constants and the machine's published rates: no interval without a fitted model",
        "fitted": f"a model fitted to measurements of this machine{sure}",
        "extrapolated": f"a fitted model beyond what it was fitted on{sure or ', without an interval'}",
    }
    return [
        ("costs", f"{what}; the time is {shares}"),
        ("binds", BINDS.get(found.bottleneck, found.bottleneck)),
        ("rests on", rests.get(found.basis, found.basis)),
    ]


def labelled(lines: Sequence[str]) -> list[tuple[str, str]]:
    """Lines of a page as pairs of the word they begin with and what they say; what goes on below it joins it."""
    found: list[tuple[str, str]] = []
    for line in "\n".join(lines).split("\n"):
        word, rest = line[: len(INDENT)].strip(), line[len(INDENT) :]
        if word or not found:
            found.append((word, rest))
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]}\n{rest}")
    return found


def change_lines(question: "Question", before: "Outcome", after: "Outcome", layers: Sequence[int]) -> list[str]:
    """What an edited placement changes, in words: the experts that moved by layer, and what that costs or saves."""
    moved = before.tier != after.tier
    if not moved.any():
        return ["nothing was changed"]
    gain = after.slowdown / before.slowdown - 1
    verb = "no difference" if abs(gain) < 5e-5 else f"{text.frac(abs(gain))} {'slower' if gain > 0 else 'faster'}"
    lines = [f"{verb}: {after.slowdown:.3f}x instead of {before.slowdown:.3f}x, in steps it has not seen"]
    n_before, n_after = (int((one.tier == RESIDENT).sum()) for one in (before, after))
    for i in np.flatnonzero(moved.any(axis=1))[:MOST_MOVED]:
        experts = [
            f"expert {e} {TIERS[before.tier[i, e]]} -> {TIERS[after.tier[i, e]]}"
            for e in np.flatnonzero(moved[i])[:MOST_MOVED]
        ]
        more = int(moved[i].sum()) - len(experts)
        lines.append(f"layer {layers[i]}: {', '.join(experts)}{f' and {more} more' if more else ''}")
    if moved.any(axis=1).sum() > MOST_MOVED:
        lines.append(f"and in {int(moved.any(axis=1).sum()) - MOST_MOVED} more layers")
    if n_before != n_after:
        size = text.n_bytes(abs(n_after - n_before) * question.shape.expert_bytes)
        lines.append(f"{size} of GPU memory {'more' if n_after > n_before else 'less'}")
    return lines


def _trade_off(placed: "Answer") -> str:
    rows = [
        [text.n_bytes(p.capacity_bytes), str(p.n_resident), str(p.n_offloaded), f"{p.slowdown:.3f}x"]
        for p in placed.trade_off
    ]
    return table(rows, ["device memory for experts", "resident", "offloaded", "slowdown"])


def _break_even(placed: "Answer") -> list[str]:
    limit, leaving = placed.limit, placed.leaving
    assert limit is not None
    n_all = placed.question.popularity.size
    if leaving is None:
        lines = [f"break-even    no expert may leave before the slowdown passes {limit:g}x"]
    else:
        lines = [
            f"break-even    {leaving.n_offloaded} of {n_all} experts may leave before the slowdown passes {limit:g}x "
            f"({leaving.slowdown:.3f}x, {text.n_bytes(leaving.capacity_bytes)} for experts in device memory)"
        ]
    if placed.sizes:
        lines.append(f"batches       this placement stays within {limit:g}x {below(placed.sizes, limit)}")
        lines.append(INDENT + ", ".join(f"{n:,}: {slowdown:.2f}x" for n, slowdown in placed.sizes))
    return lines


def below(points: Sequence[tuple[int, float]], limit: float) -> str:
    """At which of these batch sizes (tokens, slowdown) the slowdown stays within a limit, in words."""
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


def placing_json(placed: "Answer") -> dict[str, Any]:
    """The same as plain values."""
    question = placed.question

    def of(one: "Outcome") -> dict[str, Any]:
        found = placed.predictions.get(one.policy)
        return {
            "policy": one.policy,
            "slowdown": one.slowdown,
            "fitted_slowdown": one.fitted_slowdown,
            "held_out_ns": one.held_out_ns.tolist(),
            "fitted_ns": one.fitted_ns.tolist(),
            "resident_ns": one.resident_ns.tolist(),
            "interval_ns": None if found is None or found.interval is None else list(found.interval),
            "n_resident": int((one.tier == RESIDENT).sum()),
            "tier_bytes": _tier_bytes(placed, one),
            "dispatch": one.dispatch,
            "table_ns": one.table_ns,
            "bound_ns": one.bound_ns,
            "gap_frac": one.gap_frac,
        }

    return {
        "shape": question.shape.name,
        "hardware": question.basis.device.profile.name,
        "access": question.access,
        "batches": [{"n_tokens": b.n_tokens, "n_passes": b.n_passes} for b in question.batches],
        "drift": placed.drift,
        "windows": placed.windows,
        "capacity_bytes": question.capacity_bytes,
        "notes": list(placed.notes),
        "host": {"needed_bytes": placed.host.needed_bytes, "capacity_bytes": placed.host.capacity_bytes},
        "accesses": {name: one.slowdown for name, one in placed.accesses.items()},
        "policies": [of(one) for one in placed.outcomes],
        "best": of(placed.best),
        "prediction": {"n_tokens": placed.batch.n_tokens, **placed.predictions[placed.best.policy].to_json()},
        "trade_off": [vars(point) for point in placed.trade_off],
        "limit": placed.limit,
        "leaving": None if placed.leaving is None else vars(placed.leaving),
        "by_batch": [{"n_tokens": n, "slowdown": slowdown} for n, slowdown in placed.sizes],
    }

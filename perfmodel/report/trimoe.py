"""The page of `perfmodel trimoe`: a system of three domains beside its baselines, and beside what is published."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from perfmodel import text
from perfmodel.report.words import ratio, table, wrapped

if TYPE_CHECKING:  # this brings scipy and scikit-learn, which other pages do not need
    from perfmodel.trimoe import Comparison, Outcome
    from perfmodel.trimoe.study import Published

UNIT_WORDS = {"gpu": "GPU", "cpu": "CPU", "ndp": "NDP"}


def trimoe_page(found: "Comparison", scaled: Sequence[tuple[str, "Comparison"]], source: str, width: int) -> str:
    """The page of a comparison; `scaled` are the same with the near-data rates multiplied, each with words for it."""
    from perfmodel.trimoe.study import BATCHES, FACTORS, MIGRATIONS, MODELS, OVERHEAD, SPEEDUP, UTILISATION

    work, system = found.work, found.system
    n_steps, n_layers, n_experts = work.steps.shape
    n_tokens = work.steps.sum(axis=2).max() / work.shape.top_k
    size = text.n_bytes(work.n_slots * work.shape.n_layers * work.shape.expert_bytes)
    head = (
        f"{work.shape.name} on {work.profile.title}, {text.count(n_tokens)} tokens, {source}: "
        f"{text.counted(n_steps, 'step')} of {text.counted(n_layers, 'layer')} that stand for {work.shape.n_layers}; "
        f"{work.n_slots} of {n_experts} experts of a layer in device memory ({size}); cold below "
        f"{work.bounds.cold_below:g} mean loads, hot from {work.bounds.hot_from:g}"
    )
    others = [one for one in (*found.baselines, *found.ladder, found.no_amx) if one is not None and one is not system]
    rows = [_row(one, system) for one in (*others, system)]
    header = ["system", "experts of a step", "times as long", "GPU", "CPU", "NDP", "slowest", "moves add"]
    lines = [f"speed-up      {_beside(ratio(found.speedup), SPEEDUP, found.speedup)} over {found.best.system.name}"]
    factors = [_beside(f"{name} {ratio(f)}", FACTORS[name], f) for name, f in found.factors.items()]
    lines += ["factors       " + "; ".join(factors)] if factors else []
    slowest_frac = system.bottleneck_frac[found.bottleneck]
    lines += [
        f"utilisation   {_beside(text.frac(found.utilisation_frac), UTILISATION, found.utilisation_frac)}, mean of "
        f"{', '.join(f'{UNIT_WORDS[unit]} {text.frac(value)}' for unit, value in system.utilisation.items())}; "
        f"modules with the reads they serve {text.frac(system.dimm_busy_frac)}, then the mean is "
        f"{text.frac(found.utilisation_with_reads_frac)}",
        f"bottleneck    {UNIT_WORDS[found.bottleneck]} in {text.frac(slowest_frac)} of layers",
        f"overhead      {_beside(text.frac(system.overhead_frac), OVERHEAD, system.overhead_frac)}",
    ]
    if found.accuracy is not None:
        a = found.accuracy
        migrations = _beside(text.frac(a.migration_frac), MIGRATIONS, a.migration_frac)
        lines.append(
            f"predictor     {text.frac(a.right_frac)} of classes right (the step before: {text.frac(a.repeated_frac)}, "
            f"the mean so far: {text.frac(a.usual_frac)}); of {text.counted(a.n_migrations, 'change')} {migrations}"
        )
    if scaled:
        words = ", ".join(f"{name} {ratio(one.speedup)}" for name, one in scaled)
        lines.append(f"sensitivity   speed-up with near-data rates scaled: {words}")
    lines.append(
        "basis         near-data rates are assumed, baselines reconstructed, attention and other layers left out; "
        f"published figures are of {', '.join(MODELS)} at {BATCHES[0]} to {BATCHES[-1]} tokens; docs/trimoe.md"
    )
    body = [wrapped(line, width, "", " " * 14) for line in lines]
    return "\n".join([wrapped(head, width), "", table(rows, header), "", *body])


def _row(one: "Outcome", system: "Outcome") -> list[str]:
    shares = one.bottleneck_frac
    slowest = max(shares, key=lambda unit: shares[unit])
    used = [text.frac(one.utilisation.get(unit)) if unit in one.utilisation else "-" for unit in UNIT_WORDS]
    moves = text.frac(one.overhead_frac) if one.n_moves else "-"
    longer = ratio(one.step_ns / system.step_ns)
    return [one.system.name, text.ns(one.step_ns), longer, *used, UNIT_WORDS[slowest], moves]


def _beside(words: str, published: "Published", value: float | None) -> str:
    """A figure of ours with the published one, and where in its range ours is."""
    return f"{words} (published {published.words}: {published.judged(value)})"

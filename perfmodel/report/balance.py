"""Experts over several GPUs, as a page and as plain values."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from perfmodel import text
from perfmodel.placement.gem import usage
from perfmodel.placement.staircase import Staircase, saved_frac
from perfmodel.report.words import WIDTH, table, wrapped
from perfmodel.routing import Recording

if TYPE_CHECKING:  # this brings scipy and scikit-learn, which reading a trace does not need
    from perfmodel.balance import Comparison, Outcome

N_GPUS_SHOWN = 8
BY_ROWS = (
    "By rows: the layer's time from the tokens of every expert; all other times know the tokens of a GPU alone, as do "
    "maps made from them. Where the two disagree, as in small batches, believe the rows."
)
MOE_ONLY = (
    "Times are those of the routed experts alone, and a step waits in every layer for its slowest GPU. Attention and "
    "communication are left out: of a whole step the gain is smaller."
)


def balance_json(
    found: "Comparison", staircase: Staircase, recording: Recording, shape: str, times: str
) -> dict[str, Any]:
    """The comparison as plain values, with what it rests on."""
    return {
        "shape": shape,
        "routing": recording.name,
        "times": times,
        "n_gpus": staircase.n_gpus,
        "n_steps_fitted": found.n_fitted,
        "n_steps_judged": found.n_judged,
        "token_counts": staircase.boundaries.tolist(),
        "token_counts_saved_frac": saved_frac(staircase.boundaries),
        "spread_frac": float(staircase.spreads.max()),
        **usage(recording.loads),
        "best": found.outcomes[found.best].policy,
        "policies": [one.to_json() for one in found.outcomes],
    }


def balance_page(found: "Comparison", staircase: Staircase, recording: Recording, shape: str, times: str) -> str:
    """What each policy makes of the routing: latency, what it gains, how even it is, and which GPU is waited for."""
    facts = balance_json(found, staircase, recording, shape, times)
    spread, saved = text.frac(facts["spread_frac"]), text.frac(facts["token_counts_saved_frac"])
    lines = [
        f"{shape} on {text.counted(staircase.n_gpus, 'GPU')}, {recording.name}, times by {times}",
        f"maps from {text.counted(found.n_fitted, 'step')}, judged by {found.n_judged} later ones",
        *(f"routing: {words}" for words in recording.notes),
        f"fastest GPU {spread} faster than the slowest; timed at {len(staircase.boundaries)} token counts, {saved} "
        "fewer than all",
        f"{text.frac(facts['consistent_experts_frac'])} of experts are consistent, used in "
        f"{text.frac(facts['consistent_used_frac'])} of steps, the others in {text.frac(facts['temporal_used_frac'])}",
    ]
    body = [_row(one) for one in found.outcomes]
    header = ["policy", "layer", "vs linear", "vs lpt", "by rows", "max/mean tokens", "step mean", "p50", "p90", "p99"]
    best = found.outcomes[found.best]
    return "\n".join(
        [
            *lines,
            "",
            table(body, header),
            "",
            "per cent of layers that wait for a GPU / of the time that the GPU waits",
            _waits(found.outcomes),
            "",
            f"best: {best.policy}" + (" (by rows)" if best.layer_by_rows_ns is not None else ""),
            *([wrapped(BY_ROWS, WIDTH)] if best.layer_by_rows_ns is not None else []),
            wrapped(MOE_ONLY, WIDTH),
        ]
    )


def _row(one: "Outcome") -> list[str]:
    gains = [text.frac(one.gain_frac.get(name)) for name in ("linear", "lpt")]
    steps = [text.ns(one.step_ns[name]) for name in ("mean", "p50", "p90", "p99")]
    return [one.policy, text.ns(one.layer_ns), *gains, text.ns(one.layer_by_rows_ns), f"{one.imbalance:.2f}", *steps]


def _waits(outcomes: "Sequence[Outcome]") -> str:
    """How often each GPU is waited for and how long it waits; of many GPUs the one that is waited for most often."""
    gpus = range(len(outcomes[0].idle_frac))

    def cell(one: "Outcome", gpu: int) -> str:
        return f"{100 * one.straggler_frac[gpu]:.0f} / {100 * one.idle_frac[gpu]:.0f}"

    if len(gpus) <= N_GPUS_SHOWN:
        rows = [[one.policy, *(cell(one, gpu) for gpu in gpus)] for one in outcomes]
        return table(rows, ["policy", *(f"GPU {gpu}" for gpu in gpus)])
    rows = []
    for one in outcomes:
        most = max(gpus, key=lambda gpu: one.straggler_frac[gpu])
        rows.append([one.policy, str(most), cell(one, most), f"{100 * sum(one.idle_frac) / len(gpus):.0f}"])
    return table(rows, ["policy", "GPU waited for most", "waited for / waits", "all wait, mean"])

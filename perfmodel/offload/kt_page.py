"""docs/ktransformers.md as text: every number on it is computed by `kt_study` or read from the published table."""

from pathlib import Path

import numpy as np

from perfmodel import markdown, text

from . import kt_study
from .constants import ASSUMED
from .kt_study import SETTINGS, SHAPE, STRATEGIES, agreement, cells, cpu_part, fractions, predicted, published

FROM_FRAC = 0.6  # from here on the order of strategies is asked for


def page() -> str:
    """The page."""
    sections = [_head(), _setting(), _cells(), _why(), _sensitivity(), _left_out()]
    return "\n\n".join(map(markdown.wrapped, "\n".join(sections).split("\n\n"))).rstrip("\n") + "\n"


def write(docs: Path) -> None:
    """Write ktransformers.md into a folder."""
    (docs / "ktransformers.md").write_text(page(), encoding="utf-8")


def _percent(frac: float) -> str:
    return f"{100 * frac:.0f} %"


def _head() -> str:
    error = text.frac(agreement().error_frac)
    return f"""# ktransformers' placement strategies: ranked as measured, {error} off in level

Made by `python docs/regenerate.py`; do not edit. The ktransformers tutorial on expert scheduling
(kvcache-ai/ktransformers, `doc/en/kt-kernel/experts-sched-Tutorial.md` at commit 15c624d) publishes tokens per second
of {SHAPE.name} (fp8) on 4 RTX 4090 with a Xeon Gold 6454S, tensor parallel over the 4, on ShareGPT, with 0 to 100 % of
all experts on the GPUs and the others computed by the CPU. Do our [policies](policies.md) under our composition of CPU
and GPU (model 7.4) rank as those were measured?
"""


def _setting() -> str:
    machine = kt_study.machine()
    quantities = machine.quantities
    frac, strategy = kt_study.FITTED_ON
    measured = published()[strategy][published()["gpu_experts_frac"] == frac][0]
    assumed = [key for key, q in quantities.items() if q.kind == "assumed"]
    return f"""## What is assumed

{
        markdown.table(
            ["what", "taken as", "why"],
            [
                [
                    "shape",
                    f"{SHAPE.n_layers} layers, {SHAPE.n_experts} experts of {SHAPE.hidden} x {SHAPE.inter}, "
                    f"top-{SHAPE.top_k}, {text.n_bytes(SHAPE.expert_bytes)} each",
                    SHAPE.source,
                ],
                [
                    "batch",
                    "one token a step, decoding",
                    "no concurrency is published; 112 tokens/s with all experts on the GPUs is one sequence's pace",
                ],
                [
                    "GPUs",
                    f"one device of {text.bytes_per_s(quantities['memory_peak_bytes_per_s'].value)}",
                    "data sheets, the 4 added up",
                ],
                [
                    "CPU",
                    f"one socket, {text.bytes_per_s(quantities['host_peak_bytes_per_s'].value)}",
                    "the tutorial counts the GPUs and not the CPU; two sockets are below",
                ],
                [
                    "routing",
                    "`layered`: a power law in each layer, exponents 0.5 to 1.5, an order of experts for each layer",
                    "not published; it is what this project takes where nothing is known; others are below",
                ],
                [
                    "waiting for the CPU's part",
                    f"{text.ns(ASSUMED.merge_ns + ASSUMED.counts_ns)} a layer in which it has one",
                    "the defaults (`merge_ns`, `counts_ns`), assumed",
                ],
            ],
        )
    }
Also assumed are {", ".join(f"`{key}`" for key in assumed)} (`perfmodel/data/published/ktransformers_machine.toml` says
why). One number is fitted, on one cell: a token outside its routed experts takes {
        text.ns(kt_study.other_ns())
    }, so that
{strategy} at {_percent(frac)} comes out at the measured {measured:g} tokens/s. All other cells are predicted.
"""


def _cells() -> str:
    found, measured, at = predicted(), cells(), agreement()
    rows = [
        [_percent(frac), *(f"{p:.1f} / {m:.1f}" for p, m in zip(*pair, strict=True))]
        for frac, *pair in zip(fractions(), found, measured, strict=True)
    ]
    high = [frac for frac in fractions() if frac >= FROM_FRAC]
    kept = [frac for frac in at.ordered if frac >= FROM_FRAC]
    noise = [np.ptp(values) / values.mean() for values in (measured[0], _at_all())]
    off = np.abs(found / measured - 1)
    worst = np.unravel_index(off.argmax(), off.shape)
    near = [abs(row[0] / row[1] - 1) for row in found]
    apart = [abs(row[0] / row[1] - 1) for row in measured]
    return f"""## Predicted and measured

Tokens per second, predicted / measured:

{markdown.table(["experts on the GPUs", *STRATEGIES], rows)}
From {_percent(FROM_FRAC)} on frequency was measured before front-loading and that before random and uniform; so it is
predicted at {len(kept)} of {len(high)} fractions. Over all {found.size} cells the rank correlation is {at.spearman:.2f}
(Spearman), {at.kendall:.2f} (Kendall). Most of that is that more experts on the GPUs are faster; of the four strategies
at one fraction Kendall's is {at.kendall_within:.2f} on average. The level is off by {text.frac(at.error_frac)} on
average: too fast in {int((found > measured).sum())} of {found.size} cells, most of all frequency with
{_percent(fractions()[worst[0]])} of the experts on the GPUs ({text.frac(off[worst])}). Routing that is
less uneven than assumed would do that (below), and so would counts of other text than that which was served.

Random and uniform are the same but for luck: the model has them within {text.frac(max(near))} of each other, the
measurements within {text.frac(max(apart))}, with either one ahead. Where no strategy can matter, at 0 and 100 %, the
measurements of the four still differ by {text.frac(noise[0])} and {text.frac(noise[1])}; no repetitions are published.
"""


def _at_all() -> np.ndarray:
    return np.array([published()[name][-1] for name in STRATEGIES])


def _why() -> str:
    frac = 0.9
    rows = []
    index = int(np.argmin(np.abs(fractions() - frac)))
    free = predicted(SETTINGS[-1])[index]
    for column, name in enumerate(STRATEGIES):
        layers, experts = cpu_part(name, frac)
        values = (predicted()[index][column], free[column], cells()[index][column])
        rows.append([name, f"{layers:.1f} of {SHAPE.n_layers}", f"{experts:.1f}", *(f"{v:.1f}" for v in values)])
    at_high = [f for f, row in zip(fractions(), predicted(SETTINGS[-1]), strict=True) if f > 0 and row[2] < row[0]]
    return f"""## Why front-loading beats random and uniform

In the model, not because the CPU has less to compute, but because it has something to compute in fewer layers. Each
such layer waits for it once. At {_percent(frac)} on the GPUs, for a token:

{
        markdown.table(
            [
                "strategy",
                "layers with a part on the CPU",
                "experts on the CPU",
                "predicted",
                "predicted without waiting",
                "measured",
            ],
            rows,
        )
    }
Without the waiting the order turns round: front-loading is then slower than random at {len(at_high)} of
{
        len(fractions()) - 1
    } fractions, because in layers that are wholly on one side nothing runs beside anything. What waiting
really costs in ktransformers is not published. Whether that version left out its CPU call in a layer that is wholly on
the GPUs could not be read either; a CPU that needs some time for its first expert of a layer, however few, would have
the same effect.
"""


def _sensitivity() -> str:
    rows = []
    for setting in SETTINGS:
        at = agreement(setting)
        high = [frac for frac in at.ordered if frac >= FROM_FRAC]
        rows.append(
            [
                setting.words,
                ", ".join(map(_percent, high)) or "none",
                f"{at.spearman:.2f}",
                f"{at.kendall:.2f}",
                f"{at.kendall_within:.2f}",
                text.frac(at.error_frac),
            ]
        )
    nearest = min(SETTINGS, key=lambda setting: agreement(setting).error_frac)
    highest = max(SETTINGS, key=lambda setting: agreement(setting).spearman)
    power = {float(s.routing.partition(":")[2]): s for s in SETTINGS if s.routing.startswith("power-law:")}
    uneven = [e for e, s in power.items() if {f for f in fractions() if f >= FROM_FRAC} <= set(agreement(s).ordered)]
    return f"""## What the answer depends on

Each setting fits the same one cell again:

{
        markdown.table(
            [
                "setting",
                f"order as measured, from {_percent(FROM_FRAC)} on",
                "Spearman",
                "Kendall",
                "within a fraction",
                "mean error",
            ],
            rows,
        )
    }
The order needs two things: layers that wait, and routing that is uneven enough for frequency to gain more than whole
layers do. Of the power laws it is right with an exponent of {min(uneven):g} and above. The level is nearest with
"{nearest.words}" ({text.frac(agreement(nearest).error_frac)}), the rank correlation highest with "{
        highest.words
    }". Neither is used
elsewhere on this page: both would be chosen by the table that they are compared with.
"""


def _left_out() -> str:
    dynamic = published()["dynamic"]
    frequency = published()["frequency"]
    return f"""## What is not predicted

- The published `dynamic-expert-update`, which after each long prompt keeps what that prompt used. It was measured at
{dynamic[1]:.1f} tokens/s with 10 % of the experts on the GPUs, where frequency had {frequency[1]:.1f}, and at
{dynamic[9]:.1f} with 90 %, where frequency had {frequency[9]:.1f}. What it may gain is that one conversation uses
other experts than the mean of all; nothing is published of that, and steady shares, which all of the above rests on,
have none of it.

- Batches of several sequences, prompts, and expert deferral, which changes the model's numbers.

- What the 4 GPUs say to each other, and attention: they are in the fitted number.
"""

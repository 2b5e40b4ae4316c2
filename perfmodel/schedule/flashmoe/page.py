"""docs/flashmoe.md as text: every figure on it is computed by `flashmoe` or read from the published tables."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from perfmodel import markdown, text
from perfmodel.hardware import hardware
from perfmodel.moe import layer_flops
from perfmodel.physics import element_bytes
from perfmodel.schedule import layer_timeline
from perfmodel.schedule.costs import GEMMS
from perfmodel.schedule.measures import TILE_ROWS
from perfmodel.schedule.timeline import TRANSFERS
from perfmodel.text import NS_PER_S

from .figures_page import ROUNDED_NS, SCALED, figures, ms
from .study import (
    BASELINE_HYPOTHESES,
    BASELINES,
    BULK,
    FITTED_ON,
    FUSED,
    FUSED_HYPOTHESES,
    MACHINE,
    SHAPE,
    TF32_PEAK_FLOPS_PER_S,
    Hypothesis,
    Setting,
    calibrated,
    error_frac,
    expert_flops_per_s,
    facts,
    layer_at,
    needed,
    predicted,
    predicted_efficiency,
    published,
    systems,
    timeline,
    timeline_with_room,
)

ROWS_AT_8 = [Setting(8, n) for n in (8192, 16384)]
FIXED = ("launch", "start")  # the hypotheses in which what is missing does not grow with tokens
TE, CUTLASS, FASTER = "megatron-te", "megatron-cutlass", "fastermoe"


def page() -> str:
    """The page."""
    sections = [_head(), _published(), _uncalibrated(), _by_tokens(), _by_gpus(), _arithmetic(), _fused()]
    sections += [_precision(), *figures(), _unexplained()]
    return "\n\n".join(map(markdown.wrapped, "\n".join(sections).split("\n\n"))).rstrip("\n") + "\n"


def write(docs: Path) -> None:
    """Write flashmoe.md into a folder."""
    (docs / "flashmoe.md").write_text(page(), encoding="utf-8")


def _percent(frac: float | None, sign: str = "") -> str:
    return "n/a" if frac is None else f"{100 * frac:{sign}.0f} %"


def _number(hypothesis: Hypothesis, value: float | None) -> str:
    if value is None:
        return "none fits"
    return f"x {value:.1f}" if hypothesis.unit == "factor" else text.in_unit(value, hypothesis.unit)


def _at(at: Setting) -> str:
    return f"{at.tokens_per_gpu // 1024}K, {at.n_gpus} GPUs"


def _errors(names: Sequence[str], hypothesis: str, rows: Sequence[Setting]) -> list[float]:
    found = [error_frac(name, hypothesis, at) for name in names for at in rows]
    return [abs(error) for error in found if error is not None]


def _efficiencies(system: str, hypothesis: str) -> list[str]:
    """Overlap efficiency on 4 and 8 GPUs, predicted / published."""
    return [
        f"{_percent(predicted_efficiency(system, hypothesis, n))} / "
        f"{_percent(facts(f'overlap_efficiency_{n}gpu')[system])}"
        for n in (4, 8)
    ]


def _head() -> str:
    growing = [name for name in BASELINE_HYPOTHESES if name not in FIXED]
    tokens, gpus = (max(_errors(BULK, "work", rows)) for rows in (ROWS_AT_8, SCALED[:1]))
    tokens = max(tokens, *(max(_errors(BULK, name, ROWS_AT_8)) for name in growing))
    fixed = [error for name in FIXED for error in _errors(BULK, name, ROWS_AT_8)]
    fewer = [at for at in published()[FUSED] if at.n_gpus < FITTED_ON.n_gpus]
    own, own_fewer = (max(_errors([FUSED], "rate", rows)) for rows in (ROWS_AT_8, fewer))
    longer = [
        published()[name][known.fitted_on] / timeline(name, known.fitted_on).latency_ns
        for name, known in systems().items()
        if name != FUSED
    ]
    fused = layer_timeline(layer_at(FITTED_ON, SHAPE.dtype, is_even=True), "fused", systems()[FUSED].overheads)
    gain = timeline(CUTLASS, FITTED_ON).latency_ns / fused.latency_ns
    said = published()[CUTLASS][FITTED_ON] / published()[FUSED][FITTED_ON]
    return f"""# FlashMoE's latencies: what a model of launches and collectives explains, and what it does not

Made by `python docs/regenerate.py`; do not edit. FlashMoE (arXiv 2506.04667, also called FlashDMoE) runs a whole
Mixture-of-Experts layer, spread over several GPUs, as one kernel on each. It publishes latencies of one layer on up to
8 H100, beside four baselines of many kernels with collectives between them. This page asks how much of these latencies
the schedules of `perfmodel.schedule` explain. Nothing here was measured by us.

In short:

- The baselines were measured to take {min(longer):.0f} to {max(longer):.0f} times what their launches, GEMMs and
transfers over NVLink should take. The model does not explain that: each system gets one number, from its row of
{FITTED_ON.tokens_per_gpu} tokens on each GPU, and all other rows are predicted.

- What is missing grows with tokens. So taken, 8K and 16K tokens on 8 GPUs are predicted within {_percent(tokens)}; as a
fixed time, of launches or of starting collectives, they are missed by {_percent(min(fixed))} to {_percent(max(fixed))}.

- Over GPUs this fails: on 2 GPUs a factor on all work is wrong by up to {_percent(gpus)}. What Megatron took grows with
the tokens of all GPUs together; why is not published.

- Of FlashMoE one rate of its GEMMs, TF32's by all signs and not fp32's, predicts 8K and 16K tokens on 8 GPUs within
{_percent(own)} and fewer GPUs within {_percent(own_fewer)}; that it loses from 2 to 8 GPUs it does not predict.

- In equal precision the model has one kernel {gain:.1f} times as fast as Megatron-CUTLASS's phases at 4K tokens;
published is {said:.1f}, FlashMoE being in fp32. Most of that is time of the baselines for which a model of these
schedules has no reason.

All rows were known when the explanations below were chosen. Their numbers are calibrated blind, their choice is not.
"""


def _published() -> str:
    overheads = systems()[FASTER].overheads
    rows = [
        ["GPUs", "2, 4 or 8 H100 SXM 80 GB with NVLink; tokens are those of each GPU", "section 4"],
        [
            "layer",
            f"{SHAPE.n_experts} experts, top-{SHAPE.top_k}, H = I = {SHAPE.hidden}, forward; plain experts (2 GEMMs)",
            "section 4; that experts are plain is how we read it",
        ],
        ["precision", "FlashMoE fp32, baselines fp16", "section 4; modelled with the rates of bf16"],
        ["capacity factor", "1: rows beyond an expert's even share are dropped", "section 4"],
        ["routing", "uniform: drawn; for FlashMoE every expert's even share, which capacity leaves", "not published"],
        ["launches", "below; FasterMoE's are our default", "Table 1, on 2 A100; FasterMoE's are not published"],
        ["schedules", "FlashMoE fused, COMET chunked, the others bulk", "how we read their descriptions"],
        ["host's time for a launch", text.ns(overheads.host_launch_ns), "assumed"],
        ["start of a collective", text.ns(overheads.collective_ns), "assumed"],
    ]
    return f"""## What is published, and what is taken as given

Latencies are the labels of the bars in the repository of its authors (osayamenja/FlashMoE, `plots/`, at commit
1a77aed), to 0.1 ms; other figures are the paper's. `perfmodel/data/published/flashmoe_*.csv` has all of them with
sources.

{markdown.table(["what", "taken as", "source"], rows)}
"""


def _uncalibrated() -> str:
    rows = []
    for name, known in systems().items():
        at = known.fitted_on
        found, measured = timeline(name, at), published()[name][at]
        experts = sum(found.phases[gemm] for gemm in GEMMS)
        wire = sum(found.phases[phase] for phase in TRANSFERS)
        cells = map(ms, (measured, found.latency_ns, experts, wire, found.bounds["host"]))
        rows.append([name, _at(at), *cells, f"x {measured / found.latency_ns:.1f}"])
    room = SHAPE.n_experts / SHAPE.top_k
    widest = timeline_with_room(CUTLASS, FITTED_ON, room).latency_ns
    head = ["system", "row", "published ms", "modelled ms", "GEMMs", "transfers", "launches", "published / modelled"]
    return f"""## Before anything is calibrated

{markdown.table(head, rows)}
GEMMs, transfers and launches are each on its own; schedules overlap them. FlashMoE is modelled with TF32 (below) at
the share of the peak that GEMMs are taken to reach. Padding is not what is missing: with capacity factor {room:g},
where every expert has room for every token and no more padding is possible, {CUTLASS} would take {ms(widest)} ms of the
published {ms(published()[CUTLASS][FITTED_ON])}.
"""


def _by_tokens() -> str:
    rows = []
    for name, hypothesis in BASELINE_HYPOTHESES.items():
        for system in BASELINES:
            cells = []
            for n_tokens in (8192, 16384):
                at = Setting(systems()[system].fitted_on.n_gpus, n_tokens)
                found = predicted(system, name, at)
                pair = f"{ms(found.latency_ns) if found else 'n/a'} / {ms(published()[system][at])}"
                cells.append(f"{pair} ({_percent(error_frac(system, name, at), '+')})")
            rows.append([name, system, _number(hypothesis, calibrated(system, name)), *cells])
    fixed = [error for name in FIXED for error in _errors(BULK, name, ROWS_AT_8)]
    growing = [name for name in BASELINE_HYPOTHESES if name not in FIXED]
    worst = ", ".join(f"{_percent(max(_errors(BULK, name, ROWS_AT_8)))} (`{name}`)" for name in growing)
    named = "\n\n".join(f"- `{name}`: {known.words}." for name, known in BASELINE_HYPOTHESES.items())
    head = ["where", "system", "its number", "8K: predicted / published ms", "16K: predicted / published ms"]
    faster = published()[FASTER]
    return f"""## More tokens: one number from the row of 4K

Where the time may go that the model does not have, each with one number:

{named}

The first two are times that do not grow with tokens. All but `launch` keep the published launches at
{text.ns(systems()[TE].overheads.host_launch_ns)} each. COMET is calibrated and predicted on 4 GPUs: at 8 it is not
published.

{markdown.table(head, rows)}
A fixed time is refuted: it misses the rows of 8 GPUs by {_percent(min(fixed))} to {_percent(max(fixed))}. Of the others
the worst errors of the three systems on 8 GPUs are {worst}. They cannot be told apart here: whatever grows with tokens
predicts that twice the tokens take a little less than twice the time. FasterMoE grew by more than that
({faster[ROWS_AT_8[1]] / faster[ROWS_AT_8[0]]:.2f} times from 8K to 16K), which none of them has.
"""


def _by_gpus() -> str:
    rows = []
    for name, hypothesis in BASELINE_HYPOTHESES.items():
        for system in BULK:
            values = [_number(hypothesis, needed(system, name, at)) for at in SCALED]
            error = _percent(error_frac(system, name, SCALED[0]), "+")
            rows.append([name, system, *values, error, *_efficiencies(system, name)])
    te, faster, jump = (published()[name] for name in (TE, FASTER, CUTLASS))
    first, second = (te[more] / te[fewer] for fewer, more in pairwise(SCALED))
    fewer_gpus = [at for at in te if at.n_gpus < FITTED_ON.n_gpus]
    means = {name: sum(_errors([TE], name, fewer_gpus)) / len(fewer_gpus) for name in BASELINE_HYPOTHESES}
    crossed, gathered = ([needed(TE, name, at) or 0.0 for at in SCALED] for name in ("all-to-all", "all-gather"))
    scattered = [needed(FASTER, "all-to-all", at) or 0.0 for at in SCALED]
    nvlink = hardware(MACHINE)["peer_link_peak_bytes_per_s"]
    head = ["where", "system", "needed on 2 GPUs", "on 4", "on 8", "error on 2"]
    return f"""## More GPUs: what tells the hypotheses apart

Fig 11 keeps 8K tokens on each GPU and {SHAPE.n_experts} experts altogether, and divides the time on 2 GPUs by that on
more: overlap efficiency O_e. Columns 3 to 5 are the number that each hypothesis would need for that row alone: one that
holds needs the same number everywhere. The last three columns are predicted with the number from 4K tokens on 8 GPUs.

{markdown.table([*head, "O_e of 4: predicted / published", "O_e of 8"], rows)}
Megatron-TE took {", ".join(ms(te[at]) for at in SCALED)} ms: {first:.2f} and {second:.2f} times as long with twice the
GPUs, as if each of them had the tokens of all to deal with. An all-to-all's bytes grow only 1.75 times from 2 to 8 GPUs
at constant tokens on each, so it would have to slow down from {text.bytes_per_s(crossed[0])} to
{text.bytes_per_s(crossed[2])}. An all-gather's grow 7 times; it would have run at
{", ".join(map(text.bytes_per_s, gathered))}: nearly one rate, but at most {_percent(max(gathered) / nvlink)} of
NVLink's. `all rows` needs the steadiest number here. Mean errors over the {len(fewer_gpus)} rows of Megatron-TE on 2
and 4 GPUs are {", ".join(f"{_percent(mean)} (`{name}`)" for name, mean in means.items())}.

That is arithmetic; what follows is inference. Megatron Core's default dispatcher is an all-gather
(`--moe-token-dispatcher-type`, its MoE README), and work of each GPU on the gathered tokens, such as masks and
permutations, grows as `all rows` does. Which dispatcher ran, and over which links, is not published.

FasterMoE ({", ".join(ms(faster[at]) for at in SCALED)} ms) fits neither; nearest is an all-to-all, at
{text.bytes_per_s(min(scattered))} to {text.bytes_per_s(max(scattered))}.
Megatron-CUTLASS on 4 GPUs took {", ".join(ms(jump[Setting(4, n)]) for n in (4096, 8192, 16384))} ms with 4K, 8K and 16K
tokens. Nothing that grows with tokens has such a step. The middle one stands in two figures; we take it for a disturbed
measurement, and its efficiency on 4 GPUs rests on it.
"""


def _rates(latencies: Mapping[Setting, float], n_gpus: int) -> list[tuple[str, float, float]]:
    """Between which rates the experts of a GPU computed, were that all of the time added from one row to the next."""
    found = []
    for fewer, more in pairwise(sorted(at for at in latencies if at.n_gpus == n_gpus)):
        flops = layer_flops(SHAPE, more.tokens_per_gpu - fewer.tokens_per_gpu)
        added = latencies[more] - latencies[fewer]
        low, high = (flops / (added + sign * 2 * ROUNDED_NS) * NS_PER_S for sign in (1, -1))
        found.append((f"{fewer.tokens_per_gpu // 1024}K to {_at(more)}", low, high))
    return found


def _arithmetic() -> str:
    fp32 = hardware(MACHINE)["fp32_peak_flops_per_s"]
    rates = [row for n_gpus in (4, 8) for row in _rates(published()[FUSED], n_gpus)]
    rows = [(what, text.flops_per_s(low), text.flops_per_s(high)) for what, low, high in rates]
    fastest = max(low for _, low, _ in rates)
    return f"""## FlashMoE: in which arithmetic it ran

The paper says fp32. An H100 computes at most {text.flops_per_s(fp32)} in fp32 outside its tensor cores. From one row to
the next FlashMoE did more, whatever else its time holds (rounding of the labels allowed for, all rows computed):

{markdown.table(["rows", "at least", "at most"], rows)}
So its GEMMs ran in TF32 on the tensor cores: an inference from the times. The code agrees: its README of September
2025 (commit 05eb497) names TF32 for peak performance, and its configuration at 1a77aed is tf32 (`torch_dtype` 1), by
the tensor-core instruction of the A100. The dense TF32 peak of an H100 is {text.flops_per_s(TF32_PEAK_FLOPS_PER_S)}.
One thing could undo the inference: with capacity factor 1 fewer rows are computed than routed. Under uniform routing
{text.frac(timeline(CUTLASS, FITTED_ON).dropped_frac)} are dropped at 4K tokens; if {_percent(1 - fp32 / fastest)} were
at all sizes, fp32 at its whole peak would have been enough.
"""


def _fused() -> str:
    rest = [at for at in published()[FUSED] if at != FITTED_ON]
    rows = []
    for name, hypothesis in FUSED_HYPOTHESES.items():
        errors = [_percent(error_frac(FUSED, name, at), "+") for at in rest]
        number = _number(hypothesis, calibrated(FUSED, name))
        rows.append([hypothesis.words, number, *errors, *_efficiencies(FUSED, name)])
    rate = calibrated(FUSED, "rate") or 0.0
    own, drawn = published()[FUSED], layer_at(FITTED_ON, SHAPE.dtype).traffic.rows
    least, most = sorted(2 * own[fewer] - own[more] for fewer, more in pairwise([FITTED_ON, *ROWS_AT_8]))
    padded = float((np.ceil(drawn / TILE_ROWS) * TILE_ROWS).sum() / drawn.sum())
    head = ["what is slower", "its number", *map(_at, rest), "O_e of 4: predicted / published", "O_e of 8"]
    return f"""## FlashMoE: one number from the row of 4K on 8 GPUs

Errors of the other rows:

{markdown.table(head, rows)}
A rate of {text.flops_per_s(rate)} is {_percent(rate / TF32_PEAK_FLOPS_PER_S)} of the TF32 peak; it is a ceiling, below
which the model counts weights that are read and processors that wait. It makes time grow as tokens do. Published, a
line through the rows of 8 GPUs starts at {ms(least)} to {ms(most)} ms without tokens. Such a fixed part is missing; all
that is missing as a fixed part (last row) is too much. Predicted, 8 GPUs are as fast as 2, for links have time to
spare; published, they lose a tenth. Links alone lose far too much. Two or three of these together would fit, with as
many numbers; none are fitted here.

The second row says how much hangs on the rows of experts. Drawn and not dropped, they fill blocks of {TILE_ROWS} badly:
{_percent(padded - 1)} more is computed at 4K tokens. Errors are smaller so, but the published setting drops such rows.
"""


def _precision() -> str:
    at = SCALED[-1]
    fp16 = hardware(MACHINE)["bf16_peak_flops_per_s"]
    rows, shares = [], {}
    for name in (FUSED, *BULK):
        dtype, measured = systems()[name].dtype, published()[name][at]
        reached = expert_flops_per_s(measured, at.tokens_per_gpu)
        shares[name] = reached / (TF32_PEAK_FLOPS_PER_S if name == FUSED else fp16)
        row_bytes = SHAPE.hidden * element_bytes(dtype)[1]
        sent = 2 * at.tokens_per_gpu * SHAPE.top_k * (1 - 1 / at.n_gpus) * row_bytes
        words = "fp32, computed in TF32" if name == FUSED else dtype
        cells = [ms(measured), text.flops_per_s(reached), text.frac(shares[name]), text.n_bytes(sent)]
        rows.append([name, words, *cells, text.bytes_per_s(sent / measured * NS_PER_S)])
    head = ["system", "precision", "ms", "experts' FLOP/s", "of its peak", "a GPU sends", "over its latency"]
    return f"""## Precision

8K tokens on 8 GPUs, by the arithmetic of the layer alone (even routing, all rows computed, there and back):

{markdown.table(head, rows)}
FlashMoE moves twice the bytes, has half the peak, and is {published()[TE][at] / published()[FUSED][at]:.1f} times
faster than Megatron. So precision hides a part: as a share of what the arithmetic allows it is
{shares[FUSED] / shares[TE]:.0f} times better. It does not follow that fp16 would make it twice as fast: its README
(05eb497) calls fp16 complete and not yet at its peak.
"""


def _unexplained() -> str:
    return f"""## What this model cannot explain

- Why work takes the baselines {calibrated(TE, "work") or 0.0:.0f} times what GEMMs at usual rates and collectives over
NVLink take. The factor is calibrated, not understood. No launch cost, start of a collective or padding that is possible
gives it.

- Why Megatron's time grows with the number of GPUs at constant tokens on each. Two hypotheses have that growth; neither
can be checked, since no trace is published, and neither the dispatcher nor the links in use are named.

- FasterMoE's growth with tokens (more than in proportion on 8 GPUs) together with its growth with GPUs.

- The step of Megatron-CUTLASS at 8K tokens on 4 GPUs.

- FlashMoE's fixed part, and its loss of a tenth from 2 to 8 GPUs. In the model its links are never the limit;
contention in the switch, polling by its own scheduler and packets that arrive late are not in it.

- Utilisation as published: it counts something else, on another machine, with tokens that are not named.

- COMET on 8 GPUs, which the authors leave out as anomalous; DeepEP and DeepSpeed-MoE, of which no latencies are
published.

What would decide: a trace of one layer pass of Megatron on 2 and on 8 such GPUs. `perfmodel analyze` shows which
collectives and kernels fill it.

Not used: the objective by which the authors' repository groups experts (`decider`). It needs measured rates of devices,
and an all-reduce of gradients that inference has not.
"""

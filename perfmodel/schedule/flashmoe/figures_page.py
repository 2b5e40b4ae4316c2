"""The sections of docs/flashmoe.md on what FlashMoE publishes beside latencies; made by `page`."""

from perfmodel import markdown, text
from perfmodel.hardware import hardware
from perfmodel.schedule.measures import overlap_efficiency, throughput_tokens_per_s

from .figures import late_gpu_ns, payload, symmetric, uneven_straggler_ratio
from .study import (
    BASELINE_HYPOTHESES,
    BULK,
    FITTED_ON,
    FUSED,
    MACHINE,
    NS_PER_MS,
    Setting,
    calibrated,
    facts,
    layer_at,
    published,
    systems,
    timeline,
)

SCALED = [Setting(n, 8192) for n in (2, 4, 8)]  # over which Fig 11 scales
ROUNDED_NS = 0.05 * NS_PER_MS  # of a bar's label
UTILISATION_ON = ("a100-sxm-80gb", 64)  # machine and experts of Fig 9
UTILISATION_OF = {"fastermoe": "fastermoe", "comet": "comet", "megatron-cutlass": "megatron", "megatron-te": "megatron"}
MEASURED_ROUTINGS = ("olmoe-1b-7b__c4", "olmoe-1b-7b__github", "mixtral-8x7b__c4", "mixtral-8x7b__github")
ROUTINGS = ("uniform", "power-law:0.3", "mmlu-like")
TE, CUTLASS = "megatron-te", "megatron-cutlass"


def figures() -> list[str]:
    """The sections."""
    return [_launches(), _utilisation(), _identities(), _symmetric(), _payload(), _stragglers()]


def ms(ns: float) -> str:
    """A time as milliseconds, as precise as the published ones."""
    return f"{ns / NS_PER_MS:.3g}" if ns < NS_PER_MS else f"{ns / NS_PER_MS:.1f}"


def _launches() -> str:
    counts, each = facts("launches_per_layer"), systems()[TE].overheads.host_launch_ns
    rows = []
    for name, count in counts.items():
        cells = ["n/a", "n/a"]
        if name in systems():
            measured = published()[name][systems()[name].fitted_on]
            cells = [ms(measured), text.frac(count * each / measured)]
        rows.append([name, f"{count:.0f}", ms(count * each), *cells])
    te, cutlass = (text.ns(calibrated(name, "launch")) for name in (TE, CUTLASS))
    return f"""## Launches

Counts are inputs here (Table 1, on 2 A100), not results. What they cost where the host needs {text.ns(each)} for each:

{markdown.table(["system", "launches", "their ms", "published ms, 4K tokens", "share"], rows)}
If launches were all of it, one would take {te} in Megatron-TE and {cutlass} in Megatron-CUTLASS, which with
{counts[TE] / counts[CUTLASS]:.1f} times fewer launches took as long. Launch counts do not order the baselines.
"""


def _utilisation() -> str:
    at, active = SCALED[0], facts("sm_utilisation")
    rows = []
    for system, name in UTILISATION_OF.items():
        found = [timeline(system, at, None, 0.0, *UTILISATION_ON)]
        found += [timeline(system, at, h, calibrated(system, h) or 0.0, *UTILISATION_ON) for h in BASELINE_HYPOTHESES]
        rows.append([system, text.frac(active[name]), *(f"{100 * one.compute_busy_frac:.0f} %" for one in found)])
    rate = calibrated(FUSED, "rate") or 0.0
    two, eight = (text.frac(timeline(FUSED, on, "rate", rate).compute_busy_frac) for on in (SCALED[0], SCALED[-1]))
    return f"""## Utilisation

Fig 9 has "SM active": the share of cycles in which a processor has a warp in flight, mean over processors, on 2 A100
with {UTILISATION_ON[1]} experts (tokens not published; 8K here). Ours is the share of a layer in which a GPU computes.
They are not the same: a persistent kernel is active by definition from its start to its end, waiting or not, so
FlashMoE's {text.frac(active[FUSED])} says little of work done; a collective's kernel is active on a few processors
without computing; a kernel of few blocks leaves processors inactive while it computes. Published, and the computing
share by the model under each hypothesis with its number from the H100:

{markdown.table(["system", "SM active", "as modelled", *BASELINE_HYPOTHESES], rows)}
If SM active is near computing at all, FasterMoE's figure is what waiting gives (`launch`, `start`, `all-to-all`) and
Megatron's is not: it lies between `all-gather` and `work`, so the two would be slow for different reasons. Of FlashMoE
the fused model has {two} of processor time computing on 2 H100 and {eight} on 8, at the calibrated rate.

The paper's text says {facts("utilisation_ratio")[TE]:g} times Megatron-TE's utilisation; by its figure it is
{active[FUSED] / active["megatron"]:.1f} times.
"""


def _verdict(value: float, rounding: float, low: float, high: float) -> list[str]:
    """Between which values a figure must lie, and whether it does within its own rounding."""
    return [f"{low:.3g} to {high:.3g}", "yes" if value - rounding <= high and low <= value + rounding else "no"]


def _between(numerator_ns: float, denominator_ns: float) -> tuple[float, float]:
    """Between which values the ratio of two labels lies."""
    low, high = ((numerator_ns + s * ROUNDED_NS) / (denominator_ns - s * ROUNDED_NS) for s in (-1, 1))
    return low, high


def _identities() -> str:
    latencies, at = published(), SCALED[-1]
    own, claimed = latencies[FUSED][at], facts("throughput_8gpu")[FUSED]
    slow, fast = (throughput_tokens_per_s(at.tokens_per_gpu, at.n_gpus, own + s * ROUNDED_NS) / 1e6 for s in (1, -1))
    rows = [["throughput of flashmoe, million tokens/s", f"{claimed:g}", *_verdict(claimed, 0.05, slow, fast)]]
    for name, ratio in facts("throughput_ratio_8gpu").items():
        system = TE if name == "megatron" else name
        verdict = _verdict(ratio, 0.05, *_between(latencies[system][at], own))
        rows.append([f"throughput over {name}", f"{ratio:g}", *verdict])
    for n_gpus in (4, 8):
        for system in (FUSED, *BULK):
            frac = facts(f"overlap_efficiency_{n_gpus}gpu")[system]
            two, more = (latencies[system][Setting(n, 8192)] for n in (2, n_gpus))
            cells = _verdict(100 * frac, 0.5, *(100 * x for x in _between(two, more)))
            exact = f"{100 * overlap_efficiency(two, more):.1f} ({cells[0]})"
            rows.append([f"O_e of {system} on {n_gpus} GPUs, %", f"{100 * frac:.0f}", exact, cells[1]])
    ratio = facts("throughput_ratio_8gpu")["megatron"]
    return f"""## Figures that follow from the latencies

What other figures must be if the labels are right, each of them rounded to 0.1 ms:

{markdown.table(["figure", "published", "from the labels", "agrees"], rows)}
{ratio:g} times Megatron's throughput would be {ms(ratio * own)} ms, where the labels say {ms(latencies[TE][at])}.
"""


def _symmetric() -> str:
    rows, n_right = [], 0
    for row in symmetric():
        sizes = [row.n_bytes, row.size_bytes(row.context_tokens), row.size_bytes(row.padded_tokens)]
        own, formula, whole = (f"{size / 2**30:.2f}" for size in sizes)
        n_right += own == whole
        read = f"{row.n_experts}, {row.hidden}, {row.context_tokens}"
        comes_out = "yes" if own == whole else "no"
        rows.append([row.model, own, text.count(row.tokens_of_4kb), read, formula, whole, comes_out])
    head = ["model", "published GB", "tokens of 4 KB", "experts, width, context", "formula", "whole tiles", "comes out"]
    least = symmetric()[-1].size_bytes(1) / 2**30
    return f"""## Symmetric tensors

Size(L) is 4 copies of the token buffer, more where an expert's share of the tokens is below a tile of 128. Table 3
takes 4 KB a token, and how many tokens is not known to us. Read so, the published sizes hold the tokens in column 3,
another batch in each row. Read as fp32 tokens of each model's own width, as many as its context is long, in GiB (our
reading, not the paper's):

{markdown.table(head, rows)}
Of {len(rows)} rows {n_right} come out exactly where each expert's share is rounded up to whole tiles. By the formula as
published Qwen3's does not, for it rounds only shares below one tile. DeepSeek-V3's comes out with no number of tokens:
a tile for each of its experts is {least:.2f} GiB already.
"""


def _payload() -> str:
    rows = []
    for key in MEASURED_ROUTINGS:
        found = payload(key)
        rows.append([key.replace("__", ", "), *map(text.frac, found)])
    dropped = timeline(CUTLASS, FITTED_ON).dropped_frac
    return f"""## Payload

FlashMoE sends rows and no padding. Beside a collective padded to C rows for each expert that saves
1 - sum(n_e) / (E C) (our derivation; the paper gives no figure). On measured routing that ships with the package, mean
over three layers:

{markdown.table(["routing", "padding, room for the fullest", "dropped, capacity factor 1"], rows)}
With capacity factor 1, as in the paper's experiments, as many places stay empty as rows are dropped. With uniform
routing that is {text.frac(dropped)} at 4K tokens, and payload explains nothing of the published differences; with
routing as uneven as OLMoE's much more would be lost.
"""


def _stragglers() -> str:
    at = SCALED[-1]
    p95s, even = facts("straggler_ratio_p95"), timeline(CUTLASS, at)
    medians = facts("straggler_ratio_median")
    machines = [[name, f"{median:g}", f"{p95s[name]:g}"] for name, median in medians.items()]
    late = []
    for ratio in sorted([*medians.values(), *p95s.values()]):
        slow = late_gpu_ns(even, ratio)
        late.append([f"{ratio:g}", ms(slow), f"x {slow / even.latency_ns:.2f}"])
    uneven = [[routing, f"{uneven_straggler_ratio(routing, at):.2f}"] for routing in ROUTINGS]
    traffic = layer_at(at, "fp16").traffic
    touched = float((traffic.tokens.sum(axis=0) / traffic.n_tokens.sum()).mean())
    link = text.bytes_per_s(hardware(MACHINE)["peer_link_peak_bytes_per_s"])
    return f"""## Stragglers

Table 2 times one collective on each GPU and divides the slowest by the fastest: who comes first waits longest.

{markdown.table(["machine", "median", "95th percentile"], machines)}
Two things make such ratios in the model. Uneven routing, for the combine of 8K tokens on 8 H100 without padding, over
NVLink of {link}, the experts of a pattern in order (so that the most used share a GPU):

{markdown.table(["routing", "slowest / fastest"], uneven)}
And GPUs of unequal speed. A bulk layer in which one GPU computes slower by those ratios, 8K tokens on 8 GPUs, launches
of Megatron-CUTLASS, nothing calibrated:

{markdown.table(["one GPU slower", "ms", "latency"], late)}
The published ratios are of waiting, not of speed, so the last table is an illustration. In a fused kernel the others do
not stop for a late GPU, but tokens with a row on it wait all the same: {text.frac(touched)} of them here.
"""

"""What if: fused, in larger batches, under more skew; and everything that can be said of an expert-parallel layer.

docs/schedule.md says what each answer means.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from perfmodel import text
from perfmodel.offload import rate_keys
from perfmodel.routing import power_law_shares

from . import layer_timeline
from .alternatives import Alternative
from .costs import Layer
from .measures import symmetric_buffer_bytes
from .overheads import DEFAULTS
from .question import Question
from .timeline import LayerTimeline

LAUNCH_FRAC = 0.1  # of a layer, below which launch overhead no longer matters
STRAGGLER_FRAC = 0.5  # of a layer, above which stragglers dominate it
MAX_TOKENS = 2**16  # on a GPU, where the search for a batch ends
# Of the power law that skew is searched along: where the search begins, ends, and how finely it is told.
FIRST_EXPONENT, MAX_EXPONENT, EXPONENT_STEP = 0.25, 8.0, 0.02

Found = TypeVar("Found")


def launch_batch(question: Question, schedule: str) -> int | None:
    """Tokens on each GPU from which launches add less than LAUNCH_FRAC to the layer under a schedule; null where that
    is not so up to MAX_TOKENS."""

    def is_hidden(n_tokens: int) -> bool:
        found = replace(question, tokens_per_gpu=n_tokens).timeline(schedule)
        return found.phases["launch"] < LAUNCH_FRAC * found.latency_ns

    high = 1
    while not is_hidden(high):
        high *= 2
        if high > MAX_TOKENS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_hidden(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Skew:
    """A skew of the load: the exponent of its power law of popularity ranks, and rows of the busiest GPU over the mean
    of all."""

    exponent: float
    max_over_mean: float


def max_over_mean(layer: Layer) -> float:
    """Rows that the busiest GPU's experts receive, over the mean of all GPUs."""
    rows = layer.traffic.received.sum(axis=1)
    return float(rows.max() / rows.mean())


def skewed(question: Question, exponent: float) -> Question:
    """The same with a power law of popularity ranks, the order of the experts kept; 0 is even."""
    shares = np.empty_like(question.shares)
    shares[0, np.argsort(-question.shares[0], kind="stable")] = power_law_shares(question.shape.n_experts, exponent)[0]
    return replace(question, shares=shares)


def skew_frac(question: Question, schedule: str) -> float:
    """The part of the layer that even routing would save: what all GPUs wait for the busiest, or pad for it."""
    return 1 - question.even.latency_ns(schedule) / question.latency_ns(schedule)


def dominating_skew(question: Question, schedule: str) -> Skew | None:
    """The least skew at which stragglers take more than STRAGGLER_FRAC of the layer; null where none does.

    Looked for from below: where memory binds, extreme skew leaves few experts whose weights are read, and a layer is
    faster again.
    """
    even_ns = question.even.latency_ns(schedule)

    def dominates(exponent: float) -> bool:
        return 1 - even_ns / skewed(question, exponent).latency_ns(schedule) > STRAGGLER_FRAC

    if question.n_gpus == 1:
        return None
    low, high = 0.0, FIRST_EXPONENT
    while not dominates(high):
        low, high = high, 2 * high
        if high > MAX_EXPONENT:
            return None
    while high - low > EXPONENT_STEP:
        middle = (low + high) / 2
        low, high = (low, middle) if dominates(middle) else (middle, high)
    return Skew(high, max_over_mean(skewed(question, high).layer))


def cited(question: Question, schedules: Sequence[str], has_offloaded: bool = False) -> list[str]:
    """What the numbers rest on, in words: rates of the machine with their evidence, and what is assumed; those that
    offloading needs where the question or, as `has_offloaded` says, an alternative of it offloads."""
    layer, roof = question.layer, question.layer.basis.device.roof
    reached = dict(zip(roof.from_keys, (roof.flops_per_s, roof.bytes_per_s), strict=True))
    begins = []
    for where, link in (("inside a node", layer.fabric.inside), ("between nodes", layer.fabric.between)):
        if link is not None and link.from_keys:
            reached[link.from_keys[0]] = link.bytes_per_s
            is_known = len(link.from_keys) > 1
            source = question.profile.quantities[link.from_keys[1]].source if is_known else "assumed"
            begins.append(f"a message {where} begins after {text.ns(link.alpha_ns)}, {source}")
    if has_offloaded or question.offload_frac:
        machine = layer.basis.device.profile
        reached |= {key: machine[key] for key in rate_keys(machine, question.access)}
        if question.n_per_host > 1:
            begins.append(
                f"{question.n_per_host} GPUs share a host: each has that part of its memory, bandwidth and CPU"
            )
    found = []
    for key, rate in reached.items():
        quantity = question.profile.quantities[key]
        taken = f" x {rate / quantity.value:.2f}" if abs(rate / quantity.value - 1) > 5e-3 else ""
        found.append(f"{key} {text.figure(key, quantity.value)}{taken}, {quantity.kind}: {quantity.source}")
    for name in schedules:
        one, usual = question.overheads[name], DEFAULTS[name]
        source = "arXiv 2506.04667 Table 1" if one.n_launches == usual.n_launches else "as given"
        each = "assumed" if one.host_launch_ns == usual.host_launch_ns else "as given"
        words = f"{name}: launches {one.n_launches} ({source}), of {text.ns(one.host_launch_ns)} ({each})"
        words += f"; starting a collective {text.ns(one.collective_ns)} (assumed)" if one.collective_ns else ""
        words += f"; pieces {one.n_chunks}" if name == "chunked" else ""
        words += f"; {text.frac(one.comm_sm_frac)} of processors communicate" if one.comm_sm_frac else ""
        if one.capacity_factor is not None and name != "fused":
            words += (
                f"; capacity factor {one.capacity_factor:g}"
                if one.capacity_factor
                else "; padded to the fullest expert"
            )
        words += "; a token sent once to each GPU" if one.once_per_gpu else ""
        begins.append(words)
    return [*found, *begins]


@dataclass(frozen=True, eq=False)
class Answer:
    """What was asked of a layer and found: timelines, and by schedule the tokens from which launches no longer matter,
    what stragglers take and from which skew on they dominate (null: never).

    `unpadded_bulk_ns` is what bulk would take if it sent and computed rows alone (null: it does, or was not asked for).

    `buffer_bytes` is the fused kernel's symmetric buffer on each GPU, `routing` the name of what `shares` came from,
    `reasons` what the numbers rest on.
    """

    question: Question
    routing: str
    timelines: tuple[LayerTimeline, ...]
    launch_batch: Mapping[str, int | None]
    skew_frac: Mapping[str, float]
    dominating_skew: Mapping[str, Skew | None]
    max_over_mean: float
    buffer_bytes: float
    unpadded_bulk_ns: float | None
    reasons: Sequence[str]
    alternatives: Sequence[Alternative] = ()
    notes: Sequence[str] = ()

    @property
    def speedup_over(self) -> dict[str, float]:
        """How many times as fast as each other schedule the fused one is; empty without it."""
        latency_ns = {one.schedule: one.latency_ns for one in self.timelines}
        fused_ns = latency_ns.pop("fused", None)
        return {} if fused_ns is None else {name: ns / fused_ns for name, ns in latency_ns.items()}


def unpadded_bulk_ns(question: Question) -> float | None:
    """What a bulk layer would take without padding or dropping; null where it has neither."""
    own = question.overheads["bulk"]
    if own.capacity_factor is None or question.n_gpus == 1:
        return None
    return layer_timeline(question.layer, "bulk", replace(own, capacity_factor=None)).latency_ns


def answer(
    question: Question,
    routing: str,
    schedules: Sequence[str],
    alternatives: Sequence[Alternative] = (),
    notes: Sequence[str] = (),
    progress: Callable[[str], None] = lambda words: None,
) -> Answer:
    """Everything that can be said of a layer under these schedules; `progress` is told what is being looked for."""

    def by_schedule(find: Callable[[Question, str], Found], what: str) -> dict[str, Found]:
        found = {}
        for name in schedules:
            progress(f"{name}: {what} ...")
            found[name] = find(question, name)
        return found

    n_tokens, row_bytes = question.tokens_per_gpu, question.layer.row_bytes
    return Answer(
        question,
        routing,
        tuple(by_schedule(Question.timeline, "who does what when").values()),
        by_schedule(launch_batch, "the batch from which launches no longer matter"),
        by_schedule(skew_frac, "what even routing would save"),
        by_schedule(dominating_skew, "the skew at which stragglers dominate"),
        max_over_mean(question.layer),
        symmetric_buffer_bytes(n_tokens * row_bytes, n_tokens, question.shape.n_experts),
        unpadded_bulk_ns(question) if "bulk" in schedules else None,
        cited(question, schedules, any(one.offload_frac for one in alternatives)),
        alternatives,
        notes,
    )

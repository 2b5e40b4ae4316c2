"""Which points of a plan are profiled and how their ranges and files are called. Needs no torch."""

import re
from collections.abc import Sequence

from .plan import Workload

N_STEPS = 2
DECODE_TOKENS, PREFILL_TOKENS = 4, 256


def range_name(workload: Workload) -> str:
    """The outer range of a step; arguments of a range do not reach the trace, so they are in the name."""
    return f"perfmodel::{workload.op}|shape={workload.shape}|tokens={workload.n_tokens}|routing={workload.routing}"


def file_name(workload: Workload) -> str:
    """`OP-SHAPE-TOKENS-ROUTING.trace.json.gz` with signs that files dislike turned to dashes."""
    parts = (workload.op, workload.shape, str(workload.n_tokens), workload.routing)
    return re.sub(r"[^\w.-]+", "-", "-".join(parts)) + ".trace.json.gz"


def chosen_points(workloads: Sequence[Workload]) -> list[Workload]:
    """A decode-like and a prefill-like MoE layer: skewed where planned, few tokens of about 64 experts, many of few.

    Empty when no MoE layer is planned.
    """
    layers = [w for w in workloads if w.op == "moe_layer"]
    skewed = [w for w in layers if w.routing.startswith("power-law")] or layers
    if not skewed:
        return []
    decode = min(skewed, key=lambda w: (abs(w.n_tokens - DECODE_TOKENS), abs(w.n_experts - 64)))
    prefill = min(skewed, key=lambda w: (abs(w.n_tokens - PREFILL_TOKENS), w.n_experts))
    return [decode] if decode == prefill else [decode, prefill]

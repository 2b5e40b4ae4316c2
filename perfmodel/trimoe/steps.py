"""Tokens of each expert step by step: a family made from the statistics TriMoE states, another pattern, or a file.

Counts are `[step, layer, expert]`, token-expert assignments of a decode batch.
"""

import numpy as np

from perfmodel.errors import InputError
from perfmodel.moe import MoEShape
from perfmodel.routing import Recording, Shares, is_drawn, read_recording, synthetic_counts, synthetic_steps
from perfmodel.routing.patterns import Argument, numbers_after

FAMILY = "three-class"
# arXiv 2603.01058: more than 70 % of experts carry about 8 % of tokens (cold), 20 to 40 % carry up to 70 % (warm). The
# few hot ones carry what is left. Within these ranges the fractions are ours.
COLD_EXPERT_FRAC, WARM_EXPERT_FRAC = 0.72, 0.25
COLD_TOKEN_FRAC, WARM_TOKEN_FRAC = 0.08, 0.70
# Ours, for no number is published: how much experts of one class differ (log units), and how many of a layer's experts
# take each other's places from one step to the next.
WITHIN_CLASS_LOG_SPREAD = 0.3
MAX_LOADS = 10**8  # of all experts in all steps, which are held at once
CHURN = Argument("churn", 0.05, 0, 1)


def three_class_shares(n_steps: int, n_layers: int, n_experts: int, churn: float, seed: int) -> Shares:
    """Shares `[step, layer, expert]` of cold, warm and hot experts in TriMoE's proportions, in each layer's own order.

    In each step every expert with probability `churn` joins those that exchange their places in that order. Raises
    InputError for fewer experts than classes.
    """
    n_cold, n_warm = round(COLD_EXPERT_FRAC * n_experts), round(WARM_EXPERT_FRAC * n_experts)
    n_hot = n_experts - n_cold - n_warm
    if n_hot < 1:
        n_hot, n_warm = 1, n_warm - 1
    if min(n_cold, n_warm) < 1:
        raise InputError(f"routing {FAMILY!r}: {n_experts} experts, expected enough for a cold, a warm and a hot one")
    rng = np.random.default_rng(seed)
    sizes = np.array([n_cold, n_warm, n_hot])
    parts = np.array([COLD_TOKEN_FRAC, WARM_TOKEN_FRAC, 1 - COLD_TOKEN_FRAC - WARM_TOKEN_FRAC])
    shares = np.empty((n_steps, n_layers, n_experts))
    for layer in range(n_layers):
        weights = np.exp(WITHIN_CLASS_LOG_SPREAD * rng.standard_normal(n_experts))
        sums = np.add.reduceat(weights, np.cumsum(sizes) - sizes)
        ranked = weights * np.repeat(parts / sums, sizes)
        place = rng.permutation(n_experts)
        for step in range(n_steps):
            if step:
                movers = np.flatnonzero(rng.random(n_experts) < churn)
                place[movers] = place[rng.permutation(movers)]
            shares[step, layer] = ranked[place]
    return shares


def steps_of(source: str, shape: MoEShape, n_tokens: int, n_steps: int, n_layers: int, seed: int = 0) -> Recording:
    """`n_steps` steps of `n_tokens` tokens each under a routing, for as many MoE layers.

    `source` is `three-class[:CHURN]`, a name that `synthetic_steps` takes, or a routing file: then its own layers, and
    its own steps, once each, where it has several (as many as there are, at most `n_steps`). Counts are drawn anew from
    the shares of each step. Raises InputError for a file of another number of experts.
    """
    if n_steps * n_layers * shape.n_experts > MAX_LOADS:
        raise InputError(
            f"{n_steps:,} steps (some before the timed ones) of {n_layers} layers of {shape.n_experts} experts are "
            f"more than {MAX_LOADS:,} loads"
        )
    is_ordered = True
    if source.partition(":")[0] == FAMILY:
        shares = three_class_shares(n_steps, n_layers, shape.n_experts, numbers_after(source, (CHURN,))[0], seed)
    elif is_drawn(source, f"{FAMILY}[:{CHURN.name.upper()}]"):
        shares = synthetic_steps(source, n_steps, n_layers, shape.n_experts, seed)
    else:
        found = read_recording(source, n_experts=shape.n_experts, top_k=shape.top_k)
        shares, is_ordered = _step_shares(found, n_steps), found.is_ordered
    counts = synthetic_counts(shares, n_tokens, shape.top_k, seed).astype(np.float64)
    tokens = np.full(len(counts), n_tokens, dtype=np.int64)
    return Recording(source, counts, np.arange(counts.shape[1]), shape.top_k, tokens, is_ordered)


def _step_shares(recorded: Recording, n_steps: int) -> Shares:
    """Shares `[step, layer, expert]` of at most `n_steps`; a recording of one step is the same in each of them, and a
    layer that did nothing in a step has its usual shares."""
    if len(recorded.loads) == 1:
        return np.broadcast_to(recorded.shares, (n_steps, *recorded.shares.shape)).copy()
    loads = recorded.loads[:n_steps]
    sums = loads.sum(axis=2, keepdims=True)
    return np.where(sums > 0, loads / np.where(sums > 0, sums, 1.0), recorded.shares)

"""Synthetic routing over several steps and layers: layers that differ, experts that are hot in some steps only.

Shares are made first, `[step, layer, expert]`, then counts of tokens. Everything is reproducible by seed. numpy only.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .batches import MAX_DRAWN, drawn_counts, expected_counts
from .files import Counts, is_there, split_source
from .patterns import (
    DEFAULT_EXPONENT,
    Argument,
    Shares,
    is_pattern,
    numbers_after,
    pattern_shares,
    pattern_usages,
    power_law_shares,
)
from .recording import Recording

# Means over steps that GEM (arXiv 2605.19945) reports, not cut-offs: consistent experts are used in about 85 % of
# steps, temporal ones in about 17 % and then with about 3 times the tokens, bursty and correlated among each other.
CONSISTENT_STEP_FRAC, TEMPORAL_STEP_FRAC, TEMPORAL_WEIGHT = 0.85, 0.17, 3.0
# Ours, where no number is published: half of a layer's experts are temporal, experts that are hot together come in
# groups of four, and an expert that is not used has a hundredth of the weight of one that is.
TEMPORAL_EXPERT_FRAC, GROUP_SIZE, IDLE_WEIGHT = 0.5, 4, 0.01

FAMILIES: dict[str, Argument] = {
    "layered": Argument("spread", 0.5, 0, 1),
    "temporal": Argument("burst", 4, 1, 1e6),
    "skewed-temporal": Argument("burst", 4, 1, 1e6),
}


def family_usages() -> list[str]:
    """How the names that `synthetic_steps` takes beside the patterns are written: `layered[:SPREAD]`, ..."""
    return [f"{name}[:{argument.name.upper()}]" for name, argument in FAMILIES.items()]


def is_drawn(source: str, *more: str) -> bool:
    """Whether a routing is drawn from the family or pattern of that name; else it is in a file, or a folder of files.

    A file is preferred to a name, a name to a folder. Raises InputError where it is neither; `more` are further names
    that are listed then.
    """
    is_file = is_there(source) and Path(source).is_file()
    if not is_file and (source.partition(":")[0] in FAMILIES or is_pattern(source)):
        return True
    if not is_there(split_source(source)[0]):
        known = ", ".join([*more, *family_usages(), *pattern_usages()])
        raise InputError(f"no routing file {source!r}, and no routing of that name; known: {known}")
    return False


def synthetic_steps(name: str, n_steps: int, n_layers: int, n_experts: int, seed: int) -> Shares:
    """Shares `[step, layer, expert]`, summing to 1 over experts, of a family or a pattern.

    A pattern is the same in every step and layer, hottest expert first. `layered:SPREAD` is a power law with an
    exponent and an order of experts for each layer, the same in every step. `temporal:BURST` changes from step to step,
    in bursts of BURST steps on average; `skewed-temporal:BURST` is that times `layered`, over its sum. Raises
    InputError for unknown names, and for sizes below 1.
    """
    for words, size in (("steps", n_steps), ("layers", n_layers), ("experts", n_experts)):
        if size < 1:
            raise InputError(f"routing {name!r}: the number of {words} is {size}, expected at least 1")
    family = name.partition(":")[0]
    if family not in FAMILIES:
        if not is_pattern(name):
            known = ", ".join([*pattern_usages(), *family_usages()])
            raise InputError(f"unknown routing {name!r}; known: {known}")
        return np.broadcast_to(pattern_shares(name, n_experts), (n_steps, n_layers, n_experts)).copy()
    number = numbers_after(name, (FAMILIES[family],))[0]
    rng = np.random.default_rng(seed)
    if family == "layered":
        layers = layered_shares(n_layers, n_experts, number, rng)
        return np.broadcast_to(layers, (n_steps, n_layers, n_experts)).copy()
    bursts = np.stack([temporal_shares(n_steps, n_experts, number, rng) for _ in range(n_layers)], axis=1)
    if family == "temporal":
        return bursts
    skewed = bursts * layered_shares(n_layers, n_experts, FAMILIES["layered"].default, rng)
    return np.asarray(skewed / skewed.sum(axis=2, keepdims=True))


def layered_shares(n_layers: int, n_experts: int, spread: float, rng: np.random.Generator) -> Shares:
    """Shares `[layer, expert]`: a power law in each layer, of an exponent drawn evenly from 1 - spread to 1 + spread,
    over experts in a random order of the layer's own."""
    exponents = rng.uniform(DEFAULT_EXPONENT * (1 - spread), DEFAULT_EXPONENT * (1 + spread), size=n_layers)
    rows = [rng.permutation(power_law_shares(n_experts, float(exponent))[0]) for exponent in exponents]
    return np.stack(rows)


def temporal_shares(n_steps: int, n_experts: int, burst: float, rng: np.random.Generator) -> Shares:
    """Shares `[step, expert]` of one layer with consistent and temporal experts, as GEM describes them.

    An expert that is used has weight 1 where it is consistent and 3 where temporal; one that is not has 0.01.
    Consistent experts are used in 85 % of steps, each for itself. Temporal ones go in groups of four: a group is used
    in 17 % of steps, for `burst` steps on average.
    """
    n_temporal = int(TEMPORAL_EXPERT_FRAC * n_experts)
    n_groups = -(-n_temporal // GROUP_SIZE)
    temporal = rng.permutation(n_experts)[:n_temporal]
    group_of = np.arange(n_temporal) // GROUP_SIZE
    used = rng.random((n_steps, n_experts)) < CONSISTENT_STEP_FRAC
    used[:, temporal] = _bursts(n_steps, n_groups, burst, rng)[:, group_of]
    weights = np.ones(n_experts)
    weights[temporal] = TEMPORAL_WEIGHT
    weighted = np.where(used, weights, IDLE_WEIGHT)
    shares: Shares = weighted / weighted.sum(axis=1, keepdims=True)
    return shares


def _bursts(n_steps: int, n_groups: int, burst: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which groups are used in which steps, `[step, group]`: chains of two states that begin in equilibrium."""
    stop = 1.0 / burst
    start = stop * TEMPORAL_STEP_FRAC / (1.0 - TEMPORAL_STEP_FRAC)  # as many bursts begin as end
    used = np.empty((n_steps, n_groups), dtype=bool)
    used[0] = rng.random(n_groups) < TEMPORAL_STEP_FRAC
    for step in range(1, n_steps):
        draw = rng.random(n_groups)
        used[step] = np.where(used[step - 1], draw >= stop, draw < start)
    return used


def synthetic_counts(shares: Shares, n_tokens: int, top_k: int, seed: int) -> Counts:
    """Counts `[step, layer, expert]` of steps of n_tokens tokens each, which select experts by `[step, layer, expert]`.

    Each step and layer sums to n_tokens x top_k. Small batches are drawn at random, large ones are expected counts, as
    in `routing`. Raises InputError for top-k outside 1 to the number of experts, and for no tokens.
    """
    n_steps, n_layers, n_experts = shares.shape
    rows = shares.reshape(-1, n_experts)
    counts = expected_counts(rows, n_tokens, top_k)
    if n_tokens * n_experts <= MAX_DRAWN:
        seeds = np.random.SeedSequence(seed).generate_state(len(rows))
        counts = np.stack([drawn_counts(row, n_tokens, top_k, int(own)) for row, own in zip(rows, seeds, strict=True)])
    return counts.reshape(n_steps, n_layers, n_experts)


def synthetic_recording(
    name: str, n_steps: int, n_layers: int, n_experts: int, n_tokens: int, top_k: int, seed: int = 0
) -> Recording:
    """A recording drawn from a pattern or family, of steps of n_tokens tokens; its notes say that it was drawn."""
    shares = synthetic_steps(name, n_steps, n_layers, n_experts, seed)
    return Recording(
        f"{name}, drawn",
        synthetic_counts(shares, n_tokens, top_k, seed).astype(np.float64),
        np.arange(n_layers),
        top_k,
        np.full(n_steps, n_tokens),
        notes=("drawn from a pattern, not recorded",),
    )

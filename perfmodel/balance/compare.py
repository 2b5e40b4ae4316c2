"""What policies make of a routing on GPUs of given staircases: a window of steps makes the map, later ones judge it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from perfmodel.errors import InputError
from perfmodel.moe import MoEShape
from perfmodel.physics import Array
from perfmodel.placement.balance import ExpertMap, imbalance, linear, round_robin, token_balanced
from perfmodel.placement.eplb import rebalance
from perfmodel.placement.gem import TINY, WINDOW_STEPS, gem
from perfmodel.placement.staircase import Staircase
from perfmodel.routing import Recording, is_drawn, read_recording, synthetic_counts, synthetic_steps

LINEAR, BALANCED = "linear", "lpt"
POLICIES = (LINEAR, "round-robin", BALANCED, "lpt-free", "lpt-speed", "eplb", "gem")
N_STEPS = 3 * WINDOW_STEPS  # of a routing that is drawn: a window, and twice as many to judge by
TPOT = (50, 90, 99)  # percentiles


@dataclass(frozen=True)
class Slots:
    """What EPLB may use: slots for experts in all (null: one for each expert), groups of experts, nodes of GPUs."""

    n_slots: int | None = None
    n_groups: int = 1
    n_nodes: int = 1


@dataclass(frozen=True)
class Outcome:
    """What a map costs on the steps that judge it. `layer_ns` is the time of the slowest GPU of a layer, `step_ns` that
    of all MoE layers of the model, mean and percentiles over steps: the MoE part of the time per output token.

    `gain_frac` is the saved share of the latency of a policy, without those that GPUs which do not divide the experts
    rule out. `straggler_frac[gpu]` is how often each GPU is the one that is waited for (equal ones share),
    `idle_frac[gpu]` how long each waits. `layer_by_rows_ns` is the layer's time from the rows of every expert, null
    where times were measured by tokens alone.
    """

    policy: str
    layer_ns: float
    step_ns: dict[str, float]
    gain_frac: dict[str, float]
    imbalance: float
    straggler_frac: tuple[float, ...]
    idle_frac: tuple[float, ...]
    layer_by_rows_ns: float | None

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain values."""
        return {
            "policy": self.policy,
            "layer_ns": self.layer_ns,
            "layer_by_rows_ns": self.layer_by_rows_ns,
            **{f"step_{name}_ns": value for name, value in self.step_ns.items()},
            **{f"gain_over_{name}_frac": value for name, value in self.gain_frac.items()},
            "imbalance": self.imbalance,
            "straggler_frac": list(self.straggler_frac),
            "idle_frac": list(self.idle_frac),
        }


@dataclass(frozen=True)
class Comparison:
    """The outcome of each policy and the map it made, how many steps made the maps and how many later ones judged."""

    outcomes: tuple[Outcome, ...]
    maps: tuple[ExpertMap, ...]
    n_fitted: int
    n_judged: int

    @property
    def best(self) -> int:
        """The number of the policy with the least latency, by rows where known, the first among equals."""
        return min(
            range(len(self.outcomes)), key=lambda i: self.outcomes[i].layer_by_rows_ns or self.outcomes[i].layer_ns
        )


def made(policy: str, loads: Array, staircase: Staircase, slots: Slots = Slots()) -> ExpertMap:
    """The map that a policy makes from `loads[step, layer, expert]`; raises InputError where it cannot, and for an
    unknown policy."""
    _, n_layers, n_experts = loads.shape
    n_gpus = staircase.n_gpus
    total = loads.sum(axis=0)
    if policy == LINEAR:
        return linear(n_layers, n_experts, n_gpus)
    if policy == "round-robin":
        return round_robin(n_layers, n_experts, n_gpus)
    if policy in (BALANCED, "lpt-free"):
        return token_balanced(total, n_gpus, is_even=policy == BALANCED)
    if policy == "lpt-speed":
        return replace(token_balanced(total, n_gpus, speeds=_speeds(loads, staircase)), policy=policy)
    if policy == "eplb":
        n_slots = n_experts if slots.n_slots is None else slots.n_slots
        return rebalance(total, n_slots, slots.n_groups, slots.n_nodes, n_gpus)
    if policy == "gem":
        return gem(loads, staircase)
    raise InputError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}, all")


def _speeds(loads: Array, staircase: Staircase) -> Array:
    """The speed of each GPU at an even share of the mean load, relative to the first."""
    ns = staircase.of(np.full(staircase.n_gpus, loads.sum(axis=2).mean() / staircase.n_gpus))
    return np.asarray(ns[0] / ns)


def compare(
    loads: Array,
    staircase: Staircase,
    policies: Sequence[str] = POLICIES,
    slots: Slots = Slots(),
    *,
    n_model_layers: int | None = None,
    n_window: int = WINDOW_STEPS,
    by_rows: Callable[[ExpertMap, Array], float] | None = None,
) -> Comparison:
    """Every policy on `loads[step, layer, expert]`: the first `n_window` steps make its map, the others judge it.

    Of fewer than `n_window` + 1 steps the first half makes the maps. Times of steps are those of `n_model_layers`
    layers (null: of those in the loads). `by_rows(map, loads)` gives a layer's time as `layer_ns_by_rows` does.
    Raises InputError for a single step, for steps without any load, and where a policy cannot make a map.
    """
    n_steps, n_layers, n_experts = loads.shape
    if n_steps < 2:
        raise InputError("the routing has a single step, expected some to make a map from and later ones to judge it")
    n_fitted = n_window if n_steps > n_window else n_steps // 2
    window, judged = loads[:n_fitted], loads[n_fitted:]
    if not window.any() or not judged.any():
        raise InputError("no expert was used in the steps that make the map, or in those that judge it")
    maps = tuple(made(policy, window, staircase, slots) for policy in policies)
    known = {one.policy: one for one in maps}
    compared = {}
    for name in (LINEAR, BALANCED) if n_experts % staircase.n_gpus == 0 else ():
        one = known.get(name) or made(name, window, staircase)
        compared[name] = float(_times(one.tokens(judged), staircase).max(axis=2).mean())
    scale = (n_model_layers or n_layers) / n_layers
    outcomes = []
    for one in maps:
        by_rows_ns = by_rows(one, judged) if by_rows else None
        outcomes.append(_outcome(one, judged, staircase, compared, scale, by_rows_ns))
    return Comparison(tuple(outcomes), maps, n_fitted, len(judged))


def _outcome(
    one: ExpertMap,
    loads: Array,
    staircase: Staircase,
    compared: dict[str, float],
    scale: float,
    by_rows_ns: float | None,
) -> Outcome:
    """What a map costs on loads; `compared` are the times of a layer under other policies, ns."""
    tokens = one.tokens(loads)
    ns = _times(tokens, staircase)
    slowest = ns.max(axis=2)
    is_last = (ns == slowest[:, :, None]) & (slowest > 0)[:, :, None]
    step_ns = slowest.sum(axis=1) * scale
    layer_ns = float(slowest.mean())
    return Outcome(
        policy=one.policy,
        layer_ns=layer_ns,
        step_ns={"mean": float(step_ns.mean())} | {f"p{q}": float(np.percentile(step_ns, q)) for q in TPOT},
        gain_frac={name: 1.0 - layer_ns / other_ns for name, other_ns in compared.items()},
        imbalance=imbalance(tokens),
        straggler_frac=tuple((is_last / np.maximum(is_last.sum(axis=2, keepdims=True), 1)).mean(axis=(0, 1)).tolist()),
        idle_frac=tuple((1.0 - ns.sum(axis=(0, 1)) / slowest.sum()).tolist()),
        layer_by_rows_ns=by_rows_ns,
    )


def _times(tokens: Array, staircase: Staircase) -> Array:
    ns = staircase.of(tokens)
    if not np.isfinite(ns).all():
        raise InputError(
            f"a GPU has {tokens.max():,.0f} assignments in a step, more than the {staircase.boundaries[-1]:,} that it "
            "was timed at"
        )
    return ns


def steps_of(source: str, shape: MoEShape, n_tokens: int, n_steps: int | None = None) -> Recording:
    """The loads of a routing over steps: of a file with steps as they are, scaled to `n_tokens` tokens a step; of a
    pattern, a family or a file without steps drawn for the shape's MoE layers, `n_steps` (null: N_STEPS) in all.

    Raises InputError where a file is for another number of experts.
    """
    notes: tuple[str, ...] = ()
    if is_drawn(source):
        shares = synthetic_steps(source, n_steps or N_STEPS, shape.n_layers, shape.n_experts, seed=0)
        layers = np.arange(shape.n_layers)
    else:
        recorded = read_recording(source, n_experts=shape.n_experts, top_k=shape.top_k)
        loads, layers, notes = recorded.loads[:n_steps], recorded.layers, recorded.notes
        shares = loads / np.maximum(loads.sum(axis=2, keepdims=True), TINY)
        if len(recorded.loads) > 1:
            return Recording(
                source, shares * n_tokens * shape.top_k, layers, is_ordered=recorded.is_ordered, notes=notes
            )
        shares = np.repeat(shares, n_steps or N_STEPS, axis=0)
    drawn = synthetic_counts(shares, n_tokens, shape.top_k, seed=0).astype(np.float64)
    return Recording(
        source, drawn, layers, shape.top_k, np.full(len(drawn), n_tokens), notes=(*notes, "drawn at random")
    )

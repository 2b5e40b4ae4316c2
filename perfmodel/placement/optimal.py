"""The placement that costs least under memory budgets, with a bound on how much better any other could be."""

from dataclasses import dataclass

import numpy as np

from .costs import Costs
from .exact import exactly
from .memory import Budget, Memory
from .problem import Array, Tiers
from .relaxed import relax
from .search import balanced, filled, polished


@dataclass(frozen=True, eq=False)
class Solution:
    """A placement `tier[layer, expert]`, its time, and the least that any placement within the budgets takes, ns summed
    over layers."""

    tier: Tiers
    time_ns: float
    bound_ns: float

    @property
    def gap_frac(self) -> float:
        """By how much the placement may be slower than the best one, of its own time."""
        return 1 - self.bound_ns / self.time_ns if self.time_ns else 0.0


def minimise(
    costs: Costs, size_bytes: Array, budgets: tuple[Budget, ...], starts: tuple[Tiers, ...] = (), seed: int = 0
) -> Solution:
    """The placement of least mean time over steps, summed over layers, within the budgets, of experts of
    `size_bytes[layer, expert]`.

    `starts` are placements that the result is never worse than, as far as they keep the budgets; few choices are solved
    exactly. Raises InputError where the experts do not fit into all tiers together.
    """
    memory = Memory(np.broadcast_to(size_bytes, (costs.n_layers, costs.n_experts)), budgets, costs.n_tiers)
    best = exactly(costs, memory)
    if best is not None:
        time_ns = float(costs.layers_ns(best).sum())
        return Solution(best, time_ns, time_ns)
    relaxed = relax(costs, memory, starts)
    rng = np.random.default_rng(seed)
    candidates = [balanced(costs, memory, relaxed, rng), filled(costs, memory, relaxed.largest)]
    candidates += filter(memory.fits, starts)
    found = min(candidates, key=lambda tier: float(costs.layers_ns(tier).sum()))
    better = polished(costs, memory, relaxed, found, rng)
    found = better if memory.fits(better) else found
    time_ns = float(costs.layers_ns(found).sum())
    return Solution(found, time_ns, min(relaxed.bound_ns, time_ns))

"""Policies side by side: what each one's placement costs in steps that it has not seen."""

from dataclasses import dataclass

from perfmodel.placement.costs import Array, Tiers
from perfmodel.placement.optimal import Solution

OPTIMAL = "optimal"
CACHE = "lru"
# Policies that decide in each step who computes what is not resident: what is resident, and how the step is divided.
DISPATCHED = {"fiddler": ("fiddler", "fiddler"), "hybrimoe": ("frequency", "hybrimoe")}


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a policy's placement `tier[layer, expert]` (numbers of placement.TIERS) costs: `fitted_ns[batch]` in the steps
    that decided, `held_out_ns[batch]` in those that judge, means of a layer; `resident_ns[batch]` with all experts resident.

    `slowdown` weighs batches by their passes. `dispatch` names how experts that are not resident are divided in each step
    (null: as the tiers say). `gap_frac` and `bound_ns` say how far from the best the placement can be by its own table of
    costs (null: no bound).
    """

    policy: str
    tier: Tiers
    dispatch: str | None
    fitted_ns: Array
    held_out_ns: Array
    resident_ns: Array
    passes: Array
    solution: Solution | None = None

    @property
    def slowdown(self) -> float:
        """Time over the time with all experts resident, in the steps that judge."""
        return float(self.held_out_ns @ self.passes / (self.resident_ns @ self.passes))

    @property
    def fitted_total_ns(self) -> float:
        """Time of all passes in the steps that decided."""
        return float(self.fitted_ns @ self.passes)
